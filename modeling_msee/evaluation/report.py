"""What a result file says beside the scores, and writing and printing it once for all processes."""

import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .. import __version__
from .evaluate import Evaluation
from .tables import format_table, write_metrics


PACKAGES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "numpy", "pillow")
CRF_PACKAGE = "pydensecrf2"


def report(
    evaluation: Evaluation,
    class_names: Sequence[str],
    output: Path | None,
    *,
    command: str,
    model: str,
    data: str,
    split: str,
) -> None:
    """Print the table and, with `output`, write the result file; in the first process alone.

    Args:
        class_names: of all K labels, the background first.
        command: what was run, from `command_line`.
        model: where the model came from or was saved.
        data, split: where the images came from.
    """
    if not PartialState().is_main_process:
        return
    if output is not None:
        header = result_header(evaluation, command=command, model=model, data=data, split=split)
        write_metrics(output, evaluation.rows, class_names, header)
    print(format_table(evaluation.rows, class_names, evaluation.protocol.title))


def result_header(evaluation: Evaluation, *, command: str, model: str, data: str, split: str) -> dict[str, Any]:
    """The fields of a result file above the scores; docs/protocols.md explains each."""
    protocol = evaluation.protocol
    packages = (*PACKAGES, CRF_PACKAGE) if protocol.crf else PACKAGES
    return {
        "protocol": protocol.name,
        "description": protocol.description,
        "settings": protocol.settings(),
        "command": command,
        "model": model,
        "data": {
            "path": data,
            "split": split,
            "images": evaluation.images,
            "fingerprint": evaluation.fingerprint,
        },
        "versions": {"msee": __version__} | {name: version(name) for name in packages},
    }


def command_line(program: str, arguments: Sequence[str]) -> str:
    """A command as a shell takes it; what follows an option that ends in `token` is left out."""
    words = [program]
    hide = False
    for word in arguments:
        option, equals, _ = word.partition("=")
        secret = option.startswith("-") and option.endswith("token")
        words.append("***" if hide else f"{option}=***" if secret and equals else word)
        hide = secret and not equals
    return shlex.join(words)
