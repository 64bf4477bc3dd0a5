"""The losses by hand: values, gradients, empty sets, precision, and that better predictions cost less."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_msee.losses_msee import (
    LATTICE_SHARE,
    class_token_contrast_loss,
    dense_energy_loss,
    feature_distillation_loss,
    msee_loss,
    patch_token_contrast_loss,
    segmentation_loss,
)


def pixels(*vectors):
    """Features (1, D, 1, n) with one vector per position."""
    return torch.tensor(vectors, dtype=torch.float32).t()[None, :, None]


class TestFeatureDistillation:
    DIFFERENCES = pixels((0, 0), (0.6, 0.8), (1.2, 1.6), (3, 4))  # lengths 0, 1, 2, 5

    def test_vector(self):
        distances = feature_distillation_loss(self.DIFFERENCES, torch.zeros(1, 2, 1, 4))
        # n² / 2β up to β = 2, then n - β / 2.
        assert distances.flatten().tolist() == pytest.approx([0, 0.25, 1, 4])

    def test_elementwise(self):
        distances = feature_distillation_loss(self.DIFFERENCES, torch.zeros(1, 2, 1, 4), distance="elementwise")
        expected = [0, (0.36 + 0.64) / 4 / 2, (1.44 + 2.56) / 4 / 2, ((3 - 1) + (4 - 1)) / 2]
        assert distances.flatten().tolist() == pytest.approx(expected)

    def test_beta(self):
        distances = feature_distillation_loss(self.DIFFERENCES, torch.zeros(1, 2, 1, 4), beta=1.0)
        assert distances.flatten().tolist() == pytest.approx([0, 0.5, 1.5, 4.5])

    def test_gradient_is_the_difference_over_beta_and_at_most_of_length_one(self):
        student = self.DIFFERENCES.clone().requires_grad_()
        feature_distillation_loss(student, torch.zeros(1, 2, 1, 4)).sum().backward()
        expected = pixels((0, 0), (0.3, 0.4), (0.6, 0.8), (0.6, 0.8))
        assert torch.allclose(student.grad, expected)

    @pytest.mark.parametrize("distance", ["vector", "elementwise"])
    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e8])
    def test_gradient_is_finite_at_any_distance(self, distance, size):
        student = torch.full((1, 8, 2, 2), size).requires_grad_()
        loss = feature_distillation_loss(student, torch.zeros(1, 8, 2, 2), distance=distance)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert student.grad.isfinite().all()

    @pytest.mark.parametrize("distance", ["vector", "elementwise"])
    def test_bfloat16(self, distance):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
        exact = feature_distillation_loss(student, teacher, distance=distance)
        half = feature_distillation_loss(student.bfloat16(), teacher.bfloat16(), distance=distance)
        assert torch.allclose(half.float(), exact, rtol=0.05)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 1, 1\) and \(1, 3, 1, 1\)"):
            feature_distillation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1))
        with pytest.raises(ValueError, match=r"distance: expected 'vector' or 'elementwise', got 'cosine'"):
            feature_distillation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), distance="cosine")


class TestMSEE:
    STUDENT = torch.zeros(1, 1, 1, 2)
    TEACHER = pixels((3,), (1,))  # distances 2 and 0.25

    def loss(self, *masks, **options):
        regions = [torch.tensor([[mask]], dtype=torch.bool) for mask in masks]
        return msee_loss(self.STUDENT, [self.TEACHER] * len(masks), regions, **options).item()

    def test_sum_and_mean(self):
        assert self.loss([1, 0], reduction="sum") == 2
        assert self.loss([1, 0]) == 1  # over both positions, selected or not
        assert self.loss([1, 0], [0, 1], reduction="sum") == 2.25
        assert self.loss([1, 1], [1, 1], reduction="sum") == 4.5

    def test_mean_counts_the_batch(self):
        region = torch.tensor([[[True, False]]])
        loss = msee_loss(self.STUDENT.repeat(2, 1, 1, 1), [self.TEACHER.repeat(2, 1, 1, 1)], [region.repeat(2, 1, 1)])
        assert loss == 1

    def test_beta_and_distance_are_passed_on(self):
        assert self.loss([1, 0], reduction="sum", beta=4.0) == 9 / 8
        student, teacher, region = torch.zeros(1, 2, 1, 1), pixels((3, 4)), torch.ones(1, 1, 1)
        assert msee_loss(student, [teacher], [region]) == 4
        assert msee_loss(student, [teacher], [region], distance="elementwise") == 2.5

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_empty_regions_and_no_teachers_cost_nothing(self, reduction):
        student = torch.randn(2, 3, 4, 4, requires_grad=True)
        teacher, nothing = torch.randn(2, 3, 6, 6), torch.zeros(2, 4, 4, dtype=torch.bool)
        loss = msee_loss(student, [teacher, teacher], [nothing, nothing], reduction=reduction)
        loss.backward()
        assert loss == 0
        assert student.grad.abs().max() == 0
        assert msee_loss(student, [], [], reduction=reduction) == 0

    def test_teachers_are_resized_to_the_student(self):
        large = torch.tensor([1.0, 5.0, 2.0, 0.0])[None, None, None]  # pairs have means 3 and 1
        assert msee_loss(self.STUDENT, [large], [torch.ones(1, 1, 2)], reduction="sum") == 2.25

    def test_a_nearer_teacher_costs_less(self):
        torch.manual_seed(0)
        student, region = torch.randn(1, 8, 4, 4), torch.ones(1, 4, 4)
        noise = torch.randn(1, 8, 4, 4)
        costs = [msee_loss(student, [student + size * noise], [region]).item() for size in (0, 0.1, 1, 3)]
        assert costs == sorted(costs)
        assert costs[0] == 0 < costs[1]

    def test_gradient_reaches_the_teacher_unless_it_is_detached(self):
        torch.manual_seed(0)
        student, teacher = (torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2))
        region = torch.tensor([[[True, False], [False, False]]])
        msee_loss(student, [teacher], [region]).backward()
        assert torch.equal(teacher.grad, -student.grad)
        assert student.grad[..., 0, 0].abs().min() > 0
        assert student.grad.flatten(2)[..., 1:].abs().max() == 0
        before = student.grad.clone()
        teacher.grad = student.grad = None
        msee_loss(student, [teacher.detach()], [region]).backward()
        assert teacher.grad is None
        assert torch.equal(student.grad, before)

    def test_bfloat16(self):
        torch.manual_seed(0)
        student, teacher, region = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 6, 6), torch.ones(1, 4, 4)
        exact = msee_loss(student, [teacher], [region])
        half = msee_loss(student.bfloat16(), [teacher.bfloat16()], [region])
        assert half.item() == pytest.approx(exact.item(), rel=0.05)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"one region per teacher, got 1 teachers and 0 regions"):
            msee_loss(self.STUDENT, [self.TEACHER], [])
        with pytest.raises(ValueError, match=r"reduction: expected 'mean' or 'sum', got 'max'"):
            msee_loss(self.STUDENT, [], [], reduction="max")


class TestPatchContrast:
    # Tokens a, b alike and c orthogonal; a and b of one label: 2 positive pairs, 4 negative ones.
    TOKENS = pixels((1, 0), (2, 0), (0, 3))
    AFFINITY = torch.tensor([[[255, 1, 0], [1, 255, 0], [0, 0, 255]]], dtype=torch.uint8)

    def test_value(self):
        assert patch_token_contrast_loss(self.TOKENS, self.AFFINITY).item() == pytest.approx(0.5 * (1 - 2 / 3))
        swapped = self.TOKENS[..., [2, 1, 0]]  # now b and c are the positive pair: cosines 0, 0 and 1, 0
        expected = 0.5 * 1 + 0.5 * 2 / 5
        assert patch_token_contrast_loss(swapped, self.AFFINITY).item() == pytest.approx(expected)

    def test_opposite_tokens_count_as_alike(self):
        assert patch_token_contrast_loss(-self.TOKENS, self.AFFINITY).item() == pytest.approx(1 / 6)
        flipped = self.TOKENS * torch.tensor([1.0, -1.0, 1.0])
        assert patch_token_contrast_loss(flipped, self.AFFINITY).item() == pytest.approx(1 / 6)

    def test_all_ignored_is_a_constant(self):
        features = self.TOKENS.clone().requires_grad_()
        loss = patch_token_contrast_loss(features, torch.full((1, 3, 3), 255, dtype=torch.uint8))
        loss.backward()
        assert loss == 0.5
        assert features.grad.abs().max() == 0

    def test_zero_features_are_finite(self):
        features = torch.zeros(1, 2, 1, 3, requires_grad=True)
        loss = patch_token_contrast_loss(features, self.AFFINITY)
        loss.backward()
        assert loss == 0.5
        assert features.grad.isfinite().all()

    def test_bfloat16(self):
        loss = patch_token_contrast_loss(self.TOKENS.bfloat16(), self.AFFINITY)
        assert loss.item() == pytest.approx(1 / 6, abs=0.01)


class TestClassContrast:
    @staticmethod
    def loss(local, positive, temperature=1.0):
        """Two global views and one local one of one image; projections of one channel, the global ones 1."""
        student = torch.tensor([[1.0], [1.0], [local]])
        return class_token_contrast_loss(
            student, torch.ones(2, 1), torch.tensor([[1, 1, positive]]), temperature
        ).item()

    def test_a_negative_local_view(self):
        e, others = math.e, 1 + 1e-4  # the local view is orthogonal: e^0
        expected = (2 * -math.log(e / (e + others)) - math.log(1 / (1 + others))) / (2 + 1e-4)
        assert self.loss(0.0, 0) == pytest.approx(expected, rel=1e-5)

    def test_a_positive_local_view(self):
        e, others = math.e, 1e-4
        attract = 2 * -math.log(e / (e + others)) - math.log(1 / (1 + others))
        assert self.loss(0.0, 1) == pytest.approx((attract - math.log(1 / (1 + others))) / (3 + 1e-4), rel=1e-3)

    def test_temperature(self):
        e, others = math.exp(1 / 0.5), math.exp(0.5 / 0.5) + 1e-4
        expected = (2 * -math.log(e / (e + others)) - math.log(1 / (1 + others))) / (2 + 1e-4)
        assert self.loss(0.5, 0, temperature=0.5) == pytest.approx(expected, rel=1e-5)

    def test_background_far_from_the_global_views_costs_less(self):
        assert self.loss(-1.0, 0) < self.loss(0.0, 0) < self.loss(1.0, 0)

    def test_foreground_near_the_global_views_costs_less(self):
        """The positive local view competes with a negative one."""
        positive = torch.tensor([[1, 1, 1, 0]])
        costs = []
        for local in (1.0, 0.0, -1.0):
            student = torch.tensor([[1.0], [1.0], [local], [0.0]])
            costs.append(class_token_contrast_loss(student, torch.ones(2, 1), positive, 1.0).item())
        assert costs == sorted(costs)
        assert costs[0] < costs[2]

    def test_images_of_a_batch_are_averaged(self):
        student = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0], [0.5]])  # view by view
        both = class_token_contrast_loss(student, torch.ones(4, 1), torch.tensor([[1, 1, 0], [1, 1, 0]]), 1.0)
        assert both.item() == pytest.approx((self.loss(0.0, 0) + self.loss(0.5, 0)) / 2, rel=1e-5)

    @pytest.mark.parametrize("positive", [0, 1])
    @pytest.mark.parametrize("size", [0.0, 1e-20, 1e3])
    def test_extreme_projections_are_finite(self, size, positive):
        student = torch.full((3, 4), size, requires_grad=True)
        flags = torch.tensor([[1, 1, positive]])
        loss = class_token_contrast_loss(student, torch.full((2, 4), size), flags, 0.5)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()

    def test_no_positive_view_is_finite(self):
        loss = class_token_contrast_loss(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(1, 3), 0.5)
        assert loss.isfinite()

    def test_bfloat16(self):
        torch.manual_seed(0)
        student, teacher = F.normalize(torch.randn(6, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
        flags = torch.tensor([[1, 1, 0], [1, 1, 1]])
        exact = class_token_contrast_loss(student, teacher, flags).item()
        half = class_token_contrast_loss(student.bfloat16(), teacher.bfloat16(), flags).item()
        assert half == pytest.approx(exact, rel=0.05)


class TestSegmentation:
    def loss(self, logits, *labels):
        logits = torch.tensor(logits, dtype=torch.float32).t()[None, :, None].requires_grad_()  # (1, K, 1, n)
        loss = segmentation_loss(logits, torch.tensor([[labels]]))
        loss.backward()
        assert logits.grad.isfinite().all()
        return loss.item()

    def test_halves(self):
        even, sure = [0.0, 0.0], [math.log(3), 0.0]  # probabilities ½, ½ and ¾, ¼
        assert self.loss([even, even], 0, 1) == pytest.approx(math.log(2))
        # One background pixel weighs as much as two foreground ones.
        expected = 0.5 * -math.log(0.75) + 0.5 * (math.log(2) + math.log(4)) / 2
        assert self.loss([sure, even, sure], 0, 1, 1) == pytest.approx(expected)

    def test_empty_halves(self):
        even = [0.0, 0.0]
        assert self.loss([even], 0) == pytest.approx(0.5 * math.log(2))  # no foreground
        assert self.loss([even], 1) == pytest.approx(0.5 * math.log(2))  # no background
        assert self.loss([even, even], 255, 255) == 0
        assert self.loss([even, [9.0, -9.0]], 0, 255) == pytest.approx(0.5 * math.log(2))

    def test_right_costs_less_than_wrong(self):
        right, wrong = [[4.0, 0.0], [0.0, 4.0]], [[0.0, 4.0], [4.0, 0.0]]
        assert self.loss(right, 0, 1) < self.loss([[0.0, 0.0]] * 2, 0, 1) < self.loss(wrong, 0, 1)

    def test_bfloat16(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(2, 5, 6, 6), torch.randint(0, 5, (2, 6, 6))
        half = segmentation_loss(logits.bfloat16(), labels)
        assert half.item() == pytest.approx(segmentation_loss(logits, labels).item(), rel=0.02)


def two_tone_image(batch=2, side=12):
    """A dark and a light half with a little noise, colours in [0, 255]."""
    torch.manual_seed(0)
    image = torch.full((batch, 3, side, side), 60.0)
    image[..., side // 2 :] = 190
    return image + 8 * torch.randn_like(image)


def exact_kernel(image, sigma_rgb, sigma_xy):
    """Gaussian of the distance of every two pixels in colour and place, (B, HW, HW)."""
    height, width = image.shape[-2:]
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1).t()
    place = torch.cdist(grid.double(), grid.double()) / sigma_xy
    colours = image.double().flatten(2).transpose(1, 2)
    return torch.exp(-0.5 * (place**2 + (torch.cdist(colours, colours) / sigma_rgb) ** 2))


class TestDenseEnergy:
    @pytest.mark.parametrize("sigma_xy", [4.0, 100.0])
    def test_gradient_against_the_exact_double_sum(self, sigma_xy):
        """-2 · gate · (K S) · inside / B at full size, with a box, ignored pixels and a gate."""
        image = two_tone_image()
        probabilities = (2 * torch.randn(2, 4, 12, 12)).softmax(dim=1).requires_grad_()
        labels = torch.zeros(2, 12, 12, dtype=torch.int64)
        labels[:, 3:6, 2:10] = 255
        box = torch.tensor([[0, 12, 0, 12], [1, 10, 2, 12]])
        loss = dense_energy_loss(image, probabilities, labels, box, weight=1.0, sigma_xy=sigma_xy, scale=1.0)
        loss.backward()

        inside = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
        inside[0], inside[1, :, 1:10, 2:12] = 1, 1
        values = probabilities.detach().double()
        gate = torch.where(labels[:, None] == 255, 1.0, (inside - values.amax(1, keepdim=True)).clamp(min=0))
        kernel = exact_kernel(image, 15.0, sigma_xy)
        summed = torch.einsum("bpq,bcq->bcp", kernel, (values * inside).flatten(2)).view_as(values)
        exact = -2 * gate * summed * inside / 2
        cosine = F.cosine_similarity(probabilities.grad.double().flatten(), exact.flatten(), dim=0).item()
        share = (probabilities.grad.double().sum() / exact.sum()).item()
        energy = -(gate * values * inside * summed).sum().item() / 2
        print(f"cosine {cosine:.4f}, share {share:.4f}, energy {loss.item() / energy:.4f}")
        assert cosine >= 0.999
        assert share == pytest.approx(LATTICE_SHARE, rel=0.05)
        assert loss.item() == pytest.approx(LATTICE_SHARE * energy, rel=0.05)

    def energy(self, probabilities, **options):
        labels = options.pop("labels", torch.full((1, 12, 12), 255))
        box = options.pop("box", torch.tensor([[0, 12, 0, 12]]))
        return dense_energy_loss(two_tone_image(1), probabilities, labels, box, weight=1.0, **options)

    def test_one_class_per_colour_costs_less_than_stripes_across(self):
        halves = torch.zeros(1, 2, 12, 12)
        halves[:, 0, :, :6], halves[:, 1, :, 6:] = 1, 1
        stripes = halves.transpose(2, 3)
        assert self.energy(halves) < 1.5 * self.energy(stripes) < 0

    def test_weight_scales_it(self):
        probabilities, labels = torch.rand(1, 2, 12, 12).softmax(1), torch.full((1, 12, 12), 255)
        box = torch.tensor([[0, 12, 0, 12]])
        one, half = (
            dense_energy_loss(two_tone_image(1), probabilities, labels, box, weight=weight) for weight in (1, 0.5)
        )
        assert half.item() == pytest.approx(one.item() / 2)

    def test_sure_and_labelled_pixels_are_gated_off(self):
        sure = torch.zeros(1, 2, 12, 12)
        sure[:, 0] = 1
        assert self.energy(sure, labels=torch.zeros(1, 12, 12)) == 0

    @pytest.mark.parametrize("box", [[0, 0, 0, 0], [12, 12, 0, 12], [20, 30, 20, 30], [8, 4, 8, 4]])
    def test_nothing_inside_the_box_costs_nothing(self, box):
        probabilities = torch.rand(1, 2, 12, 12, requires_grad=True)
        loss = self.energy(probabilities, box=torch.tensor([box]))
        loss.backward()
        assert loss == 0
        assert probabilities.grad.abs().max() == 0

    def test_no_gradient_outside_the_box(self):
        probabilities = torch.rand(1, 2, 12, 12, requires_grad=True)
        self.energy(probabilities, box=torch.tensor([[0, 6, 0, 12]]), scale=1.0).backward()
        assert probabilities.grad[:, :, 6:].abs().max() == 0
        assert probabilities.grad[:, :, :6].abs().min() > 0

    @pytest.mark.parametrize("colour", [0.0, 99.0, 255.0])
    def test_constant_image(self, colour):
        """All pixels are alike, so with a wide kernel K S is nearly the sum of S."""
        uniform = torch.full((1, 2, 12, 12), 0.5)
        labels, box = torch.full((1, 12, 12), 255), torch.tensor([[0, 12, 0, 12]])
        loss = dense_energy_loss(torch.full((1, 3, 12, 12), colour), uniform, labels, box, weight=1.0, scale=1.0)
        assert loss.item() == pytest.approx(-LATTICE_SHARE * 144 * 144 / 2, rel=0.05)

    def test_mixed_precision(self):
        """The filter's products stay in float32 under autocast."""
        probabilities = torch.rand(1, 2, 12, 12).softmax(1)
        plain = self.energy(probabilities)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = self.energy(probabilities)
            half = self.energy(probabilities.bfloat16())
        assert mixed.item() == pytest.approx(plain.item(), rel=1e-3)
        assert half.item() == pytest.approx(plain.item(), rel=0.05)

    def test_bfloat16(self):
        probabilities = torch.rand(1, 2, 12, 12).softmax(1)
        assert self.energy(probabilities.bfloat16()).item() == pytest.approx(
            self.energy(probabilities).item(), rel=0.05
        )
