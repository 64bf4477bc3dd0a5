"""A run that was killed, asked to stop, or left with a half-written checkpoint goes on as if nothing had happened."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from process_fixtures import Run, Start
from safetensors.torch import load_file

from modeling_msee.training.checkpoints import MARKER, check_complete, last_complete, mark_complete


pytest_plugins = ["training_fixtures", "process_fixtures"]

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
def run(start: Start, random_recipe: Path, tiny_data: Path) -> Callable[[Path, int], Run]:
    """`run(output, processes)`: start or go on with that run."""
    return lambda output, count: start(output, random_recipe, "--dataset", tiny_data, *OVERRIDES, processes=count)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def uninterrupted(run, request, tmp_path_factory) -> tuple[Path, int]:
    """Output of a whole run, and the number of its processes."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(output, request.param).wait()
    return output, request.param


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_run_goes_on_bit_for_bit(run, uninterrupted, step_log, tmp_path, number) -> None:
    """Losses, gradient norms and weights, the averaged head's among them."""
    whole, count = uninterrupted
    output = tmp_path / "run"
    stopped = run(output, count)
    stopped.wait_for(output / "checkpoint-2" / MARKER)
    stopped.send(number)
    if number == signal.SIGTERM:
        text = stopped.wait()
        assert text.count("Stopped after step") == 1 and "the same command goes on" in text
    else:
        stopped.wait(-signal.SIGKILL)
    assert not (output / "model.safetensors").exists()
    assert "Going on from" in run(output, count).wait()
    assert step_log(output) == step_log(whole)
    states = [load_file(folder / "model.safetensors") for folder in (output, whole)]
    assert any(name.startswith("averaged_projection.") for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


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
