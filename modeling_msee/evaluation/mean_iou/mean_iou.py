"""Mean IoU as an `evaluate.Metric` that keeps one confusion matrix instead of every label map."""

import io
import os
import time
import uuid
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_msee.evaluation.confusion import Scores, confusion_matrix, scores


_DESCRIPTION = """
Mean intersection over union of label maps, streamed: each map is counted and dropped, so memory and the files
shared between processes are one (K, K) matrix, whatever the number of images.
"""
_INPUTS = """
Label maps are integer arrays (H, W); sizes may differ from image to image. `ignore_index` is left out of the
ground truth and of the prediction.
"""
_CITATION = ""
_POLL_SECONDS = 0.02


def _write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file, then rename it: a reader sees the whole file or none."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _matrix_bytes(matrix: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, matrix)
    return buffer.getvalue()


def _read_text(path: Path) -> str:
    """The file's text, or "" while it does not exist."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _remove(path: Path) -> bool:
    """Delete the file; whether it was still there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


class MeanIoU(evaluate.Metric):
    """Mean IoU over `num_classes` segmentation values (background included).

    `num_process`, `process_id`, `experiment_id`, `cache_dir` and `timeout` are those of `evaluate.Metric`.
    With several processes each one adds its own images and calls `compute`; process 0 returns the scores of
    the exact total, the others None. The processes need a common `cache_dir` and, for every metric in use at
    the same time, an `experiment_id` of its own.
    """

    def __init__(self, *, num_classes: int, ignore_index: int = 255, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: np.ndarray, reference: np.ndarray) -> None:
        """Count one label map against its ground truth, both (H, W) integers.

        Raises ValueError for maps of different size or a label out of range.
        """
        self.matrix += confusion_matrix(
            np.asarray(prediction), np.asarray(reference), self.num_classes, self.ignore_index
        )

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Count a batch: sequences of (H, W) label maps, or arrays (B, H, W), of one length.

        The batch is counted whole or, when it holds a bad map (ValueError), not at all.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"expected one reference per prediction, got {len(predictions)} predictions "
                f"and {len(references)} references"
            )
        total = np.zeros_like(self.matrix)
        for prediction, reference in zip(predictions, references, strict=True):
            total += confusion_matrix(
                np.asarray(prediction), np.asarray(reference), self.num_classes, self.ignore_index
            )
        self.matrix += total

    def compute(self, *, predictions: Any = None, references: Any = None) -> Scores | None:
        """The scores of everything added, by all processes, since the last `compute`; None on processes > 0.

        `predictions` and `references`, given together, are added first. Afterwards the count starts again at
        zero. Raises ValueError when no pixel was counted and TimeoutError when another process does not call
        `compute` within `timeout` seconds; the matrix is then kept.
        """
        if (predictions is None) != (references is None):
            raise ValueError("expected predictions and references together, or neither; got only one of them")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        stem = f"{self.experiment_id}-{self.num_process}"
        if self.process_id > 0:
            self._deliver(Path(self.data_dir), stem)
            self.matrix[:] = 0
            return None
        total = self._collect(Path(self.data_dir), stem) if self.num_process > 1 else self.matrix.copy()
        if not total.any():
            raise ValueError("no pixel was counted: call add or add_batch with labelled pixels before compute")
        self.matrix[:] = 0
        return scores(total)

    # Process 0 publishes a random token, process r answers with a file named after the token and r, and
    # returns once process 0 has consumed (deleted) it. Files left by a run that died carry another token and
    # are never counted; nor is the matrix of a process already at its next `compute`, which the locks of
    # `evaluate.Metric` would let through.

    def _collect(self, folder: Path, stem: str) -> np.ndarray:
        token = uuid.uuid4().hex
        request = folder / f"{stem}-request"
        answers = [folder / f"{stem}-{token}-{rank}.npy" for rank in range(1, self.num_process)]
        total = self.matrix.copy()
        _write_whole(request, token.encode())
        try:
            deadline = time.monotonic() + self.timeout
            for rank, answer in enumerate(answers, start=1):
                while not answer.exists():
                    self._wait(deadline, f"process {rank} delivered no confusion matrix")
                part = np.load(answer, allow_pickle=False)
                if part.shape != total.shape:
                    raise ValueError(f"process {rank} counts {len(part)} classes, process 0 {len(total)}")
                total += part
        finally:
            _remove(request)  # before the answers: a process at its next round must not see it
            for answer in answers:
                _remove(answer)
        return total

    def _deliver(self, folder: Path, stem: str) -> None:
        request, answer, answered = folder / f"{stem}-request", None, ""
        deadline = time.monotonic() + self.timeout
        try:
            while answer is None or answer.exists():
                token = _read_text(request)
                if token and token != answered:
                    if answer is not None and not _remove(answer):
                        return  # consumed just now; this token is already the next round's
                    answer, answered = folder / f"{stem}-{token}-{self.process_id}.npy", token
                    _write_whole(answer, _matrix_bytes(self.matrix))
                self._wait(deadline, "process 0 did not collect the confusion matrix")
        finally:
            if answer is not None:
                _remove(answer)

    def _wait(self, deadline: float, problem: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{problem} within {self.timeout} s (process {self.process_id} of {self.num_process}, "
                f"experiment_id {self.experiment_id!r}, folder {self.data_dir}): every process must call "
                "compute, with the same experiment_id and a cache_dir on a shared file system"
            )
        time.sleep(_POLL_SECONDS)
