"""Thresholds and regions of Eq. 2-4 on a row of four pixels, by hand."""

import pytest
import torch

from modeling_msee.regions_msee import confidence_thresholds, reliable_regions, seed_regions


MODES = ("per_class", "per_image", "per_image_max")

# Class 0 has its seeds at the first two pixels, class 1 at the third. All values are exact in binary.
MAPS = torch.tensor([[0.25, 0.75, 0.5, 0.0], [0.25, 0.125, 0.25, 0.375]])[None, :, None]  # (1, 2, 1, 4)
SEGMENTATION = torch.tensor([[[1, 1, 2, 0]]])
BOTH = torch.ones(1, 2)


def regions(maps, segmentation=SEGMENTATION, labels=BOTH, mode="per_class"):
    return [region.flatten().int().tolist() for region in reliable_regions(maps, segmentation, labels, mode)]


def test_thresholds_of_every_mode():
    assert confidence_thresholds(MAPS, SEGMENTATION, BOTH).tolist() == [[0.5, 0.25]]
    per_image = confidence_thresholds(MAPS, SEGMENTATION, BOTH, "per_image")
    assert per_image.tolist() == pytest.approx([(0.25 + 0.75 + 0.25) / 3])
    per_image_max = confidence_thresholds(MAPS, SEGMENTATION, BOTH, "per_image_max")
    assert per_image_max.tolist() == [(0.25 + 0.75 + 0.5) / 3]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Strictly above: pixel 2 has 0.5 in class 0 and 0.25 in class 1, both equal to the thresholds.
        ("per_class", [0, 1, 0, 1]),
        ("per_image", [0, 1, 1, 0]),
        ("per_image_max", [0, 1, 0, 0]),
    ],
)
def test_regions_of_every_mode(mode, expected):
    assert regions([MAPS], mode=mode) == [expected]


def test_only_labelled_classes_take_part():
    first = torch.tensor([[1, 0]])
    assert confidence_thresholds(MAPS, SEGMENTATION, first)[0, 0] == 0.5
    assert confidence_thresholds(MAPS, SEGMENTATION, first).isnan().tolist() == [[False, True]]
    assert regions([MAPS], labels=first) == [[0, 1, 0, 0]]
    # One class: the modes coincide.
    assert regions([MAPS], labels=first, mode="per_image") == regions([MAPS], labels=first, mode="per_image_max")


def test_seeds():
    assert seed_regions(SEGMENTATION, BOTH)[0, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert seed_regions(SEGMENTATION, torch.tensor([[0, 1]]))[0, :, 0].tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 0],
    ]
    scores = torch.nn.functional.one_hot(SEGMENTATION, 3).permute(0, 3, 1, 2).float()
    assert torch.equal(seed_regions(scores, BOTH), seed_regions(SEGMENTATION, BOTH))


@pytest.mark.parametrize("mode", MODES)
def test_segmentation_scores_are_as_good_as_a_label_map(mode):
    scores = torch.nn.functional.one_hot(SEGMENTATION, 3).permute(0, 3, 1, 2).float() * 5
    assert regions([MAPS], scores, mode=mode) == regions([MAPS], mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("segmentation", "labels"),
    [
        (torch.zeros(1, 1, 4), BOTH),  # no foreground
        (SEGMENTATION, torch.zeros(1, 2)),  # no labels at all
        (torch.full((1, 1, 4), 255), BOTH),  # all ignored
        (torch.full((1, 1, 4), 2), torch.tensor([[1, 0]])),  # only a class that is not labelled
    ],
)
def test_without_a_seed_nothing_is_selected(mode, segmentation, labels):
    assert confidence_thresholds(MAPS, segmentation, labels, mode).isnan().all()
    assert regions([MAPS, MAPS], segmentation, labels, mode) == [[0] * 4] * 2


@pytest.mark.parametrize("mode", MODES)
def test_zero_and_constant_maps_select_nothing(mode):
    """Nothing lies strictly above the mean of equal values."""
    assert regions([torch.zeros(1, 2, 1, 4)], mode=mode) == [[0] * 4]
    assert regions([torch.full((1, 2, 1, 4), 0.5)], mode=mode) == [[0] * 4]


@pytest.mark.parametrize("mode", MODES)
def test_earlier_scales_take_precedence(mode):
    """One class, seeds everywhere: a map of ones and zeros selects its ones, less those taken earlier."""
    rows = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.float32)
    maps = [values[None, None, None] for values in rows]
    seeds, label = torch.ones(1, 1, 4, dtype=torch.int64), torch.ones(1, 1)
    three = regions(maps[:3], seeds, label, mode)
    assert three == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert regions(maps, seeds, label, mode) == [*three, [0, 0, 0, 0]]
    assert regions([maps[1], maps[0]], seeds, label, mode) == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert regions([], seeds, label, mode) == []


@pytest.mark.parametrize("mode", MODES)
def test_images_of_a_batch_are_independent(mode):
    maps = torch.cat((MAPS, torch.rand(1, 2, 1, 4)))
    segmentation = torch.cat((SEGMENTATION, torch.tensor([[[2, 0, 1, 1]]])))
    batched = reliable_regions([maps], segmentation, torch.ones(2, 2), mode)[0]
    for index in range(2):
        one = slice(index, index + 1)
        assert torch.equal(batched[one], reliable_regions([maps[one]], segmentation[one], BOTH, mode)[0])


def test_an_unknown_mode():
    with pytest.raises(ValueError, match=r"mode: expected 'per_class', 'per_image' or 'per_image_max', got 'best'"):
        reliable_regions([MAPS], SEGMENTATION, BOTH, "best")
