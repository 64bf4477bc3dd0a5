"""Pixel-adaptive refinement, pseudo labels and the bilateral filter, by hand and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_msee.refinement_msee import bilateral_filter, pixel_adaptive_refinement, refined_pseudo_labels


HIGH, LOW = 0.7, 0.25


def split_image(height=16, width=16):
    """Dark left half, light right half, (1, 3, H, W) in [0, 1]."""
    image = torch.full((1, 3, height, width), 0.2)
    image[..., width // 2 :] = 0.9
    return image


class TestPixelAdaptiveRefinement:
    def test_one_step_on_a_constant_image(self):
        """Colours do not matter, so a neighbour weighs ⅛ plus 0.01 of a softmax over the distances 1 and √2."""
        mask = torch.zeros(1, 1, 5, 5)
        mask[..., 2, 2] = 1
        refined = pixel_adaptive_refinement(torch.full((1, 3, 5, 5), 0.4), mask, iterations=1, dilations=(1,))[0, 0]
        deviation = math.sqrt(8 * (0.5 * (math.sqrt(2) - 1)) ** 2 / 7)
        straight, diagonal = (math.exp(-((d / (deviation * 0.3)) ** 2)) for d in (1, math.sqrt(2)))
        total = 4 * straight + 4 * diagonal
        assert refined[1, 2].item() == pytest.approx(1 / 8 + 0.01 * straight / total, rel=1e-4)
        assert refined[1, 1].item() == pytest.approx(1 / 8 + 0.01 * diagonal / total, rel=1e-4)
        assert refined[2, 2] == 0  # a pixel is not its own neighbour
        assert refined[0, 0] == 0

    @pytest.mark.parametrize("iterations", [0, 1, 3])
    def test_weights_sum_to_1_01(self, iterations):
        refined = pixel_adaptive_refinement(torch.rand(2, 3, 9, 7), torch.ones(2, 2, 9, 7), iterations)
        assert torch.allclose(refined, torch.full_like(refined, 1.01**iterations), rtol=1e-4)

    def test_a_noisy_mask_snaps_to_the_colour_edge(self):
        torch.manual_seed(0)
        clean = torch.zeros(1, 1, 16, 16)
        clean[..., :8] = 1
        noisy = clean.where(torch.rand_like(clean) > 0.2, 1 - clean)
        refined = pixel_adaptive_refinement(split_image(), noisy, iterations=5, dilations=(1, 2))
        assert ((noisy > 0.5) != (clean > 0.5)).sum() > 20
        assert ((refined > 0.5) != (clean > 0.5)).sum() == 0

    def test_masks_are_resized_first(self):
        refined = pixel_adaptive_refinement(torch.rand(1, 3, 8, 10), torch.rand(1, 2, 2, 3), iterations=1)
        assert refined.shape == (1, 2, 8, 10)

    @pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
    def test_images_smaller_than_the_dilations(self, size):
        refined = pixel_adaptive_refinement(torch.rand(1, 3, *size), torch.rand(1, 1, *size))
        assert refined.isfinite().all()


class TestPseudoLabels:
    @staticmethod
    def refine(maps, labels, image=None, box=None, iterations=2, dilations=(1, 2)):
        image = split_image(*maps.shape[-2:]) if image is None else image
        return refined_pseudo_labels(image, maps, torch.tensor([labels]), box, HIGH, LOW, iterations, dilations)

    @pytest.mark.parametrize(("level", "expected"), [(0.0, 0), (0.2, 0), (0.3, 255), (0.65, 255), (0.75, 2), (1.0, 2)])
    def test_a_constant_map(self, level, expected):
        """Below both background scores, between them, above both; class 1 has the label value 2."""
        maps = torch.zeros(1, 3, 8, 8)
        maps[:, 1] = level
        labels = self.refine(maps, [0, 1, 0])
        assert (labels == expected).all()
        assert labels.dtype == torch.int64

    def test_both_halves_get_their_class(self):
        maps = torch.zeros(1, 3, 16, 16)
        maps[:, 0, :, :8], maps[:, 2, :, 8:] = 0.9, 0.9
        labels = self.refine(maps, [1, 0, 1])
        assert (labels[..., :8] == 1).all()
        assert (labels[..., 8:] == 3).all()

    def test_absent_classes_never_appear(self):
        maps = torch.ones(1, 3, 8, 8)
        maps[:, 1] = 0.8
        assert (self.refine(maps, [0, 1, 0]) == 2).all()

    def test_no_labels_at_all_is_background(self):
        assert (self.refine(torch.rand(1, 3, 8, 8), [0, 0, 0]) == 0).all()

    def test_one_image_of_a_batch_without_labels(self):
        maps = torch.ones(2, 3, 8, 8)
        image = torch.rand(2, 3, 8, 8)
        labels = refined_pseudo_labels(image, maps, torch.tensor([[0, 0, 0], [0, 1, 1]]), None, HIGH, LOW)
        assert (labels[0] == 0).all()
        assert set(labels[1].unique().tolist()) <= {2, 3}

    def test_zero_maps_are_background(self):
        assert (self.refine(torch.zeros(1, 2, 8, 8), [1, 1]) == 0).all()

    @pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
    def test_a_constant_image(self, level):
        maps = torch.zeros(1, 1, 8, 8)
        maps[..., :4] = 1
        labels = self.refine(maps, [1], image=torch.full((1, 3, 8, 8), level), iterations=1)
        assert set(labels.unique().tolist()) <= {0, 1, 255}
        assert labels[0, 4, 0] == 1
        assert labels[0, 4, 7] == 0

    def test_outside_the_box_is_ignored(self):
        labels = self.refine(torch.ones(1, 1, 8, 8), [1], box=torch.tensor([[2, 6, 0, 5]]))
        assert (labels[0, 2:6, :5] == 1).all()
        assert (labels == 1).sum() == 20
        assert (labels == 255).sum() == 44

    @pytest.mark.parametrize("box", [[3, 3, 0, 8], [8, 8, 8, 8], [50, 60, 50, 60], [6, 2, 6, 2]])
    def test_an_empty_box_ignores_everything(self, box):
        assert (self.refine(torch.ones(1, 1, 8, 8), [1], box=torch.tensor([box])) == 255).all()

    @pytest.mark.parametrize("size", [(13, 17), (2, 2), (3, 9)])
    def test_odd_sizes(self, size):
        labels = self.refine(torch.ones(1, 1, *size), [1], image=torch.rand(1, 3, *size))
        assert labels.shape == (1, *size)
        assert (labels == 1).all()


class TestBilateralFilter:
    def exact(self, image, values, sigma_rgb, sigma_xy):
        batch, _, height, width = values.shape
        place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
        points = torch.cat((place[None].expand(batch, -1, -1, -1) / sigma_xy, image / sigma_rgb), dim=1)
        points = points.flatten(2).transpose(1, 2)
        kernel = torch.exp(-0.5 * torch.cdist(points, points) ** 2)
        return torch.einsum("bpq,bcq->bcp", kernel, values.flatten(2)).view_as(values)

    @pytest.mark.parametrize("sigma_xy", [3.0, 20.0])
    @pytest.mark.parametrize("kind", ["smooth", "noise", "two colours", "one colour"])
    def test_against_the_exact_sum(self, kind, sigma_xy):
        """Flat colours all lie alike between the nodes of the grid, so their errors do not average out."""
        torch.manual_seed(0)
        images = {
            "smooth": F.interpolate(255 * torch.rand(2, 3, 4, 4), size=(14, 11), mode="bilinear"),
            "noise": 255 * torch.rand(2, 3, 14, 11),
            "two colours": 255 * split_image(14, 11).repeat(2, 1, 1, 1),
            "one colour": torch.full((2, 3, 14, 11), 37.0),
        }
        image, values = images[kind], torch.rand(2, 3, 14, 11)
        filtered, exact = (
            bilateral_filter(image, values, 15.0, sigma_xy),
            self.exact(image, values, 15.0, sigma_xy),
        )
        cosine = F.cosine_similarity(filtered.flatten(), exact.flatten(), dim=0)
        print(f"share {filtered.sum() / exact.sum():.4f}, cosine {cosine:.5f}")
        assert (filtered.sum() / exact.sum()).item() == pytest.approx(1, abs=0.05)
        assert cosine > 0.999

    def test_it_is_linear_and_symmetric(self):
        torch.manual_seed(0)
        image, a, b = 255 * torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
        filtered_a, filtered_b = bilateral_filter(image, a, 15, 50), bilateral_filter(image, b, 15, 50)
        both = bilateral_filter(image, a + 2 * b, 15, 50)
        assert torch.allclose(both, filtered_a + 2 * filtered_b, rtol=1e-4)
        assert (b * filtered_a).sum().item() == pytest.approx((a * filtered_b).sum().item(), rel=1e-4)

    def test_unlike_colours_do_not_mix(self):
        values = torch.zeros(1, 1, 16, 16)
        values[..., :8] = 1
        filtered = bilateral_filter(255 * split_image(), values, 15.0, 50.0)
        assert filtered[..., 8:].max() < 1e-3 * filtered[..., :8].min()

    def test_images_of_a_batch_do_not_mix(self):
        torch.manual_seed(0)
        image, values = 255 * torch.rand(2, 3, 6, 6), torch.rand(2, 2, 6, 6)
        values[1] = 0
        filtered = bilateral_filter(image, values, 15, 50)
        assert filtered[1].abs().max() == 0
        assert filtered[0].abs().min() > 0

    def test_it_has_no_gradient_and_keeps_float32_under_autocast(self):
        image, values = 255 * torch.rand(1, 3, 6, 6), torch.rand(1, 2, 6, 6, requires_grad=True)
        plain = bilateral_filter(image, values, 15, 50)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = bilateral_filter(image, values, 15, 50)
        assert not plain.requires_grad
        assert torch.equal(mixed, plain)

    def test_one_pixel(self):
        filtered = bilateral_filter(torch.full((1, 3, 1, 1), 7.0), torch.ones(1, 1, 1, 1), 15, 50)
        assert filtered.shape == (1, 1, 1, 1)
        assert filtered.isfinite().all()
