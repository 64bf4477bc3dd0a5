"""Evaluation samples: whole images with image-level labels and label maps."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.contract import class_names, multi_hot, read_image, read_rgb
from ..image_processing_msee import IGNORE_INDEX, MSEEImageProcessor


class EvaluationSamples(torch.utils.data.Dataset):
    """Images at their own size with label maps and image-level labels, one by one."""

    def __init__(self, dataset: Dataset, processor: MSEEImageProcessor):
        # A split without masks has no such column, or an empty one where another split has masks.
        if "segmentation_map" not in dataset.column_names or not any(dataset[:1]["segmentation_map"]):
            raise ValueError(
                "evaluation needs a column 'segmentation_map' with masks, found "
                f"{', '.join(dataset.column_names)}. Prepare the split with masks, or train with --eval_split none."
            )
        self.dataset = dataset
        self.processor = processor
        self.num_classes = len(class_names(dataset)) - 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.dataset[index]
        image, target = read_rgb(sample), np.asarray(read_image(sample, "segmentation_map"))
        self._check_mask(target, (image.height, image.width), sample["image_id"])
        return {
            "labels": multi_hot(sample["labels"], self.num_classes, sample["image_id"]),
            "pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0],
            "segmentation_map": torch.from_numpy(target.astype(np.int64)),
        }

    def _check_mask(self, target: np.ndarray, size: tuple[int, int], image_id: str) -> None:
        if target.shape != size:
            raise ValueError(
                f"{image_id}: expected a mask with one channel and the image's height and width {size}, "
                f"got {target.shape}."
            )
        wrong = target[(target > self.num_classes) & (target != IGNORE_INDEX)]
        if wrong.size:
            raise ValueError(
                f"{image_id}: expected mask values 0 to {self.num_classes} or {IGNORE_INDEX} (ignored), "
                f"got {wrong[0]}."
            )

    def image(self, index: int) -> Image.Image:
        """The image at its own size."""
        return read_rgb(self.dataset[index])
