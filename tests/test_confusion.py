"""Confusion matrices and scores: hand-computed values, the reference figures, bad input."""

import math
from pathlib import Path

import numpy as np
import pytest

from modeling_msee.evaluation.confusion import confusion_matrix, scores


SHARED = Path(__file__).resolve().parents[2] / "shared"


def test_rows_are_ground_truth():
    prediction = np.array([[0, 1, 1], [2, 2, 0]], dtype=np.uint8)
    target = np.array([[0, 0, 1], [2, 1, 255]], dtype=np.uint8)
    matrix = confusion_matrix(prediction, target, 3)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_agrees_with_a_pixel_loop():
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 2, 3, 4, 255], size=(17, 13))
    prediction = rng.choice([0, 1, 2, 3, 4, 255], size=(17, 13))
    expected = np.zeros((5, 5), dtype=int)
    for truth, predicted in zip(target.flat, prediction.flat, strict=True):
        if truth != 255 and predicted != 255:
            expected[truth, predicted] += 1
    assert np.array_equal(confusion_matrix(prediction, target, 5), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.int64])
def test_label_types_do_not_overflow(dtype):
    prediction, target = np.full((2, 3), 199, dtype=dtype), np.full((2, 3), 200, dtype=np.uint8)
    assert confusion_matrix(prediction, target, 201)[200, 199] == 6


def test_scores_by_hand():
    # Class 2 is in neither; class 3 is predicted for two pixels but absent from the ground truth.
    matrix = np.array([[6, 1, 0, 1], [2, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(matrix)
    iou = [6 / 10, 3 / 7, math.nan, 0.0]
    assert result["per_class_iou"] == pytest.approx(iou, nan_ok=True)
    assert result["mean_iou"] == pytest.approx((6 / 10 + 3 / 7) / 2)
    assert result["mean_iou_all"] == pytest.approx((6 / 10 + 3 / 7) / 4)
    assert result["pixel_accuracy"] == pytest.approx(9 / 14)
    assert result["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 6) / 2)
    assert result["pixels"] == 14
    assert isinstance(result["pixels"], int)


def test_perfect_and_disjoint():
    target = np.array([[0, 1], [2, 2]])
    assert scores(confusion_matrix(target, target, 3))["mean_iou"] == 1
    assert scores(confusion_matrix((target + 1) % 3, target, 3))["mean_iou"] == 0


def test_no_pixel_gives_nan():
    result = scores(confusion_matrix(np.zeros((2, 2), int), np.full((2, 2), 255), 3))
    assert result["pixels"] == 0
    assert math.isnan(result["mean_iou"]) and math.isnan(result["pixel_accuracy"])


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 3]], [[0, 1]], r"prediction must hold labels in \[0, 3\) or 255 \(ignored\), got 3"),
        ([[0, -1]], [[0, 255]], r"prediction .* got -1"),
        ([[0, 1]], [[0, 254]], r"target .* got 254"),
        ([[0, 1]], [[0], [1]], r"one shape, got \(1, 2\) and \(2, 1\)"),
        ([[0.0, 1.0]], [[0, 1]], r"prediction must hold integer labels, got dtype float64"),
    ],
)
def test_bad_input(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(prediction), np.array(target), 3)


def test_ignore_index_must_not_be_a_class():
    with pytest.raises(ValueError, match="ignore_index outside"):
        confusion_matrix(np.zeros((1, 1), int), np.zeros((1, 1), int), 256)
    assert confusion_matrix(np.array([255]), np.array([255]), 256, ignore_index=-1)[255, 255] == 1


def test_scores_rejects_a_bad_matrix():
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        scores(np.zeros((2, 3), dtype=int))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("case", ["dense", "single"])
@pytest.mark.parametrize(("group", "prediction"), [("scores", "pred"), ("pseudo", "pred_pseudo")])
def test_reference_figures(case, group, prediction):
    golden = np.load(SHARED / "golden" / "08_scores.npz")
    result = scores(confusion_matrix(golden[f"{case}/{prediction}"], golden[f"{case}/gt"], 21))
    names = {
        "pixel_accuracy": "pAcc",
        "mean_accuracy": "mAcc",
        "mean_iou": "miou",
        "per_class_iou": "iou",
    }
    largest = 0.0
    for ours, theirs in names.items():
        got, expected = np.array(result[ours]), golden[f"{case}/{group}/{theirs}"]
        assert np.array_equal(np.isnan(got), np.isnan(expected))
        largest = max(largest, float(np.nanmax(np.abs(got - expected))))
    print(f"{case}/{group}: largest difference {largest:.1e}")
    assert largest < 1e-12
