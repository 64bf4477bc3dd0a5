"""Train M-SEE from image-level labels.

    python train_msee.py configuration/demo.yaml
    python train_msee.py configuration/tags.yaml --dataset outputs/my-photos --max_steps 400
    accelerate launch --num_processes 4 train_msee.py configuration/voc.yaml

Every field of a recipe can be overridden as `--field value`; `--help` lists all of them. A run that was stopped goes
on from the last checkpoint in its `output_dir` when started again; `--resume_from_checkpoint false` starts anew.
"""

import sys
from dataclasses import fields
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.configuration_msee import label_fields
from modeling_msee.data.contract import check_class_names, class_names, load_split, without_bad_images
from modeling_msee.evaluation.evaluate import evaluate
from modeling_msee.evaluation.protocols import MSEE
from modeling_msee.evaluation.report import command_line, report
from modeling_msee.evaluation.samples import EvaluationSamples
from modeling_msee.training.arguments import (
    DataArguments,
    ModelArguments,
    MSEETrainingArguments,
    Recipe,
    method_fields,
    parse_recipe,
    written_recipe,
)
from modeling_msee.training.augmentation import TrainingAugmentation
from modeling_msee.training.samples import TrainingSamples
from modeling_msee.training.sigterm import leaving_on_sigterm
from modeling_msee.training.trainer import MSEETrainer


def main(arguments: list[str]) -> None:
    recipe = parse_recipe(arguments)
    training = recipe.training
    set_seed(training.seed)  # before the heads are drawn
    dataset = load_data(recipe.data, recipe.data.train_split, ["image"])
    model = build_model(recipe, class_names(dataset))
    processor = build_processor(recipe.data, model.config)
    augmentation = TrainingAugmentation(
        crop_size=recipe.data.crop_size,
        rescale=(recipe.data.rescale_min, recipe.data.rescale_max),
        local_crop_count=model.config.local_crop_count,
        mean=model.config.image_mean,
        std=model.config.image_std,
    )
    samples = None
    if recipe.data.eval_split != "none":
        scored = load_data(recipe.data, recipe.data.eval_split, ["image", "segmentation_map"])
        check_class_names(scored, class_names(dataset), f"split {recipe.data.train_split!r}")
        samples = EvaluationSamples(scored, processor)
    trainer = MSEETrainer(
        model=model,
        args=training,
        train_dataset=TrainingSamples(dataset, augmentation, training.seed),
        eval_dataset=samples,
        processing_class=processor,
    )
    write_recipe(recipe, trainer)
    trainer.train(resume_from_checkpoint=training.start())
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step >= steps:
        finish(trainer, samples, recipe.data, command_line(Path(__file__).name, arguments))
    elif trainer.is_world_process_zero():
        print(f"Stopped after step {step} of {steps}; the same command goes on.")
    trainer.accelerator.end_training()  # else gloo's threads outlive the interpreter, and may abort


def load_data(data: DataArguments, split: str, columns: list[str]) -> Dataset:
    """One split; with `skip_bad_images` without the samples that have a broken file in one of the columns."""
    dataset = load_split(data.dataset, split)
    if data.skip_bad_images:
        dataset, messages = without_bad_images(dataset, columns)
        print("\n".join([*messages, f"{split}: skipped {len(messages)} images that cannot be read."]))
    return dataset


def build_model(recipe: Recipe, names: list[str]) -> MSEEForWeaklySupervisedSegmentation:
    """The model of a recipe for the given class names, background first."""
    config_fields = recipe.config_fields | label_fields(names)
    if recipe.model.model is not None:
        config = MSEEConfig.from_pretrained(recipe.model.model, **recipe.config_fields)
        if config.label_names != names:
            raise ValueError(
                f"{recipe.model.model} was trained for {config.num_labels} labels ({', '.join(config.label_names)}), "
                f"the data set has {len(names)} ({', '.join(names)}). Start from a backbone instead."
            )
        model = MSEEForWeaklySupervisedSegmentation.from_pretrained(recipe.model.model, config=config)
    elif recipe.model.backbone is not None:
        model = MSEEForWeaklySupervisedSegmentation.from_backbone(recipe.model.backbone, **config_fields)
    else:
        model = MSEEForWeaklySupervisedSegmentation(MSEEConfig(**config_fields))
    model.freeze_backbone_layers(recipe.model.frozen_backbone_layers)
    return model


def build_processor(data: DataArguments, config: MSEEConfig) -> MSEEImageProcessor:
    """The image processor that evaluation and inference use."""
    size = None if data.eval_size is None else {"shortest_edge": data.eval_size}
    return MSEEImageProcessor(
        patch_size=config.patch_size, size=size, image_mean=list(config.image_mean), image_std=list(config.image_std)
    )


def write_recipe(recipe: Recipe, trainer: MSEETrainer) -> None:
    """Keep what was run beside its results."""
    if trainer.is_world_process_zero():
        output = Path(trainer.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.yaml").write_text(written_recipe(recipe.values), encoding="utf-8")


def finish(trainer: MSEETrainer, samples: EvaluationSamples | None, data: DataArguments, command: str) -> None:
    """Save, score and describe the trained model."""
    trainer.save_model()
    trainer.save_state()
    saved = f"Stopped after the training: {trainer.args.output_dir} holds the model, which `msee evaluate` can score."
    with leaving_on_sigterm(saved):
        if samples is not None:
            score(trainer, samples, data, command)
        trainer.create_model_card()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()


def score(trainer: MSEETrainer, samples: EvaluationSamples, data: DataArguments, command: str) -> None:
    """Score the trained model and print and write the table."""
    model, output = trainer.whole_model(), trainer.args.output_dir
    result = evaluate(model, samples, MSEE.with_crf if trainer.args.crf else MSEE)
    path, origin = Path(output) / "metrics.json", {"model": output, "data": data.dataset, "split": data.eval_split}
    report(result, model.config.label_names, path, command=command, **origin)


def usage() -> str:
    """The head of this file and every field of a recipe."""
    lines = [str(__doc__)]
    for cls in (DataArguments, ModelArguments, MSEETrainingArguments):
        lines.append(f"{cls.__name__}: {', '.join(item.name for item in fields(cls) if item.init)}\n")
    lines.append(f"{MSEEConfig.__name__}: {', '.join(method_fields())}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv or "-h" in sys.argv:
        print(usage())
    else:
        main(sys.argv[1:])
