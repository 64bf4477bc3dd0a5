"""`msee failures`: rank all images of a split by the mIoU of their segmentation and draw the worst, as Fig. 7."""

import argparse
from pathlib import Path

from ..inference.explain import explain
from ..inference.figures import figure_rows
from ..inference.pictures import read_pictures
from ..inference.ranking import rank_images, write_ranking
from ..inference.rows import legend, results_row
from .common import add_model_and_data, load_scored_data


HELP = "rank images by the mIoU of their segmentation and draw the worst"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser)
    parser.add_argument("--count", type=int, default=8, help="number of images to draw (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the picture and the ranking")


def run(arguments: argparse.Namespace) -> int:
    model, samples = load_scored_data(arguments)
    ranked = rank_images(model, samples)
    arguments.output.mkdir(parents=True, exist_ok=True)
    ranking = arguments.output / f"failures-{arguments.split}.csv"
    write_ranking(ranking, ranked)
    pictures = read_pictures(samples.dataset, [image.index for image in ranked[: arguments.count]])
    explanations = [explain(model, samples.processor, item.image, item.labels) for item in pictures]
    labels = model.config.label_names
    rows = [results_row(item, {"": found}, len(labels)) for item, found in zip(pictures, explanations, strict=True)]
    path = arguments.output / f"failures-{arguments.split}.png"
    title = f"{Path(arguments.model).name}: the lowest mIoU of {len(ranked)} images of {arguments.split}"
    names = legend(labels, pictures, [found.segmentation for found in explanations])
    figure_rows(rows, names, path, title)
    print(f"Written to {path} and {ranking}")
    return 0
