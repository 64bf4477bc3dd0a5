"""Scores of one image: the multi-scale CAM of both classifiers and the decoder's segmentation."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation_msee import activation_to_labels, present_classes, restore_classes
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation
from .confusion import confusion_matrix


# What is scored, in the order of the rows of `ImageScores.matrices`.
MAP_NAMES = ("CAM", "Auxiliary CAM", "Seg")


@dataclass(frozen=True)
class ImageScores:
    """Confusion matrices (3, K, K) in the order of `MAP_NAMES`, and the decoder's probabilities.

    The probabilities (K, H, W) are at full size.
    """

    matrices: np.ndarray
    probabilities: Tensor


@torch.no_grad()
def score_image(
    model: MSEEForWeaklySupervisedSegmentation, pixel_values: Tensor, labels: Tensor, target: Tensor
) -> ImageScores:
    """Score one image against its label map.

    The CAM is the fused one over `config.activation_scale_factors` and mirror images, restricted to the image-level
    labels (as the baseline's public logs report it) and split at `config.background_threshold`; the segmentation is
    one scale without mirroring (§4).

    Args:
        pixel_values: (1, 3, h, w), on the model's device.
        labels: multi-hot (1, K - 1).
        target: label map (H, W) at the image's own size, 255 ignored.
    """
    size = (target.shape[-2], target.shape[-1])
    student = model.encode(pixel_values)
    scores = model.decoder(student.features).float()
    probabilities = F.interpolate(scores, size=size, mode="bilinear", align_corners=False).softmax(dim=1)[0]
    indices, present = present_classes(labels)
    maps = model.multi_scale_activation_maps(pixel_values, indices=indices, unscaled=student)
    predictions = []
    for fused in maps:
        resized = F.interpolate(fused, size=size, mode="bilinear", align_corners=False)
        split = activation_to_labels(resized, present, model.config.background_threshold)
        predictions.append(restore_classes(split, indices)[0])
    predictions.append(probabilities.argmax(dim=0))
    truth, classes = target.cpu().numpy(), len(model.config.label_names)
    matrices = [confusion_matrix(prediction.cpu().numpy(), truth, classes) for prediction in predictions]
    return ImageScores(np.stack(matrices), probabilities)
