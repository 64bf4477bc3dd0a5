"""Which checkpoints are whole: a run never goes on from one that was half-written when the power went."""

import os
import re
from pathlib import Path


MARKER = "complete"


def mark_complete(folder: str | Path) -> None:
    """Write the marker once every file of the checkpoint is on the disk."""
    folder = Path(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _to_disk(path)
    (folder / MARKER).touch()
    _to_disk(folder / MARKER)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(folder)


def _to_disk(path: Path) -> None:
    """Wait until the operating system has written the file or folder out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_complete(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in a folder; incomplete ones are named and passed over."""
    for _, path in reversed(_checkpoints(output_dir)):
        if (path / MARKER).is_file():
            return str(path)
        print(f"Passing over {path}, which was not written to its end.")
    return None


def complete_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by their step, the first one first.

    Raises:
        ValueError: there is none.
    """
    found = {step: path for step, path in _checkpoints(output_dir) if (path / MARKER).is_file()}
    if not found:
        raise ValueError(
            f"{output_dir}: expected the output folder of a run with complete folders checkpoint-N, found none. "
            "Train with --save_steps N, and with --save_total_limit null to keep all of them."
        )
    return found


def _checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint, complete or not, in order."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((int(path.name.split("-")[1]), path) for path in found)


def check_complete(folder: str | Path) -> None:
    """Raise ValueError unless there is a complete checkpoint in this folder."""
    if not (Path(folder) / MARKER).is_file():
        state = "was not written to its end" if Path(folder).is_dir() else "does not exist"
        raise ValueError(
            f"resume_from_checkpoint: {folder} {state}. Give a folder checkpoint-N of a run, or leave the field out "
            "to go on from the last complete one."
        )
