"""Learning rate by hand-computed steps, and the groups it applies to."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from modeling_msee.training.arguments import parse_recipe
from modeling_msee.training.schedule import learning_rate_factor, parameter_groups


pytest_plugins = ["training_fixtures"]


def test_warm_up_is_linear_from_a_millionth() -> None:
    factors = [learning_rate_factor(step, warmup_steps=4, max_steps=16) for step in range(4)]
    assert factors == pytest.approx([1e-6, 0.25 + 0.75e-6, 0.5 + 0.5e-6, 0.75 + 0.25e-6], rel=1e-9)


def test_decay_is_not_rebased_where_the_warm_up_ends() -> None:
    assert learning_rate_factor(4, 4, 16) == pytest.approx(0.75**0.9)
    assert learning_rate_factor(8, 4, 16) == pytest.approx(0.5358867312681466)  # 0.5 ** 0.9
    assert learning_rate_factor(15, 4, 16) == pytest.approx((1 / 16) ** 0.9)


def test_last_value_holds() -> None:
    assert learning_rate_factor(16, 4, 16) == learning_rate_factor(99, 4, 16) == learning_rate_factor(15, 4, 16)


def test_without_warm_up() -> None:
    assert [learning_rate_factor(step, 0, 2) for step in range(2)] == [1.0, pytest.approx(0.5**0.9)]


def test_reference_sequence() -> None:
    """The paper's run (§5.1): 20 000 steps, 1500 of them warm-up."""
    factors = [learning_rate_factor(step, 1500, 20_000) for step in (0, 750, 1499, 1500, 10_000, 19_999)]
    expected = [1e-6, 0.5000005, 0.9993334, 0.925**0.9, 0.5**0.9, 5e-5**0.9]
    assert factors == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("frozen", [0, 2])
def test_every_trainable_parameter_is_in_one_group(script: ModuleType, tiny_recipe: Path, frozen: int) -> None:
    words = [str(tiny_recipe), "--dataset", "photos", "--frozen_backbone_layers", str(frozen)]
    model = script.build_model(parse_recipe(words), ["background", "disc", "square"])
    encoder, heads = parameter_groups(model, 0.02, 10, 0.3)
    ids = [id(parameter) for group in (encoder, heads) for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(names[id(parameter)].startswith("backbone.") for parameter in encoder["params"])
    roots = {names[id(parameter)].split(".")[0] for parameter in heads["params"]}
    assert roots == {"classifier", "auxiliary_classifier", "decoder", "projection"}
    assert (encoder["lr"], heads["lr"]) == (0.02, 0.2)
    assert encoder["weight_decay"] == heads["weight_decay"] == 0.3


def test_groups_of_a_wrapped_model() -> None:
    """Names have a prefix where several processes train."""
    model = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 1)})})
    encoder, heads = parameter_groups(model, 1.0, 10, 0.0)
    assert len(encoder["params"]) == 2 and not heads["params"]
