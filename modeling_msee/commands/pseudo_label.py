"""`msee pseudo-label`: write a data set with masks made by a model, to train any segmentation model on."""

import argparse
from pathlib import Path

from ..inference.network import load_model
from ..inference.pseudo_labels import PseudoLabelling, pseudo_label
from .common import DATA_HELP, MODEL_HELP


HELP = "write a data set with masks made by a model, to train any segmentation model on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet data set")
    parser.add_argument("--masks", type=Path, help="folder for the same masks as palette PNG, empty or new")
    parser.add_argument("--source", choices=("cam", "segmentation"), default="cam", help="(default: %(default)s)")
    parser.add_argument(
        "--refinement",
        choices=("par", "crf"),
        default="par",
        help="pixel-adaptive, or CRF (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set written before")


def run(arguments: argparse.Namespace) -> int:
    model, processor = load_model(arguments.model)
    how = PseudoLabelling(arguments.source, arguments.refinement)
    summary = pseudo_label(
        model,
        processor,
        arguments.data,
        arguments.split,
        arguments.output,
        how,
        masks=arguments.masks,
        overwrite=arguments.overwrite,
    )
    print(summary)
    return 1 if any(split.dropped for split in summary.splits) else 0
