"""Evaluation results of a checkpoint folder, as the Hub's model-index wants them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult


EXPECTED = "the results that `msee evaluate --output` writes"


@dataclass(frozen=True)
class Metrics:
    """One `metrics.json`: scores by row ("CAM", "Seg", ...), `per_class_iou` in the order of `class_names`.

    `details` is everything else that the file says: command, fingerprint of the data, versions.
    """

    protocol: str
    class_names: list[str]
    results: dict[str, dict[str, Any]]
    details: dict[str, Any]


def read_metrics(path: str | Path) -> Metrics:
    """Read what `write_metrics` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected {EXPECTED}, but it is no JSON: {error}; write it anew.") from error
    missing = {"protocol", "class_names", "results"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path}: expected {EXPECTED}, found no {', '.join(sorted(missing))}; write it anew.")
    protocol, names, results = (content.pop(name) for name in ("protocol", "class_names", "results"))
    return Metrics(str(protocol), names, results, content)


def eval_results(metrics: Metrics, dataset: str, dataset_type: str, split: str) -> list[EvalResult]:
    """The mean IoU of every row where it is defined, labelled with its protocol.

    Args:
        metrics: the scores, in [0, 1].
        dataset: name of the data set for people.
        dataset_type: its Hub repository, or any name.
        split: the split that was scored.
    """
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_name=dataset,
            dataset_type=dataset_type,
            dataset_split=split,
            metric_type="mean_iou",
            metric_name=f"mIoU of {row}",
            metric_value=round(scores["mean_iou"], 4),
            metric_args={"protocol": metrics.protocol},
        )
        for row, scores in metrics.results.items()
        if scores["mean_iou"] is not None
    ]
