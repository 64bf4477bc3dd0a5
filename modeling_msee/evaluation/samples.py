"""Evaluation samples: whole images with image-level labels and label maps."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data.contract import class_names, multi_hot, read_image, read_rgb
from ..image_processing_msee import IGNORE_INDEX, MSEEImageProcessor


DIGEST_BITS = 128


@dataclass(frozen=True)
class ScoredSample:
    """An RGB image, multi-hot labels (K - 1,), label map (H, W), 255 ignored, and a digest of all three."""

    image: Image.Image
    labels: Tensor
    target: Tensor
    digest: int


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
        sample = self.read(index)
        return {
            "labels": sample.labels,
            "pixel_values": self.processor(sample.image, return_tensors="pt")["pixel_values"][0],
            "segmentation_map": sample.target,
        }

    def read(self, index: int) -> ScoredSample:
        """One image with all that it is scored by; ValueError if a file is broken or the mask does not fit."""
        stored = self.dataset[index]
        image, target = read_rgb(stored), np.asarray(read_image(stored, "segmentation_map"))
        self._check_mask(target, (image.height, image.width), stored["image_id"])
        return ScoredSample(
            image=image,
            labels=multi_hot(stored["labels"], self.num_classes, stored["image_id"]),
            target=torch.from_numpy(target.astype(np.int64)),
            digest=_digest(stored),
        )

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


def _digest(stored: dict) -> int:
    """Digest of one row: name, labels and both files as they are stored."""
    state = hashlib.blake2b(digest_size=DIGEST_BITS // 8)
    state.update(repr((stored["image_id"], stored["labels"])).encode())
    for column in ("image", "segmentation_map"):
        file = stored[column]
        content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
        state.update(len(content).to_bytes(8, "big") + content)
    return int.from_bytes(state.digest(), "big")
