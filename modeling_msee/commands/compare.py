"""`msee compare`: draw CAM and segmentation of two models side by side, as the paper's Fig. 3 and 6."""

import argparse
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..data.contract import check_class_names, load_split
from ..inference.explain import explain
from ..inference.figures import Panel, figure_rows
from ..inference.rows import legend, results_row
from .common import MODEL_HELP, add_figure_data, load_model, load_pictures


HELP = "draw CAM and segmentation of two models side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"{MODEL_HELP}, such as the baseline")
    parser.add_argument("other", help="the one to compare it with, of the same classes")
    add_figure_data(parser, count=8)


def run(arguments: argparse.Namespace) -> int:
    paths = (arguments.model, arguments.other)
    models = [load_model(path) for path in paths]
    check_class_names(load_split(arguments.data, arguments.split), models[1][0].config.label_names, arguments.other)
    pictures = load_pictures(arguments, models[0][0])
    labels = models[0][0].config.label_names
    last = [Path(path).name for path in paths]
    names = last if last[0] != last[1] else list(paths)
    rows: list[list[Panel]] = []
    drawn: list[np.ndarray] = []
    for picture in tqdm(pictures, desc="Drawing"):
        both = {
            name: explain(model, processor, picture.image, picture.labels)
            for name, (model, processor) in zip(names, models, strict=True)
        }
        drawn += [found.segmentation for found in both.values()]
        rows.append(results_row(picture, both, len(labels)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"comparison-{arguments.split}.png"
    figure_rows(rows, legend(labels, pictures, drawn), path, f"{names[0]} and {names[1]} on {arguments.split}")
    print(f"Written to {path}")
    return 0
