"""What the commands share: arguments for a model and a data set, and loading them."""

import argparse

from ..data.contract import check_class_names, load_split
from ..evaluation.samples import EvaluationSamples
from ..inference.network import load_model
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation


MODEL_HELP = "a checkpoint folder or a Hub repository"
DATA_HELP = "a data set as datasets_scripts writes it, or a Hub repository"


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that `load_scored_data` reads."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--split", default="validation", help="split with masks (default: %(default)s)")


def load_scored_data(
    arguments: argparse.Namespace,
) -> tuple[MSEEForWeaklySupervisedSegmentation, EvaluationSamples]:
    """The model and a split with masks that has the model's classes."""
    model, processor = load_model(arguments.model)
    dataset = load_split(arguments.data, arguments.split)
    check_class_names(dataset, model.config.label_names, arguments.model)
    return model, EvaluationSamples(dataset, processor)
