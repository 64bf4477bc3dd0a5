"""Evaluate a model on a split: streaming, over one or several processes, with or without dense CRF."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .confusion import Scores, confusion_matrix, scores
from .crf import CRFPool
from .samples import EvaluationSamples
from .scoring import MAP_NAMES, ImageScores, score_image


PROTOCOL = "msee (Seg: one scale, not mirrored; CAM: all scales and mirror images, ground-truth image labels)"
CRF_NAME = "Seg + CRF"


@dataclass(frozen=True)
class ScoredImage:
    """One image with its scores and its label map (H, W)."""

    image: Image.Image
    scores: ImageScores
    target: Tensor


def evaluate(
    model: MSEEForWeaklySupervisedSegmentation,
    samples: EvaluationSamples,
    crf: bool = False,
    crf_workers: int = 2,
) -> dict[str, Scores]:
    """Scores of CAM, auxiliary CAM and Seg, and of Seg + CRF if asked, summed exactly over all processes.

    Every process scores its share of the images; nothing but the K x K matrices is kept.

    Args:
        model: on the device it shall run on.
        samples: the whole split.
        crf: also score the segmentation after dense CRF, in `crf_workers` worker processes that overlap the network.
    """
    model.eval()
    names = [*MAP_NAMES, CRF_NAME] if crf else list(MAP_NAMES)
    classes = len(model.config.label_names)
    total = np.zeros((len(names), classes, classes), dtype=np.int64)
    stream = _scored_images(model, samples)
    if crf:
        _add_with_crf(total, stream, crf_workers)
    else:
        for scored in stream:
            total += scored.scores.matrices
    total = np.sum(gather_object([total]), axis=0)
    return dict(zip(names, (scores(matrix) for matrix in total), strict=True))


def _scored_images(model: MSEEForWeaklySupervisedSegmentation, samples: EvaluationSamples) -> Iterator[ScoredImage]:
    """This process's share of the images."""
    state = PartialState()
    share = range(state.process_index, len(samples), state.num_processes)
    for index in tqdm(share, desc="Evaluating", disable=not state.is_local_main_process):
        sample = samples[index]
        pixel_values, labels = (sample[name][None].to(model.device) for name in ("pixel_values", "labels"))
        result = score_image(model, pixel_values, labels, sample["segmentation_map"])
        yield ScoredImage(samples.image(index), result, sample["segmentation_map"])


def _add_with_crf(total: np.ndarray, stream: Iterator[ScoredImage], workers: int) -> None:
    """Add all matrices of a stream, the last one of the segmentation after dense CRF."""
    targets: deque[Tensor] = deque()

    def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for scored in stream:
            total[:-1] += scored.scores.matrices
            targets.append(scored.target)
            yield np.asarray(scored.image), scored.scores.probabilities.cpu().numpy()

    with CRFPool(workers) as pool:
        for labels in pool.map(images()):
            total[-1] += confusion_matrix(labels, targets.popleft().numpy(), total.shape[-1])
