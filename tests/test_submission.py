"""The archive for the VOC 2012 test server: names, palette, sizes, completeness."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from datasets_scripts.voc import CLASS_NAMES
from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.configuration_msee import label_fields
from modeling_msee.data.writer import dataset_features
from modeling_msee.evaluation.protocols import TOCO_VOC
from modeling_msee.evaluation.segmentation import protocol_views, segmentation_scores
from modeling_msee.inference.masks import save_palette_png, voc_palette
from modeling_msee.inference.submission import MaskFile, check_masks, load_test_images, write_archive


FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
SIZES = {"2008_000006": (50, 37), "2008_000011": (32, 48), "2011_003271": (40, 40)}


def run(*words: object) -> int:
    return main([str(word) for word in words])


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of test images with an image of another task and a text file beside them."""
    folder = tmp_path_factory.mktemp("JPEGImages")
    for seed, (image_id, size) in enumerate({**SIZES, "2007_000001": (20, 20)}.items()):
        picture(size, seed).save(folder / f"{image_id}.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def image_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "test.txt"
    path.write_text("".join(f"{image_id}\n" for image_id in SIZES))
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the 21 labels of VOC that predicts several of them."""
    fields = tiny_config().to_dict()
    for name in ("num_labels", "id2label", "label2id"):
        fields.pop(name, None)
    torch.manual_seed(0)
    model = MSEEForWeaklySupervisedSegmentation(MSEEConfig(**fields | label_fields(["background", *CLASS_NAMES])))
    folder = tmp_path_factory.mktemp("voc") / "model"
    model.save_pretrained(folder)
    MSEEImageProcessor(patch_size=8).save_pretrained(folder)
    return folder


def masks_in(path: Path) -> dict[str, np.ndarray]:
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert all(member.isfile() for member in members)
        return {m.name: np.asarray(Image.open(io.BytesIO(archive.extractfile(m).read()))) for m in members}


# --- The command ----------------------------------------------------------------------------------


def test_archive_of_a_list(checkpoint, images, image_list, tmp_path, capsys) -> None:
    words = ("submit", checkpoint, "--images", images, "--list", image_list, "--protocol", "toco-voc")
    assert run(*words, "--output", tmp_path / "new" / "results.tgz") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Protocol: toco-voc (Seg: scales") and printed.rstrip().endswith("3 masks")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.tgz"]
    masks = masks_in(tmp_path / "new" / "results.tgz")
    assert list(masks) == [f"{FOLDER}/{image_id}.png" for image_id in SIZES]
    model = MSEEForWeaklySupervisedSegmentation.from_pretrained(checkpoint).eval()
    for image_id, (width, height) in SIZES.items():
        image = Image.open(images / f"{image_id}.jpg")
        views = protocol_views(MSEEImageProcessor(patch_size=8), image, TOCO_VOC, torch.device("cpu"))
        expected = segmentation_scores(model, views, (height, width), TOCO_VOC).argmax(dim=0)
        assert np.array_equal(masks[f"{FOLDER}/{image_id}.png"], expected)
    assert len(np.unique(np.concatenate([mask.ravel() for mask in masks.values()]))) > 3


def test_files_are_indexed_in_voc_colours(checkpoint, images, image_list, tmp_path) -> None:
    words = ("submit", checkpoint, "--images", images, "--list", image_list, "--protocol", "msee")
    for name in ("one.tgz", "two.tar.gz"):
        assert run(*words, "--output", tmp_path / name) == 0
    assert (tmp_path / "one.tgz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "one.tgz") as archive:
        stored = Image.open(archive.extractfile(f"{FOLDER}/2008_000006.png"))
        assert stored.format == "PNG" and stored.mode == "P" and stored.size == (50, 37)
        assert np.array_equal(np.array(stored.getpalette()).reshape(-1, 3), voc_palette())


def test_data_set_with_crf_by_default(checkpoint, images, tmp_path, capsys) -> None:
    """The test split as the builder writes it: image_id, image, no labels, no masks."""
    pytest.importorskip("pydensecrf")
    rows = {
        "image_id": list(SIZES),
        "image": [str(images / f"{image_id}.jpg") for image_id in SIZES],
        "labels": [[]] * 3,
    }
    DatasetDict({"test": Dataset.from_dict(rows, features=dataset_features(CLASS_NAMES, False))}).save_to_disk(
        tmp_path / "data"
    )
    assert run("submit", checkpoint, "--images", tmp_path / "data", "--output", tmp_path / "results.tgz") == 0
    assert capsys.readouterr().out.startswith("Protocol: msee-crf (")
    masks = masks_in(tmp_path / "results.tgz")
    assert {name: mask.shape[::-1] for name, mask in masks.items()} == {
        f"{FOLDER}/{image_id}.png": size for image_id, size in SIZES.items()
    }


def test_bad_arguments(checkpoint, images, tmp_path, capsys) -> None:
    words = ("submit", checkpoint, "--images", images, "--output")
    listed = tmp_path / "test.txt"
    cases = [
        ((*words, tmp_path / "results.zip"), "ends in .tgz or .tar.gz"),
        ((*words, tmp_path / "x.tgz", "--protocol", "cam"), "'cam' predicts no segmentation"),
        ((*words, tmp_path / "x.tgz", "--list", tmp_path / "none.txt"), "none.txt"),
        ((*words, tmp_path / "x.tgz", "--list", listed), "1 images of the list are missing, first '2010_1'"),
    ]
    listed.write_text("2008_000006\n2010_1\n")
    for command, message in cases:
        assert run(*command) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test.txt"]


def test_model_of_other_labels(tiny_model, images, tmp_path, capsys) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    MSEEImageProcessor(patch_size=8).save_pretrained(tmp_path / "model")
    assert run("submit", tmp_path / "model", "--images", images, "--output", tmp_path / "x.tgz") == 1
    assert "scores 21 labels" in capsys.readouterr().err and not (tmp_path / "x.tgz").exists()


# --- Its parts ------------------------------------------------------------------------------------


def mask_file(image_id: str, size=(5, 4), value: int = 1, image_size=(5, 4), mode: str = "P") -> MaskFile:
    buffer = io.BytesIO()
    if mode == "P":
        save_palette_png(np.full(size[::-1], value), buffer)
    else:
        Image.new(mode, size, value).save(buffer, "PNG")
    return MaskFile(image_id, image_size, buffer.getvalue())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([mask_file("a")], "1 masks are wrong: b: no mask"),
        ([mask_file("a"), mask_file("b"), mask_file("b")], "b: 2 masks"),
        ([mask_file("a"), mask_file("b"), mask_file("c")], "c: not in the list"),
        ([mask_file("a"), mask_file("b", size=(4, 5))], r"b: the mask is \(4, 5\), the image \(5, 4\)"),
        ([mask_file("a"), mask_file("b", value=21)], "b: expected values 0 to 20, got 21"),
        ([mask_file("a"), mask_file("b", value=255)], "b: expected values 0 to 20, got 255"),
        ([mask_file("a"), mask_file("b", mode="L")], "b: expected an indexed PNG, got PNG L"),
    ],
)
def test_an_archive_that_is_not_sound_is_not_written(tmp_path, masks, message) -> None:
    path = tmp_path / "results.tgz"
    path.write_bytes(b"the old one")
    with pytest.raises(ValueError, match=message):
        write_archive(path, masks, ["a", "b"])
    assert path.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


def test_sound_masks_pass() -> None:
    check_masks([mask_file("b", value=20), mask_file("a", value=0)], ["a", "b"])


def test_ids(images, tmp_path) -> None:
    assert load_test_images(str(images), "test")[0] == ["2007_000001", *SIZES]
    ids, rows = load_test_images(str(images), "test", ["2011_003271", "2008_000006"])
    assert ids == [row["image_id"] for row in rows] == ["2011_003271", "2008_000006"]
    with pytest.raises(ValueError, match="the list: expected every image once, repeated: 2008_000006"):
        load_test_images(str(images), "test", ["2008_000006", "2008_000006"])
    with pytest.raises(ValueError, match="the list: expected at least one image"):
        load_test_images(str(images), "test", [])
    for name in ("x.jpg", "x.png"):
        picture((4, 4)).save(tmp_path / name)
    with pytest.raises(ValueError, match="repeated: x"):
        load_test_images(str(tmp_path), "test")
    picture((4, 4)).save(tmp_path / "a b.png")
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(ValueError, match="expected ids of letters, digits"):
        load_test_images(str(tmp_path), "test")
