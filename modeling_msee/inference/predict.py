"""Segment images from anywhere with a checkpoint or an ONNX file, and write what was found."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..data.files import whole_file
from .legend import with_legend
from .masks import overlay, reduced_picture, save_palette_png
from .network import PRESENT, Segmenter, load_model, torch_segmenter
from .onnx_file import onnx_segmenter
from .prediction_figures import draw_activation_maps, draw_regions
from .segment import Prediction, segment
from .sources import Unreadable, collect_sources


LARGEST_OVERLAY = 2048  # pixels a side


# Draws what was found in an image, for classes with a title each, into a file.
Draw = Callable[[Prediction, Mapping[int, str], Path], None]


@dataclass(frozen=True)
class PredictionReport:
    """What `predict` did: the folder, the number of images written, and those skipped."""

    output: Path
    written: int
    unreadable: tuple[Unreadable, ...]


def predict(
    model: str | Path,
    images: Iterable[str | Path | Image.Image],
    output: str | Path,
    batch_size: int = 4,
    cams: bool = False,
    regions: bool = False,
) -> PredictionReport:
    """Segment images and write, under `output`:

    - `masks/NAME.png`: indexed PNG of the image's size, 0 the background, c + 1 class c;
    - `overlays/NAME.jpg`: the image (at most 2048 pixels a side) tinted by class, with a legend;
    - `scores.jsonl`: a line for each image, with the image-level probability of every class, the share of the pixels
      of every class found, and the names of the files;
    - `cams/NAME.png` if `cams`: the multi-scale CAM of each class that the classifier predicts (the most probable one
      if none reaches 0.5);
    - `regions/NAME.png` if `regions`: the reliable regions B^l and B^s (Eq. 3, 4) of these classes.

    An image that cannot be read is skipped and reported. Results appear image by image, each file whole. To have
    predictions in memory instead, call `segment(load_segmenter(model), collect_sources(images))`.

    Args:
        model: a checkpoint folder, a Hub repository, or a `.onnx` file that `msee export` wrote.
        images: as `collect_sources` takes them: files, folders, globs, URLs, pictures in memory.
        output: a folder that is empty or not there yet.
        batch_size: largest number of images, of equal size at the network, that share a pass.

    Raises:
        FileNotFoundError: no such model, or a name that stands for no image.
        FileExistsError: the output folder is not empty.
        ValueError: CAMs or regions of an ONNX file.
        ImportError: onnxruntime is needed and missing, or matplotlib for CAMs and regions.
    """
    output = Path(output)
    sources = collect_sources(images)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder: choose another output.")
    segmenter = load_segmenter(model)
    figures = _figures(segmenter, model, cams, regions)
    output.mkdir(parents=True, exist_ok=True)
    written, unreadable = 0, []
    with (
        (output / "scores.jsonl").open("w", encoding="utf-8") as scores,
        tqdm(total=len(sources), desc="Predicting", unit="image") as progress,
    ):
        for result in segment(segmenter, sources, batch_size):
            progress.update()
            if isinstance(result, Unreadable):
                unreadable.append(result)
                continue
            files = _write_files(result, segmenter.class_names, figures, output)
            print(json.dumps(_scores(result, segmenter.class_names) | files, ensure_ascii=False), file=scores)
            scores.flush()
            written += 1
    return PredictionReport(output, written, tuple(unreadable))


def load_segmenter(model: str | Path) -> Segmenter:
    """A `.onnx` file, or a checkpoint folder or Hub repository on this machine's device; errors as in `predict`."""
    if Path(model).suffix == ".onnx":
        return onnx_segmenter(model)
    network, processor = load_model(str(model))
    return torch_segmenter(network.to(PartialState().device), processor)


def _figures(segmenter: Segmenter, model: str | Path, cams: bool, regions: bool) -> dict[str, Draw]:
    """Functions that draw what was asked for beyond masks, by the folder it goes to."""
    if not cams and not regions:
        return {}
    if segmenter.model is None:
        raise ValueError(f"{model}: CAMs and regions need the checkpoint; an ONNX file holds the inference path only.")
    figures: dict[str, Draw] = {}
    if cams:
        figures["cams"] = partial(draw_activation_maps, segmenter.model)
    if regions:
        figures["regions"] = partial(draw_regions, segmenter.model)
    return figures


def _scores(prediction: Prediction, class_names: Sequence[str]) -> dict[str, Any]:
    """A line of `scores.jsonl`."""
    height, width = prediction.segmentation.shape
    probabilities = zip(class_names[1:], prediction.probabilities.tolist(), strict=True)
    shares = zip(class_names, prediction.shares.tolist(), strict=True)
    return {
        "source": str(prediction.source),
        "width": width,
        "height": height,
        "probabilities": {name: round(value, 4) for name, value in probabilities},
        "pixel_shares": {name: round(value, 4) for name, value in shares if value > 0},
    }


def _write_files(
    prediction: Prediction, class_names: Sequence[str], figures: Mapping[str, Draw], output: Path
) -> dict[str, str]:
    """Write the files of one image; their paths within the output folder by kind."""
    name, segmentation = prediction.source.name, prediction.segmentation
    small = reduced_picture(prediction.picture, LARGEST_OVERLAY)
    labels = Image.fromarray(segmentation).resize((small.shape[1], small.shape[0]), Image.Resampling.NEAREST)
    shares = {value: prediction.shares[value] for value in np.flatnonzero(prediction.shares).tolist() if value > 0}
    entries = {value: f"{class_names[value]} {_percent(share)}" for value, share in shares.items()}
    shown = with_legend(overlay(small, np.asarray(labels)), entries or {0: "only background"})
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "masks": (".png", partial(save_palette_png, segmentation)),
        "overlays": (".jpg", partial(Image.fromarray(shown).save, format="JPEG", quality=92)),
    }
    found = np.flatnonzero(prediction.probabilities >= PRESENT).tolist() or [int(prediction.probabilities.argmax())]
    titles = {c: f"{class_names[c + 1]} {prediction.probabilities[c]:.2f}" for c in found}
    for kind, draw in figures.items():
        writers[kind] = (".png", partial(draw, prediction, titles))
    files = {}
    for kind, (suffix, write) in writers.items():
        files[kind.removesuffix("s")] = f"{kind}/{name}{suffix}"
        with whole_file(output / kind / f"{name}{suffix}") as path:
            write(path)
    return files


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
