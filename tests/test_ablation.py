"""Ablation tables: what the files may say, which runs are started and gone on with, and what the table shows."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from modeling_msee import MSEEConfig
from modeling_msee.cli import main
from modeling_msee.evaluation.ablation_report import (
    RowResult,
    RunResult,
    diagnostics_lines,
    logged_diagnostics,
    paired_difference,
    spread,
    table_lines,
)
from modeling_msee.training import ablation
from modeling_msee.training.ablation import plan_runs
from modeling_msee.training.ablation_file import read_ablation
from modeling_msee.training.arguments import method_fields


pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]
TABLES = sorted((ROOT / "configuration" / "ablations").glob("*.yaml"))
TABLE = {
    "title": "Two rows",
    "recipe": "tiny.yaml",
    "seeds": [0, 1],
    "columns": ["CAM", "Seg"],
    "rows": [
        {"name": "0 off", "overrides": {"scale_factors": []}, "paper": {"CAM": 50.0, "Seg": 40}},
        {"name": "1 on", "overrides": {"beta": 1.0}, "paper": {"CAM": 52.0}},
    ],
}
# Stands for train_msee: CAM 50 + 10 * seed, and 4 + 2 * seed more where beta is 1.
STAND_IN = """
import json, os, pathlib, signal, sys, time, yaml
assert sys.argv[1] == "train_msee"
recipe = yaml.safe_load(open(sys.argv[2]))
folder = pathlib.Path(recipe["output_dir"])
seed, on = recipe["seed"], recipe.get("beta") == 1.0
with open(folder / "calls", "a") as calls:
    calls.write("called ")
print("training", folder.name)
def stopped(*_):
    (folder / "checkpoint-1").mkdir()
    sys.exit(0)
if recipe.get("learning_rate") == 7 and on and not (folder / "checkpoint-1").exists():
    signal.signal(signal.SIGTERM, stopped)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(20)
if recipe.get("learning_rate") == 8 and on and seed == 0:
    sys.exit("cannot train this")
cam = 0.5 + 0.1 * seed + on * (0.04 + 0.02 * seed)
metrics = {"protocol": "stand-in", "results": {"CAM": {"mean_iou": cam}, "Seg": {"mean_iou": None}}}
(folder / "metrics.json").write_text(json.dumps(metrics))
(folder / "trainer_state.json").write_text('{"log_history": []}')
"""

Ablate = Callable[..., int]


def write_table(folder: Path, **changed: object) -> Path:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (TABLE | changed).items() if value is not None}))
    return path


@pytest.fixture
def ablate(tmp_path: Path, tiny_recipe: Path) -> Ablate:
    """`ablate(*words)`: the command with a stand-in for training, into `tmp_path / "out"`."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    table = write_table(tmp_path, recipe=str(tiny_recipe))
    launcher = shlex.join([sys.executable, str(stand_in)])

    def run(*words: object) -> int:
        options = ["--output", tmp_path / "out", "--launcher", launcher, "--dataset", "nowhere", *words]
        return main(["ablate", str(table), *map(str, options)])

    return run


def calls(output: Path) -> dict[str, int]:
    """How often each run was started."""
    return {str(path.parent.relative_to(output)): path.read_text().count("called") for path in output.rglob("calls")}


# --- Files ----------------------------------------------------------------------------------------


RESOLUTION = {"crop_size", "rescale_min", "rescale_max", "eval_size"}  # of training, not of the model


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_table(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    table = read_ablation(str(path))
    assert path.read_text().startswith("# ") and table.seeds
    for run in plan_runs(table, table.recipe, table.seeds, {}, tmp_path):
        method = {name: value for name, value in run.recipe.items() if name in method_fields()}
        config = MSEEConfig(**method, id2label={0: "background", 1: "disc"})
        for name, value in run.row.overrides.items():
            if name in RESOLUTION:
                assert run.recipe[name] == value, name
                continue
            expected = tuple(value) if isinstance(value, list) else value
            assert name in method and getattr(config, name) == expected, name


def test_there_are_the_paper_s_tables() -> None:
    paper = {path.stem: [row.paper for row in read_ablation(str(path)).rows] for path in TABLES}
    assert {"table3", "table4", "table5", "table6", "table7"} <= paper.keys()
    assert [[row["CAM"], row["Seg"]] for row in paper["table3"]] == [
        [72.3, 69.2],
        [74.1, 71.6],
        [73.5, 71.1],
        [75.1, 72.8],
    ]
    assert [row["Seg"] for row in paper["table4"]] == [69.2, 70.7, 71.6, 70.5, 71.1, 70.2, 72.8]
    assert [row["Seg"] for row in paper["table5"]] == [69.2, 71.1, 70.5, 70.9, 71.6, 71.6]
    assert [(row["CAM"], row["Seg"]) for row in paper["table6"]] == [(73.2, 71.9), (75.1, 72.8), (72.9, 70.4)]
    assert [row["Seg"] for row in paper["table7"]] == [72.8, 73.0, 72.6]


def row(**changed: object) -> dict[str, object]:
    return {"rows": [TABLE["rows"][0] | changed]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"titel": "x"}, "expected keys of title, .*, got 'titel'"),
        ({"seeds": None}, "the key 'seeds' is missing"),
        ({"seeds": 3}, "seeds: expected a list, got 3"),
        ({"seeds": []}, "seeds: expected whole numbers"),
        ({"seeds": [1, 1]}, "seeds: expected whole numbers from 0, none twice"),
        ({"seeds": [True]}, "seeds: expected whole numbers"),
        ({"columns": ["mIoU"]}, r"columns: expected some of CAM, Auxiliary CAM, Seg, got \['mIoU'\]"),
        ({"rows": []}, "at least one row"),
        ({"rows": ["x"]}, "row 0: expected a mapping"),
        ({"rows": [{"overrides": {}}]}, "row 0: the key 'name' is missing"),
        (row(override={}), "row 0: expected keys of name, overrides, paper, got 'override'"),
        (row(overrides={"bet": 1}), r"row 0 \(0 off\): there is no recipe field 'bet'; did you mean 'beta'"),
        (row(overrides={"seed": 1}), "no 'seed', which the command sets"),
        (row(overrides=[]), "overrides: expected a mapping"),
        (row(paper={"mIoU": 1}), "paper: expected columns of CAM, Seg, got 'mIoU'"),
        (row(paper={"CAM": "72,3"}), "paper: CAM: expected a number in percent, got '72,3'"),
        (row(name="..."), "name: expected at least one letter or digit"),
        ({"rows": [{"name": "a b"}, {"name": "A-B"}]}, "names that differ in letters or digits"),
        ({"overrides": {"max_step": 1}}, "there is no recipe field 'max_step'; did you mean 'max_steps'"),
    ],
)
def test_file_that_says_something_else(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)table\.yaml.*{message}"):
        read_ablation(str(write_table(tmp_path, **changed)))


# --- Command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 3], "--seed: the command sets it for every run; expected --seeds"),
        (["--output_dir", "x"], "--output_dir: the command sets it for every run; expected --output"),
        (["--beta", 3], r"--beta: .*table.yaml varies it \(row '1 on'\)"),
        (["--learning_rat", 3], "there is no recipe field 'learning_rat'; did you mean 'learning_rate'"),
        (["--eval_split", "none"], "expected a split with masks"),
        (["--seeds", 1, 1], "--seeds: expected whole numbers from 0, none twice"),
        (["--recipe", "nope.yaml"], "expected the path of a recipe"),
    ],
)
def test_words_that_cannot_be(ablate: Ablate, tmp_path: Path, capsys, words: list[object], message: str) -> None:
    assert ablate(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not (tmp_path / "out").exists()


def test_other_commands_take_no_fields(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "x.pth", "--output", "y", "--max_steps", "3"])
    assert "unrecognized arguments: --max_steps 3" in capsys.readouterr().err


# --- Runs -----------------------------------------------------------------------------------------


def test_table_of_all_runs(ablate: Ablate, tmp_path: Path, capsys) -> None:
    """CAM 50, 60 and 54, 66: mean 55 ± 7.1 and 60 ± 8.5; differences 4 and 6: 5 ± 1.4."""
    assert ablate("--max_steps", 9) == 0
    assert calls(tmp_path / "out") == dict.fromkeys(("0-off/seed-0", "0-off/seed-1", "1-on/seed-0", "1-on/seed-1"), 1)
    printed = capsys.readouterr().out
    assert "[4/4] 1 on, seed 1: into" in printed and "training seed-1" in printed
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[0][:4] == ["row", "CAM, the paper's", "CAM, ours", "CAM, ours - row 0"]
    assert cells[2][:4] == ["0 off", "50.0", "55.0 ± 7.1", ""]
    assert cells[3][:4] == ["1 on", "52.0 (+2.0)", "60.0 ± 8.5", "+5.0 ± 1.4"]
    assert cells[3][4] == "-" and cells[3][-1] == "2 of 2"
    assert "nowhere, scored on split validation" in text and "protocol: stand-in" in text
    assert "--dataset nowhere --max_steps 9`" in text and "msee ablate" in text
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    second = content["rows"][1]
    assert second["ours"]["CAM"] == {"mean": pytest.approx(60), "deviation": pytest.approx(math.sqrt(72)), "count": 2}
    assert second["difference_to_row_0"]["CAM"]["deviation"] == pytest.approx(math.sqrt(2))
    assert second["ours"]["Seg"]["mean"] is None  # undefined there
    assert [run["seed"] for run in second["runs"]] == [0, 1] and second["overrides"] == {"beta": 1.0}


def test_stopped_and_gone_on_with(ablate: Ablate, tmp_path: Path, capsys) -> None:
    """SIGTERM reaches the run, which saves; the same command trains what is not finished."""
    assert ablate("--learning_rate", 7) == 130
    assert "Stopped; the same command goes on." in capsys.readouterr().out
    assert calls(tmp_path / "out") == {"0-off/seed-0": 1, "1-on/seed-0": 1}
    assert (tmp_path / "out" / "1-on" / "seed-0" / "checkpoint-1").is_dir()
    for seed in (0, 1):  # seed 1 is stopped once, too
        assert ablate("--learning_rate", 7) == (130, 0)[seed]
    assert calls(tmp_path / "out") == {"0-off/seed-0": 1, "1-on/seed-0": 2, "0-off/seed-1": 1, "1-on/seed-1": 2}


def test_row_that_fails(ablate: Ablate, tmp_path: Path, capsys) -> None:
    assert ablate("--learning_rate", 8) == 1
    assert len(calls(tmp_path / "out")) == 4
    log = tmp_path / "out" / "1-on" / "seed-0" / "log.txt"
    assert f"- 1 on, seed 0: exit code 1: cannot train this ({log})" in capsys.readouterr().out
    second = json.loads((tmp_path / "out" / "table.json").read_text())["rows"][1]
    assert second["ours"]["CAM"] == {"mean": pytest.approx(66), "deviation": None, "count": 1}
    assert second["difference_to_row_0"]["CAM"]["mean"] == pytest.approx(6)  # of seed 1 alone
    assert "1 of 2" in (tmp_path / "out" / "table.md").read_text()


def test_folder_of_another_recipe(ablate: Ablate, tmp_path: Path, capsys) -> None:
    assert ablate("--max_steps", 9, "--seeds", 0) == 0
    before = calls(tmp_path / "out")
    capsys.readouterr()
    assert ablate("--max_steps", 10, "--crop_size", 64, "--run_name", "x") == 1
    message = "(crop_size: 48 there, 64 now; max_steps: 9 there, 10 now; run_name: not set there, 'x' now)"
    error = capsys.readouterr().err
    assert message in error and str(Path("out") / "0-off" / "seed-0") in error
    assert calls(tmp_path / "out") == before
    path = tmp_path / "out" / "0-off" / "seed-0" / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()), sort_keys=True))  # no other recipe
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert ablate("--max_steps", 9, "--seeds", 0, "--output", tmp_path / "moved") == 0
    assert calls(tmp_path / "moved") == before


def test_tiny_training_interrupted_and_resumed(tiny_recipe, tiny_data, tmp_path, monkeypatch, script, capsys) -> None:
    """Real training of two rows with two seeds, in this process; Ctrl-C after the first run."""
    trained: list[str] = []

    def train(run, launcher) -> int:
        if len(trained) == 1:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(str(run))
        run.folder.mkdir(parents=True)
        (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe))
        script.main([str(run.folder / "recipe.yaml")])
        return 0

    monkeypatch.setattr(ablation, "_train", train)
    words = ["ablate", str(write_table(tmp_path, recipe=str(tiny_recipe))), "--output", str(tmp_path / "out")]
    words += ["--dataset", str(tiny_data), "--max_steps", "3"]
    assert main(words) == 130
    assert main(words) == 0
    assert trained == ["0 off, seed 0", "interrupted", "1 on, seed 0", "0 off, seed 1", "1 on, seed 1"]
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    for index, name in enumerate(("0-off", "1-on")):
        files = [tmp_path / "out" / name / f"seed-{seed}" / "metrics.json" for seed in (0, 1)]
        scores = [100 * json.loads(path.read_text())["results"]["CAM"]["mean_iou"] for path in files]
        assert rows[index]["ours"]["CAM"]["mean"] == pytest.approx(sum(scores) / 2)
        assert rows[index]["ours"]["CAM"]["deviation"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
    assert not rows[0]["runs"][0]["diagnostics"]
    assert rows[1]["runs"][0]["diagnostics"].keys() == {
        "msee",
        "seed_share",
        "feature_norm",
        *(f"{name}_{scale}" for name in ("region_share", "feature_distance") for scale in (1.5, 0.5)),
    }
    assert "The M-SEE term, first → last logged mean:" in capsys.readouterr().out


def test_training_in_a_process_of_its_own(
    tiny_recipe, tiny_data, tmp_path, monkeypatch, dataset_cache, capsys
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(dataset_cache))
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny_data, "data")
    write_table(tmp_path, recipe=str(tiny_recipe), rows=TABLE["rows"][:1], seeds=[0])
    words = ["ablate", "table.yaml", "--output", "out", "--dataset", "data", "--max_steps", "1"]
    assert main(words) == 0
    folder = tmp_path / "out" / "0-off" / "seed-0"
    assert "Protocol: msee" in (folder / "log.txt").read_text() and (folder / "model.safetensors").exists()
    capsys.readouterr()
    assert main(words) == 0  # training wrote ./data into its recipe
    assert "0 off, seed 0: finished before" in capsys.readouterr().out


# --- Figures --------------------------------------------------------------------------------------


def result(seed: int, **miou: float) -> RunResult:
    return RunResult(seed, "", miou=miou)


def test_spread_by_hand() -> None:
    three = spread([1.0, 2.0, 6.0])
    assert (three.mean, three.deviation, three.count) == (3.0, pytest.approx(math.sqrt(7)), 3)  # (4 + 1 + 9) / 2
    assert f"{three:+.1f}" == "+3.0 ± 2.6"
    assert f"{spread([5.0]):.1f}" == "5.0" and f"{spread([]):.1f}" == "-"
    assert f"{spread([math.nan, 1.0]):.1f}" == "nan"


def test_difference_is_taken_seed_by_seed() -> None:
    """What both rows have in common does not count: 50, 60, 70 and 51, 62, 73 differ by 2 ± 1."""
    first = RowResult("0", {}, {}, [result(seed, CAM=50.0 + 10 * seed) for seed in range(3)])
    second = RowResult("1", {}, {}, [result(seed, CAM=51.0 + 11 * seed) for seed in (2, 0, 1)])
    difference = paired_difference(second, first, "CAM")
    assert (difference.mean, difference.deviation, difference.count) == (2.0, 1.0, 3)
    alone = RowResult("2", {}, {}, [result(2, CAM=69.0), result(9, CAM=99.0), RunResult(1, "", failure="lost")])
    assert f"{paired_difference(alone, first, 'CAM'):+.1f}" == "-1.0"
    assert table_lines([first, alone], ["CAM"])[-1].split("|")[-2].strip() == "2 of 3"


def test_logged_diagnostics_are_the_first_and_the_last() -> None:
    log = [
        {"loss": 1.0, "loss_msee": 0.0, "step": 1},
        {"loss": 1.0, "loss_msee": 3.0, "loss_seed_share": 0.5, "loss_region_share_0.5": 0.1, "step": 2},
        {"loss": 1.0, "loss_msee": 2.0, "loss_seed_share": 0.7, "loss_region_share_0.5": 0.2, "step": 3},
        {"train_loss": 1.0, "step": 3},
    ]
    found = logged_diagnostics(log)
    assert found == {"msee": (3.0, 2.0), "seed_share": (0.5, 0.7), "region_share_0.5": (0.1, 0.2)}
    rows = [RowResult("a|b", {}, {}, [RunResult(0, "", diagnostics=found), RunResult(1, "", failure="x")])]
    lines = diagnostics_lines(rows)
    assert lines[2].startswith(r"| a\|b | 3 → 2") and "0.5 → 0.7" in lines[2]
    assert logged_diagnostics(log[:1]) == {} and diagnostics_lines([RowResult("a", {}, {}, [])]) == []
