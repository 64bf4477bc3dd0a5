"""Activation maps and reliable regions of a prediction as picture files; imported only where these are asked for."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .explain import region_masks
from .figures import Panel, figure_rows, heat_overlay
from .masks import reduced_picture
from .rows import reliable_region_panel
from .segment import Prediction


LARGEST_PANEL = 512  # pixels a side, before a panel is fitted into its cell


@torch.no_grad()
def draw_activation_maps(
    model: MSEEForWeaklySupervisedSegmentation, prediction: Prediction, titles: Mapping[int, str], path: Path
) -> None:
    """Write the image and the multi-scale CAM of every class in `titles` (0 to K - 2) as one row."""
    picture = reduced_picture(prediction.picture, LARGEST_PANEL)
    pixel_values = prediction.pixel_values[None].to(model.device)
    maps, _ = model.multi_scale_activation_maps(pixel_values, torch.tensor([list(titles)], device=model.device))
    heats = F.interpolate(maps, size=picture.shape[:2], mode="bilinear", align_corners=False)[0].cpu().numpy()
    panels = [Panel(title, heat_overlay(picture, heat)) for title, heat in zip(titles.values(), heats, strict=True)]
    figure_rows([[Panel("Image", picture), *panels]], {}, path, "Class activation maps")


@torch.no_grad()
def draw_regions(
    model: MSEEForWeaklySupervisedSegmentation, prediction: Prediction, titles: Mapping[int, str], path: Path
) -> None:
    """Write the image and its reliable regions for the classes in `titles` (0 to K - 2) as one row."""
    picture = reduced_picture(prediction.picture, LARGEST_PANEL)
    labels = torch.zeros(1, model.config.num_classes, device=model.device)
    labels[0, list(titles)] = 1
    pixel_values = prediction.pixel_values[None].to(model.device)
    student = model.encode(pixel_values)
    passes = model.upright_passes(pixel_values, student, model.config.scale_factors)
    regions = region_masks(model, passes, model.decoder(student.features), labels, picture.shape[:2])
    panels = [reliable_region_panel(picture, scale, region) for scale, region in regions.items()]
    figure_rows([[Panel("Image", picture), *panels]], {}, path, f"Reliable regions: {', '.join(titles.values())}")
