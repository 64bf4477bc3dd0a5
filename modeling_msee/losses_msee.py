"""The training losses as pure functions: Eq. 5-7 of the paper and the baseline's terms.

Every loss is finite for finite input; an empty set of pixels, pairs or regions contributes zero.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation_msee import IGNORE_INDEX, box_mask
from .refinement_msee import bilateral_filter


def mean_over_images(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A loss of every image by itself, averaged: the same however a batch is spread over processes and steps.

    Args:
        loss: function of batches (B, ...) that gives a scalar, such as those below that normalise over the batch.
        inputs: (B, ...) each.

    Returns:
        scalar, the mean of the losses of B batches of one image.
    """
    return torch.vmap(loss)(*(batch[:, None] for batch in inputs)).mean()


def feature_distillation_loss(student: Tensor, teacher: Tensor, beta: float = 2.0, distance: str = "vector") -> Tensor:
    """Smooth l1 distance of features per position, Eq. 5 and 6.

    Args:
        student, teacher: (B, D, h, w).
        beta: where the quadratic part ends.
        distance: "vector" takes the L2 norm over channels, as printed; "elementwise" the mean of the channels' smooth
            l1.

    Returns:
        (B, h, w), at least 0.

    Raises:
        ValueError: shapes differ, or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"expected features of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    if distance == "elementwise":
        return F.smooth_l1_loss(student, teacher, beta=beta, reduction="none").mean(dim=1)
    if distance != "vector":
        raise ValueError(f"distance: expected 'vector' or 'elementwise', got {distance!r}.")
    squared = (student - teacher).square().sum(dim=1)
    near = squared <= beta**2
    # The square root only sees values above beta², where its gradient is finite.
    norm = torch.where(near, torch.full_like(squared, beta**2), squared).sqrt()
    return torch.where(near, squared / (2 * beta), norm - beta / 2)


def msee_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    regions: Sequence[Tensor],
    beta: float = 2.0,
    distance: str = "vector",
    reduction: str = "mean",
) -> Tensor:
    """Multi-scale encoder enhancement loss, Eq. 7: distillation within the reliable regions of each scale.

    Args:
        student: features of the original scale (B, D, h, w).
        teachers: features of the other scales, any (B, D, h_s, w_s); resized bilinearly to the student's grid.
        regions: masks (B, h, w), one per teacher.
        beta, distance: as in `feature_distillation_loss`.
        reduction: "sum" over positions and batch as printed, or "mean": that sum over B * h * w.

    Returns:
        scalar.

    Raises:
        ValueError: as many regions as teachers are needed; an unknown reduction.
    """
    if len(teachers) != len(regions):
        raise ValueError(f"expected one region per teacher, got {len(teachers)} teachers and {len(regions)} regions.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}.")
    total = student.new_zeros(())
    for teacher, region in zip(teachers, regions, strict=True):
        resized = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
        distances = feature_distillation_loss(student, resized, beta, distance)
        total = total + (distances * region.to(distances.dtype)).sum()
    return total / student[:, 0].numel() if reduction == "mean" else total


def patch_token_contrast_loss(features: Tensor, affinity: Tensor) -> Tensor:
    """Patch-token contrast of the baseline: tokens of one pseudo label attract, of two repel.

    ½ (1 - Σ_pos |cos| / (n_pos + 1)) + ½ Σ_neg |cos| / (n_neg + 1), over all pairs of the batch.

    Args:
        features: (B, D, h, w).
        affinity: (B, hw, hw) of `labels_to_affinity`: 1 positive, 0 negative, 255 ignored.
    """
    tokens = F.normalize(features.flatten(2), dim=1)
    similarity = torch.einsum("bdi,bdj->bij", tokens, tokens).abs()
    positive, negative = affinity == 1, affinity == 0
    attract = (similarity * positive).sum() / (positive.sum() + 1)
    repel = (similarity * negative).sum() / (negative.sum() + 1)
    return 0.5 * (1 - attract) + 0.5 * repel


def class_token_contrast_loss(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float = 0.5) -> Tensor:
    """Class-token contrast of the baseline: global views attract uncertain local views and repel background ones.

    With e = exp(t·s / T) and N the sum of e over the negatives, per teacher view and image:
    (Σ_pos -log(e / (e + N + 1e-4)) - log(1 / (1 + N + 1e-4))) / (n_pos + 1e-4).

    Args:
        student: projections (V * B, P), view by view, the two global views first.
        teacher: projections (2 * B, P) of the global views by the averaged head.
        positive: (B, V), non-zero where a view is a positive.
        temperature: T.

    Returns:
        scalar, the mean over the two teacher views and the batch.
    """
    batch, views = positive.shape
    student, teacher = student.view(views, batch, -1), teacher.view(2, batch, -1)
    exponent = torch.einsum("tbp,vbp->tbv", teacher, student) / temperature
    # Quotients of exponentials stay within float32; projections of a healthy head stay far inside.
    e = torch.exp(exponent.clamp(-40, 40))
    positive = (positive > 0)[None]
    negatives = (e * ~positive).sum(dim=-1) + 1e-4
    attract = -torch.log(e / (e + negatives[..., None]))
    repel = -torch.log(1 / (1 + negatives))
    return (((attract * positive).sum(dim=-1) + repel) / (positive.sum(dim=-1) + 1e-4)).mean()


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Balanced cross entropy on pseudo labels: half over background pixels, half over foreground pixels.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), 0 background, 255 ignored.

    Returns:
        scalar; a half without a pixel is zero (the reference is NaN there).
    """
    entropy = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="none")
    background = labels == 0
    foreground = (labels != 0) & (labels != IGNORE_INDEX)
    halves = [(entropy * part).sum() / part.sum().clamp(min=1) for part in (background, foreground)]
    return 0.5 * (halves[0] + halves[1])


# The permutohedral lattice of the published code returns this share of the exact Gaussian sum (0.526 of the filter,
# 0.53 to 0.54 of the gradient on the reference cases); with it the published weight keeps its meaning.
LATTICE_SHARE = 0.53


def dense_energy_loss(
    image: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    box: Tensor,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
) -> Tensor:
    """Dense energy of the segmentation (RRM [1], as the baseline uses it): alike pixels should share a class.

    -weight / B Σ_p gate_p S_p · (K S)_p at `scale`, with S the probabilities inside the box and K the bilateral
    kernel. The gate, 1 - max_c S_c inside the box and 1 where the label is ignored, and K are constants of the
    gradient, which is -2 · gate · (K S) · inside / B.

    Args:
        image: (B, 3, H, W), colours in [0, 255].
        probabilities: (B, K, H, W), softmax of the scores.
        labels: pseudo labels (B, H, W), 255 ignored.
        box: (B, 4) valid part in pixels.
        sigma_rgb, sigma_xy: standard deviations of the kernel in colour steps and in pixels at full size.
        scale: size at which the energy is computed, relative to the image.

    Returns:
        scalar, at most 0.
    """
    height, width = image.shape[-2:]
    small_image = F.interpolate(image, scale_factor=scale, recompute_scale_factor=True)
    small = F.interpolate(
        probabilities, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=True
    )
    inside = box_mask(box, height, width)[:, None].to(small.dtype)
    inside = F.interpolate(inside, scale_factor=scale, recompute_scale_factor=True)
    ignored = F.interpolate(
        (labels == IGNORE_INDEX)[:, None].to(small.dtype), scale_factor=scale, recompute_scale_factor=True
    )
    confidence = small.detach().amax(dim=1, keepdim=True)
    gate = torch.where(ignored > 0, 1.0, (inside - confidence).clamp(min=0))
    small = small * inside
    filtered = gate * bilateral_filter(small_image, small.detach(), sigma_rgb, sigma_xy * scale)
    energy = -(small * filtered).sum() * weight * LATTICE_SHARE / len(image)
    # The kernel sum is symmetric in S, so its gradient is twice that of the product with a constant.
    return 2 * energy - energy.detach()
