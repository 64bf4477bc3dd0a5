"""Evaluate a model on a split: streaming, over one or several processes, with or without dense CRF."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .confusion import Scores, confusion_matrix, scores
from .protocols import MSEE, Protocol
from .samples import DIGEST_BITS, EvaluationSamples, ScoredSample
from .scoring import ImageScores, score_image
from .segmentation import CRFRequest, protocol_views, refined_labels


@dataclass(frozen=True)
class Evaluation:
    """Scores by row ("CAM", "Seg", …), and what was scored.

    `fingerprint` is of the content: the same images with the same labels and masks have the same one, wherever they
    are stored and in whatever order.
    """

    protocol: Protocol
    rows: dict[str, Scores]
    images: int
    fingerprint: str


class Tally:
    """Sums over images: confusion matrices (rows, K, K), number, digest."""

    def __init__(self, rows: int, classes: int):
        self.matrices = np.zeros((rows, classes, classes), dtype=np.int64)
        self.images = 0
        self.digest = 0

    def add(self, sample: ScoredSample, result: ImageScores) -> None:
        """All that is known of an image before the dense CRF."""
        self.matrices[: len(result.matrices)] += result.matrices
        self.images += 1
        self.digest += sample.digest

    def add_refined(self, labels: np.ndarray, target: np.ndarray) -> None:
        """The label map of an image after the dense CRF."""
        self.matrices[-1] += confusion_matrix(labels, target, self.matrices.shape[-1])

    def evaluation(self, protocol: Protocol) -> Evaluation:
        """The exact total over all processes, the same in each."""
        parts = gather_object([(self.matrices, self.images, self.digest)])
        matrices = sum(part[0] for part in parts)
        return Evaluation(
            protocol=protocol,
            rows={name: scores(matrix) for name, matrix in zip(protocol.row_names, matrices, strict=True)},
            images=sum(part[1] for part in parts),
            fingerprint=f"{sum(part[2] for part in parts) % 2**DIGEST_BITS:0{DIGEST_BITS // 4}x}",
        )


def evaluate(
    model: MSEEForWeaklySupervisedSegmentation,
    samples: EvaluationSamples,
    protocol: Protocol = MSEE,
    crf_workers: int = 2,
) -> Evaluation:
    """Scores of CAM, auxiliary CAM, Seg and Seg + CRF, as far as the protocol has them.

    Every process scores its share of the images; nothing but the K x K matrices is kept.

    Args:
        model: on the device it shall run on.
        samples: the whole split.
        crf_workers: processes for the dense CRF, which overlap the network, for each process of the evaluation.
    """
    model.eval()
    tally = Tally(len(protocol.row_names), len(model.config.label_names))
    if protocol.crf:
        for target, labels in refined_labels(_crf_requests(model, samples, protocol, tally), crf_workers):
            tally.add_refined(labels, target)
    else:
        for _ in _scored(model, samples, protocol, tally):
            pass
    return tally.evaluation(protocol)


def _scored(
    model: MSEEForWeaklySupervisedSegmentation, samples: EvaluationSamples, protocol: Protocol, tally: Tally
) -> Iterator[tuple[ScoredSample, ImageScores]]:
    """This process's share of the images, each added to the tally."""
    state = PartialState()
    share = range(state.process_index, len(samples), state.num_processes)
    for index in tqdm(share, desc="Evaluating", disable=not state.is_local_main_process):
        sample = samples.read(index)
        views = protocol_views(samples.processor, sample.image, protocol, model.device)
        result = score_image(model, views, sample.labels[None].to(model.device), sample.target, protocol)
        tally.add(sample, result)
        yield sample, result


def _crf_requests(
    model: MSEEForWeaklySupervisedSegmentation, samples: EvaluationSamples, protocol: Protocol, tally: Tally
) -> Iterator[CRFRequest[np.ndarray]]:
    """The same for the dense CRF, with the label map that its result is to be compared with."""
    for sample, result in _scored(model, samples, protocol, tally):
        assert result.candidates is not None  # the protocol has CRF
        yield CRFRequest(sample.target.numpy(), np.asarray(sample.image), result.candidates)
