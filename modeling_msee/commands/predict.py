"""`msee predict`: segment images with a checkpoint or an ONNX file."""

import argparse
import sys
from pathlib import Path

from ..inference.predict import predict
from .common import MODEL_HELP


HELP = "segment images: masks, overlays with a legend, scores of each class"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"{MODEL_HELP}, or a .onnx file of `msee export`")
    parser.add_argument("images", nargs="+", help="image files, folders, globs (in quotes) or URLs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results, empty or new")
    parser.add_argument("--cams", action="store_true", help="also draw the CAM of every class predicted")
    parser.add_argument("--regions", action="store_true", help="also draw the reliable regions, Eq. 3 and 4")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="images of one size that share a pass (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    report = predict(
        arguments.model,
        arguments.images,
        arguments.output,
        batch_size=arguments.batch_size,
        cams=arguments.cams,
        regions=arguments.regions,
    )
    print(f"{report.written} images written to {report.output}")
    if not report.unreadable:
        return 0
    print(f"error: {len(report.unreadable)} images skipped:", file=sys.stderr)
    for skipped in report.unreadable:
        print(f"  {skipped.source}: {skipped.reason}", file=sys.stderr)
    return 1
