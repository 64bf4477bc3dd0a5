"""What every builder shares: checks of files and masks, and the command line.

Class indices: foreground class c in 0..C-1 (`labels`) is the mask value c + 1; 0 is background,
255 is ignored.
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage


BACKGROUND = 0
IGNORE_INDEX = 255
EXIF_ORIENTATION = 0x0112
SWAPPING_ORIENTATIONS = (5, 6, 7, 8)

Mask = NDArray[np.uint8]


def image_size(data: bytes, source: object) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header of an image file that errors call `source`."""
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in SWAPPING_ORIENTATIONS
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise ValueError(
            f"{source}: expected an image file, got {len(data)} bytes that cannot be read ({error})"
        ) from error
    return (height, width) if turned else (width, height)


def read_file(path: Path, remedy: str) -> bytes:
    """Bytes of a file; FileNotFoundError names it and the remedy."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"missing file {path}: {remedy}") from error


def decode_mask(data: bytes, source: object) -> Mask:
    """(H, W) uint8 class values of a grey or palette image file."""
    image_size(data, source)
    with PILImage.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(
                f"{source}: expected a mask with one 8-bit channel (grey or palette), got mode {image.mode}; "
                "write the class index of each pixel as its value"
            )
        try:
            return np.asarray(image, dtype=np.uint8)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{source}: the mask is damaged ({error}); copy or unpack it again") from error


def check_mask(mask: Mask, size: tuple[int, int], num_classes: int, source: object) -> None:
    """Raise ValueError unless an (H, W) mask has its image's (width, height) and only values 0..C and 255."""
    height, width = mask.shape
    if (width, height) != size:
        raise ValueError(
            f"{source}: expected a mask as large as its image, {size[0]}x{size[1]} (width x height), "
            f"got {width}x{height}; resize the mask with nearest neighbour or replace it"
        )
    unknown = [int(value) for value in _values(mask) if num_classes < value < IGNORE_INDEX]
    if unknown:
        raise ValueError(
            f"{source}: expected mask values 0 (background), 1..{num_classes} (classes) and {IGNORE_INDEX} "
            f"(ignore), got {unknown}; check the class list or the mask"
        )


def _values(mask: Mask) -> NDArray[np.int64]:
    return np.flatnonzero(np.bincount(mask.ravel(), minlength=256))


def mask_labels(mask: Mask) -> tuple[int, ...]:
    """Sorted foreground classes that occur in an (H, W) mask."""
    return tuple(int(value) - 1 for value in _values(mask) if value not in (BACKGROUND, IGNORE_INDEX))


# --- Command line ---------------------------------------------------------------------------------


def command_parser(description: str | None, module: str) -> argparse.ArgumentParser:
    """A parser with the options that every builder has: --output, --with-masks and --overwrite."""
    parser = argparse.ArgumentParser(
        prog=f"python -m datasets_scripts.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; appears when all is written")
    parser.add_argument("--with-masks", action="store_true", help="put masks in training splits too")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set written before")
    return parser


def run_command(build: Callable[[], object]) -> int:
    """Run a builder and print its summary; bad input ends in its message and exit code 1, not a traceback."""
    try:
        summary = build()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary)
    return 0
