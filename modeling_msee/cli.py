"""The `msee` command: what people do with a trained model."""

import argparse
import sys
from collections.abc import Sequence

from .commands import (
    ablate,
    check_data,
    compare,
    convert,
    evaluate,
    export,
    failures,
    figures,
    predict,
    pseudo_label,
    push,
    push_data,
    regions,
    submit,
)
from .evaluation.report import command_line


# Each has HELP, add_arguments(parser) and run(arguments), which returns the exit code.
COMMANDS = {
    "check-data": check_data,
    "predict": predict,
    "pseudo-label": pseudo_label,
    "evaluate": evaluate,
    "submit": submit,
    "figures": figures,
    "compare": compare,
    "regions": regions,
    "failures": failures,
    "convert": convert,
    "export": export,
    "push": push,
    "push-data": push_data,
    "ablate": ablate,
}
# These also take any field of a recipe, `--field value`, which they check themselves.
WITH_RECIPE_FIELDS = ("ablate",)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command; what it parses has `run`, the function to call with it."""
    parser = argparse.ArgumentParser(prog="msee", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in COMMANDS.items():
        # A field of a recipe may begin like an option: `--seed` is not `--seeds`.
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.__doc__, allow_abbrev=False)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 and a message on standard error for bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    known = argparse.Namespace(command_line=command_line("msee", words))
    arguments, fields = parser.parse_known_args(words, known)
    if fields and arguments.command not in WITH_RECIPE_FIELDS:
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    arguments.fields = fields
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
