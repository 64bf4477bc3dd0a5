"""Activation maps and reliable regions of a prediction as picture files; imported only where these are asked for."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .explain import activation_panels, region_panels
from .figures import Panel, figure_rows
from .masks import reduced_picture
from .segment import Prediction


LARGEST_PANEL = 512  # pixels a side, before a panel is fitted into its cell


def draw_activation_maps(
    model: MSEEForWeaklySupervisedSegmentation, prediction: Prediction, titles: Mapping[int, str], path: Path
) -> None:
    """Write the image and the multi-scale CAM of every class in `titles` (0 to K - 2) as one row."""
    picture = reduced_picture(prediction.picture, LARGEST_PANEL)
    panels = activation_panels(model, prediction.pixel_values[None], picture, titles)
    figure_rows([[Panel("Image", picture), *panels]], {}, path, "Class activation maps")


def draw_regions(
    model: MSEEForWeaklySupervisedSegmentation, prediction: Prediction, titles: Mapping[int, str], path: Path
) -> None:
    """Write the image and its reliable regions for the classes in `titles` (0 to K - 2) as one row."""
    picture = reduced_picture(prediction.picture, LARGEST_PANEL)
    labels = torch.zeros(1, model.config.num_classes)
    labels[0, list(titles)] = 1
    panels = region_panels(model, prediction.pixel_values[None], picture, labels)
    figure_rows([[Panel("Image", picture), *panels]], {}, path, f"Reliable regions: {', '.join(titles.values())}")
