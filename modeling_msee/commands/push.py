"""`msee push`: publish a checkpoint on the Hub, and a Space that shows it."""

import argparse

from ..hub.push import push_checkpoint, push_space


HELP = "publish a checkpoint on the Hub"


def add_target(parser: argparse.ArgumentParser) -> None:
    """Where to: the arguments that all pushes have."""
    parser.add_argument("repo_id", help="owner/name, or a name in your own account; created if it is not there")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", dest="private", action="store_true", help="only you can see it")
    visibility.add_argument("--public", dest="private", action="store_false", help="everybody can see it")
    parser.set_defaults(private=None)  # as the account's new repositories are
    parser.add_argument("--revision", help="branch, created if it is not there (default: main)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a checkpoint folder")
    add_target(parser)
    parser.add_argument("--space", action="store_true", help="also publish a Space of that name: upload, CAM and mask")


def run(arguments: argparse.Namespace) -> int:
    if arguments.space and arguments.revision is not None:
        raise ValueError("--space shows the branch main; leave out --revision, or push without --space.")
    target = (arguments.repo_id, arguments.private)
    print(f"Published: {push_checkpoint(arguments.folder, *target, arguments.revision)}")
    if arguments.space:
        print(f"Published: {push_space(*target)}")
    return 0
