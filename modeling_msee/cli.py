"""The `msee` command: what people do with a trained model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .data.contract import check_class_names, load_split
from .evaluation.evaluate import PROTOCOL, evaluate
from .evaluation.samples import EvaluationSamples
from .evaluation.tables import format_table, write_metrics
from .hub.convert import convert_toco_checkpoint
from .image_processing_msee import MSEEImageProcessor
from .inference.explain import explain
from .inference.figures import figure_rows
from .modeling_msee import MSEEForWeaklySupervisedSegmentation


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 and a message on standard error for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="msee", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("model", help="a checkpoint folder or a Hub repository")
    shared.add_argument("--data", required=True, help="a data set as datasets_scripts writes it, or a Hub repository")
    shared.add_argument("--split", default="validation", help="split with masks (default: %(default)s)")

    scoring = commands.add_parser("evaluate", parents=[shared], help="print and write mIoU of CAM, Seg and Seg + CRF")
    scoring.add_argument("--crf", action="store_true", help="also score the segmentation after dense CRF")
    scoring.add_argument("--output", type=Path, help="JSON file for the results")
    scoring.set_defaults(run=_evaluate)

    drawing = commands.add_parser(
        "figures", parents=[shared], help="draw image, CAMs, regions, labels and result in rows"
    )
    drawing.add_argument("--count", type=int, default=8, help="number of images (default: %(default)s)")
    drawing.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    drawing.set_defaults(run=_figures)

    converting = commands.add_parser("convert", help="turn weights of the published baseline (ToCo) into a checkpoint")
    converting.add_argument("weights", type=Path, help="the .pth file, or an .npz of the same state dict")
    converting.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    converting.add_argument("--num-attention-heads", type=int, help="of the encoder (default: one per 64 channels)")
    converting.add_argument("--class-names", nargs="+", help="of the foreground classes (default: class 1 ...)")
    converting.set_defaults(run=_convert)
    return parser


def _load(arguments: argparse.Namespace) -> tuple[MSEEForWeaklySupervisedSegmentation, EvaluationSamples]:
    try:
        model = MSEEForWeaklySupervisedSegmentation.from_pretrained(arguments.model).eval()
        processor = MSEEImageProcessor.from_pretrained(arguments.model)
    except OSError as error:
        if Path(arguments.model).is_dir():
            raise
        raise FileNotFoundError(
            f"{arguments.model}: expected a checkpoint folder or a Hub repository. "
            f"There is no such folder here, and as a Hub repository: {error}"
        ) from error
    dataset = load_split(arguments.data, arguments.split)
    check_class_names(dataset, model.config.label_names, arguments.model)
    return model, EvaluationSamples(dataset, processor)


def _evaluate(arguments: argparse.Namespace) -> None:
    model, samples = _load(arguments)
    results = evaluate(model, samples, crf=arguments.crf)
    names = model.config.label_names
    if arguments.output is not None:
        write_metrics(arguments.output, results, names, PROTOCOL)
    print(format_table(results, names, PROTOCOL))


def _figures(arguments: argparse.Namespace) -> None:
    model, samples = _load(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(samples) - 1, min(arguments.count, len(samples))).round().astype(int)
    rows, present = [], {0}
    for index in tqdm(chosen.tolist(), desc="Drawing"):
        sample = samples[index]
        target = sample["segmentation_map"].numpy()
        rows.append(explain(model, samples.processor, samples.image(index), sample["labels"], target))
        present |= {int(label) + 1 for label in sample["labels"].nonzero()}
    names = {value: model.config.label_names[value] for value in sorted(present)} | {255: "ignored"}
    path = arguments.output / f"{arguments.split}.png"
    figure_rows(rows, names, path, f"{Path(arguments.model).name} on {arguments.split}")
    print(f"Written to {path}")


def _convert(arguments: argparse.Namespace) -> None:
    model = convert_toco_checkpoint(arguments.weights, arguments.num_attention_heads, arguments.class_names)
    model.save_pretrained(arguments.output)
    MSEEImageProcessor(patch_size=model.config.patch_size).save_pretrained(arguments.output)
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
