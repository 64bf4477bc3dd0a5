"""Scores of one image: the multi-scale CAM of both classifiers and the segmentation."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation_msee import activation_to_labels, present_classes, restore_classes
from ..encoder_msee import EncoderFeatures
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .confusion import confusion_matrix
from .protocols import Protocol
from .segmentation import Candidates, crf_candidates, segmentation_scores


@dataclass(frozen=True)
class ImageScores:
    """Confusion matrices (n, K, K) in the order of `Protocol.row_names`, without the one after dense CRF.

    `candidates` is what that one is made from, if the protocol has it.
    """

    matrices: np.ndarray
    candidates: Candidates | None


@torch.no_grad()
def score_image(
    model: MSEEForWeaklySupervisedSegmentation,
    views: dict[float, Tensor],
    labels: Tensor,
    target: Tensor,
    protocol: Protocol,
) -> ImageScores:
    """Score one image against its label map.

    The CAM is the fused one over `config.activation_scale_factors` and mirror images, restricted to the image-level
    labels (as the baseline's public logs report it) and split at `config.background_threshold`.

    Args:
        views: from `protocol_views`, on the model's device.
        labels: multi-hot (1, K - 1), likewise.
        target: label map (H, W) at the image's own size, 255 ignored.
    """
    size = (target.shape[-2], target.shape[-1])
    student = model.encode(views[1.0])
    predictions = activation_labels(model, views[1.0], labels, size, student)
    candidates = None
    if protocol.scales:
        scores = segmentation_scores(model, views, size, protocol, student)
        segmentation = scores.argmax(dim=0)
        predictions.append(segmentation)
        if protocol.crf:
            candidates = crf_candidates(scores, segmentation)
    truth, classes = target.cpu().numpy(), len(model.config.label_names)
    matrices = [confusion_matrix(prediction.cpu().numpy(), truth, classes) for prediction in predictions]
    return ImageScores(np.stack(matrices), candidates)


def activation_labels(
    model: MSEEForWeaklySupervisedSegmentation,
    pixel_values: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    student: EncoderFeatures,
) -> list[Tensor]:
    """Label maps (H, W) of the fused CAM of the main and of the auxiliary classifier."""
    indices, present = present_classes(labels)
    predictions = []
    for fused in model.multi_scale_activation_maps(pixel_values, indices=indices, unscaled=student):
        resized = F.interpolate(fused, size=size, mode="bilinear", align_corners=False)
        split = activation_to_labels(resized, present, model.config.background_threshold)
        predictions.append(restore_classes(split, indices)[0])
    return predictions
