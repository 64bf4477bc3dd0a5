"""Reading a data set of the contract: image_id, image, labels and, in evaluation splits, segmentation_map."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, load_dataset, load_from_disk
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from tqdm.auto import tqdm


BACKGROUND = "background"


def load_split(path: str, split: str) -> Dataset:
    """One split of a data set: a folder of Parquet files, a folder of `save_to_disk`, or a Hub repository.

    Raises:
        ValueError: no such split, or the columns are not those of the contract.
        FileNotFoundError: neither a folder nor a reachable Hub repository.
    """
    splits = _load(path, split)
    if split not in splits:
        raise ValueError(f"{path}: expected a split {split!r}, found {', '.join(splits)}.")
    return _undecoded(splits[split], path)


def load_splits(path: str) -> dict[str, Dataset]:
    """All splits of a data set by name; errors as in `load_split`."""
    return {name: _undecoded(dataset, path) for name, dataset in _load(path, "train").items()}


def _undecoded(dataset: Dataset, path: str) -> Dataset:
    """The data set with checked columns; its files are decoded by `read_image`, so that a broken one can be named."""
    check_columns(dataset, path)
    for column in ("image", "segmentation_map"):
        if column in dataset.column_names:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset


def _load(path: str, unnamed: str) -> DatasetDict:
    """All splits; the one of a folder of `save_to_disk` that does not say which it is counts as `unnamed`."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path}: expected a folder or a Hub repository, got a file.")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = load_from_disk(path)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({str(loaded.split or unnamed): loaded})
    try:
        return load_dataset(path)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{path}: expected a folder that a builder of datasets_scripts wrote, or a Hub data set. "
            f"There is no such folder here, and as a Hub data set: {error}"
        ) from error
    except RuntimeError as error:  # how the library refuses a data set that is built by a script
        raise ValueError(f"{path}: {error}. The code of a data set is never run; give it as Parquet.") from error


def check_columns(dataset: Dataset, path: str) -> None:
    """Raise ValueError unless `image` and `labels` (a list of ClassLabel) are there."""
    features = dataset.features
    for column in ("image_id", "image", "labels"):
        if column not in features:
            raise ValueError(
                f"{path}: expected a column {column!r}, found {', '.join(features)}. "
                "`python -m datasets_scripts.image_tags --help` turns other data into the expected form."
            )
    labels = features["labels"]
    if not (isinstance(labels, List) and isinstance(labels.feature, ClassLabel)):
        raise ValueError(f"{path}: column 'labels': expected a list of ClassLabel, got {labels!r}.")


def class_names(dataset: Dataset) -> list[str]:
    """Names of all labels, the background first."""
    return [BACKGROUND, *dataset.features["labels"].feature.names]


def check_class_names(dataset: Dataset, expected: Sequence[str], owner: str) -> None:
    """Raise ValueError unless the data set has exactly the labels that `owner` has, in the same order."""
    found = class_names(dataset)
    if found != list(expected):
        raise ValueError(
            f"{owner} has {len(expected)} labels ({', '.join(expected)}), the data set has {len(found)} "
            f"({', '.join(found)}). They must be the same in the same order."
        )


def multi_hot(labels: Sequence[int], num_classes: int, image_id: str) -> Tensor:
    """Foreground indices -> (num_classes,) of 0 and 1.

    Raises:
        ValueError: an index out of range, with the image's name.
    """
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"{image_id}: expected labels from 0 to {num_classes - 1}, got {wrong}.")
    hot = torch.zeros(num_classes)
    hot[list(labels)] = 1
    return hot


def read_image(sample: dict, column: str = "image") -> PILImage.Image:
    """Decode one undecoded image column completely.

    Raises:
        ValueError: there is no file, or it cannot be decoded, with its name.
    """
    stored = sample[column]
    if stored is None:
        raise ValueError(f"{sample['image_id']}: expected a file in the column {column!r}, found none.")
    source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
    try:
        image = PILImage.open(source)
        image.load()
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        name = stored["path"] or sample["image_id"]
        raise ValueError(
            f"{column} {name} (image_id {sample['image_id']}) cannot be read: {error}. "
            "Repair or remove the file; training leaves it out with --skip_bad_images."
        ) from error
    return image


def read_rgb(sample: dict) -> PILImage.Image:
    """The image upright and in RGB."""
    return ImageOps.exif_transpose(read_image(sample)).convert("RGB")


def without_bad_images(dataset: Dataset, columns: Sequence[str] = ("image",)) -> tuple[Dataset, list[str]]:
    """The samples whose files in `columns` can be read, and a message for each other one."""
    good, messages = [], []
    for index, sample in enumerate(tqdm(dataset, desc="Checking images")):
        try:
            for column in columns:
                read_image(sample, column)
        except ValueError as error:
            messages.append(str(error))
        else:
            good.append(index)
    return dataset.select(good), messages
