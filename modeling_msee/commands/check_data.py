"""`msee check-data`: find what stops a training run or spoils its result in images and tags.

Reads a folder of photographs with metadata.jsonl or .csv, or a data set that has been prepared. Exit code 1 if
training on it is bound to fail; warnings do not change it.
"""

import argparse
from pathlib import Path

from ..data.check import check_data
from ..inference.contact_sheet import class_strips, contact_sheet


HELP = "check photographs and their tags before training"
PICTURES = 6  # of each class on the contact sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a folder with metadata.jsonl or .csv, a prepared data set or a Hub repository")
    parser.add_argument("--train-split", default="train", help="split to train on (default: %(default)s)")
    parser.add_argument("--separator", default=";", help="between the labels of metadata.csv (default: ;)")
    parser.add_argument(
        "--contact-sheet", type=Path, default=Path("contact_sheet.png"), help="PNG to write (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    report = check_data(arguments.path, arguments.train_split, arguments.separator)
    if arguments.train_split in report.images:
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        strips = class_strips(report, arguments.train_split, PICTURES)
        title = f"{Path(arguments.path).name}, split {arguments.train_split} (number of images tagged with each class)"
        contact_sheet(strips, arguments.contact_sheet, title)
        print(f"Contact sheet: {arguments.contact_sheet}\n")
    print(report)
    return 1 if report.problems else 0
