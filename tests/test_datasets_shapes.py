"""Generated shapes, and the writer that all builders share."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset, load_from_disk
from PIL import Image
from scipy.ndimage import binary_opening

from datasets_scripts import common, shapes
from modeling_msee.data import writer
from modeling_msee.data.examples import Example, Split, encode_png
from modeling_msee.data.writer import write_dataset


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def scenes() -> list[Example]:
    return list(shapes.examples("train", 160, size=96, seed=3, with_masks=True))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shapes.build(tmp_path / "shapes", train=6, validation=3, size=48)
    return tmp_path / "shapes"


# --- Scenes ---------------------------------------------------------------------------------------


def test_scenes_depend_on_the_arguments_alone() -> None:
    first = list(shapes.examples("train", 4, size=48, seed=1))
    assert list(shapes.examples("train", 6, size=48, seed=1))[:4] == first
    assert [e.image for e in shapes.examples("train", 4, size=48, seed=2)] != [e.image for e in first]
    assert [e.image for e in shapes.examples("validation", 4, size=48, seed=1)] != [e.image for e in first]


def test_labels_and_masks_agree(scenes: list[Example]) -> None:
    for scene in scenes:
        mask = pixels(scene.mask or b"")
        assert mask.dtype == np.uint8 and mask.shape == pixels(scene.image).shape[:2] == (96, 96)
        assert scene.labels == tuple(int(value) - 1 for value in np.unique(mask) if value != 0)
    assert {label for scene in scenes for label in scene.labels} == set(range(5))


def test_training_scenes_have_no_masks_and_validation_sizes_vary() -> None:
    assert all(scene.mask is None for scene in shapes.examples("train", 3, size=48))
    sizes = {pixels(scene.image).shape for scene in shapes.examples("validation", 6, size=96, with_masks=True)}
    assert len(sizes) > 3
    assert all(81 <= side <= 111 for size in sizes for side in size[:2])


def test_object_sides_counts_and_empty_scenes() -> None:
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(300):
        _, box = shapes._place(rng, shapes.SHAPES[0], 100, 120)
        assert min(box) >= -1e-6 and box[2] <= 120 + 1e-6 and box[3] <= 100 + 1e-6
        sides.append(max(box[2] - box[0], box[3] - box[1]))
    assert 22 <= min(sides) < 26 and 76 < max(sides) <= 80 + 1e-6
    counts = np.bincount([len(shapes._random_classes(rng)) for _ in range(3000)], minlength=4) / 3000
    np.testing.assert_allclose(counts, [0.04, 0.384, 0.384, 0.192], atol=0.03)


def test_a_folder_written_anew_is_loaded_anew(tmp_path: Path) -> None:
    """The library's cache goes by file names: without the digest the first images would come back."""
    for seed in (0, 1):
        shapes.build(tmp_path / "shapes", train=2, validation=1, size=48, seed=seed, overwrite=True)
        loaded = load_dataset(str(tmp_path / "shapes"), split="train", cache_dir=str(tmp_path / "cache"))
        expected = next(shapes.examples("train", 1, size=48, seed=seed)).image
        assert np.array_equal(np.asarray(loaded[0]["image"]), pixels(expected))


def test_every_class_has_a_thin_part() -> None:
    """A 5x5 opening removes what is thinner than 5 pixels; a 1-pixel square removes nothing."""
    for index in range(len(shapes.SHAPES)):
        placed, box = shapes._place(np.random.default_rng(index), shapes.SHAPES[index], 96, 96)
        picture = np.full((96, 96, 3), 0.5)
        covered = shapes._draw_object(np.random.default_rng(0), picture, placed, line_width=2.0, pixel=1.0)
        thin = covered & ~binary_opening(covered, np.ones((5, 5)))
        assert thin.sum() >= 0.2 * max(box[2] - box[0], box[3] - box[1]), shapes.CLASS_NAMES[index]
        assert binary_opening(covered, np.ones((5, 5))).sum() > thin.sum()


def test_colour_does_not_tell_the_class(scenes: list[Example]) -> None:
    """The nearest class mean of the mean object colour is near chance (20 %)."""
    colours, classes = [], []
    for scene in scenes:
        picture, mask = pixels(scene.image), pixels(scene.mask or b"")
        for label in scene.labels:
            colours.append(picture[mask == label + 1].mean(axis=0))
            classes.append(label)
    colour, classes_of = np.array(colours), np.array(classes)
    fit, test = np.arange(len(classes_of)) % 2 == 0, np.arange(len(classes_of)) % 2 == 1
    means = np.stack([colour[fit & (classes_of == index)].mean(axis=0) for index in range(5)])
    guess = np.linalg.norm(colour[test, None] - means, axis=-1).argmin(axis=1)
    assert len(classes_of) > 200
    assert (guess == classes_of[test]).mean() < 0.4


def test_objects_carry_texture_and_backgrounds_do_not(scenes: list[Example]) -> None:
    steps: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for scene in scenes[:40]:
        picture, mask = pixels(scene.image).astype(float).mean(axis=2), pixels(scene.mask or b"")
        step, inside = np.abs(np.diff(picture, axis=1)), (mask[:, 1:] == mask[:, :-1])
        for foreground in steps:
            steps[foreground].append(step[inside & ((mask[:, 1:] > 0) == foreground)])
    assert np.concatenate(steps[True]).mean() > 3 * np.concatenate(steps[False]).mean()


@pytest.mark.parametrize("size", [32, 160])
def test_any_size(size: int) -> None:
    scene = next(shapes.examples("train", 1, size=size))
    assert pixels(scene.image).shape == (size, size, 3)


@pytest.mark.parametrize(("argument", "value"), [("train", 0), ("validation", -1), ("size", 8), ("seed", -1)])
def test_bad_arguments_write_nothing(tmp_path: Path, argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"got .*{value}"):
        shapes.build(tmp_path / "out", **{argument: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; expected one of train, validation"):
        next(shapes.examples("test", 1))


# --- What is written ------------------------------------------------------------------------------


def test_command_prints_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "out"), "--train", "4", "--validation", "2", "--size", "48"]
    assert shapes.main(arguments) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1:4] == [["train", "validation"], ["images", "4", "2"], ["masks", "no", "yes"]]
    assert shapes.main(arguments) == 1
    assert "not empty: choose another --output or pass --overwrite" in capsys.readouterr().err
    assert shapes.main([*arguments, "--overwrite", "--with-masks"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert "segmentation_map" in pq.read_schema(next((tmp_path / "out/data").glob("train-*"))).names


def test_files_are_self_contained_and_training_has_no_mask_column(written: Path) -> None:
    names = sorted(path.name for path in (written / "data").iterdir())
    assert [re.sub("-[0-9a-f]{16}", "", name) for name in names] == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    train, validation = (pq.read_table(written / "data" / name) for name in names)
    assert train.column_names == ["image_id", "image", "labels"]
    assert validation.column_names == ["image_id", "image", "labels", "segmentation_map"]
    row = validation.to_pylist()[0]
    assert row["image"] == {"bytes": row["image"]["bytes"], "path": "validation_00000.png"}
    assert pixels(row["image"]["bytes"]).shape[:2] == pixels(row["segmentation_map"]["bytes"]).shape


def check_rows(rows: Iterator[dict]) -> None:
    expected = list(shapes.examples("validation", 3, size=48, with_masks=True))
    for row, example in zip(rows, expected, strict=True):
        assert row["image_id"] == example.image_id and tuple(row["labels"]) == example.labels
        np.testing.assert_array_equal(np.asarray(row["image"]), pixels(example.image))
        np.testing.assert_array_equal(np.asarray(row["segmentation_map"]), pixels(example.mask or b""))


def test_load_dataset_by_folder(written: Path) -> None:
    loaded = load_dataset(str(written), split="validation")
    assert loaded.features == writer.dataset_features(shapes.CLASS_NAMES, True)
    check_rows(loaded)
    assert set(load_dataset(str(written), split="train")["segmentation_map"]) == {None}


def test_load_dataset_by_files_and_streaming(written: Path) -> None:
    files = str(written / "data" / "validation-*.parquet")
    loaded = load_dataset("parquet", data_files=files, split="train")
    assert loaded.features["labels"].feature.names == list(shapes.CLASS_NAMES)
    check_rows(loaded)
    check_rows(load_dataset(str(written), split="validation", streaming=True))
    streamed = load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert streamed.features == loaded.features
    check_rows(streamed)


def test_load_keeps_columns_and_load_from_disk_keeps_features(written: Path, tmp_path: Path) -> None:
    loaded = writer.load(written)
    assert loaded["train"].column_names == ["image_id", "image", "labels"]
    loaded.save_to_disk(tmp_path / "saved")
    saved = load_from_disk(tmp_path / "saved")
    assert saved["validation"].features == writer.dataset_features(shapes.CLASS_NAMES, True)
    check_rows(saved["validation"])


def test_load_needs_a_written_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Parquet shard"):
        writer.load(tmp_path)


# --- The writer -----------------------------------------------------------------------------------


def example(name: str, labels: tuple[int, ...] = (0,), mask: bytes | None = None) -> Example:
    return Example(name, encode_png(np.zeros((4, 4, 3), np.uint8)), labels, mask)


def failing() -> Iterator[Example]:
    yield example("a")
    raise ValueError("bad row")


def test_shards_are_numbered_and_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    summary = write_dataset(
        tmp_path / "out", ["x", "y"], [Split("train", [example(str(n)) for n in range(5)], 5, False)]
    )
    shards = sorted((tmp_path / "out/data").iterdir())
    assert [shard.name.rsplit("-", 1)[0] for shard in shards] == [f"train-0000{n}-of-00003" for n in range(3)]
    ids = [name for shard in shards for name in pq.read_table(shard)["image_id"].to_pylist()]
    assert ids == ["0", "1", "2", "3", "4"]
    assert summary.splits[0].per_class == (5, 0)


def test_summary_counts(tmp_path: Path) -> None:
    rows = [example("a", (0, 1)), example("b", ()), example("c", (1,))]
    summary = write_dataset(tmp_path / "out", ["x", "y"], [Split("train", rows, 3, False, {"too small": 2})])
    split = summary.splits[0]
    assert (split.images, split.per_class, split.unlabelled) == (3, (1, 2), 1)
    assert "train: dropped 2 image(s): too small" in str(summary)


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        write_dataset(out, ["x"], [Split("train", [example("old")], 1, False)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = [Split("train", [example("new")], 1, False), Split("test", failing(), 2, False)]
    with pytest.raises(ValueError, match="bad row"):
        write_dataset(out, ["x"], parts, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert out.exists() == existing and len(list(tmp_path.iterdir())) == int(existing)


def test_overwrite_does_not_delete_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        shapes.build(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(FileExistsError, match="is a file"):
        shapes.build(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("names", "rows", "with_masks", "message"),
    [
        (["x"], [example("a"), example("a")], False, "'a' occurs twice"),
        (["x"], [example("a")], True, "expected a mask with image 'a'"),
        (["x"], [example("a", mask=b"mask")], False, "expected no mask with image 'a'"),
        (["x"], [], False, "split train has no image"),
        (["x", "x"], [example("a")], False, "repeated: x"),
        ([], [example("a")], False, "expected a list of class names"),
        ([str(n) for n in range(255)], [example("a")], False, "at most 254 classes"),
    ],
)
def test_bad_rows(tmp_path: Path, names: list[str], rows: list[Example], with_masks: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "out", names, [Split("train", rows, len(rows), with_masks)])
    assert list(tmp_path.iterdir()) == []


def test_image_size_follows_the_orientation() -> None:
    exif = Image.Exif()
    exif[common.EXIF_ORIENTATION] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 5)).save(buffer, "JPEG", exif=exif)
    assert common.image_size(buffer.getvalue(), "turned.jpg") == (5, 8)
    with pytest.raises(ValueError, match=r"note\.txt: expected an image file, got 5 bytes"):
        common.image_size(b"hello", "note.txt")
