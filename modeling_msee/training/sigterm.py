"""What a run does when the machine asks it to stop (SIGTERM)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback


class SaveOnSigterm(TrainerCallback):
    """When the machine asks to stop, ends the running step, saves and leaves.

    The library's own way saves before the optimiser step, with the random state of after it: a resumed run differs.
    """

    def __init__(self):
        self.asked = False
        self.previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self.previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._anyone_asked(args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

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

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _Asked:
        if PartialState().is_main_process:
            print(message)
    finally:
        signal.signal(signal.SIGTERM, previous)
