"""`msee predict`: which images are found, how they are read and named, and what is written for each."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_msee import MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.inference.legend import with_legend
from modeling_msee.inference.masks import voc_palette
from modeling_msee.inference.network import torch_segmenter
from modeling_msee.inference.predict import predict
from modeling_msee.inference.segment import LARGEST_IMAGE, network_size, segment
from modeling_msee.inference.sources import Unreadable, collect_sources, read_source


pytest_plugins = ["checkpoint_fixtures"]


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two sizes, two files of the same name, a broken and a foreign file."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    picture(24, 16, seed=1).save(folder / "a.png")
    picture(37, 50, seed=2).save(folder / "a.jpg")
    picture(24, 16, seed=3).save(folder / "sub" / "a.png")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("not an image")
    return folder


# --- Finding images -------------------------------------------------------------------------------


def test_sources_of_folders_globs_and_pictures(photos) -> None:
    folder = collect_sources([photos])
    assert [source.name for source in folder] == ["a", "a-2", "broken", "sub/a"]
    assert [Path(str(source)).name for source in folder] == ["a.jpg", "a.png", "broken.jpg", "a.png"]
    assert [source.name for source in collect_sources([f"{photos}/**/*.png"])] == ["a", "a-2"]
    several = collect_sources([photos / "a.png", str(photos / "sub" / "a.png"), picture(), photos / "A.PNG"][:3])
    assert [source.name for source in several] == ["a", "a-2", "image"]


def test_file_names_with_glob_signs_and_other_case(tmp_path) -> None:
    for name in ("x[1].png", "X[1].jpg"):
        picture().save(tmp_path / name)
    names = [source.name for source in collect_sources([tmp_path / "x[1].png", tmp_path / "X[1].jpg"])]
    assert names == ["x[1]", "X[1]-2"]  # one file where case does not count


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://host/a/photo.jpg?size=2", "photo"),
        ("https://host/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "passwd"),
        ("https://host/..", "image"),
        ("https://host", "image"),
        ("http://host/a%00b c.png", "a_b_c"),
    ],
)
def test_names_of_urls_stay_in_the_folder(url: str, name: str) -> None:
    assert collect_sources([url])[0].name == name


@pytest.mark.parametrize("name", ["nope.png", "*.nope", "ftp://host/a.png", "file:///etc/hostname"])
def test_names_that_stand_for_nothing(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected an image file, a folder, a glob or a URL"):
        collect_sources([name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder with image files"):
        collect_sources(["empty"])


@pytest.fixture
def server(photos: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(photos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_urls_are_read_or_reported(server, photos) -> None:
    processor = MSEEImageProcessor(patch_size=8)
    good, missing, text = collect_sources([f"{server}/a.png", f"{server}/nope.png", f"{server}/notes.txt"])
    expected = np.asarray(Image.open(photos / "a.png")).transpose(2, 0, 1)
    assert torch.equal(read_source(good, processor), torch.from_numpy(expected.copy()))
    assert read_source(missing, processor) == Unreadable(f"{server}/nope.png", "HTTP Error 404: File not found")
    assert "cannot identify image file" in read_source(text, processor).reason


def test_odd_modes(tmp_path) -> None:
    image = picture(10, 6)
    grey = np.asarray(image.convert("L"))
    image.convert("L").save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    processor = MSEEImageProcessor(patch_size=8)
    found = {source.name: read_source(source, processor) for source in collect_sources([tmp_path])}
    colour = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(found["alpha"], colour)
    assert torch.equal(found["grey"], torch.from_numpy(grey.copy()).expand(3, -1, -1))
    assert torch.equal(found["sixteen"], found["grey"].float())
    assert torch.equal(found["turned"], colour.rot90(-1, (1, 2)))


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((16, 20), (16, 24)),  # 2.5 patches of 8 become 3
        ((512, 512), (512, 512)),  # 4096 patches
        ((1024, 1024), (512, 512)),
        ((8, 80_000), (8, 8 * LARGEST_IMAGE)),  # one patch high
        ((3, 50), (8, 48)),
    ],
)
def test_network_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert network_size(MSEEImageProcessor(patch_size=8), *size) == expected


def test_masks_do_not_depend_on_the_batch(shapes_model) -> None:
    """The mask of an image is the one of the processor and model themselves, whatever is predicted with it."""
    processor = MSEEImageProcessor(patch_size=8, size={"shortest_edge": 24})
    images = [
        picture(*size, seed=seed) for seed, size in enumerate([(24, 16), (37, 50), (24, 16), (50, 37), (24, 16)])
    ]
    found = list(segment(torch_segmenter(shapes_model, processor), collect_sources(images), batch_size=2))
    for image, prediction in zip(images, found, strict=True):
        inputs = processor(image, return_tensors="pt")
        with torch.no_grad():
            outputs = shapes_model(**inputs)
            scores = shapes_model.class_logits(
                shapes_model.encode(inputs["pixel_values"]).features, shapes_model.classifier
            )
        expected = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])[0].numpy()
        assert (prediction.segmentation == expected).mean() > 0.999  # rounding of sums differs with the batch
        assert np.allclose(prediction.probabilities, scores.sigmoid().numpy()[0], atol=1e-5)
        assert np.array_equal(prediction.picture, np.asarray(image))
        counts = np.bincount(prediction.segmentation.ravel(), minlength=len(prediction.shares))
        assert np.allclose(prediction.shares, counts / counts.sum())
    assert len({prediction.segmentation.tobytes() for prediction in found}) == 5


def test_batch_size_below_one(shapes_model) -> None:
    segmenter = torch_segmenter(shapes_model, MSEEImageProcessor(patch_size=8))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        list(segment(segmenter, collect_sources([picture()]), batch_size=0))


# --- The command ----------------------------------------------------------------------------------


def test_command_writes_everything_and_reports_what_it_skipped(checkpoint, photos, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "out"
    assert main(["predict", str(checkpoint), str(photos), "--output", str(output), "--cams", "--regions"]) == 1
    captured = capsys.readouterr()
    assert f"3 images written to {output}" in captured.out
    assert "error: 1 images skipped" in captured.err and f"{photos / 'broken.jpg'}: " in captured.err
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [Path(line["source"]).name for line in lines] == ["a.jpg", "a.png", "a.png"]
    assert [line["mask"] for line in lines] == ["masks/a.png", "masks/a-2.png", "masks/sub/a.png"]
    for line in lines:
        with Image.open(line["source"]) as image, Image.open(output / line["mask"]) as mask:
            assert mask.mode == "P" and mask.size == image.size == (line["width"], line["height"])
            assert mask.getpalette() == voc_palette().ravel().tolist()
            names = ["background", *line["probabilities"]]
            shares = np.bincount(np.asarray(mask).ravel()) / np.asarray(mask).size
        assert line["pixel_shares"] == {names[i]: round(float(s), 4) for i, s in enumerate(shares) if s > 0}
        assert all(0 < value < 1 for value in line["probabilities"].values()) and len(names) == 6
        for kind in ("overlay", "cam", "region"):
            with Image.open(output / line[kind]) as drawn:
                assert drawn.width >= line["width"] and len(set(drawn.convert("RGB").tobytes()[::3])) > 50
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) == 1 + 4 * 3  # nothing half-written


def test_success_and_python_call(checkpoint, photos, tmp_path) -> None:
    assert main(["predict", str(checkpoint), str(photos / "a.png"), "--output", str(tmp_path / "one")]) == 0
    report = predict(checkpoint, [Image.open(photos / "a.png")], tmp_path / "two")
    assert (report.written, report.unreadable) == (1, ())
    same = [(tmp_path / "one/masks/a.png").read_bytes(), (tmp_path / "two/masks/image.png").read_bytes()]
    assert same[0] == same[1]


def test_output_that_is_not_empty(checkpoint, photos, capsys) -> None:
    assert main(["predict", str(checkpoint), str(photos), "--output", str(photos)]) == 1
    assert f"error: {photos} exists and is not an empty folder" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 5


# --- The legend -----------------------------------------------------------------------------------


def test_legend_keeps_the_picture_and_shows_its_colours() -> None:
    image = np.asarray(picture(300, 60))
    shown = with_legend(image, {3: "cat 12 %", 7: "dog 1 %"})
    assert np.array_equal(shown[:60, :300], image) and shown.shape[1] == 300
    below = shown[60:].reshape(-1, 3)
    for value in (3, 7):
        assert (below == voc_palette()[value]).all(axis=1).sum() > 100
    narrow = with_legend(image[:, :20], {3: "cat 12 %", 7: "dog 1 %"})  # a line for each, and a margin
    assert narrow.shape[1] > 20 and narrow.shape[0] > shown.shape[0] and (narrow[:60, 20:] == 255).all()
