"""`msee check-data`: every finding on a folder made for it, the commands to paste, the contact sheet."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_scripts import image_tags
from modeling_msee.cli import main
from modeling_msee.data.check import RECIPE_RESCALE, check_data
from modeling_msee.training.arguments import read_recipe


pytest_plugins = ["training_fixtures"]

Rows = Sequence[tuple[str, list[str]]]


def photo(path: Path, value: int, size: tuple[int, int] = (192, 216)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)


def split(folder: Path, rows: Rows, first: int = 0) -> None:
    """Photographs of one colour each, and their metadata.jsonl."""
    for index, (name, _) in enumerate(rows):
        photo(folder / name, first + index)
    lines = [json.dumps({"file_name": name, "labels": tags}) for name, tags in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training and two validation images of ant and bee, nothing wrong."""
    folder = tmp_path / "photos"
    split(folder / "train", [("1.png", ["ant"]), ("2.png", ["bee"]), ("3.png", ["ant", "bee"])])
    split(folder / "validation", [("4.png", ["ant"]), ("5.png", ["bee"])], first=50)
    return folder


def masks(folder: Path, *names: str) -> None:
    (folder / "masks").mkdir(exist_ok=True)
    for name in names:
        Image.fromarray(np.zeros((216, 192), np.uint8)).save(folder / "masks" / name)


# --- Fine -----------------------------------------------------------------------------------------


def test_nothing_to_say(root: Path) -> None:
    report = check_data(str(root))
    assert report.problems == () and report.warnings == ()
    table = [line.split() for line in str(report).splitlines()]
    assert ["images", "3", "2"] in table and ["ant", "2", "1"] in table and ["no", "tag", "0", "0"] in table
    assert report.images["train"][2].size == (192, 216) and report.images["train"][2].labels == (0, 1)


def test_the_pasted_commands_work(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script) -> None:
    """Without masks, with some masks missing, with all."""
    monkeypatch.chdir(tmp_path)
    prepare, training = check_data(str(root)).commands
    assert prepare.endswith(f"--root {root} --output outputs/photos --evaluation-splits")
    assert training.endswith("--dataset outputs/photos --output_dir outputs/photos-msee --eval_split none")
    masks(root / "validation", "4.png")
    assert "1 of 2 masks are missing" in check_data(str(root)).problems[0]
    masks(root / "validation", "5.png")
    report = check_data(str(root))
    assert str(report).endswith("\n".join(f"  {command}" for command in report.commands))
    words = shlex.split(report.commands[0])
    assert words[:3] == ["python", "-m", "datasets_scripts.image_tags"]
    assert image_tags.main(words[3:]) == 0
    prepared = check_data("outputs/photos")
    assert prepared.warnings == () and len(prepared.commands) == 1
    assert prepared.commands == report.commands[1:]
    assert [facts.digest for facts in prepared.images["train"]] == [facts.digest for facts in report.images["train"]]


def test_separator_and_other_split_names(tmp_path: Path) -> None:
    for name, value in (("learn", 0), ("score", 90)):
        split(tmp_path / "my photos" / name, [("1.png", []), ("2.png", [])], first=value)
        (tmp_path / "my photos" / name / "metadata.jsonl").unlink()
        (tmp_path / "my photos" / name / "metadata.csv").write_text("file_name,labels\n1.png,ant|bee\n2.png,bee\n")
    masks(tmp_path / "my photos" / "score", "1.png", "2.png")
    path = str(tmp_path / "my photos")
    assert "there is no split 'train', only learn, score" in check_data(path, separator="|").problems[0]
    report = check_data(path, "learn", "|")
    assert report.source.class_names == ("ant", "bee") and report.problems == ()
    assert shlex.split(report.commands[0])[-4:] == ["--separator", "|", "--evaluation-splits", "score"]
    assert shlex.split(report.commands[1])[-4:] == ["--train_split", "learn", "--eval_split", "score"]


@pytest.mark.parametrize(
    ("side", "fields"),
    [
        (224, []),
        (896, ["--rescale_min", "0.2", "--rescale_max", "0.36"]),  # 0.8 and 1.45 times a quarter
        (112, ["--rescale_min", "1.6", "--rescale_max", "2.9"]),
    ],
)
def test_rescaling_follows_the_size_of_the_photographs(tmp_path: Path, side: int, fields: list[str]) -> None:
    for index in range(3):
        photo(tmp_path / f"{index}.png", index, (side + index, side - index))
    lines = [json.dumps({"file_name": f"{index}.png", "labels": ["ant"]}) for index in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert shlex.split(check_data(str(tmp_path)).commands[1])[7:] == ["--eval_split", "none", *fields]


def test_rescaling_is_that_of_the_recipe() -> None:
    recipe = read_recipe(str(Path(__file__).parents[1] / "configuration" / "tags.yaml"))
    assert (recipe["rescale_min"], recipe["rescale_max"]) == RECIPE_RESCALE


# --- Findings -------------------------------------------------------------------------------------


def test_what_cannot_be_read(root: Path) -> None:
    (root / "classes.json").write_text('["background", "ant", "bee"]')
    (root / "train" / "1.png").write_bytes((root / "train" / "1.png").read_bytes()[:60])
    lines = [{"file_name": "6.png", "labels": []}, {"file_name": "2.png", "labels": ["bea"]}]
    with (root / "train" / "metadata.jsonl").open("a") as file:
        file.writelines(f"\n{json.dumps(line)}" for line in lines)
    problems = check_data(str(root)).problems
    assert len(problems) == 3
    assert "line 4: image" in problems[0] and "6.png does not exist" in problems[0]
    assert "line 5: unknown class 'bea'; did you mean 'bee'" in problems[1]
    assert "split train: image" in problems[2] and "1.png (image_id 1) cannot be read" in problems[2]
    assert "Next:" not in str(check_data(str(root)))


def test_image_twice_in_a_list(root: Path) -> None:
    with (root / "train" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "1.png", "labels": ["bee"]}')
    report = check_data(str(root))
    assert report.problems == ("split train: more than one image is called 1; every image_id must differ",)
    assert report.warnings[1] == "1 of the repeated files have different tags: 1 = 1"


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        (("Cat", "cat"), True),
        (("berry", "berries"), True),
        (("glass", "glasses"), True),
        (("fire truck", "fire_trucks"), True),
        (("teddy-bear", "teddybear"), True),
        (("umbrela", "umbrella"), True),
        (("house", "horse"), False),
        (("bus", "boat"), False),
        (("tv", "tie"), False),
    ],
)
def test_names_alike(tmp_path: Path, names: tuple[str, str], alike: bool) -> None:
    split(tmp_path, [("1.png", [names[0]]), ("2.png", [names[1]])])
    assert any(repr(names[0]) in text for text in check_data(str(tmp_path)).warnings) == alike


def test_no_false_alarm_on_the_benchmarks(shared: Path) -> None:
    """None of VOC's 20 and COCO's 80 names is like another."""
    from datasets_scripts.voc import CLASS_NAMES
    from modeling_msee.data.check import _alike_names

    instances = json.loads((shared / "data" / "coco" / "annotations" / "instances_val2014.json").read_bytes())
    for names in (CLASS_NAMES, [category["name"] for category in instances["categories"]]):
        assert list(_alike_names(names)) == []


def test_repeated_files(root: Path) -> None:
    image = (root / "train" / "1.png").read_bytes()
    (root / "validation" / "5.png").write_bytes(image)
    (root / "train" / "3.png").write_bytes((root / "train" / "2.png").read_bytes())
    across, within, tags = check_data(str(root)).warnings
    assert across.startswith("1 file(s) are there in more than one split: train/1 = validation/5; scores on them")
    assert within.startswith("1 file(s) are there more than once: train/2 = train/3; keep one")
    assert tags == "2 of the repeated files have different tags: 1 = 5, 2 = 3"


def test_tags_and_sizes(root: Path) -> None:
    (root / "classes.json").write_text('["ant", "bee", "cow", "dog"]')
    rows = [("1.png", ["ant"]), ("2.png", ["ant", "bee"]), ("3.png", ["ant", "cow"])]
    split(root / "train", rows)
    split(root / "validation", [("4.png", ["dog"]), ("5.png", [])], first=50)
    photo(root / "train" / "3.png", 3, size=(63, 300))
    text = "\n".join(check_data(str(root)).warnings)
    assert "split train: every image is tagged with ant;" in text
    assert "split train: no image is tagged with dog" in text
    assert "split validation: no image is tagged with ant, bee, cow" in text
    assert "split validation: 1 image(s) have no tag and teach what is background: 5;" in text
    assert "split validation has dog, which no image of train is tagged with" in text
    assert "split train: 1 image(s) have a side under 64 pixels, four patches of 16: 3 (63x300);" in text


@pytest.mark.parametrize(("many", "warned"), [(20, True), (19, False)])
def test_imbalance(tmp_path: Path, many: int, warned: bool) -> None:
    split(tmp_path, [(f"{index}.png", ["ant"]) for index in range(many)] + [("rare.png", ["bee"])])
    expected = [f"split train: ant has {many} images and bee only 1; classes this rare are seldom learnt: "]
    warnings = check_data(str(tmp_path)).warnings
    assert [text[: len(expected[0])] for text in warnings] == expected * warned


# --- Command --------------------------------------------------------------------------------------


def test_command_and_contact_sheet(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "new" / "sheet.png"
    assert main(["check-data", str(root), "--contact-sheet", str(sheet)]) == 0
    assert capsys.readouterr().out.startswith(f"Contact sheet: {sheet}\n")
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # Images 1 and 2 stand under one class, image 3 under both: 132 px high, eight ninths as wide.
    for value, times in ((0, 1), (1, 1), (2, 2)):
        count = int((pixels == (value, 255 - value, 7)).all(axis=1).sum())
        assert count == pytest.approx(times * 132 * 132 * 8 / 9, rel=0.05)


def test_exit_code(root: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = ["--contact-sheet", str(tmp_path / "sheet.png")]
    assert main(["check-data", str(tiny_data), *sheet]) == 0  # warnings only: its images are small
    assert "a side under 64 pixels" in capsys.readouterr().out
    (root / "train" / "1.png").unlink()
    assert main(["check-data", str(root), *sheet]) == 1
    assert "Problems, to be repaired before training:\n- " in capsys.readouterr().out
    (root / "train" / "metadata.jsonl").write_text("{oops")
    assert main(["check-data", str(root), *sheet]) == 1
    assert "line 1: expected one JSON object a line" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["check-data", str(tmp_path / "empty"), *sheet]) == 1
    assert "error: " in capsys.readouterr().err
