"""The Hugging Face Trainer with M-SEE's optimisation, step-dependent loss, logging and evaluation."""

from collections import defaultdict
from collections.abc import Sized
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

from ..evaluation.confusion import scores
from ..evaluation.protocols import MSEE
from ..evaluation.scoring import score_image
from ..hub.card import write_model_card
from ..hub.push import create_repository, push_checkpoint
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .arguments import MSEETrainingArguments
from .callbacks import AveragedHead, SampleOrder
from .checkpoints import mark_complete
from .samples import EpochSampler
from .schedule import learning_rate_factor, parameter_groups
from .sigterm import SaveOnSigterm
from .workers import with_patient_workers


class MSEETrainer(Trainer):
    """Trains [`MSEEForWeaklySupervisedSegmentation`] on `TrainingSamples` and scores it on `EvaluationSamples`."""

    args: MSEETrainingArguments
    scored_model: MSEEForWeaklySupervisedSegmentation  # during an evaluation

    hub_model_id: str | None  # type: ignore[assignment]  # declared as None in the library

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args,
            data_collator=collate,
            compute_metrics=StreamingScores(),
            callbacks=[AveragedHead(), SaveOnSigterm()],
            **kwargs,
        )
        self.term_sums: dict[str, Tensor] = {}
        self.term_counts: dict[str, int] = defaultdict(int)

    def create_accelerator_and_postprocess(self):
        """Where the weights are sharded, half precision comes from autocast alone, as everywhere else.

        The library would also cast the weights and all inputs: images and the draws of the local views.
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def get_train_dataloader(self):
        return with_patient_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return with_patient_workers(super().get_eval_dataloader(eval_dataset))

    def create_optimizer(self, model=None):
        """AdamW on two groups, encoder and heads (§5.1)."""
        model = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = parameter_groups(
            model, self.args.learning_rate, self.args.head_learning_rate_multiplier, self.args.weight_decay
        )
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The reference's warm-up and polynomial decay."""
        optimizer = self.optimizer if optimizer is None else optimizer
        if optimizer is None:
            raise ValueError("expected an optimizer, got None; call create_optimizer first.")
        warmup = self.args.get_warmup_steps(num_training_steps)
        self.lr_scheduler = LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, warmup, num_training_steps),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss at the current optimiser step."""
        outputs = model(**inputs, step=self.state.global_step)
        self._remember({**outputs.losses, **(outputs.diagnostics or {})})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _remember(self, terms: dict[str, Tensor]) -> None:
        """Add up terms until the next log, on the device, so that nothing waits."""
        for name, value in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0.0) + value.detach().float()
            self.term_counts[name] += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of every term since the last time, over all processes."""
        if "loss" in logs and self.term_sums:
            means = torch.stack([total / self.term_counts[name] for name, total in self.term_sums.items()])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs = {
                **logs,
                **{f"loss_{name}": mean for name, mean in zip(self.term_sums, means, strict=True)},
            }
            self.term_sums, self.term_counts = {}, defaultdict(int)
        super().log(logs, start_time)

    def whole_model(self) -> MSEEForWeaklySupervisedSegmentation:
        """The model with all its weights, which any process can use alone: a copy where they are sharded."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return model
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        with torch.random.fork_rng(devices=[]):
            whole = MSEEForWeaklySupervisedSegmentation(model.config)
        whole.load_state_dict(weights)
        return whole.to(self.args.device).eval()  # type: ignore[arg-type]  # the library wraps `to` without its types

    def evaluation_loop(self, *args, **kwargs):
        """Scores of a split; processes may have different numbers of images."""
        self.scored_model = self.whole_model()
        output = super().evaluation_loop(*args, **kwargs)
        del self.scored_model
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Confusion matrices (B, 3, K, K) of a batch; images may differ in size, so they are scored one by one."""
        inputs = self._prepare_inputs(inputs)
        matrices = []
        with self.compute_loss_context_manager():
            for index, pixel_values in enumerate(inputs["pixel_values"]):
                target, labels = inputs["segmentation_map"][index], inputs["labels"][index][None]
                views = {1.0: pixel_values[None]}
                matrices.append(score_image(self.scored_model, views, labels, target, MSEE).matrices)
        stacked = torch.from_numpy(np.stack(matrices)).to(self.args.device)
        return None, stacked, inputs["labels"]

    def _save(self, output_dir=None, state_dict=None):
        """Sharding gives the model a class of its own, under which nobody could load it: save as the class it had."""
        model = self.model
        if self.is_fsdp_enabled:
            with torch.device("meta"):
                self.model = MSEEForWeaklySupervisedSegmentation(model.config)
        super()._save(output_dir, state_dict)
        self.model = model

    def _save_checkpoint(self, model, trial):
        """A checkpoint that says of itself that it is whole."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save without publishing, which `push_to_hub` does once, when the results are there too."""
        super().save_model(output_dir, _internal_call=True)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Create the repository before the training, so that a wrong token costs no run."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = create_repository(name, "model", private, token)

    def create_model_card(self):  # type: ignore[override]  # nothing of what the library asks for is needed
        """Write README.md of the output folder."""
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir, self.hub_model_id)

    def push_to_hub(  # type: ignore[override]  # one commit with one message, and it is waited for
        self, token: str | None = None, revision: str | None = None, private: bool | None = None
    ) -> None:
        """Publish the output folder as `msee push` does, and print its address.

        Raises:
            ValueError, PermissionError, ConnectionError: as `push_checkpoint`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if self.hub_model_id is not None:  # in the first process
            revision = self.args.hub_revision if revision is None else revision
            address = push_checkpoint(self.args.output_dir, self.hub_model_id, revision=revision, token=token)
            print(f"Published: {address}")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(train_dataset, Sized):
            raise TypeError(f"train_dataset: expected one with a length, got {type(train_dataset).__name__}.")
        sampler = EpochSampler(len(train_dataset), self.args.effective_batch_size, self.args.seed)
        self.remove_callback(SampleOrder)
        self.add_callback(SampleOrder(sampler))
        return sampler


class StreamingScores:
    """Adds up confusion matrices batch by batch and gives the mean IoUs at the end."""

    def __init__(self):
        self.total: Tensor | None = None

    def __call__(self, batch: EvalPrediction, compute_result: bool) -> dict[str, float]:
        # Declared as an array; tensors arrive here because of `batch_eval_metrics`.
        matrices = torch.as_tensor(batch.predictions).sum(dim=0)
        self.total = matrices if self.total is None else self.total + matrices
        if not compute_result:
            return {}
        total, self.total = self.total.cpu().numpy(), None
        metrics = {}
        for name, matrix in zip(MSEE.row_names, total, strict=True):
            key, result = name.lower().replace(" ", "_"), scores(matrix)
            metrics[f"{key}_miou"] = result["mean_iou"]
            metrics[f"{key}_pixel_accuracy"] = result["pixel_accuracy"]
        metrics["pixels"] = result["pixels"]
        return metrics


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Stack what has one shape; images and label maps of an evaluation batch stay lists."""
    uneven = {"pixel_values", "segmentation_map"} if "segmentation_map" in samples[0] else set()
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: values if name in uneven else torch.stack(values) for name, values in columns.items()}
