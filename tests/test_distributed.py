"""Two processes: the same images, the same scores, and going on from what one process saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_msee.cli import main


pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def two_processes(tiny_recipe, tiny_data, trained, dataset_cache, tmp_path_factory) -> Path:
    """Steps 4 to 6 of the run `trained` in two processes on the CPU, which talk over gloo."""
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(dataset_cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [*map(str, launch), str(ROOT / "train_msee.py"), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Protocol:") == 1  # one table, from the first process
    return output


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
    assert one == two
    assert len({row["pixels"] for row in two["results"].values()}) == 1
    last = [entry for entry in log(two_processes) if "eval_pixels" in entry][-1]
    assert last["eval_pixels"] == two["results"]["Seg"]["pixels"]
    for key, name in (("cam", "CAM"), ("auxiliary_cam", "Auxiliary CAM"), ("seg", "Seg")):
        assert last[f"eval_{key}_miou"] == two["results"][name]["mean_iou"]
