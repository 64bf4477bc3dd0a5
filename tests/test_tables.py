"""Result tables and metrics.json."""

import json
import math

import numpy as np
import pytest

from modeling_msee.evaluation.confusion import scores
from modeling_msee.evaluation.tables import format_table, write_metrics


NAMES = ["background", "cat", "dog", "bird"]
MATRIX = np.array([[6, 1, 0, 1], [2, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
ROWS = {"CAM": scores(MATRIX), "Seg + CRF": scores(np.diag([5, 5, 5, 5]))}


def test_table():
    table = format_table(ROWS, NAMES, "single scale, no flip, val")
    assert table.splitlines() == [
        "Protocol: single scale, no flip, val",
        "                    CAM  Seg + CRF",
        "----------------------------------",
        "mIoU               51.4      100.0",
        "mIoU, all classes  25.7      100.0",
        "pixel accuracy     64.3      100.0",
        "----------------------------------",
        "background         60.0      100.0",
        "cat                42.9      100.0",
        "dog                   -      100.0",
        "bird                0.0      100.0",
    ]


@pytest.mark.parametrize("names", [NAMES[1:], [*NAMES, "cow"]])
def test_class_names_must_match(names, tmp_path):
    with pytest.raises(ValueError, match=f"row 'CAM' scores 4 classes, but {len(names)} class names"):
        format_table(ROWS, names, "x")
    with pytest.raises(ValueError, match="class names"):
        write_metrics(tmp_path / "metrics.json", ROWS, names, {})
    assert list(tmp_path.iterdir()) == []


def test_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        format_table({}, NAMES, "x")


def test_metrics_json_has_no_nan(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, ROWS, NAMES, {"protocol": "single scale"})
    write_metrics(path, ROWS, NAMES, {"protocol": "single scale"})  # over an existing file
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=no_constant)
    assert content["protocol"] == "single scale"
    assert content["class_names"] == NAMES
    cam = content["results"]["CAM"]
    assert cam["per_class_iou"] == [pytest.approx(0.6), pytest.approx(3 / 7), None, 0.0]
    assert cam["mean_iou"] == pytest.approx(ROWS["CAM"]["mean_iou"])
    assert cam["pixels"] == 14


def test_scores_of_nothing_are_dashes_and_null(tmp_path):
    nothing = scores(np.zeros((4, 4), dtype=int))
    assert math.isnan(nothing["mean_iou"])
    assert "mIoU                 -" in format_table({"Seg": nothing}, NAMES, "x")
    write_metrics(tmp_path / "metrics.json", {"Seg": nothing}, NAMES, {})
    assert json.loads((tmp_path / "metrics.json").read_text())["results"]["Seg"]["mean_iou"] is None


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, ROWS, NAMES, {"protocol": "old"})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("modeling_msee.data.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_metrics(path, ROWS, NAMES, {"protocol": "new"})
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads(path.read_text())["protocol"] == "old"
