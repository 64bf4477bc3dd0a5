"""`msee evaluate`: print and write mIoU of CAM, Seg and Seg + CRF."""

import argparse
from pathlib import Path

from ..evaluation.evaluate import PROTOCOL, evaluate
from ..evaluation.tables import format_table, write_metrics
from .common import add_model_and_data, load_scored_data


HELP = "print and write mIoU of CAM, Seg and Seg + CRF"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser)
    parser.add_argument("--crf", action="store_true", help="also score the segmentation after dense CRF")
    parser.add_argument("--output", type=Path, help="JSON file for the results")


def run(arguments: argparse.Namespace) -> int:
    model, samples = load_scored_data(arguments)
    results = evaluate(model, samples, crf=arguments.crf)
    names = model.config.label_names
    if arguments.output is not None:
        write_metrics(arguments.output, results, names, PROTOCOL)
    print(format_table(results, names, PROTOCOL))
    return 0
