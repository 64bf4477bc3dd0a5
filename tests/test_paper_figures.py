"""`msee compare`, `regions` and `failures`: what is in their rows, in which order, and which images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("matplotlib")
from modeling_msee.cli import main
from modeling_msee.commands.common import load_model
from modeling_msee.data.contract import load_split
from modeling_msee.inference.explain import Explanation, explain
from modeling_msee.inference.pictures import Picture, choose_pictures
from modeling_msee.inference.rows import legend, results_row, steps_row, training_row
from modeling_msee.training.checkpoints import complete_checkpoints


pytest_plugins = ["training_fixtures"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def picture() -> Picture:
    """4 x 2 pixels; class 1 in the left half, one pixel ignored."""
    target = np.array([[1, 1, 0, 0], [1, 1, 0, 255]])
    return Picture("photo", Image.new("RGB", (4, 2), (90, 90, 90)), torch.tensor([1.0, 0.0]), target)


@pytest.fixture
def explanation() -> Explanation:
    segmentation = np.array([[1, 0, 0, 0], [1, 0, 0, 2]])
    maps = {scale: np.full((2, 4), scale / 2, np.float32) for scale in (1.0, 1.5, 0.5)}
    regions = {1.5: segmentation == 1, 0.5: segmentation == 3}
    return Explanation(maps, regions, np.zeros((2, 4), np.float32), np.full((2, 4), 255), segmentation)


def titles(row) -> list[str]:
    return [panel.title for panel in row]


def captions(row) -> list[str]:
    return [panel.caption for panel in row]


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_of_the_figures(picture, explanation) -> None:
    # Background: 3 of 5 pixels; class 1: 2 of 4. The ignored pixel counts for neither.
    expected = f"mIoU {100 * (3 / 5 + 2 / 4) / 2:.1f}"
    row = results_row(picture, {"baseline": explanation, "msee": explanation}, 3)
    assert titles(row) == ["Image", "baseline CAM", "baseline Seg", "msee CAM", "msee Seg", "Ground truth"]
    assert captions(row) == ["photo", "", expected, "", expected, ""]
    row = training_row(picture, explanation, 450, 3)
    assert titles(row) == ["Image", "Segmentation S", "CAM ×1.5", "Bˡ ×1.5", "CAM ×0.5", "Bˢ ×0.5", "Ground truth"]
    assert captions(row) == ["step 450", expected, "", "25.0 % of the image", "", "0.0 % of the image", ""]
    shown = titles(steps_row(picture, explanation))
    assert shown == [
        *("Image", "CAM ×0.5", "CAM ×1", "CAM ×1.5", "Bˡ ×1.5", "Bˢ ×0.5"),
        *("Pseudo label", "Segmentation", "Ground truth"),
    ]


def test_without_a_mask_there_is_no_truth(picture, explanation) -> None:
    bare = Picture(picture.image_id, picture.image, picture.labels, None)
    row = results_row(bare, {"": explanation}, 3)
    assert titles(row) == ["Image", "CAM", "Seg"] and captions(row) == ["photo", "", ""]


def test_legend_names_what_is_drawn(picture, explanation) -> None:
    """Also a class that is only predicted."""
    names = ["background", "ant", "bee", "cow"]
    assert legend(names, [picture], [explanation.segmentation]) == {
        0: "background",
        1: "ant",
        2: "bee",
        255: "ignored",
    }
    assert legend(names, [], []) == {0: "background"}


# --- Choice of images -----------------------------------------------------------------------------


def test_choice_is_spread_and_by_number_of_classes(write_data) -> None:
    image = Image.new("RGB", (8, 8))
    labels = [[0], [0, 1], [], [1], [0, 1], [1], [0, 1]]
    split = load_split(str(write_data([(image, found) for found in labels])), "train")

    def chosen(count: int, least: int) -> list[str]:
        return [picture.image_id for picture in choose_pictures(split, count, least)]

    assert chosen(3, 0) == ["photo_0", "photo_3", "photo_6"]
    assert chosen(9, 2) == ["photo_1", "photo_4", "photo_6"]
    assert chosen(2, 2) == ["photo_1", "photo_6"]
    assert choose_pictures(split, 1)[0].target is None
    with pytest.raises(ValueError, match="at least 3 classes, none of the 7"):
        choose_pictures(split, 1, 3)


# --- Model ----------------------------------------------------------------------------------------


def test_explanation_is_what_the_model_gives(trained, tiny_data) -> None:
    """Reusing the passes changes nothing; the segmentation is the one that evaluation scores."""
    model, processor = load_model(str(trained))
    picture = choose_pictures(load_split(str(tiny_data), "validation"), 1)[0]
    found = explain(model, processor, picture.image, picture.labels)
    pixels = processor(picture.image, return_tensors="pt")["pixel_values"]
    pseudo = model.pseudo_labels(pixels, picture.labels[None])[0].numpy().astype(np.uint8)
    size = picture.image.size
    assert np.array_equal(found.pseudo_label, Image.fromarray(pseudo).resize(size, Image.Resampling.NEAREST))
    with torch.no_grad():
        outputs = model(pixels)
    expected = processor.post_process_semantic_segmentation(outputs, target_sizes=[size[::-1]])[0]
    assert np.array_equal(found.segmentation, expected.numpy())
    assert set(found.activation) == {1.0, 1.5, 0.5} and list(found.regions) == [1.5, 0.5]
    assert not (found.regions[1.5] & found.regions[0.5]).any()
    for values in (*found.activation.values(), *found.regions.values(), found.fused_activation):
        assert values.shape == size[::-1]


def test_complete_checkpoints(trained, tmp_path: Path) -> None:
    assert {step: path.name for step, path in complete_checkpoints(trained).items()} == {
        3: "checkpoint-3",
        6: "checkpoint-6",
    }
    (tmp_path / "checkpoint-9").mkdir()  # half-written
    with pytest.raises(ValueError, match="complete folders checkpoint-N, found none"):
        complete_checkpoints(tmp_path)


# --- Commands -------------------------------------------------------------------------------------


def height_and_width(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.height, picture.width


def test_compare(trained, tiny_data, tmp_path, capsys) -> None:
    first, second = trained / "checkpoint-3", trained / "checkpoint-6"
    assert run("compare", first, second, "--data", tiny_data, "--count", 2, "--output", tmp_path) == 0
    path = tmp_path / "comparison-validation.png"
    assert f"Written to {path}" in capsys.readouterr().out
    assert height_and_width(path)[1] == pytest.approx(2 * 18 + 6 * (255 + 9), abs=2)


def test_regions(trained, tiny_data, tmp_path) -> None:
    assert run("regions", trained, "--data", tiny_data, "--split", "train", "--count", 2, "--output", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["regions-train-1.png", "regions-train-2.png"]
    height, width = height_and_width(tmp_path / "regions-train-1.png")
    assert width == pytest.approx(2 * 18 + 6 * (255 + 9), abs=2)  # no masks, so no ground truth
    assert height > 2 * 200  # two checkpoints


def test_regions_of_no_run(tiny_data, tmp_path, capsys) -> None:
    assert run("regions", tmp_path, "--data", tiny_data, "--output", tmp_path / "new") == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_failures_are_ranked(trained, tiny_data, tmp_path) -> None:
    assert run("failures", trained, "--data", tiny_data, "--count", 2, "--output", tmp_path) == 0
    with (tmp_path / "failures-validation.csv").open(newline="") as file:
        ranked = list(csv.DictReader(file))
    split = load_split(str(tiny_data), "validation")
    assert sorted(row["image_id"] for row in ranked) == sorted(split["image_id"])
    values = [float(row["seg_miou"]) for row in ranked]
    assert values == sorted(values)
    model, processor = load_model(str(trained))
    for picture in choose_pictures(split, 5):
        caption = results_row(
            picture, {"": explain(model, processor, picture.image, picture.labels)}, len(model.config.label_names)
        )[2].caption
        value = next(row["seg_miou"] for row in ranked if row["image_id"] == picture.image_id)
        assert float(caption.removeprefix("mIoU ")) == pytest.approx(float(value), abs=0.06)
    assert (tmp_path / "failures-validation.png").is_file()
