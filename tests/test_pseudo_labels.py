"""`msee pseudo-label`: masks from tags, as a data set that a segmentation trainer reads."""

import io
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from datasets_scripts.shapes import CLASS_NAMES
from modeling_msee import MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.inference import pseudo_labels as module
from modeling_msee.inference.masks import voc_palette
from modeling_msee.inference.pseudo_labels import LabelledImage, PseudoLabelling, certain_labels, pseudo_label


pytest_plugins = ["checkpoint_fixtures", "training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]
PROCESSOR = MSEEImageProcessor(patch_size=8)


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rows(output: Path) -> list[dict]:
    return list(load_dataset(str(output), split="train"))


def test_cam_with_par_is_what_training_uses(shapes_model, write_data, tmp_path) -> None:
    images = [picture(48, 40, 0), picture(32, 64, 1)]
    data = write_data([(images[0], [0, 3]), (images[1], [])], names=CLASS_NAMES)
    summary = pseudo_label(shapes_model, PROCESSOR, str(data), "train", tmp_path / "out", masks=tmp_path / "masks")
    assert "dropped" in str(summary) and summary.splits[0].images == 2
    found = rows(tmp_path / "out")
    assert list(found[0]) == ["image_id", "image", "labels", "label"]
    assert [row["labels"] for row in found] == [[0, 3], []]
    for row, image, hot in zip(found, images, ([1, 0, 0, 1, 0], [0] * 5), strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image))
        pixel_values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
        expected = shapes_model.pseudo_labels(pixel_values, torch.tensor([hot]))[0].numpy()
        assert np.array_equal(np.asarray(row["label"]), expected)
        with Image.open(tmp_path / "masks" / f"{row['image_id']}.png") as mask:
            assert mask.mode == "P" and mask.getpalette() == voc_palette().ravel().tolist()
            assert np.array_equal(np.asarray(mask), expected)
    assert not np.asarray(found[1]["label"]).any()  # no tag: all background


def test_masks_have_the_size_of_the_image(shapes_model, write_data, tmp_path) -> None:
    data = write_data([(picture(50, 37, 0), [1])], names=CLASS_NAMES)
    processor = MSEEImageProcessor(patch_size=8, size={"shortest_edge": 24})
    for source in ("cam", "segmentation"):
        pseudo_label(shapes_model, processor, str(data), "train", tmp_path / source, PseudoLabelling(source))
        label = np.asarray(rows(tmp_path / source)[0]["label"])
        assert label.shape == (37, 50) and set(np.unique(label)) <= {0, 2, 255}


def test_segmentation_leaves_absent_classes_out(shapes_model) -> None:
    pixel_values = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    tags = torch.tensor([[0.0, 1, 0, 0, 1]])
    hot, maps = module._maps(shapes_model, pixel_values, tags, PseudoLabelling("segmentation"))
    assert torch.equal(hot, tags) and maps.shape == (1, 5, 16, 24)
    assert not maps[:, [0, 2, 3]].any() and maps[:, [1, 4]].min() > 0 and maps.sum(dim=1).max() < 1
    with torch.no_grad():
        logits = shapes_model(pixel_values).logits
    logits = torch.nn.functional.interpolate(logits, size=(16, 24), mode="bilinear")
    assert torch.allclose(maps[:, [1, 4]], logits[:, [0, 2, 5]].softmax(dim=1)[:, 1:], atol=1e-6)


def test_classes_are_predicted_where_no_image_has_tags(shapes_model, write_data, tmp_path) -> None:
    images = [picture(24, 24, seed) for seed in range(3)]
    data = write_data([(image, []) for image in images], names=CLASS_NAMES)
    pseudo_label(shapes_model, PROCESSOR, str(data), "train", tmp_path / "out")
    for row, image in zip(rows(tmp_path / "out"), images, strict=True):
        with torch.no_grad():
            features = shapes_model.encode(PROCESSOR(image, return_tensors="pt")["pixel_values"]).features
            scores = shapes_model.class_logits(features, shapes_model.classifier)[0]
        assert row["labels"] == (scores >= 0).nonzero()[:, 0].tolist() != []


# --- CRF ------------------------------------------------------------------------------------------


def test_certain_labels_by_hand() -> None:
    maps = torch.tensor([[[[0.9, 0.5, 0.1]], [[0.2, 0.6, 0.1]], [[1.0, 1.0, 1.0]]]])  # three classes, 1 x 3
    found = certain_labels(maps, torch.tensor([[1.0, 1, 0]]), threshold=0.4, size=(3, 1))
    expected = [[0.15, 0.15, 0.7], [0.7, 0.15, 0.15], [0.15, 0.7, 0.15], [0, 0, 0]]
    assert np.allclose(found[:, 0], expected)
    alone = certain_labels(maps, torch.zeros(1, 3), threshold=0.4, size=(3, 1))
    assert np.array_equal(alone[:, 0], [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])


class ArgMaxPool:
    """A CRF that leaves every label as it is."""

    def __init__(self, workers: int) -> None:
        assert workers == 2

    def __enter__(self) -> "ArgMaxPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, items: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        for image, probabilities in list(items):  # all taken ahead of the first result
            assert image.shape[:2] == probabilities.shape[1:]
            yield probabilities.argmax(axis=0)


def test_both_thresholds_decide(shapes_model, monkeypatch) -> None:
    """Defaults 0.7 and 0.25: background at 0.1, ignored at 0.5, the class at 0.9."""
    monkeypatch.setattr(module, "CRFPool", ArgMaxPool)
    images = []
    for index in range(2):
        maps, hot = torch.zeros(1, 5, 1, 3), torch.zeros(1, 5)
        maps[0, index], hot[0, index] = torch.tensor([[0.1, 0.5, 0.9]]), 1
        images.append(LabelledImage(str(index), b"", picture(3, 1, 0), torch.zeros(1, 3, 8, 8), hot, maps))
    found = list(module._with_crf(shapes_model, iter(images), 2))
    assert [image.image_id for image, _ in found] == ["0", "1"]
    assert [labels.tolist() for _, labels in found] == [[[0, 255, 1]], [[0, 255, 2]]]


def test_command_with_crf(checkpoint, write_data, tmp_path, capsys) -> None:
    pytest.importorskip("pydensecrf")
    data = write_data([(picture(40, 24, 0), [2]), (picture(24, 40, 1), [0, 1])], names=CLASS_NAMES)
    words = ["pseudo-label", checkpoint, "--data", data, "--output", tmp_path / "out", "--refinement", "crf"]
    assert main([str(word) for word in words]) == 0
    assert f"Written to {tmp_path / 'out'}" in capsys.readouterr().out
    values = [set(np.unique(row["label"])) for row in rows(tmp_path / "out")]
    assert values[0] <= {0, 3, 255} and values[1] <= {0, 1, 2, 255}


# --- Bad input ------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out(checkpoint, write_data, tmp_path, capsys) -> None:
    buffer = io.BytesIO()
    picture(32, 32, 0).save(buffer, "JPEG")
    data = write_data([(buffer.getvalue()[:200], [0]), (picture(32, 32, 1), [1])], names=CLASS_NAMES)
    words = ["pseudo-label", checkpoint, "--data", data, "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    assert "train: dropped 1 image(s): cannot be read" in capsys.readouterr().out
    assert [row["image_id"] for row in rows(tmp_path / "out")] == ["photo_1"]


def test_other_classes_and_full_folders(shapes_model, write_data, tmp_path) -> None:
    data = write_data([(picture(16, 16, 0), [0])])
    with pytest.raises(ValueError, match="the model has 6 labels"):
        pseudo_label(shapes_model, PROCESSOR, str(data), "train", tmp_path / "out")
    data = write_data([(picture(16, 16, 0), [0])], names=CLASS_NAMES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for folders in ({"output": tmp_path / "full"}, {"output": tmp_path / "out", "masks": tmp_path / "full"}):
        with pytest.raises(FileExistsError, match="not empty"):
            pseudo_label(shapes_model, PROCESSOR, str(data), "train", **folders)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "full").iterdir())) == 1


def test_image_ids_cannot_leave_the_folder_of_masks(shapes_model, write_data, tmp_path, monkeypatch) -> None:
    data = write_data([(picture(16, 16, 0), [0])], names=CLASS_NAMES)
    loaded = module.load_split(str(data), "train").map(lambda row: {"image_id": "../../outside"})
    monkeypatch.setattr(module, "load_split", lambda path, split: loaded)
    with pytest.raises(ValueError, match="expected a path inside the data folder"):
        pseudo_label(shapes_model, PROCESSOR, str(data), "train", tmp_path / "out", masks=tmp_path / "masks")
    assert {path.name for path in tmp_path.iterdir()} == {data.name}


# --- What the masks are for -----------------------------------------------------------------------


def test_segformer_trains_on_the_data_set(shapes_model, tiny_data, tmp_path, monkeypatch, capsys) -> None:
    pseudo_label(shapes_model, PROCESSOR, str(tiny_data), "train", tmp_path / "out")
    script = ROOT / "examples" / "train_segformer.py"
    words = [str(script), str(tmp_path / "out"), str(tiny_data), "--steps", "20", "--size", "32"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    first, last, score = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1: loss") and last.startswith("step 20: loss")
    assert float(last.split()[-1]) < float(first.split()[-1])
    assert score.startswith("mIoU on 5 true masks: ") and 0 < float(score.split()[-2]) < 100
