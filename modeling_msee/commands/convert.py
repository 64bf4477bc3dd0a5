"""`msee convert`: turn weights of the published baseline (ToCo) into a checkpoint."""

import argparse
from pathlib import Path

from ..hub.convert import convert_toco_checkpoint
from ..image_processing_msee import MSEEImageProcessor


HELP = "turn weights of the published baseline (ToCo) into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=Path, help="the .pth file, or an .npz of the same state dict")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--num-attention-heads", type=int, help="of the encoder (default: one per 64 channels)")
    parser.add_argument("--class-names", nargs="+", help="of the foreground classes (default: class 1 ...)")


def run(arguments: argparse.Namespace) -> int:
    model = convert_toco_checkpoint(arguments.weights, arguments.num_attention_heads, arguments.class_names)
    model.save_pretrained(arguments.output)
    MSEEImageProcessor(patch_size=model.config.patch_size).save_pretrained(arguments.output)
    print(f"Written to {arguments.output}")
    return 0
