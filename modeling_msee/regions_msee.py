"""Reliable discriminative regions: confidence thresholds (Eq. 2) and binary masks (Eq. 3 and 4).

Modes, where Eq. 2 leaves open which values are averaged and compared:
    per_class       one threshold per image and class: the mean of the class's map over the pixels that the decoder
                    gives to the class; a position is selected if any labelled class exceeds its own threshold.
    per_image       one threshold per image: the mean over all (class, pixel) pairs of that kind; compared with the
                    largest map of the labelled classes.
    per_image_max   one threshold per image: the mean of the largest labelled map over the pixels that the decoder
                    gives to any labelled class; compared with that largest map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def confidence_thresholds(maps: Tensor, segmentation: Tensor, labels: Tensor, mode: str = "per_class") -> Tensor:
    """Confidence thresholds T, Eq. 2: the mean activation within the decoder's seed region.

    Args:
        maps: activation maps of one scale on the student's grid (B, C, h, w), in [0, 1].
        segmentation: decoder label map (B, h, w), 0 background, c + 1 class c; or its scores (B, C + 1, h, w).
        labels: multi-hot (B, C).
        mode: see the head of this file.

    Returns:
        (B, C) for `per_class`, else (B,). NaN where there is no seed pixel: nothing exceeds it, so nothing is
        selected.

    Raises:
        ValueError: an unknown mode.
    """
    seeds = seed_regions(segmentation, labels)
    if mode == "per_class":
        return (maps * seeds).sum(dim=(2, 3)) / seeds.sum(dim=(2, 3))
    if mode == "per_image":
        return (maps * seeds).sum(dim=(1, 2, 3)) / seeds.sum(dim=(1, 2, 3))
    if mode == "per_image_max":
        seed = seeds.amax(dim=1)
        return (_strongest(maps, labels) * seed).sum(dim=(1, 2)) / seed.sum(dim=(1, 2))
    raise ValueError(f"mode: expected 'per_class', 'per_image' or 'per_image_max', got {mode!r}.")


def seed_regions(segmentation: Tensor, labels: Tensor) -> Tensor:
    """Seeds of the labelled classes, (B, C, h, w) of 0/1.

    From a label map (B, h, w) or scores (B, C + 1, h, w), and labels (B, C).
    """
    label_map = segmentation.argmax(dim=1) if segmentation.ndim == 4 else segmentation
    classes = torch.arange(1, labels.shape[1] + 1, device=label_map.device)[None, :, None, None]
    return ((label_map[:, None] == classes) & (labels[:, :, None, None] > 0)).float()


def reliable_regions(
    maps_per_scale: Sequence[Tensor], segmentation: Tensor, labels: Tensor, mode: str = "per_class"
) -> list[Tensor]:
    """Reliable discriminative regions B, Eq. 3 and 4, generalised to any number of scales.

    Args:
        maps_per_scale: activation maps (B, C, h, w) of each scale on the student's grid, in order of precedence.
        segmentation, labels, mode: as in `confidence_thresholds`.

    Returns:
        one bool mask (B, h, w) per scale: strictly above the threshold, and in no earlier scale's region.
    """
    regions: list[Tensor] = []
    for maps in maps_per_scale:
        thresholds = confidence_thresholds(maps, segmentation, labels, mode)
        if mode == "per_class":
            above = (maps > thresholds[:, :, None, None]) & (labels[:, :, None, None] > 0)
            region = above.any(dim=1)
        else:
            region = _strongest(maps, labels) > thresholds[:, None, None]
        for earlier in regions:
            region = region & ~earlier
        regions.append(region)
    return regions


def _strongest(maps: Tensor, labels: Tensor) -> Tensor:
    """Largest map of the labelled classes: (B, C, h, w) -> (B, h, w)."""
    return (maps * labels[:, :, None, None].to(maps.dtype)).amax(dim=1)
