"""Reading a folder of photographs with image-level tags: metadata.jsonl or metadata.csv, and classes.json."""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .contract import BACKGROUND


METADATA = ("metadata.jsonl", "metadata.csv")
EVALUATION_SPLITS = ("validation", "test")
MAX_CLASSES = 254  # a mask is one byte a pixel: 0 is background, 255 is ignored


@dataclass(frozen=True)
class TaggedImage:
    """One line of a metadata file; `source` names the file and the line. The image need not exist."""

    path: Path
    image_id: str
    tags: tuple[str, ...]
    source: str


# --- Classes --------------------------------------------------------------------------------------


def check_class_names(names: Sequence[str], source: object) -> tuple[str, ...]:
    """Foreground class names as a tuple; ValueError if empty, repeated, not strings or over 254."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{source}: expected a list of class names, got {names!r}")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ValueError(f"{source}: class names must differ, repeated: {', '.join(repeated)}")
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{source}: at most {MAX_CLASSES} classes fit a mask of one byte, got {len(names)}")
    return tuple(names)


def foreground_names(names: Sequence[str], source: object) -> tuple[str, ...]:
    """Class names without a leading "background"."""
    return check_class_names(names[1:] if list(names[:1]) == [BACKGROUND] else names, source)


def used_names(tags: Iterable[str], source: object) -> tuple[str, ...]:
    """All tags in use, sorted; ValueError if there is none."""
    names = sorted(set(tags))
    if not names:
        raise ValueError(f"{source}: no image has a tag, so there is no class; tag some images")
    return check_class_names(names, source)


def read_class_names(root: Path, tags: Iterable[str]) -> tuple[str, ...]:
    """Foreground classes of a folder: those of its classes.json, else all `tags` in use.

    Raises:
        ValueError: the file is no list of different names, or there is neither a file nor a tag.
    """
    path = root / "classes.json"
    if not path.exists():
        return used_names(tags, root)
    try:
        names = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON list of class names ({error})") from error
    if not isinstance(names, list):
        raise ValueError(f"{path}: expected a JSON list of class names, got {type(names).__name__}")
    return foreground_names(names, path)


def unknown_name(name: str, known: Sequence[str], source: object) -> ValueError:
    """The error for a class name that is not in the list, with the nearest names that are."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known names: {', '.join(known)}"
    return ValueError(f"{source}: unknown class {name!r}; {hint}")


def encode_tags(tags: Iterable[str], class_names: Sequence[str], source: object) -> tuple[int, ...]:
    """Sorted, unique class indices of tags; ValueError with the nearest names for an unknown one."""
    labels = set()
    for tag in tags:
        if tag not in class_names:
            raise unknown_name(tag, class_names, source)
        labels.add(class_names.index(tag))
    return tuple(sorted(labels))


# --- Folders --------------------------------------------------------------------------------------


def is_tagged_folder(root: Path) -> bool:
    """Whether `root`, or a folder in it, has a metadata file."""
    return any((root / name).is_file() or any(root.glob(f"*/{name}")) for name in METADATA)


def relative_path(text: str, source: object) -> PurePosixPath:
    """A path from a list or metadata file; ValueError if it leaves the folder that it is relative to."""
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{source}: expected a path inside the data folder, got {text!r}")
    return path


def split_folders(root: Path) -> dict[str, Path]:
    """Split name to folder: `root` itself as train if it has a metadata file, else its subfolders."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; point --root at the photographs and their metadata.jsonl")
    if any((root / name).is_file() for name in METADATA):
        return {"train": root}
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] not in "._"}
    if not folders:
        raise FileNotFoundError(f"{root} has no metadata.jsonl or metadata.csv and no split folders; add the tags")
    order = {"train": 0, "validation": 1, "test": 2}
    return dict(sorted(folders.items(), key=lambda item: order.get(item[0], len(order))))


def read_metadata(folder: Path, separator: str = ";") -> list[TaggedImage]:
    """The tagged images of one folder, in the order of its metadata file.

    Args:
        separator: between the labels of a row of metadata.csv.

    Raises:
        FileNotFoundError: there is not exactly one metadata file.
        ValueError: a line is not of the form that the guide in docs/own-data.md shows, with its number.
    """
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) != 1:
        names = " and ".join(path.name for path in found) or "neither"
        raise FileNotFoundError(f"{folder}: expected one of {' or '.join(METADATA)}, got {names}; keep exactly one")
    text = _read_text(found[0])
    rows = _jsonl_rows(text, found[0]) if found[0].suffix == ".jsonl" else _csv_rows(text, found[0], separator)
    return [_tagged_image(folder, *row) for row in rows]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}); save it as UTF-8") from error


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[Any, Any, str]]:
    """(file name, labels, source) of each line."""
    for number, line in enumerate(text.split("\n"), 1):
        source = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}: expected one JSON object a line ({error})") from error
        if not isinstance(row, dict) or not {"file_name", "labels"} <= row.keys():
            raise ValueError(f'{source}: expected {{"file_name": ..., "labels": [...]}}, got {line.strip()[:80]}')
        yield row["file_name"], row["labels"], source


def _csv_rows(text: str, path: Path, separator: str) -> Iterator[tuple[Any, Any, str]]:
    """(file name, labels, source) of each row; labels are separated by `separator`."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"file_name", "labels"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: expected the columns file_name and labels, got {reader.fieldnames}")
    for row in reader:
        tags = [tag.strip() for tag in (row["labels"] or "").split(separator)]
        yield row["file_name"], [tag for tag in tags if tag], f"{path}, line {reader.line_num}"


def _tagged_image(folder: Path, file_name: Any, tags: Any, source: str) -> TaggedImage:
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(f"{source}: expected file_name to be a path, got {file_name!r}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{source}: expected labels to be a list of class names, got {tags!r}")
    relative = relative_path(file_name, source)
    return TaggedImage(folder / relative, "_".join(relative.with_suffix("").parts), tuple(tags), source)


def check_exists(row: TaggedImage) -> None:
    """Raise FileNotFoundError if a line names an image that is not there."""
    if not row.path.is_file():
        raise FileNotFoundError(f"{row.source}: image {row.path} does not exist; add the image or remove the line")


def mask_path(row: TaggedImage, folder: Path) -> Path:
    """Where the label map of an image belongs: masks/<image name>.png in the folder of its split."""
    return folder / "masks" / f"{row.path.stem}.png"
