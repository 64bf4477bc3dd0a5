"""`msee export`: write the inference path as an ONNX file or a torch.export program for images of any size."""

import argparse
from pathlib import Path

from ..inference.export import export
from ..inference.network import load_model
from .common import MODEL_HELP


HELP = "write the inference path as an ONNX file or a torch.export program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, help="file to write: model.onnx, or model.pt2 for torch")


def run(arguments: argparse.Namespace) -> int:
    for difference in export(*load_model(arguments.model), arguments.output):
        shape = "x".join(map(str, difference.shape))
        print(f"pixel_values {shape}: largest difference from the model {difference.value:.1e}")
    print(f"Written to {arguments.output}")
    return 0
