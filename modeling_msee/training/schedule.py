"""Learning rate of every step, and the parameter groups it applies to (§5.1)."""

from torch import nn


WARMUP_RATIO = 1e-6
POLYNOMIAL_POWER = 0.9


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak learning rate at a step, in [0, 1].

    Linear from 1e-6 during the warm-up, then (1 - step / max_steps) ** 0.9, which is not rebased where the warm-up
    ends; the last step's value holds from there on.
    """
    if step < warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
    return (1 - min(step, max_steps - 1) / max_steps) ** POLYNOMIAL_POWER


def parameter_groups(
    model: nn.Module, learning_rate: float, head_multiplier: float, weight_decay: float
) -> list[dict]:
    """Trainable parameters in two groups, encoder and heads; weight decay on everything, as the baseline."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone." in name].append(parameter)
    return [
        {"params": groups[True], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": groups[False], "lr": learning_rate * head_multiplier, "weight_decay": weight_decay},
    ]
