"""VOC 2012 builder, on a hand-made VOCdevkit and, where present, on real images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from datasets_scripts import voc


SHARED = Path(__file__).resolve().parents[2] / "shared"
XML = (
    "<annotation><object><name>dog</name><part><name>head</name></part></object>"
    "<object><name>{}</name></object></annotation>"
)


def write_mask(path: Path, values: list[list[int]], palette: bool = True) -> None:
    image = Image.fromarray(np.array(values, np.uint8))
    if palette:
        image = image.convert("P")
        image.putdata([value for row in values for value in row])
        image.putpalette([channel for n in range(256) for channel in (n * 7 % 256, 0, n)])
    path.parent.mkdir(exist_ok=True)
    image.save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOCdevkit with a, b in train_aug (mask of a, XML of b), v in val, t in test; images 3 wide, 2 high."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    for name in "abvt":
        Image.new("RGB", (3, 2), (200, 10, 10)).save(folder / f"JPEGImages/{name}.jpg")
    write_mask(folder / "SegmentationClassAug/a.png", [[0, 1, 255], [20, 0, 1]])
    write_mask(folder / "SegmentationClassAug/v.png", [[0, 7, 7], [255, 0, 7]], palette=False)
    (folder / "Annotations/b.xml").write_text(XML.format("cat"))
    lists = folder / "ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb\n\n")
    (lists / "val.txt").write_text("v\n")
    (lists / "test.txt").write_text("t\n")
    return tmp_path / "VOCdevkit"


def pack(root: Path) -> Path:
    path = root.parent / "VOCtrainval.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(root, "VOCdevkit")
    return path


def rows(output: Path, split: str) -> list[dict]:
    return pq.read_table(next((output / "data").glob(f"{split}-00000-of-00001-*.parquet"))).to_pylist()


def check_written(root: Path, output: Path) -> None:
    summary = voc.build(root, output, ("train_aug", "val", "test"))
    assert [(s.name, s.images, s.unlabelled) for s in summary.splits] == [
        ("train_aug", 2, 0),
        ("val", 1, 0),
        ("test", 1, 1),
    ]
    train, val, test = (rows(output, split) for split in ("train_aug", "val", "test"))
    assert [(row["image_id"], row["labels"]) for row in train] == [("a", [0, 19]), ("b", [7, 11])]
    assert train[0].keys() == test[0].keys() == {"image_id", "image", "labels"}
    assert (test[0]["image_id"], test[0]["labels"], val[0]["labels"]) == ("t", [], [6])
    with Image.open(io.BytesIO(val[0]["segmentation_map"]["bytes"])) as mask:
        assert (mask.mode, np.asarray(mask).tolist()) == ("L", [[0, 7, 7], [255, 0, 7]])


def test_folders_and_tar_give_the_same(root: Path, tmp_path: Path) -> None:
    for place in (root, root / "VOC2012", root.parent, pack(root)):
        output = tmp_path / "out" / place.name
        check_written(place, output)
        assert rows(output, "train_aug")[0]["image"] == {
            "bytes": (root / "VOC2012/JPEGImages/a.jpg").read_bytes(),
            "path": "a.jpg",
        }


def test_official_names() -> None:
    assert len(voc.CLASS_NAMES) == 20
    assert [voc.CLASS_NAMES[index] for index in (0, 6, 14, 19)] == ["aeroplane", "car", "person", "tvmonitor"]


def test_training_masks_only_when_asked_for(root: Path) -> None:
    assert [example.mask for example in voc.examples(root, "train_aug")] == [None, None]
    assert all(example.mask for example in voc.examples(root, "val"))
    assert [example.mask for example in voc.examples(root, "test", with_masks=True)] == [None]
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: image without mask .*add the mask or give --sbd"):
        list(voc.examples(root, "train_aug", with_masks=True))
    write_mask(root / "VOC2012/SegmentationClass/b.png", [[0, 3, 0], [0, 0, 0]])
    assert [example.labels for example in voc.examples(root, "train_aug", with_masks=True)] == [(0, 19), (2,)]


def test_sbd_masks_and_the_derived_list(root: Path, tmp_path: Path) -> None:
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    segmentation = np.array([[0, 15, 15], [0, 0, 2]], np.uint8)
    savemat(sbd / "cls/b.mat", {"GTcls": {"Segmentation": segmentation, "Boundaries": 0}})
    (sbd / "train.txt").write_text("b\nv\n")
    (sbd / "val.txt").write_text("a\n")
    lists = root / "VOC2012/ImageSets/Segmentation"
    (lists / "train_aug.txt").unlink()
    (lists / "train.txt").write_text("a\n")
    found = list(voc.examples(root, "train_aug", with_masks=True, sbd=sbd.parent))
    assert [(example.image_id, example.labels) for example in found] == [("a", (0, 19)), ("b", (1, 14))]
    with Image.open(io.BytesIO(found[1].mask or b"")) as mask:
        np.testing.assert_array_equal(np.asarray(mask), segmentation)
    (sbd / "cls/b.mat").write_bytes(b"MATLAB?")
    with pytest.raises(ValueError, match=r"b\.mat: expected SBD's GTcls\.Segmentation"):
        list(voc.examples(root, "train_aug", sbd=sbd))
    with pytest.raises(FileNotFoundError, match="is no SBD folder"):
        list(voc.examples(root, "train_aug", sbd=root))


# --- Bad input ------------------------------------------------------------------------------------


def break_image(folder: Path) -> None:
    (folder / "JPEGImages/v.jpg").write_bytes(b"<html>404</html>")


def break_size(folder: Path) -> None:
    write_mask(folder / "SegmentationClassAug/v.png", [[0, 7], [0, 7], [0, 7]])


def break_value(folder: Path) -> None:
    write_mask(folder / "SegmentationClassAug/v.png", [[0, 21, 7], [0, 0, 7]])


def break_mode(folder: Path) -> None:
    Image.new("RGB", (3, 2)).save(folder / "SegmentationClassAug/v.png")


def break_name(folder: Path) -> None:
    (folder / "Annotations/b.xml").write_text(XML.format("aeroplan"))


def break_xml(folder: Path) -> None:
    (folder / "Annotations/b.xml").write_text("<annotation>")


def break_listed_path(folder: Path) -> None:
    (folder / "ImageSets/Segmentation/val.txt").write_text("../../../secret\n")


def break_line(folder: Path) -> None:
    (folder / "ImageSets/Segmentation/val.txt").write_text("v v v\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_image, r"v\.jpg: expected an image file, got 16 bytes"),
        (break_size, r"v\.png: expected a mask as large as its image, 3x2 \(width x height\), got 2x3"),
        (break_value, r"v\.png: expected mask values 0 .*1\.\.20 .*got \[21\]"),
        (break_mode, r"v\.png: expected a mask with one 8-bit channel .*got mode RGB"),
        (break_name, r"b\.xml: unknown class 'aeroplan'; did you mean 'aeroplane'"),
        (break_xml, r"b\.xml: expected VOC annotation XML"),
        (break_listed_path, r"val\.txt, line 1: expected a path inside the data folder"),
        (break_line, r"val\.txt, line 1: expected an image name"),
    ],
)
def test_damage_is_named_and_nothing_is_written(root: Path, tmp_path: Path, damage, message: str) -> None:
    damage(root / "VOC2012")
    with pytest.raises(ValueError, match=message):
        voc.build(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["VOCdevkit"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("JPEGImages/v.jpg", r"val\.txt, line 1: image .*v\.jpg does not exist; add it or remove the line"),
        ("SegmentationClassAug/v.png", r"v\.jpg: image without mask \(looked in SegmentationClassAug"),
        ("Annotations/b.xml", r"b\.jpg: image without mask .*without .*b\.xml.*labels are unknown"),
        ("ImageSets/Segmentation/train_aug.txt", r"missing file .*train_aug\.txt: .*rename trainaug\.txt"),
    ],
)
def test_missing_files(root: Path, tmp_path: Path, missing: str, message: str) -> None:
    (root / "VOC2012" / missing).unlink()
    for place in (root, pack(root)):
        with pytest.raises(FileNotFoundError, match=message):
            voc.build(place, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOCdevkit", "VOCtrainval.tar"]


def test_wrong_root_and_split(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert voc.main(["--root", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 1
    assert "point --root at VOCdevkit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown split 'trainval'; expected one of train_aug, train, val, test"):
        list(voc.examples(root, "trainval"))


def tar_with(path: Path, member: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def test_tar_members_cannot_escape(tmp_path: Path) -> None:
    for name in ("../x", "VOCdevkit/VOC2012/../../../x", "/etc/x"):
        with pytest.raises(ValueError, match="expected a path inside the data folder"):
            list(voc.examples(tar_with(tmp_path / "bad.tar", tarfile.TarInfo(name)), "val"))
    link = tarfile.TarInfo("VOCdevkit/VOC2012/JPEGImages/v.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ValueError, match=r"v\.jpg' is a link or device"):
        list(voc.examples(tar_with(tmp_path / "bad.tar", link), "val"))


def test_damaged_tars(root: Path, tmp_path: Path) -> None:
    path = pack(root)
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:-11000])
    (tmp_path / "page.tar").write_text("<html>404</html>")
    for name in ("cut.tar", "page.tar"):
        with pytest.raises(ValueError, match=f"{name}: expected a complete, uncompressed tar"):
            list(voc.examples(tmp_path / name, "val"))
    other = tar_with(tmp_path / "other.tar", tarfile.TarInfo("photos/x.jpg"))
    with pytest.raises(FileNotFoundError, match=r"other\.tar has no folder VOC2012"):
        list(voc.examples(other, "val"))


# --- Real images ----------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_real_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = SHARED / "data" / "VOCdevkit"
    assert voc.main(["--root", str(source), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["images", "26", "22"]
    for row in rows(tmp_path / "out", "val"):
        official = source / "VOC2012/SegmentationClassAug" / f"{row['image_id']}.png"
        with Image.open(official) as mask, Image.open(io.BytesIO(row["segmentation_map"]["bytes"])) as copy:
            np.testing.assert_array_equal(np.asarray(copy), np.asarray(mask))
            assert row["labels"] == [value - 1 for value in np.unique(np.asarray(mask)) if 0 < value < 255]
