"""`msee figures`: draw image, CAMs, regions, labels and result in rows."""

import argparse
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..inference.explain import explain
from ..inference.figures import figure_rows
from .common import add_model_and_data, load_scored_data


HELP = "draw image, CAMs, regions, labels and result in rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser)
    parser.add_argument("--count", type=int, default=8, help="number of images (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")


def run(arguments: argparse.Namespace) -> int:
    model, samples = load_scored_data(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(samples) - 1, min(arguments.count, len(samples))).round().astype(int)
    rows, present = [], {0}
    for index in tqdm(chosen.tolist(), desc="Drawing"):
        sample = samples[index]
        target = sample["segmentation_map"].numpy()
        rows.append(explain(model, samples.processor, samples.image(index), sample["labels"], target))
        present |= {int(label) + 1 for label in sample["labels"].nonzero()}
    names = {value: model.config.label_names[value] for value in sorted(present)} | {255: "ignored"}
    path = arguments.output / f"{arguments.split}.png"
    figure_rows(rows, names, path, f"{Path(arguments.model).name} on {arguments.split}")
    print(f"Written to {path}")
    return 0
