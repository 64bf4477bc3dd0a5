"""Pseudo masks of a data set with image-level tags, for training any segmentation model."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..activation_msee import IGNORE_INDEX, activation_to_labels
from ..data.contract import check_class_names, load_split, multi_hot, read_rgb
from ..data.examples import Example, Split, encode_png
from ..data.tags import relative_path
from ..data.writer import Summary, check_output, staging_folder, write_dataset
from ..evaluation.crf import CRFPool
from ..image_processing_msee import MSEEImageProcessor, resize_labels
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .masks import save_palette_png
from .network import PRESENT
from .segment import network_size, processor_of_size


# Certainty of a hard label in the unary term of the CRF, as in IRN's published code (Ahn et al., CVPR 2019).
CRF_CERTAINTY = 0.7


@dataclass(frozen=True)
class PseudoLabelling:
    """How masks are made.

    Args:
        source: `cam`, the multi-scale activation maps; or `segmentation`, the decoder's probabilities (one scale),
            with the classes that are not in the image left out.
        refinement: `par`, pixel-adaptive refinement at the size of the network, as in training; or `crf`, two dense
            CRFs at the size of the image, from the labels that either threshold gives.
        crf_workers: processes of the CRF.

    Either way a pixel is a class above `config.high_threshold`, background at or below `config.low_threshold`, and
    255 (ignored) between, after refinement.
    """

    source: Literal["cam", "segmentation"] = "cam"
    refinement: Literal["par", "crf"] = "par"
    crf_workers: int = 2


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One row: its id, image file, picture (RGB, upright), foreground classes, and its maps.

    `maps` is (1, K - 1, h, w) in [0, 1] on the grid of `pixel_values` (1, 3, h, w); `hot` the classes, (1, K - 1).
    """

    image_id: str
    file: bytes
    picture: Image.Image
    pixel_values: Tensor
    hot: Tensor
    maps: Tensor


def pseudo_label(
    model: MSEEForWeaklySupervisedSegmentation,
    processor: MSEEImageProcessor,
    data: str,
    split: str,
    output: Path,
    how: PseudoLabelling | None = None,
    masks: Path | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write the images of a split with masks made by the model: Parquet with `image_id`, `image`, `labels`, `label`.

    `label` is a PNG of the image's size with 0 the background, c + 1 class c and 255 ignored. `labels` are the classes
    it was made for: the data set's tags, or, where no image of the split has any, the classes that the classifier
    predicts. Images that cannot be read are left out and counted in the summary.

    Args:
        data, split: as `load_split` takes them.
        output: folder for the data set; appears when all is written.
        how: source and refinement; default CAM and PAR.
        masks: folder, empty or new, for the same masks as `IMAGE_ID.png` in VOC colours.
        overwrite: replace a data set written before.

    Raises:
        ValueError: the data set has other classes than the model; an image_id that leaves the folder `masks`.
        FileExistsError: a folder holds something that must not be replaced.
    """
    how = PseudoLabelling() if how is None else how
    dataset = load_split(data, split)
    check_class_names(dataset, model.config.label_names, "the model")
    check_output(Path(output), overwrite)
    dropped: Counter[str] = Counter()
    model.eval()
    with ExitStack() as stack:
        keep = None
        if masks is not None:
            check_output(masks, overwrite=False)
            keep = stack.enter_context(staging_folder(masks))
        images = _labelled_images(model, processor, dataset, how, dropped)
        examples = _examples(model, images, how, keep)
        splits = [Split(split, examples, len(dataset), with_masks=True, dropped=dropped)]
        return write_dataset(output, model.config.label_names[1:], splits, overwrite, mask_column="label")


def _labelled_images(
    model: MSEEForWeaklySupervisedSegmentation,
    processor: MSEEImageProcessor,
    dataset: Dataset,
    how: PseudoLabelling,
    dropped: Counter[str],
) -> Iterator[LabelledImage]:
    tagged = any(dataset["labels"])
    for sample in dataset:
        try:
            picture = read_rgb(sample)
        except ValueError:
            dropped["cannot be read"] += 1
            continue
        stored = sample["image"]
        file = Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]
        size = network_size(processor, picture.height, picture.width)
        pixel_values = processor_of_size(processor, size)(picture, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(model.device)
        tags = multi_hot(sample["labels"], model.config.num_classes, sample["image_id"])[None] if tagged else None
        hot, maps = _maps(model, pixel_values, tags, how)
        yield LabelledImage(sample["image_id"], file, picture, pixel_values, hot, maps)


@torch.no_grad()
def _maps(
    model: MSEEForWeaklySupervisedSegmentation, pixel_values: Tensor, tags: Tensor | None, how: PseudoLabelling
) -> tuple[Tensor, Tensor]:
    """Classes (1, K - 1) of an image, and what its masks are made from, (1, K - 1, h, w) in [0, 1]."""
    encoded = model.encode(pixel_values)
    if tags is None:
        tags = (model.class_logits(encoded.features, model.classifier).sigmoid() >= PRESENT).float()
    tags = tags.to(model.device)
    if how.source == "cam":
        maps, _ = model.multi_scale_activation_maps(pixel_values, unscaled=encoded)
        return tags, maps
    size = pixel_values.shape[-2:]
    logits = F.interpolate(model.decoder(encoded.features).float(), size=size, mode="bilinear", align_corners=False)
    absent = F.pad(tags == 0, (1, 0), value=False)  # the background is always there
    return tags, logits.masked_fill(absent[:, :, None, None], -torch.inf).softmax(dim=1)[:, 1:]


def _examples(
    model: MSEEForWeaklySupervisedSegmentation,
    images: Iterator[LabelledImage],
    how: PseudoLabelling,
    masks: Path | None,
) -> Iterator[Example]:
    """Rows to write, and their masks as palette PNG in a folder, if one is given."""
    labelled = _with_crf(model, images, how.crf_workers) if how.refinement == "crf" else _with_par(model, images)
    for image, label_map in labelled:
        if masks is not None:
            relative = relative_path(image.image_id, "image_id")
            path = masks / relative.with_name(f"{relative.name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_palette_png(label_map, path)
        labels = tuple(image.hot[0].nonzero()[:, 0].tolist())
        yield Example(image.image_id, image.file, labels, encode_png(label_map))


def _with_par(
    model: MSEEForWeaklySupervisedSegmentation, images: Iterator[LabelledImage]
) -> Iterator[tuple[LabelledImage, np.ndarray]]:
    """Label maps uint8 (H, W) of the images' size."""
    for image in images:
        label_map = model.pseudo_labels(image.pixel_values, image.hot, maps=image.maps)[0].cpu()
        size = (image.picture.height, image.picture.width)
        yield image, resize_labels(label_map, size).to(torch.uint8).numpy()


def _with_crf(
    model: MSEEForWeaklySupervisedSegmentation, images: Iterator[LabelledImage], workers: int
) -> Iterator[tuple[LabelledImage, np.ndarray]]:
    """Label maps uint8 (H, W): where the CRFs of both thresholds say background, background; where only the high one
    does, ignored; else the high one's class."""
    thresholds = (model.config.high_threshold, model.config.low_threshold)
    waiting: deque[LabelledImage] = deque()

    def requests() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for image in images:
            waiting.append(image)
            for threshold in thresholds:
                yield np.asarray(image.picture), certain_labels(image.maps, image.hot, threshold, image.picture.size)

    with CRFPool(workers) as pool:
        results = pool.map(requests())
        for with_high, with_low in zip(results, results, strict=True):
            uncertain = np.where(with_low == 0, 0, IGNORE_INDEX)
            yield waiting.popleft(), np.where(with_high == 0, uncertain, with_high).astype(np.uint8)


def certain_labels(maps: Tensor, hot: Tensor, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """Probabilities (K, H, W) that give 0.7 to the label of each pixel, the rest to the other classes in the image.

    Args:
        maps: (1, K - 1, h, w) in [0, 1].
        hot: the classes in the image, (1, K - 1).
        threshold: at or below, a pixel is background.
        size: width and height of the result.
    """
    resized = F.interpolate(maps, size=size[::-1], mode="bilinear", align_corners=False)
    label_map = activation_to_labels(resized, hot, threshold)[0].cpu().numpy()
    present = np.flatnonzero(F.pad(hot[0], (1, 0), value=1.0).cpu().numpy())
    probabilities = np.zeros((hot.shape[1] + 1, *label_map.shape), dtype=np.float32)
    certainty = CRF_CERTAINTY if len(present) > 1 else 1.0
    for label in present:
        others = (1 - certainty) / max(len(present) - 1, 1)
        probabilities[label] = np.where(label_map == label, certainty, others)
    return probabilities
