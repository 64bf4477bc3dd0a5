"""Evaluation samples: whole images with image-level labels and label maps."""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.contract import class_names, multi_hot, read_image, read_rgb
from ..image_processing_msee import MSEEImageProcessor


class EvaluationSamples(torch.utils.data.Dataset):
    """Images at their own size with label maps and image-level labels, one by one."""

    def __init__(self, dataset: Dataset, processor: MSEEImageProcessor):
        if "segmentation_map" not in dataset.column_names:
            raise ValueError(
                "evaluation needs a column 'segmentation_map', found "
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
        if target.shape != (image.height, image.width):
            raise ValueError(
                f"{sample['image_id']}: image is {image.height}x{image.width}, its mask {target.shape[0]}x{target.shape[1]}."
            )
        return {
            "labels": multi_hot(sample["labels"], self.num_classes, sample["image_id"]),
            "pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0],
            "segmentation_map": torch.from_numpy(target.astype(np.int64)),
        }

    def image(self, index: int) -> Image.Image:
        """The image at its own size."""
        return read_rgb(self.dataset[index])
