"""Runs of an ablation table: which recipe each has, what is finished, training those that are not."""

import codecs
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.tables import write_whole
from .ablation_file import OWN_FIELDS, Ablation, AblationRow
from .arguments import RecipeLoader, check_fields, read_recipe, written_recipe
from .sigterm import handling_sigterm


# What a module of Python's is started with; "accelerate launch -m" and "torchrun -m" take its place.
LAUNCHER = shlex.join([sys.executable, "-m"])


@dataclass(frozen=True)
class AblationRun:
    """One row with one seed: the folder it has to itself, and its whole recipe."""

    row: AblationRow
    seed: int
    folder: Path
    recipe: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end and scored."""
        return (self.folder / "metrics.json").is_file()

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"


def plan_runs(
    ablation: Ablation, recipe_path: str, seeds: list[int], given: dict[str, Any], output: Path
) -> list[AblationRun]:
    """All runs of a table, seed by seed, so that the first comparison of all rows comes early.

    Args:
        ablation: the table.
        recipe_path: the recipe that all rows share.
        seeds: seeds of every row.
        given: recipe fields from the command line, for every run; before the table's own.
        output: folder of all runs.

    Raises:
        ValueError: a recipe field that does not exist, is missing, or that a row or the command itself sets; no
            split to score; a run in `output` that has another recipe.
    """
    base = read_recipe(recipe_path) | ablation.overrides | given
    for name in given:
        if name in OWN_FIELDS:
            raise ValueError(f"--{name}: the command sets it for every run; expected {OWN_FIELDS[name]}.")
        for row in ablation.rows:
            if name in row.overrides:
                raise ValueError(f"--{name}: {ablation.path} varies it (row {row.name!r}). Change the table instead.")
    runs = []
    for seed in seeds:
        for row in ablation.rows:
            folder = output / row.folder / f"seed-{seed}"
            recipe = _as_read(base | row.overrides | {"seed": seed, "output_dir": str(folder)})
            check_fields(recipe, recipe_path)
            if recipe.get("eval_split") == "none":
                raise ValueError(f"{recipe_path}: eval_split: expected a split with masks to score, got none.")
            runs.append(AblationRun(row, seed, folder, recipe))
    for run in runs:
        _check_recipe(run)
    return runs


def _as_read(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as it comes back from the file that training leaves."""
    return yaml.load(written_recipe(recipe), Loader=RecipeLoader)


def _check_recipe(run: AblationRun) -> None:
    """Raise ValueError if there is a run in the folder with another recipe; where it is stored does not count."""
    path = run.folder / "recipe.yaml"
    if not path.exists():
        return
    found = read_recipe(str(path))
    names = [name for name in sorted(found.keys() | run.recipe.keys()) if name != "output_dir"]
    differences = [
        f"{name}: {_shown(found, name)} there, {_shown(run.recipe, name)} now"
        for name in names
        if (name in found) != (name in run.recipe) or found.get(name) != run.recipe.get(name)
    ]
    if differences:
        raise ValueError(
            f"{run.folder} was run with another recipe ({'; '.join(differences)}). "
            "Give another --output, or delete that folder."
        )


def _shown(recipe: dict[str, Any], name: str) -> str:
    return repr(recipe[name]) if name in recipe else "not set"


def run_all(runs: list[AblationRun], launcher: str = LAUNCHER) -> dict[Path, str]:
    """Train the runs that are not finished; one that fails does not keep the next from running.

    The output of each goes to the terminal and to `log.txt` in its folder. When this process is asked to stop, so is
    the run under way, which saves a checkpoint.

    Args:
        runs: of `plan_runs`.
        launcher: command that starts a module of Python's, such as "accelerate launch -m".

    Returns:
        what went wrong, by the folder of the run.

    Raises:
        KeyboardInterrupt: asked to stop, by Ctrl-C or SIGTERM.
    """
    failures = {}
    with handling_sigterm(signal.default_int_handler):
        for number, run in enumerate(runs, start=1):
            done = "finished before" if run.finished else f"into {run.folder}"
            print(f"[{number}/{len(runs)}] {run}: {done}", flush=True)
            if not run.finished:
                code = _train(run, shlex.split(launcher))
                if not run.finished:
                    failures[run.folder] = _failure(run, code)
                    print(f"{run}: {failures[run.folder]}", flush=True)
    return failures


def _train(run: AblationRun, launcher: list[str]) -> int:
    """Train one run in a process of its own, or go on with it; its exit code."""
    recipe = run.folder / "recipe.yaml"
    write_whole(recipe, yaml.safe_dump(run.recipe, sort_keys=False))
    command = [*launcher, "train_msee", str(recipe)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # In a session of its own, so that Ctrl-C reaches it through us alone and it saves.
    with (
        open(run.folder / "log.txt", "ab", buffering=0) as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            _copy_output(process, log)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            _copy_output(process, log)
            raise


def _copy_output(process: subprocess.Popen, log: FileIO) -> None:
    """Copy what a process prints, as it comes, to the log and the terminal."""
    assert process.stdout is not None  # a pipe
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while text := process.stdout.read(4096):
        log.write(text)
        sys.stdout.write(decoder.decode(text))
        sys.stdout.flush()


def _failure(run: AblationRun, code: int) -> str:
    """What to tell about a run without result."""
    log = run.folder / "log.txt"
    if code == 0:
        return f"was stopped before its end; the same command goes on ({log})"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip() if lines else 'no output'} ({log})"
