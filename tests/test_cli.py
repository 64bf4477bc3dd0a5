"""The `msee` command on a tiny trained checkpoint: results, pictures, exit codes and messages."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import ClassLabel, DatasetDict, List, load_dataset
from PIL import Image

from modeling_msee.cli import main
from modeling_msee.data.contract import load_split, read_rgb


pytest_plugins = ["training_fixtures"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate(trained, tiny_data, tmp_path, capsys) -> None:
    """The same figures as at the end of training."""
    assert run("evaluate", trained, "--data", tiny_data, "--output", tmp_path / "new" / "scores.json") == 0
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    at_the_end = json.loads((trained / "metrics.json").read_text())
    for key in ("protocol", "description", "settings", "versions", "class_names", "data", "results"):
        assert scores[key] == at_the_end[key]
    assert scores["command"].startswith(f"msee evaluate {trained} --data {tiny_data} --output ")
    assert at_the_end["command"].startswith("train_msee.py ") and " --eval_steps 3 " in at_the_end["command"]
    assert scores["model"] == at_the_end["model"] == str(trained)
    table = capsys.readouterr().out
    assert table.startswith("Protocol: msee (Seg: one scale")
    assert all(word in table for word in ("Auxiliary CAM", "mIoU, all classes", "umbrella"))


def test_evaluate_needs_no_output(trained, tiny_data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", trained, "--data", tiny_data) == 0
    assert "pixel accuracy" in capsys.readouterr().out and not list(tmp_path.iterdir())


def scored(trained: Path, data: Path, output: Path, *words: str) -> dict:
    assert run("evaluate", trained, "--data", data, "--output", output, *words) == 0
    return json.loads(output.read_text())


def test_evaluate_with_crf(trained, tiny_data, tmp_path) -> None:
    """The flag and the ending of the name are one."""
    pytest.importorskip("pydensecrf")
    content = scored(trained, tiny_data, tmp_path / "scores.json", "--crf")
    named = scored(trained, tiny_data, tmp_path / "named.json", "--protocol", "msee-crf", "--crf-workers", "1")
    assert content | {"command": ""} == named | {"command": ""}
    assert content["protocol"] == "msee-crf" and content["settings"]["crf"]["bilateral_xy"] == 121
    assert content["versions"]["pydensecrf2"]
    results = content["results"]
    plain = json.loads((trained / "metrics.json").read_text())["results"]
    assert list(results) == ["CAM", "Auxiliary CAM", "Seg", "Seg + CRF"]
    assert {name: results[name] for name in plain} == plain
    assert results["Seg + CRF"]["pixels"] == results["Seg"]["pixels"]


def test_evaluate_over_scales_and_mirror_images(trained, tiny_data, tmp_path) -> None:
    """The CAM does not depend on the protocol, the segmentation does."""
    plain = json.loads((trained / "metrics.json").read_text())["results"]
    results = scored(trained, tiny_data, tmp_path / "scores.json", "--protocol", "toco-voc")["results"]
    assert list(results) == list(plain)
    assert results["CAM"] == plain["CAM"] and results["Seg"]["per_class_iou"] != plain["Seg"]["per_class_iou"]
    assert results["Seg"]["pixels"] == plain["Seg"]["pixels"]


def test_evaluate_the_cam_alone(trained, tiny_data, tmp_path) -> None:
    results = scored(trained, tiny_data, tmp_path / "scores.json", "--protocol", "cam")["results"]
    plain = json.loads((trained / "metrics.json").read_text())["results"]
    assert results == {name: plain[name] for name in ("CAM", "Auxiliary CAM")}


@pytest.mark.parametrize(("words", "wanted"), [(["mse"], "mse"), (["cam", "--crf"], "cam-crf")])
def test_protocols_that_do_not_exist(capsys, words: list[str], wanted: str) -> None:
    assert run("evaluate", "unused", "--data", "unused", "--protocol", *words) == 1
    error = capsys.readouterr().err
    assert "error: expected a protocol out of msee, msee-crf, toco-voc" in error and f"got '{wanted}'" in error


# --- figures --------------------------------------------------------------------------------------


def test_figures_have_a_row_for_each_image(trained, tiny_data, tmp_path, capsys) -> None:
    heights = {}
    for count in (1, 3, 9):  # of five images
        assert run("figures", trained, "--data", tiny_data, "--count", count, "--output", tmp_path / str(count)) == 0
        path = tmp_path / str(count) / "validation.png"
        assert f"Written to {path}" in capsys.readouterr().out
        with Image.open(path) as picture:
            heights[count] = picture.height
            # Image, three CAMs, two regions, pseudo label, segmentation, truth: 255 px and a gap of 9 each.
            assert picture.width == pytest.approx(2 * 18 + 9 * (255 + 9), abs=2)
            assert len(set(picture.convert("RGB").tobytes()[::3])) > 100
    sizes = [read_rgb(row).size for row in load_split(str(tiny_data), "validation")]
    rows = [round(255 * height / max(width, height)) + 9 for width, height in sizes]
    assert heights[3] - heights[1] == pytest.approx(rows[2] + rows[4], abs=2)
    assert heights[9] - heights[1] == pytest.approx(sum(rows[1:]), abs=2)


def test_figures_of_no_image(trained, tiny_data, tmp_path, capsys) -> None:
    assert run("figures", trained, "--data", tiny_data, "--count", 0, "--output", tmp_path) == 1
    assert "error: expected at least one row" in capsys.readouterr().err


# --- Bad input ------------------------------------------------------------------------------------


def test_no_command(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate"], ["figures", "--output", "unused"]])
def test_missing_model_folder(tiny_data, tmp_path, capsys, command: list[str]) -> None:
    assert run(*command, tmp_path / "nope", "--data", tiny_data) == 1
    message = f"error: {tmp_path / 'nope'}: expected a checkpoint folder or a Hub repository. There is no such"
    assert capsys.readouterr().err.startswith(message)


def test_folder_without_a_model(tiny_data, tmp_path, capsys) -> None:
    assert run("evaluate", tmp_path, "--data", tiny_data) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path) in error and "model.safetensors" in error


def test_damaged_model(trained, tiny_data, tmp_path, capsys) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert run("evaluate", tmp_path / "copy", "--data", tiny_data) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_missing_data_and_split(trained, tiny_data, tmp_path, capsys) -> None:
    assert run("evaluate", trained, "--data", tmp_path / "nope") == 1
    assert f"error: {tmp_path / 'nope'}: expected a folder that a builder" in capsys.readouterr().err
    assert run("evaluate", trained, "--data", tiny_data, "--split", "test") == 1
    assert "expected a split 'test', found train, validation" in capsys.readouterr().err
    assert run("evaluate", trained, "--data", tiny_data, "--split", "train") == 1
    assert "needs a column 'segmentation_map' with masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [["dog", "boat", "kite", "tree", "umbrella"], ["boat", "dog", "kite", "tree", "umbrella", "zebra"]],
)
def test_data_of_other_classes(trained, tiny_data, tmp_path: Path, capsys, names: list[str]) -> None:
    feature = List(ClassLabel(names=names))
    splits = {name: split.cast_column("labels", feature) for name, split in load_dataset(str(tiny_data)).items()}
    DatasetDict(splits).save_to_disk(tmp_path / "other")
    assert run("evaluate", trained, "--data", tmp_path / "other") == 1
    assert f"error: {trained} has 6 labels (background, boat, dog" in capsys.readouterr().err
