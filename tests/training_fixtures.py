"""A tiny data set, a tiny recipe and training runs; test modules ask for them with `pytest_plugins`."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import datasets
import pytest
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image

from datasets_scripts import shapes
from modeling_msee.data.writer import dataset_features


ROOT = Path(__file__).resolve().parents[1]
# train_msee.py is a script beside the package, not a part of it.
sys.path.insert(0, str(ROOT))

import train_msee  # noqa: E402


# Every term of the loss is on in the third step, and a step takes a quarter of a second.
RECIPE = {
    "backbone_config": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 48,
        "patch_size": 8,
    },
    "auxiliary_layer": -2,
    "decoder_channels": 16,
    "projection_hidden_size": 32,
    "projection_bottleneck_size": 16,
    "projection_size": 32,
    "local_crop_size": 16,
    "local_crop_count": 2,
    "crop_size": 48,
    "effective_batch_size": 4,
    "max_steps": 4,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
    "head_learning_rate_multiplier": 1.0,
    "segmentation_start_step": 1,
    "msee_start_step": 2,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}

Train = Callable[..., Path]
Log = Callable[[Path], list[dict[str, float]]]
WriteData = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prepared data sets go to a folder of this session."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield cache


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, dataset_cache: Path) -> Path:
    """Ten training and five validation scenes of five classes; the validation images differ in size."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.build(folder, train=10, validation=5, size=48)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe without a data set."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


@pytest.fixture
def script() -> ModuleType:
    """train_msee.py."""
    return train_msee


def _train(recipe: Path, output: Path, *overrides: object) -> Path:
    """Train in this process; what the library leaves in the environment is undone."""
    with mock.patch.dict(os.environ):
        train_msee.main([str(recipe), "--output_dir", str(output), *map(str, overrides)])
    return output


@pytest.fixture
def train(tiny_recipe: Path, tiny_data: Path, tmp_path: Path) -> Train:
    """`train(name, *overrides)`: run the tiny recipe into a folder of that name and return the folder."""

    def train_here(name: str, *overrides: object) -> Path:
        return _train(tiny_recipe, tmp_path / name, "--dataset", tiny_data, *overrides)

    return train_here


@pytest.fixture(scope="session")
def trained(tiny_recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of six steps with a checkpoint and an evaluation after every third; an epoch has two steps."""
    output = tmp_path_factory.mktemp("trained") / "run"
    return _train(tiny_recipe, output, "--dataset", tiny_data, *SIX_STEPS)


SIX_STEPS = (
    *("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3),
    *("--eval_strategy", "steps", "--eval_steps", 3, "--per_device_eval_batch_size", 2),
)


@pytest.fixture
def six_steps() -> tuple[object, ...]:
    """The overrides that `trained` was run with."""
    return SIX_STEPS


@pytest.fixture
def log() -> Log:
    """`log(output)`: entries of a run's log."""
    return lambda output: json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def step_log(log: Log) -> Log:
    """`step_log(output)`: the entries of training steps, without what depends on the clock."""
    return lambda output: [entry for entry in log(output) if "loss" in entry]


def _file(image: Image.Image | bytes | None, name: str) -> dict[str, bytes | str] | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {"bytes": image, "path": name}


def _split(rows: Sequence[tuple], names: Sequence[str], with_masks: bool) -> Dataset:
    columns: dict[str, list] = {
        "image_id": [f"photo_{index}" for index in range(len(rows))],
        "image": [_file(row[0], f"photo_{index}.jpg") for index, row in enumerate(rows)],
        "labels": [row[1] for row in rows],
    }
    if with_masks:
        columns["segmentation_map"] = [_file(row[2], f"photo_{i}.png") for i, row in enumerate(rows)]
    return Dataset.from_dict(columns, features=dataset_features(names, with_masks))


@pytest.fixture
def write_data(tmp_path: Path) -> WriteData:
    """`write_data(train, validation, names)`: save (image, labels[, mask]) rows as two splits."""

    def write(train: Sequence[tuple], validation: Sequence[tuple] = (), names=("disc", "square")) -> Path:
        splits = {"train": _split(train, names, with_masks=False)}
        if validation:
            splits["validation"] = _split(validation, names, with_masks=True)
        folder = tmp_path / f"data_{len(list(tmp_path.iterdir()))}"
        DatasetDict(splits).save_to_disk(folder)
        return folder

    return write
