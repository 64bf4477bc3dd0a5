"""Photographs with image-level tags, any number of classes, from a folder or from any data set.

python -m datasets_scripts.image_tags --root photos --output data/photos
python -m datasets_scripts.image_tags --dataset user/some-dataset --output data/some-dataset

`--root` holds one folder a split (train, validation, ...), or is one folder itself (split train). A folder
holds metadata.jsonl, lines of {"file_name": "images/1.jpg", "labels": ["cat", "dog"]}, or metadata.csv with
the columns file_name and labels ("cat;dog"). An image can have no tag. Classes: those of --classes, else of
classes.json in `--root`, else all tags in use. Evaluation splits have masks in masks/<image name>.png.

`--dataset` is a folder, a Hub name, or what save_to_disk wrote, with the columns image and labels (names or
ClassLabel; one or a list), and segmentation_map in evaluation splits. image_id is kept if there is one.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk

from .common import (
    Example,
    Split,
    check_class_names,
    check_mask,
    command_parser,
    decode_mask,
    encode_png,
    image_size,
    read_file,
    relative_path,
    run_command,
    unknown_name,
)
from .writer import Summary, check_output, write_dataset


METADATA = ("metadata.jsonl", "metadata.csv")
EVALUATION_SPLITS = ("validation", "test")
BACKGROUND_NAME = "background"


@dataclass(frozen=True)
class TaggedImage:
    """One line of a metadata file; `source` names the file and the line."""

    path: Path
    image_id: str
    tags: tuple[str, ...]
    source: str


# --- Classes --------------------------------------------------------------------------------------


def foreground_names(names: Sequence[str], source: object) -> tuple[str, ...]:
    """Class names without a leading "background"."""
    return check_class_names(names[1:] if list(names[:1]) == [BACKGROUND_NAME] else names, source)


def _class_names(classes: Sequence[str] | None, root: Path, tags: Iterable[str]) -> tuple[str, ...]:
    if classes is not None:
        return foreground_names(classes, "--classes")
    path = root / "classes.json"
    if not path.exists():
        return _used_names(tags, root)
    try:
        names = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON list of class names ({error})") from error
    if not isinstance(names, list):
        raise ValueError(f"{path}: expected a JSON list of class names, got {type(names).__name__}")
    return foreground_names(names, path)


def _used_names(tags: Iterable[str], source: object) -> tuple[str, ...]:
    names = sorted(set(tags))
    if not names:
        raise ValueError(f"{source}: no image has a tag, so there is no class; tag some images")
    return check_class_names(names, source)


def _encode(tags: Iterable[str], class_names: Sequence[str], source: object) -> tuple[int, ...]:
    """Sorted, unique class indices of tags; ValueError with the nearest names for an unknown one."""
    labels = set()
    for tag in tags:
        if tag not in class_names:
            raise unknown_name(tag, class_names, source)
        labels.add(class_names.index(tag))
    return tuple(sorted(labels))


# --- Folders --------------------------------------------------------------------------------------


def _split_folders(root: Path) -> dict[str, Path]:
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
    """The tagged images of one folder; every image is known to exist."""
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
    path = folder / relative
    if not path.is_file():
        raise FileNotFoundError(f"{source}: image {path} does not exist; add the image or remove the line")
    return TaggedImage(path, "_".join(relative.with_suffix("").parts), tuple(tags), source)


def _folder_example(row: TaggedImage, folder: Path, class_names: Sequence[str], with_mask: bool) -> Example:
    image = read_file(row.path, "add the image or remove its line")
    size = image_size(image, row.path)
    labels = _encode(row.tags, class_names, row.source)
    if not with_mask:
        return Example(row.image_id, image, labels)
    path = folder / "masks" / f"{row.path.stem}.png"
    remedy = f"image {row.path} needs a mask here; add it or leave this split out of --evaluation-splits"
    mask = decode_mask(read_file(path, remedy), path)
    check_mask(mask, size, len(class_names), path)
    return Example(row.image_id, image, labels, encode_png(mask))


def _folder_splits(
    root: Path,
    classes: Sequence[str] | None,
    separator: str,
    evaluation_splits: Sequence[str],
    with_masks: bool,
) -> tuple[tuple[str, ...], list[Split]]:
    folders = _split_folders(root)
    tables = {name: read_metadata(folder, separator) for name, folder in folders.items()}
    names = _class_names(classes, root, (tag for rows in tables.values() for row in rows for tag in row.tags))
    for rows in tables.values():
        for row in rows:
            _encode(row.tags, names, row.source)  # a wrong tag shows before anything is written
    return names, [
        _folder_split(name, folders[name], rows, names, with_masks or name in evaluation_splits)
        for name, rows in tables.items()
    ]


def _folder_split(
    name: str, folder: Path, rows: Sequence[TaggedImage], class_names: Sequence[str], with_mask: bool
) -> Split:
    stems = Counter(row.path.stem for row in rows)
    shared = [stem for stem, count in stems.items() if count > 1]
    if with_mask and shared:
        raise ValueError(f"{folder}: {shared[0]!r} names more than one image, so masks/{shared[0]}.png is ambiguous")
    return Split(name, (_folder_example(row, folder, class_names, with_mask) for row in rows), len(rows), with_mask)


# --- Data sets ------------------------------------------------------------------------------------


def open_dataset(name: str) -> DatasetDict:
    """All splits of what save_to_disk wrote, of a data folder, or of a Hub data set."""
    saved = any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    dataset = load_from_disk(name) if saved else load_dataset(name)
    return dataset if isinstance(dataset, DatasetDict) else DatasetDict({"train": dataset})


def _label_feature(dataset: Dataset, source: object) -> ClassLabel | Value:
    """What one label is: a ClassLabel or a string Value."""
    column = dataset.features.get("labels")
    feature = column.feature if isinstance(column, List) else column
    named = isinstance(feature, ClassLabel) and feature.names
    if not isinstance(dataset.features.get("image"), Image):
        raise ValueError(f"{source}: expected an image column of type Image, got {dataset.features}")
    if not (named or (isinstance(feature, Value) and feature.dtype in ("string", "large_string"))):
        raise ValueError(
            f"{source}: expected a labels column of class names or ClassLabel (one or a list), got {column}; "
            "rename or cast the column first"
        )
    return feature


def _row_tags(value: Any, feature: ClassLabel | Value) -> list[str]:
    """Class names of one cell of the labels column; the ClassLabel "background" at index 0 is no class."""
    values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not isinstance(feature, ClassLabel):
        return values
    tags = [feature.int2str(item) for item in values]
    return [tag for tag in tags if not (tag == BACKGROUND_NAME and feature.names[0] == BACKGROUND_NAME)]


def _dataset_names(dataset: DatasetDict, classes: Sequence[str] | None, source: object) -> tuple[str, ...]:
    if classes is not None:
        return foreground_names(classes, "--classes")
    features = {name: _label_feature(split, f"{source}, split {name}") for name, split in dataset.items()}
    first = next(iter(features.values()))
    if isinstance(first, ClassLabel):
        return foreground_names(first.names, source)
    cells = ((value, features[name]) for name, split in dataset.items() for value in split["labels"])
    return _used_names((tag for value, feature in cells for tag in _row_tags(value, feature)), source)


def _cell_bytes(cell: Any, source: str) -> bytes:
    """The encoded file in an undecoded Image cell."""
    if cell is None:
        raise ValueError(f"{source} is empty; remove the row or add the file")
    return bytes(cell["bytes"]) if cell["bytes"] is not None else read_file(Path(cell["path"]), f"{source} names it")


def _dataset_rows(name: str, dataset: Dataset, class_names: Sequence[str], with_mask: bool) -> Iterator[Example]:
    feature = _label_feature(dataset, f"split {name}")
    wanted = {"image_id", "image", "labels"} | ({"segmentation_map"} if with_mask else set())
    dataset = dataset.select_columns([column for column in dataset.column_names if column in wanted])
    for column in wanted & {"image", "segmentation_map"}:
        dataset = dataset.cast_column(column, Image(decode=False))
    for index, row in enumerate(dataset):
        source = f"split {name}, row {index}"
        image_id = str(row["image_id"]) if "image_id" in row else f"{name}_{index:08d}"
        image = _cell_bytes(row["image"], f"{source}: image")
        size = image_size(image, source)
        labels = _encode(_row_tags(row["labels"], feature), class_names, source)
        mask = None
        if with_mask:
            pixels = decode_mask(_cell_bytes(row["segmentation_map"], f"{source}: segmentation_map"), source)
            check_mask(pixels, size, len(class_names), source)
            mask = encode_png(pixels)
        yield Example(image_id, image, labels, mask)


def _dataset_split(name: str, dataset: Dataset, class_names: Sequence[str], with_mask: bool) -> Split:
    if with_mask and not isinstance(dataset.features.get("segmentation_map"), Image):
        raise ValueError(
            f"split {name}: expected a segmentation_map column of type Image in an evaluation split; "
            "add it or leave this split out of --evaluation-splits"
        )
    return Split(name, _dataset_rows(name, dataset, class_names, with_mask), len(dataset), with_mask)


# --- Entry points ---------------------------------------------------------------------------------


def examples(
    root: Path,
    split: str,
    with_masks: bool = False,
    classes: Sequence[str] | None = None,
    separator: str = ";",
    evaluation_splits: Sequence[str] = EVALUATION_SPLITS,
) -> Iterator[Example]:
    """Examples of one split of a folder, read one at a time; evaluation splits have masks."""
    _, splits = _folder_splits(Path(root), classes, separator, evaluation_splits, with_masks)
    found = {part.name: part for part in splits}
    if split not in found:
        raise ValueError(f"{root}: unknown split {split!r}; expected one of {', '.join(found)}")
    yield from found[split].examples


def build(
    root: Path,
    output: Path,
    classes: Sequence[str] | None = None,
    separator: str = ";",
    evaluation_splits: Sequence[str] = EVALUATION_SPLITS,
    with_masks: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Write a folder of tagged photographs to `output`; an error names the file, the line and the remedy."""
    check_output(Path(output), overwrite)
    names, splits = _folder_splits(Path(root), classes, separator, evaluation_splits, with_masks)
    return write_dataset(output, names, splits, overwrite)


def build_from_dataset(
    dataset: DatasetDict | str,
    output: Path,
    classes: Sequence[str] | None = None,
    evaluation_splits: Sequence[str] = EVALUATION_SPLITS,
    with_masks: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Write a data set with image and labels columns to `output`; a string is a folder or a Hub name."""
    check_output(Path(output), overwrite)
    source = dataset if isinstance(dataset, str) else "data set"
    opened = open_dataset(dataset) if isinstance(dataset, str) else dataset
    names = _dataset_names(opened, classes, source)
    splits = [
        _dataset_split(name, part, names, with_masks or name in evaluation_splits) for name, part in opened.items()
    ]
    return write_dataset(output, names, splits, overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(__doc__, "image_tags")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--root", type=Path, help="folder with metadata.jsonl or .csv, or with one such folder a split"
    )
    source.add_argument("--dataset", help="data set with image and labels columns: a folder or a Hub name")
    parser.add_argument("--classes", nargs="+", help="class names in order (default: classes.json, else all tags)")
    parser.add_argument("--separator", default=";", help="between the labels of metadata.csv (default: ;)")
    parser.add_argument("--evaluation-splits", nargs="*", default=list(EVALUATION_SPLITS), help="splits with masks")
    arguments = vars(parser.parse_args(argv))
    root, dataset, separator = (arguments.pop(name) for name in ("root", "dataset", "separator"))
    if root is not None:
        return run_command(lambda: build(root, separator=separator, **arguments))
    return run_command(lambda: build_from_dataset(dataset, **arguments))


if __name__ == "__main__":
    raise SystemExit(main())
