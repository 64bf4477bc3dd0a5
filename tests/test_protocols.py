"""Protocols: sizes, fusion by hand, and what the dense CRF is given."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modeling_msee import MSEEImageProcessor
from modeling_msee.evaluation.protocols import CAM, MSEE, PROTOCOLS, TOCO_COCO, TOCO_VOC, find_protocol
from modeling_msee.evaluation.segmentation import (
    Candidates,
    CRFRequest,
    crf_candidates,
    protocol_views,
    refined_labels,
    segmentation_scores,
)


CPU = torch.device("cpu")


# --- Names ----------------------------------------------------------------------------------------


def test_names() -> None:
    assert list(PROTOCOLS) == ["msee", "msee-crf", "toco-voc", "toco-voc-crf", "toco-coco", "toco-coco-crf", "cam"]
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())
    assert find_protocol("msee") is MSEE and not MSEE.crf
    assert find_protocol("msee", crf=True) == find_protocol("msee-crf", crf=True) == find_protocol("msee-crf")
    assert find_protocol("toco-voc-crf") == replace(
        TOCO_VOC, name="toco-voc-crf", description=TOCO_VOC.description + "; dense CRF", crf=True
    )


def test_rows() -> None:
    assert CAM.row_names == ("CAM", "Auxiliary CAM")
    assert MSEE.row_names == ("CAM", "Auxiliary CAM", "Seg")
    assert TOCO_COCO.with_crf.row_names == ("CAM", "Auxiliary CAM", "Seg", "Seg + CRF")


def test_settings_say_what_is_computed() -> None:
    assert MSEE.settings() == {"scales": [1.0], "mirror": None, "across_scales": None, "size": None, "crf": None}
    voc, coco = TOCO_VOC.settings(), TOCO_COCO.settings()
    assert voc == {"scales": [1.0, 1.5, 1.25], "mirror": "add", "across_scales": "maximum", "size": None, "crf": None}
    assert coco == {"scales": [1, 1.25, 1.5], "mirror": "maximum", "across_scales": "add", "size": 448, "crf": None}


# --- Sizes ----------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "protocol", "expected"),
    [
        # 37 x 50 in patches of 16: 2.3 x 3.1; times 1.5: 55 x 75, 3.4 x 4.7; times 1.25: 46 x 62, 2.9 x 3.9.
        (None, TOCO_VOC, {1.0: (32, 48), 1.5: (48, 80), 1.25: (48, 64)}),
        # 32 on the shorter side: 2 x 2.7; 48: 3 x 4.05; 40: 2.5, which goes up, x 3.4.
        ({"shortest_edge": 32}, TOCO_VOC, {1.0: (32, 48), 1.5: (48, 64), 1.25: (48, 48)}),
        ({"shortest_edge": 32}, TOCO_COCO, {1.0: (448, 448), 1.25: (560, 560), 1.5: (672, 672)}),
        (None, MSEE, {1.0: (32, 48)}),
        (None, CAM, {1.0: (32, 48)}),
    ],
)
def test_sizes_of_views(size, protocol, expected) -> None:
    processor = MSEEImageProcessor(patch_size=16, size=size)
    views = protocol_views(processor, picture(50, 37), protocol, CPU)
    assert {scale: tuple(view.shape) for scale, view in views.items()} == {
        scale: (1, 3, *sides) for scale, sides in expected.items()
    }


def test_unscaled_view_is_what_the_processor_gives() -> None:
    processor, image = MSEEImageProcessor(patch_size=16), picture(50, 37)
    view = protocol_views(processor, image, TOCO_VOC, CPU)[1.0]
    assert torch.equal(view, processor(image, return_tensors="pt")["pixel_values"])
    assert protocol_views(processor, picture(1, 1), TOCO_VOC, CPU)[1.5].shape == (1, 3, 16, 16)


# --- Fusion ---------------------------------------------------------------------------------------


class PositionModel:
    """Patches of one pixel. Class 1 scores the red value plus 1, 0, 2, 0 from the left: mirroring changes it."""

    def encode(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(features=pixel_values[:, :1])

    def decoder(self, features: Tensor) -> Tensor:
        position = torch.tensor([1.0, 0.0, 2.0, 0.0])[: features.shape[-1]]
        return torch.cat((0 * features, features + position), dim=1)


def view(*red: float) -> Tensor:
    return torch.tensor(red).expand(1, 3, 1, -1)


# At scale 1: [2, -4], mirrored [1, -3].
# At scale 2: [-1, 3, 6, 2], at full size [1, 4]; mirrored [-2, 5, 4, 3], at full size [1.5, 3.5].
VIEWS = {1.0: view(1, -4), 2.0: view(-2, 3, 4, 2)}


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (MSEE, [2, -4]),
        (replace(TOCO_VOC, scales=(1.0,)), [3, -7]),
        (replace(TOCO_VOC, scales=(2.0,)), [2.5, 7.5]),
        (replace(TOCO_VOC, scales=(1.0, 2.0)), [3, 7.5]),  # a sum of maxima would be [3.5, 7.5]
        (replace(TOCO_COCO, scales=(2.0,)), [1.5, 4]),  # a maximum on the patch grid would be [2, 4.5]
        (replace(TOCO_COCO, scales=(1.0, 2.0)), [3.5, 1]),  # a maximum of sums would be [3, 0.5]
    ],
)
def test_fusion_by_hand(protocol, expected) -> None:
    model, inputs = PositionModel(), {scale: item.clone() for scale, item in VIEWS.items()}
    for unscaled in (None, model.encode(inputs[1.0])):
        scores = segmentation_scores(model, inputs, (1, 2), protocol, unscaled)
        assert scores.tolist() == [[[0, 0]], [expected]]
    assert all(torch.equal(inputs[scale], VIEWS[scale]) for scale in VIEWS)  # nothing is added to in place


def test_cam_has_no_segmentation() -> None:
    with pytest.raises(ValueError, match="'cam' predicts no segmentation"):
        segmentation_scores(PositionModel(), VIEWS, (1, 2), CAM)


def test_one_scale_is_the_forward_pass(tiny_model) -> None:
    model, pixel_values = tiny_model().eval(), torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        logits = model(pixel_values).logits
    expected = F.interpolate(logits, size=(21, 43), mode="bilinear", align_corners=False)[0]
    scores = segmentation_scores(model, {1.0: pixel_values}, (21, 43), MSEE)
    assert torch.equal(scores, expected) and scores.shape == (6, 21, 43)


def test_published_order_on_a_model(tiny_model) -> None:
    """Scores at full size; original and mirror image summed; maximum over scales."""
    model = tiny_model().eval()
    views = {1.0: torch.randn(1, 3, 24, 40), 1.5: torch.randn(1, 3, 40, 56), 1.25: torch.randn(1, 3, 32, 48)}

    def full_size(pixel_values: Tensor) -> Tensor:
        return F.interpolate(model(pixel_values).logits, size=(21, 43), mode="bilinear", align_corners=False)[0]

    with torch.no_grad():
        sums = [full_size(item) + full_size(item.flip(-1)).flip(-1) for item in views.values()]
        scores = segmentation_scores(model, views, (21, 43), TOCO_VOC)
    assert torch.allclose(scores, torch.stack(sums).amax(dim=0), atol=1e-5)


# --- Dense CRF ------------------------------------------------------------------------------------


def test_the_crf_gets_probabilities_of_the_classes_that_win() -> None:
    """The softmax is over all classes, of the fused scores: 3 wins nowhere and is left out, 0 stays."""
    scores = torch.tensor([[[0.0, 0.0]], [[-1.0, 2.0]], [[3.0, 1.0]], [[1.0, 0.5]]])
    candidates = crf_candidates(scores, scores.argmax(dim=0))
    assert candidates.classes.tolist() == [0, 1, 2]
    left = sum(math.exp(score) for score in (0, -1, 3, 1))
    right = sum(math.exp(score) for score in (0, 2, 1, 0.5))
    expected = [[1 / left, 1 / right], [math.exp(-1) / left, math.exp(2) / right]]
    assert np.allclose(candidates.probabilities[:2, 0], expected, rtol=1e-5)
    assert candidates.probabilities.dtype == np.float32 and candidates.probabilities.shape == (3, 1, 2)


def test_refined_labels_keep_their_item_and_their_classes() -> None:
    pytest.importorskip("pydensecrf")
    certain = np.zeros((3, 12, 16), dtype=np.float32)
    certain[0, :, :8] = certain[2, :, 8:] = 1
    image = np.zeros((12, 16, 3), dtype=np.uint8)
    image[:, 8:] = 250
    tables = [[0, 4, 19], [0, 2, 9], [0, 1, 2], [0, 7, 8], [0, 5, 6]]
    requests = [CRFRequest(f"photo {t[2]}", image, Candidates(np.array(t), certain)) for t in tables]
    results = list(refined_labels(iter(requests), workers=1))
    assert [item for item, _ in results] == [f"photo {t[2]}" for t in tables]
    for (_, labels), table in zip(results, tables, strict=True):
        assert labels.shape == (12, 16)
        assert (labels[:, :8] == 0).all() and (labels[:, 8:] == table[2]).all()
