"""The model card of a checkpoint folder: what it is, how good by which protocol, how it was made, how to use it."""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..configuration_msee import MSEEConfig
from ..evaluation.tables import write_whole
from ..training.arguments import DataArguments, MSEETrainingArguments, read_recipe
from .results import Metrics, eval_results, read_metrics


CARD = "README.md"
TEMPLATE = Path(__file__).parent / "model_card.md"
# A card with this line is ours to write anew; one without it is the user's.
MARKER = "<!-- Written by msee, and anew at every push. Take this line out to keep changes of your own. -->"
TRAINING_FIELDS = (
    "effective_batch_size",
    "max_steps",
    "learning_rate",
    "head_learning_rate_multiplier",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "seed",
    "bf16",
)
DATA_FIELDS = ("crop_size", "rescale_min", "rescale_max", "eval_size")
METHOD_FIELDS = (
    "scale_factors",
    "threshold_mode",
    "beta",
    "distance",
    "msee_loss_weight",
    "msee_start_step",
    "patch_contrast_loss_weight",
    "class_contrast_loss_weight",
    "segmentation_loss_weight",
    "segmentation_start_step",
    "energy_loss_weight",
)


def write_model_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write README.md of a checkpoint folder, unless there is one without the line `MARKER`, which stays.

    Args:
        folder: a checkpoint with, where they exist, `recipe.yaml`, `metrics.json` and `figures/*.png`.
        repo_id: where it will be loaded from; default: the folder.

    Raises:
        OSError: no checkpoint there.
        ValueError: `metrics.json` or `recipe.yaml` is damaged.
    """
    path = Path(folder) / CARD
    if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
        return path
    write_whole(path, str(model_card(folder, repo_id)))
    return path


def model_card(folder: str | Path, repo_id: str | None = None) -> ModelCard:
    """The card of a checkpoint folder; arguments and errors as `write_model_card`."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():  # without one the library takes the defaults
        raise FileNotFoundError(f"{folder}: expected a checkpoint folder, found no config.json there.")
    config = MSEEConfig.from_pretrained(folder)
    recipe = yaml.safe_load(shareable_recipe(folder)) if (folder / "recipe.yaml").is_file() else {}
    metrics = read_metrics(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    name = (repo_id or folder.resolve().name).split("/")[-1]
    backbone, dataset = recipe.get("backbone"), recipe.get("dataset")
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["msee", "semantic-segmentation", "weakly-supervised-segmentation", "image-level-labels", "custom_code"],
        base_model=backbone if is_hub_id(backbone) else None,
        datasets=dataset if is_hub_id(dataset) else None,
        metrics=["mean_iou"] if metrics else None,
        model_name=name,
        eval_results=_eval_results(metrics, recipe) if metrics else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        source=repo_id or folder.as_posix(),
        enhanced=bool(config.scale_factors) and config.msee_loss_weight > 0,
        encoder=_encoder(config, backbone),
        patch_size=config.patch_size,
        pretrained=backbone,
        dataset=dataset,
        dataset_on_hub=is_hub_id(dataset),
        eval_split=_eval_split(recipe),
        classes=[_cell(label) for label in config.label_names[1:]],
        metrics=metrics,
        rows=_score_rows(metrics) if metrics else [],
        details=_details(metrics) if metrics else [],
        hyperparameters=_hyperparameters(config, recipe) if recipe else [],
        recipe=yaml.safe_dump(recipe, sort_keys=False).rstrip() if recipe else None,
        pictures=sorted(path.relative_to(folder).as_posix() for path in folder.glob("figures/*.png")),
    )


def shareable_recipe(folder: str | Path) -> str:
    """`recipe.yaml` of a folder as it can be published: of paths outside the working folder only the last name."""
    values = read_recipe(str(Path(folder) / "recipe.yaml"))
    return yaml.safe_dump({key: _shareable(value) for key, value in values.items()}, sort_keys=False)


def _shareable(value: Any) -> Any:
    private = isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", "..")))
    return f"./{Path(value).name}" if private else value


def is_hub_id(value: str | None) -> bool:
    """Whether a recipe's `dataset` or `backbone` is a Hub repository; training writes local folders as `./folder`."""
    return value is not None and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value)) and not Path(value).exists()


def _eval_split(recipe: Mapping[str, Any]) -> str:
    return recipe.get("eval_split", DataArguments.eval_split)


def _eval_results(metrics: Metrics, recipe: Mapping[str, Any]):
    dataset = recipe.get("dataset", "unknown")
    name = dataset.split("/")[-1]
    return eval_results(metrics, name, dataset if is_hub_id(dataset) else name, _eval_split(recipe))


def _encoder(config: MSEEConfig, backbone: str | None) -> str:
    encoder = config.encoder_config
    shape = f"{encoder.num_hidden_layers} blocks, {encoder.hidden_size} channels, patches of {encoder.patch_size} px"
    origin = "" if backbone is None else f", pretrained: `{backbone.removeprefix('./')}`"
    return f"`{encoder.model_type}`, {shape}{origin}"


def _cell(text: str) -> str:
    """Text that does not end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _score_rows(metrics: Metrics) -> list[tuple[str, list[str]]]:
    """Lines of the table of results: a name and one cell per column of `metrics.results`."""
    columns = list(metrics.results.values())
    rows = [
        ("**mIoU**", [f"**{_percent(column['mean_iou'])}**" for column in columns]),
        ("pixel accuracy", [_percent(column["pixel_accuracy"]) for column in columns]),
    ]
    for index, name in enumerate(metrics.class_names):
        rows.append((_cell(name), [_percent(column["per_class_iou"][index]) for column in columns]))
    return rows


def _details(metrics: Metrics) -> list[tuple[str, str]]:
    """What else the file of results says, one line each."""
    lines = []
    for key, value in metrics.details.items():
        if value is not None:
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
            lines.append((key.replace("_", " "), text.replace("`", "'")))
    return lines


def _hyperparameters(config: MSEEConfig, recipe: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values, those of the recipe before the defaults."""
    owners = ((MSEETrainingArguments, TRAINING_FIELDS), (DataArguments, DATA_FIELDS))
    defaults = {
        item.name: item.default
        for owner, names in owners
        for item in fields(owner)
        if item.name in names and item.default is not MISSING
    }
    values = [(name, recipe.get(name, defaults[name])) for name in (*TRAINING_FIELDS, *DATA_FIELDS)]
    return values + [(name, config.to_dict()[name]) for name in METHOD_FIELDS]
