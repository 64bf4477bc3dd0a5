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

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk

from modeling_msee.data.contract import BACKGROUND
from modeling_msee.data.examples import Example, Split, encode_png
from modeling_msee.data.tags import (
    EVALUATION_SPLITS,
    TaggedImage,
    check_exists,
    encode_tags,
    foreground_names,
    mask_path,
    read_class_names,
    read_metadata,
    split_folders,
    used_names,
)
from modeling_msee.data.writer import Summary, check_output, write_dataset

from .common import (
    check_mask,
    command_parser,
    decode_mask,
    image_size,
    read_file,
    run_command,
)


# --- Folders --------------------------------------------------------------------------------------


def _folder_example(row: TaggedImage, folder: Path, class_names: Sequence[str], with_mask: bool) -> Example:
    image = read_file(row.path, "add the image or remove its line")
    size = image_size(image, row.path)
    labels = encode_tags(row.tags, class_names, row.source)
    if not with_mask:
        return Example(row.image_id, image, labels)
    path = mask_path(row, folder)
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
    folders = split_folders(root)
    tables = {name: read_metadata(folder, separator) for name, folder in folders.items()}
    tags = (tag for rows in tables.values() for row in rows for tag in row.tags)
    names = read_class_names(root, tags) if classes is None else foreground_names(classes, "--classes")
    for rows in tables.values():
        for row in rows:
            # A missing image or a wrong tag shows before anything is written.
            check_exists(row)
            encode_tags(row.tags, names, row.source)
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
    return [tag for tag in tags if not (tag == BACKGROUND and feature.names[0] == BACKGROUND)]


def _dataset_names(dataset: DatasetDict, classes: Sequence[str] | None, source: object) -> tuple[str, ...]:
    if classes is not None:
        return foreground_names(classes, "--classes")
    features = {name: _label_feature(split, f"{source}, split {name}") for name, split in dataset.items()}
    first = next(iter(features.values()))
    if isinstance(first, ClassLabel):
        return foreground_names(first.names, source)
    cells = ((value, features[name]) for name, split in dataset.items() for value in split["labels"])
    return used_names((tag for value, feature in cells for tag in _row_tags(value, feature)), source)


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
        labels = encode_tags(_row_tags(row["labels"], feature), class_names, source)
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
