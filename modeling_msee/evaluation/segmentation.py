"""The segmentation of one image under a protocol, and dense CRF on a stream of them."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..encoder_msee import EncoderFeatures
from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .crf import CRFPool
from .protocols import Protocol


Item = TypeVar("Item")


@dataclass(frozen=True)
class Candidates:
    """What the dense CRF needs of a segmentation: the classes that win somewhere, and the background.

    Args:
        classes: ascending (P,).
        probabilities: of these classes, float32 (P, H, W); softmax over all K classes, so the sum may be below 1.
    """

    classes: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class CRFRequest(Generic[Item]):
    """An image (H, W, 3) uint8 with its candidates, and what its label map shall come back with."""

    item: Item
    image: np.ndarray
    candidates: Candidates


def protocol_views(
    processor: MSEEImageProcessor, image: Image.Image, protocol: Protocol, device: torch.device
) -> dict[float, Tensor]:
    """The image at scale 1, which the CAM starts from, and at every scale of a protocol: {scale: (1, 3, h, w)}.

    Each view is resized from the image itself to the nearest whole number of patches, so that all views show the
    same part of it. (ToCo cuts the rest of a patch off at the right and at the bottom.)
    """
    views = {}
    for scale in dict.fromkeys((1.0, *protocol.scales)):
        size = _view_size(processor, image, protocol, scale)
        views[scale] = processor(image, size=size, return_tensors="pt")["pixel_values"].to(device)
    return views


def _view_size(processor: MSEEImageProcessor, image: Image.Image, protocol: Protocol, scale: float) -> dict[str, int]:
    """Size in pixels, before it is rounded to patches, of an image at a scale."""
    size = {"height": image.height, "width": image.width} if processor.size is None else dict(processor.size)
    if protocol.size is not None:
        size = {"height": protocol.size, "width": protocol.size}
    return {key: max(int(scale * side), 1) for key, side in size.items()}


@torch.no_grad()
def segmentation_scores(
    model: MSEEForWeaklySupervisedSegmentation,
    views: dict[float, Tensor],
    size: tuple[int, int],
    protocol: Protocol,
    unscaled: EncoderFeatures | None = None,
) -> Tensor:
    """The decoder's scores (logits) at full size, fused over scales and mirror images as the protocol says.

    Scores are resized bilinearly (align_corners=False) before they are fused. At most three maps of this size exist
    at a time.

    Args:
        views: from `protocol_views`, on the model's device.
        size: height and width of the image.
        unscaled: what `model.encode(views[1.0])` gave, if it has been computed already.

    Returns:
        (K, H, W) float32; the arg-max is the segmentation, the softmax the unary term of the CRF.
    """
    fused = None
    for scale in protocol.scales:
        student = unscaled if scale == 1.0 and unscaled is not None else model.encode(views[scale])
        scores = _resized(model.decoder(student.features), size)
        if protocol.mirror is not None:
            mirrored = model.decoder(model.encode(views[scale].flip(-1)).features).flip(-1)
            protocol.mirror(scores, _resized(mirrored, size), out=scores)
        fused = scores if fused is None else protocol.across_scales(fused, scores, out=fused)
    if fused is None:
        raise ValueError(f"the protocol {protocol.name!r} predicts no segmentation.")
    return fused


def _resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, K, h, w) at full size, (K, H, W) float32."""
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)[0]


def crf_candidates(scores: Tensor, labels: Tensor) -> Candidates:
    """What the CRF needs of scores (K, H, W), whose arg-max (H, W) is `labels`."""
    classes = torch.cat((labels.new_zeros(1), labels.flatten())).unique()
    return Candidates(classes.cpu().numpy(), scores.softmax(dim=0)[classes].cpu().numpy())


def refined_labels(requests: Iterable[CRFRequest[Item]], workers: int) -> Iterator[tuple[Item, np.ndarray]]:
    """Items with their label maps (H, W) after dense CRF in worker processes, in order, as they become ready.

    Takes at most 2 x `workers` requests ahead of the result it is to yield next, so `requests` may be endless.
    """
    pending: deque[tuple[Item, np.ndarray]] = deque()

    def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for request in requests:
            pending.append((request.item, request.candidates.classes))
            yield request.image, request.candidates.probabilities

    with CRFPool(workers) as pool:
        for labels in pool.map(images()):
            item, classes = pending.popleft()
            yield item, classes[labels]
