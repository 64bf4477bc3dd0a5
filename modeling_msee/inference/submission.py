"""The archive of masks that the PASCAL VOC 2012 test server takes."""

import gzip
import io
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.contract import load_split, read_rgb
from ..data.files import whole_file
from ..evaluation.protocols import Protocol
from ..evaluation.segmentation import (
    CRFRequest,
    crf_candidates,
    protocol_views,
    refined_labels,
    segmentation_scores,
)
from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .masks import save_palette_png


FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
NUM_LABELS = 21
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ARCHIVE_SUFFIXES = (".tgz", ".tar.gz")


@dataclass(frozen=True)
class MaskFile:
    """An indexed PNG with the name and the size (width, height) of its image."""

    image_id: str
    image_size: tuple[int, int]
    png: bytes


def load_test_images(
    path: str, split: str, wanted: Sequence[str] | None = None
) -> tuple[list[str], Dataset | list[dict]]:
    """Ids and images: of a folder of image files, which are named after their ids, or of a split of a data set.

    Args:
        wanted: ids to take, in this order; default all.

    Raises:
        ValueError: an id occurs twice or cannot name a file, an image of `wanted` is missing, or there is none at all.
    """
    files = sorted(file for file in Path(path).glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    images: Dataset | list[dict]
    if files:
        images = [{"image_id": file.stem, "image": {"bytes": None, "path": str(file)}} for file in files]
        ids = [file.stem for file in files]
    else:
        images = load_split(path, split)
        ids = images["image_id"][:]
    _check_ids(ids, path)
    if wanted is None:
        return ids, images
    _check_ids(wanted, "the list")
    row = {image_id: index for index, image_id in enumerate(ids)}
    missing = [image_id for image_id in wanted if image_id not in row]
    if missing:
        raise ValueError(f"{path}: {len(missing)} images of the list are missing, first {missing[0]!r}.")
    rows = [row[image_id] for image_id in wanted]
    chosen = images.select(rows) if isinstance(images, Dataset) else [images[index] for index in rows]
    return list(wanted), chosen


def _check_ids(ids: Sequence[str], source: str) -> None:
    if not ids:
        raise ValueError(f"{source}: expected at least one image, found none.")
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{source}: expected every image once, repeated: {', '.join(repeated[:5])}.")
    wrong = [image_id for image_id in ids if not re.fullmatch(r"\w[\w.-]*", image_id)]
    if wrong:
        raise ValueError(f"{source}: expected ids of letters, digits, '_', '-' and '.', got {wrong[0]!r}.")


def predict_masks(
    model: MSEEForWeaklySupervisedSegmentation,
    processor: MSEEImageProcessor,
    images: Dataset | list[dict],
    protocol: Protocol,
    crf_workers: int = 2,
) -> list[MaskFile]:
    """Segment every image; each process takes its share, all get all masks.

    Args:
        model: on the device it shall run on.
        images: rows with `image_id` and an undecoded `image`.
        crf_workers: processes for the dense CRF, for each process of the prediction.

    Raises:
        ValueError: the model does not have the 21 labels of VOC, or an image cannot be read.
    """
    labels = model.config.label_names
    if len(labels) != NUM_LABELS:
        raise ValueError(
            f"the VOC 2012 server scores {NUM_LABELS} labels, background and 20 classes in alphabetical order; "
            f"this model has {len(labels)} ({', '.join(labels)})."
        )
    model.eval()
    state = PartialState()
    share = range(state.process_index, len(images), state.num_processes)
    rows = (images[index] for index in tqdm(share, desc="Predicting", disable=not state.is_local_main_process))
    if protocol.crf:
        requests = (_crf_request(model, processor, row, protocol) for row in rows)
        return gather_object([_mask_file(*item, labels) for item, labels in refined_labels(requests, crf_workers)])
    return gather_object([_mask_without_crf(model, processor, row, protocol) for row in rows])


def _scores(
    model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor, image: Image.Image, protocol: Protocol
) -> Tensor:
    views = protocol_views(processor, image, protocol, model.device)
    return segmentation_scores(model, views, (image.height, image.width), protocol)


def _crf_request(
    model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor, row: dict, protocol: Protocol
) -> CRFRequest[tuple[str, tuple[int, int]]]:
    image = read_rgb(row)
    scores = _scores(model, processor, image, protocol)
    candidates = crf_candidates(scores, scores.argmax(dim=0))
    return CRFRequest((row["image_id"], image.size), np.asarray(image), candidates)


def _mask_without_crf(
    model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor, row: dict, protocol: Protocol
) -> MaskFile:
    image = read_rgb(row)
    labels = _scores(model, processor, image, protocol).argmax(dim=0)
    return _mask_file(row["image_id"], image.size, labels.cpu().numpy())


def _mask_file(image_id: str, image_size: tuple[int, int], labels: np.ndarray) -> MaskFile:
    buffer = io.BytesIO()
    save_palette_png(labels, buffer)
    return MaskFile(image_id, image_size, buffer.getvalue())


def check_masks(masks: Sequence[MaskFile], image_ids: Sequence[str]) -> None:
    """Raise ValueError unless there is exactly one sound mask for every id, and no other.

    Sound: an indexed PNG of the image's size with values 0 to 20.
    """
    counts = Counter(mask.image_id for mask in masks)
    problems = [f"{image_id}: no mask" for image_id in image_ids if image_id not in counts]
    problems += [f"{image_id}: {count} masks" for image_id, count in counts.items() if count > 1]
    problems += [f"{image_id}: not in the list" for image_id in counts.keys() - set(image_ids)]
    for mask in masks:
        with Image.open(io.BytesIO(mask.png)) as picture:
            largest = int(np.asarray(picture).max())
            if picture.format != "PNG" or picture.mode != "P":
                problems.append(f"{mask.image_id}: expected an indexed PNG, got {picture.format} {picture.mode}")
            elif picture.size != mask.image_size:
                problems.append(f"{mask.image_id}: the mask is {picture.size}, the image {mask.image_size}")
            elif largest >= NUM_LABELS:
                problems.append(f"{mask.image_id}: expected values 0 to {NUM_LABELS - 1}, got {largest}")
    if problems:
        raise ValueError(f"nothing was written, {len(problems)} masks are wrong: {'; '.join(problems[:5])}.")


def check_archive_name(path: Path) -> None:
    """Raise ValueError unless the name is that of a gzipped tar archive."""
    if not path.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(ARCHIVE_SUFFIXES)}.")


def write_archive(path: Path, masks: Sequence[MaskFile], image_ids: Sequence[str]) -> None:
    """Write the masks, checked by `check_masks`, in the order of the ids as the server wants them.

    The file appears whole or not at all, and the same masks give the same bytes. Missing folders are created.
    """
    check_archive_name(path)
    check_masks(masks, image_ids)
    files = {mask.image_id: mask.png for mask in masks}
    with (
        whole_file(path) as partial,
        partial.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream,  # neither a name nor a time in its header
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for image_id in image_ids:
            member = tarfile.TarInfo(f"{FOLDER}/{image_id}.png")
            member.size = len(files[image_id])
            archive.addfile(member, io.BytesIO(files[image_id]))
