"""Recipes: YAML as people mean it, overrides, errors that help, and the batch of one process."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import modeling_msee.training.arguments as arguments_module
from modeling_msee import MSEEConfig
from modeling_msee.training.arguments import (
    MSEETrainingArguments,
    Recipe,
    RecipeLoader,
    method_fields,
    parse_overrides,
    parse_recipe,
)
from modeling_msee.training.checkpoints import mark_complete


pytest_plugins = ["training_fixtures"]

CONFIGURATION = Path(__file__).resolve().parents[1] / "configuration"
RECIPES = sorted(CONFIGURATION.glob("*.yaml"))


def parse(recipe: Path, *overrides: object) -> Recipe:
    return parse_recipe([str(recipe), "--dataset", "photos", *map(str, overrides)])


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("6.0e-5", 6e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("3", 3),
        ("-2", -2),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("none", "none"),
        ("null", None),
        ("e5", "e5"),
        ("1e", "1e"),
        ("[1.5, 0.5]", [1.5, 0.5]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_yaml_value(text: str, value: object) -> None:
    loaded = yaml.load(text, Loader=RecipeLoader)
    assert loaded == value and type(loaded) is type(value)


def test_recipe_loader_leaves_the_library_s_alone() -> None:
    assert yaml.safe_load("no") is False
    assert yaml.safe_load("1e-4") == "1e-4"


def test_overrides() -> None:
    words = "--crop_size 96 --learning-rate=1e-4 --crf --scale_factors 1.5 0.5 0.25 --auxiliary_layer -2"
    words += " --eval_strategy no --skip_bad_images false --eval_size= --beta 1 --beta 3"
    assert parse_overrides(words.split()) == {
        "crop_size": 96,
        "learning_rate": 1e-4,
        "crf": True,
        "scale_factors": [1.5, 0.5, 0.25],
        "auxiliary_layer": -2,
        "eval_strategy": "no",
        "skip_bad_images": False,
        "eval_size": None,
        "beta": 3,
    }


def test_value_before_the_first_field() -> None:
    with pytest.raises(ValueError, match="expected --field before 'crop_size'"):
        parse_overrides(["crop_size", "96"])


# --- Recipes --------------------------------------------------------------------------------------


def test_fields_go_where_they_belong(tiny_recipe: Path) -> None:
    words = ["--scale_factors", "1.5", "0.5", "--eval_strategy", "no", "--frozen_backbone_layers", "1"]
    recipe = parse(tiny_recipe, "--crop_size", 64, "--learning_rate", "2e-4", *words)
    assert (recipe.data.dataset, recipe.data.crop_size) == ("photos", 64)
    assert recipe.training.learning_rate == 2e-4 and recipe.training.eval_strategy == "no"
    assert recipe.training.warmup_steps == 0  # the file's
    assert recipe.model.frozen_backbone_layers == 1
    assert recipe.config_fields["scale_factors"] == [1.5, 0.5]
    assert recipe.config_fields["auxiliary_layer"] == -2
    assert not {"crop_size", "learning_rate", "dataset"} & set(recipe.config_fields)
    assert recipe.values["learning_rate"] == 2e-4


def test_null_leaves_a_method_field_at_its_default(tiny_recipe: Path) -> None:
    recipe = parse(tiny_recipe, "--backbone_config", "null", "--backbone", "some/vit")
    assert "backbone_config" not in recipe.config_fields and recipe.model.backbone == "some/vit"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--model", "a", "--backbone", "b", "--backbone_config", "null"], "'backbone' and 'model'"),
        (["--backbone", "b"], "'backbone' and 'backbone_config'"),
    ],
)
def test_two_origins_of_the_encoder(tiny_recipe: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(tiny_recipe, *overrides)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("learning_rat", "did you mean 'learning_rate'"),
        ("scale_factor", "did you mean 'scale_factors'"),
        ("frozen_layers", "did you mean 'frozen_backbone_layers'"),
        ("num_labels", r"--help` lists all fields"),
        ("zzzz", r"--help` lists all fields"),
    ],
)
def test_unknown_field(tiny_recipe: Path, field: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"{tiny_recipe}: there is no recipe field '{field}'.*{hint}"):
        parse(tiny_recipe, f"--{field}", 1)


def test_missing_data_set(tiny_recipe: Path) -> None:
    with pytest.raises(ValueError, match="the field 'dataset' is missing; set it there or with --dataset"):
        parse_recipe([str(tiny_recipe)])


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the path of a recipe .* got '.*nope.yaml'"):
        parse_recipe([str(tmp_path / "nope.yaml")])


def test_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- crop_size\n")
    with pytest.raises(ValueError, match=r"list.yaml: expected a mapping of fields to values, got list"):
        parse_recipe([str(tmp_path / "list.yaml")])


def test_value_of_another_type(tiny_recipe: Path) -> None:
    with pytest.raises(Exception, match=r"(?s)'crop_size'.*expected int, got str"):
        parse(tiny_recipe, "--crop_size", "large")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe(path: Path) -> None:
    recipe = parse(path, "--use_cpu")  # some ask for bf16, which this machine may only have so
    config = MSEEConfig(**recipe.config_fields, id2label={0: "background", 1: "disc"})
    assert recipe.training.max_steps > 0
    assert all(hasattr(config, name) for name in recipe.config_fields)


def test_there_are_recipes() -> None:
    assert "demo" in {path.stem for path in RECIPES}


def test_method_fields_are_not_the_library_s() -> None:
    names = set(method_fields())
    assert {"scale_factors", "msee_loss_weight", "backbone_config", "beta"} <= names
    assert not names & {"id2label", "num_labels", "architectures", "dtype"}


def test_no_field_has_two_owners() -> None:
    owners = (arguments_module.DataArguments, arguments_module.ModelArguments, MSEETrainingArguments)
    names = [*method_fields(), *(item.name for owner in owners for item in fields(owner))]
    assert len(names) == len(set(names))


# --- Batch ----------------------------------------------------------------------------------------


def processes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(MSEETrainingArguments, "world_size", property(lambda self: count))


@pytest.mark.parametrize(("count", "accumulation", "batch"), [(1, 1, 16), (1, 4, 4), (2, 1, 8), (4, 2, 2), (8, 2, 1)])
def test_batch_of_one_process(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, count: int, accumulation: int, batch: int
) -> None:
    processes(monkeypatch, count)
    words = ("--effective_batch_size", 16, "--gradient_accumulation_steps", accumulation, "--use_cpu")
    training = parse(tiny_recipe, *words).training
    assert training.per_device_train_batch_size == training.train_batch_size == batch
    assert batch * accumulation * count == 16


def test_batch_that_cannot_be_shared_out(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes(monkeypatch, 3)
    words = ("--effective_batch_size", 16, "--gradient_accumulation_steps", 2, "--use_cpu")
    message = r"expected a multiple of 6 \(3 devices x gradient_accumulation_steps 2\), got 16"
    with pytest.raises(ValueError, match=message):
        parse(tiny_recipe, *words)


def test_given_batch_of_one_process(tiny_recipe: Path) -> None:
    words = ("--effective_batch_size", 16, "--gradient_accumulation_steps", 2, "--use_cpu")
    assert parse(tiny_recipe, *words, "--per_device_train_batch_size", 8).training.train_batch_size == 8
    message = r"per_device_train_batch_size 4 x 1 devices .* 2 is 8, but effective_batch_size is 16"
    with pytest.raises(ValueError, match=message):
        parse(tiny_recipe, *words, "--per_device_train_batch_size", 4)


def test_tensorboard_where_installed(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in ((True, ["tensorboard"]), (False, [])):
        monkeypatch.setattr(arguments_module, "is_tensorboard_available", lambda answer=installed: answer)
        assert parse(tiny_recipe, "--report_to", "default").training.report_to == expected
    assert parse(tiny_recipe, "--report_to", "none").training.report_to == []


def test_where_a_run_starts(tmp_path: Path, tiny_recipe: Path) -> None:
    output = tmp_path / "run"
    for step in (20, 100):
        (output / f"checkpoint-{step}").mkdir(parents=True)
        mark_complete(output / f"checkpoint-{step}")

    def start(*words: str) -> str | None:
        return parse(tiny_recipe, "--output_dir", output, *words).training.start()

    assert start() == start("--resume_from_checkpoint", "true") == str(output / "checkpoint-100")
    assert start("--resume_from_checkpoint", "false") is None
    assert start("--resume_from_checkpoint", str(output / "checkpoint-20")) == str(output / "checkpoint-20")
    with pytest.raises(ValueError, match="does not exist"):
        start("--resume_from_checkpoint", str(output / "checkpoint-30"))
