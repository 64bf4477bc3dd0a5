"""Where the time of a step goes: meters around the model's own methods and losses, without a copy of the forward."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from modeling_msee import modeling_msee

from .workload import Workload


# Methods of the model, and functions that its module calls, by the part of the step that they are.
METHODS = {
    "encode": "student pass",
    "upright_passes": "teacher passes",
    "mirrored_passes": "teacher passes",
    "fused_maps": "activation maps",
    "labelled_activation_maps": "activation maps",
    "_class_contrast": "views",
    "_patch_contrast": "patch contrast",
    "_refined": "refinement",
    "_add_msee": "regions + distillation",
}
FUNCTIONS = {"segmentation_loss": "segmentation", "dense_energy_loss": "energy"}
PARTS = (
    *("student pass", "teacher passes", "activation maps", "views", "patch contrast", "refinement", "segmentation"),
    *("energy", "regions + distillation", "other forward", "backward", "optimiser"),
)

# Some releases of torch (2.14) count the fused attention of GPUs only.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}

Meter = Callable[[], np.ndarray]


def clocks() -> np.ndarray:
    """Seconds on the clock, seconds of processor time over all threads."""
    return np.array([time.perf_counter(), time.process_time()])


class Parts:
    """Adds up, by part, how far a meter moves; a part within a part counts for the outer one."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.totals: dict[str, np.ndarray] = defaultdict(lambda: 0 * meter())
        self.inside = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.inside = True
        start = self.meter()
        try:
            yield
        finally:
            self.totals[name] += self.meter() - start
            self.inside = False

    def metered(self, function: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return call


def metered_step(workload: Workload, meter: Meter) -> dict[str, np.ndarray]:
    """Run one training step; how far the meter moved in each of `PARTS`."""
    parts, model = Parts(meter), workload.model
    with ExitStack() as patches:
        for method, name in METHODS.items():
            wrapped = parts.metered(getattr(model, method), name)
            patches.enter_context(mock.patch.object(model, method, wrapped))
        for function, name in FUNCTIONS.items():
            wrapped = parts.metered(getattr(modeling_msee, function), name)
            patches.enter_context(mock.patch.object(modeling_msee, function, wrapped))
        start = meter()
        loss = workload.forward()
        forward = meter() - start
    parts.totals["other forward"] = forward - sum(parts.totals.values())
    with parts.part("backward"):
        loss.backward()
    with parts.part("optimiser"):
        workload.update()
    return {name: parts.totals[name] for name in PARTS}


def counted_step(workload: Workload) -> dict[str, float]:
    """Floating-point operations of the matrix products, convolutions and attention of one step, by part."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        counted = metered_step(workload, lambda: np.array(float(counter.get_total_flops())))
    return {name: float(value) for name, value in counted.items()}


def matrix_product_rate(tokens: int, width: int, repeats: int = 5) -> float:
    """Operations per second of processor time of an encoder's largest product, the median over repeats."""
    left, right = torch.randn(tokens, width), torch.randn(4 * width, width)
    calls = 1 + int(4e9 / left.numel() / right.shape[0])
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            torch.nn.functional.linear(left, right)
        seconds.append(time.process_time() - start)
    return 2 * calls * left.numel() * right.shape[0] / float(np.median(seconds))
