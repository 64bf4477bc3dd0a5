"""What the model sees in one image, step by step, as panels of a figure."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from ..regions_msee import reliable_regions
from .figures import Panel, heat_overlay, overlay, region_panel
from .masks import colorize, voc_palette


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
    grid = student.features.shape[-2:]
    passes = model.upright_passes(pixel_values, student, model.config.scale_factors)
    maps = {scale: model.labelled_activation_maps(view.features, labels) for scale, view in passes.items()}
    on_grid = [_resize(maps[scale], grid) for scale in model.config.scale_factors]
    regions = reliable_regions(on_grid, logits.argmax(dim=1), labels, model.config.threshold_mode)

    panels = [Panel("Image", picture)]
    for scale in sorted(maps):
        heat = _resize(maps[scale].amax(dim=1, keepdim=True), picture.shape[:2])[0, 0]
        panels.append(Panel(f"CAM ×{scale:g}", heat_overlay(picture, heat.cpu().numpy())))
    for scale, region in zip(model.config.scale_factors, regions, strict=True):
        mask = _nearest(region[0], image.size)
        panels.append(
            Panel(f"B{'ˡ' if scale > 1 else 'ˢ'} ×{scale:g}", region_panel(picture, mask > 0, REGION_COLOUR))
        )
    pseudo = _nearest(model.pseudo_labels(pixel_values, labels)[0], image.size)
    panels.append(Panel("Pseudo label", overlay(picture, pseudo)))
    segmentation = _resize(logits.float(), picture.shape[:2])[0].argmax(dim=0).cpu().numpy()
    panels.append(Panel("Segmentation", overlay(picture, segmentation)))
    if target is not None:
        panels.append(Panel("Ground truth", colorize(target, voc_palette())))
    return panels


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _nearest(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A label map or mask (h, w) at the size (width, height), nearest neighbour."""
    picture = Image.fromarray(labels.to(torch.uint8).cpu().numpy())
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))
