"""A legend of classes below a picture, drawn by PIL at the picture's own resolution."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .masks import check_image, voc_palette


def with_legend(picture: np.ndarray, entries: Mapping[int, str]) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with a white strip below: a swatch in VOC colours and a text for each entry.

    Entries map mask values (0 to 255) to texts. A picture narrower than the longest entry gets a white margin on the
    right. Letters that the built-in font of PIL lacks (it has Latin ones) show as boxes.
    """
    check_image(picture)
    height, width = picture.shape[:2]
    size = min(max(width // 36, 12), 32)  # height of letters in pixels
    font = ImageFont.load_default(size)
    swatch = round(1.4 * size)
    widths = {value: swatch + round(0.4 * size + font.getlength(text) + size) for value, text in entries.items()}
    canvas_width = max(width, size + max(widths.values(), default=0))
    lines = _lines(widths, canvas_width - size)
    strip = round(1.8 * size)
    canvas = Image.new("RGB", (canvas_width, height + strip * len(lines) + size // 2), "white")
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    for row, line in enumerate(lines):
        left, middle = size // 2, height + size // 4 + round((row + 0.5) * strip)
        for value in line:
            box = (left, middle - size // 2, left + swatch, middle + size // 2)
            draw.rectangle(box, fill=tuple(voc_palette()[value].tolist()), outline="black")
            draw.text((left + swatch + round(0.4 * size), middle), entries[value], "black", font, anchor="lm")
            left += widths[value]
    return np.asarray(canvas)


def _lines(widths: Mapping[int, int], limit: int) -> list[list[int]]:
    """Values of the entries, wrapped into lines of at most `limit` pixels."""
    lines: list[list[int]] = []
    room = 0
    for value, width in widths.items():
        if not lines or width > room:
            lines.append([])
            room = limit
        lines[-1].append(value)
        room -= width
    return lines
