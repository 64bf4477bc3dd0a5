"""Class activation maps: Eq. 1, fusion, label maps, boxes, affinity, uncertainty and local crops, by hand."""

import pytest
import torch

from modeling_msee.activation_msee import (
    activation_scores,
    activation_to_labels,
    box_mask,
    class_activation_maps,
    fuse_activation_maps,
    labels_to_affinity,
    local_crops,
    present_classes,
    restore_classes,
    scale_box,
    take_classes,
    uncertainty_mask,
)


def row(*values):
    """A map (1, 1, 1, n)."""
    return torch.tensor(values, dtype=torch.float32)[None, None, None]


def test_maps_of_eq_1():
    features = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]])[None, :, None]  # (1, 2, 1, 3)
    weight = torch.tensor([[1.0, 0.0], [-1.0, -1.0]])
    assert activation_scores(features, weight)[0, :, 0].tolist() == [[1, 2, -1], [-1, -3, -2]]
    maps = class_activation_maps(features, weight)
    assert maps[0, :, 0].tolist() == [[0.5, 1, 0], [0, 0, 0]]  # no positive value: a zero map, not NaN
    assert torch.equal(class_activation_maps(features, weight[:, :, None, None]), maps)
    only_second = class_activation_maps(features, weight, torch.tensor([[0, 1]]))
    assert only_second.abs().sum() == 0


def test_every_image_and_class_has_its_own_maximum():
    features = torch.tensor([[[[1.0, 4.0]]], [[[10.0, 5.0]]]])  # (2, 1, 1, 2)
    maps = class_activation_maps(features, torch.tensor([[1.0], [3.0]]))
    assert maps[:, :, 0].tolist() == [[[0.25, 1], [0.25, 1]], [[1, 0.5], [1, 0.5]]]


def test_fusion():
    views = torch.stack((row(1, -2), row(0, 3)))  # the larger counts: 1, 3
    fused = fuse_activation_maps([views, row(-5, 1)], (1, 2))  # plus 0, 1
    assert torch.allclose(fused, row(0, 3 / (3 + 1e-5)))
    assert fused.max() < 1


def test_fusion_of_constant_and_zero_maps_is_zero():
    assert fuse_activation_maps([torch.zeros(1, 2, 3, 3)], (6, 6)).abs().max() == 0
    assert fuse_activation_maps([torch.full((1, 2, 2, 2), 7.0)], (4, 8)).abs().max() == 0


def test_fusion_relu_comes_after_the_larger_view_and_before_the_sum():
    assert torch.allclose(fuse_activation_maps([row(-1, 2), row(2, -1)], (1, 2)), row(0, 0))


def test_fusion_resizes_without_aligned_corners():
    fused = fuse_activation_maps([row(0, 1)], (1, 4))
    assert torch.allclose(fused, row(0, 0.25, 0.75, 1), atol=1e-4)


def test_present_classes():
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    indices, valid = present_classes(labels)
    assert valid.tolist() == [[True, True], [True, False], [False, False]]
    assert indices[0].tolist() == [1, 3]
    assert indices[1, 0] == 2
    maps = torch.arange(4.0)[None, :, None, None].expand(3, 4, 2, 2)
    assert take_classes(maps, indices)[0, :, 0, 0].tolist() == [1, 3]
    assert take_classes(maps[None], indices).shape == (1, 3, 2, 2, 2)
    restored = restore_classes(torch.tensor([[[0, 1, 2, 255]]]), indices[:1])
    assert restored.tolist() == [[[0, 2, 4, 255]]]


def test_present_classes_of_a_batch_without_labels():
    indices, valid = present_classes(torch.zeros(2, 3))
    assert indices.shape == (2, 1)
    assert not valid.any()


def test_label_maps_at_the_thresholds():
    """At or below a threshold counts as below it."""
    maps = row(0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    labels = torch.ones(1, 1)
    assert activation_to_labels(maps, labels, 0.5).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1]
    three = activation_to_labels(maps, labels, 0.5, high=0.75, low=0.25)
    assert three.flatten().tolist() == [0, 0, 255, 255, 255, 255, 1]
    assert three.dtype == torch.int64


def test_label_maps_know_the_labelled_classes_only():
    maps = torch.tensor([[0.9, 0.9], [0.8, 0.1]])[None, :, None]  # (1, 2, 1, 2)
    assert activation_to_labels(maps, torch.tensor([[1, 1]]), 0.5).flatten().tolist() == [1, 1]
    assert activation_to_labels(maps, torch.tensor([[0, 1]]), 0.5).flatten().tolist() == [2, 0]
    assert activation_to_labels(maps, torch.tensor([[0, 0]]), 0.5, 0.7, 0.25).flatten().tolist() == [0, 0]


def test_label_maps_outside_the_box_are_ignored():
    maps = torch.ones(2, 1, 3, 3)
    box = torch.tensor([[0, 2, 1, 3], [1, 1, 0, 3]])  # the second is empty
    result = activation_to_labels(maps, torch.ones(2, 1), 0.5, box=box)
    assert result[0].tolist() == [[255, 1, 1], [255, 1, 1], [255, 255, 255]]
    assert (result[1] == 255).all()


def test_box_mask():
    mask = box_mask(torch.tensor([[1, 3, 0, 2], [0, 9, 0, 9], [5, 9, 5, 9]]), 3, 4)
    assert mask[0].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask[1].all()  # larger than the image
    assert not mask[2].any()  # beyond it


@pytest.mark.parametrize(
    ("box", "patch_size", "expected"),
    [
        ([0, 64, 0, 64], 16, [0, 4, 0, 4]),
        ([5, 60, 11, 64], 16, [1, 3, 1, 4]),  # partly covered patches do not count
        ([42, 84, 14, 98], 14, [3, 6, 1, 7]),  # 42 * (1 / 14) is above 3 in float32
        ([0, 70, 0, 70], 16, [0, 4, 0, 4]),  # the rest of the image that makes no patch
        ([60, 64, 20, 24], 16, [3, 4, 1, 2]),  # smaller than a patch: the one at the centre, inside the grid
        ([24, 40, 0, 16], 16, [2, 3, 0, 1]),
    ],
)
def test_scale_box(box, patch_size, expected):
    assert scale_box(torch.tensor([box]), patch_size).tolist() == [expected]


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_scale_box_is_exact_on_the_grid(patch_size):
    cells = torch.arange(1, 200)
    boxes = torch.stack((cells, cells + 1, cells - 1, cells + 3), dim=1)
    assert torch.equal(scale_box(boxes * patch_size, patch_size), boxes)


def test_an_empty_box_stays_empty():
    assert not box_mask(scale_box(torch.tensor([[10, 10, 0, 48], [48, 48, 0, 48], [0, 0, 0, 0]]), 8), 6, 6).any()


def test_affinity():
    expected = [[255, 0, 0, 255], [0, 255, 1, 255], [0, 1, 255, 255], [255, 255, 255, 255]]
    affinity = labels_to_affinity(torch.tensor([[[0, 3], [3, 255]]]))
    assert affinity.tolist() == [expected]
    assert affinity.dtype == torch.uint8


def test_uncertainty_at_the_thresholds():
    maps = row(0, 0.25, 0.375, 0.5, 0.75, 0.875)
    assert uncertainty_mask(maps, torch.ones(1, 1), 0.25, 0.75).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert uncertainty_mask(maps, torch.zeros(1, 1), 0.25, 0.75).abs().sum() == 0


def test_local_crops():
    image = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 3, 6, 6)
    mask = torch.zeros(1, 6, 6, dtype=torch.int64)
    mask[:, 4:] = 1
    # Crops of 2 px are centred on rows and columns 1 to 4: 16 candidates, row by row.
    draws = torch.tensor([[0.0, 1 / 16, 4 / 16, 0.999]])
    crops, positive, top_left = local_crops(image, mask, 2, draws, share=0.2)
    assert top_left[0].tolist() == [[0, 0], [0, 1], [1, 0], [3, 3]]
    assert crops.shape == (4, 1, 3, 2, 2)
    assert crops[1, 0, 2].tolist() == [[1, 2], [7, 8]]
    assert crops[3, 0, 0].tolist() == [[21, 22], [27, 28]]
    assert positive.tolist() == [[False, False, False, True]]  # mean 0.5 in the last, 0 elsewhere


def test_local_crops_avoid_certain_foreground():
    image, mask = torch.zeros(1, 3, 6, 6), torch.full((1, 6, 6), 2)
    mask[0, 2, 3] = mask[0, 4, 1] = 1
    _, positive, top_left = local_crops(image, mask, 2, torch.tensor([[0.1, 0.6]]))
    assert top_left[0].tolist() == [[1, 2], [3, 0]]
    assert positive.all()
    # Fewer candidates than crops: every centre counts.
    _, _, top_left = local_crops(image, mask, 2, torch.tensor([[0.0, 0.5, 0.999]]))
    assert top_left[0].tolist() == [[0, 0], [2, 0], [3, 3]]


def test_local_crops_share_is_a_strict_bound():
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, 0, 0] = 1  # a crop of 2 px with mean 0.25
    image = torch.zeros(1, 3, 4, 4)
    assert not local_crops(image, mask, 2, torch.zeros(1, 1), share=0.25)[1].any()
    assert local_crops(image, mask, 2, torch.zeros(1, 1), share=0.24)[1].all()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_local_crops_reach_every_corner(size):
    image = torch.rand(2, 3, 5, 7)
    draws = torch.tensor([[0.0, 0.9999]]).expand(2, 2)
    crops, _, top_left = local_crops(image, torch.zeros(2, 5, 7), size, draws)
    assert torch.equal(crops[0], image[:, :, :size, :size])
    bottom, right = top_left[0, 1].tolist()
    last = 0 if size % 2 else 1  # a crop of even side has its centre right of the middle
    assert (bottom, right) == (5 - size - last, 7 - size - last)
    assert torch.equal(crops[1], image[:, :, bottom : bottom + size, right : right + size])
    assert crops[1].shape == (2, 3, size, size)


def test_local_crops_of_a_small_image():
    with pytest.raises(ValueError, match=r"local crops of 6 px need images larger than that, got 6x9"):
        local_crops(torch.zeros(1, 3, 6, 9), torch.zeros(1, 6, 9), 6, torch.zeros(1, 1))
