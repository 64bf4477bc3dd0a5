"""What the model sees in one image, step by step, as panels of a figure."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..encoder_msee import EncoderFeatures
from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from ..regions_msee import reliable_regions
from .figures import Panel, heat_overlay, region_panel
from .masks import colorize, overlay, voc_palette


REGION_COLOUR = (255, 64, 64)


@torch.no_grad()
def explain(
    model: MSEEForWeaklySupervisedSegmentation,
    processor: MSEEImageProcessor,
    image: Image.Image,
    labels: Tensor,
    target: np.ndarray | None = None,
) -> list[Panel]:
    """What the model sees in an image, and its ground truth.

    Panels: image, CAM at every scale (Eq. 1), reliable regions (Eq. 3, 4), pseudo label, segmentation, ground truth.

    Args:
        image: RGB.
        labels: multi-hot image-level labels (K - 1,); CAMs, regions and pseudo label are restricted to them.
        target: label map (H, W) of the image, if there is one.
    """
    model.eval()
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    labels = labels[None].to(model.device)
    picture = np.asarray(image)
    student = model.encode(pixel_values)
    logits = model.decoder(student.features)
    maps = _maps_per_scale(model, pixel_values, student, labels)

    panels = [Panel("Image", picture)]
    for scale in sorted(maps):
        panels.append(_heat_panel(f"CAM ×{scale:g}", picture, maps[scale].amax(dim=1)[0]))
    panels += _region_panels(model, picture, maps, logits, labels)
    pseudo = _nearest(model.pseudo_labels(pixel_values, labels)[0], image.size)
    panels.append(Panel("Pseudo label", overlay(picture, pseudo)))
    segmentation = _resize(logits.float(), picture.shape[:2])[0].argmax(dim=0).cpu().numpy()
    panels.append(Panel("Segmentation", overlay(picture, segmentation)))
    if target is not None:
        panels.append(Panel("Ground truth", colorize(target, voc_palette())))
    return panels


@torch.no_grad()
def activation_panels(
    model: MSEEForWeaklySupervisedSegmentation, pixel_values: Tensor, picture: np.ndarray, titles: Mapping[int, str]
) -> list[Panel]:
    """The multi-scale CAM of some classes of one image, one panel each.

    Args:
        pixel_values: (1, 3, h, w).
        picture: the same image, uint8 RGB (H, W, 3) of any size.
        titles: of the panels, by foreground class (0 to K - 2).
    """
    pixel_values = pixel_values.to(model.device)
    maps, _ = model.multi_scale_activation_maps(pixel_values, torch.tensor([list(titles)], device=model.device))
    return [_heat_panel(title, picture, heat) for title, heat in zip(titles.values(), maps[0], strict=True)]


@torch.no_grad()
def region_panels(
    model: MSEEForWeaklySupervisedSegmentation, pixel_values: Tensor, picture: np.ndarray, labels: Tensor
) -> list[Panel]:
    """The reliable regions (Eq. 3, 4) of one image, one panel for each scale factor.

    Args:
        pixel_values: (1, 3, h, w).
        picture: the same image, uint8 RGB (H, W, 3) of any size.
        labels: multi-hot image-level labels (1, K - 1).
    """
    pixel_values, labels = pixel_values.to(model.device), labels.to(model.device)
    student = model.encode(pixel_values)
    maps = _maps_per_scale(model, pixel_values, student, labels)
    return _region_panels(model, picture, maps, model.decoder(student.features), labels)


def _maps_per_scale(
    model: MSEEForWeaklySupervisedSegmentation, pixel_values: Tensor, student: EncoderFeatures, labels: Tensor
) -> dict[float, Tensor]:
    """Eq. 1 maps of the labelled classes by scale, each on its own grid."""
    passes = model.upright_passes(pixel_values, student, model.config.scale_factors)
    return {scale: model.labelled_activation_maps(view.features, labels) for scale, view in passes.items()}


def _region_panels(
    model: MSEEForWeaklySupervisedSegmentation,
    picture: np.ndarray,
    maps: Mapping[float, Tensor],
    logits: Tensor,
    labels: Tensor,
) -> list[Panel]:
    scales = model.config.scale_factors
    on_grid = [_resize(maps[scale], logits.shape[-2:]) for scale in scales]
    regions = reliable_regions(on_grid, logits.argmax(dim=1), labels, model.config.threshold_mode)
    panels = []
    for scale, region in zip(scales, regions, strict=True):
        mask = _nearest(region[0], (picture.shape[1], picture.shape[0]))
        title = f"B{'ˡ' if scale > 1 else 'ˢ'} ×{scale:g}"
        panels.append(Panel(title, region_panel(picture, mask > 0, REGION_COLOUR)))
    return panels


def _heat_panel(title: str, picture: np.ndarray, heat: Tensor) -> Panel:
    """A map (h, w) in [0, 1] over its image."""
    resized = _resize(heat[None, None], picture.shape[:2])[0, 0]
    return Panel(title, heat_overlay(picture, resized.cpu().numpy()))


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _nearest(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A label map or mask (h, w) at the size (width, height), nearest neighbour."""
    picture = Image.fromarray(labels.to(torch.uint8).cpu().numpy())
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))
