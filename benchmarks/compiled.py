"""Whether torch.compile makes a training step faster: python -m benchmarks.compiled small

Steps as they are and compiled alternate in one run; the first compiled steps, which compile, are told apart.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from .workload import PRESETS, Workload


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind, after the first two")
    options = parser.parse_args(arguments)
    plain, compiled = Workload.build(PRESETS[options.preset]), Workload.build(PRESETS[options.preset])
    compiled.model.compile()
    seconds = np.array([(timed_step(plain), timed_step(compiled)) for _ in range(options.repeats + 2)])
    first, (one, other) = seconds[:2, 1].sum(), np.median(seconds[2:], axis=0)
    print(f"{PRESETS[options.preset]}; medians of {options.repeats} steps, CPU-seconds")
    print(f"as it is {one:.3f}, compiled {other:.3f}, ratio {np.median(seconds[2:, 1] / seconds[2:, 0]):.3f}")
    print(f"the first two compiled steps, with what the compiler itself needs in this process: {first:.1f}")


def timed_step(workload: Workload) -> float:
    """Seconds of processor time of one training step."""
    start = time.process_time()
    workload.forward().backward()
    workload.update()
    return time.process_time() - start


if __name__ == "__main__":
    main()
