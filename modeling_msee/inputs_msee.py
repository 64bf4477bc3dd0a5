"""Checks of what `forward` takes: each says what was expected and what came."""

import torch
from torch import Tensor

from .configuration_msee import MSEEConfig


def check_image(pixel_values: Tensor, patch_size: int) -> None:
    """Raise ValueError unless (B, 3, H, W) with H and W of at least one patch."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values: expected (batch, 3, height, width), got {tuple(pixel_values.shape)}.")
    height, width = pixel_values.shape[-2:]
    if min(height, width) < patch_size:
        raise ValueError(
            f"pixel_values: expected images of at least one {patch_size} px patch, got {height}x{width}. "
            "MSEEImageProcessor enlarges small images."
        )


def checked_labels(labels: Tensor, pixel_values: Tensor, config: MSEEConfig) -> Tensor:
    """Multi-hot labels (B, K - 1) as floats; ValueError for another shape or other values than 0 and 1."""
    expected = (len(pixel_values), config.num_classes)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels: expected multi-hot image-level labels of shape {expected} (batch, classes without "
            f"background), got {tuple(labels.shape)}."
        )
    if not ((labels == 0) | (labels == 1)).all():
        values = labels.unique()[:8].tolist()
        raise ValueError(f"labels: expected only 0 and 1, one column per class, got values {values}.")
    return labels.float()


def checked_box(box: Tensor | None, pixel_values: Tensor) -> Tensor:
    """The part of each image that is not padding (B, 4), by default all; ValueError for another shape."""
    batch, _, height, width = pixel_values.shape
    if box is None:
        return torch.tensor([[0, height, 0, width]], device=pixel_values.device).expand(batch, 4)
    if tuple(box.shape) != (batch, 4):
        raise ValueError(f"box: expected {(batch, 4)} (top, bottom, left, right in pixels), got {tuple(box.shape)}.")
    return box


def checked_source(local_source: Tensor | None, pixel_values: Tensor) -> Tensor:
    """What local views are cut from (B, 3, H, W), by default the image; ValueError for another shape."""
    if local_source is None:
        return pixel_values
    if local_source.shape != pixel_values.shape:
        raise ValueError(
            f"local_source: expected the shape of pixel_values, {tuple(pixel_values.shape)}, "
            f"got {tuple(local_source.shape)}."
        )
    return local_source


__all__ = ["check_image", "checked_box", "checked_labels", "checked_source"]
