"""What a data worker spends on one training image, by part: python -m benchmarks.augmentation

Photographs are generated at the usual size of each recipe's data, stored as JPEG and read as in training.
"""

import io
import time
from collections import defaultdict
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_msee import MSEEConfig
from modeling_msee.data.contract import read_rgb
from modeling_msee.training.arguments import read_recipe
from modeling_msee.training.augmentation import TrainingAugmentation

from .workload import CONFIGURATION


PARTS = ("_rescale_flip_crop", "training_view", "global_view", "local_view", "normalize")
PHOTOGRAPHS = {"voc.yaml": (375, 500), "tags.yaml": (224, 224)}


def main() -> None:
    print("| recipe | image | reading | " + " | ".join(PARTS) + " | sum, CPU-milliseconds |")
    print("|---" * (len(PARTS) + 4) + "|")
    for name, size in PHOTOGRAPHS.items():
        costs = measure(name, size, repeats=40)
        cells = [f"{1e3 * seconds:.1f}" for seconds in (*costs.values(), sum(costs.values()))]
        print(f"| {name} | {size[1]}x{size[0]} | " + " | ".join(cells) + " |")


def measure(recipe_name: str, size: tuple[int, int], repeats: int) -> dict[str, float]:
    """Mean seconds of processor time of every part; a mean, because the draws decide what an image costs."""
    recipe, config = read_recipe(str(CONFIGURATION / recipe_name)), MSEEConfig()
    augmentation = TrainingAugmentation(
        crop_size=recipe["crop_size"],
        rescale=(recipe["rescale_min"], recipe["rescale_max"]),
        local_crop_count=config.local_crop_count,
        mean=config.image_mean,
        std=config.image_std,
    )
    totals: dict[str, float] = defaultdict(float)

    def timed(name, function):
        def call(*arguments):
            start = time.process_time()
            result = function(*arguments)
            totals[name] += time.process_time() - start
            return result

        return call

    sample = {"image_id": "photograph", "image": {"bytes": photograph(*size), "path": None}}
    read = timed("reading", read_rgb)
    read(sample)  # what is slow once, such as the first import of a decoder
    totals.clear()
    patches = {name: timed(name, getattr(augmentation, name)) for name in PARTS}
    with mock.patch.multiple(augmentation, **patches):
        for seed in range(repeats):
            augmentation(read(sample), seed)
    return {name: totals[name] / repeats for name in ("reading", *PARTS)}


def photograph(height: int, width: int) -> bytes:
    """A JPEG of smooth noise."""
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).numpy().astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in a worker
    main()
