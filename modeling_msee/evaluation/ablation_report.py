"""What an ablation table came to: our mean ± deviation over seeds beside the paper's figures, as Markdown and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


# What training logs of the M-SEE term, as `loss_<name>`, the last two with a scale: whether it acts, and on what.
DIAGNOSTICS = ("msee", "seed_share", "feature_norm", "region_share_", "feature_distance_")


@dataclass(frozen=True)
class RunResult:
    """One run.

    Args:
        seed: of the run.
        folder: where it is.
        failure: why there is no result; "" where there is one.
        miou: mIoU in percent by column, such as "CAM"; nan where undefined.
        diagnostics: first and last logged mean of each of `DIAGNOSTICS`, while the M-SEE term is on.
        protocol: how it was scored.
    """

    seed: int
    folder: str
    failure: str = ""
    miou: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, tuple[float, float]] = field(default_factory=dict)
    protocol: str = ""


@dataclass(frozen=True)
class RowResult:
    """One row of the table with its runs; `paper` in percent by column."""

    name: str
    overrides: dict[str, Any]
    paper: dict[str, float]
    runs: list[RunResult]


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample, n - 1; nan for a single value) and number of some values."""

    mean: float
    deviation: float
    count: int

    def __format__(self, spec: str) -> str:
        if not self.count:
            return "-"
        # `z` of format() for Python 3.10: no "-0.0".
        mean, deviation = (round(value, 10) + 0.0 for value in (self.mean, self.deviation))
        return f"{mean:{spec}}" if math.isnan(deviation) else f"{mean:{spec}} ± {deviation:{spec.lstrip('+')}}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of any number of values."""
    if not values:
        return Spread(math.nan, math.nan, 0)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), deviation, len(values))


def read_run(seed: int, folder: Path, failure: str) -> RunResult:
    """The result in a run's folder, from its `metrics.json` and `trainer_state.json`, or why there is none."""
    if not (folder / "metrics.json").is_file():
        return RunResult(seed, str(folder), failure or "not run")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shares = {name: scores["mean_iou"] for name, scores in metrics["results"].items()}
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return RunResult(
        seed,
        str(folder),
        miou={name: math.nan if share is None else 100 * share for name, share in shares.items()},
        diagnostics=logged_diagnostics(log),
        protocol=metrics["protocol"],
    )


def logged_diagnostics(log: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """First and last value of each diagnostic among the log entries that have them all."""
    on = [entry for entry in log if "loss_seed_share" in entry]
    if not on:
        return {}
    keys = [key for key in on[-1] if key.removeprefix("loss_").startswith(DIAGNOSTICS)]
    return {key.removeprefix("loss_"): (on[0][key], on[-1][key]) for key in keys}


def values_over_seeds(row: RowResult, column: str) -> dict[int, float]:
    """One column's mIoU in percent by seed, of the runs that have it."""
    return {run.seed: run.miou[column] for run in row.runs if column in run.miou}


def paired_difference(row: RowResult, first: RowResult, column: str) -> Spread:
    """Difference to the first row, seed by seed: what a seed changes in both rows alike does not count as spread."""
    ours, base = values_over_seeds(row, column), values_over_seeds(first, column)
    return spread([ours[seed] - base[seed] for seed in ours if seed in base])


def table_lines(rows: Sequence[RowResult], columns: Sequence[str]) -> list[str]:
    """A Markdown table: the paper's figure and its difference to row 0, ours, and ours to row 0, in percent."""
    printed = {column: any(column in row.paper for row in rows) for column in columns}
    header = ["row"]
    for column, paper in printed.items():
        header += [f"{column}, the paper's"] * paper + [f"{column}, ours", f"{column}, ours - row 0"]
    table = [[*header, "n"]]
    for row in rows:
        cells = [row.name]
        for column, paper in printed.items():
            cells += [_paper_cell(row, rows[0], column)] * paper
            cells.append(f"{spread(list(values_over_seeds(row, column).values())):.1f}")
            cells.append("" if row is rows[0] else f"{paired_difference(row, rows[0], column):+.1f}")
        table.append([*cells, f"{sum(not run.failure for run in row.runs)} of {len(row.runs)}"])
    return _markdown(table)


def _paper_cell(row: RowResult, first: RowResult, column: str) -> str:
    if column not in row.paper:
        return "-"
    figure = f"{row.paper[column]:.1f}"
    if row is first or column not in first.paper:
        return figure
    return f"{figure} ({row.paper[column] - first.paper[column]:+.1f})"


def diagnostics_lines(rows: Sequence[RowResult]) -> list[str]:
    """A Markdown table of first → last logged value of each diagnostic, means over the seeds; none logged, no line."""
    names = list(dict.fromkeys(name for row in rows for run in row.runs for name in run.diagnostics))
    table = [["row", *names]]
    for row in rows:
        cells = [row.name]
        for name in names:
            pairs = [run.diagnostics[name] for run in row.runs if name in run.diagnostics]
            first, last = (spread([pair[side] for pair in pairs]).mean for side in (0, 1))
            cells.append(f"{first:.3g} → {last:.3g}" if pairs else "-")
        table.append(cells)
    return _markdown(table) if names else []


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the header first, as a Markdown table with columns of one width."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in table]
    widths = [max(len(row[column]) for row in escaped) for column in range(len(escaped[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in escaped]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]]]


def report_markdown(title: str, about: Mapping[str, str], rows: Sequence[RowResult], columns: Sequence[str]) -> str:
    """The whole report: title, what was run on what, the table, what failed, the diagnostics."""
    lines = [f"# {title}", "", *(f"- {name}: {text}" for name, text in about.items() if text), ""]
    lines += [*table_lines(rows, columns), ""]
    lines.append("mIoU in percent, mean ± standard deviation over seeds (n of the runs asked for);")
    lines += ["differences to row 0 are taken seed by seed, then averaged.", ""]
    failed = [f"- {row.name}, seed {run.seed}: {run.failure}" for row in rows for run in row.runs if run.failure]
    if failed:
        lines += ["Without result:", "", *failed, ""]
    diagnostics = diagnostics_lines(rows)
    if diagnostics:
        lines += ["The M-SEE term, first → last logged mean:", "", *diagnostics, ""]
    return "\n".join(lines)


def report_content(title: str, about: Mapping[str, str], rows: Sequence[RowResult], columns: Sequence[str]) -> dict:
    """The same for JSON, with every run; undefined numbers are nan."""
    return {
        "title": title,
        "about": dict(about),
        "columns": list(columns),
        "rows": [
            {
                "name": row.name,
                "overrides": row.overrides,
                "paper": row.paper,
                "ours": {name: vars(spread(list(values_over_seeds(row, name).values()))) for name in _scored(row)},
                "difference_to_row_0": {name: vars(paired_difference(row, rows[0], name)) for name in _scored(row)},
                "runs": [vars(run) for run in row.runs],
            }
            for row in rows
        ],
    }


def _scored(row: RowResult) -> list[str]:
    """Everything that any run of the row was scored on."""
    return list(dict.fromkeys(name for run in row.runs for name in run.miou))
