"""Recipes: a YAML file of fields, any of which the command line overrides."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.dataclasses import strict
from transformers import TrainingArguments
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import HubStrategy

from ..configuration_msee import MSEEConfig
from .checkpoints import check_complete, last_complete


@strict
@dataclass
class DataArguments:
    """Where the images come from and how they are cut.

    Args:
        dataset: a folder of Parquet files or of `save_to_disk`, or a Hub repository, in the form that
            `datasets_scripts` writes.
        train_split: split to train on; its masks, if it has any, are never read.
        eval_split: split to score, with masks; `none` trains without evaluation.
        crop_size: side of a training image in pixels.
        rescale_min, rescale_max: range of the random rescaling before the crop.
        eval_size: shorter side of an image in evaluation and inference, in pixels; default its own size.
        skip_bad_images: leave out and count images that cannot be read, instead of stopping at the first.
    """

    dataset: str
    train_split: str = "train"
    eval_split: str = "validation"
    crop_size: int = 448
    rescale_min: float | int = 0.5
    rescale_max: float | int = 2.0
    eval_size: int | None = None
    skip_bad_images: bool = False


@strict
@dataclass
class ModelArguments:
    """What is trained.

    Args:
        backbone: pretrained encoder, a local folder or a Hub repository; new heads are put on it.
        model: an M-SEE checkpoint to go on from, instead of `backbone`.
        frozen_backbone_layers: number of first encoder blocks that keep their weights, together with the embedding.
    """

    backbone: str | None = None
    model: str | None = None
    frozen_backbone_layers: int = 0


@dataclass
class MSEETrainingArguments(TrainingArguments):
    """Training arguments of the Hugging Face Trainer with the paper's defaults (§5.1), and a few of our own.

    Args:
        effective_batch_size: images per optimiser step over all processes and accumulation steps. The batch of one
            process follows from it, so the number of processes does not change the result.
        head_learning_rate_multiplier: learning rate of the heads in units of `learning_rate`.
        crf: score Seg + CRF after training, too.
        hub_strategy: the model is published once, at the end, whole and with its results.

    Raises:
        ValueError: the effective batch size cannot be shared out evenly; a token among the fields; publishing before
            the end.
    """

    output_dir: str = "outputs/msee"
    effective_batch_size: int = 4
    head_learning_rate_multiplier: float = 10.0
    crf: bool = False
    # None, which the library does not foresee, until `__post_init__` derives it from the effective batch size.
    per_device_train_batch_size: int | None = None  # type: ignore[assignment]
    per_device_eval_batch_size: int = 1
    learning_rate: float = 6e-5
    weight_decay: float = 0.01
    max_steps: int = 20_000
    warmup_steps: float = 1500
    max_grad_norm: float = 0.0
    logging_steps: float = 50
    save_steps: float = 2000
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 4
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Without it the library refuses bf16 where there is only a CPU.
    use_cpu: bool = field(default_factory=lambda: not torch.accelerator.is_available())
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    batch_eval_metrics: bool = True
    report_to: str | list[str] = "default"
    hub_strategy: HubStrategy | str = "end"

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "hub_token: expected none, because the fields of a run are written to its folder. Set the environment "
                "variable HF_TOKEN or log in with `hf auth login`."
            )
        if self.hub_strategy != HubStrategy.END:
            raise ValueError(f"hub_strategy: expected 'end', the only one here, got {self.hub_strategy!r}.")
        if self.report_to == "default":
            self.report_to = ["tensorboard"] if is_tensorboard_available() else []
        given = self.per_device_train_batch_size
        self.per_device_train_batch_size = 1
        super().__post_init__()
        devices = self.world_size * max(1, self.n_gpu)
        shares = devices * self.gradient_accumulation_steps
        numbers = f"{devices} devices x gradient_accumulation_steps {self.gradient_accumulation_steps}"
        if self.effective_batch_size % shares:
            raise ValueError(
                f"effective_batch_size: expected a multiple of {shares} ({numbers}), got {self.effective_batch_size}. "
                "Change the number of processes, gradient_accumulation_steps or effective_batch_size."
            )
        self.per_device_train_batch_size = self.effective_batch_size // shares
        if given is not None and given != self.per_device_train_batch_size:
            raise ValueError(
                f"per_device_train_batch_size {given} x {numbers} is {given * shares}, but effective_batch_size is "
                f"{self.effective_batch_size}. Leave per_device_train_batch_size out: it follows from the others."
            )

    def start(self) -> str | None:
        """The checkpoint that the run goes on from: the one asked for, else the last complete one in `output_dir`.

        Raises:
            ValueError: the one asked for is not complete, or does not exist.
        """
        asked = self.resume_from_checkpoint
        if asked is False:
            return None
        if asked is None or asked is True:
            checkpoint = last_complete(self.output_dir)
        else:
            check_complete(asked)
            checkpoint = str(asked)
        if checkpoint is not None:
            print(f"Going on from {checkpoint}")
        return checkpoint


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; `config_fields` are the fields of MSEEConfig that it sets."""

    data: DataArguments
    model: ModelArguments
    training: MSEETrainingArguments
    config_fields: dict[str, Any]
    values: dict[str, Any]


def written_recipe(values: dict[str, Any]) -> str:
    """The values of a recipe as YAML; local folders begin with `./`, so that none passes for a Hub repository."""
    folders = {
        name: f"./{value}"
        for name, value in values.items()
        if name in ("dataset", "backbone", "model") and value is not None and Path(value).exists()
        if not Path(value).is_absolute() and not value.startswith(".")
    }
    return yaml.safe_dump(values | folders, sort_keys=False)


def method_fields() -> list[str]:
    """Fields of MSEEConfig that a recipe may set: those of the method, not the library's."""
    inherited = {item.name for item in fields(PreTrainedConfig)}
    return [item.name for item in fields(MSEEConfig) if item.name not in inherited]


def parse_recipe(arguments: list[str]) -> Recipe:
    """Read `RECIPE.yaml [--field value ...]`.

    Raises:
        ValueError: a field that does not exist, or a required one that is missing.
        FileNotFoundError: no such recipe.
    """
    path, *overrides = arguments
    values = {**read_recipe(path), **parse_overrides(overrides)}
    check_fields(values, path)
    parts = {group: {k: v for k, v in values.items() if k in names} for group, names in field_groups().items()}
    return Recipe(
        data=DataArguments(**parts["data"]),
        model=ModelArguments(**parts["model"]),
        training=MSEETrainingArguments(**parts["training"]),
        # No field of the method takes null, so null leaves one at its default.
        config_fields={name: value for name, value in parts["config"].items() if value is not None},
        values=values,
    )


def field_groups() -> dict[str, set[str]]:
    """Names of all recipe fields by what they set: data, model, training, config."""
    owners = {"data": DataArguments, "model": ModelArguments, "training": MSEETrainingArguments}
    groups = {group: {item.name for item in fields(cls) if item.init} for group, cls in owners.items()}
    return groups | {"config": set(method_fields())}


def check_fields(values: dict[str, Any], path: str) -> None:
    """Raise ValueError unless the fields of a whole recipe exist, none is missing and none contradicts another."""
    check_known_fields(values, path)
    required = [item.name for item in fields(DataArguments) if item.default is MISSING]
    for name in required:
        if name not in values:
            raise ValueError(f"{path}: the field {name!r} is missing; set it there or with --{name}.")
    _check_origin(values, path)


def check_known_fields(names: Iterable[str], path: str) -> None:
    """Raise ValueError, which names the file and the closest field, if one of the names is no recipe field."""
    known = sorted(set().union(*field_groups().values()))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; `train_msee.py --help` lists all fields."
            raise ValueError(f"{path}: there is no recipe field {name!r}{hint}")


def _check_origin(values: dict[str, Any], path: str) -> None:
    """Raise ValueError if a recipe says twice where the encoder comes from."""
    for first, second in (("backbone", "model"), ("backbone", "backbone_config")):
        if values.get(first) is not None and values.get(second) is not None:
            raise ValueError(
                f"{path}: expected only one of {first!r} and {second!r}, got both; take one out of the recipe "
                f"or set it to null, such as --{second} null."
            )


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML as version 1.2 reads it: 1e-4 is a number, and `no` is a word, not false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF")
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_recipe(path: str) -> dict[str, Any]:
    """Fields of a YAML file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected the path of a recipe such as configuration/demo.yaml, got {path!r}.")
    loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of fields to values, got {type(loaded).__name__}.")
    return loaded


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--field value`, `--field=value`, `--field a b` (a list) and `--flag` (true), values written as in YAML."""
    collected: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            collected[name] = [value] if equals else []
        elif name is None:
            raise ValueError(f"expected --field before {argument!r}.")
        else:
            collected[name].append(argument)
    overrides: dict[str, Any] = {}
    for name, words in collected.items():
        values = [yaml.load(word, Loader=RecipeLoader) for word in words]
        overrides[name] = True if not values else values[0] if len(values) == 1 else values
    return overrides
