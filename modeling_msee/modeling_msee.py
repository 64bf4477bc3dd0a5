"""The M-SEE model: encoder, heads, and the whole training loss of the paper's §3 in one forward pass."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from .activation_msee import (
    activation_to_labels,
    box_mask,
    labels_to_affinity,
    local_crops,
    present_classes,
    restore_classes,
    scale_box,
    uncertainty_mask,
)
from .configuration_msee import MSEEConfig
from .encoder_msee import EncoderFeatures, MSEEEncoder, full_precision
from .heads_msee import MSEEDecoder, MSEEProjectionHead
from .inputs_msee import checked_box, checked_labels, checked_source
from .losses_msee import (
    class_token_contrast_loss,
    dense_energy_loss,
    mean_over_images,
    msee_loss,
    patch_token_contrast_loss,
    segmentation_loss,
)
from .refinement_msee import refined_pseudo_labels
from .regions_msee import reliable_regions, seed_regions


@dataclass
class MSEEOutput(SemanticSegmenterOutput):
    """Output of [`MSEEForWeaklySupervisedSegmentation`]. Without labels only `logits` is set.

    Args:
        loss: scalar, the weighted sum of `losses`.
        losses: unweighted terms by name; a term that is off or has not started is zero.
        logits: decoder scores (B, K, h, w) on the patch grid; channel 0 is the background.
        class_logits, auxiliary_class_logits: image-level scores (B, K - 1) of the two classifiers.
        activation_maps: Eq. 1 maps of the labelled classes at the original scale (B, K - 1, h, w).
        regions: reliable regions (B, h, w), one per scale factor (Eq. 3 and 4), once M-SEE has started.
        diagnostics: what the M-SEE term sees: shares of positions selected and of labelled classes with a seed,
            feature norm, mean distance.
    """

    losses: dict[str, Tensor] | None = None
    class_logits: Tensor | None = None
    auxiliary_class_logits: Tensor | None = None
    activation_maps: Tensor | None = None
    regions: list[Tensor] | None = None
    diagnostics: dict[str, Tensor] | None = None


@dataclass
class TrainingViews:
    """Input of one training step beyond image and labels (see `forward`), and the terms that take part in it."""

    box: Tensor
    global_view: Tensor | None
    local_source: Tensor
    crop_draws: Tensor
    active: set[str]
    main_activation: bool


class MSEEForWeaklySupervisedSegmentation(MSEEEncoder):
    """ViT encoder with two image-level classifiers and a segmentation decoder, trained from image-level labels, §3."""

    # The loss is an average over the batch, so gradient accumulation must divide it.
    accepts_loss_kwargs = False

    def __init__(self, config: MSEEConfig):
        super().__init__(config)
        self.decoder = MSEEDecoder(config)
        self.projection = MSEEProjectionHead(config)
        self.averaged_projection = MSEEProjectionHead(config)
        self.post_init()
        # After post_init, which draws every head anew.
        self.averaged_projection.load_state_dict(self.projection.state_dict())
        self.freeze_constant_parameters()

    @classmethod
    def from_backbone(cls, name_or_path: str, **config_fields) -> "MSEEForWeaklySupervisedSegmentation":
        """A model with new heads on a pretrained encoder, from a local folder or the Hub.

        Args:
            name_or_path: checkpoint of a supported ViT.
            config_fields: fields of [`MSEEConfig`], such as `id2label`.

        Raises:
            ValueError: the encoder is not a supported ViT.
            OSError: there is no such checkpoint.
        """
        # The checkpoint may be stored in half precision; training starts in full.
        backbone_config = AutoConfig.from_pretrained(name_or_path, dtype=torch.float32)
        if os.path.isdir(name_or_path):
            backbone_config.name_or_path = ""  # a checkpoint travels, and this folder is nobody else's business
        config = MSEEConfig(backbone_config=backbone_config, **config_fields)
        model = cls(config)
        pretrained = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        # Only the pooler, which this model leaves out, may be left over.
        missing = model.backbone.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
        if missing:
            raise ValueError(f"{name_or_path} lacks {len(missing)} weights of its encoder, first {missing[0]!r}.")
        return model

    def freeze_constant_parameters(self):
        """Stop gradients where there are none in the method: position embedding, mask token, averaged head."""
        super().freeze_constant_parameters()
        self.averaged_projection.requires_grad_(False)

    @torch.no_grad()
    def update_averaged_projection(self):
        """Move the averaged head towards the current one; call once after every optimiser step."""
        momentum = self.config.projection_momentum
        pairs = zip(self.averaged_projection.parameters(), self.projection.parameters(), strict=True)
        for averaged, current in pairs:
            averaged.mul_(momentum).add_(current.detach(), alpha=1 - momentum)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        box: Tensor | None = None,
        global_view: Tensor | None = None,
        local_source: Tensor | None = None,
        crop_draws: Tensor | None = None,
        step: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MSEEOutput:
        """Segmentation scores and, given labels, the whole training loss of §3.

        Args:
            pixel_values: (B, 3, H, W), normalised with the configuration's mean and standard deviation.
            labels: multi-hot image-level labels (B, K - 1).
            box: the part of each image that is not padding, (B, 4) top, bottom, left, right in pixels; default all.
            global_view: second global view (B, 3, H', W'); default: the image itself counts twice.
            local_source: image that the local views are cut from (B, 3, H, W); default `pixel_values`.
            crop_draws: (B, local_crop_count) in [0, 1), the random choice of local views; default drawn here.
            step: optimiser steps done so far, which decides the terms that have started; default: all have.
            output_hidden_states, output_attentions: return the encoder's; attentions need eager attention.

        Raises:
            ValueError: labels, box, image or source of the local views of another shape or range than stated.
        """
        student = self.encode(pixel_values, output_hidden_states, output_attentions)
        logits = self.decoder(student.features)
        output = MSEEOutput(logits=logits, hidden_states=student.hidden_states, attentions=student.attentions)
        if labels is None:
            return output
        labels = checked_labels(labels, pixel_values, self.config)
        output.class_logits = self.class_logits(student.features, self.classifier)
        output.auxiliary_class_logits = self.class_logits(student.auxiliary, self.auxiliary_classifier)
        losses = output.losses = {
            "classification": F.multilabel_soft_margin_loss(output.class_logits, labels),
            "auxiliary_classification": F.multilabel_soft_margin_loss(output.auxiliary_class_logits, labels),
        }
        terms = self._weighted_terms()
        views = TrainingViews(
            box=checked_box(box, pixel_values),
            global_view=global_view,
            local_source=checked_source(local_source, pixel_values),
            crop_draws=torch.rand(len(labels), self.config.local_crop_count, device=labels.device)
            if crop_draws is None
            else crop_draws,
            active={name for name, (weight, start) in terms.items() if weight > 0 and (step is None or step >= start)},
            main_activation=step is None or step >= self.config.main_activation_start_step,
        )
        self._training_terms(pixel_values, labels, views, student, logits, losses, output)
        output.loss = sum((weight * losses[name] for name, (weight, _) in terms.items()), start=labels.new_zeros(()))
        output.activation_maps = self.labelled_activation_maps(student.features, labels)
        return output

    @torch.no_grad()
    def pseudo_labels(
        self, pixel_values: Tensor, labels: Tensor, box: Tensor | None = None, maps: Tensor | None = None
    ) -> Tensor:
        """Refined pseudo labels: (B, 3, H, W), (B, K - 1) -> (B, H, W), 255 ignored.

        They come from `maps` (B, K - 1, H, W) in [0, 1], by default the main multi-scale activation maps.
        """
        labels, box = checked_labels(labels, pixel_values, self.config), checked_box(box, pixel_values)
        maps = self.multi_scale_activation_maps(pixel_values)[0] if maps is None else maps
        return self._refined(pixel_values, maps, labels, box)

    def _weighted_terms(self) -> dict[str, tuple[float, int]]:
        """Weight and first step of every term of the training loss."""
        config = self.config
        return {
            "classification": (config.classification_loss_weight, 0),
            "auxiliary_classification": (config.auxiliary_classification_loss_weight, 0),
            "patch_contrast": (config.patch_contrast_loss_weight, config.patch_contrast_start_step),
            "class_contrast": (config.class_contrast_loss_weight, config.class_contrast_start_step),
            "segmentation": (config.segmentation_loss_weight, config.segmentation_start_step),
            "energy": (config.energy_loss_weight, config.segmentation_start_step),
            "msee": (config.msee_loss_weight if config.scale_factors else 0.0, config.msee_start_step),
        }

    def _training_terms(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        views: TrainingViews,
        student: EncoderFeatures,
        logits: Tensor,
        losses: dict[str, Tensor],
        output: MSEEOutput,
    ) -> None:
        """Add the terms beyond the class losses (§3; the baseline's in the order of its cost)."""
        # An idle head gets a zero gradient instead of none, which distributed training needs.
        zero = 0.0 * (logits.float().sum() + self.projection(student.class_token).float().sum())
        losses |= dict.fromkeys(("patch_contrast", "class_contrast", "segmentation", "energy", "msee"), zero)
        fused = bool(views.active & {"patch_contrast", "class_contrast", "segmentation", "energy"})
        teachers = self.config.scale_factors if "msee" in views.active else ()
        activation_scales = self.config.activation_scale_factors if fused else ()
        upright = self.upright_passes(pixel_values, student, activation_scales, teachers)
        if fused:
            indices, present = present_classes(labels)
            mirrored = self.mirrored_passes(pixel_values)
            maps, auxiliary_maps = self.fused_maps(upright, mirrored, pixel_values.shape[-2:], indices)
            if "patch_contrast" in views.active:
                losses["patch_contrast"] = self._patch_contrast(student.features, auxiliary_maps, present, views.box)
            if "class_contrast" in views.active:
                losses["class_contrast"] = self._class_contrast(student.class_token, auxiliary_maps, present, views)
            if views.active & {"segmentation", "energy"}:
                seeds = maps if views.main_activation else auxiliary_maps
                targets = restore_classes(self._refined(pixel_values, seeds, present, views.box), indices)
                losses |= self._pixel_losses(pixel_values, logits, targets, views)
        if self.config.classify_scaled_images and teachers:
            self._average_class_losses([upright[scale] for scale in teachers], labels, losses)
        if "msee" in views.active:
            self._add_msee(upright, labels, views.box, logits, losses, output)

    def _patch_contrast(self, features: Tensor, maps: Tensor, present: Tensor, box: Tensor) -> Tensor:
        """Patch-token contrast; pseudo relations come from the auxiliary maps on the token grid."""
        config = self.config
        small = F.interpolate(maps, size=features.shape[-2:], mode="bilinear", align_corners=False)
        levels = (config.background_threshold, config.high_threshold, config.low_threshold)
        relations = activation_to_labels(small, present, *levels, box=scale_box(box, config.patch_size))
        with full_precision(features):
            return mean_over_images(patch_token_contrast_loss, features.float(), labels_to_affinity(relations))

    def _class_contrast(self, class_token: Tensor, maps: Tensor, present: Tensor, views: TrainingViews) -> Tensor:
        """Class-token contrast of two global views with each other and the local views."""
        config = self.config
        mask = uncertainty_mask(maps, present, config.low_threshold, config.high_threshold)
        crops, positive, _ = local_crops(
            views.local_source, mask, config.local_crop_size, views.crop_draws, config.uncertain_share
        )
        second = class_token if views.global_view is None else self.encode(views.global_view).class_token
        local = self.encode(crops.flatten(0, 1)).class_token
        with full_precision(class_token):
            # The heads are in half precision only where all weights are.
            tokens = torch.cat((class_token, second, local)).to(self.projection.layer1.weight.dtype)
            student = self.projection(tokens).float()
            teacher = self.averaged_projection(tokens[: 2 * len(class_token)].detach()).float()
            positive = F.pad(positive, (2, 0), value=True)
            return class_token_contrast_loss(student, teacher, positive, config.class_contrast_temperature)

    def _refined(self, pixel_values: Tensor, maps: Tensor, labels: Tensor, box: Tensor) -> Tensor:
        """Pseudo labels (B, H, W) of maps (B, P, H, W) for labels (B, P)."""
        config = self.config
        return refined_pseudo_labels(
            self._denormalized(pixel_values),
            maps,
            labels,
            box,
            high=config.high_threshold,
            low=config.low_threshold,
            iterations=config.refinement_iterations,
            dilations=config.refinement_dilations,
        )

    def _pixel_losses(
        self, pixel_values: Tensor, logits: Tensor, targets: Tensor, views: TrainingViews
    ) -> dict[str, Tensor]:
        """Cross entropy on the pseudo labels and dense energy of the decoder's probabilities."""
        scores = F.interpolate(logits.float(), size=targets.shape[-2:], mode="bilinear", align_corners=False)
        losses = {}
        if "segmentation" in views.active:
            losses["segmentation"] = mean_over_images(segmentation_loss, scores, targets)
        if "energy" in views.active:
            image = 255 * self._denormalized(pixel_values)
            losses["energy"] = dense_energy_loss(image, scores.softmax(dim=1), targets, views.box)
        return losses

    def _average_class_losses(
        self, scaled: Sequence[EncoderFeatures], labels: Tensor, losses: dict[str, Tensor]
    ) -> None:
        """Replace the class losses of the original by their mean over the original and the scaled images."""
        main = [self.class_logits(image.features, self.classifier) for image in scaled]
        auxiliary = [self.class_logits(image.auxiliary, self.auxiliary_classifier) for image in scaled]
        for name, scores in (("classification", main), ("auxiliary_classification", auxiliary)):
            terms = [losses[name], *(F.multilabel_soft_margin_loss(score, labels) for score in scores)]
            losses[name] = torch.stack(terms).mean()

    def _add_msee(
        self,
        upright: dict[float, EncoderFeatures],
        labels: Tensor,
        box: Tensor,
        logits: Tensor,
        losses: dict[str, Tensor],
        output: MSEEOutput,
    ) -> None:
        """Multi-scale encoder enhancement, §3.1 to §3.3, and what it saw."""
        config = self.config
        with full_precision(logits):
            student = upright[1.0].features.float()
            teachers = [upright[scale].features.float() for scale in config.scale_factors]
            grid = student.shape[-2:]
            segmentation = logits.detach().argmax(dim=1)
            maps = [
                F.interpolate(
                    self.labelled_activation_maps(teacher, labels),
                    size=grid,
                    mode="bilinear",
                    align_corners=False,
                )
                for teacher in teachers
            ]
            if config.select_regions:
                regions = reliable_regions(maps, segmentation, labels, config.threshold_mode)
            else:
                regions = [torch.ones_like(segmentation, dtype=torch.bool)] * len(teachers)
            inside = box_mask(scale_box(box, config.patch_size), *grid)
            output.regions = [region & inside for region in regions]
            if not config.teacher_gradient:
                teachers = [teacher.detach() for teacher in teachers]
            msee = msee_loss(
                student, teachers, output.regions, config.beta, config.distance, config.msee_loss_reduction
            )
            # "sum" adds up positions; over the images every term is a mean.
            losses["msee"] = msee / len(student) if config.msee_loss_reduction == "sum" else msee
            output.diagnostics = self._diagnostics(student, teachers, output.regions, segmentation, labels)

    @torch.no_grad()
    def _diagnostics(
        self,
        student: Tensor,
        teachers: list[Tensor],
        regions: list[Tensor],
        segmentation: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Without these the M-SEE term is blind: whether anything is selected, and how far features are apart."""
        seeded = seed_regions(segmentation, labels).amax(dim=(2, 3)).sum(dim=1)
        diagnostics = {
            "seed_share": (seeded / labels.sum(dim=1).clamp(min=1)).mean(),
            "feature_norm": student.norm(dim=1).mean(),
        }
        for scale, teacher, region in zip(self.config.scale_factors, teachers, regions, strict=True):
            resized = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
            diagnostics[f"region_share_{scale}"] = region.float().mean()
            diagnostics[f"feature_distance_{scale}"] = (student - resized).norm(dim=1).mean()
        return diagnostics

    def _denormalized(self, pixel_values: Tensor) -> Tensor:
        """The image in [0, 1]."""
        mean, std = (
            pixel_values.new_tensor(value)[:, None, None] for value in (self.config.image_mean, self.config.image_std)
        )
        # Clamped, because the size of the energy's colour grid follows the range of the colours.
        return (pixel_values.float() * std + mean).clamp(0, 1)


MSEEForWeaklySupervisedSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = ["MSEEForWeaklySupervisedSegmentation", "MSEEOutput"]
