"""What a run does when the machine asks it to stop (SIGTERM)."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback


Handler = Callable[[int, FrameType | None], Any] | int | None  # as `signal` has them


def _handle(handler: Handler) -> Handler:
    """Give SIGTERM this handler and return the one before; None in a thread, where Python allows no handler."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if in_main_thread else None


@contextmanager
def handling_sigterm(handler: Handler) -> Iterator[None]:
    """SIGTERM calls the handler until the block ends."""
    previous = _handle(handler)
    try:
        yield
    finally:
        if previous is not None:
            _handle(previous)


class SaveOnSigterm(TrainerCallback):
    """When the machine asks to stop, ends the running step, saves and leaves.

    The library's own way saves before the optimiser step, with the random state of after it: a resumed run differs.
    """

    def __init__(self):
        self.asked = False
        self.previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = _handle(self._remember)

    def _remember(self, number, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._anyone_asked(args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.previous is not None:
            _handle(self.previous)

    def _anyone_asked(self, device: torch.device) -> bool:
        """The signal reaches processes in different steps; all stop after the same one."""
        if PartialState().num_processes == 1:
            return self.asked
        return bool(reduce(torch.tensor(float(self.asked), device=device), reduction="sum") > 0)


class _Asked(BaseException):
    """SIGTERM came."""


@contextmanager
def leaving_on_sigterm(message: str) -> Iterator[None]:
    """SIGTERM ends the block, whatever it is doing, and the message is printed by the first process."""

    def leave(number, frame):
        raise _Asked

    try:
        with handling_sigterm(leave):
            yield
    except _Asked:
        if PartialState().is_main_process:
            print(message)
