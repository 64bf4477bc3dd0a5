"""Augmentation: a function of the seed, a box that tells padding from image, views that fit together."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from modeling_msee.data.contract import read_rgb
from modeling_msee.training.augmentation import AugmentedSample, TrainingAugmentation, sample_seed


SIDE = 48
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
TENSORS = ("pixel_values", "global_view", "local_source", "box", "crop_draws")


def augmentation(rescale: tuple[float, float] = (0.5, 2.0), plain: bool = False) -> TrainingAugmentation:
    """With `plain` no change of colour and no blur."""
    result = TrainingAugmentation(SIDE, rescale, local_crop_count=3, mean=MEAN, std=STD)
    if plain:
        result.training_view = result.local_view = v2.Identity()
    return result


def noise(height: int, width: int, block: int = 1) -> Image.Image:
    cells = np.random.default_rng(0).integers(0, 256, (height // block, width // block, 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(block, axis=0).repeat(block, axis=1))


def colours(view: Tensor) -> Tensor:
    """A view without its normalisation, in [0, 255]."""
    return 255 * (view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


def same(first: AugmentedSample, second: AugmentedSample) -> list[bool]:
    return [torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS]


# --- Seeds ----------------------------------------------------------------------------------------


def test_views_are_a_function_of_the_seed() -> None:
    image = noise(60, 80)
    torch.manual_seed(1)
    first = augmentation()(image, seed=7)
    torch.manual_seed(2)
    assert all(same(first, augmentation()(image, seed=7)))
    other = same(first, augmentation()(image, seed=8))
    assert not any(other[:3]) and not other[4]


def test_seeds_differ_between_runs_epochs_and_samples() -> None:
    keys = [(run, epoch, index) for run in range(4) for epoch in range(20) for index in range(50)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**32 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


def test_random_state_of_the_caller_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError("seeded an accelerator")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    augmentation()(noise(60, 80), seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1] and random.getstate() == before[2]


# --- Crop and box ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_box_is_where_no_padding_is(seed: int) -> None:
    white = Image.new("RGB", (40, 30), "white")
    views = augmentation((0.5, 0.9), plain=True)(white, seed)
    top, bottom, left, right = views.box.tolist()
    assert 15 <= bottom - top <= 27 and 20 <= right - left <= 36
    assert (right - left) / (bottom - top) == pytest.approx(40 / 30, abs=0.06)
    expected = torch.zeros(3, SIDE, SIDE)
    expected[:, top:bottom, left:right] = 255
    assert torch.allclose(colours(views.pixel_values), expected, atol=1e-3)


def test_small_image_lies_anywhere_in_the_crop() -> None:
    views = [augmentation((0.5, 0.5))(Image.new("RGB", (40, 30)), seed).box for seed in range(60)]
    boxes = torch.stack(views)
    assert (boxes[:, 1] - boxes[:, 0] == 15).all() and (boxes[:, 3] - boxes[:, 2] == 20).all()
    assert boxes[:, 0].min() <= 2 and boxes[:, 1].max() >= SIDE - 2
    assert boxes[:, 2].min() <= 2 and boxes[:, 3].max() >= SIDE - 2


def test_large_image_is_cut_out_of_one_piece() -> None:
    rows, columns = np.mgrid[0:100, 0:120]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))
    mirrored, tops, lefts = set(), set(), set()
    for seed in range(30):
        views = augmentation((1.0, 1.0), plain=True)(image, seed)
        assert views.box.tolist() == [0, SIDE, 0, SIDE]
        red, green, _ = colours(views.pixel_values).round().int()
        step = int(green[0, 1] - green[0, 0])
        assert torch.equal(red, red[0, 0] + torch.arange(SIDE, dtype=torch.int32)[:, None].expand(SIDE, SIDE))
        assert torch.equal(green, (green[0, 0] + step * torch.arange(SIDE, dtype=torch.int32)).expand(SIDE, SIDE))
        mirrored.add(step)
        tops.add(int(red[0, 0]))
        lefts.add(int(green.min()))
    assert mirrored == {1, -1}
    assert min(tops) <= 8 and max(tops) >= 44 and len(lefts) > 15  # of 0 to 52 and 0 to 72


def test_rescaling_covers_its_range() -> None:
    views = [augmentation((0.5, 1.0))(Image.new("RGB", (40, 40)), seed).box for seed in range(80)]
    sides = torch.stack(views)
    sides = sides[:, 1] - sides[:, 0]
    assert sides.min() in (20, 21) and sides.max() in (39, 40)
    assert (sides < 30).float().mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (48, 48), (200, 20), (130, 97)])
def test_images_of_any_size(height: int, width: int) -> None:
    for seed in range(3):
        views = augmentation()(noise(height, width), seed)
        for view in (views.pixel_values, views.global_view, views.local_source):
            assert view.shape == (3, SIDE, SIDE) and view.dtype == torch.float32
            pixels = colours(view)
            assert pixels.isfinite().all() and pixels.min() > -1e-2 and pixels.max() < 255.01
        top, bottom, left, right = views.box.tolist()
        assert 0 <= top < bottom <= SIDE and 0 <= left < right <= SIDE
        assert views.crop_draws.shape == (3,) and ((views.crop_draws >= 0) & (views.crop_draws < 1)).all()


# --- Views ----------------------------------------------------------------------------------------


def correlation(first: Tensor, second: Tensor) -> float:
    brightness = torch.stack([colours(view).mean(dim=0).flatten() for view in (first, second)])
    return float(torch.corrcoef(brightness)[0, 1])


def test_local_source_shows_the_same_crop() -> None:
    image = noise(80, 96, block=8).convert("L").convert("RGB")  # no hue, which the colour changes would turn
    views = [augmentation((0.8, 1.5))(image, seed) for seed in range(12)]
    for view in views:
        assert correlation(view.pixel_values, view.local_source) > 0.8
        assert abs(correlation(view.pixel_values, view.local_source.flip(-1))) < 0.6
        assert not torch.equal(view.pixel_values, view.local_source)
    assert abs(correlation(views[0].pixel_values, views[1].local_source)) < 0.6


def test_global_view_is_cut_from_the_whole_image() -> None:
    """Its crop has no padding, even where the training image is mostly padding."""
    white = Image.new("RGB", (40, 30), "white")
    for seed in range(6):
        pixels = colours(augmentation((0.5, 0.5))(white, seed).global_view)
        assert (pixels - pixels.mean(dim=(1, 2), keepdim=True)).abs().max() < 1.5


def test_colours_change() -> None:
    grey = Image.new("RGB", (60, 60), (120, 120, 120))
    means = [colours(augmentation((1.0, 1.0))(grey, seed).pixel_values).mean() for seed in range(40)]
    assert min(means) < 100 and max(means) > 140


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_images_of_any_mode(mode: str) -> None:
    image = noise(30, 40).convert("L" if mode == "I;16" else mode)
    buffer = io.BytesIO()
    (image.convert("I;16") if mode == "I;16" else image).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    sample = {"image_id": "a", "image": {"bytes": buffer.getvalue(), "path": "a"}}
    rgb = read_rgb(sample)
    assert rgb.mode == "RGB" and rgb.size == (40, 30)
    assert np.asarray(rgb).std() > 40  # neither black nor white all over
    assert augmentation()(rgb, seed=0).pixel_values.isfinite().all()
