"""Configuration of M-SEE models: every weight, threshold, start step and mode of the method in one place."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


# The encoders whose token layout the model knows: prefix tokens first, then one token per patch, row by row.
SUPPORTED_BACKBONES = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")


def label_fields(names: Sequence[str]) -> dict[str, dict]:
    """`id2label` and `label2id` of the label names, background first."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


@strict
class MSEEConfig(PreTrainedConfig):
    r"""
    Configuration of [`MSEEForWeaklySupervisedSegmentation`]. Defaults are the paper's (ViT-B/16, PASCAL VOC 2012);
    where the paper is silent they are the published baseline's (ToCo) or stated below. Steps are optimiser steps.

    Label 0 of `id2label` is the background; the classifiers have `num_labels - 1` outputs.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to ViT-B/16):
            Configuration of the encoder: `vit`, `deit`, `dinov2`, `dinov2_with_registers` or `dinov3_vit`.
        auxiliary_layer (`int`, defaults to -3):
            Block whose un-normalised output gives the auxiliary features; -1 is the last block.
        decoder_channels (`int`, defaults to 512), decoder_dilation (`int`, defaults to 5):
            DeepLab-LargeFOV decoder (§5.1).
        projection_hidden_size, projection_bottleneck_size, projection_size (`int`, default to 2048, 256, 1024):
            Projection head of the class-token contrast.
        projection_momentum (`float` in [0, 1], defaults to 0.9):
            Share of the old weights that the averaged projection head keeps at each step.
        scale_factors (`tuple[float, ...]`, defaults to `(1.5, 0.5)`):
            Scales of the teacher images in order of precedence (§3.1, Eq. 4); empty switches M-SEE off.
        threshold_mode (`"per_class"`, `"per_image"` or `"per_image_max"`):
            Reading of Eq. 2.
        select_regions (`bool`, defaults to `True`):
            Whether Eq. 7 is restricted to the reliable regions of Eq. 3 and 4; `False` distils at every position
            (Table 4, "w/o B").
        beta (`float` > 0, defaults to 2.0):
            β of Eq. 5 and 6.
        distance (`"vector"` or `"elementwise"`):
            L2 norm over channels as printed in Eq. 5, or smooth L1 per element, averaged over channels.
        msee_loss_reduction (`"mean"` or `"sum"`):
            Eq. 7 over the positions of an image; `"sum"` as printed. Over the images of a step it is always the mean.
        msee_loss_weight (`float`, defaults to 0.01):
            λ, the weight of Eq. 7; the paper gives none, docs/results.md says what came of others.
        msee_start_step (`int`, defaults to 2000):
            First step with the M-SEE loss.
        teacher_gradient (`bool`, defaults to `False`):
            Whether gradient also flows into the selected features of the scaled images.
        classify_scaled_images (`bool`, defaults to `False`):
            Whether the class losses are also computed on the scaled images (a reading of §3.1).
        classification_loss_weight, auxiliary_classification_loss_weight (`float`, default to 1.0):
            Multi-label soft-margin losses of the two classifiers.
        patch_contrast_loss_weight (0.2), class_contrast_loss_weight (0.5), segmentation_loss_weight (0.1),
        energy_loss_weight (0.05) (`float`):
            The baseline's further terms; 0 switches a term and its cost off.
        patch_contrast_start_step (0), class_contrast_start_step (0), segmentation_start_step (2000) (`int`):
            First step with each of the two contrasts; with segmentation and energy.
        main_activation_start_step (`int`, defaults to 0):
            First step with pseudo labels from the main instead of the auxiliary CAM.
        activation_scale_factors (`tuple[float, ...]`, defaults to `(1.0, 0.5, 1.5)`):
            Scales of the fused CAM that makes pseudo labels; each is also flipped.
        background_threshold, high_threshold, low_threshold (`float` in [0, 1], default to 0.5, 0.7, 0.25):
            CAM levels: at or below low is background, above high is foreground, ignored between.
            `background_threshold` alone splits the CAM when it is scored.
        local_crop_size (`int`, defaults to 96), local_crop_count (`int`, defaults to 8):
            Side in pixels and number of the local views.
        uncertain_share (`float`, defaults to 0.2):
            A local view whose mean uncertainty value (0, 1 or 2 per pixel) is at or below this is a negative.
        class_contrast_temperature (`float` > 0, defaults to 0.5):
            Temperature of the class-token contrast (1.0 for COCO).
        refinement_iterations (10), refinement_dilations ((1, 2, 4, 8, 12, 24)):
            Pixel-adaptive refinement of the pseudo labels.
        image_mean, image_std (`tuple[float, float, float]`, default to ImageNet's):
            Normalisation of `pixel_values`, needed to see the image as the refinement and the energy do.

    Raises:
        ValueError (or a `huggingface_hub` strict-dataclass error): a value of another type or outside its range, an
            encoder that is not one of the supported ViTs, a misspelt field.
    """

    model_type = "msee"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    backbone_config: dict | PreTrainedConfig | None = None
    auxiliary_layer: int = -3
    decoder_channels: int = 512
    decoder_dilation: int = 5
    projection_hidden_size: int = 2048
    projection_bottleneck_size: int = 256
    projection_size: int = 1024
    projection_momentum: float | int = 0.9
    initializer_range: float | int = 0.02

    scale_factors: list[float | int] | tuple[float | int, ...] = (1.5, 0.5)
    threshold_mode: Literal["per_class", "per_image", "per_image_max"] = "per_class"
    select_regions: bool = True
    beta: float | int = 2.0
    distance: Literal["vector", "elementwise"] = "vector"
    msee_loss_reduction: Literal["mean", "sum"] = "mean"
    msee_loss_weight: float | int = 0.01
    msee_start_step: int = 2000
    teacher_gradient: bool = False
    classify_scaled_images: bool = False

    classification_loss_weight: float | int = 1.0
    auxiliary_classification_loss_weight: float | int = 1.0
    patch_contrast_loss_weight: float | int = 0.2
    class_contrast_loss_weight: float | int = 0.5
    segmentation_loss_weight: float | int = 0.1
    energy_loss_weight: float | int = 0.05
    patch_contrast_start_step: int = 0
    class_contrast_start_step: int = 0
    segmentation_start_step: int = 2000
    main_activation_start_step: int = 0

    activation_scale_factors: list[float | int] | tuple[float | int, ...] = (1.0, 0.5, 1.5)
    background_threshold: float | int = 0.5
    high_threshold: float | int = 0.7
    low_threshold: float | int = 0.25
    local_crop_size: int = 96
    local_crop_count: int = 8
    uncertain_share: float | int = 0.2
    class_contrast_temperature: float | int = 0.5
    refinement_iterations: int = 10
    refinement_dilations: list[int] | tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    image_mean: list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        own = [field.name for field in fields(self)]
        for name in kwargs:
            # Foreign keys belong to the library and pass; a near miss of a field of ours is a typing error.
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"MSEEConfig has no field {name!r}; did you mean {close[0]!r}?")
        for name in own:
            # JSON has no tuples; one type keeps a loaded configuration equal to the saved one.
            if name.endswith(("scale_factors", "_dilations")) or name in ("image_mean", "image_std"):
                setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__(**kwargs)

    def validate_backbone(self):
        """The encoder is a ViT with square patches whose depth holds the auxiliary layer."""
        backbone = self.encoder_config
        if backbone.model_type not in SUPPORTED_BACKBONES:
            raise ValueError(
                f"backbone_config.model_type: expected one of {', '.join(SUPPORTED_BACKBONES)}, got "
                f"{backbone.model_type!r}. M-SEE needs a plain ViT encoder with one token per patch."
            )
        if not isinstance(backbone.patch_size, int):
            raise ValueError(f"backbone_config.patch_size: expected one integer, got {backbone.patch_size!r}.")
        if not -backbone.num_hidden_layers <= self.auxiliary_layer <= -1:
            raise ValueError(
                f"auxiliary_layer: expected a block from -{backbone.num_hidden_layers} to -1, "
                f"got {self.auxiliary_layer}."
            )

    def validate_labels(self):
        """There is a background and at least one class."""
        if self.num_labels < 2:
            raise ValueError(f"num_labels: expected at least 2 (background and one class), got {self.num_labels}.")
        if self.num_labels > 255:
            raise ValueError(
                f"num_labels: expected at most 255 (a label map marks ignored pixels with 255), got {self.num_labels}."
            )

    def validate_ranges(self):
        """Numbers lie in the ranges the docstring gives."""
        for name in ("beta", "class_contrast_temperature"):
            self._expect(name, getattr(self, name) > 0, "a number above 0")
        for name in ("background_threshold", "high_threshold", "low_threshold", "projection_momentum"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        self._expect("low_threshold", self.low_threshold <= self.high_threshold, "at most high_threshold")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_weight", "_start_step")):
                self._expect(field.name, value >= 0, "a number of at least 0")
            if field.name.endswith(("_size", "_channels", "_dilation", "_count")) and isinstance(value, int):
                self._expect(field.name, value >= 1, "an integer of at least 1")
            if field.name.endswith(("scale_factors", "_dilations")):
                self._expect(field.name, all(item > 0 for item in value), "numbers above 0")
            if field.name in ("image_mean", "image_std"):
                self._expect(field.name, len(value) == 3, "three numbers, one per colour channel")
        for name in ("activation_scale_factors", "refinement_dilations"):
            self._expect(name, len(getattr(self, name)) > 0, "at least one number")
        self._expect("refinement_iterations", self.refinement_iterations >= 0, "an integer of at least 0")
        self._expect("scale_factors", 1.0 not in self.scale_factors, "factors other than 1.0, the student's own scale")
        self._expect("scale_factors", len(set(self.scale_factors)) == len(self.scale_factors), "no factor twice")

    def _expect(self, name: str, holds: bool, expected: str):
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """`backbone_config` as `__post_init__` leaves it: a dictionary or nothing has become a configuration."""
        return cast(PreTrainedConfig, self.backbone_config)

    @property
    def label_names(self) -> list[str]:
        """Names of `id2label` by label value, the background first."""
        labels = self.id2label or {}
        return [name for _, name in sorted((int(value), name) for value, name in labels.items())]

    @property
    def num_classes(self) -> int:
        """Number of foreground classes, `num_labels - 1`."""
        return len(self.label_names) - 1

    @property
    def patch_size(self) -> int:
        """Side of one patch in pixels."""
        return self.encoder_config.patch_size

    @property
    def hidden_size(self) -> int:
        """Number of feature channels of the encoder."""
        return self.encoder_config.hidden_size


MSEEConfig.register_for_auto_class()

__all__ = ["SUPPORTED_BACKBONES", "MSEEConfig", "label_fields"]
