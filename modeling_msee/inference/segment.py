"""Images through the network in batches of equal size, and what was found in each."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..image_processing_msee import MSEEImageProcessor, resize_labels
from .network import Segmenter
from .sources import ImageSource, Unreadable, read_source


LARGEST_IMAGE = 4096  # patches: above, an image is reduced for the network (1024 x 1024 pixels at 16 a patch)
LARGEST_SCORES = 100_000_000  # values of K x H x W: above, the mask is made at a smaller size and enlarged


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found in one image.

    Args:
        source: where the image came from, and what its results are called.
        picture: the image upright, uint8 RGB (H, W, 3).
        pixel_values: what the network saw (3, h, w).
        segmentation: uint8 (H, W), 0 the background, c + 1 class c.
        probabilities: image-level (K - 1,) in [0, 1], of the foreground classes.
        shares: of the pixels (K,), summing to 1, the background first.
    """

    source: ImageSource
    picture: np.ndarray
    pixel_values: Tensor
    segmentation: np.ndarray
    probabilities: np.ndarray
    shares: np.ndarray


def segment(
    segmenter: Segmenter, sources: Sequence[ImageSource], batch_size: int = 4
) -> Iterator[Prediction | Unreadable]:
    """One result for each source, in their order.

    Images are never padded to share a batch, because the encoder would attend to the padding: of every
    `4 * batch_size` images in turn, those of equal size at the network go through it together. A mask so does not
    depend on what else is predicted. An image of more than 4096 patches is reduced for the network; a mask always has
    the image's own size.

    Raises:
        ValueError: batch_size below 1, or more classes than a mask of one byte can hold.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
    if len(segmenter.class_names) > 255:
        raise ValueError(f"expected at most 255 classes with the background, got {len(segmenter.class_names)}.")
    window = 4 * batch_size
    for start in range(0, len(sources), window):
        yield from _segment_window(segmenter, sources[start : start + window], batch_size)


def network_size(processor: MSEEImageProcessor, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels at the network: whole patches, at most 4096 of them."""
    patch_size = processor.patch_size
    rows, columns = (side // patch_size for side in processor.resized_size(height, width))
    if rows * columns > LARGEST_IMAGE:
        factor = math.sqrt(LARGEST_IMAGE / (rows * columns))
        # A side of one patch cannot shrink, so the other one may have to shrink more.
        rows = min(max(int(rows * factor), 1), LARGEST_IMAGE)
        columns = min(max(int(columns * factor), 1), LARGEST_IMAGE // rows)
    return rows * patch_size, columns * patch_size


def processor_of_size(processor: MSEEImageProcessor, size: tuple[int, int]) -> MSEEImageProcessor:
    """The same processor for images that all become `size`: height and width in whole patches."""
    fixed = {"height": size[0], "width": size[1]}
    return MSEEImageProcessor.from_dict({**processor.to_dict(), "size": fixed})


def _segment_window(
    segmenter: Segmenter, sources: Sequence[ImageSource], batch_size: int
) -> Iterator[Prediction | Unreadable]:
    results: dict[int, Prediction | Unreadable] = {}
    images: dict[int, Tensor] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    for index, source in enumerate(sources):
        image = read_source(source, segmenter.processor)
        if isinstance(image, Unreadable):
            results[index] = image
        else:
            images[index] = image
            groups.setdefault(network_size(segmenter.processor, *image.shape[1:]), []).append(index)
    for size, members in groups.items():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            pairs = [(sources[index], images[index]) for index in batch]
            results |= dict(zip(batch, _segment_batch(segmenter, pairs, size), strict=True))
    for index in range(len(sources)):
        yield results[index]


def _segment_batch(
    segmenter: Segmenter, pairs: Sequence[tuple[ImageSource, Tensor]], size: tuple[int, int]
) -> Iterator[Prediction]:
    """Sources and images (3, H, W) that all have `size` at the network."""
    processor = processor_of_size(segmenter.processor, size)
    pixel_values = processor([image for _, image in pairs], return_tensors="pt")["pixel_values"]
    scores = segmenter.scores(pixel_values)
    classes = len(segmenter.class_names)
    for index, (source, image) in enumerate(pairs):
        height, width = image.shape[1:]
        output = SemanticSegmenterOutput(logits=scores.logits[index : index + 1])
        shrink = min(math.sqrt(LARGEST_SCORES / (classes * height * width)), 1.0)
        made_at = (max(int(height * shrink), 1), max(int(width * shrink), 1))
        labels = processor.post_process_semantic_segmentation(output, target_sizes=[made_at])[0]
        assert isinstance(labels, Tensor)  # no scores were asked for
        segmentation = resize_labels(labels, (height, width)).to(torch.uint8).numpy()
        yield Prediction(
            source=source,
            picture=image.round().to(torch.uint8).permute(1, 2, 0).numpy(),
            pixel_values=pixel_values[index],
            segmentation=segmentation,
            probabilities=scores.class_logits[index].sigmoid().numpy(),
            shares=np.bincount(segmentation.ravel(), minlength=classes) / segmentation.size,
        )
