"""What the commands share: arguments for a model and a data set, and loading them."""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..data.contract import check_class_names, load_split
from ..evaluation.protocols import PROTOCOLS, Protocol, find_protocol
from ..evaluation.samples import EvaluationSamples
from ..inference.network import load_model
from ..inference.pictures import Picture, choose_pictures
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation


MODEL_HELP = "a checkpoint folder or a Hub repository"
DATA_HELP = "a data set as datasets_scripts writes it, or a Hub repository"


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_scored_data` reads."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--split", default="validation", help="split with masks (default: %(default)s)")


def add_figure_data(parser: argparse.ArgumentParser, count: int) -> None:
    """The arguments of commands that draw images of a split: those that `load_pictures` reads, and the output."""
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--split", default="validation", help="masks are drawn if it has any (default: %(default)s)")
    parser.add_argument("--count", type=int, default=count, help="number of images (default: %(default)s)")
    parser.add_argument("--min-classes", type=int, default=0, help="only images with at least as many classes")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")


def add_protocol(parser: argparse.ArgumentParser, default: str) -> None:
    """The arguments that `chosen_protocol` reads, and the number of worker processes."""
    parser.add_argument(
        "--protocol", default=default, metavar="NAME", help=f"one of {', '.join(PROTOCOLS)} (default: %(default)s)"
    )
    parser.add_argument("--crf", action="store_true", help="the same as the ending -crf of the protocol's name")
    parser.add_argument(
        "--crf-workers", type=int, default=2, metavar="N", help="processes for the dense CRF (default: %(default)s)"
    )


def chosen_protocol(arguments: argparse.Namespace) -> Protocol:
    """The protocol asked for; ValueError if there is no such one."""
    return find_protocol(arguments.protocol, arguments.crf)


def process_state() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started, and its device."""
    # Left to itself, the library forms no group of processes on the CPU: each would do the whole work.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def load_pictures(arguments: argparse.Namespace, model: MSEEForWeaklySupervisedSegmentation) -> list[Picture]:
    """The images to draw, evenly spaced over a split that has the model's classes."""
    dataset = load_split(arguments.data, arguments.split)
    check_class_names(dataset, model.config.label_names, arguments.data)
    return choose_pictures(dataset, arguments.count, arguments.min_classes)


def load_scored_data(
    arguments: argparse.Namespace,
) -> tuple[MSEEForWeaklySupervisedSegmentation, EvaluationSamples]:
    """The model and a split with masks that has the model's classes."""
    model, processor = load_model(arguments.model)
    dataset = load_split(arguments.data, arguments.split)
    check_class_names(dataset, model.config.label_names, arguments.model)
    return model, EvaluationSamples(dataset, processor)
