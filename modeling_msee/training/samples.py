"""Training samples: what each looks like and in which order they come, as functions of seed and epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.contract import class_names, multi_hot, read_rgb
from .augmentation import TrainingAugmentation, sample_seed


class TrainingSamples(torch.utils.data.Dataset):
    """Augmented training samples; item `epoch * len + index` is sample `index` as it looks in that epoch."""

    def __init__(self, dataset: Dataset, augmentation: TrainingAugmentation, seed: int):
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.num_classes = len(class_names(dataset)) - 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        epoch, index = divmod(item, len(self.dataset))
        sample = self.dataset[index]
        views = self.augmentation(read_rgb(sample), sample_seed(self.seed, epoch, index))
        return {
            "pixel_values": views.pixel_values,
            "labels": multi_hot(sample["labels"], self.num_classes, sample["image_id"]),
            "box": views.box,
            "global_view": views.global_view,
            "local_source": views.local_source,
            "crop_draws": views.crop_draws,
        }


class EpochSampler(torch.utils.data.Sampler[int]):
    """A new order of the samples every epoch, a function of the seed and the epoch alone.

    An epoch is cut to whole effective batches, so that every optimiser step sees one.

    Args:
        length: number of samples.
        batch_size: images per optimiser step over all processes and accumulation steps.
        seed: seed of the run.

    Raises:
        ValueError: fewer samples than one step needs.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        if length < batch_size:
            raise ValueError(
                f"expected at least effective_batch_size = {batch_size} training images, found {length}. "
                "Lower effective_batch_size."
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length - self.length % self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        yield from (self.epoch * self.length + int(index) for index in order[: len(self)])
