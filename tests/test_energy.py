"""The dense energy against the exact double sum, on photographs and where its grid is stretched."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.energy import photograph_at_training_size
from modeling_msee import losses_msee
from modeling_msee.losses_msee import dense_energy_loss
from modeling_msee.refinement_msee import bilateral_filter


def exact_filter(image, values, sigma_rgb, sigma_xy):
    """The sum that `bilateral_filter` approximates, in blocks of pixels that fit the cache."""
    _, _, height, width = values.shape
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")) / sigma_xy
    filtered = []
    for colours, numbers in zip(image, values.detach(), strict=True):
        points = torch.cat((place, colours / sigma_rgb)).flatten(1).t()
        points = points - points.mean(dim=0)
        half, table = points.square().sum(dim=1, keepdim=True) / 2, numbers.flatten(1).t()
        # -|p - q|² / 2 as one product of (p, |p|²/2, 1) and (q, -1, -|q|²/2).
        left = torch.cat((points, half, torch.ones_like(half)), dim=1)
        right = torch.cat((points, -torch.ones_like(half), -half), dim=1).t()
        blocks = [(block @ right).exp_() @ table for block in left.split(64)]
        filtered.append(torch.cat(blocks).t().unflatten(1, (height, width)))
    return torch.stack(filtered)


def coarse_scores(batch, classes, size, patch=16):
    """Scores as of a decoder: one per patch, enlarged; (B, K, H, W) and the leaf they come from."""
    torch.manual_seed(0)
    grid = torch.randn(batch, classes, -(-size[0] // patch), -(-size[1] // patch)).mul_(3).requires_grad_()
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False), grid


def energy_and_gradients(image, classes):
    """The energy and its gradients to the probabilities and the decoder's scores; a quarter of the pixels ignored."""
    height, width = image.shape[-2:]
    scores, grid = coarse_scores(len(image), classes, (height, width))
    probabilities = scores.softmax(dim=1)
    probabilities.retain_grad()
    labels = torch.zeros(len(image), height, width, dtype=torch.int64)
    labels[:, : height // 2, : width // 2] = 255
    box = torch.tensor([[0, height, 0, width]]).expand(len(image), 4)
    energy = dense_energy_loss(image, probabilities, labels, box)
    energy.backward()
    return energy.item(), probabilities.grad, grid.grad


def assert_close_to_the_exact(image, classes):
    """Within 10 % of the exact energy, gradients within 10 % in size and 0.99 in cosine."""
    ours = energy_and_gradients(image, classes)
    with mock.patch.object(losses_msee, "bilateral_filter", exact_filter):
        exact = energy_and_gradients(image, classes)
    assert ours[0] == pytest.approx(exact[0], rel=0.1)
    for name, gradient, reference in zip(("probabilities", "scores"), ours[1:], exact[1:], strict=True):
        size = (gradient.norm() / reference.norm()).item()
        # By hand: F.cosine_similarity takes norms below 1e-8 for 1e-8.
        cosine = ((gradient / gradient.norm()) * (reference / reference.norm())).double().sum().item()
        print(f"energy {ours[0] / exact[0]:.4f}; gradient to {name}: cosine {cosine:.5f}, size {size:.4f}")
        assert cosine >= 0.99
        assert size == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(("batch", "size"), [(1, (33, 47)), (3, (24, 30)), (1, (2, 3))])
def test_sizes_and_batches(batch, size):
    torch.manual_seed(1)
    smooth = F.interpolate(255 * torch.rand(batch, 3, 5, 5), size=size, mode="bilinear")
    assert_close_to_the_exact(smooth, classes=4)


def test_constant_images():
    """Every pixel lies alike between the nodes of the grid, so errors do not average out."""
    levels = torch.tensor([0.0, 7.5, 255.0])[:, None, None, None]
    assert_close_to_the_exact(levels.expand(3, 3, 32, 32), classes=3)


def test_many_classes_are_filtered_one_by_one():
    """A class's result does not depend on how many others there are."""
    torch.manual_seed(2)
    image, values = 255 * torch.rand(2, 3, 9, 11), torch.rand(2, 254, 9, 11)
    filtered = bilateral_filter(image, values, 15.0, 50.0)
    for index in (0, 100, 253):
        alone = bilateral_filter(image, values[:, index : index + 1], 15.0, 50.0)
        assert torch.allclose(filtered[:, index : index + 1], alone, rtol=1e-4)


def test_a_batch_is_its_images():
    """Images share one grid; each must come out as if it were alone, up to where its nodes lie."""
    torch.manual_seed(3)
    image = F.interpolate(255 * torch.rand(3, 3, 4, 4), size=(20, 26), mode="bilinear")
    values = torch.rand(3, 5, 20, 26)
    filtered = bilateral_filter(image, values, 15.0, 50.0)
    alone = torch.cat([bilateral_filter(one[None], v[None], 15.0, 50.0) for one, v in zip(image, values, strict=True)])
    assert F.cosine_similarity(filtered.flatten(1), alone.flatten(1)).min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2007_000032", "2007_000121", "2007_000346"])
def test_photographs_at_training_size(shared, name):
    """448 px, so 224 px in the filter, 21 classes."""
    path = shared / "data" / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{name}.jpg"
    assert_close_to_the_exact(photograph_at_training_size(path), classes=21)
