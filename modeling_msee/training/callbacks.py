"""What happens between the steps of a run."""

import signal
import threading

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from .samples import EpochSampler


class AveragedHead(TrainerCallback):
    """Moves the averaged projection head after every optimiser step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.update_averaged_projection()


class SampleOrder(TrainerCallback):
    """Tells the sampler its epoch; where several processes resume within one, the library does not."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


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
