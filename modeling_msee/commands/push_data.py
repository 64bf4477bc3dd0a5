"""`msee push-data`: publish a Parquet data set on the Hub."""

import argparse

from ..hub.push import push_dataset
from .push import add_target


HELP = "publish a data set on the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a data set as datasets_scripts writes it")
    add_target(parser)


def run(arguments: argparse.Namespace) -> int:
    print(f"Published: {push_dataset(arguments.folder, arguments.repo_id, arguments.private, arguments.revision)}")
    return 0
