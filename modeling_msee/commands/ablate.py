"""`msee ablate`: train every row of a table with every seed, and print it beside the paper's.

Any field of a recipe can follow, for every run, such as --dataset outputs/stamps --max_steps 400; one that the table
varies cannot. The same command goes on where it was stopped: what is finished is not trained again.
"""

import argparse
import json
import shlex
from pathlib import Path

from ..evaluation.ablation_report import RowResult, read_run, report_content, report_markdown
from ..evaluation.tables import without_nan, write_whole
from ..training.ablation import LAUNCHER, AblationRun, plan_runs, run_all
from ..training.ablation_file import Ablation, check_seeds, read_ablation
from ..training.arguments import parse_overrides


HELP = "train every row of a table with every seed, and print it beside the paper's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", help="such as configuration/ablations/table3.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs, table.md and table.json")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of every row (default: the table's)")
    parser.add_argument("--recipe", help="recipe that all rows share (default: the table's)")
    parser.add_argument(
        "--launcher",
        default=LAUNCHER,
        help='starts a Python module, such as "accelerate launch --num_processes 4 -m" (default: this Python, -m)',
    )


def run(arguments: argparse.Namespace) -> int:
    ablation = read_ablation(arguments.table)
    recipe = arguments.recipe or ablation.recipe
    seeds = arguments.seeds or ablation.seeds
    check_seeds(seeds, "--seeds")
    runs = plan_runs(ablation, recipe, seeds, parse_overrides(arguments.fields), arguments.output)
    try:
        failures = run_all(runs, arguments.launcher)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.")
        return 130
    print(write_report(arguments, ablation, runs, failures))
    print(f"Written to {arguments.output / 'table.md'} and table.json")
    return 1 if failures else 0


def write_report(
    arguments: argparse.Namespace, ablation: Ablation, runs: list[AblationRun], failures: dict[Path, str]
) -> str:
    """Write the table as Markdown and JSON, and return the Markdown."""
    rows = [
        RowResult(
            row.name,
            row.overrides,
            row.paper,
            [read_run(run.seed, run.folder, failures.get(run.folder, "")) for run in runs if run.row is row],
        )
        for row in ablation.rows
    ]
    given = runs[0].recipe
    protocols = {result.protocol: None for row in rows for result in row.runs if result.protocol}
    about = {
        "command": f"`{command(arguments)}`",
        "data": f"{given['dataset']}, scored on split {given.get('eval_split', 'validation')}",
        "protocol": "; ".join(protocols),
        "recipe": f"{arguments.recipe or ablation.recipe}, {given.get('max_steps', 'default')} steps",
        "the paper's": ablation.paper_protocol,
    }
    markdown = report_markdown(ablation.title, about, rows, ablation.columns)
    content = report_content(ablation.title, about, rows, ablation.columns)
    write_whole(arguments.output / "table.md", markdown)
    text = json.dumps(without_nan(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(arguments.output / "table.json", text + "\n")
    return markdown


def command(arguments: argparse.Namespace) -> str:
    """What to type for the same again."""
    words = ["msee", "ablate", arguments.table, "--output", str(arguments.output)]
    words += ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    words += ["--recipe", arguments.recipe] if arguments.recipe else []
    words += ["--launcher", arguments.launcher] if arguments.launcher != LAUNCHER else []
    return shlex.join([*words, *arguments.fields])
