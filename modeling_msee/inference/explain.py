"""What a model sees in one image, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..encoder_msee import EncoderFeatures
from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from ..regions_msee import reliable_regions


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model sees in one image; everything is an array (H, W) at the image's own size.

    Args:
        activation: by scale, the strongest Eq. 1 map of the labelled classes, in [0, 1]; 1.0 is the image itself.
        regions: by scale factor in order of precedence, the reliable positions (Eq. 3, 4), bool.
        fused_activation: the strongest labelled map fused over scales and mirror images, in [0, 1); evaluation
            scores this one as CAM.
        pseudo_label: refined label map, 255 ignored.
        segmentation: the decoder's label map.
    """

    activation: dict[float, np.ndarray]
    regions: dict[float, np.ndarray]
    fused_activation: np.ndarray
    pseudo_label: np.ndarray
    segmentation: np.ndarray


@torch.no_grad()
def explain(
    model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor, image: Image.Image, labels: Tensor
) -> Explanation:
    """Everything that training reads off one image; every pass of the encoder is computed once.

    Args:
        image: RGB.
        labels: multi-hot image-level labels (K - 1,); maps, regions and pseudo label are restricted to them.
    """
    model.eval()
    config, size = model.config, (image.height, image.width)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    labels = labels[None].to(model.device)
    student = model.encode(pixel_values)
    logits = model.decoder(student.features)
    passes = model.upright_passes(pixel_values, student, config.activation_scale_factors, config.scale_factors)
    fused, _ = model.fused_maps(passes, model.mirrored_passes(pixel_values), pixel_values.shape[-2:])
    drawn = (1.0, *config.scale_factors)
    maps = {scale: model.labelled_activation_maps(passes[scale].features, labels) for scale in drawn}
    return Explanation(
        activation={scale: _strongest(scale_maps, size) for scale, scale_maps in maps.items()},
        regions=region_masks(model, passes, logits, labels, size),
        fused_activation=_strongest(fused * labels[..., None, None], size),
        pseudo_label=_nearest(model.pseudo_labels(pixel_values, labels, maps=fused), size),
        segmentation=_resize(logits.float(), size)[0].argmax(dim=0).cpu().numpy(),
    )


def region_masks(
    model: MSEEForWeaklySupervisedSegmentation,
    passes: Mapping[float, EncoderFeatures],
    logits: Tensor,
    labels: Tensor,
    size: tuple[int, int],
) -> dict[float, np.ndarray]:
    """The reliable regions (Eq. 3, 4) of one image at a size (H, W), bool, by scale factor in order of precedence.

    Args:
        passes: the encoder's features at every scale factor, as `upright_passes` gives them.
        logits: the decoder's scores (1, K, h, w).
        labels: multi-hot image-level labels (1, K - 1).
    """
    scales = model.config.scale_factors
    maps = [model.labelled_activation_maps(passes[scale].features, labels) for scale in scales]
    on_grid = [_resize(scale_maps, logits.shape[-2:]) for scale_maps in maps]
    regions = reliable_regions(on_grid, logits.argmax(dim=1), labels, model.config.threshold_mode)
    return {scale: _nearest(region, size) > 0 for scale, region in zip(scales, regions, strict=True)}


def _strongest(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The largest of the maps (1, C, h, w) at every position, (H, W)."""
    return _resize(maps.amax(dim=1, keepdim=True), size)[0, 0].cpu().numpy()


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _nearest(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A label map or mask (1, h, w) at the size (H, W), nearest neighbour."""
    picture = Image.fromarray(labels[0].to(torch.uint8).cpu().numpy())
    return np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))
