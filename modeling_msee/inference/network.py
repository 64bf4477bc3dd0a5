"""A model ready for prediction, whatever runs it: a checkpoint in torch or an exported ONNX file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..image_processing_msee import MSEEImageProcessor
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation


PRESENT = 0.5  # image-level probability from which a class counts as predicted


@dataclass(frozen=True)
class NetworkScores:
    """What the network gives for a batch: `logits` (B, K, h, w) on the patch grid, `class_logits` (B, K - 1)."""

    logits: Tensor
    class_logits: Tensor


class InferencePath(nn.Module):
    """The part of a model that prediction runs, and nothing else: one encoder pass, decoder and main classifier."""

    def __init__(self, model: MSEEForWeaklySupervisedSegmentation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """pixel_values (B, 3, H, W) -> segmentation scores (B, K, h, w), image-level scores (B, K - 1)."""
        encoded = self.model.encode(pixel_values)
        logits = self.model.decoder(encoded.features)
        return logits, self.model.class_logits(encoded.features, self.model.classifier)


@dataclass(frozen=True)
class Segmenter:
    """What prediction needs of a model.

    Args:
        class_names: of all labels, the background first.
        processor: as the model was trained with.
        scores: pixel_values (B, 3, H, W), sides in whole patches -> `NetworkScores` on the CPU.
        model: the model itself, for activation maps and regions; None where only the exported inference path is there.
    """

    class_names: tuple[str, ...]
    processor: MSEEImageProcessor
    scores: Callable[[Tensor], NetworkScores]
    model: MSEEForWeaklySupervisedSegmentation | None = None


def load_model(path: str) -> tuple[MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor]:
    """Model, ready to predict, and processor of a checkpoint folder or Hub repository.

    Raises:
        OSError: neither is there, or a file is missing from it.
    """
    try:
        model = MSEEForWeaklySupervisedSegmentation.from_pretrained(path).eval()
        return model, MSEEImageProcessor.from_pretrained(path)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise FileNotFoundError(
            f"{path}: expected a checkpoint folder or a Hub repository. "
            f"There is no such folder here, and as a Hub repository: {error}"
        ) from error


def torch_segmenter(model: MSEEForWeaklySupervisedSegmentation, processor: MSEEImageProcessor) -> Segmenter:
    """The segmenter of a model in memory; it runs where the model is."""
    path = InferencePath(model.eval())

    @torch.inference_mode()
    def scores(pixel_values: Tensor) -> NetworkScores:
        logits, class_logits = path(pixel_values.to(model.device))
        return NetworkScores(logits.float().cpu(), class_logits.cpu())

    return Segmenter(tuple(model.config.label_names), processor, scores, model)
