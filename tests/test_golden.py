"""Agreement with the published baseline and with a loop-by-loop evaluation of Eq. 1-7, on stored figures.

The tolerances are those between float32 and float64 runs of the reference (`../shared/golden/README.md`); where the
reference itself does not keep them, a bound is derived in the test.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_weights import reference_network

from modeling_msee import MSEEConfig
from modeling_msee.activation_msee import (
    activation_scores,
    activation_to_labels,
    box_mask,
    class_activation_maps,
    labels_to_affinity,
    local_crops,
    present_classes,
    restore_classes,
    scale_box,
    take_classes,
    uncertainty_mask,
)
from modeling_msee.losses_msee import (
    LATTICE_SHARE,
    class_token_contrast_loss,
    dense_energy_loss,
    feature_distillation_loss,
    msee_loss,
    patch_token_contrast_loss,
    segmentation_loss,
)
from modeling_msee.modeling_msee import MSEEProjectionHead
from modeling_msee.refinement_msee import bilateral_filter, pixel_adaptive_refinement, refined_pseudo_labels
from modeling_msee.regions_msee import confidence_thresholds, reliable_regions
from modeling_msee.training.schedule import learning_rate_factor


LEVELS = {"background": 0.5, "high": 0.7, "low": 0.25}


def assert_close(name, ours, reference, absolute=None, relative=None):
    """The largest difference, or its share of the largest reference value, is within the tolerance."""
    assert ours.shape == reference.shape
    difference = (ours - reference).abs().max().item()
    scale = 1.0 if relative is None else max(reference.abs().max().item(), 1e-30)
    print(f"{name}: largest difference {difference:.2e}, of {reference.abs().max().item():.2e}")
    assert difference <= (absolute if relative is None else relative * scale)


def assert_equal(name, ours, reference):
    different = (ours != reference).sum().item()
    print(f"{name}: largest difference {(ours.long() - reference.long()).abs().max().item()}, {different} positions")
    assert ours.shape == reference.shape
    assert different == 0


@pytest.fixture(scope="module")
def network(shared):
    # Step 0 of a run in which everything but the class losses starts later: one encoder pass.
    return reference_network(
        shared / "golden" / "net_state.npz", patch_contrast_start_step=1, class_contrast_start_step=1
    )


@pytest.mark.parametrize("size", ["64x64", "128x96"])  # the second needs a resized position embedding
def test_network(golden, network, size):
    reference = golden("01_network", size)
    with torch.no_grad():
        encoded = network.encode(reference["input"])
        output = network(reference["input"], labels=torch.zeros(2, 20), step=0)
        maps = activation_scores(encoded.features, network.classifier.weight)
        auxiliary_maps = activation_scores(encoded.auxiliary, network.auxiliary_classifier.weight)
    assert_close("class token", encoded.class_token, reference["cls_token"], relative=1e-5)
    assert_close("features", encoded.features, reference["patch_feat"], relative=1e-5)
    assert_close("auxiliary features", encoded.auxiliary, reference["aux_feat"], relative=1e-5)
    assert_close("class logits", output.class_logits, reference["cls_logits"], relative=1e-5)
    assert_close("auxiliary class logits", output.auxiliary_class_logits, reference["aux_logits"], relative=1e-5)
    assert_close("logits", output.logits, reference["seg_logits"], relative=1e-5)
    assert_close("cam", maps, reference["cam"], relative=1e-5)
    assert_close("auxiliary cam", auxiliary_maps, reference["cam_aux"], relative=1e-5)


@pytest.mark.parametrize(("case", "scales"), [("s3", (1.0, 0.5, 1.5)), ("s1", (1.0,))])
def test_multi_scale_maps(golden, network, monkeypatch, case, scales):
    reference = golden("02_multi_scale_cam2", "96x64")
    monkeypatch.setattr(network.config, "activation_scale_factors", scales)
    main, auxiliary = network.multi_scale_activation_maps(reference["input"])
    assert_close("cam", main, reference[f"{case}/cam"], absolute=1e-4)
    assert_close("auxiliary cam", auxiliary, reference[f"{case}/cam_aux"], absolute=1e-4)


@pytest.mark.parametrize("case", ["one_class", "none_above", "mid_only", "no_label"])
def test_label_maps(golden, case):
    reference = golden("03_labels", case)
    maps, labels, box = reference["cam"], reference["cls_label"], reference["img_box"]
    background, high, low = LEVELS["background"], LEVELS["high"], LEVELS["low"]
    full = activation_to_labels(maps, labels, background, high, low, box)
    assert_equal("no box", activation_to_labels(maps, labels, background), reference["label_nobox"])
    assert_equal("box, ignored middle", full, reference["label_box_ignoremid"])
    plain = activation_to_labels(maps, labels, background, box=box)
    assert_equal("box alone", plain, reference["label_box_noignoremid"])
    assert_equal("uncertainty", uncertainty_mask(maps, labels, low, high), reference["roi_mask"])
    indices, present = present_classes(labels)
    taken = activation_to_labels(take_classes(maps, indices), present, background, high, low, box)
    assert_equal("present classes only", restore_classes(taken, indices), reference["label_box_ignoremid"])
    assert_equal("affinity", labels_to_affinity(reference["small_label"]), reference["aff_mask"])


@pytest.mark.parametrize("case", ["one_class", "none_above", "mid_only", "no_label"])
def test_label_maps_on_the_token_grid(golden, case):
    """The reference uses the box in pixels on the token grid, so padding is never ignored; here it is scaled."""
    reference = golden("03_labels", case)
    maps, labels, box = reference["small_cam"], reference["cls_label"], reference["img_box"]
    quirk = activation_to_labels(maps, labels, *LEVELS.values(), box=box)
    assert_equal("pixel box", quirk, reference["small_label"])
    inside = box_mask(box, 48, 48).float()
    ours = activation_to_labels(maps, labels, *LEVELS.values(), box=scale_box(box, 8))
    # With these boxes, all or nothing of a patch is valid.
    outside = F.avg_pool2d(inside[:, None], 8)[:, 0] == 0
    assert (ours[outside] == 255).all()
    unboxed = activation_to_labels(maps, labels, *LEVELS.values())
    assert_equal("inside the box", ours[~outside], unboxed[~outside])


def test_local_crops(golden):
    reference = golden("03b_crop_from_roi", "mixed")
    permutations = [reference["perm0"], reference["perm1"]]
    # The reference takes the first entries of a random order of the candidates.
    draws = torch.stack([(order[:8].double() + 0.5) / len(order) for order in permutations])
    crops, positive, top_left = local_crops(reference["image"], reference["roi_mask"], 32, draws, share=0.2)
    assert_equal("top left", top_left, reference["top_left"])
    assert_close("crops", crops, reference["crops"], absolute=0)
    flags = reference["flags"]  # the two global views first
    assert flags[:, :2].all()
    assert_equal("flags", positive, flags[:, 2:] > 0)


@pytest.mark.parametrize("case", ["normal", "all_ignored"])
def test_patch_contrast(golden, case):
    reference = golden("04_losses", f"ptc/{case}")
    features = reference["feat"].requires_grad_()
    affinity = labels_to_affinity(reference["label"])
    loss = patch_token_contrast_loss(features, affinity)
    loss.backward()
    assert_equal("affinity", affinity, reference["mask"])
    assert_close("loss", loss.detach(), reference["loss"], relative=1e-5)
    assert_close("gradient", features.grad, reference["grad"], relative=1e-5)


def test_segmentation_loss(golden):
    reference = golden("04_losses", "seg/normal")
    logits = reference["pred"].requires_grad_()
    loss = segmentation_loss(logits, reference["label"])
    loss.backward()
    assert_close("loss", loss.detach(), reference["loss"], relative=1e-5)
    assert_close("gradient", logits.grad, reference["grad"], relative=1e-5)


def test_segmentation_loss_without_foreground(golden):
    """The reference is NaN; here the empty half is zero, which leaves half the background's cross entropy."""
    reference = golden("04_losses", "seg/no_foreground")
    assert reference["loss"].isnan()
    logits, labels = reference["pred"].requires_grad_(), reference["label"].long()
    loss = segmentation_loss(logits, labels)
    loss.backward()
    assert set(labels.unique().tolist()) == {0, 255}
    expected = 0.5 * F.cross_entropy(reference["pred"].detach(), labels, ignore_index=255)
    assert_close("half the background", loss.detach(), expected, relative=1e-5)
    # The reference's gradient is that of the same half.
    assert_close("gradient", logits.grad, reference["grad"].nan_to_num(), relative=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_class_contrast(golden, temperature):
    reference = golden("04_losses", "ctc/all_local_neg")
    student = reference["student"].requires_grad_()
    loss = class_token_contrast_loss(student, reference["teacher"], reference["flags"], temperature)
    loss.backward()
    assert_close("loss", loss.detach(), reference[f"T{temperature}/loss"], relative=1e-5)
    assert_close("gradient", student.grad, reference[f"T{temperature}/grad_student"], relative=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_class_contrast_without_negatives(golden, temperature):
    """Beside e stands only 1e-4, so the stored float32 gradient itself is 2e-4 to 5e-4 off, processor by processor.

    Of -log(q), q = e / d, it is e (q / d - 1 / d) / q: all but 1e-4 cancels, the roundings of d, q, q / d and 1 / d
    do not. Each is at most eps / 2 of the term's weight, 1 / (2 B V T), and two evaluations have eight of them.
    """
    reference = golden("04_losses", "ctc/all_pos")
    teacher, flags = reference["teacher"], reference["flags"]
    weight = 1 / (2 * flags.numel() * temperature)
    rounding = weight * torch.finfo(torch.float32).eps / 2 * teacher.view(2, -1).abs().sum(dim=0).max().item()
    for precision, roundings in ((torch.float32, 8), (torch.float64, 4)):
        student = reference["student"].to(precision, copy=True).requires_grad_()
        loss = class_token_contrast_loss(student, teacher.to(precision), flags, temperature)
        loss.backward()
        gradient = student.grad.float()
        assert_close("gradient", gradient, reference[f"T{temperature}/grad_student"], absolute=roundings * rounding)
        if precision == torch.float32:
            assert_close("loss", loss.detach(), reference[f"T{temperature}/loss"], relative=1e-5)


def test_full_projection_head(golden, shared):
    names = {"mlp.0": "layer1", "mlp.2": "layer2", "mlp.4": "layer3", "last_layer": "last_layer"}
    reference = golden("04c_ctchead_full")
    head = MSEEProjectionHead(MSEEConfig(backbone_config={"model_type": "vit", "hidden_size": 64}))
    draw = np.random.RandomState(42)
    with np.load(shared / "golden" / "04c_ctchead_full.npz") as arrays:
        order = arrays["param_order"].tolist()
    for name in order:
        layer, kind = name.rsplit(".", 1)
        module = getattr(head, names[layer])
        if kind == "bias":
            module.bias.data = torch.from_numpy(draw.randn(*module.bias.shape) * 0.1).float()
        elif kind in ("weight", "weight_v"):
            module.weight.data = torch.from_numpy(draw.randn(*module.weight.shape) * 0.05).float()
    x = torch.from_numpy(np.random.RandomState(43).randn(4, 64)).float()
    assert_close("input", x, reference["x"], absolute=0)
    with torch.no_grad():
        assert_close("projection", head(x), reference["y"], relative=1e-5)


@pytest.mark.parametrize("case", ["2x3x56x72", "upsampled_mask"])
def test_pixel_adaptive_refinement(golden, case):
    reference = golden("05_par_refine", case)
    refined = pixel_adaptive_refinement(reference["image"], reference["mask"])
    assert_close("refined", refined, reference["refined"], absolute=5e-6)


@pytest.mark.parametrize("case", ["one_class", "several", "none_above", "small_box", "mid_only"])
def test_refined_pseudo_labels(golden, case):
    reference = golden("05_par_refine", f"refine/{case}")
    refined = refined_pseudo_labels(
        reference["image_denorm01"],
        reference["valid_cam"],
        reference["cls_label"],
        reference["img_box"],
        high=LEVELS["high"],
        low=LEVELS["low"],
    )
    clear = torch.minimum(reference["top2_margin_high"], reference["top2_margin_low"]) > 1e-4
    print(f"{(refined != reference['label']).sum()} positions differ, {(~clear).sum()} are near ties")
    assert_equal("labels", refined[clear], reference["label"][clear])


@pytest.mark.parametrize("case", ["b1_full", "all_ignored"])
def test_bilateral_filter(golden, case):
    """Within 3 % of the exact sum, of which the reference's lattice returns 0.53."""
    reference = golden("06_energy", case)
    filtered = bilateral_filter(reference["scaled_image"], reference["scaled_prob"], 15.0, 50.0)
    exact, lattice = reference["filter_out_exact"], reference["filter_out_permuto"]
    cosine = F.cosine_similarity(filtered.flatten(), exact.flatten(), dim=0).item()
    share, lattice_share = (filtered.sum() / exact.sum()).item(), (lattice.sum() / exact.sum()).item()
    print(f"share of the exact sum {share:.4f}, of the lattice {lattice_share:.4f}; cosine {cosine:.5f}")
    print(f"largest difference {(filtered - exact).abs().max():.2e}, of {exact.abs().max():.2e}")
    assert share == pytest.approx(1, abs=0.03)
    assert lattice_share == pytest.approx(LATTICE_SHARE, rel=0.05)
    assert cosine > 0.999


@pytest.mark.parametrize("case", ["b1_full", "all_ignored"])
def test_dense_energy(golden, case):
    """Value and gradient have the lattice's size and the exact sum's direction."""
    reference = golden("06_energy", case)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    logits = reference["logits"].requires_grad_()
    image = reference["input_norm"] * std + mean
    loss = dense_energy_loss(image, logits.softmax(dim=1), reference["label"], reference["img_box"])
    loss.backward()
    print(f"largest difference {(loss - reference['loss_permuto']).abs().item():.2e}, of {loss.item():.2e}")
    assert loss.item() == pytest.approx(reference["loss_permuto"].item(), rel=0.1)
    assert loss.item() == pytest.approx(LATTICE_SHARE * reference["loss_exact"].item(), rel=0.1)
    for name, least in (("exact", 0.999), ("permuto", 0.99)):
        gradient = reference[f"grad_logits_{name}"]
        cosine = F.cosine_similarity(logits.grad.flatten(), gradient.flatten(), dim=0).item()
        size = (logits.grad.norm() / gradient.norm()).item()
        print(f"gradient against {name}: cosine {cosine:.4f}, size {size:.4f}")
        assert cosine >= least
        assert size == pytest.approx(1 if name == "permuto" else LATTICE_SHARE, rel=0.1)


def test_learning_rate(golden):
    reference = golden("07_lr")
    factors = [learning_rate_factor(step, 1500, 20_000) for step in reference["step"].tolist()]
    # Two groups of the encoder, two of the heads.
    ours = 6e-5 * torch.tensor(factors, dtype=torch.float64)[:, None] * torch.tensor([1.0, 1.0, 10.0, 10.0])
    relative = ((ours - reference["lr"]).abs() / reference["lr"]).max().item()
    print(f"largest difference {relative:.2e} of the rate")
    assert relative <= 1e-5


def test_optimiser_trajectory(golden):
    """The reference's nine updates: AdamW, rate 0.01 (heads tenfold), decay 0.01, warm-up 3 of 8 steps."""
    reference = golden("07b_adamw_traj")
    parameters = [torch.nn.Parameter(start.clone()) for start in reference["init"]]
    groups = [
        {"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, (0.01, 0.01, 0.1, 0.1), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, 3, 8))
    for step, gradients in enumerate(reference["grads"]):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        scheduler.step()
        ours = torch.stack([parameter.detach() for parameter in parameters])
        assert_close(f"step {step}", ours, reference["params_after"][step], relative=1e-6)


MSEE_MODES = {"per_class": "per_class", "per_image": "per_image", "per_image_max": "per_image_maxcam"}


def resized(maps):
    return F.interpolate(maps, size=(8, 8), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("case", ["no_fg_in_S", "nonpositive_cam", "one_class"])
def test_msee_maps_and_distances(golden, case):
    """Eq. 1, 5 and 6. The reference's maps are of all classes; a test of labels is with the thresholds."""
    given = {name: value.double() for name, value in golden("10_msee", f"{case}/in").items()}
    expected = golden("10_msee", f"{case}/out")
    for scale in "osl":
        maps = class_activation_maps(given[f"F_{scale}"], given["W"])
        labelled = class_activation_maps(given[f"F_{scale}"], given["W"], given["labels"])
        keep = given["labels"][:, :, None, None]
        assert_close(f"maps {scale}", labelled, expected[f"cam_{scale}"] * keep, absolute=1e-12)
        assert_close(f"share kept {scale}", maps * keep, labelled, absolute=0)
    for scale in "sl":
        features, name = resized(given[f"F_{scale}"]), f"F_{scale}o"
        assert_close(name, features, expected[name], absolute=1e-12)
        student = given["F_o"].clone().requires_grad_()
        distances = feature_distillation_loss(student, features)
        distances.sum().backward()
        assert_close(f"L_{scale}", distances.detach(), expected[f"L_{scale}"], absolute=1e-12)
        assert_close(f"dL_{scale}", student.grad, expected[f"dL_dFo_{scale}"], absolute=1e-12)


@pytest.mark.parametrize("mode", MSEE_MODES)
@pytest.mark.parametrize("case", ["no_fg_in_S", "nonpositive_cam", "one_class"])
def test_msee_regions_and_loss(golden, case, mode):
    """Eq. 2, 3, 4 and 7. Without foreground in S the threshold is NaN, nothing is selected, the loss zero."""
    given = {name: value.double() for name, value in golden("10_msee", f"{case}/in").items()}
    expected, by_mode = golden("10_msee", f"{case}/out"), golden("10_msee", f"{case}/out/{MSEE_MODES[mode]}")
    labels, scores = given["labels"], given["S_logits"]
    maps = {scale: resized(class_activation_maps(given[f"F_{scale}"], given["W"], labels)) for scale in "sl"}
    for scale in "sl":
        assert_close(f"maps {scale}", maps[scale], expected[f"cam_{scale}o"], absolute=1e-12)
        thresholds = confidence_thresholds(maps[scale], scores, labels, mode)
        reference = by_mode[f"T_{scale}"]
        assert torch.equal(thresholds.isnan(), reference.isnan())
        assert_close(f"T_{scale}", thresholds.nan_to_num(), reference.nan_to_num(), absolute=1e-12)
    large, small = reliable_regions([maps["l"], maps["s"]], scores, labels, mode)
    (small_alone,) = reliable_regions([maps["s"]], scores, labels, mode)
    assert_equal("B_l", large, by_mode["B_l"])
    assert_equal("B_s", small, by_mode["B_s"])
    assert_equal("B_s before exclusion", small_alone, by_mode["B_s_before_exclusion"])
    student = given["F_o"].clone().requires_grad_()
    loss = msee_loss(student, [given["F_l"], given["F_s"]], [large, small], reduction="sum")
    loss.backward()
    assert_close("loss", loss.detach(), by_mode["L_msee_sum"], absolute=1e-10)
    assert_close("gradient", student.grad, by_mode["grad_Fo_teacher_detached"], absolute=1e-12)
