"""Evaluation results as a plain-text table and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import whole_file
from .confusion import Scores


def _check_rows(rows: Mapping[str, Scores], class_names: Sequence[str]) -> None:
    if not rows:
        raise ValueError("expected at least one row of scores, got none")
    for name, row in rows.items():
        if len(row["per_class_iou"]) != len(class_names):
            raise ValueError(
                f"row {name!r} scores {len(row['per_class_iou'])} classes, "
                f"but {len(class_names)} class names were given; name every class, background first"
            )


def percent(value: float) -> str:
    """A share in [0, 1] in percent; "-" for nan."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def format_table(rows: Mapping[str, Scores], class_names: Sequence[str], protocol: str) -> str:
    """A plain-text table with one column per entry of `rows` (such as "CAM", "Seg", "Seg + CRF").

    The first line names the protocol; then the two mean IoUs and the pixel accuracy, then a line per class,
    in percent, "-" where a class neither occurs nor is predicted. `class_names` are the K names by
    segmentation value, background first. Raises ValueError when a row scores another number of classes.
    """
    _check_rows(rows, class_names)
    columns = list(rows.values())
    lines = [
        ("", list(rows)),
        ("mIoU", [percent(row["mean_iou"]) for row in columns]),
        ("mIoU, all classes", [percent(row["mean_iou_all"]) for row in columns]),
        ("pixel accuracy", [percent(row["pixel_accuracy"]) for row in columns]),
    ]
    lines += [
        (name, [percent(row["per_class_iou"][index]) for row in columns]) for index, name in enumerate(class_names)
    ]
    first = max(len(label) for label, _ in lines)
    widths = [max(len(cells[column]) for _, cells in lines) for column in range(len(columns))]
    texts = [
        f"{label:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in lines
    ]
    rule = "-" * max(len(text) for text in texts)
    return "\n".join([f"Protocol: {protocol}", texts[0], rule, *texts[1:4], rule, *texts[4:]])


def without_nan(value: Any) -> Any:
    """The same nest of dicts and lists with None for nan, which JSON does not have."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value


def write_metrics(
    path: str | Path, rows: Mapping[str, Scores], class_names: Sequence[str], header: Mapping[str, Any]
) -> None:
    """Write `{**header, "class_names", "results": {row: scores}}` as JSON; undefined scores become null.

    The file appears whole or not at all: it is written beside `path` and renamed. Missing folders are
    created. Raises ValueError as `format_table` does.
    """
    _check_rows(rows, class_names)
    content = {**header, "class_names": list(class_names), "results": dict(rows)}
    text = json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file that appears whole or not at all. Missing folders are created."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
