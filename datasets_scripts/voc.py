"""PASCAL VOC 2012 with the masks of SBD: 10 582 train_aug, 1 464 train, 1 449 val and 1 456 test images.

python -m datasets_scripts.voc --root VOCdevkit --output data/voc
python -m datasets_scripts.voc --root VOCtrainval_11-May-2012.tar --sbd benchmark_RELEASE --output data/voc
python -m datasets_scripts.voc --root VOCdevkit --output data/voc-test --splits test

Masks come from SegmentationClassAug/*.png, else SegmentationClass/*.png, else SBD's cls/*.mat (--sbd).
Image-level labels come from the mask, else from Annotations/*.xml. The test split has neither: no labels.
"""

import io
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from scipy.io import loadmat

from modeling_msee.data.examples import Example, Split, encode_png
from modeling_msee.data.tags import relative_path, unknown_name
from modeling_msee.data.writer import Summary, check_output, write_dataset

from .common import (
    Mask,
    check_mask,
    command_parser,
    decode_mask,
    image_size,
    mask_labels,
    read_file,
    run_command,
)


CLASS_NAMES: tuple[str, ...] = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SPLITS = ("train_aug", "train", "val", "test")
LISTS = "ImageSets/Segmentation"
MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


# --- Where the files are --------------------------------------------------------------------------


class Files(Protocol):
    """The content of a VOC2012 folder, wherever it lies; paths are relative to it."""

    def exists(self, path: str) -> bool: ...

    def read(self, path: str, remedy: str) -> bytes: ...

    def name(self, path: str) -> str: ...


class FolderFiles:
    """VOC2012 as an unpacked folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self, path: str) -> bool:
        return (self._folder / path).is_file()

    def read(self, path: str, remedy: str) -> bytes:
        return read_file(self._folder / path, remedy)

    def name(self, path: str) -> str:
        return str(self._folder / path)


class TarFiles:
    """VOC2012 inside the official tar, read in place: nothing is unpacked, so no member can land anywhere."""

    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self._path, self._archive = path, archive
        self._members: dict[str, tarfile.TarInfo] = {}
        for member in archive:
            if member.name == ".":
                continue
            inside = relative_path(member.name, path)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{path}: member {member.name!r} is a link or device; use the official archive")
            if "VOC2012" in inside.parts and member.isfile():
                start = inside.parts.index("VOC2012") + 1
                self._members[str(PurePosixPath(*inside.parts[start:]))] = member
        if not self._members:
            raise FileNotFoundError(f"{path} has no folder VOC2012; expected VOCtrainval_11-May-2012.tar")

    def exists(self, path: str) -> bool:
        return path in self._members

    def read(self, path: str, remedy: str) -> bytes:
        if path not in self._members:
            raise FileNotFoundError(f"missing file {self.name(path)}: {remedy}")
        stream = self._archive.extractfile(self._members[path])
        assert stream is not None  # only regular files are listed
        return stream.read()

    def name(self, path: str) -> str:
        return f"{self._path}:VOC2012/{path}"


@contextmanager
def open_files(root: Path) -> Iterator[Files]:
    """The VOC2012 folder at `root`: VOCdevkit, VOCdevkit/VOC2012, the folder around them, or the tar."""
    root = Path(root)
    if root.is_file():
        try:
            with tarfile.open(root, "r:") as archive:
                yield TarFiles(root, archive)
        except tarfile.TarError as error:
            raise ValueError(f"{root}: expected a complete, uncompressed tar ({error}); download it again") from error
        return
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    for folder in candidates:
        if (folder / "JPEGImages").is_dir():
            yield FolderFiles(folder)
            return
    raise FileNotFoundError(
        f"{root} is no VOC folder: expected JPEGImages in one of {', '.join(map(str, candidates))}; "
        "point --root at VOCdevkit, VOCdevkit/VOC2012 or VOCtrainval_11-May-2012.tar"
    )


def _sbd_folder(sbd: Path) -> Path:
    candidates = (sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset")
    for folder in candidates:
        if (folder / "cls").is_dir():
            return folder
    raise FileNotFoundError(f"{sbd} is no SBD folder: expected cls in one of {', '.join(map(str, candidates))}")


# --- Lists ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of a split list: paths inside VOC2012; `mask` only where the line names one."""

    image_id: str
    image: str
    mask: str | None
    source: str


def _parse_line(line: str, source: str) -> Entry:
    """`2007_000032` or `/JPEGImages/2007_000032.jpg [/SegmentationClassAug/2007_000032.png]`."""
    first, *rest = line.split()
    if len(rest) > 1:
        raise ValueError(f"{source}: expected an image name, or an image and a mask path, got {line!r}")
    path = relative_path(first.lstrip("/"), source)
    image = str(path) if path.suffix else f"JPEGImages/{path}.jpg"
    mask = str(relative_path(rest[0].lstrip("/"), source)) if rest else None
    return Entry(PurePosixPath(image).stem, image, mask, source)


def _parse_list(data: bytes, name: str) -> list[Entry]:
    lines = data.decode("utf-8", errors="replace").splitlines()
    return [_parse_line(line, f"{name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _derive_train_aug(files: Files, sbd: Path) -> list[Entry]:
    """train_aug as everybody builds it: VOC train and all of SBD, without VOC val."""
    remedy = f"deriving train_aug needs it; add it or write {LISTS}/train_aug.txt"
    lists = {name: f"{LISTS}/{name}.txt" for name in ("train", "val")}
    train, val = (_parse_list(files.read(path, remedy), files.name(path)) for path in lists.values())
    for name in ("train.txt", "val.txt"):
        train += _parse_list(read_file(sbd / name, remedy), str(sbd / name))
    held_out = {entry.image_id for entry in val}
    return list({entry.image_id: entry for entry in train if entry.image_id not in held_out}.values())


def read_split(files: Files, split: str, sbd: Path | None = None) -> list[Entry]:
    """Entries of a split, in the order of its list; every image is known to exist."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    path = f"{LISTS}/{split}.txt"
    if split == "train_aug" and sbd is not None and not files.exists(path):
        entries = _derive_train_aug(files, sbd)
    else:
        remedy = "add the list (one image name a line)"
        if split == "train_aug":
            remedy += ", rename trainaug.txt to it, or give SBD with --sbd"
        entries = _parse_list(files.read(path, f"{remedy}, or leave {split} out of --splits"), files.name(path))
    for entry in entries:
        if not files.exists(entry.image):
            raise FileNotFoundError(
                f"{entry.source}: image {files.name(entry.image)} does not exist; add it or remove the line"
            )
    return entries


# --- Masks and labels -----------------------------------------------------------------------------


def read_sbd_mask(path: Path) -> Mask:
    """(H, W) class values from an SBD .mat file (GTcls.Segmentation)."""
    data = read_file(path, "unpack SBD (benchmark.tgz) again")
    try:
        segmentation = loadmat(io.BytesIO(data), simplify_cells=True)["GTcls"]["Segmentation"]
    except Exception as error:  # scipy and zlib raise many kinds for a damaged file
        raise ValueError(
            f"{path}: expected SBD's GTcls.Segmentation ({error!r}); unpack benchmark.tgz again"
        ) from error
    return np.asarray(segmentation, dtype=np.uint8)


def _find_mask(files: Files, entry: Entry, sbd: Path | None) -> tuple[Mask, str] | None:
    """The mask of an image and the name of its file, or None if there is none."""
    standard = [f"{folder}/{entry.image_id}.png" for folder in MASK_FOLDERS]
    for path in [entry.mask, *standard] if entry.mask else standard:
        if files.exists(path):
            return decode_mask(files.read(path, "add the mask"), files.name(path)), files.name(path)
    if sbd is not None and (sbd / "cls" / f"{entry.image_id}.mat").is_file():
        matlab = sbd / "cls" / f"{entry.image_id}.mat"
        return read_sbd_mask(matlab), str(matlab)
    return None


def xml_labels(data: bytes, source: object) -> tuple[int, ...]:
    """Sorted classes of the objects in a VOC annotation file."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source}: expected VOC annotation XML ({error}); unpack it again") from error
    labels = set()
    for name in (node.text or "" for node in root.findall("object/name")):
        if name not in CLASS_NAMES:
            raise unknown_name(name, CLASS_NAMES, source)
        labels.add(CLASS_NAMES.index(name))
    return tuple(sorted(labels))


def _example(files: Files, entry: Entry, split: str, keep_mask: bool, sbd: Path | None) -> Example:
    source = files.name(entry.image)
    image = files.read(entry.image, "add the image or remove it from the list")
    size = image_size(image, source)
    if split == "test":
        return Example(entry.image_id, image, ())
    found = _find_mask(files, entry, sbd)
    if found is not None:
        mask, mask_source = found
        check_mask(mask, size, len(CLASS_NAMES), mask_source)
        return Example(entry.image_id, image, mask_labels(mask), encode_png(mask) if keep_mask else None)
    annotation = f"Annotations/{entry.image_id}.xml"
    looked_in = f"{', '.join(MASK_FOLDERS)}{'' if sbd is None else f', {sbd}/cls'}"
    if keep_mask:
        raise FileNotFoundError(f"{source}: image without mask (looked in {looked_in}); add the mask or give --sbd")
    if not files.exists(annotation):
        raise FileNotFoundError(
            f"{source}: image without mask (looked in {looked_in}) and without {files.name(annotation)}, "
            "so its labels are unknown; add one of them or give --sbd"
        )
    return Example(entry.image_id, image, xml_labels(files.read(annotation, "add it"), files.name(annotation)))


# --- Data set -------------------------------------------------------------------------------------


def _split(files: Files, split: str, with_masks: bool, sbd: Path | None) -> Split:
    keep = split == "val" or (with_masks and split != "test")
    entries = read_split(files, split, sbd)
    return Split(split, (_example(files, entry, split, keep, sbd) for entry in entries), len(entries), keep)


def examples(root: Path, split: str, with_masks: bool = False, sbd: Path | None = None) -> Iterator[Example]:
    """Examples of one split, read one at a time; val always has masks, training splits only `with_masks`."""
    extra = None if sbd is None else _sbd_folder(Path(sbd))
    with open_files(root) as files:
        yield from _split(files, split, with_masks, extra).examples


def build(
    root: Path,
    output: Path,
    splits: Sequence[str] = ("train_aug", "val"),
    with_masks: bool = False,
    overwrite: bool = False,
    sbd: Path | None = None,
) -> Summary:
    """Write splits of VOC 2012 to `output`; ValueError or FileNotFoundError names the file at fault."""
    check_output(Path(output), overwrite)
    extra = None if sbd is None else _sbd_folder(Path(sbd))
    with open_files(root) as files:
        parts = [_split(files, split, with_masks, extra) for split in splits]
        return write_dataset(output, CLASS_NAMES, parts, overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(__doc__, "voc")
    parser.add_argument("--root", type=Path, required=True, help="VOCdevkit, VOCdevkit/VOC2012 or the official tar")
    parser.add_argument("--splits", nargs="+", default=["train_aug", "val"], choices=SPLITS)
    parser.add_argument("--sbd", type=Path, help="SBD folder (with cls/*.mat) for the masks of train_aug")
    arguments = parser.parse_args(argv)
    return run_command(lambda: build(**vars(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
