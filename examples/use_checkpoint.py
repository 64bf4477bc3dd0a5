"""Segment one image with a trained checkpoint, through the library's own pipeline.

    python examples/use_checkpoint.py outputs/demo outputs/shapes

The second argument is an image file, or a data set folder, whose first validation image is then used.
"""

import sys
from pathlib import Path

import numpy as np
from transformers import pipeline

import modeling_msee  # noqa: F401  registers the model with the Auto classes
from modeling_msee.data.contract import load_split, read_rgb


def main(checkpoint: str, source: str) -> None:
    image = read_rgb(load_split(source, "validation")[0]) if Path(source).is_dir() else source
    # The package is here, so the copy of its code in the checkpoint is not needed.
    segmenter = pipeline("image-segmentation", model=checkpoint, trust_remote_code=False)
    for segment in segmenter(image):
        share = np.asarray(segment["mask"]).astype(bool).mean()
        print(f"{segment['label']:<20} {100 * share:5.1f} % of the image")


if __name__ == "__main__":
    main(*sys.argv[1:3])
