"""Confusion matrices of label maps and the scores read from them."""

from typing import TypedDict

import numpy as np


class Scores(TypedDict):
    """Scores of one confusion matrix; ratios in [0, 1], nan where nothing defines them."""

    mean_iou: float  # over the classes present in the ground truth
    mean_iou_all: float  # over all K classes; a class neither present nor predicted counts as 0
    pixel_accuracy: float
    mean_accuracy: float  # recall, over the classes present in the ground truth
    per_class_iou: list[float]  # K values; nan: neither in the ground truth nor predicted
    pixels: int


def _as_labels(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must hold integer labels, got dtype {values.dtype}; take the arg-max first")
    return values.reshape(-1)


def _check_range(name: str, values: np.ndarray, num_classes: int, ignore_index: int) -> None:
    bad = values[((values < 0) | (values >= num_classes)) & (values != ignore_index)]
    if bad.size:
        raise ValueError(
            f"{name} must hold labels in [0, {num_classes}) or {ignore_index} (ignored), got {int(bad[0])} "
            f"({bad.size} such pixels); check num_classes and the label map"
        )


def confusion_matrix(
    prediction: np.ndarray, target: np.ndarray, num_classes: int, ignore_index: int = 255
) -> np.ndarray:
    """Count the pixels of every (target, prediction) pair.

    `prediction` and `target` are integer label maps of one shape. Pixels whose target is `ignore_index` are
    left out, and so are those whose prediction is: a pseudo label may abstain. Returns int64 (K, K), rows
    ground truth, columns prediction. Raises ValueError for another shape or dtype, or a label out of range.
    """
    if num_classes < 1 or 0 <= ignore_index < num_classes:
        raise ValueError(
            "expected num_classes >= 1 and ignore_index outside [0, num_classes), "
            f"got num_classes={num_classes} and ignore_index={ignore_index}"
        )
    if np.shape(prediction) != np.shape(target):
        raise ValueError(
            f"prediction and target must have one shape, got {np.shape(prediction)} and {np.shape(target)}; "
            "resize the scores to the target's size before the arg-max"
        )
    predicted, truth = _as_labels("prediction", prediction), _as_labels("target", target)
    _check_range("prediction", predicted, num_classes, ignore_index)
    _check_range("target", truth, num_classes, ignore_index)
    kept = (truth != ignore_index) & (predicted != ignore_index)
    pairs = truth[kept].astype(np.int64) * num_classes + predicted[kept].astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise ratio, nan where the denominator is zero."""
    result = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator > 0)


def scores(matrix: np.ndarray) -> Scores:
    """Intersection over union and accuracies of a (K, K) confusion matrix, rows ground truth.

    A class that is predicted but absent from the ground truth has IoU 0: it lowers `mean_iou_all` but not
    `mean_iou`. `mean_iou_all` divides by K always: a class neither present nor predicted counts as 0.
    Raises ValueError when the matrix is not square or has negative counts.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0 or (matrix < 0).any():
        raise ValueError(f"expected a square (K, K) matrix of counts >= 0, got shape {matrix.shape}")
    correct, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    pixels = int(matrix.sum())
    iou = _divide(correct, truth + predicted - correct)
    recall = _divide(correct, truth)
    present = truth > 0
    empty = float("nan")
    return {
        "mean_iou": float(iou[present].mean()) if pixels else empty,
        "mean_iou_all": float(np.nan_to_num(iou).mean()) if pixels else empty,
        "pixel_accuracy": float(correct.sum() / pixels) if pixels else empty,
        "mean_accuracy": float(recall[present].mean()) if pixels else empty,
        "per_class_iou": [float(value) for value in iou],
        "pixels": pixels,
    }
