"""`msee figures`: draw image, CAMs, regions, labels and result in rows."""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from ..inference.explain import explain
from ..inference.figures import figure_rows
from ..inference.rows import legend, steps_row
from .common import MODEL_HELP, add_figure_data, load_model, load_pictures


HELP = "draw image, CAMs, regions, labels and result in rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    add_figure_data(parser, count=8)


def run(arguments: argparse.Namespace) -> int:
    model, processor = load_model(arguments.model)
    pictures = load_pictures(arguments, model)
    explanations = [explain(model, processor, item.image, item.labels) for item in tqdm(pictures, desc="Drawing")]
    rows = [steps_row(*pair) for pair in zip(pictures, explanations, strict=True)]
    drawn = [label_map for found in explanations for label_map in (found.pseudo_label, found.segmentation)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.split}.png"
    names = legend(model.config.label_names, pictures, drawn)
    figure_rows(rows, names, path, f"{Path(arguments.model).name} on {arguments.split}")
    print(f"Written to {path}")
    return 0
