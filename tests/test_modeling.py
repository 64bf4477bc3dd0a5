"""The model: every encoder, the training step and its cost, saving and loading, and bad input."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    ResNetConfig,
    ResNetModel,
)

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee import modeling_msee as module
from modeling_msee.activation_msee import take_classes
from modeling_msee.configuration_msee import SUPPORTED_BACKBONES


TERMS = (
    "classification",
    "auxiliary_classification",
    "patch_contrast",
    "class_contrast",
    "segmentation",
    "energy",
    "msee",
)
HEAD_FIELDS = (
    "num_labels",
    "decoder_channels",
    "projection_hidden_size",
    "projection_bottleneck_size",
    "projection_size",
)


def batch(height=32, width=40, size=2, classes=5, seed=0):
    """Smooth images of `size`, each with two or three labels, and everything that is random in a step."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(size, 3, 5, 5, generator=generator)
    labels = torch.zeros(size, classes)
    labels[:, 1 % classes] = labels[0, 3 % classes] = labels[-1, 0] = 1
    return {
        "pixel_values": F.interpolate(coarse, size=(height, width), mode="bilinear"),
        "labels": labels,
        "global_view": torch.randn(size, 3, 32, 32, generator=generator),
        "crop_draws": torch.rand(size, 2, generator=generator),
    }


def run(model, **inputs):
    """A forward pass; the seed fixes the position jitter that DINOv3 has in training mode."""
    torch.manual_seed(0)
    return model(**inputs)


@contextmanager
def encoder_passes(model):
    """Height, width, batch size and whether gradient flows, of every pass."""
    passes = []

    def remember(_, arguments, output):
        height, width = arguments[0].shape[-2:]
        passes.append((height, width, len(arguments[0]), output.last_hidden_state.requires_grad))

    handle = model.backbone.register_forward_hook(remember)
    try:
        yield passes
    finally:
        handle.remove()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def seen(monkeypatch):
    """`seen(name)` counts the calls of a function of the model's file."""
    counts = {}

    def watch(name):
        original = getattr(module, name)
        counts[name] = 0

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("reliable_regions", "refined_pseudo_labels", "segmentation_loss", "dense_energy_loss"):
        watch(name)
    for name in ("patch_token_contrast_loss", "class_token_contrast_loss", "msee_loss"):
        watch(name)
    return counts


@pytest.mark.parametrize("backbone", SUPPORTED_BACKBONES)
class TestEveryEncoder:
    def test_a_training_step_reaches_every_parameter(self, tiny_model, backbone):
        model, inputs = tiny_model(backbone), batch()
        output = run(model, **inputs)
        assert set(output.losses) == set(TERMS)
        assert output.loss.isfinite()
        assert all(value.isfinite() for value in output.losses.values())
        assert output.logits.shape == (2, 6, 4, 5)
        assert output.class_logits.shape == output.auxiliary_class_logits.shape == (2, 5)
        assert output.activation_maps.shape == (2, 5, 4, 5)
        assert [region.shape for region in output.regions] == [(2, 4, 5)] * 2
        output.loss.backward()
        grads = gradients(model)
        assert set(grads) == trainable(model)
        assert all(grad.isfinite().all() for grad in grads.values())
        # A bias of the keys shifts all scores of a query alike, so its gradient is zero but for rounding.
        idle = [name for name, grad in grads.items() if grad.abs().sum() == 0 and "k_proj.bias" not in name]
        assert not [name for name in idle if "key.bias" not in name]

    def test_inference_is_one_pass_and_gives_logits_only(self, tiny_model, backbone):
        model = tiny_model(backbone).eval()
        with torch.no_grad(), encoder_passes(model) as passes:
            output = model(batch()["pixel_values"])
        assert passes == [(32, 40, 2, False)]
        assert list(output.keys()) == ["logits"]
        assert output.logits.shape == (2, 6, 4, 5)

    @pytest.mark.parametrize("layer", [-1, -2, -4])
    def test_auxiliary_features_are_the_blocks_own_output(self, tiny_model, backbone, layer):
        model = tiny_model(backbone, auxiliary_layer=layer)
        blocks = next(part for part in model.backbone.modules() if isinstance(part, torch.nn.ModuleList))
        outputs = []
        blocks[layer].register_forward_hook(lambda _, __, output: outputs.append(output))
        encoded = model.encode(batch()["pixel_values"])
        tokens = outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0]
        assert torch.equal(encoded.auxiliary.flatten(2).transpose(1, 2), tokens[:, -20:])
        assert encoded.class_token.shape == (2, 32)

    def test_features_lie_on_the_grid_row_by_row(self, tiny_model, backbone):
        """A patch changes the embedding at its own place."""
        model = tiny_model(backbone).eval()
        image = batch(size=1)["pixel_values"]
        changed = image.clone()
        changed[..., 8:16, 24:32] = 3  # row 1, column 3
        with torch.no_grad():
            difference = (model.encode(changed).features - model.encode(image).features).norm(dim=1)[0]
        assert divmod(difference.argmax().item(), 5) == (1, 3)

    def test_save_and_load(self, tiny_model, tmp_path, backbone):
        model, inputs = tiny_model(backbone), batch()
        before = run(model, **inputs)
        model.save_pretrained(tmp_path)
        loaded = MSEEForWeaklySupervisedSegmentation.from_pretrained(tmp_path).train()
        after = run(loaded, **inputs)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.loss, before.loss)
        own, other = model.state_dict(), loaded.state_dict()
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
        assert trainable(loaded) == trainable(model)

    def test_frozen_parameters(self, tiny_model, backbone):
        frozen = {name for name, _ in tiny_model(backbone).named_parameters()} - trainable(tiny_model(backbone))
        assert any(name.startswith("averaged_projection.") for name in frozen)
        rest = {name.rsplit(".", 1)[-1] for name in frozen if not name.startswith("averaged_projection.")}
        assert rest <= {"position_embeddings", "mask_token"}

    @pytest.mark.parametrize("count", [0, 2, 4])
    def test_freezing_the_first_blocks(self, tiny_model, backbone, count):
        model = tiny_model(backbone)
        model.freeze_backbone_layers(count)
        run(model, **batch()).loss.backward()
        blocks = next(part for part in model.backbone.modules() if isinstance(part, torch.nn.ModuleList))
        moves = [any(p.grad is not None for p in block.parameters()) for block in blocks]
        assert moves == [False] * count + [True] * (4 - count)
        assert any(p.grad is not None for p in model.backbone.embeddings.parameters()) == (count == 0)

    def test_mixed_precision(self, tiny_model, backbone):
        model, inputs = tiny_model(backbone), batch()
        exact = run(model, **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = run(model, **inputs)
        mixed.loss.backward()
        print(f"{mixed.loss.item():.5f} against {exact.loss.item():.5f}")
        assert mixed.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    def test_half_precision_weights(self, tiny_model, backbone):
        """As a sharded trainer casts them."""
        model, inputs = tiny_model(backbone), batch()
        exact = run(model, **inputs).loss.item()
        inputs |= {name: inputs[name].bfloat16() for name in ("pixel_values", "global_view")}
        output = run(model.bfloat16(), **inputs)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(exact, rel=0.05)

    @pytest.mark.parametrize("size", [(19, 37), (33, 20)])
    def test_sizes_that_are_no_multiple_of_the_patch(self, tiny_model, backbone, size):
        output = run(tiny_model(backbone), **batch(*size))
        assert output.logits.shape == (2, 6, size[0] // 8, size[1] // 8)
        assert output.loss.isfinite()


class TestCost:
    STUDENT = (32, 40, 2, True)
    UPRIGHT = [(16, 20, 2, False), (48, 60, 2, False)]
    MIRRORED = [(32, 40, 2, False), (16, 20, 2, False), (48, 60, 2, False)]
    GLOBAL = (32, 32, 2, True)
    LOCAL = (16, 16, 4, True)

    def passes(self, model, inputs=None, **changes):
        with encoder_passes(model) as passes:
            run(model, **{**(inputs or batch()), **changes})
        return sorted(passes)

    def test_a_full_step(self, tiny_model):
        expected = [self.STUDENT, *self.UPRIGHT, *self.MIRRORED, self.GLOBAL, self.LOCAL]
        assert self.passes(tiny_model()) == sorted(expected)

    def test_without_a_second_global_view_the_image_counts_twice(self, tiny_model):
        expected = [self.STUDENT, *self.UPRIGHT, *self.MIRRORED, self.LOCAL]
        assert self.passes(tiny_model(), global_view=None) == sorted(expected)

    def test_msee_at_its_own_scale_costs_one_pass_more(self, tiny_model):
        full = [self.STUDENT, *self.UPRIGHT, *self.MIRRORED, self.GLOBAL, self.LOCAL]
        double = (64, 80, 2, False)
        assert self.passes(tiny_model(scale_factors=(2.0, 0.5))) == sorted([*full, double])
        assert self.passes(tiny_model(scale_factors=(2.0, 0.5), msee_loss_weight=0.0)) == sorted(full)
        assert self.passes(tiny_model(scale_factors=())) == sorted(full)

    def test_msee_alone_needs_no_mirrored_pass(self, tiny_model):
        weights = ("patch_contrast", "class_contrast", "segmentation", "energy")
        model = tiny_model(**{f"{name}_loss_weight": 0.0 for name in weights})
        assert self.passes(model) == sorted([self.STUDENT, *self.UPRIGHT])

    def test_class_losses_alone_are_one_pass(self, tiny_model):
        weights = ("patch_contrast", "class_contrast", "segmentation", "energy", "msee")
        assert self.passes(tiny_model(**{f"{name}_loss_weight": 0.0 for name in weights})) == [self.STUDENT]

    def test_before_the_start_steps_too(self, tiny_model):
        model = tiny_model(patch_contrast_start_step=1, class_contrast_start_step=1)
        assert self.passes(model, step=0) == [self.STUDENT]

    def test_no_class_contrast_means_no_views(self, tiny_model):
        model = tiny_model(class_contrast_loss_weight=0.0)
        assert self.passes(model) == sorted([self.STUDENT, *self.UPRIGHT, *self.MIRRORED])

    @pytest.mark.parametrize(
        ("term", "unused"),
        [
            ("patch_contrast", {"patch_token_contrast_loss"}),
            ("class_contrast", {"class_token_contrast_loss"}),
            ("segmentation", {"segmentation_loss"}),
            ("energy", {"dense_energy_loss"}),
            ("msee", {"msee_loss", "reliable_regions"}),
        ],
    )
    def test_weight_zero_switches_a_term_off(self, tiny_model, seen, term, unused):
        output = run(tiny_model(**{f"{term}_loss_weight": 0.0}), **batch())
        assert {name for name, count in seen.items() if count == 0} == unused
        assert set(seen.values()) <= {0, 1}
        assert output.losses[term] == 0
        assert all(value != 0 for name, value in output.losses.items() if name != term)

    def test_without_segmentation_and_energy_nothing_is_refined(self, tiny_model, seen):
        run(tiny_model(segmentation_loss_weight=0.0, energy_loss_weight=0.0), **batch())
        assert seen["refined_pseudo_labels"] == 0

    @pytest.mark.parametrize("term", TERMS[:2])
    def test_weight_zero_of_a_class_loss(self, tiny_model, term):
        output = run(
            tiny_model(**{f"{term}_loss_weight": 0.0}, patch_contrast_start_step=1, class_contrast_start_step=1),
            **batch(),
            step=0,
        )
        assert output.loss.item() == pytest.approx((sum(output.losses.values()) - output.losses[term]).item())

    @pytest.mark.parametrize("option", ["teacher_gradient", "classify_scaled_images"])
    def test_scaled_passes_have_gradient_only_where_it_is_used(self, tiny_model, option):
        trained = [(16, 20, 2, True), (48, 60, 2, True)]
        full = [self.STUDENT, *trained, *self.MIRRORED, self.GLOBAL, self.LOCAL]
        model = tiny_model(**{option: True})
        assert self.passes(model) == sorted(full)
        before = [self.STUDENT, *self.UPRIGHT, *self.MIRRORED, self.GLOBAL, self.LOCAL]
        assert self.passes(model, step=0) == sorted(before)  # M-SEE has not started
        with torch.no_grad():
            assert not any(grad for *_, grad in self.passes(model))


class TestSteps:
    STARTS = {
        "patch_contrast_start_step": 2,
        "class_contrast_start_step": 3,
        "segmentation_start_step": 4,
        "msee_start_step": 6,
    }

    @pytest.mark.parametrize(
        ("step", "started"),
        [
            (0, 2),
            (1, 2),
            (2, 3),
            (3, 4),
            (4, 6),
            (5, 6),
            (6, 7),
            (None, 7),
        ],
    )
    def test_terms_start_at_their_step(self, tiny_model, step, started):
        """A term that has not started is exactly zero, and yet every parameter has a gradient."""
        model = tiny_model(**self.STARTS)
        output = run(model, **batch(), step=step)
        values = [output.losses[name] for name in TERMS]
        assert all(value != 0 for value in values[:started])
        assert all(value == 0 for value in values[started:])
        assert (output.regions is None) == (output.diagnostics is None) == (started < 7)
        output.loss.backward()
        assert set(gradients(model)) == trainable(model)

    def test_the_loss_is_the_weighted_sum(self, tiny_model):
        weights = dict(zip(TERMS, (0.5, 0.25, 2.0, 3.0, 5.0, 7.0, 11.0), strict=True))
        model = tiny_model(**{f"{name}_loss_weight": weight for name, weight in weights.items()})
        output = run(model, **batch())
        expected = sum(weights[name] * output.losses[name].item() for name in TERMS)
        assert output.loss.item() == pytest.approx(expected, rel=1e-5)

    def test_pseudo_labels_come_from_the_auxiliary_maps_first(self, tiny_model, monkeypatch):
        sources = []

        def remember(image, maps, *args, **kwargs):
            sources.append(maps.clone())
            return torch.zeros(maps.shape[0], *maps.shape[-2:], dtype=torch.int64)

        monkeypatch.setattr(module, "refined_pseudo_labels", remember)
        model, inputs = tiny_model(main_activation_start_step=5, segmentation_start_step=0), batch()
        run(model, **inputs, step=4)
        run(model, **inputs, step=5)
        indices, _ = module.present_classes(inputs["labels"])
        main, auxiliary = model.multi_scale_activation_maps(inputs["pixel_values"], indices=indices)
        assert torch.allclose(sources[0], auxiliary, atol=1e-5)
        assert torch.allclose(sources[1], main, atol=1e-5)
        assert not torch.allclose(main, auxiliary, atol=1e-2)


class TestMSEETerm:
    FIELDS = {"msee_loss_weight": 1.0}

    def test_something_is_selected_in_these_tests(self, tiny_model):
        output = run(tiny_model(**self.FIELDS), **batch())
        assert all(region.any() for region in output.regions)
        assert not (output.regions[0] & output.regions[1]).any()
        share = output.regions[0].float().mean()
        assert output.diagnostics["region_share_1.5"] == share
        assert 0 < output.diagnostics["seed_share"] <= 1
        assert set(output.diagnostics) == {
            "seed_share",
            "feature_norm",
            "region_share_1.5",
            "region_share_0.5",
            "feature_distance_1.5",
            "feature_distance_0.5",
        }

    @pytest.mark.parametrize("factors", [(1.5,), (0.5, 1.5), (2.0, 1.5, 0.5), (2.0, 1.5, 0.75, 0.5)])
    def test_any_number_of_scales(self, tiny_model, factors):
        output = run(tiny_model(**self.FIELDS, scale_factors=factors), **batch())
        assert len(output.regions) == len(factors)
        assert torch.stack(output.regions).sum(dim=0).max() == 1  # no position twice
        assert output.loss.isfinite()

    def test_teacher_gradient(self, tiny_model):
        """The value is the same, the gradient of the encoder is not, that of the heads is."""
        results = []
        for option in (False, True):
            model = tiny_model(**self.FIELDS, teacher_gradient=option)
            output = run(model, **batch())
            output.loss.backward()
            results.append((output, gradients(model)))
        (plain, detached), (other, attached) = results
        assert plain.losses["msee"] == other.losses["msee"] > 0
        name = "backbone.embeddings.patch_embeddings.projection.weight"
        assert (detached[name] - attached[name]).abs().max() > 1e-3 * detached[name].abs().max()
        assert torch.equal(detached["classifier.weight"], attached["classifier.weight"])

    def test_classify_scaled_images_averages_the_class_losses(self, tiny_model):
        model, inputs = tiny_model(classify_scaled_images=True), batch()
        output = run(model, **inputs)
        expected = []
        for size in ((32, 40), (48, 60), (16, 20)):
            image = F.interpolate(inputs["pixel_values"], size=size, mode="bilinear", align_corners=False)
            scores = model.classifier(model.encode(image).features.amax(dim=(2, 3)))
            expected.append(F.multilabel_soft_margin_loss(scores, inputs["labels"]).item())
        assert output.losses["classification"].item() == pytest.approx(np.mean(expected), rel=1e-4)
        single = run(tiny_model(), **inputs)
        assert single.losses["classification"].item() == pytest.approx(expected[0], rel=1e-4)
        assert len({round(value, 4) for value in expected}) > 1

    def test_scaled_images_are_classified_only_once_msee_has_started(self, tiny_model):
        model = tiny_model(classify_scaled_images=True)
        early, single = run(model, **batch(), step=0), run(tiny_model(), **batch(), step=0)
        assert early.losses["classification"] == single.losses["classification"]

    @pytest.mark.parametrize("mode", ["per_image", "per_image_max"])
    def test_threshold_modes_change_the_regions(self, tiny_model, mode):
        per_class = run(tiny_model(**self.FIELDS), **batch())
        other = run(tiny_model(**self.FIELDS, threshold_mode=mode), **batch())
        assert any(not torch.equal(a, b) for a, b in zip(per_class.regions, other.regions, strict=True))

    def test_without_regions_every_position_is_distilled(self, tiny_model):
        box = torch.tensor([[0, 32, 0, 40], [16, 32, 0, 40]])
        output = run(tiny_model(**self.FIELDS, select_regions=False), **batch(), box=box)
        for region in output.regions:  # of both scales, although they overlap
            assert region[0].all() and region[1, 2:].all() and not region[1, :2].any()
        assert output.losses["msee"] > run(tiny_model(**self.FIELDS), **batch(), box=box).losses["msee"]

    def test_distance_and_reduction_reach_the_loss(self, tiny_model):
        mean = run(tiny_model(), **batch()).losses["msee"].item()
        total = run(tiny_model(msee_loss_reduction="sum"), **batch()).losses["msee"].item()
        assert total == pytest.approx(mean * 4 * 5, rel=1e-5)  # positions; over the images it stays a mean
        assert run(tiny_model(distance="elementwise"), **batch()).losses["msee"].item() < mean
        assert run(tiny_model(beta=50.0), **batch()).losses["msee"].item() < mean

    def test_nothing_is_selected_in_padding(self, tiny_model):
        box = torch.tensor([[0, 32, 8, 24], [16, 32, 0, 40]])
        output = run(tiny_model(**self.FIELDS), **batch(), box=box)
        for region in output.regions:
            assert not region[0, :, [0, 3, 4]].any()
            assert not region[1, :2].any()


class TestDefinedResults:
    def test_a_batch_without_labels(self, tiny_model):
        model, inputs = tiny_model(), batch()
        inputs["labels"].zero_()
        output = run(model, **inputs)
        output.loss.backward()
        assert output.loss.isfinite()
        assert output.losses["msee"] == 0
        assert not any(region.any() for region in output.regions)
        assert output.activation_maps.abs().max() == 0
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    @pytest.mark.parametrize("box", [[0, 0, 0, 0], [32, 32, 40, 40], [3, 5, 3, 5], [90, 99, 90, 99], [20, 9, 30, 2]])
    def test_a_crop_that_is_all_padding(self, tiny_model, box):
        output = run(tiny_model(), **batch(), box=torch.tensor([box, [0, 32, 0, 40]]))
        assert output.loss.isfinite()

    @pytest.mark.parametrize("value", [0.0, -2.0, 5.0])
    def test_a_constant_image(self, tiny_model, value):
        inputs = batch()
        inputs["pixel_values"].fill_(value)
        model = tiny_model()
        output = run(model, **inputs)
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    def test_images_that_were_not_normalised(self, tiny_model, monkeypatch):
        """The energy's grid spans the range of the colours; raw values would take gigabytes."""
        images = []

        def remember(image, *args):
            images.append(image)
            return image.new_zeros(())

        monkeypatch.setattr(module, "dense_energy_loss", remember)
        inputs = batch()
        inputs["pixel_values"] = 255 * torch.rand_like(inputs["pixel_values"])
        assert run(tiny_model(), **inputs).loss.isfinite()
        assert images[0].min() >= 0
        assert images[0].max() <= 255

    def test_pseudo_labels(self, tiny_model):
        inputs, model = batch(), tiny_model()
        box = torch.tensor([[0, 32, 0, 20], [0, 32, 0, 40]])
        labels = model.pseudo_labels(inputs["pixel_values"], inputs["labels"], box)
        assert labels.shape == (2, 32, 40)
        assert (labels[0, :, 20:] == 255).all()
        assert set(labels[0].unique().tolist()) <= {0, 2, 4, 255}
        assert set(labels[1].unique().tolist()) <= {0, 1, 2, 255}

    def test_activation_maps_of_some_classes(self, tiny_model):
        model, image = tiny_model().eval(), batch()["pixel_values"]
        indices = torch.tensor([[4, 1], [0, 2]])
        everything = model.multi_scale_activation_maps(image)
        encoded = model.encode(image)
        some = model.multi_scale_activation_maps(image, indices=indices, unscaled=encoded)
        for all_classes, few in zip(everything, some, strict=True):
            assert all_classes.shape == (2, 5, 32, 40)
            assert torch.allclose(take_classes(all_classes, indices), few, atol=1e-5)
            assert not few.requires_grad

    def test_maps_of_the_mirror_image_are_the_mirrored_maps(self, tiny_model):
        model, image = tiny_model().eval(), batch()["pixel_values"]
        main, _ = model.multi_scale_activation_maps(image)
        mirrored, _ = model.multi_scale_activation_maps(image.flip(-1))
        assert torch.allclose(main.flip(-1), mirrored, atol=1e-4)

    def test_one_class(self, tiny_model):
        assert run(tiny_model(num_labels=2), **batch(classes=1)).loss.isfinite()

    def test_the_smallest_image(self, tiny_model):
        assert tiny_model()(torch.rand(1, 3, 8, 8)).logits.shape == (1, 6, 1, 1)

    def test_drawn_crops_follow_the_seed(self, tiny_model):
        model, inputs = tiny_model(), batch()
        del inputs["crop_draws"]
        assert run(model, **inputs).loss == run(model, **inputs).loss

    def test_hidden_states_and_attentions(self, tiny_model):
        model = tiny_model(attn_implementation="eager")
        output = model(batch()["pixel_values"], output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 5
        assert len(output.attentions) == 4
        assert output.attentions[0].shape == (2, 4, 21, 21)

    def test_a_tuple_on_request(self, tiny_model):
        logits, *rest = tiny_model()(batch()["pixel_values"], return_dict=False)
        assert logits.shape == (2, 6, 4, 5)
        assert not rest


class TestAveragedHead:
    def test_it_starts_equal_and_moves_by_the_momentum(self, tiny_model):
        model = tiny_model(projection_momentum=0.75)
        pairs = list(zip(model.averaged_projection.parameters(), model.projection.parameters(), strict=True))
        assert pairs
        assert all(torch.equal(averaged, current) for averaged, current in pairs)
        before = [averaged.clone() for averaged, _ in pairs]
        with torch.no_grad():
            for _, current in pairs:
                current += 1
        model.update_averaged_projection()
        for (averaged, current), old in zip(pairs, before, strict=True):
            assert torch.allclose(averaged, 0.75 * old + 0.25 * current)
            assert torch.allclose(averaged, old + 0.25, atol=1e-6)
            assert not averaged.requires_grad

    def test_no_gradient_flows_through_it(self, tiny_model):
        model = tiny_model()
        run(model, **batch()).loss.backward()
        assert all(parameter.grad is None for parameter in model.averaged_projection.parameters())

    def test_it_survives_saving_once_it_differs(self, tiny_model, tmp_path):
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.averaged_projection.parameters():
                parameter.add_(0.5)
        model.save_pretrained(tmp_path)
        loaded = MSEEForWeaklySupervisedSegmentation.from_pretrained(tmp_path)
        pairs = zip(loaded.averaged_projection.parameters(), model.averaged_projection.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class TestGradientCheckpointing:
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is too new
    @pytest.mark.parametrize("backbone", ["vit", "dinov2"])
    def test_loss_and_gradients_are_unchanged(self, tiny_model, backbone):
        results = []
        for checkpointing in (False, True):
            model, calls = tiny_model(backbone), []
            if checkpointing:
                model.gradient_checkpointing_enable()
            block = next(part for part in model.backbone.modules() if isinstance(part, torch.nn.ModuleList))[0]
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
            output = run(model, **batch())
            forward_calls = len(calls)
            output.loss.backward()
            results.append((output.loss.item(), gradients(model), len(calls) - forward_calls))
        (loss, grads, again), (checkpointed_loss, checkpointed_grads, recomputed) = results
        assert again == 0
        assert recomputed == 3  # student, second global view, local views
        assert checkpointed_loss == loss
        assert grads.keys() == checkpointed_grads.keys()
        assert all(torch.equal(grads[name], checkpointed_grads[name]) for name in grads)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A folder with model, configuration and processor, and the model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(id2label={0: "background", **{index: f"class {index}" for index in range(1, 6)}}).eval()
    model.save_pretrained(folder)
    MSEEImageProcessor(patch_size=8).save_pretrained(folder)
    return folder, model


class TestAutoClasses:
    def test_in_this_process(self, checkpoint):
        folder, model = checkpoint
        assert type(AutoConfig.from_pretrained(folder)) is MSEEConfig
        assert type(AutoImageProcessor.from_pretrained(folder)) is MSEEImageProcessor
        image = batch()["pixel_values"]
        for auto in (AutoModel, AutoModelForSemanticSegmentation):
            loaded = auto.from_pretrained(folder)
            assert type(loaded) is MSEEForWeaklySupervisedSegmentation
            assert torch.equal(loaded(image).logits, model(image).logits)

    def test_the_checkpoint_carries_its_code(self, checkpoint):
        folder, _ = checkpoint
        fields = json.loads((folder / "config.json").read_text())
        assert fields["architectures"] == ["MSEEForWeaklySupervisedSegmentation"]
        assert set(fields["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation"}
        assert (folder / "model.safetensors").is_file()
        assert {file.name for file in folder.glob("*.py")} == {
            "activation_msee.py",
            "configuration_msee.py",
            "encoder_msee.py",
            "heads_msee.py",
            "image_processing_msee.py",
            "inputs_msee.py",
            "losses_msee.py",
            "modeling_msee.py",
            "refinement_msee.py",
            "regions_msee.py",
        }

    def test_in_a_process_without_the_package(self, checkpoint, tmp_path):
        """Trusting the checkpoint's own code is enough; importing the package raises there."""
        folder, model = checkpoint
        image = batch()["pixel_values"]
        torch.save(image, tmp_path / "image.pt")
        script = tmp_path / "load.py"
        script.write_text(WITHOUT_THE_PACKAGE)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        # The number of threads decides the order of sums, and other tests may have changed it here.
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"} | threads
        result = subprocess.run(
            [sys.executable, "-I", str(script), str(folder)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        for name in ("AutoModel", "AutoModelForSemanticSegmentation"):
            assert torch.equal(torch.load(tmp_path / f"{name}.pt"), model(image).logits.detach())
        segments = json.loads((tmp_path / "segments.json").read_text())
        assert segments
        assert {segment["label"] for segment in segments} <= set(model.config.id2label.values())
        assert sum(segment["pixels"] for segment in segments) == 50 * 37  # every pixel, once


WITHOUT_THE_PACKAGE = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_msee":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Block())

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

try:
    import modeling_msee
except ImportError:
    pass
else:
    raise SystemExit("the package could be imported")
folder = sys.argv[1]
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "MSEEConfig"
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "MSEEImageProcessor"
image = torch.load("image.pt")
for auto in (AutoModel, AutoModelForSemanticSegmentation):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        torch.save(model(image).logits, auto.__name__ + ".pt")
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8))
segments = pipeline("image-segmentation", model=folder, trust_remote_code=True)(picture)
summary = [{"label": s["label"], "pixels": int((np.asarray(s["mask"]) > 0).sum())} for s in segments]
with open("segments.json", "w") as file:
    json.dump(summary, file)
"""


class TestFromBackbone:
    @pytest.fixture
    def heads(self, tiny_config):
        config = tiny_config()
        return {name: getattr(config, name) for name in HEAD_FIELDS}

    @pytest.mark.parametrize("backbone", ["vit", "dinov2"])
    def test_it_takes_the_encoders_weights(self, tiny_config, heads, tmp_path, backbone):
        torch.manual_seed(3)
        encoder = AutoModel.from_config(tiny_config(backbone).backbone_config)
        encoder.save_pretrained(tmp_path)
        model = MSEEForWeaklySupervisedSegmentation.from_backbone(str(tmp_path), **heads)
        weights = encoder.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.backbone.state_dict().items())
        left = weights.keys() - model.backbone.state_dict().keys()
        assert all(name.startswith("pooler.") for name in left)
        assert "averaged_projection.layer1.weight" not in trainable(model)
        assert not any(name.endswith("position_embeddings") for name in trainable(model))

    def test_a_checkpoint_in_half_precision_is_trained_in_full(self, tiny_config, heads, tmp_path):
        AutoModel.from_config(tiny_config().backbone_config).bfloat16().save_pretrained(tmp_path / "encoder")
        model = MSEEForWeaklySupervisedSegmentation.from_backbone(str(tmp_path / "encoder"), **heads)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        image = torch.rand(1, 3, 16, 16)
        logits = model.eval()(image).logits
        model.save_pretrained(tmp_path / "model")
        loaded = MSEEForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded(image).logits, logits)

    def test_an_encoder_that_is_not_a_vit(self, tmp_path):
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
        with pytest.raises((ValueError, StrictDataclassError), match=r"expected one of vit, deit.*got 'resnet'"):
            MSEEForWeaklySupervisedSegmentation.from_backbone(str(tmp_path))

    def test_no_such_checkpoint(self, tmp_path):
        with pytest.raises(OSError, match="nothing"):
            MSEEForWeaklySupervisedSegmentation.from_backbone(str(tmp_path / "nothing"))

    def test_a_real_checkpoint(self, shared, heads):
        name = str(shared / "models" / "dinov2-small")
        model = MSEEForWeaklySupervisedSegmentation.from_backbone(name, **heads, local_crop_size=28)
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
        image = batch(42, 56)["pixel_values"]
        with torch.no_grad():
            tokens = encoder.eval()(image).last_hidden_state[:, 1:]
            features = model.eval().encode(image).features
        assert features.shape == (2, 384, 3, 4)
        assert torch.equal(features.flatten(2).transpose(1, 2), tokens)
        output = run(model, **batch(42, 56))
        assert output.loss.isfinite()


class TestBadInput:
    IMAGE = torch.zeros(2, 3, 32, 40)

    @pytest.mark.parametrize("labels", [torch.zeros(2, 6), torch.zeros(1, 5), torch.zeros(5), torch.zeros(2, 5, 1)])
    def test_labels_of_another_shape(self, tiny_model, labels):
        with pytest.raises(ValueError) as error:
            tiny_model()(self.IMAGE, labels=labels)
        message = str(error.value)
        assert "labels: expected multi-hot image-level labels of shape (2, 5)" in message
        assert f"got {tuple(labels.shape)}" in message

    @pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), 255.0])
    def test_labels_other_than_0_and_1(self, tiny_model, value):
        labels = torch.zeros(2, 5)
        labels[1, 2] = value
        with pytest.raises(ValueError, match=rf"labels: expected only 0 and 1.*got values \[.*{value}"):
            tiny_model()(self.IMAGE, labels=labels)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
    def test_labels_of_any_type(self, tiny_model, dtype):
        model, inputs = tiny_model(), batch()
        expected = run(model, **inputs).loss
        assert run(model, **{**inputs, "labels": inputs["labels"].to(dtype)}).loss == expected

    @pytest.mark.parametrize("size", [(7, 40), (40, 7), (1, 1)])
    def test_an_image_smaller_than_a_patch(self, tiny_model, size):
        with pytest.raises(ValueError) as error:
            tiny_model()(torch.zeros(1, 3, *size))
        message = str(error.value)
        assert f"expected images of at least one 8 px patch, got {size[0]}x{size[1]}" in message
        assert "MSEEImageProcessor enlarges small images" in message

    @pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 4, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
    def test_an_image_of_another_shape(self, tiny_model, shape):
        with pytest.raises(ValueError) as error:
            tiny_model()(torch.zeros(shape))
        assert f"pixel_values: expected (batch, 3, height, width), got {shape}" in str(error.value)

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 2)])
    def test_a_box_of_another_shape(self, tiny_model, shape):
        with pytest.raises(ValueError) as error:
            tiny_model()(self.IMAGE, labels=torch.zeros(2, 5), box=torch.zeros(shape, dtype=torch.int64))
        message = str(error.value)
        assert "box: expected (2, 4) (top, bottom, left, right in pixels)" in message
        assert f"got {shape}" in message

    @pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 64, 64), (1, 3, 32, 40)])
    def test_local_views_from_another_grid(self, tiny_model, shape):
        with pytest.raises(ValueError) as error:
            tiny_model()(self.IMAGE, labels=torch.zeros(2, 5), local_source=torch.zeros(shape))
        expected = f"local_source: expected the shape of pixel_values, (2, 3, 32, 40), got {shape}"
        assert expected in str(error.value)

    def test_local_views_larger_than_the_image(self, tiny_model):
        with pytest.raises(ValueError, match="local crops of 40 px need images larger than that, got 32x40"):
            tiny_model(local_crop_size=40)(self.IMAGE, labels=torch.zeros(2, 5))

    def test_freezing_more_blocks_than_there_are(self, tiny_model):
        with pytest.raises(ValueError, match="frozen_backbone_layers: expected 0 to 4, got 5"):
            tiny_model().freeze_backbone_layers(5)
