"""Is a data set fit to train on? What stops a training run, what spoils its result, and the command to start it."""

import difflib
import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from .contract import class_names, load_splits, read_image
from .tags import (
    EVALUATION_SPLITS,
    check_exists,
    encode_tags,
    is_tagged_folder,
    mask_path,
    read_class_names,
    read_metadata,
    split_folders,
)


SMALL_SIDE = 64  # pixels: four patches of 16
IMBALANCE = 20  # images of the most over those of the least frequent class
ALIKE = 0.8  # similarity of two spellings above which they may mean the same
RECIPE_SIDE = 224  # pixels: the photographs that the rescaling of configuration/tags.yaml is made for
RECIPE_RESCALE = (0.8, 1.45)
SHOWN = 20  # messages of a kind in the printed report


@dataclass(frozen=True)
class SourceSplit:
    """One split; `samples` as the contract has them, files undecoded."""

    name: str
    samples: Dataset | list[dict[str, Any]]
    has_masks: bool


@dataclass(frozen=True)
class Source:
    """What is checked; `problems` are those that showed while it was opened."""

    path: str
    class_names: tuple[str, ...]
    splits: tuple[SourceSplit, ...]
    is_folder_of_tags: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFacts:
    """One image: foreground `labels`, `size` (width, height), SHA-256 of its file; or `error`, if it is unreadable."""

    image_id: str
    labels: tuple[int, ...]
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What `check_data` found. `images[split]` are in the order of the split; `str()` is what the command prints."""

    source: Source
    images: dict[str, list[ImageFacts]]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    commands: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.source.path}: {len(self.source.class_names)} classes", "", *self._table()]
        lines += _section("Problems, to be repaired before training", self.problems)
        lines += _section("Warnings", self.warnings)
        if self.problems:
            return "\n".join(
                [*lines, "", "Repair the problems and check again; the training command then stands here."]
            )
        return "\n".join([*lines, "", "Next:", *(f"  {command}" for command in self.commands)])

    def _table(self) -> list[str]:
        """Images of each split, and how many are tagged with each class."""
        splits = self.source.splits
        counts = {split.name: _per_class(self.images[split.name], len(self.source.class_names)) for split in splits}
        rows: list[tuple[str, list[object]]] = [
            ("", [split.name for split in splits]),
            ("images", [len(self.images[split.name]) for split in splits]),
            ("masks", ["yes" if split.has_masks else "no" for split in splits]),
            ("no tag", [sum(not image.labels for image in self.images[split.name]) for split in splits]),
        ]
        rows += [
            (f"  {name}", [int(counts[split.name][index]) for split in splits])
            for index, name in enumerate(self.source.class_names)
        ]
        first = max(len(title) for title, _ in rows)
        return [f"{title:<{first}}  " + "  ".join(f"{cell!s:>10}" for cell in cells) for title, cells in rows]

    def examples(self, split: str, label: int | None, count: int) -> list[dict[str, Any]]:
        """Up to `count` readable samples with a class, or without any tag for None, evenly spaced over the split."""
        found = [
            index
            for index, image in enumerate(self.images[split])
            if not image.error and (label in image.labels if label is not None else not image.labels)
        ]
        samples = next(part.samples for part in self.source.splits if part.name == split)
        chosen = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
        return [samples[found[index]] for index in chosen]


def check_data(path: str, train_split: str = "train", separator: str = ";") -> Report:
    """Read every image and every tag of a data set.

    Args:
        path: a folder of photographs with metadata.jsonl or .csv, or what `load_splits` reads.
        train_split: the split that training is to use.
        separator: between the labels of a row of metadata.csv.

    Raises:
        ValueError, FileNotFoundError: it cannot be read at all, with the line of a metadata file where there is one.
    """
    source = open_source(path, separator)
    images = {split.name: _read_images(split) for split in source.splits}
    problems = [*source.problems]
    if train_split not in images:
        problems.append(
            f"there is no split {train_split!r}, only {', '.join(images)}; name the one to train on with --train-split"
        )
    for name, facts in images.items():
        problems += _split_problems(name, facts)
    warnings = [*_alike_names(source.class_names), *_repeated_files(images)]
    for name, facts in images.items():
        warnings += _tag_warnings(name, facts, source.class_names)
        warnings += _size_warnings(name, facts)
    if train_split in images:
        warnings += _training_warnings(images, train_split, source.class_names)
    commands = _commands(source, images.get(train_split, []), train_split, separator)
    return Report(source, images, tuple(problems), tuple(warnings), tuple(commands))


# --- Sources --------------------------------------------------------------------------------------


def open_source(path: str, separator: str = ";") -> Source:
    """A folder of tagged photographs, or a data set of the contract; errors as in `check_data`."""
    if is_tagged_folder(Path(path)):
        return _open_folder(Path(path), separator)
    splits = load_splits(path)
    parts = tuple(
        SourceSplit(name, dataset.select_columns(["image_id", "image", "labels"]), _has_masks(dataset))
        for name, dataset in splits.items()
    )
    return Source(path, tuple(class_names(next(iter(splits.values())))[1:]), parts, is_folder_of_tags=False)


def _has_masks(dataset: Dataset) -> bool:
    return "segmentation_map" in dataset.column_names and any(dataset[:1]["segmentation_map"])


def _open_folder(root: Path, separator: str) -> Source:
    folders = split_folders(root)
    tables = {name: read_metadata(folder, separator) for name, folder in folders.items()}
    names = read_class_names(root, (tag for rows in tables.values() for row in rows for tag in row.tags))
    problems, splits = [], []
    for split, rows in tables.items():
        samples = []
        for row in rows:
            try:
                check_exists(row)
                labels = list(encode_tags(row.tags, names, row.source))
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
                continue
            samples.append(
                {"image_id": row.image_id, "image": {"bytes": None, "path": str(row.path)}, "labels": labels}
            )
        masks = [mask_path(row, folders[split]) for row in rows]
        missing = [str(path) for path in masks if not path.is_file()]
        has_masks = len(missing) < len(masks)
        if split in EVALUATION_SPLITS and has_masks and missing:
            problems.append(f"split {split}: {len(missing)} of {len(masks)} masks are missing: {_some(missing)}")
        splits.append(SourceSplit(split, samples, has_masks))
    return Source(str(root), names, tuple(splits), is_folder_of_tags=True, problems=tuple(problems))


def _read_images(split: SourceSplit) -> list[ImageFacts]:
    return [_facts(sample) for sample in tqdm(split.samples, desc=f"Checking {split.name}", unit="image")]


def _facts(sample: dict[str, Any]) -> ImageFacts:
    image_id, labels = sample["image_id"], tuple(sorted(set(sample["labels"] or ())))
    stored = sample["image"]
    try:
        if stored is not None and stored["bytes"] is None:
            stored = {**stored, "bytes": Path(stored["path"]).read_bytes()}
        image = read_image({**sample, "image": stored})
    except (ValueError, OSError) as error:
        return ImageFacts(image_id, labels, error=str(error))
    return ImageFacts(image_id, labels, image.size, hashlib.sha256(stored["bytes"]).digest())


# --- Findings -------------------------------------------------------------------------------------


def _split_problems(split: str, images: Sequence[ImageFacts]) -> Iterator[str]:
    if not images:
        yield f"split {split} has no image; leave it out"
    repeated = [name for name, count in Counter(image.image_id for image in images).items() if count > 1]
    if repeated:
        yield f"split {split}: more than one image is called {_some(repeated)}; every image_id must differ"
    for image in images:
        if image.error:
            yield f"split {split}: {image.error}"


def _alike_names(names: Sequence[str]) -> Iterator[str]:
    """Pairs that may be one class: the same but for case, plural, spaces, _ and -, or spelled almost alike."""
    for first, second in combinations(names, 2):
        keys = _name_key(first), _name_key(second)
        if keys[0] == keys[1]:
            yield f"the classes {first!r} and {second!r} have almost the same name; if they mean the same, merge them"
        elif min(map(len, keys)) > 4 and difflib.SequenceMatcher(None, *keys).ratio() > ALIKE:
            yield f"the classes {first!r} and {second!r} are spelled almost alike; if they mean the same, merge them"


def _name_key(name: str) -> str:
    return "".join(_singular(word) for word in re.split(r"[\s_-]+", name.casefold().strip()))


def _singular(word: str) -> str:
    """An English plural's singular, near enough to tell that two words are one."""
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _repeated_files(images: dict[str, list[ImageFacts]]) -> Iterator[str]:
    """Files of the same content, within a split and, which makes scores too good, across splits."""
    places: dict[bytes, list[tuple[str, ImageFacts]]] = {}
    for split, facts in images.items():
        for image in facts:
            if not image.error:
                places.setdefault(image.digest, []).append((split, image))
    groups = [group for group in places.values() if len(group) > 1]
    shared = [group for group in groups if len({split for split, _ in group}) > 1]
    for title, chosen, remedy in (
        ("in more than one split", shared, "scores on them mean nothing: keep each in one split"),
        ("more than once", [group for group in groups if group not in shared], "keep one of each"),
    ):
        if chosen:
            named = [" = ".join(f"{split}/{image.image_id}" for split, image in group) for group in chosen]
            yield f"{len(chosen)} file(s) are there {title}: {_some(named)}; {remedy}"
    differing = [group for group in groups if len({image.labels for _, image in group}) > 1]
    if differing:
        named = [" = ".join(image.image_id for _, image in group) for group in differing]
        yield f"{len(differing)} of the repeated files have different tags: {_some(named)}"


def _tag_warnings(split: str, images: Sequence[ImageFacts], names: Sequence[str]) -> Iterator[str]:
    untagged = [image.image_id for image in images if not image.labels]
    if untagged:
        yield (
            f"split {split}: {len(untagged)} image(s) have no tag and teach what is background: {_some(untagged)}; "
            "right only if none of the classes is in them"
        )
    counts = _per_class(images, len(names))
    always = [name for name, count in zip(names, counts, strict=True) if count == len(images)]
    if always and images:
        yield (
            f"split {split}: every image is tagged with {_some(always)}; nothing tells such a class from the "
            "background: add images without it"
        )
    never = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if never:
        yield f"split {split}: no image is tagged with {_some(never)}"


def _size_warnings(split: str, images: Sequence[ImageFacts]) -> Iterator[str]:
    small = [
        f"{image.image_id} ({'x'.join(map(str, image.size))})"
        for image in images
        if not image.error and min(image.size) < SMALL_SIDE
    ]
    if small:
        yield (
            f"split {split}: {len(small)} image(s) have a side under {SMALL_SIDE} pixels, four patches of 16: "
            f"{_some(small)}; too coarse for masks"
        )


def _training_warnings(images: dict[str, list[ImageFacts]], train: str, names: Sequence[str]) -> Iterator[str]:
    """Classes that are scored but not trained, and classes that training hardly sees beside the others."""
    trained = _per_class(images[train], len(names))
    for split, facts in images.items():
        unseen = [
            name
            for name, seen, here in zip(names, trained, _per_class(facts, len(names)), strict=True)
            if here and not seen
        ]
        if unseen:
            yield f"split {split} has {_some(unseen)}, which no image of {train} is tagged with: move some there"
    present = {name: int(count) for name, count in zip(names, trained, strict=True) if count}
    if not present:
        return
    most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
    if present[most] >= IMBALANCE * present[least]:
        yield (
            f"split {train}: {most} has {present[most]} images and {least} only {present[least]}; "
            "classes this rare are seldom learnt: add images of them"
        )


def _per_class(images: Sequence[ImageFacts], classes: int) -> np.ndarray:
    """Number of images tagged with each class, (classes,)."""
    return np.bincount([label for image in images for label in image.labels], minlength=classes)


# --- Text -----------------------------------------------------------------------------------------


def _some(items: Sequence[str], shown: int = 5) -> str:
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _section(title: str, messages: Sequence[str]) -> list[str]:
    if not messages:
        return []
    rest = len(messages) - SHOWN
    more = [f"- and {rest} more"] if rest > 0 else []
    return ["", f"{title}:", *(f"- {message}" for message in messages[:SHOWN]), *more]


def _commands(source: Source, images: Sequence[ImageFacts], train_split: str, separator: str) -> list[str]:
    """What to paste: preparing a folder, and training."""
    scored = [split.name for split in source.splits if split.has_masks and split.name != train_split]
    dataset, commands = source.path, []
    name = Path(os.path.abspath(source.path)).name  # of a link itself, not of what it leads to
    if source.is_folder_of_tags:
        dataset = f"outputs/{name}"
        words = ["python", "-m", "datasets_scripts.image_tags", "--root", source.path, "--output", dataset]
        words += ["--separator", separator] if separator != ";" else []
        expected = [split.name for split in source.splits if split.name in EVALUATION_SPLITS]
        words += ["--evaluation-splits", *scored] if scored != expected else []
        commands.append(shlex.join(words))
    words = ["python", "train_msee.py", "configuration/tags.yaml", "--dataset", dataset]
    words += ["--output_dir", f"outputs/{name}-msee"]
    words += ["--train_split", train_split] if train_split != "train" else []
    if "validation" not in scored:
        words += ["--eval_split", scored[0] if scored else "none"]
    return [*commands, shlex.join([*words, *_rescaling(images)])]


def _rescaling(images: Sequence[ImageFacts]) -> list[str]:
    """Fields that make a training crop hold as much of a photograph as the recipe's own, where they differ much."""
    sides = [min(image.size) for image in images if not image.error]
    factor = RECIPE_SIDE / float(np.median(sides)) if sides else 1.0
    if 0.8 <= factor <= 1.25:
        return []
    low, high = (f"{factor * value:.2g}" for value in RECIPE_RESCALE)
    return ["--rescale_min", low, "--rescale_max", high]
