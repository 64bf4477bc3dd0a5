"""Where the time of a training step goes, and how it grows.

    python -m benchmarks.step voc              # ViT-B/16, 448 px, batch 1, every loss
    python -m benchmarks.step small --growth   # ViT-S/16, 224 px, batch 2; image size, batch, scale factors, classes
    python -m benchmarks.step tags             # DINOv2-small, 224 px, batch 8, first 9 blocks frozen

Steps of all cases are interleaved and medians taken, so that other load on the machine meets all of them alike.
Processor time suffers less from it than seconds on the clock. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from .parts import PARTS, clocks, counted_step, matrix_product_rate, metered_step
from .workload import PRESETS, Case, Workload, growth


GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=5, help="steps of each case")
    parser.add_argument(
        "--growth", action="store_true", help="also with other images, batches, scale factors, classes"
    )
    options = parser.parse_args(arguments)
    case = PRESETS[options.preset]
    cases = growth(case) if options.growth else [case, replace(case, scale_factors=())]
    print(report(cases, options.repeats))


def report(cases: list[Case], repeats: int) -> str:
    """Measure the cases, the first in parts, and say what came out."""
    base = cases[0]
    workload = Workload.build(base)
    operations = counted_step(workload)  # warms up, too
    peak, state = peak_memory(), workload.state_bytes() / GIB
    tokens = (base.image_size // workload.model.config.patch_size) ** 2
    rate = matrix_product_rate(tokens, workload.model.config.hidden_size)
    measured = measure(cases, workload, repeats)
    totals = {one: np.array([sum(step.values()) for step in steps]) for one, steps in measured.items()}
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"{base}; medians of {repeats} steps",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}; load average {load}",
        "",
        *parts_table(measured[base], operations, rate),
        "",
        f"matrix products: {rate / 1e9:.1f} GFLOP per CPU-second in this run, "
        f"so at least {sum(operations.values()) / rate:.2f} CPU-seconds a step",
        f"peak memory of the process: {peak:.2f} GiB; weights, gradients and moments {state:.2f} of it",
        "",
        *growth_table(totals),
    ]
    return "\n".join(lines)


def measure(cases: list[Case], base: Workload, repeats: int) -> dict[Case, list[dict[str, np.ndarray]]]:
    """Interleaved steps of every case, by part."""
    workloads = {case: base.varied(case) for case in cases}
    results: dict[Case, list[dict[str, np.ndarray]]] = {case: [] for case in cases}
    order = list(workloads)
    for _ in tqdm(range(repeats), desc="rounds", disable=not sys.stderr.isatty()):
        for case in order:
            results[case].append(metered_step(workloads[case], clocks))
        order.reverse()  # what ran before a step leaves its mark on the next
    return results


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def parts_table(steps: list[dict[str, np.ndarray]], operations: dict[str, float], rate: float) -> list[str]:
    """A row for every part: seconds, seconds of processor time, operations, how much of the time those explain."""
    rows = {name: np.array([step[name] for step in steps]) for name in PARTS}
    rows["step"] = np.sum(list(rows.values()), axis=0)
    operations = {**operations, "step": sum(operations.values())}
    lines = ["| part | seconds | CPU-seconds | GFLOP | products' share |", "|---|---|---|---|---|"]
    for name, values in rows.items():
        seconds, processor = np.median(values, axis=0)
        share = operations[name] / rate / max(processor, 1e-9)
        lines.append(
            f"| {name} | {seconds:.3f} | {processor:.3f} | {operations[name] / 1e9:.1f} | {100 * share:.0f} % |"
        )
    return lines


def growth_table(totals: dict[Case, np.ndarray]) -> list[str]:
    """A row for every case; its ratio to the first is the median of the ratios of each round."""
    base = next(iter(totals.values()))
    lines = ["| case | seconds | CPU-seconds | of the first |", "|---|---|---|---|"]
    for case, values in totals.items():
        seconds, processor = np.median(values, axis=0)
        ratio = np.median(values[:, 1] / base[:, 1])
        lines.append(f"| {case} | {seconds:.3f} | {processor:.3f} | {ratio:.3f} |")
    return lines


if __name__ == "__main__":
    main()
