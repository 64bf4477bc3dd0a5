"""Whether torch.compile or bfloat16 makes a training step faster: python -m benchmarks.faster bfloat16 small

Steps as they are and the other ones alternate in one run; the first two others, which may compile, are told apart.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from .workload import PRESETS, Workload


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faster", description=__doc__)
    parser.add_argument("means", choices=["bfloat16", "compile"])
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind, after the first two")
    options = parser.parse_args(arguments)
    plain, other = Workload.build(PRESETS[options.preset]), Workload.build(PRESETS[options.preset])
    if options.means == "compile":
        other.model.compile()
    half = options.means == "bfloat16"
    seconds = np.array([(timed_step(plain), timed_step(other, half)) for _ in range(options.repeats + 2)])
    first, (one, two) = seconds[:2, 1].sum(), np.median(seconds[2:], axis=0)
    print(f"{PRESETS[options.preset]}; medians of {options.repeats} steps, CPU-seconds")
    print(f"as it is {one:.3f}, {options.means} {two:.3f}, ratio {np.median(seconds[2:, 1] / seconds[2:, 0]):.3f}")
    print(f"the first two of those, with what a compiler itself needs in this process: {first:.1f}")


def timed_step(workload: Workload, half: bool = False) -> float:
    """Seconds of processor time of one training step, of its forward pass in bfloat16 as `--bf16 true` has it."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = workload.forward()
    loss.backward()
    workload.update()
    return time.process_time() - start


if __name__ == "__main__":
    main()
