"""Every command of README and docs is run, word for word, in a folder laid out as its document assumes.

Real photographs of ../shared, tiny encoders, recipes of two steps; the Hub is the stand-in. Left out are lines marked
`needs a GPU` or `needs PyPI`, and what starts or belongs to a test run (`make install`, `test`, `check`, pytest). The
commands of `benchmarks` that take `--repeats` get one.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from documents import DOCUMENTS, ROOT, bash_commands, python_blocks
from PIL import Image
from reference_weights import random_toco_state
from scipy.io import savemat
from stand_in_hub import StandInHub
from transformers import AutoConfig, AutoModel


pytestmark = pytest.mark.slow

LEFT_OUT = ("make install", "make test", "make check", ".venv/bin/python -m pytest", "MSEE_SPACE_SCREENSHOT")
REPEATING = ("python -m benchmarks.step", "python -m benchmarks.faster")
TWO_STEPS = {"max_steps": 2, "warmup_steps": 0}
STARTS = ("segmentation", "main_activation", "patch_contrast", "class_contrast", "msee")
# Every term on from the first step; numbers of images that two processes can share.
SHORT = {
    **TWO_STEPS,
    **{f"{name}_start_step": 0 for name in STARTS},
    **{"effective_batch_size": 4, "save_steps": 1, "save_strategy": "steps"},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "facebook/dinov2-small": {"model_type": "dinov2", "mlp_ratio": 2, "patch_size": 14, "image_size": 70},
    "google/vit-base-patch16-224": {"model_type": "vit", "intermediate_size": 64, "patch_size": 16, "image_size": 64},
}
# What a document takes for granted: paths that the fixture `prepared` holds.
INPUTS = {
    "README.md": (
        *("photos", "photo.jpg", "VOCdevkit", "benchmark_RELEASE", "coco", "toco.pth"),
        *("outputs/voc-msee", "outputs/voc-test"),
    ),
    "docs/figures.md": (
        *("outputs/voc", "outputs/toco", "outputs/voc-msee", "outputs/stamps", "outputs/stamps-msee"),
        *("outputs/coco", "outputs/coco-msee"),
    ),
    "docs/hub.md": ("outputs/shapes", "outputs/demo", "outputs/tags"),
    "docs/own-data.md": ("photos",),
    "docs/performance.md": ("photo.jpg", "outputs/shapes"),
    "docs/protocols.md": ("outputs/shapes", "outputs/demo", "outputs/voc-msee", "outputs/voc-test", "MODEL", "DATA"),
    "docs/results.md": ("outputs/stamps", "outputs/photos-msee"),
}

Run = Callable[[Path, str], str]


# --- The folder -----------------------------------------------------------------------------------


def lay_out(folder: Path) -> Path:
    """The repository as a user has it, with its environment and shortened recipes, and nothing in outputs."""
    folder.mkdir()
    for name in ("benchmarks", "datasets_scripts", "examples", "modeling_msee", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("Makefile", "README.md", "pyproject.toml", "train_msee.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "configuration", folder / "configuration")
    for recipe in (folder / "configuration").glob("*.yaml"):
        recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | SHORT))
    for table in (folder / "configuration" / "ablations").glob("*.yaml"):
        values = yaml.safe_load(table.read_text())
        short = {"overrides": values.get("overrides", {}) | TWO_STEPS, "rows": values["rows"][:2], "seeds": [0]}
        table.write_text(yaml.safe_dump(values | short))
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / "installed").touch()  # newer than pyproject.toml, so that make installs nothing
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    """Holds the encoders that the recipes name; `user` may write."""
    with StandInHub(owner="user") as server:
        yield server


@pytest.fixture(scope="module")
def run(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(folder, line)`: what a command line prints there; fails unless it ends with 0."""
    environment = {**os.environ, **hub.environment(hub.write_token, tmp_path_factory.mktemp("home"))}
    environment |= {"HF_HUB_OFFLINE": "0", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"

    def run_line(folder: Path, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
        assert done.returncode == 0, f"{line}\nended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    return run_line


# --- What the documents assume --------------------------------------------------------------------


def copy_photos(source: Path, target: Path, count: int) -> None:
    """The first photographs of a tagged folder, with their masks and tags."""
    (target / "images").mkdir(parents=True)
    (target / "masks").mkdir()
    lines = (source / "metadata.jsonl").read_text().splitlines()[:count]
    for line in lines:
        image = Path(json.loads(line)["file_name"])
        shutil.copy(source / image, target / image)
        shutil.copy(source / "masks" / f"{image.stem}.png", target / "masks" / f"{image.stem}.png")
    (target / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write_sbd(devkit: Path, target: Path) -> None:
    """The masks of train_aug in SBD's form."""
    sbd = target / "dataset"
    (sbd / "cls").mkdir(parents=True)
    ids = (devkit / "VOC2012/ImageSets/Segmentation/train_aug.txt").read_text().split()
    for image_id in ids:
        with Image.open(devkit / f"VOC2012/SegmentationClassAug/{image_id}.png") as mask:
            savemat(sbd / f"cls/{image_id}.mat", {"GTcls": {"Segmentation": np.asarray(mask), "Boundaries": 0}})
    (sbd / "train.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    (sbd / "val.txt").write_text("")


def publish_encoders(hub: StandInHub, folder: Path) -> None:
    """Random weights under the names of the recipes' encoders."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
    for name, fields in ENCODERS.items():
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(**fields, **sizes)).save_pretrained(folder / name)
        hub.publish(name, {path.name: path.read_bytes() for path in (folder / name).iterdir()})


PREPARATION = (
    "python -m datasets_scripts.shapes --output outputs/shapes --train 12 --validation 5",
    "python -m datasets_scripts.voc --root VOCdevkit --splits train_aug val test --output outputs/voc",
    "python -m datasets_scripts.coco --root coco --output outputs/coco",
    "python -m datasets_scripts.image_tags --root photos --output outputs/tags",
    "cp -r outputs/tags outputs/stamps",
    "python train_msee.py configuration/demo.yaml",
    "python train_msee.py configuration/voc.yaml --effective_batch_size 1 --crf false",
    "python train_msee.py configuration/coco.yaml --effective_batch_size 1 --crf false",
    "python train_msee.py configuration/tags.yaml --dataset outputs/stamps --output_dir outputs/stamps-msee",
    "cp -r outputs/voc-msee outputs/toco",
    "cp -r outputs/stamps-msee outputs/photos-msee",
    "cp -r outputs/stamps-msee/checkpoint-2 outputs/photos-msee/checkpoint-400",
    "cp -r outputs/demo MODEL && cp -r outputs/shapes DATA",
)


@pytest.fixture(scope="module")
def prepared(shared: Path, run: Run, hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A laid out folder that holds everything of `INPUTS`."""
    folder = lay_out(tmp_path_factory.mktemp("prepared") / "work")
    data, devkit = shared / "data", folder / "VOCdevkit"
    publish_encoders(hub, tmp_path_factory.mktemp("encoders"))
    shutil.copytree(data / "VOCdevkit", devkit)
    lists = devkit / "VOC2012/ImageSets/Segmentation"
    tests = (lists / "val.txt").read_text().split()[:3]
    (lists / "test.txt").write_text("".join(f"{image_id}\n" for image_id in tests))
    write_sbd(devkit, folder / "benchmark_RELEASE")
    (folder / "coco").symlink_to(data / "coco")
    for split, count in (("train", 40), ("validation", 8)):
        copy_photos(data / "stamps" / split, folder / "photos" / split, count)
    shutil.copy(data / "stamps/classes.json", folder / "photos/classes.json")
    shutil.copy(devkit / f"VOC2012/JPEGImages/{tests[0]}.jpg", folder / "photo.jpg")
    torch.save(random_toco_state(width=64, depth=4, patch=16, classes=20), folder / "toco.pth")
    (folder / "outputs/voc-test").mkdir(parents=True)
    for image_id in tests:
        shutil.copy(devkit / f"VOC2012/JPEGImages/{image_id}.jpg", folder / "outputs/voc-test")
    for line in PREPARATION:
        run(folder, line)
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`workspace(document)`: a folder with what the document takes for granted."""

    def with_inputs(document: str) -> Path:
        folder = lay_out(tmp_path / "work")
        (folder / "outputs").mkdir()
        for name in INPUTS[document]:
            copy = shutil.copytree if (prepared / name).is_dir() else shutil.copy
            copy(prepared / name, folder / name)
        if document == "README.md":  # one folder without splits
            (folder / "photos").rename(folder / "all")
            (folder / "all/train").rename(folder / "photos")
        return folder

    return with_inputs


# --- The commands ---------------------------------------------------------------------------------


def runnable_lines(document: str) -> list[str]:
    lines = []
    for line, _ in bash_commands((ROOT / document).read_text(encoding="utf-8")):
        if "needs a GPU" in line or "needs PyPI" in line or line.startswith(LEFT_OUT):
            continue
        words, _, comment = line.partition("  #")
        repeats = " --repeats 1" if words.startswith(REPEATING) else ""
        lines.append(words.rstrip() + repeats + ("  #" + comment if comment else ""))
    return lines


def test_no_document_is_forgotten() -> None:
    names = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
    assert {name for name in names if runnable_lines(name)} == set(INPUTS)


@pytest.mark.parametrize("document", INPUTS)
def test_commands_run(document: str, workspace, run: Run) -> None:
    """Each ends with 0, in the order of the document; then the Python blocks."""
    folder = workspace(document)
    for line in runnable_lines(document):
        print(run(folder, line)[-3000:])
    for number, block in enumerate(python_blocks((ROOT / document).read_text(encoding="utf-8"))):
        (folder / f"block_{number}.py").write_text(block)
        print(run(folder, f"python block_{number}.py"))
    for table in folder.glob("outputs/**/failures-*.csv"):
        with table.open(newline="") as file:
            assert list(csv.DictReader(file))
