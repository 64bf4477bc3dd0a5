"""Images of a data set that are to be drawn, with their labels and, where there are any, their masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.contract import class_names, multi_hot, read_image, read_rgb


@dataclass(frozen=True, eq=False)
class Picture:
    """An RGB image, its multi-hot image-level labels (K - 1,) and its label map (H, W), if there is one."""

    image_id: str
    image: Image.Image
    labels: Tensor
    target: np.ndarray | None


def choose_pictures(dataset: Dataset, count: int, min_classes: int = 0) -> list[Picture]:
    """Up to `count` images evenly spaced over those of a split with at least `min_classes` labels.

    Raises:
        ValueError: no image has as many labels, or a file cannot be read.
    """
    found = [index for index, labels in enumerate(dataset["labels"]) if len(labels) >= min_classes]
    if not found:
        raise ValueError(f"expected images with at least {min_classes} classes, none of the {len(dataset)} has them.")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return read_pictures(dataset, [found[index] for index in chosen])


def read_pictures(dataset: Dataset, indices: Sequence[int]) -> list[Picture]:
    """The images at these indices of a split whose files `load_split` left undecoded."""
    classes = len(class_names(dataset)) - 1
    pictures = []
    for index in indices:
        sample = dataset[index]
        has_mask = sample.get("segmentation_map") is not None
        target = np.asarray(read_image(sample, "segmentation_map")) if has_mask else None
        labels = multi_hot(sample["labels"], classes, sample["image_id"])
        pictures.append(Picture(sample["image_id"], read_rgb(sample), labels, target))
    return pictures
