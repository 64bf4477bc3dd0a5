"""`msee evaluate`: print and write mIoU of CAM, Seg and Seg + CRF under a named protocol."""

import argparse
from pathlib import Path

from ..evaluation.evaluate import evaluate
from ..evaluation.report import report
from .common import add_model_and_data, add_protocol, chosen_protocol, load_scored_data, process_state


HELP = "print and write mIoU of CAM, Seg and Seg + CRF under a named protocol"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data(parser)
    add_protocol(parser, default="msee")
    parser.add_argument("--output", type=Path, help="JSON file for the results")


def run(arguments: argparse.Namespace) -> int:
    protocol = chosen_protocol(arguments)
    model, samples = load_scored_data(arguments)
    result = evaluate(model.to(process_state().device), samples, protocol, arguments.crf_workers)
    report(
        result,
        model.config.label_names,
        arguments.output,
        command=arguments.command_line,
        model=arguments.model,
        data=arguments.data,
        split=arguments.split,
    )
    return 0
