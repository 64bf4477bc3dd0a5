"""Memory of a long evaluation: resident memory of the process and of its CRF workers, image by image.

    python -m benchmarks.evaluation_memory
    python -m benchmarks.evaluation_memory --images 200 --size 375 --protocol toco-voc-crf

Generated scenes and a tiny model with random weights: what is measured is the evaluation, not the network. The share
that is backed by files (the data set, mapped into memory, and libraries) can be dropped by the system at any time
and is given apart. Linux only: reads /proc.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets_scripts import shapes
from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.configuration_msee import label_fields
from modeling_msee.data.contract import class_names, load_split
from modeling_msee.evaluation.evaluate import evaluate
from modeling_msee.evaluation.protocols import find_protocol
from modeling_msee.evaluation.samples import EvaluationSamples, ScoredSample


TINY_VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 224,
    "patch_size": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels, about")
    parser.add_argument("--protocol", default="msee-crf")
    parser.add_argument("--every", type=int, default=100, help="images between two measurements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shapes.build(Path(folder) / "shapes", train=1, validation=arguments.images, size=arguments.size)
        dataset = load_split(str(Path(folder) / "shapes"), "validation")
        fields: dict[str, Any] = label_fields(class_names(dataset))
        model = MSEEForWeaklySupervisedSegmentation(MSEEConfig(backbone_config=TINY_VIT, auxiliary_layer=-2, **fields))
        samples = MeasuredSamples(dataset, MSEEImageProcessor(patch_size=model.config.patch_size), arguments.every)
        print("image  private MB  of files MB  workers' private MB")
        evaluate(model, samples, find_protocol(arguments.protocol))
        samples.measure(arguments.images)


class MeasuredSamples(EvaluationSamples):
    """Evaluation samples that print the memory in use at every so many images."""

    def __init__(self, dataset, processor, every: int):
        super().__init__(dataset, processor)
        self.every = every

    def read(self, index: int) -> ScoredSample:
        if index % self.every == 0:
            self.measure(index)
        return super().read(index)

    def measure(self, index: int) -> None:
        status = memory(Path("/proc/self"))
        workers = sum(memory(process)["RssAnon"] for process in children())
        print(f"{index:5d}  {status['RssAnon']:10.1f}  {status['RssFile']:11.1f}  {workers:19.1f}", flush=True)


def memory(process: Path) -> dict[str, float]:
    """Resident memory of a process in MB, by kind."""
    lines = (line.split() for line in (process / "status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0].startswith("Rss")}


def children() -> Iterator[Path]:
    """The processes that this one has started."""
    for pid in Path("/proc/self/task").glob("*/children"):
        yield from (Path("/proc") / child for child in pid.read_text().split())


if __name__ == "__main__":
    main()
