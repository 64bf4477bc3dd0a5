"""What a written data set consists of: splits of examples.

Class indices: foreground class c in 0..C-1 (`labels`) is the mask value c + 1; 0 is background, 255 is ignored.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage


@dataclass(frozen=True)
class Example:
    """One row: `image` is an image file, `mask` a single-channel PNG or None, `labels` sorted indices."""

    image_id: str
    image: bytes
    labels: tuple[int, ...]
    mask: bytes | None = None


@dataclass(frozen=True)
class Split:
    """One split to write. `examples` is read once, lazily; `dropped` counts left-out images by reason."""

    name: str
    examples: Iterable[Example]
    total: int
    with_masks: bool
    dropped: Mapping[str, int] = field(default_factory=dict)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG file of an (H, W) mask or an (H, W, 3) picture."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
