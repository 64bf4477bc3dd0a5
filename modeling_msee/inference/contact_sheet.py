"""A contact sheet: a few pictures of every class of a data set, to see at a glance whether its tags are right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ..data.check import Report
from ..data.contract import read_rgb
from .figures import shortened


_DPI = 150
_SIDE = 132  # pixels, the square a picture is fitted into
_GAP = 6  # pixels between pictures
_MARGIN = 0.12  # inches, as the lengths below
_BETWEEN = 0.3  # columns of classes
_HEADING = 0.24
_NAME = 0.13  # height of the line with the names of the pictures
_NAME_CHARACTERS = 17


@dataclass(frozen=True, eq=False)
class Strip:
    """Pictures of one class under a heading; `names` stand below them."""

    heading: str
    pictures: Sequence[Image.Image]
    names: Sequence[str]


def class_strips(report: Report, split: str, count: int) -> list[Strip]:
    """`count` pictures of every class of a split, and of the images without a tag where there are any."""
    images, names = report.images[split], report.source.class_names
    strips = []
    for label, name in [*enumerate(names), (None, "no tag")]:
        total = sum(label in image.labels if label is not None else not image.labels for image in images)
        if label is None and not total:
            continue
        samples = report.examples(split, label, count)
        pictures = [read_rgb(sample) for sample in samples]
        strips.append(Strip(f"{name} ({total})", pictures, [sample["image_id"] for sample in samples]))
    return strips


def contact_sheet(strips: Sequence[Strip], path: str | Path, title: str) -> None:
    """Write one PNG at 150 dpi with all strips, in as many columns as make it about as wide as high.

    Raises:
        ValueError: there is no strip.
    """
    if not strips:
        raise ValueError("expected at least one class, got none")
    across = max(1, *(len(strip.pictures) for strip in strips))
    strip_width = (across * (_SIDE + _GAP) - _GAP) / _DPI
    strip_height = _HEADING + _SIDE / _DPI + 2 * _NAME
    columns = max(1, round(math.sqrt(len(strips) * strip_height / strip_width)))
    lines = math.ceil(len(strips) / columns)
    width = 2 * _MARGIN + columns * strip_width + (columns - 1) * _BETWEEN
    height = 2 * _MARGIN + 1.2 * _HEADING + lines * strip_height
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - _MARGIN / height, title, fontsize=11, weight="bold", va="top")
    for index, strip in enumerate(strips):
        left = _MARGIN + (index // lines) * (strip_width + _BETWEEN)
        top = height - _MARGIN - 1.2 * _HEADING - (index % lines) * strip_height
        _draw_strip(figure, strip, left, top)
    figure.savefig(path, dpi=_DPI, format="png")


def _draw_strip(figure: Figure, strip: Strip, left: float, top: float) -> None:
    """One class whose upper left corner is `left` and `top` inches from the lower left corner of the figure."""
    width, height = figure.get_size_inches()
    figure.text(left / width, top / height, strip.heading, fontsize=9, weight="bold", va="top")
    side = _SIDE / _DPI
    for index, (picture, name) in enumerate(zip(strip.pictures, strip.names, strict=True)):
        x = left + index * (_SIDE + _GAP) / _DPI
        y = top - _HEADING - side
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        fitted = ImageOps.pad(picture, (_SIDE, _SIDE), color="white")
        axes.imshow(np.asarray(fitted), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        text = shortened(name, _NAME_CHARACTERS)
        figure.text((x + side / 2) / width, (y - 0.02) / height, text, fontsize=5.5, ha="center", va="top")
