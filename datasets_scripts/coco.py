"""COCO 2014 from its photographs and instance JSON alone: 82 081 train and 40 137 val images of 80 classes.

python -m datasets_scripts.coco --root coco --output data/coco

`--root` holds train2014/, val2014/ and annotations/instances_{train,val}2014.json. Images without any
annotation are dropped. Category ids become contiguous in their order. In a mask small objects lie over large
ones and crowd regions are 255, whatever lies under them. Image-level labels are the classes of all objects
but crowds.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from modeling_msee.data.examples import Example, Split, encode_png
from modeling_msee.data.tags import check_class_names, relative_path
from modeling_msee.data.writer import Summary, check_output, write_dataset

from .common import (
    IGNORE_INDEX,
    Mask,
    check_mask,
    command_parser,
    image_size,
    read_file,
    run_command,
)


SPLITS = ("train", "val")
NO_ANNOTATION = "no annotation"

Record = dict[str, Any]


@dataclass(frozen=True)
class Instances:
    """An instance file: annotated images in order of id, their annotations, class by category id."""

    source: Path
    class_names: tuple[str, ...]
    class_of: Mapping[int, int]
    images: tuple[Record, ...]
    annotations: Mapping[int, list[Record]]
    dropped: int


# --- Instance file --------------------------------------------------------------------------------


def _load_json(path: Path, with_regions: bool) -> Record:
    """The JSON file; without masks to draw, its regions (most of its size) are dropped while it is read."""
    data = read_file(path, "unpack annotations_trainval2014.zip into --root")
    with tqdm(desc=f"reading {path.name}", unit="object", mininterval=0.5) as bar:

        def keep(record: Record) -> Record:
            bar.update()
            if not with_regions:
                record.pop("segmentation", None)
            return record

        try:
            return dict(json.loads(data, object_hook=keep))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected a COCO instance file ({error}); unpack it again") from error


def _require(records: Any, keys: Sequence[str], source: str) -> list[Record]:
    """`records` if it is a list of objects that all have `keys`; else ValueError."""
    if not isinstance(records, list):
        raise ValueError(f"{source}: expected a list, got {type(records).__name__}; use an instances_*.json file")
    for index, record in enumerate(records):
        missing = [key for key in keys if key not in record]
        if missing:
            raise ValueError(f"{source}[{index}]: expected the keys {', '.join(keys)}; missing: {', '.join(missing)}")
    return records


def read_instances(root: Path, split: str, with_regions: bool = True) -> Instances:
    """Read and check an instance file; `with_regions=False` leaves the segmentations out to save memory."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    path = Path(root) / "annotations" / f"instances_{split}2014.json"
    content = _load_json(path, with_regions)
    categories = _require(content.get("categories"), ("id", "name"), f"{path}: categories")
    categories.sort(key=lambda category: category["id"])
    names = check_class_names([category["name"] for category in categories], path)
    class_of = {category["id"]: index for index, category in enumerate(categories)}
    keys = ("id", "image_id", "category_id", "area", "iscrowd", *(["segmentation"] if with_regions else []))
    annotations: dict[int, list[Record]] = {}
    for annotation in _require(content.get("annotations"), keys, f"{path}: annotations"):
        if annotation["category_id"] not in class_of:
            raise ValueError(
                f"{path}: annotation {annotation['id']} has the unknown class id "
                f"{annotation['category_id']}; known ids: {', '.join(map(str, class_of))}"
            )
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    images = _require(content.get("images"), ("id", "file_name", "height", "width"), f"{path}: images")
    images.sort(key=lambda image: image["id"])
    unknown = annotations.keys() - {image["id"] for image in images}
    if unknown:
        raise ValueError(f"{path}: annotations name the image id {min(unknown)}, which is not in its images")
    kept = tuple(image for image in images if image["id"] in annotations)
    return Instances(path, names, class_of, kept, annotations, len(images) - len(kept))


# --- Masks ----------------------------------------------------------------------------------------


def _region(annotation: Record, height: int, width: int, source: object) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(H, W) pixels of an annotation, from polygons or from run lengths."""
    segmentation = annotation["segmentation"]
    try:
        if isinstance(segmentation, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            runs = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        else:
            runs = segmentation
        region = coco_mask.decode(runs).astype(bool)
    except Exception as error:  # pycocotools raises bare Exception for what it cannot read
        raise ValueError(
            f"{source}: the segmentation of annotation {annotation['id']} cannot be read ({error!r}); "
            "expected polygons or run lengths"
        ) from error
    if region.shape != (height, width):
        raise ValueError(
            f"{source}: expected the region of annotation {annotation['id']} to be as large as its image, "
            f"{width}x{height} (width x height), got {region.shape[1]}x{region.shape[0]}"
        )
    return region


def draw_mask(
    annotations: Sequence[Record], class_of: Mapping[int, int], size: tuple[int, int], source: object
) -> Mask:
    """(H, W) class values of an image of (width, height) `size`: large objects, small ones, crowds as 255."""
    width, height = size
    mask = np.zeros((height, width), dtype=np.uint8)
    for annotation in sorted(annotations, key=lambda a: (bool(a["iscrowd"]), -a["area"])):
        value = IGNORE_INDEX if annotation["iscrowd"] else class_of[annotation["category_id"]] + 1
        mask[_region(annotation, height, width, source)] = value
    return mask


# --- Data set -------------------------------------------------------------------------------------


def _example(folder: Path, instances: Instances, record: Record, with_mask: bool) -> Example:
    path = folder / relative_path(record["file_name"], instances.source)
    image = read_file(path, f"unpack {folder.name}.zip into --root")
    annotations = instances.annotations[record["id"]]
    labels = {instances.class_of[a["category_id"]] for a in annotations if not a["iscrowd"]}
    size = (int(record["width"]), int(record["height"]))
    actual = image_size(image, path)
    if size != actual:
        raise ValueError(
            f"{path}: expected {size[0]}x{size[1]} (width x height) as {instances.source} says, "
            f"got {actual[0]}x{actual[1]}; unpack the image again"
        )
    mask = None
    if with_mask:
        drawn = draw_mask(annotations, instances.class_of, size, instances.source)
        check_mask(drawn, actual, len(instances.class_names), instances.source)
        mask = encode_png(drawn)
    return Example(path.stem, image, tuple(sorted(labels)), mask)


def _split(root: Path, split: str, with_masks: bool) -> tuple[Split, Instances]:
    keep = with_masks or split == "val"
    instances = read_instances(root, split, keep)
    folder = Path(root) / f"{split}2014"
    for record in instances.images:
        path = folder / relative_path(record["file_name"], instances.source)
        if not path.is_file():
            raise FileNotFoundError(
                f"missing image {path}, named by {instances.source}; unpack {folder.name}.zip into --root"
            )
    rows = (_example(folder, instances, record, keep) for record in instances.images)
    dropped = {NO_ANNOTATION: instances.dropped} if instances.dropped else {}
    return Split(split, rows, len(instances.images), keep, dropped), instances


def examples(root: Path, split: str, with_masks: bool = False) -> Iterator[Example]:
    """Examples of train or val, made one at a time; val always has masks, train only `with_masks`."""
    yield from _split(Path(root), split, with_masks)[0].examples


def build(
    root: Path,
    output: Path,
    splits: Sequence[str] = SPLITS,
    with_masks: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Write splits of COCO 2014 to `output`; ValueError or FileNotFoundError names the file at fault."""
    check_output(Path(output), overwrite)
    parts = [_split(Path(root), split, with_masks) for split in splits]
    names = parts[0][1].class_names
    for _, instances in parts[1:]:
        if instances.class_names != names:
            raise ValueError(f"{instances.source}: expected the classes of {parts[0][1].source}, got other ones")
    return write_dataset(output, names, [split for split, _ in parts], overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(__doc__, "coco")
    parser.add_argument("--root", type=Path, required=True, help="folder of train2014, val2014 and annotations")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS)
    arguments = parser.parse_args(argv)
    return run_command(lambda: build(**vars(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
