"""Images of a split ordered by how well a model segments them."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..evaluation.confusion import scores
from ..evaluation.protocols import MSEE
from ..evaluation.samples import EvaluationSamples
from ..evaluation.scoring import score_image
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation


@dataclass(frozen=True)
class RankedImage:
    """An image of a split with the mIoU, in [0, 1], of its segmentation and its CAM."""

    index: int
    image_id: str
    segmentation: float
    activation: float


def rank_images(model: MSEEForWeaklySupervisedSegmentation, samples: EvaluationSamples) -> list[RankedImage]:
    """All images, the one with the lowest mIoU of the segmentation first.

    The mIoU of an image is over the classes of its ground truth; an image of which every pixel is ignored has none
    and is left out.
    """
    model.eval()
    ranked = []
    for index in tqdm(range(len(samples)), desc="Scoring", unit="image"):
        sample = samples[index]
        pixel_values, labels = (sample[name][None].to(model.device) for name in ("pixel_values", "labels"))
        matrices = score_image(model, {1.0: pixel_values}, labels, sample["segmentation_map"], MSEE).matrices
        mean_iou = {name: scores(matrix)["mean_iou"] for name, matrix in zip(MSEE.row_names, matrices, strict=True)}
        if not math.isnan(mean_iou["Seg"]):
            image_id = samples.dataset[index]["image_id"]
            ranked.append(RankedImage(index, image_id, mean_iou["Seg"], mean_iou["CAM"]))
    return sorted(ranked, key=lambda image: image.segmentation)


def write_ranking(path: Path, ranked: Sequence[RankedImage]) -> None:
    """A CSV file of all images in their order, mIoU in percent."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image_id", "seg_miou", "cam_miou"])
    for image in ranked:
        writer.writerow([image.image_id, f"{100 * image.segmentation:.2f}", f"{100 * image.activation:.2f}"])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
