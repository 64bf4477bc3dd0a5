"""The baseline's augmentation (design of ToCo): one training image, a second global view, the source of local views.

Every draw comes from a seed given per sample and epoch, so that a run can be resumed or spread over processes and
workers without changing what any sample looks like.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF


REFERENCE_CROP_SIZE = 448  # pixels, the side of the published recipes


@dataclass(frozen=True)
class AugmentedSample:
    """Views of one image: (3, S, S) float32, normalised.

    The box (4,) is top, bottom, left, right of the part that is no padding.
    """

    pixel_values: Tensor
    global_view: Tensor
    local_source: Tensor
    box: Tensor
    crop_draws: Tensor


class TrainingAugmentation:
    """Random views of an image.

    Args:
        crop_size: side S of all views in pixels.
        rescale: range of the random rescaling.
        local_crop_count: number of draws for local views.
        mean, std: normalisation of colours in [0, 1].
    """

    def __init__(
        self,
        crop_size: int,
        rescale: tuple[float, float],
        local_crop_count: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.crop_size = crop_size
        self.rescale = rescale
        self.local_crop_count = local_crop_count
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
        colour = [
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
        ]
        # The baseline's 0.1 to 2 px are for crops of 448 px; a small crop would lose its texture.
        widest = 2.0 * crop_size / REFERENCE_CROP_SIZE
        blur = v2.GaussianBlur(kernel_size=2 * math.ceil(3 * widest) + 1, sigma=(0.05 * widest, widest))
        self.training_view = v2.Compose([*colour, blur])
        self.local_view = v2.Compose([*colour, v2.RandomApply([blur], p=0.5)])
        self.global_view = v2.Compose(
            [
                v2.RandomResizedCrop(crop_size, scale=(0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                *colour,
                v2.RandomApply([blur], p=0.1),
                v2.RandomSolarize(threshold=128, p=0.2),
            ]
        )

    def __call__(self, image: Image.Image, seed: int) -> AugmentedSample:
        """Views of an RGB image; the same seed gives the same views and leaves the caller's random state alone."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators, too.
            torch.default_generator.manual_seed(seed)
            original = tvF.pil_to_tensor(image)
            cropped, box = self._rescale_flip_crop(original)
            return AugmentedSample(
                pixel_values=self.normalize(self.training_view(cropped)),
                global_view=self.normalize(self.global_view(original)),
                local_source=self.normalize(self.local_view(cropped)),
                box=box,
                crop_draws=torch.rand(self.local_crop_count),
            )

    def _rescale_flip_crop(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Random rescale, flip, zero padding to and crop of the side S: (3, H, W) -> (3, S, S) and its valid box."""
        low, high = self.rescale
        scale = low + (high - low) * torch.rand(()).item()
        height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
        image = tvF.resize(image, [height, width], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        if torch.rand(()).item() < 0.5:
            image = tvF.horizontal_flip(image)
        top, out_top, rows = self._place(height)
        left, out_left, columns = self._place(width)
        canvas = image.new_zeros(3, self.crop_size, self.crop_size)
        canvas[:, out_top : out_top + rows, out_left : out_left + columns] = image[
            :, top : top + rows, left : left + columns
        ]
        return canvas, torch.tensor([out_top, out_top + rows, out_left, out_left + columns])

    def _place(self, side: int) -> tuple[int, int, int]:
        """Where a side of the image meets the crop: start in the image, start in the crop, length."""
        free = abs(side - self.crop_size)
        offset = int(torch.randint(free + 1, ()).item())
        return (offset, 0, self.crop_size) if side >= self.crop_size else (0, offset, side)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of one sample in one epoch, in [0, 2**32)."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
