"""What happens between the steps of a run."""

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
