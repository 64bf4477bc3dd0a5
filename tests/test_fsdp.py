"""Sharded weights (FSDP2) in two processes on the CPU: the losses, scores and files of one process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from modeling_msee import MSEEForWeaklySupervisedSegmentation
from modeling_msee.configuration_msee import SUPPORTED_BACKBONES


pytest_plugins = ["training_fixtures", "process_fixtures"]

WORDS = (
    *("--segmentation_start_step", 0, "--msee_start_step", 0, "--max_grad_norm", 1.0, "--max_steps", 4),
    *("--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2),
)


@pytest.fixture(scope="module")
def runs(start, tiny_recipe, tiny_data, tmp_path_factory) -> tuple[Path, Path, Path]:
    """One process; two with sharded weights; two that go on from the middle of those."""
    folder = tmp_path_factory.mktemp("fsdp")
    whole, sharded, resumed = (folder / name for name in ("whole", "sharded", "resumed"))
    words = (tiny_recipe, "--dataset", tiny_data, *WORDS)
    running = [start(whole, *words), start(sharded, *words, processes=2, fsdp=True)]
    for run in running:
        run.wait()
    shutil.copytree(sharded / "checkpoint-2", resumed / "checkpoint-2")
    assert "Going on from" in start(resumed, *words, processes=2, fsdp=True).wait()
    return whole, sharded, resumed


def test_losses_and_scores_are_those_of_one_process(runs, step_log) -> None:
    whole, sharded, _ = runs
    entries = zip(step_log(whole), step_log(sharded), strict=True)
    worst = max(abs(one[key] - other[key]) / max(abs(one[key]), 1e-6) for one, other in entries for key in one)
    print(f"largest relative difference of what is logged over four steps {worst:.1e}")
    assert worst < 1e-4
    tables = [json.loads((output / "metrics.json").read_text())["results"] for output in (whole, sharded)]
    assert tables[0] == tables[1]


def test_sharded_run_goes_on_bit_for_bit(runs, log) -> None:
    _, sharded, resumed = runs
    for key in ("loss", "eval_seg_miou"):
        one, other = ([entry for entry in log(output) if key in entry] for output in (sharded, resumed))
        clock = {name for entry in one for name in entry if name.endswith(("_runtime", "_per_second"))}
        assert [{k: v for k, v in entry.items() if k not in clock} for entry in one] == [
            {k: v for k, v in entry.items() if k not in clock} for entry in other
        ]


def test_saved_model_loads_as_any_other(runs) -> None:
    """Sharding gives the model a class of its own, which must not be what is written."""
    whole, sharded, _ = runs
    files = [{path.name for path in output.glob("*.py")} for output in (whole, sharded)]
    assert files[0] == files[1]
    for folder in (sharded, sharded / "checkpoint-4"):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == json.loads((whole / "config.json").read_text())["auto_map"]
        model = AutoModelForSemanticSegmentation.from_pretrained(folder)
        assert type(model) is MSEEForWeaklySupervisedSegmentation
    states = [load_file(output / "model.safetensors") for output in runs]
    assert states[0].keys() == states[1].keys()
    furthest = max((states[0][name] - value).abs().max().item() for name, value in states[1].items())
    print(f"largest difference of a weight {furthest:.1e}, at a learning rate of 1e-3")
    assert furthest < 1e-4
    assert all(torch.equal(value, states[2][name]) for name, value in states[1].items())


@pytest.mark.parametrize("backbone", SUPPORTED_BACKBONES)
def test_layers_to_shard_come_from_the_encoder(tiny_model, backbone) -> None:
    """accelerate refuses a class that the model does not have."""
    model = tiny_model(backbone)
    found = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= found
    assert type(model.get_input_embeddings()).__name__ in model._no_split_modules
