"""Data sets as self-contained Parquet that `load_dataset` reads, written whole or not at all."""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import ClassLabel, DatasetDict, Features, Image, List, Value, load_dataset
from datasets.info import DatasetInfo, DatasetInfosDict
from huggingface_hub import DatasetCardData
from PIL import Image as PILImage
from tqdm import tqdm

from .examples import Example, Split
from .tags import check_class_names


MASK_COLUMN = "segmentation_map"
SHARD_BYTES = 500_000_000
ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 64_000_000


@dataclass(frozen=True)
class SplitSummary:
    """Counts of a written split.

    `per_class[c]` is the number of images tagged with class c; `digest`, of the content, stands in the file names.
    """

    name: str
    images: int
    per_class: tuple[int, ...]
    unlabelled: int
    with_masks: bool
    digest: str
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """What a builder wrote and where; `str()` gives the table that the commands print."""

    output: Path
    class_names: tuple[str, ...]
    splits: tuple[SplitSummary, ...]

    def __str__(self) -> str:
        header = ["", *(split.name for split in self.splits)]
        rows = [
            ["images", *(str(split.images) for split in self.splits)],
            ["masks", *("yes" if split.with_masks else "no" for split in self.splits)],
            ["no label", *(str(split.unlabelled) for split in self.splits)],
            ["dropped", *(str(sum(split.dropped.values())) for split in self.splits)],
        ]
        for index, name in enumerate(self.class_names):
            rows.append([f"  {name}", *(str(split.per_class[index]) for split in self.splits)])
        lines = [
            f"Written to {self.output} (classes: number of images tagged with each)",
            *_align([header, *rows]),
        ]
        for split in self.splits:
            lines += [f"{split.name}: dropped {n} image(s): {reason}" for reason, n in split.dropped.items()]
        return "\n".join(lines)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def dataset_features(class_names: Sequence[str], with_masks: bool, mask_column: str = MASK_COLUMN) -> Features:
    """Columns of a split: image_id, image, labels and, with masks, the one for these."""
    columns = {
        "image_id": Value("string"),
        "image": Image(),
        "labels": List(ClassLabel(names=list(class_names))),
    }
    return Features({**columns, mask_column: Image()} if with_masks else columns)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `output` holds something that must not, or may not, be replaced."""
    if output.is_file():
        raise FileExistsError(f"{output} is a file; expected a folder to write to: choose another --output")
    names = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if names and not overwrite:
        raise FileExistsError(f"{output} exists and is not empty: choose another --output or pass --overwrite")
    if names and not names <= {"data", "README.md"}:
        foreign = ", ".join(sorted(names - {"data", "README.md"})[:3])
        raise FileExistsError(
            f"{output} holds files that no builder wrote ({foreign}): --overwrite replaces only "
            "a written data set; choose another --output"
        )


def write_dataset(
    output: Path,
    class_names: Sequence[str],
    splits: Iterable[Split],
    overwrite: bool = False,
    mask_column: str = MASK_COLUMN,
) -> Summary:
    """Write splits as self-contained Parquet shards and a README.md that names them.

    The folder appears only when everything is written: an error leaves `output` as it was. `mask_column` is the name
    of the masks' column; scripts that train segmentation models ask for `label`.
    """
    output = Path(output)
    names = check_class_names(class_names, "class names")
    splits = list(splits)
    split_names = [split.name for split in splits]
    if len(set(split_names)) < len(split_names) or not all(re.fullmatch(r"\w+", name) for name in split_names):
        raise ValueError(f"expected different split names of letters, digits and _, got {', '.join(split_names)}")
    check_output(output, overwrite)
    with staging_folder(output) as staging:
        (staging / "data").mkdir()
        summaries = tuple(_write_split(staging / "data", names, split, mask_column) for split in splits)
        (staging / "README.md").write_text(_readme(output.name, names, summaries, mask_column), encoding="utf-8")
    return Summary(output, names, summaries)


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place on success and vanishes on error."""
    output = output.resolve()
    staging = output.parent / f".{output.name}.{os.getpid()}.partial"
    staging.mkdir(parents=True)
    try:
        yield staging
        _replace(output, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(output: Path, staging: Path) -> None:
    """Put `staging` where `output` is; if that fails, `output` stays."""
    old = staging.with_suffix(".replaced")
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_split(folder: Path, class_names: tuple[str, ...], split: Split, mask_column: str) -> SplitSummary:
    features = dataset_features(class_names, split.with_masks, mask_column)
    per_class = np.zeros(len(class_names), dtype=np.int64)
    seen: set[str] = set()
    unlabelled = 0
    with _ShardWriter(folder, split.name, features, mask_column) as writer:
        for example in tqdm(split.examples, desc=split.name, total=split.total, unit="image", mininterval=0.5):
            if example.image_id in seen:
                raise ValueError(
                    f"split {split.name}: image_id {example.image_id!r} occurs twice; remove one of the two"
                )
            if (example.mask is not None) != split.with_masks:
                expected = "a mask" if split.with_masks else "no mask"
                raise ValueError(f"split {split.name}: expected {expected} with image {example.image_id!r}")
            seen.add(example.image_id)
            per_class[list(example.labels)] += 1
            unlabelled += not example.labels
            writer.add(example)
    if not seen:
        raise ValueError(f"split {split.name} has no image; leave it out or check its list")
    counts = tuple(int(count) for count in per_class)
    return SplitSummary(
        split.name, len(seen), counts, unlabelled, split.with_masks, writer.digest, dict(split.dropped)
    )


class _ShardWriter:
    """Streams examples to `<split>-00000-of-0000N-<digest>.parquet`, never holding more than one row group.

    The digest of the content is in the name because `load_dataset` takes its cache for a folder with the same file
    names, whatever is in them: a data set written anew would silently give the old images.
    """

    def __init__(self, folder: Path, split: str, features: Features, mask_column: str) -> None:
        self._folder, self._split, self._features, self._mask_column = folder, split, features, mask_column
        self._shards: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[Example] = []
        self._row_bytes = self._shard_bytes = 0
        self._content = hashlib.sha256(repr(features).encode())

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._close()
        if kind is None:
            for index, shard in enumerate(self._shards):
                number = f"{index:05d}-of-{len(self._shards):05d}"
                shard.rename(self._folder / f"{self._split}-{number}-{self.digest}.parquet")

    @property
    def digest(self) -> str:
        """Of all examples added so far and of the columns they have."""
        return self._content.hexdigest()[:16]

    def add(self, example: Example) -> None:
        self._content.update(repr((example.image_id, example.labels)).encode())
        self._content.update(hashlib.sha256(example.image).digest() + hashlib.sha256(example.mask or b"").digest())
        self._rows.append(example)
        self._row_bytes += len(example.image) + len(example.mask or b"")
        if len(self._rows) >= ROW_GROUP_ROWS or self._row_bytes >= ROW_GROUP_BYTES:
            self._flush()
        if self._shard_bytes >= SHARD_BYTES:
            self._close()

    def _flush(self) -> None:
        if not self._rows:
            return
        schema = self._features.arrow_schema
        columns = {
            "image_id": [row.image_id for row in self._rows],
            "image": [_file_cell(row.image, row.image_id) for row in self._rows],
            "labels": [list(row.labels) for row in self._rows],
            self._mask_column: [_file_cell(row.mask, row.image_id) for row in self._rows],
        }
        if self._writer is None:
            self._shards.append(self._folder / f"{self._split}.{len(self._shards)}.partial")
            self._writer = pq.ParquetWriter(self._shards[-1], schema)
        self._writer.write_table(pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema))
        self._shard_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._shard_bytes = None, 0


def _file_cell(data: bytes | None, image_id: str) -> dict[str, bytes | str] | None:
    """The struct that an Image column stores: the file itself, and a name to tell its format by."""
    if data is None:
        return None
    with PILImage.open(io.BytesIO(data)) as image:
        suffix = (image.format or "image").lower().replace("jpeg", "jpg")
    return {"bytes": data, "path": f"{PurePosixPath(image_id).name}.{suffix}"}


def _readme(title: str, class_names: tuple[str, ...], splits: Sequence[SplitSummary], mask_column: str) -> str:
    """A data set card; its YAML header tells `load_dataset` the splits and the columns of all of them."""
    card = DatasetCardData(
        task_categories=["image-segmentation"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split.name, "path": f"data/{split.name}-*-{split.digest}.parquet"} for split in splits
                ],
            }
        ],
    )
    # One configuration has one set of columns: a split without masks then shows an empty column for them.
    features = dataset_features(class_names, any(split.with_masks for split in splits), mask_column)
    DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(card)
    header = yaml.safe_dump(card.to_dict(), sort_keys=False, allow_unicode=True)
    cells = [(s.name, s.images, s.unlabelled, "yes" if s.with_masks else "no") for s in splits]
    counts = "\n".join("| {} | {} | {} | {} |".format(*row) for row in cells)
    return (
        f"---\n{header}---\n\n# {title}\n\n"
        f"`labels`: image-level classes, foreground only. `{mask_column}`, where a split has masks: "
        "0 is background, the class index plus one is a class, 255 is ignored.\n\n"
        f"| split | images | without label | masks |\n|---|---|---|---|\n{counts}\n\n"
        f"Classes: {', '.join(class_names)}.\n"
    )


def load(output: Path) -> DatasetDict:
    """The written splits, each with its own columns: one without masks has no segmentation_map at all."""
    shards = sorted((Path(output) / "data").glob("*-of-*.parquet"))
    if not shards:
        raise FileNotFoundError(
            f"{output}/data holds no Parquet shard; write it with a builder of datasets_scripts first"
        )
    files: dict[str, list[str]] = {}
    for shard in shards:
        files.setdefault(shard.name.split("-")[0], []).append(str(shard))
    return DatasetDict(
        {name: load_dataset("parquet", data_files=paths, split="train") for name, paths in files.items()}
    )
