"""`msee regions`: draw reliable regions and segmentation over the course of a run, as the paper's Fig. 4 and 5."""

import argparse
from pathlib import Path

from tqdm.auto import tqdm

from ..inference.explain import explain
from ..inference.figures import figure_rows
from ..inference.rows import legend, training_row
from ..training.checkpoints import complete_checkpoints
from .common import add_figure_data, load_model, load_pictures


HELP = "draw reliable regions and segmentation over the course of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="run", type=Path, help="output folder of a run, with its checkpoint-N")
    add_figure_data(parser, count=4)


def run(arguments: argparse.Namespace) -> int:
    checkpoints = complete_checkpoints(arguments.run_folder)
    model, _ = load_model(str(next(iter(checkpoints.values()))))
    if not model.config.scale_factors:
        raise ValueError(f"{arguments.run_folder}: the run has no scale_factors, so there are no reliable regions.")
    labels, pictures = model.config.label_names, load_pictures(arguments, model)
    explanations = {}
    for step, folder in tqdm(checkpoints.items(), desc="Checkpoints"):
        model, processor = load_model(str(folder))
        explanations[step] = [explain(model, processor, item.image, item.labels) for item in pictures]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        seen = {step: found[index] for step, found in explanations.items()}
        rows = [training_row(picture, found, step, len(labels)) for step, found in seen.items()]
        path = arguments.output / f"regions-{arguments.split}-{index + 1}.png"
        title = f"{arguments.run_folder.resolve().name}: {picture.image_id} over training"
        names = legend(labels, [picture], [found.segmentation for found in seen.values()])
        figure_rows(rows, names, path, title)
        print(f"Written to {path}")
    return 0
