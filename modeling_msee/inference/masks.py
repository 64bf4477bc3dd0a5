"""Label maps in the colours of PASCAL VOC, in memory and as indexed PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image


def voc_palette(n: int = 256) -> np.ndarray:
    """The first `n` colours of the PASCAL VOC colormap, uint8 (n, 3); 0 is black, 255 (ignored) is cream.

    Bits 0, 1, 2 of the value (then 3, 4, 5, …) are bits 7 (then 6, …) of red, green, blue. `n` is 1 to 256.
    """
    if not 1 <= n <= 256:
        raise ValueError(f"expected 1 to 256 colours, got {n}")
    values = np.arange(n)[:, None]
    channels = np.arange(3)[None, :]
    palette = np.zeros((n, 3), dtype=np.int64)
    for step in range(8):
        palette |= ((values >> (3 * step + channels)) & 1) << (7 - step)
    return palette.astype(np.uint8)


def colorize(segmentation: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a label map (H, W); ValueError for a value the palette has no colour for."""
    segmentation = np.asarray(segmentation)
    if segmentation.ndim != 2 or not np.issubdtype(segmentation.dtype, np.integer):
        raise ValueError(f"expected an integer label map (H, W), got {segmentation.dtype} {segmentation.shape}")
    if segmentation.min() < 0 or segmentation.max() >= len(palette):
        raise ValueError(
            f"the palette has colours 0 to {len(palette) - 1}, the label map holds "
            f"{segmentation.min()} to {segmentation.max()}"
        )
    return np.asarray(palette, dtype=np.uint8)[segmentation]


def save_palette_png(segmentation: np.ndarray, path: str | Path) -> None:
    """Write a label map (H, W), values 0 to 255, as an indexed PNG in VOC colours, as VOC's own masks are."""
    palette = voc_palette()
    colorize(segmentation, palette)  # its checks
    picture = Image.fromarray(np.asarray(segmentation, dtype=np.uint8))
    picture.putpalette(palette.tobytes())
    picture.save(path, format="PNG")
