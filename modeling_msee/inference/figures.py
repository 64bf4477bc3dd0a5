"""Label maps, activation maps and regions as pictures, and rows of pictures as one figure."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .masks import blend, check_image, check_same_size, voc_palette


_DPI = 150
_SIDE = 255  # pixels, the square a panel is fitted into
_CELL = _SIDE / _DPI  # the same in inches, as all lengths below
_GAP = 0.06
_MARGIN = 0.12
_LINE = 0.17  # height of a line of column title or legend
_CHARACTER = 0.067  # width of a character of the legend
_CELL_CHARACTERS = 22  # column titles are wrapped to this
_CAPTION = 0.15  # height of a line of captions
_CAPTION_CHARACTERS = 30  # captions are cut to this


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a figure: a column title, an RGB image, uint8 (H, W, 3), and a line of text below it."""

    title: str
    image: np.ndarray
    caption: str = ""

    def __post_init__(self) -> None:
        check_image(self.image)


def heat_overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The image under a map in [0, 1] of its size (H, W), from blue (0) to red (1), uint8 (H, W, 3).

    Raises ValueError for another size or values outside [0, 1], nan included.
    """
    heat = np.asarray(heat, dtype=np.float32)
    check_same_size(image, "map", heat)
    if not (heat.min() >= -1e-3 and heat.max() <= 1 + 1e-3):  # a comparison with nan is False
        raise ValueError(f"expected a map in [0, 1], got [{heat.min()}, {heat.max()}]")
    colours = 255 * matplotlib.colormaps["turbo"](np.clip(heat, 0, 1))[..., :3]
    return blend(image, colours, 0.5)


def region_panel(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A binary region (B^l, B^s) over its image: inside tinted in `colour` (RGB), outside dark and grey.

    `mask` is bool (H, W) at the image's size. Returns uint8 (H, W, 3).
    """
    mask = np.asarray(mask)
    check_same_size(image, "mask", mask)
    if mask.dtype != np.bool_:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    outside = np.rint(0.45 * grey).astype(np.uint8)
    return np.where(mask[..., None], blend(image, np.array(colour), 0.5), outside)


def _fitted_size(image: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels of the image in the square cell, aspect kept."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    return max(1, round(factor * height)), max(1, round(factor * width))


def _fit(image: np.ndarray, cell_height: int) -> np.ndarray:
    """The image scaled to its fitted size and centred on a white cell (cell_height, side)."""
    height, width = _fitted_size(image)
    # Enlarged label maps keep sharp edges; shrunk ones lose no thin part.
    resample = Image.Resampling.NEAREST if height > image.shape[0] else Image.Resampling.BOX
    scaled = np.asarray(Image.fromarray(image).resize((width, height), resample))
    cell = np.full((cell_height, _SIDE, 3), 255, dtype=np.uint8)
    top, left = (cell_height - height) // 2, (_SIDE - width) // 2
    cell[top : top + height, left : left + width] = scaled
    return cell


def _check_rows(rows: Sequence[Sequence[Panel]]) -> list[str]:
    """The column titles, the same in every row."""
    if not rows or not rows[0]:
        raise ValueError("expected at least one row with at least one panel, got none")
    titles = [panel.title for panel in rows[0]]
    for index, row in enumerate(rows):
        if [panel.title for panel in row] != titles:
            raise ValueError(
                f"every row must have the titles {titles}, row {index} has {[panel.title for panel in row]}"
            )
    return titles


def _draw_legend(figure: Figure, class_names: Mapping[int, str], columns: int, entry: float) -> None:
    """Swatches and names, row by row, at the bottom. Lengths in inches."""
    width, height = figure.get_size_inches()
    palette = voc_palette() / 255
    lines = math.ceil(len(class_names) / columns)
    for index, (value, name) in enumerate(class_names.items()):
        x = _MARGIN + entry * (index % columns)
        y = _MARGIN + _LINE * (lines - 1 - index // columns)
        swatch = Rectangle(
            (x / width, y / height),
            0.18 / width,
            0.11 / height,
            facecolor=palette[value],
            edgecolor="black",
            linewidth=0.5,
        )
        figure.add_artist(swatch)
        figure.text((x + 0.23) / width, (y + 0.055) / height, name, fontsize=8, va="center_baseline")


def _draw_row(figure: Figure, row: Sequence[Panel], top: float, cell_height: int) -> None:
    """One row of panels whose upper edge is `top` inches from the bottom of the figure."""
    width, height = figure.get_size_inches()
    for column, panel in enumerate(row):
        left = _MARGIN + column * (_CELL + _GAP)
        bottom = top - cell_height / _DPI
        box = (left / width, bottom / height, _CELL / width, cell_height / _DPI / height)
        axes = figure.add_axes(box)
        axes.imshow(_fit(panel.image, cell_height), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        text = shortened(panel.caption, _CAPTION_CHARACTERS)
        figure.text((left + _CELL / 2) / width, (bottom - 0.02) / height, text, fontsize=7, ha="center", va="top")


def shortened(text: str, characters: int) -> str:
    """The text, or its end, which tells names of images apart, in this many characters."""
    return text if len(text) <= characters else f"…{text[1 - characters :]}"


def _caption_height(row: Sequence[Panel]) -> float:
    return _CAPTION if any(panel.caption for panel in row) else 0.0


def figure_rows(rows: Sequence[Sequence[Panel]], class_names: Mapping[int, str], path: str | Path, title: str) -> None:
    """Write one PNG at 150 dpi: a row per example, column titles on top, a legend of classes at the bottom.

    All rows have the same panel titles. `class_names` maps segmentation values to names, and the legend shows
    exactly these in VOC colours. Panels are fitted into squares of one size, aspect kept. Raises ValueError
    for rows that differ in their titles or for a segmentation value outside 0 to 255.
    """
    titles = _check_rows(rows)
    if any(not 0 <= value <= 255 for value in class_names):
        raise ValueError(f"class_names must map segmentation values 0 to 255 to names, got {list(class_names)}")
    entry = 0.4 + _CHARACTER * max((len(name) for name in class_names.values()), default=0)
    width = max(2 * _MARGIN + len(titles) * (_CELL + _GAP), 2 * _MARGIN + entry, 4.0)
    columns = max(1, int((width - 2 * _MARGIN) / entry))
    legend = 2 * _MARGIN + _LINE * math.ceil(len(class_names) / columns)
    wrapped = [textwrap.fill(text, _CELL_CHARACTERS) for text in titles]
    heading = textwrap.fill(title, int((width - 2 * _MARGIN) / 0.1))
    head = 2 * _MARGIN + 0.2 * (heading.count("\n") + 1) + _LINE * max(text.count("\n") + 1 for text in wrapped)
    cell_heights = [max(_fitted_size(panel.image)[0] for panel in row) for row in rows]
    height = head + sum(cell_heights) / _DPI + sum(_caption_height(row) + _GAP for row in rows) + legend

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - _MARGIN / height, heading, fontsize=11, weight="bold", va="top")
    for column, text in enumerate(wrapped):
        centre = _MARGIN + column * (_CELL + _GAP) + _CELL / 2
        figure.text(centre / width, 1 - (head - 0.05) / height, text, fontsize=9, ha="center", va="bottom")
    top = height - head
    for row, cell_height in zip(rows, cell_heights, strict=True):
        _draw_row(figure, row, top, cell_height)
        top -= cell_height / _DPI + _caption_height(row) + _GAP
    _draw_legend(figure, class_names, columns, entry)
    figure.savefig(path, dpi=_DPI, format="png")
