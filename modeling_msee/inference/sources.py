"""Images as users name them (files, folders, globs, URLs, pictures in memory), and reading them."""

import glob
import http.client
import io
import re
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image

from ..image_processing_msee import MSEEImageProcessor


TIMEOUT = 30  # seconds without an answer from a URL
LARGEST_DOWNLOAD = 256_000_000  # bytes


@dataclass(frozen=True, eq=False)
class ImageSource:
    """One image to read.

    Args:
        place: a file, a URL, or the picture itself.
        name: relative path of its results without suffix; no two sources of a collection share one.
    """

    place: Path | str | Image.Image
    name: str

    def __str__(self) -> str:
        return self.name if isinstance(self.place, Image.Image) else str(self.place)


@dataclass(frozen=True)
class Unreadable:
    """An image that was skipped, and why."""

    source: str
    reason: str


def collect_sources(images: Iterable[str | Path | Image.Image]) -> list[ImageSource]:
    """Every image that the given names stand for, in their order.

    A name is an image file, a folder (all image files in it and below, sorted), a glob (`**` for any depth; files
    sorted) or a URL (http, https). Results are called after the file; below a folder after the path in it; `-2`, `-3`
    and so on are added where two would be called alike.

    Raises:
        FileNotFoundError: a name stands for nothing: no such file, an empty folder, a glob that matches no file.
    """
    used: set[str] = set()
    sources = []
    for place, name in _named_places(images):
        distinct, number = name, 1
        while distinct.lower() in used:  # file systems that ignore case
            number += 1
            distinct = f"{name}-{number}"
        used.add(distinct.lower())
        sources.append(ImageSource(place, distinct))
    return sources


def _named_places(images: Iterable[str | Path | Image.Image]) -> Iterator[tuple[Path | str | Image.Image, str]]:
    for image in images:
        if isinstance(image, Image.Image):
            yield image, "image"
        elif urlsplit(str(image)).scheme in ("http", "https"):
            yield str(image), _url_name(str(image))
        elif Path(image).is_dir():
            for path in _image_files(Path(image)):
                yield path, path.relative_to(image).with_suffix("").as_posix()
        else:
            for path in _matching_files(str(image)):
                yield path, path.stem


def _url_name(url: str) -> str:
    """The last part of the path without its suffix, with nothing in it that could leave a folder."""
    stem = PurePosixPath(unquote(urlsplit(url).path)).stem
    return re.sub(r"[^\w.-]+", "_", stem).strip(".") or "image"


def _image_files(folder: Path) -> list[Path]:
    """Files whose suffix is that of a format that PIL reads."""
    known = {suffix for suffix, format_ in Image.registered_extensions().items() if format_ in Image.OPEN}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: expected a folder with image files, found none in it or below.")
    return files


def _matching_files(text: str) -> list[Path]:
    if Path(text).is_file():  # before globbing: [ and ] occur in file names
        return [Path(text)]
    files = sorted(path for path in map(Path, glob.glob(text, recursive=True)) if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"{text}: expected an image file, a folder, a glob or a URL that starts with http:// or https://; "
            "there is no such file."
        )
    return files


def read_source(source: ImageSource, processor: MSEEImageProcessor) -> torch.Tensor | Unreadable:
    """The image upright and in colour, (3, H, W) in [0, 255], as the processor sees it; or why it cannot be read."""
    try:
        return processor.process_image(_open(source.place))
    # SyntaxError and ValueError are what PIL raises for broken files beside OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, http.client.HTTPException) as error:
        return Unreadable(str(source), str(error) or type(error).__name__)


def _open(place: Path | str | Image.Image) -> Image.Image:
    if isinstance(place, Image.Image):
        return place
    if isinstance(place, Path):
        return Image.open(place)
    request = urllib.request.Request(place, headers={"User-Agent": "msee"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        data = response.read(LARGEST_DOWNLOAD + 1)
    if len(data) > LARGEST_DOWNLOAD:
        raise ValueError(f"expected at most {LARGEST_DOWNLOAD} bytes, the server sends more")
    return Image.open(io.BytesIO(data))
