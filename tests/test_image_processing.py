"""Image processor: hand-computed sizes and values, every mode, batches, label maps, round trip, bad input."""

import ast
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_msee import image_processing_msee
from modeling_msee.image_processing_msee import MSEEImageProcessor, resize_labels


ORIENTATION = 0x0112
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
STD = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def process(images, maps=None, **fields):
    return MSEEImageProcessor(**fields)(images, segmentation_maps=maps, return_tensors="pt")


def colours(image, **fields):
    """The processed image in [0, 255] again, (3, h, w)."""
    return (process(image, **fields)["pixel_values"][0] * STD + MEAN) * 255


def assert_colour(image, colour, **fields):
    expected = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, 16, 16)
    torch.testing.assert_close(colours(image, **fields), expected, atol=1e-2, rtol=0)


def post_process(logits, *arguments):
    return MSEEImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=logits), *arguments)


@pytest.mark.parametrize(
    ("size", "patch_size", "image", "expected"),
    [
        (None, 16, (375, 500), (368, 496)),  # 23.44 and 31.25 patches
        (None, 16, (376, 504), (384, 512)),  # 23.5 and 31.5: halves go up
        (None, 14, (375, 500), (378, 504)),  # 26.79 and 35.71
        (None, 16, (1, 7), (16, 16)),  # at least one patch
        (None, 16, (8, 1000), (16, 1008)),  # 62.5
        ({"height": 448, "width": 448}, 16, (375, 500), (448, 448)),
        ({"height": 450, "width": 100}, 16, (375, 500), (448, 96)),  # 28.1 and 6.25
        ({"height": 5, "width": 5}, 16, (375, 500), (16, 16)),
        ({"shortest_edge": 448}, 16, (375, 500), (448, 592)),  # 597.3 -> 37.3 patches
        ({"shortest_edge": 448}, 16, (500, 375), (592, 448)),
        ({"shortest_edge": 24}, 16, (49, 98), (32, 48)),  # exactly 1.5 and 3; 49 * (24 / 49) < 24 in floats
        ({"shortest_edge": 448, "longest_edge": 512}, 16, (375, 500), (384, 512)),  # scale 512/500
        ({"shortest_edge": 448, "longest_edge": 640}, 16, (375, 500), (448, 592)),
        ({"shortest_edge": 32, "longest_edge": 64}, 16, (10, 1000), (16, 64)),  # 0.64 high
    ],
)
def test_resized_size(size, patch_size, image, expected):
    processor = MSEEImageProcessor(size=size, patch_size=patch_size)
    assert processor.resized_size(*image) == expected
    assert processor(np.zeros((*image, 3), np.uint8))["pixel_values"][0].shape == (3, *expected)


def test_size_and_patch_size_of_one_call():
    processor = MSEEImageProcessor(size={"shortest_edge": 64})
    image = noise(40, 50)
    assert processor(image)["pixel_values"][0].shape == (3, 64, 80)
    assert processor(image, size=None)["pixel_values"][0].shape == (3, 48, 48)  # 2.5 and 3.125 patches
    assert processor(image, patch_size=32)["pixel_values"][0].shape == (3, 64, 96)  # 2 and 2.5 patches


def test_normalisation_of_an_image_on_the_grid():
    image = noise(32, 48)
    values = process(image)["pixel_values"]
    assert values.dtype == torch.float32
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD
    torch.testing.assert_close(values[0], expected, atol=1e-5, rtol=0)


def test_rescaling_and_normalisation_can_be_turned_off():
    image = noise(16, 16)
    raw = process(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert torch.equal(raw, torch.from_numpy(np.array(image)).permute(2, 0, 1).float())


def test_bilinear_resize_by_hand():
    # black left half, bright right half, twice as wide: 1/4 and 3/4 of 240 on both sides of the edge
    image = np.zeros((16, 16, 3), dtype=np.float32)
    image[:, 8:] = 240
    row = colours(image, size={"height": 16, "width": 32})[0, 0]
    expected = torch.cat([torch.zeros(15), torch.tensor([60.0, 180.0]), torch.full((15,), 240.0)])
    torch.testing.assert_close(row, expected, atol=1e-2, rtol=0)


def palette(transparency=None):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGB", (16, 16), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (16, 16), 77), (77, 77, 77)),
        (Image.new("LA", (16, 16), (77, 5)), (77, 77, 77)),
        (Image.new("RGBA", (16, 16), (10, 20, 30, 0)), (10, 20, 30)),
        (palette(), (10, 200, 30)),
        (palette(transparency=1), (10, 200, 30)),
        (palette(transparency=b"\xff\x00"), (10, 200, 30)),
        (Image.new("1", (16, 16), 1), (255, 255, 255)),
        (Image.new("I;16", (16, 16), 257 * 100), (100, 100, 100)),
        (Image.frombytes("I;16B", (16, 16), b"\x64\x64" * 256), (100, 100, 100)),  # 0x6464 = 257 * 100
        (Image.new("I", (16, 16), 99), (99, 99, 99)),
        (Image.new("F", (16, 16), 12.5), (12.5, 12.5, 12.5)),
        (Image.new("CMYK", (16, 16), (255, 0, 0, 0)), (0, 255, 255)),
        (np.full((16, 16), 77, dtype=np.uint8), (77, 77, 77)),
        (np.full((16, 16), True), (255, 255, 255)),
        (np.full((16, 16, 1), 77, dtype=np.uint16), (77, 77, 77)),
        (np.full((16, 16, 2), (77, 5), dtype=np.uint8), (77, 77, 77)),
        (np.full((16, 16, 3), (10, 20, 30), dtype=np.int64), (10, 20, 30)),
        (np.full((16, 16, 4), (10, 20, 30, 0), dtype=np.float64), (10, 20, 30)),
        (np.full((16, 16, 3), (10, 20, 30), dtype=np.uint8)[::-1, ::-1], (10, 20, 30)),
        (torch.full((16, 16), 77), (77, 77, 77)),
        (torch.full((1, 16, 16), 77.5), (77.5, 77.5, 77.5)),
        (torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 16, 16), (10, 20, 30)),
        (torch.tensor([10.0, 20, 30, 0], requires_grad=True)[:, None, None].expand(4, 16, 16), (10, 20, 30)),
    ],
)
def test_every_mode_becomes_rgb(image, colour):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_colour(image, colour)


def test_low_images_keep_their_channel_axis():
    for height in (1, 2, 4):
        assert_colour(np.full((height, 9, 3), (0, 200, 0), dtype=np.uint8), (0, 200, 0))
    ambiguous = np.full((3, 9, 3), (0, 200, 0), dtype=np.uint8)
    assert_colour(ambiguous, (0, 200, 0), input_data_format="channels_last")


def test_read_only_arrays_are_not_touched():
    image = np.array(noise(16, 16))
    image.setflags(write=False)
    before = image.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, np.array),
        (2, np.fliplr),
        (3, lambda pixels: np.rot90(pixels, 2)),
        (5, lambda pixels: np.transpose(pixels, (1, 0, 2))),
        (6, lambda pixels: np.rot90(pixels, -1)),  # stored sideways, to be turned clockwise
        (8, np.rot90),
    ],
)
def test_exif_orientation(tmp_path, orientation, turn):
    """A file with the tag gives what its upright pixels give."""
    stored = noise(32, 48)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    expected = turn(np.array(stored))
    values = process(Image.open(path))["pixel_values"]
    assert values.shape[-2:] == ((32, 48) if orientation < 5 else (48, 32))
    assert torch.equal(values, process(expected)["pixel_values"])


def test_map_of_an_exif_turned_image(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path, map_path = tmp_path / "turned.png", tmp_path / "map.png"
    noise(32, 48).save(path, exif=exif)
    sideways = (np.arange(32 * 48) % 21).astype(np.uint8).reshape(32, 48)
    Image.fromarray(sideways).save(map_path, exif=exif)
    upright = np.rot90(sideways, -1)
    for labels in (upright, Image.open(map_path)):
        assert process(Image.open(path), labels)["segmentation_maps"][0].tolist() == upright.tolist()
    with pytest.raises(ValueError, match=r"\(48, 32\).*\(32, 48\)"):
        process(Image.open(path), sideways)


def test_a_batch_gives_each_image_what_it_gets_alone():
    images = [noise(100, 60, 1), noise(50, 130, 2), np.array(noise(30, 30, 3)), noise(100, 60, 4)]
    batch = process(images)["pixel_values"]
    assert batch.shape == (4, 3, 96, 128)
    for image, values in zip(images, batch, strict=True):
        alone = process(image)["pixel_values"][0]
        height, width = alone.shape[-2:]
        assert torch.equal(values[:, :height, :width], alone)
        assert values[:, height:].abs().sum() == 0
        assert values[:, :, width:].abs().sum() == 0


def test_batches_come_as_list_nested_list_tuple_or_array():
    processor = MSEEImageProcessor()
    images = [noise(16, 16, seed) for seed in range(2)]
    arrays = np.stack([np.array(image) for image in images])
    expected = processor(images, return_tensors="pt")["pixel_values"]
    same = [tuple(images), [[images[0]], [images[1]]], arrays, [arrays], torch.from_numpy(arrays)]
    for batch in [*same, torch.from_numpy(arrays).permute(0, 3, 1, 2)]:
        assert torch.equal(processor(batch, return_tensors="pt")["pixel_values"], expected)
    assert isinstance(processor(images, return_tensors="np")["pixel_values"], np.ndarray)
    assert torch.equal(torch.stack(processor(images)["pixel_values"]), expected)


def test_segmentation_maps_are_resized_nearest_and_padded_with_255():
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 21, (40, 24)), rng.integers(0, 21, (16, 50))]
    batch = process([noise(40, 24), noise(16, 50)], maps)
    labels = batch["segmentation_maps"]
    assert labels.dtype == torch.int64 and labels.shape == (2, 48, 48) == batch["pixel_values"][:, 0].shape
    for result, original, (height, width) in zip(labels, maps, [(48, 32), (16, 48)], strict=True):
        source = torch.tensor(original)[None, None].float()
        expected = F.interpolate(source, size=(height, width), mode="nearest-exact")
        assert torch.equal(result[:height, :width], expected[0, 0].long())
        assert (result[height:] == 255).all() and (result[:, width:] == 255).all()


def test_nearest_by_hand():
    labels = torch.tensor([[1, 2, 3, 4]])
    assert resize_labels(labels, (1, 2)).tolist() == [[2, 4]]  # centres 1.0 and 3.0
    assert resize_labels(labels, (2, 8)).tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
    assert resize_labels(labels, (1, 3)).tolist() == [[1, 3, 4]]  # centres 0.67, 2.0, 3.33


@pytest.mark.parametrize(
    "labels",
    [
        palette(),
        Image.new("L", (16, 16), 1),
        Image.new("1", (16, 16), 1),
        Image.new("I;16", (16, 16), 1),
        np.ones((16, 16), dtype=np.uint16),
        np.ones((16, 16), dtype=np.int8)[::-1],
        np.ones((1, 16, 16), dtype=bool),
        torch.ones(16, 16, dtype=torch.int32),
        [torch.ones(1, 16, 16, dtype=torch.uint8)],
    ],
)
def test_every_kind_of_segmentation_map(labels):
    result = process(noise(16, 16), labels)["segmentation_maps"]
    assert torch.equal(result, torch.ones(1, 16, 16, dtype=torch.int64))


def test_large_integers_survive():
    result = process(noise(20, 20), np.full((20, 20), 2**24 + 1))["segmentation_maps"]
    assert (result == 2**24 + 1).all()


def test_label_maps_of_a_padded_batch_equal_those_alone():
    sizes = [(100, 60), (50, 130), (7, 7)]
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randn(1, 5, *grid, generator=generator) for grid in [(6, 4), (3, 8), (1, 1)]]
    batch = torch.full((3, 5, 6, 8), 1e4)  # what padding predicts must not matter
    batch[:, 4] = 1e5
    for padded, logits in zip(batch, alone, strict=True):
        padded[:, : logits.shape[2], : logits.shape[3]] = logits[0]
    for target_sizes in (sizes, torch.tensor(sizes), np.array(sizes)):
        together = post_process(batch, target_sizes)
        for labels, logits, size in zip(together, alone, sizes, strict=True):
            expected = post_process(logits, [size])[0]
            assert labels.shape == size and labels.dtype == torch.int64
            assert torch.equal(labels, expected)


def test_upsampled_labels_at_known_positions():
    """Patch centres are at columns 7.5 and 23.5; class 1 starts where the difference of the logits is 0."""
    even = torch.tensor([[[[1.0, -1.0]], [[-1.0, 1.0]]]])  # 2 and -2: zero at 15.5
    assert post_process(even, [(16, 32)])[0].tolist() == [[0] * 16 + [1] * 16] * 16
    uneven = torch.tensor([[[[3.0, -1.0]], [[-3.0, 1.0]]]])  # 6 and -2: zero at 7.5 + 3/4 of 16 = 19.5
    assert post_process(uneven, [(15, 32)])[0].tolist() == [[0] * 20 + [1] * 12] * 15


def test_label_maps_on_the_grid_and_scores():
    logits = torch.randn(2, 4, 3, 5)
    labels = post_process(logits)
    assert torch.equal(torch.stack(labels), logits.argmax(dim=1))
    items = post_process(logits, None, True)
    assert torch.equal(items[1].segmentation, labels[1])
    assert torch.equal(items[1].segmentation_scores, logits[1])


def test_bfloat16_logits_are_resized_in_float32():
    logits = torch.randn(1, 3, 2, 2).bfloat16()
    scores = post_process(logits, [(30, 30)], True)[0].segmentation_scores
    assert torch.equal(scores, F.interpolate(logits.float(), size=(30, 30), mode="bilinear")[0])


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [
        ([(32, 32)], "one target size per image, got 1 for 2"),
        ([], "got 0 for 2"),
        ([(32, 32), (16, 16)], r"fill \(2, 2\) patches, the logits are \(3, 5\)"),  # not the image's size
        ([(480, 640), (16, 16)], r"fill \(30, 40\) patches"),
        ([(48, 80), (0, 16)], "height 0"),
    ],
)
def test_target_sizes_that_do_not_fit(target_sizes, message):
    with pytest.raises(ValueError, match=message):
        post_process(torch.zeros(2, 4, 3, 5), target_sizes)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"patch_size": 14, "size": {"height": 448, "width": 224}},
        {"size": {"shortest_edge": 448}, "resample": Image.Resampling.BICUBIC, "do_rescale": False},
        {"size": {"shortest_edge": 448, "longest_edge": 1024}, "do_normalize": False, "rescale_factor": 0.5},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    ],
)
def test_round_trip(tmp_path, fields):
    processor = MSEEImageProcessor(**fields)
    processor.save_pretrained(tmp_path)
    loaded = MSEEImageProcessor.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["patch_size"] == fields.get("patch_size", 16) and saved.get("size") == fields.get("size")
    for name in MSEEImageProcessor.valid_kwargs.__annotations__:
        assert getattr(loaded, name) == getattr(processor, name), name
    for name, value in fields.items():
        assert getattr(loaded, name) == (tuple(value) if isinstance(value, list) else value)
    assert MSEEImageProcessor.from_pretrained(tmp_path, patch_size=8, size=None).size is None
    assert MSEEImageProcessor.from_pretrained(tmp_path, patch_size=8).patch_size == 8


def test_loads_as_remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(MSEEImageProcessor, "_auto_class", None)
    MSEEImageProcessor.register_for_auto_class()
    MSEEImageProcessor(patch_size=14, size={"shortest_edge": 70}).save_pretrained(tmp_path / "checkpoint")
    saved = json.loads((tmp_path / "checkpoint" / "preprocessor_config.json").read_text())
    reference = saved["auto_map"]["AutoImageProcessor"]
    remote = get_class_from_dynamic_module(reference, str(tmp_path / "checkpoint"))
    assert remote is not MSEEImageProcessor and remote.__name__ == "MSEEImageProcessor"
    assert remote.from_pretrained(tmp_path / "checkpoint").resized_size(35, 70) == (70, 140)


def test_file_stands_alone():
    tree = ast.parse(Path(image_processing_msee.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(node.level == 0 for node in imports if isinstance(node, ast.ImportFrom))
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert packages == {"numpy", "torch", "torchvision", "transformers", "PIL"}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "got 0"),
        (np.zeros((20, 20, 5), dtype=np.uint8), r"1 to 4 channels.*\(20, 20, 5\)"),
        (torch.zeros(5, 20, 20), r"1 to 4 channels.*\(5, 20, 20\)"),
        (np.zeros(7), r"1 to 4 channels.*\(7,\)"),
        (np.array(3.0), r"1 to 4 channels.*\(\)"),
        (Image.new("RGB", (0, 5)), "height 5 and width 0"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "height 0 and width 5"),
        (np.zeros((5, 0)), "height 5 and width 0"),
        (np.full((20, 20, 3), np.nan), r"\[0, 255\] and no NaN, got \[nan"),
        (np.where(np.eye(20) > 0, np.inf, 1.0), "inf"),
        (np.full((20, 20), 256, dtype=np.uint16), r"got \[256"),
        (torch.full((3, 20, 20), -1.0), r"got \[-1"),
        (Image.new("I", (20, 20), 70000), r"got \[70000"),
        ([noise(16, 16), np.full((20, 20), np.nan)], "image 1: "),
    ],
)
def test_unusable_images(images, message):
    with pytest.raises(ValueError, match=message):
        process(images)


def test_things_that_are_no_images():
    for images in (None, [None], 3, [[1, 2], [3, 4]]):
        with pytest.raises(TypeError):
            process(images)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file_is_named(tmp_path, suffix):
    whole, broken = tmp_path / f"whole.{suffix}", tmp_path / f"broken.{suffix}"
    noise(64, 64).save(whole)
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image 1: cannot decode the image file .*broken\.{suffix}"):
        process([Image.open(whole), Image.open(broken)])
    with pytest.raises(ValueError, match=rf"image 0: .*broken\.{suffix}"):
        process(noise(64, 64), Image.open(broken))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros((20, 30), int), np.zeros((30, 20), int)], r"image 1: .*\(20, 30\).*\(30, 20\)"),
        ([np.zeros((20, 30), int)], "got 2 and 1"),
        ([np.zeros((20, 30)), np.zeros((20, 30))], "integer map.*float64"),
        ([noise(20, 30), noise(20, 30)], r"integer map.*\(20, 30, 3\)"),
        ([torch.zeros(20, 30), torch.zeros(20, 30)], "integer map.*float32"),
    ],
)
def test_maps_that_do_not_fit(maps, message):
    with pytest.raises(ValueError, match=message):
        process([noise(20, 30), noise(20, 30)], maps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, got 0"),
        ({"patch_size": -16}, "got -16"),
        ({"size": {"height": 448}}, "size must be None or have the keys"),
        ({"size": {"heigth": 448, "width": 448}}, "heigth"),
        ({"size": {"longest_edge": 448}}, "size must be"),
        ({"size": {"height": 448, "width": 0}}, "size must be"),
        ({"size": {"height": 448, "width": 448, "shortest_edge": 3}}, "size must be"),
        ({"size": {}}, "size must be"),
        ({"size": 448}, "size must be.*448"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": True, "crop_size": {"height": 4, "width": 4}}, "do_center_crop"),
    ],
)
def test_bad_fields_are_refused_at_creation_and_per_call(fields, message):
    with pytest.raises(ValueError, match=message):
        MSEEImageProcessor(**fields)
    with pytest.raises(ValueError, match=message):
        MSEEImageProcessor()(noise(16, 16), **fields)
