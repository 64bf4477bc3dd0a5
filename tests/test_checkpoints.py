"""A run that was killed, asked to stop, or left with a half-written checkpoint goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modeling_msee.training.checkpoints import MARKER, check_complete, last_complete, mark_complete


pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = ("--max_steps", 8, "--save_strategy", "steps", "--save_steps", 1, "--eval_split", "none")


@pytest.fixture(scope="module")
def random_recipe(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with all that could come out differently: dropout, a worker, accumulation."""
    fields = yaml.safe_load(tiny_recipe.read_text())
    fields["backbone_config"] |= {"hidden_dropout_prob": 0.1}
    fields |= {"dataloader_num_workers": 1, "gradient_accumulation_steps": 2}
    path = tmp_path_factory.mktemp("recipe") / "random.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(random_recipe: Path, tiny_data: Path, dataset_cache: Path):
    """`start(output)`: the run in a process of its own."""

    def start_process(output: Path) -> subprocess.Popen:
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": str(dataset_cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        words = [random_recipe, "--dataset", tiny_data, "--output_dir", output, *OVERRIDES]
        command = [sys.executable, str(ROOT / "train_msee.py"), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    return start_process


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(output)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_run_goes_on_bit_for_bit(start, uninterrupted, step_log, tmp_path, number) -> None:
    output = tmp_path / "run"
    process = start(output)
    wait_for(output / "checkpoint-2" / MARKER, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 0, text
        assert "Stopped after step" in text and "the same command goes on" in text
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    process = start(output)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "Going on from" in text
    assert step_log(output) == step_log(uninterrupted)
    assert (output / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def checkpoint(folder: Path, step: int, complete: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if complete:
        mark_complete(path)
    return path


def test_last_complete_checkpoint(tmp_path: Path, capsys) -> None:
    assert last_complete(tmp_path / "run") is None  # not even the folder
    whole = [checkpoint(tmp_path, step, complete=True) for step in (20, 100)]
    half = checkpoint(tmp_path, 120, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == str(whole[1])
    assert f"Passing over {half}" in capsys.readouterr().out


@pytest.mark.parametrize(("made", "message"), [(True, "was not written to its end"), (False, "does not exist")])
def test_asking_for_a_checkpoint_that_is_not_there(tmp_path: Path, made: bool, message: str) -> None:
    path = checkpoint(tmp_path, 3, complete=False) if made else tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match=message):
        check_complete(path)
