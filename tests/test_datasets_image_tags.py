"""Image-tag builder: folders with metadata.jsonl or .csv, and data sets with image and labels columns."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from datasets_scripts import image_tags
from modeling_msee.data import writer
from modeling_msee.data.examples import encode_png


SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = ["background", "zebra", "ant"]


def photo(path: Path, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (50, 100, 150)).save(path)


def mask(path: Path, values: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.array(values, np.uint8)))


def jsonl(path: Path, table: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps({"file_name": k, "labels": v}) + "\n" for k, v in table.items()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train: 1.jpg, 2.png, no masks; validation: images/3.jpg with a mask."""
    folder = tmp_path / "photos"
    for name in ("train/1.jpg", "train/2.png", "validation/images/3.jpg"):
        photo(folder / name)
    jsonl(folder / "train/metadata.jsonl", {"1.jpg": ["zebra", "ant", "zebra"], "2.png": []})
    jsonl(folder / "validation/metadata.jsonl", {"images/3.jpg": ["ant"]})
    mask(folder / "validation/masks/3.png", [[0, 0, 2, 2], [0, 0, 2, 255], [0, 0, 0, 0]])
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


def rows(output: Path, split: str) -> list[dict]:
    return pq.read_table(next((output / "data").glob(f"{split}-00000-of-00001-*.parquet"))).to_pylist()


# --- Folders --------------------------------------------------------------------------------------


def test_folder_with_splits(root: Path, tmp_path: Path) -> None:
    summary = image_tags.build(root, tmp_path / "out")
    assert summary.class_names == ("zebra", "ant")
    assert [(s.name, s.images, s.unlabelled, s.per_class) for s in summary.splits] == [
        ("train", 2, 1, (1, 1)),
        ("validation", 1, 0, (0, 1)),
    ]
    train, validation = rows(tmp_path / "out", "train"), rows(tmp_path / "out", "validation")
    assert [(row["image_id"], row["labels"]) for row in train] == [("1", [0, 1]), ("2", [])]
    assert "segmentation_map" not in train[0]
    assert [row["image"]["bytes"] for row in train] == [
        (root / "train" / name).read_bytes() for name in ("1.jpg", "2.png")
    ]
    with Image.open(io.BytesIO(validation[0]["segmentation_map"]["bytes"])) as image:
        assert np.asarray(image).tolist() == [[0, 0, 2, 2], [0, 0, 2, 255], [0, 0, 0, 0]]
    assert validation[0]["image_id"] == "images_3"


def test_one_folder_without_class_list_is_a_training_split(root: Path) -> None:
    found = list(image_tags.examples(root / "train", "train"))
    assert [example.labels for example in found] == [(0, 1), ()]  # sorted tags: ant, zebra
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train"):
        list(image_tags.examples(root / "train", "test"))


def test_csv_says_the_same_as_jsonl(root: Path, tmp_path: Path) -> None:
    expected = list(image_tags.examples(root, "train"))
    (root / "train/metadata.jsonl").unlink()
    for separator in ";|":
        lines = ["file_name,labels", f"1.jpg,zebra{separator} ant", "2.png,"]
        (root / "train/metadata.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
        assert list(image_tags.examples(root, "train", separator=separator)) == expected
    assert image_tags.main(["--root", str(root), "--output", str(tmp_path / "out"), "--separator", "|"]) == 0


def test_classes_option_orders_and_names(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(root), "--output", str(tmp_path / "out"), "--classes", "ant", "bee", "zebra"]
    assert image_tags.main(arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[-3:] == [["ant", "1", "1"], ["bee", "0", "0"], ["zebra", "1", "0"]]


def test_evaluation_splits_and_training_masks(root: Path) -> None:
    found = image_tags.examples(root, "validation", evaluation_splits=())
    assert [example.mask for example in found] == [None]
    with pytest.raises(FileNotFoundError, match=r"missing file .*train/masks/1\.png: image .*1\.jpg needs a mask"):
        list(image_tags.examples(root, "train", with_masks=True))
    for name in "12":
        mask(root / f"train/masks/{name}.png", [[0, 1, 0, 0]] * 3)
    assert all(example.mask for example in image_tags.examples(root, "train", with_masks=True))


# --- Bad folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "1.jpg", "labels": ["zebre"]}',
            r"jsonl, line 3: unknown class 'zebre'; did you mean 'zebra'",
        ),
        (
            '{"file_name": "1.jpg", "labels": ["xyz"]}',
            r"line 3: unknown class 'xyz'; known names: zebra, ant",
        ),
        (
            '{"file_name": "1.jpg", "labels": "ant"}',
            r"line 3: expected labels to be a list of class names, got 'ant'",
        ),
        (
            '{"file_name": "1.jpg", "labels": [1]}',
            r"line 3: expected labels to be a list of class names, got \[1\]",
        ),
        ('{"file_name": "1.jpg"}', r'line 3: expected \{"file_name": '),
        ('{"file_name": 4, "labels": []}', r"line 3: expected file_name to be a path, got 4"),
        ('{"file_name": "../../x.jpg", "labels": []}', r"line 3: expected a path inside the data folder"),
        ("[1]", r'line 3: expected \{"file_name": '),
        ("{oops", r"line 3: expected one JSON object a line"),
        ('{"file_name": "1.jpg", "labels": []}', r"split train: image_id '1' occurs twice"),
    ],
)
def test_bad_lines(root: Path, tmp_path: Path, line: str, message: str) -> None:
    path = root / "train/metadata.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        image_tags.build(root, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 0, 3, 3]] * 3, r"masks/3\.png: expected mask values 0 .*1\.\.2 .*got \[3\]"),
        ([[0, 0, 2]] * 4, r"masks/3\.png: expected a mask as large as its image, 4x3 .*got 3x4"),
    ],
)
def test_bad_masks(root: Path, tmp_path: Path, values: list[list[int]], message: str) -> None:
    mask(root / "validation/masks/3.png", values)
    with pytest.raises(ValueError, match=message):
        image_tags.build(root, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_damaged_mask_and_image(root: Path) -> None:
    path = root / "validation/masks/3.png"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"masks/3\.png"):
        list(image_tags.examples(root, "validation"))
    (root / "train/2.png").write_bytes(b"GIF")
    with pytest.raises(ValueError, match=r"2\.png: expected an image file"):
        list(image_tags.examples(root, "train"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("train/1.jpg", r"metadata\.jsonl, line 1: image .*1\.jpg does not exist; add the image or remove"),
        (
            "validation/masks/3.png",
            r"masks/3\.png: image .*3\.jpg needs a mask here; add it or leave this split",
        ),
        ("train/metadata.jsonl", r"train: expected one of metadata\.jsonl or metadata\.csv, got neither"),
    ],
)
def test_missing_files(root: Path, tmp_path: Path, missing: str, message: str) -> None:
    (root / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        image_tags.build(root, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_ambiguous_or_empty_folders(root: Path, tmp_path: Path) -> None:
    (root / "train/metadata.csv").write_text("file_name\n")
    with pytest.raises(FileNotFoundError, match=r"got metadata\.jsonl and metadata\.csv; keep exactly one"):
        list(image_tags.examples(root, "train"))
    (root / "train/metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metadata\.csv: expected the columns file_name and labels"):
        list(image_tags.examples(root, "train"))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(FileNotFoundError, match=name):
            list(image_tags.examples(tmp_path / name, "train"))


def test_two_images_cannot_share_a_mask(root: Path) -> None:
    photo(root / "validation/more/3.jpg")
    jsonl(root / "validation/metadata.jsonl", {"images/3.jpg": ["ant"], "more/3.jpg": []})
    with pytest.raises(ValueError, match=r"'3' names more than one image, so masks/3\.png is ambiguous"):
        list(image_tags.examples(root, "validation"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"classes\.json: expected a JSON list of class names"),
        ('{"0": "ant"}', r"classes\.json: expected a JSON list of class names, got dict"),
        ('["background"]', r"classes\.json: expected a list of class names"),
        ('["ant", "ant"]', r"classes\.json: class names must differ, repeated: ant"),
    ],
)
def test_bad_class_lists(root: Path, text: str, message: str) -> None:
    (root / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(image_tags.examples(root, "train"))


def test_no_tags_at_all(root: Path) -> None:
    jsonl(root / "train/metadata.jsonl", {"1.jpg": []})
    with pytest.raises(ValueError, match="no image has a tag"):
        list(image_tags.examples(root / "train", "train"))


# --- Data sets ------------------------------------------------------------------------------------


def table(labels: list[Any], feature: Any, **columns: list[Any]) -> Dataset:
    """Grey 4 x 3 images with labels of the given feature."""
    cell = {"bytes": encode_png(np.zeros((3, 4), np.uint8)), "path": None}
    features = {"image": datasets.Image(), "labels": feature}
    features |= {name: datasets.Image() if name == "segmentation_map" else Value("string") for name in columns}
    return Dataset.from_dict({"image": [cell] * len(labels), "labels": labels, **columns}, Features(features))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([["b", "a", "b"], [], ["a"]], List(Value("string"))),
        ([[2, 1], [], [1]], List(ClassLabel(names=["background", "a", "b"]))),
        ([[1, 0], None, [0]], List(ClassLabel(names=["a", "b"]))),
    ],
)
def test_lists_of_labels(tmp_path: Path, labels: list[Any], feature: Any) -> None:
    summary = image_tags.build_from_dataset(DatasetDict(train=table(labels, feature)), tmp_path / "out")
    assert summary.class_names == ("a", "b")
    assert [(row["image_id"], row["labels"]) for row in rows(tmp_path / "out", "train")] == [
        ("train_00000000", [0, 1]),
        ("train_00000001", []),
        ("train_00000002", [0]),
    ]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        (["b", "a"], Value("string")),
        ([1, 0], ClassLabel(names=["a", "b"])),
        ([2, 1], ClassLabel(names=["background", "a", "b"])),
    ],
)
def test_one_label_an_image(tmp_path: Path, labels: list[Any], feature: Any) -> None:
    found = DatasetDict(train=table(labels, feature, image_id=["x", "y"]))
    image_tags.build_from_dataset(found, tmp_path / "out")
    assert [(row["image_id"], row["labels"]) for row in rows(tmp_path / "out", "train")] == [
        ("x", [1]),
        ("y", [0]),
    ]


def test_what_was_written_can_be_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image_tags.build(root, tmp_path / "first")
    writer.load(tmp_path / "first").save_to_disk(tmp_path / "saved")
    for source in ("first", "saved"):
        output = tmp_path / f"again_{source}"
        assert image_tags.main(["--dataset", str(tmp_path / source), "--output", str(output)]) == 0
        for split in ("train", "validation"):
            assert rows(output, split) == rows(tmp_path / "first", split)
    assert capsys.readouterr().out.splitlines()[3].split() == ["masks", "no", "yes"]


@pytest.mark.parametrize(
    ("split", "dataset", "message"),
    [
        ("train", table([1], Value("int64")), "expected a labels column of class names or ClassLabel"),
        ("train", table(["a"], Value("string")).rename_column("labels", "label"), "expected a labels column"),
        (
            "train",
            table(["a"], Value("string")).remove_columns("image"),
            "expected an image column of type Image",
        ),
        ("test", table(["a"], Value("string")), "split test: expected a segmentation_map column"),
        ("test", table(["a"], Value("string"), segmentation_map=[None]), "row 0: segmentation_map is empty"),
    ],
)
def test_bad_data_sets(tmp_path: Path, split: str, dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_tags.build_from_dataset(DatasetDict({split: dataset}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_class_in_a_data_set(tmp_path: Path) -> None:
    found = DatasetDict(train=table([["cat"], ["cart"]], List(Value("string"))))
    with pytest.raises(ValueError, match="split train, row 1: unknown class 'cart'; did you mean 'cat'"):
        image_tags.build_from_dataset(found, tmp_path / "out", classes=["cat", "dog"])
    assert list(tmp_path.iterdir()) == []


# --- Real images ----------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_stamps(tmp_path: Path) -> None:
    summary = image_tags.build(SHARED / "data" / "stamps", tmp_path / "out")
    assert [(s.name, s.images, s.with_masks) for s in summary.splits] == [
        ("train", 960, False),
        ("validation", 160, True),
    ]
    assert len(summary.class_names) == 12 and summary.class_names[0] == "mammal"
