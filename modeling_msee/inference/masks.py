"""Label maps in the colours of PASCAL VOC, alone, over their image, and as indexed PNG files."""

from pathlib import Path
from typing import BinaryIO

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


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless RGB, uint8 (H, W, 3)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an RGB image, uint8 (H, W, 3), got {image.dtype} {image.shape}")


def check_same_size(image: np.ndarray, name: str, values: np.ndarray) -> None:
    """Raise ValueError unless `values`, called `name`, is (H, W) of the RGB image."""
    check_image(image)
    if values.shape != image.shape[:2]:
        raise ValueError(f"{name} must have the image's size {image.shape[:2]}, got {values.shape}; resize it first")


def blend(image: np.ndarray, colours: np.ndarray, alpha: float) -> np.ndarray:
    """`colours` over the image with the share `alpha` in [0, 1], uint8 of the image's shape."""
    return np.rint((1 - alpha) * image + alpha * colours.astype(np.float32)).astype(np.uint8)


def overlay(image: np.ndarray, segmentation: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """The image with every pixel that is not background tinted in its class's VOC colour, uint8 (H, W, 3).

    `segmentation` is (H, W) at the image's size, 255 tinted cream; `alpha` in [0, 1] is the colour's share.
    """
    segmentation = np.asarray(segmentation)
    check_same_size(image, "segmentation", segmentation)
    tinted = blend(image, colorize(segmentation, voc_palette()), alpha)
    return np.where((segmentation > 0)[..., None], tinted, image)


def reduced_picture(image: np.ndarray, largest: int) -> np.ndarray:
    """The image, uint8 (H, W, 3), with its longer side at most `largest` pixels, aspect kept."""
    check_image(image)
    factor = largest / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(round(factor * side), 1) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def save_palette_png(segmentation: np.ndarray, path: str | Path | BinaryIO) -> None:
    """Write a label map (H, W), values 0 to 255, as an indexed PNG in VOC colours, as VOC's own masks are."""
    palette = voc_palette()
    colorize(segmentation, palette)  # its checks
    picture = Image.fromarray(np.asarray(segmentation, dtype=np.uint8))
    picture.putpalette(palette.tobytes())
    picture.save(path, format="PNG")
