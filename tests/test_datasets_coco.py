"""COCO 2014 builder, on a hand-made folder and, where present, on real images."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets_scripts import coco


SHARED = Path(__file__).resolve().parents[2] / "shared"
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def square(number: int, image: int, category: int, x: int, y: int, side: int) -> dict[str, Any]:
    """A square object whose polygon covers the pixels x..x+side-1, y..y+side-1."""
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    record = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
    return {**record, "area": side * side, "segmentation": [corners]}


def crowd(number: int, image: int, column: int) -> dict[str, Any]:
    """A crowd over one column of a 10 x 8 image (run lengths go down the columns)."""
    counts = [8 * column, 8, 8 * (9 - column)]
    record = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 1, "area": 8}
    return {**record, "segmentation": {"size": [8, 10], "counts": counts}}


def content(split: str) -> dict[str, Any]:
    """Image 1: a small object listed before the large one below it, a crowd. 2: nothing. 3: a crowd alone."""
    images = [{"id": n, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": 8, "width": 10} for n in (3, 1, 2)]
    annotations = [square(11, 1, 1, 3, 3, 2), square(12, 1, 90, 1, 1, 6), crowd(13, 1, 6), crowd(14, 3, 0)]
    return {"images": images, "annotations": annotations, "categories": list(CATEGORIES)}


def write(root: Path, split: str, data: object) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(data))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    for split in coco.SPLITS:
        write(folder, split, content(split))
        (folder / f"{split}2014").mkdir()
        for image in content(split)["images"]:
            Image.new("RGB", (10, 8), (9, 99, 199)).save(folder / f"{split}2014" / image["file_name"])
    return folder


def rows(output: Path, split: str) -> list[dict]:
    return pq.read_table(next((output / "data").glob(f"{split}-00000-of-00001-*.parquet"))).to_pylist()


def mask_of(data: bytes | None) -> np.ndarray:
    with Image.open(io.BytesIO(data or b"")) as mask:
        assert mask.mode == "L"
        return np.asarray(mask)


def test_masks_labels_and_dropped_images(root: Path, tmp_path: Path) -> None:
    summary = coco.build(root, tmp_path / "out")
    assert summary.class_names == ("person", "stop sign", "toothbrush")
    for split in summary.splits:
        assert (split.images, split.unlabelled, split.per_class) == (2, 1, (1, 0, 1))
        assert f"{split.name}: dropped 1 image(s): no annotation" in str(summary)
    train, val = rows(tmp_path / "out", "train"), rows(tmp_path / "out", "val")
    assert [row["labels"] for row in train] == [[0, 2], []]
    assert train[0].keys() == {"image_id", "image", "labels"}
    expected = np.zeros((8, 10), np.uint8)
    expected[1:7, 1:7] = 3  # toothbrush, the large one
    expected[3:5, 3:5] = 1  # person over it
    expected[:, 6] = 255  # crowd, whatever lies under it
    np.testing.assert_array_equal(mask_of(val[0]["segmentation_map"]["bytes"]), expected)
    assert val[0]["image_id"] == "COCO_val2014_000000000001"
    assert val[0]["image"]["bytes"] == (root / "val2014/COCO_val2014_000000000001.jpg").read_bytes()


def test_training_masks_only_when_asked_for(root: Path) -> None:
    assert [example.mask for example in coco.examples(root, "train")] == [None, None]
    with_masks = list(coco.examples(root, "train", with_masks=True))
    assert mask_of(with_masks[1].mask)[:, 0].tolist() == [255] * 8
    assert mask_of(with_masks[1].mask).sum() == 255 * 8


def test_command_takes_splits(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(root), "--output", str(tmp_path / "out"), "--splits", "val"]
    assert coco.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["images", "2"]
    assert coco.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err


# --- Bad input ------------------------------------------------------------------------------------


def unknown_class(data: dict[str, Any]) -> None:
    data["annotations"][0]["category_id"] = 12


def unknown_image(data: dict[str, Any]) -> None:
    data["annotations"][0]["image_id"] = 77


def no_segmentation(data: dict[str, Any]) -> None:
    del data["annotations"][1]["segmentation"]


def empty_segmentation(data: dict[str, Any]) -> None:
    data["annotations"][1]["segmentation"] = []


def region_of_another_size(data: dict[str, Any]) -> None:
    data["annotations"][2]["segmentation"] = {"size": [9, 10], "counts": [0, 90]}


def image_of_another_size(data: dict[str, Any]) -> None:
    data["images"][1]["width"] = 11


def captions(data: dict[str, Any]) -> None:
    del data["categories"]


def path_outside(data: dict[str, Any]) -> None:
    data["images"][0]["file_name"] = "../val2014/x.jpg"


def other_classes(data: dict[str, Any]) -> None:
    data["categories"][2] = {"id": 13, "name": "halt sign"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_class, r"val2014\.json: annotation 11 has the unknown class id 12; known ids: 1, 13, 90"),
        (unknown_image, r"val2014\.json: annotations name the image id 77"),
        (no_segmentation, r"val2014\.json: annotations\[1\]: .*missing: segmentation"),
        (empty_segmentation, r"val2014\.json: the segmentation of annotation 12 cannot be read"),
        (region_of_another_size, r"region of annotation 13 to be as large as its image, 10x8 .*, got 10x9"),
        (image_of_another_size, r"0001\.jpg: expected 11x8 .*, got 10x8"),
        (captions, r"val2014\.json: categories: expected a list, got NoneType"),
        (path_outside, r"val2014\.json: expected a path inside the data folder"),
        (other_classes, r"val2014\.json: expected the classes of .*train2014\.json"),
    ],
)
def test_damage_is_named_and_nothing_is_written(
    root: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = content("val")
    data["categories"] = [dict(category) for category in data["categories"]]
    damage(data)
    write(root, "val", data)
    with pytest.raises(ValueError, match=message):
        coco.build(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "annotations/instances_val2014.json",
            r"missing file .*instances_val2014\.json: unpack annotations_",
        ),
        (
            "val2014/COCO_val2014_000000000003.jpg",
            r"missing image .*0003\.jpg, named by .*; unpack val2014\.zip",
        ),
    ],
)
def test_missing_files(root: Path, tmp_path: Path, missing: str, message: str) -> None:
    (root / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        coco.build(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3"])
def test_not_an_instance_file(root: Path, text: str) -> None:
    (root / "annotations/instances_val2014.json").write_text(text)
    with pytest.raises(ValueError, match=r"val2014\.json: expected a COCO instance file"):
        list(coco.examples(root, "val"))


def test_unreadable_image_and_unknown_split(root: Path) -> None:
    (root / "val2014/COCO_val2014_000000000003.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0003\.jpg: expected an image file, got 0 bytes"):
        list(coco.examples(root, "val"))
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, val"):
        list(coco.examples(root, "test"))


# --- Real images ----------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_real_images(tmp_path: Path) -> None:
    summary = coco.build(SHARED / "data" / "coco", tmp_path / "out")
    assert [(s.images, sum(s.dropped.values())) for s in summary.splits] == [(94, 2), (32, 0)]
    assert len(summary.class_names) == 80
    assert (summary.class_names[0], summary.class_names[11], summary.class_names[79]) == (
        "person",
        "stop sign",
        "toothbrush",
    )
    values = set()
    for row in rows(tmp_path / "out", "val"):
        present = set(np.unique(mask_of(row["segmentation_map"]["bytes"])).tolist())
        assert {value - 1 for value in present - {0, 255}} <= set(row["labels"])
        values |= present
    assert 255 in values and len(values) > 30
