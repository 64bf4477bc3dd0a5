"""Class activation maps: Eq. 1, multi-scale fusion, and what is read off the maps (labels, regions, local views).

Label maps hold 0 for background, c + 1 for class c and 255 for ignored positions. Boxes are (top, bottom, left, right)
in positions of the map they are used with, half open.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


IGNORE_INDEX = 255


def class_activation_maps(features: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
    """Class activation maps, Eq. 1: ReLU(W_c F) over its maximum per image and class.

    Args:
        features: encoder features (B, D, h, w).
        weight: classifier weight (C, D) or (C, D, 1, 1).
        labels: multi-hot image-level labels (B, C); maps of absent classes are zero.

    Returns:
        (B, C, h, w) in [0, 1]; a class without a positive value has a zero map.
    """
    scores = activation_scores(features, weight).relu()
    peak = scores.amax(dim=(-2, -1), keepdim=True)
    maps = scores / torch.where(peak > 0, peak, torch.ones_like(peak))
    return maps if labels is None else maps * labels[:, :, None, None].to(maps.dtype)


def activation_scores(features: Tensor, weight: Tensor) -> Tensor:
    """Unnormalised activation W_c F: features (B, D, h, w) and weight (C, D[, 1, 1]) -> (B, C, h, w)."""
    return torch.einsum("cd,bdhw->bchw", weight.flatten(1), features)


def fuse_activation_maps(maps: Sequence[Tensor], size: tuple[int, ...]) -> Tensor:
    """The baseline's multi-scale activation map: scores summed over scales, then min-max per map.

    Args:
        maps: one tensor per scale, scores (B, C, h_s, w_s), or (V, B, C, h_s, w_s) with V views of the scale (the
            image and its mirror image, already mirrored back), of which the larger value counts.
        size: height and width of the result.

    Returns:
        (B, C, height, width) in [0, 1): minus the minimum, over the maximum + 1e-5.
    """
    total = maps[0].new_zeros(())
    for scores in maps:
        views = scores if scores.ndim == 5 else scores[None]
        resized = [F.interpolate(view, size=size, mode="bilinear", align_corners=False) for view in views]
        total = total + torch.stack(resized).amax(dim=0).relu()
    total = total - total.amin(dim=(-2, -1), keepdim=True)
    return total / (total.amax(dim=(-2, -1), keepdim=True) + 1e-5)


def present_classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the classes present, so that later steps run over P of them instead of all C.

    Args:
        labels: multi-hot (B, C).

    Returns:
        indices (B, P) int64, ascending where valid, and valid (B, P) bool, with P the largest number of classes in one
        image, at least 1.
    """
    count = max(int((labels > 0).sum(dim=1).max()), 1)
    order = torch.argsort((labels > 0).to(torch.uint8), dim=1, descending=True, stable=True)[:, :count]
    return order, labels.gather(1, order) > 0


def take_classes(maps: Tensor, indices: Tensor) -> Tensor:
    """Maps (…, B, C, h, w) of the classes in indices (B, P) -> (…, B, P, h, w)."""
    index = indices[:, :, None, None].expand(*maps.shape[:-3], indices.shape[1], *maps.shape[-2:])
    return maps.gather(-3, index)


def restore_classes(label_map: Tensor, indices: Tensor) -> Tensor:
    """Label map (B, h, w) over present classes (0, 1 … P, 255) -> label map over all classes."""
    table = F.pad(indices + 1, (1, 0))  # (B, 1 + P): what each label of the map stands for
    inside = label_map.clamp(max=indices.shape[1]).flatten(1)
    restored = table.gather(1, inside).view_as(label_map)
    return torch.where(label_map == IGNORE_INDEX, label_map, restored)


def activation_to_labels(
    maps: Tensor,
    labels: Tensor,
    background: float,
    high: float | None = None,
    low: float | None = None,
    box: Tensor | None = None,
) -> Tensor:
    """Label map of activation maps: the strongest labelled class, background where it is weak, ignored between.

    Args:
        maps: (B, C, h, w) in [0, 1].
        labels: multi-hot (B, C).
        background: at or below this value a position is background.
        high, low: if given, at or below `high` a position is ignored and at or below `low` background again.
        box: valid box per image (B, 4) in positions of the map; ignored outside.

    Returns:
        (B, h, w) int64.
    """
    value, index = (maps * labels[:, :, None, None].to(maps.dtype)).max(dim=1)
    result = torch.where(value <= background, 0, index + 1)
    if high is not None:
        result = torch.where(value <= high, IGNORE_INDEX, result)
    if low is not None:
        result = torch.where(value <= low, 0, result)
    if box is None:
        return result
    return torch.where(box_mask(box, *maps.shape[-2:]), result, IGNORE_INDEX)


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of top, bottom, left, right -> (B, height, width) bool, true inside."""
    rows = torch.arange(height, device=box.device)[None, :, None]
    columns = torch.arange(width, device=box.device)[None, None, :]
    top, bottom, left, right = (edge[:, None, None] for edge in box.unbind(dim=1))
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def scale_box(box: Tensor, patch_size: int) -> Tensor:
    """The box (B, 4) in patches: every patch wholly inside; if none is, the one at the centre.

    Empty boxes stay empty.
    """
    start, end = box[:, 0::2].to(torch.int64), box[:, 1::2].to(torch.int64)
    # Whole numbers throughout: 42 * (1 / 14) is above 3 in float32.
    first, last = -(-start // patch_size), end // patch_size
    centre = (start + end) // (2 * patch_size)
    none = (last <= first) & (end > start)
    first, last = torch.where(none, centre, first), torch.where(none, centre + 1, last)
    return torch.stack((first, last), dim=2).flatten(1)


def labels_to_affinity(label_map: Tensor) -> Tensor:
    """Pairwise relation of positions: label map (B, h, w) -> (B, hw, hw) uint8.

    1 is the same label, 0 a different one, 255 ignored. A pair is ignored where either label is ignored, and on
    the diagonal.
    """
    flat = label_map.flatten(1)
    affinity = (flat[:, None, :] == flat[:, :, None]).to(torch.uint8)
    ignored = flat == IGNORE_INDEX
    affinity[ignored[:, None, :] | ignored[:, :, None]] = IGNORE_INDEX
    affinity.diagonal(dim1=1, dim2=2).fill_(IGNORE_INDEX)
    return affinity


def uncertainty_mask(maps: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """Certainty of the strongest labelled class: maps (B, C, h, w) -> (B, h, w) int64.

    0 at or below `low`, 2 at or above `high`, 1 between: the uncertain positions.
    """
    value = (maps * labels[:, :, None, None].to(maps.dtype)).amax(dim=1)
    return (value > low).to(torch.int64) + (value >= high).to(torch.int64)


def local_crops(images: Tensor, mask: Tensor, size: int, draws: Tensor, share: float = 0.2) -> tuple[Tensor, ...]:
    """Square crops centred on positions that are not certain foreground (the baseline's local views).

    Candidates are the centres at least `size // 2` from the border with a mask value of at most 1; all such centres if
    an image has fewer of them than crops.

    Args:
        images: (B, 3, H, W).
        mask: `uncertainty_mask` (B, H, W).
        size: side of a crop in pixels.
        draws: (B, n) in [0, 1): draw u takes candidate number floor(u * candidates), row by row.
        share: a crop whose mean mask value is at or below this is a negative.

    Returns:
        crops (n, B, 3, size, size), positive (B, n) bool, top_left (B, n, 2) int64.

    Raises:
        ValueError: the image is smaller than a crop.
    """
    height, width = images.shape[-2:]
    margin = size // 2
    if min(height, width) <= 2 * margin:
        raise ValueError(f"local crops of {size} px need images larger than that, got {height}x{width}.")
    centres = mask[:, margin : height - margin, margin : width - margin]
    candidates = (centres <= 1).flatten(1)
    enough = candidates.sum(dim=1, keepdim=True) >= draws.shape[1]
    candidates = candidates | ~enough
    rank = (draws.double() * candidates.sum(dim=1, keepdim=True)).floor().long()
    chosen = torch.searchsorted(candidates.long().cumsum(dim=1), rank + 1)
    top, left = chosen // centres.shape[2], chosen % centres.shape[2]
    window = torch.arange(size, device=images.device)
    rows = (top[:, :, None] + window)[:, :, :, None]  # (B, n, size, 1)
    columns = (left[:, :, None] + window)[:, :, None, :]  # (B, n, 1, size)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    crops = images.permute(0, 2, 3, 1)[batch, rows, columns]  # (B, n, size, size, 3)
    positive = mask[batch, rows, columns].double().mean(dim=(2, 3)) > share
    return crops.permute(1, 0, 4, 2, 3).contiguous(), positive, torch.stack((top, left), dim=-1)
