"""Two processes: the same images, the same scores, and going on from what one process saved."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from modeling_msee.cli import main


pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two_processes(tiny_recipe, tiny_data, trained, dataset_cache, tmp_path_factory) -> Path:
    """Steps 4 to 6 of the run `trained` in two processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    words = [str(tiny_recipe), "--dataset", tiny_data, "--output_dir", output, "--max_steps", 6]
    words += [
        "--resume_from_checkpoint",
        trained / "checkpoint-3",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        6,
    ]
    printed = launch_two([ROOT / "train_msee.py", *words], dataset_cache)
    assert printed.count("Protocol:") == 1  # one table, from the first process
    return output


@pytest.fixture(scope="module")
def scored_by_two(trained, tiny_data, dataset_cache, tmp_path_factory) -> Path:
    """Result file of `msee evaluate` in two processes."""
    output = tmp_path_factory.mktemp("scores") / "two.json"
    words = ["-m", "modeling_msee.cli", "evaluate", trained, "--data", tiny_data, *PROTOCOL, "--output", output]
    printed = launch_two(words, dataset_cache)
    assert printed.count("Protocol:") == 1
    return output


PROTOCOL = ("--protocol", "toco-voc-crf", "--crf-workers", "1")


def launch_two(words: Sequence[object], dataset_cache: Path) -> str:
    """Run a script, or `-m` a module, in two processes on the CPU, which talk over gloo; what they print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(dataset_cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [*launch, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_steps_see_the_same_images(two_processes, trained, step_log) -> None:
    """From the middle of an epoch. The class losses are means over images, so they tell the images."""
    one, two = (step_log(output)[3] for output in (trained, two_processes))
    assert one["step"] == two["step"] == 4
    for name in ("loss_classification", "loss_auxiliary_classification"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert [entry["step"] for entry in step_log(two_processes)] == [1, 2, 3, 4, 5, 6]


def test_scores_are_those_of_one_process(two_processes, tiny_data, log, tmp_path) -> None:
    """Five images of different sizes, so that one process has more of them."""
    assert main(["evaluate", str(two_processes), "--data", str(tiny_data), "--output", str(tmp_path / "one")]) == 0
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "one", two_processes / "metrics.json"))
    assert one | {"command": ""} == two | {"command": ""}
    assert len({row["pixels"] for row in two["results"].values()}) == 1
    last = [entry for entry in log(two_processes) if "eval_pixels" in entry][-1]
    assert last["eval_pixels"] == two["results"]["Seg"]["pixels"]
    for key, name in (("cam", "CAM"), ("auxiliary_cam", "Auxiliary CAM"), ("seg", "Seg")):
        assert last[f"eval_{key}_miou"] == two["results"][name]["mean_iou"]


def test_evaluation_by_two_processes_is_exact(scored_by_two, trained, tiny_data, tmp_path) -> None:
    """Also with dense CRF, each process having a worker of its own; the fingerprint is of the whole split."""
    pytest.importorskip("pydensecrf")
    words = ["evaluate", trained, "--data", tiny_data, *PROTOCOL, "--output", tmp_path / "one.json"]
    assert main([str(word) for word in words]) == 0
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "one.json", scored_by_two))
    assert one["data"]["images"] == 5 and list(one["results"])[-1] == "Seg + CRF"
    assert one | {"command": ""} == two | {"command": ""}
