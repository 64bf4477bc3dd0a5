"""What a run does when the machine asks it to stop: SIGTERM, as schedulers send it to every process of a job."""

import signal
import threading
from functools import partial

import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderAdapter
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


def with_patient_workers(loader: DataLoaderAdapter) -> DataLoaderAdapter:
    """Let the workers of a loader outlive the first SIGTERM: a dead one would end the run before it has saved."""
    base = loader.base_dataloader  # which starts them; an attribute set on the outer one does not reach it
    base.worker_init_fn = partial(_outlive_one_sigterm, base.worker_init_fn)
    return loader


def _outlive_one_sigterm(initialise, worker: int) -> None:
    """The second ends a worker: the library sends one itself to a worker that does not leave."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if initialise is not None:
        initialise(worker)
