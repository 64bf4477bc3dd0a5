"""The dense energy at training size, forward and backward: python -m benchmarks.energy PHOTOGRAPH…

448 px, so 224 px in the filter, 21 classes, scores as of a decoder of 16 px patches, one image at a time.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from modeling_msee.losses_msee import dense_energy_loss


SIZE, PATCH, CLASSES = 448, 16, 21


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description=__doc__)
    parser.add_argument("photographs", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="of each photograph, after one more")
    options = parser.parse_args(arguments)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {options.repeats}, milliseconds\n"
    )
    print("| photograph | forward | backward | both | both, CPU |\n|---|---|---|---|---|")
    for path in options.photographs:
        image = photograph_at_training_size(path)
        seconds = np.array([forward_and_backward(image) for _ in range(options.repeats + 1)])[1:]
        forward, backward, processor = np.median(seconds, axis=0) * 1e3
        both = np.median(seconds[:, :2].sum(axis=1)) * 1e3
        print(f"| {path.name} | {forward:.0f} | {backward:.0f} | {both:.0f} | {processor:.0f} |")


def photograph_at_training_size(path: Path) -> Tensor:
    """(1, 3, 448, 448), colours in [0, 255]."""
    with Image.open(path) as image:
        pixels = pil_to_tensor(image.convert("RGB"))[None].float()
    return F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")


def forward_and_backward(image: Tensor) -> tuple[float, float, float]:
    """Seconds of the forward pass and of the backward pass; seconds of processor time of both."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, CLASSES, SIZE // PATCH, SIZE // PATCH, generator=generator)
    probabilities = F.interpolate(scores, size=(SIZE, SIZE), mode="bilinear").softmax(dim=1).requires_grad_()
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.int64)
    box = torch.tensor([[0, SIZE, 0, SIZE]])
    start, processor = time.perf_counter(), time.process_time()
    energy = dense_energy_loss(image, probabilities, labels, box)
    middle = time.perf_counter()
    energy.backward()
    return middle - start, time.perf_counter() - middle, time.process_time() - processor


if __name__ == "__main__":
    main()
