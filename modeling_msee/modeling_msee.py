"""The M-SEE model: heads, decoder, and the whole training loss of the paper's §3 in one forward pass."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from .activation_msee import (
    activation_scores,
    activation_to_labels,
    box_mask,
    class_activation_maps,
    fuse_activation_maps,
    labels_to_affinity,
    local_crops,
    present_classes,
    restore_classes,
    scale_box,
    take_classes,
    uncertainty_mask,
)
from .configuration_msee import MSEEConfig
from .losses_msee import (
    class_token_contrast_loss,
    dense_energy_loss,
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
        diagnostics: what the M-SEE term sees: shares of positions selected and of labelled classes with a seed, feature
            norm, mean distance.
    """

    losses: dict[str, Tensor] | None = None
    class_logits: Tensor | None = None
    auxiliary_class_logits: Tensor | None = None
    activation_maps: Tensor | None = None
    regions: list[Tensor] | None = None
    diagnostics: dict[str, Tensor] | None = None


@dataclass
class EncoderFeatures:
    """What one encoder pass gives: feature maps (B, D, h, w), class token (B, D)."""

    features: Tensor
    auxiliary: Tensor
    class_token: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TrainingViews:
    """Input of one training step beyond image and labels (see `forward`), and the terms that take part in it."""

    box: Tensor
    global_view: Tensor | None
    local_source: Tensor
    crop_draws: Tensor
    active: set[str]
    main_activation: bool


class MSEEDecoder(nn.Module):
    """DeepLab-LargeFOV decoder (§5.1): two dilated 3x3 convolutions and a 1x1 prediction, without bias."""

    def __init__(self, config: MSEEConfig):
        super().__init__()
        channels, dilation = config.decoder_channels, config.decoder_dilation
        dilated = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "bias": False}
        self.conv1 = nn.Conv2d(config.hidden_size, channels, **dilated)
        self.conv2 = nn.Conv2d(channels, channels, **dilated)
        self.classifier = nn.Conv2d(channels, config.num_labels, kernel_size=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, K, h, w)."""
        hidden = F.relu(self.conv1(features))
        hidden = F.relu(self.conv2(hidden))
        return self.classifier(hidden)


class MSEEProjectionHead(nn.Module):
    """Projection head of the class-token contrast: three layers, L2 norm, one layer with unit-norm rows."""

    def __init__(self, config: MSEEConfig):
        super().__init__()
        hidden, bottleneck = config.projection_hidden_size, config.projection_bottleneck_size
        self.layer1 = nn.Linear(config.hidden_size, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(hidden, bottleneck)
        self.last_layer = nn.Linear(bottleneck, config.projection_size, bias=False)

    def forward(self, class_token: Tensor) -> Tensor:
        """(N, D) -> (N, projection_size)."""
        hidden = F.gelu(self.layer1(class_token))
        hidden = F.gelu(self.layer2(hidden))
        bottleneck = F.normalize(self.layer3(hidden), dim=-1)
        return F.linear(bottleneck, F.normalize(self.last_layer.weight, dim=-1))


class MSEEPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading of M-SEE models."""

    config: MSEEConfig
    config_class = MSEEConfig
    base_model_prefix = "msee"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ViTLayer", "DeiTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    def save_pretrained(self, save_directory, **kwargs):
        # Registration keeps one auto class per model; the plain AutoModel gives the same one.
        self.config.auto_map = {"AutoModel": "modeling_msee.MSEEForWeaklySupervisedSegmentation"}
        # Keys as the modules name them, because resuming loads them without the library's conversion.
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading marks every parameter as trainable.
        model.freeze_constant_parameters()
        return loaded


class MSEEForWeaklySupervisedSegmentation(MSEEPreTrainedModel):
    """ViT encoder with two image-level classifiers and a segmentation decoder, trained from image-level labels (§3)."""

    # The loss is an average over the batch, so gradient accumulation must divide it.
    accepts_loss_kwargs = False

    def __init__(self, config: MSEEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # A pooler would be a head of the encoder's own that nothing reads.
        pooling = {"add_pooling_layer": False} if config.backbone_config.model_type in ("vit", "deit") else {}
        self.backbone = AutoModel.from_config(config.backbone_config, **pooling)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes, bias=False)
        self.auxiliary_classifier = nn.Linear(config.hidden_size, config.num_classes, bias=False)
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
        config = MSEEConfig(backbone_config=AutoConfig.from_pretrained(name_or_path), **config_fields)
        model = cls(config)
        pretrained = AutoModel.from_pretrained(name_or_path, dtype=torch.float32)
        # Only the pooler, which this model leaves out, may be left over.
        missing = model.backbone.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
        if missing:
            raise ValueError(f"{name_or_path} lacks {len(missing)} weights of its encoder, first {missing[0]!r}.")
        return model

    def freeze_constant_parameters(self):
        """Stop gradients where there are none in the method: position embedding, mask token, averaged head."""
        for name, parameter in self.backbone.named_parameters():
            if name.endswith(("position_embeddings", "mask_token")):
                parameter.requires_grad_(False)
        self.averaged_projection.requires_grad_(False)

    def freeze_backbone_layers(self, count: int):
        """Keep the weights of the embedding and of the first `count` encoder blocks; 0 trains everything.

        Raises:
            ValueError: the encoder has fewer blocks.
        """
        depth = self.config.backbone_config.num_hidden_layers
        if not 0 <= count <= depth:
            raise ValueError(f"frozen_backbone_layers: expected 0 to {depth}, got {count}.")
        # Every supported encoder keeps its blocks in one list, whose name differs.
        blocks = next(module for module in self.backbone.modules() if isinstance(module, nn.ModuleList))
        for module in (self.backbone.embeddings, *blocks[:count]) if count else ():
            module.requires_grad_(False)

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
            ValueError: labels, box or image of another shape or range than stated.
        """
        student = self.encode(pixel_values, output_hidden_states, output_attentions)
        logits = self.decoder(student.features)
        output = MSEEOutput(logits=logits, hidden_states=student.hidden_states, attentions=student.attentions)
        if labels is None:
            return output
        labels = self._checked_labels(labels, pixel_values)
        output.class_logits = self._class_logits(student.features, self.classifier)
        output.auxiliary_class_logits = self._class_logits(student.auxiliary, self.auxiliary_classifier)
        output.losses = {
            "classification": F.multilabel_soft_margin_loss(output.class_logits, labels),
            "auxiliary_classification": F.multilabel_soft_margin_loss(output.auxiliary_class_logits, labels),
        }
        terms = self._weighted_terms()
        views = TrainingViews(
            box=self._checked_box(box, pixel_values),
            global_view=global_view,
            local_source=pixel_values if local_source is None else local_source,
            crop_draws=torch.rand(len(labels), self.config.local_crop_count, device=labels.device)
            if crop_draws is None
            else crop_draws,
            active={name for name, (weight, start) in terms.items() if weight > 0 and (step is None or step >= start)},
            main_activation=step is None or step >= self.config.main_activation_start_step,
        )
        self._training_terms(pixel_values, labels, views, student, output)
        output.loss = sum(weight * output.losses[name] for name, (weight, _) in terms.items())
        output.activation_maps = self._labelled_maps(student.features, labels)
        return output

    def encode(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EncoderFeatures:
        """One encoder pass: pixel_values (B, 3, H, W) -> feature maps on the grid (H // patch, W // patch).

        Raises:
            ValueError: not a batch of colour images, or smaller than one patch.
        """
        self._check_image(pixel_values)
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        interpolate = {} if self.config.backbone_config.model_type.startswith("dino") else {"interpolate_pos_encoding": True}
        output = self.backbone(
            pixel_values, output_hidden_states=True, output_attentions=bool(output_attentions), **interpolate
        )

        def to_map(tokens: Tensor) -> Tensor:  # (B, prefix + hw, D) -> (B, D, h, w)
            return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

        return EncoderFeatures(
            features=to_map(output.last_hidden_state),
            # hidden_states[0] is the embedding, so block -n is hidden_states[-n] here too.
            auxiliary=to_map(output.hidden_states[self.config.auxiliary_layer]),
            class_token=output.last_hidden_state[:, 0],
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def multi_scale_activation_maps(
        self, pixel_values: Tensor, indices: Tensor | None = None, unscaled: EncoderFeatures | None = None
    ) -> tuple[Tensor, Tensor]:
        """The baseline's fused maps, main and auxiliary: scales and mirror images summed, min-max per map.

        Args:
            pixel_values: (B, 3, H, W).
            indices: classes to return per image (B, P); default all.
            unscaled: what `encode(pixel_values)` gave, if it has been computed already.

        Returns:
            two tensors (B, P or K - 1, H, W) in [0, 1).
        """
        unscaled = self.encode(pixel_values) if unscaled is None else unscaled
        upright = self._upright_passes(pixel_values, unscaled, teachers=False)
        mirrored = self._mirrored_passes(pixel_values)
        return self._fused_maps(upright, mirrored, pixel_values.shape[-2:], indices)

    @torch.no_grad()
    def pseudo_labels(self, pixel_values: Tensor, labels: Tensor, box: Tensor | None = None) -> Tensor:
        """Refined pseudo labels of the main activation maps: (B, 3, H, W), (B, K - 1) -> (B, H, W), 255 ignored."""
        labels, box = self._checked_labels(labels, pixel_values), self._checked_box(box, pixel_values)
        maps, _ = self.multi_scale_activation_maps(pixel_values)
        return self._refined(pixel_values, maps, labels, box)

    def _class_logits(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        """Image-level scores W · max over positions: (B, D, h, w) -> (B, K - 1)."""
        with _full_precision(features):
            return F.linear(features.float().amax(dim=(2, 3)), classifier.weight.float())

    def _weighted_terms(self) -> dict[str, tuple[float, int]]:
        """Weight and first step of every term of the training loss."""
        config = self.config
        return {
            "classification": (config.classification_loss_weight, 0),
            "auxiliary_classification": (config.auxiliary_classification_loss_weight, 0),
            "patch_contrast": (config.patch_contrast_loss_weight, config.contrast_start_step),
            "class_contrast": (config.class_contrast_loss_weight, config.contrast_start_step),
            "segmentation": (config.segmentation_loss_weight, config.segmentation_start_step),
            "energy": (config.energy_loss_weight, config.segmentation_start_step),
            "msee": (config.msee_loss_weight if config.scale_factors else 0.0, config.msee_start_step),
        }

    def _training_terms(
        self, pixel_values: Tensor, labels: Tensor, views: TrainingViews, student: EncoderFeatures, output: MSEEOutput
    ) -> None:
        """Fill the output with the terms beyond the class losses; see design of the step in docs/method.md."""
        # An idle head gets a zero gradient instead of none, which distributed training needs.
        zero = 0.0 * (output.logits.float().sum() + self.projection(student.class_token).float().sum())
        losses = output.losses
        losses |= dict.fromkeys(("patch_contrast", "class_contrast", "segmentation", "energy", "msee"), zero)
        upright = self._upright_passes(pixel_values, student, teachers="msee" in views.active)
        if views.active & {"patch_contrast", "class_contrast", "segmentation", "energy"}:
            indices, present = present_classes(labels)
            mirrored = self._mirrored_passes(pixel_values)
            maps, auxiliary_maps = self._fused_maps(upright, mirrored, pixel_values.shape[-2:], indices)
            if "patch_contrast" in views.active:
                losses["patch_contrast"] = self._patch_contrast(student.features, auxiliary_maps, present, views.box)
            if "class_contrast" in views.active:
                losses["class_contrast"] = self._class_contrast(student.class_token, auxiliary_maps, present, views)
            if views.active & {"segmentation", "energy"}:
                seeds = maps if views.main_activation else auxiliary_maps
                targets = restore_classes(self._refined(pixel_values, seeds, present, views.box), indices)
                losses |= self._pixel_losses(pixel_values, output.logits, targets, views)
        if self.config.classify_scaled_images and "msee" in views.active:
            for scale in self.config.scale_factors:
                self._add_class_losses(upright[scale], labels, losses)
        if "msee" in views.active:
            self._add_msee(upright, labels, views.box, output)

    def _upright_passes(
        self, pixel_values: Tensor, student: EncoderFeatures, teachers: bool
    ) -> dict[float, EncoderFeatures]:
        """The image at every scale in use; one pass per scale serves the fused maps and the M-SEE teachers."""
        config = self.config
        differentiable = teachers and (config.teacher_gradient or config.classify_scaled_images)
        passes = {1.0: student}
        for scale in (*config.activation_scale_factors, *(config.scale_factors if teachers else ())):
            if scale not in passes:
                with torch.set_grad_enabled(differentiable and scale in config.scale_factors):
                    passes[scale] = self.encode(_rescale(pixel_values, scale))
        return passes

    @torch.no_grad()
    def _mirrored_passes(self, pixel_values: Tensor) -> dict[float, EncoderFeatures]:
        """The mirror image at every scale of the fused maps, its feature maps mirrored back."""
        passes = {}
        for scale in self.config.activation_scale_factors:
            encoded = self.encode(_rescale(pixel_values, scale).flip(-1))
            passes[scale] = EncoderFeatures(encoded.features.flip(-1), encoded.auxiliary.flip(-1), encoded.class_token)
        return passes

    @torch.no_grad()
    def _fused_maps(
        self,
        upright: dict[float, EncoderFeatures],
        mirrored: dict[float, EncoderFeatures],
        size: Sequence[int],
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fused main and auxiliary maps (B, P, H, W) of the classes in `indices` (B, P), or of all."""
        main, auxiliary = [], []
        for scale, flipped in mirrored.items():
            views = (upright[scale], flipped)
            main.append(self._view_scores([view.features for view in views], self.classifier, indices))
            auxiliary.append(self._view_scores([view.auxiliary for view in views], self.auxiliary_classifier, indices))
        return fuse_activation_maps(main, tuple(size)), fuse_activation_maps(auxiliary, tuple(size))

    @torch.no_grad()
    def _labelled_maps(self, features: Tensor, labels: Tensor) -> Tensor:
        """Eq. 1 maps (B, K - 1, h, w) of the labelled classes."""
        with _full_precision(features):
            return class_activation_maps(features.float(), self.classifier.weight.float(), labels)

    def _view_scores(self, views: Sequence[Tensor], classifier: nn.Linear, indices: Tensor | None) -> Tensor:
        """Scores of an image and its mirror image, (2, B, P, h, w)."""
        with _full_precision(views[0]):
            weight = classifier.weight.float()
            scores = torch.stack([activation_scores(features.float(), weight) for features in views])
        return scores if indices is None else take_classes(scores, indices)

    def _patch_contrast(self, features: Tensor, maps: Tensor, present: Tensor, box: Tensor) -> Tensor:
        """Patch-token contrast; pseudo relations come from the auxiliary maps on the token grid."""
        config = self.config
        small = F.interpolate(maps, size=features.shape[-2:], mode="bilinear", align_corners=False)
        levels = (config.background_threshold, config.high_threshold, config.low_threshold)
        relations = activation_to_labels(small, present, *levels, box=scale_box(box, 1 / config.patch_size))
        with _full_precision(features):
            return patch_token_contrast_loss(features.float(), labels_to_affinity(relations))

    def _class_contrast(self, class_token: Tensor, maps: Tensor, present: Tensor, views: TrainingViews) -> Tensor:
        """Class-token contrast of two global views with each other and the local views."""
        config = self.config
        mask = uncertainty_mask(maps, present, config.low_threshold, config.high_threshold)
        crops, positive, _ = local_crops(
            views.local_source, mask, config.local_crop_size, views.crop_draws, config.uncertain_share
        )
        second = class_token if views.global_view is None else self.encode(views.global_view).class_token
        local = self.encode(crops.flatten(0, 1)).class_token
        with _full_precision(class_token):
            global_tokens = torch.cat((class_token, second)).float()
            student = self.projection(torch.cat((global_tokens, local.float())))
            teacher = self.averaged_projection(global_tokens.detach())
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
            losses["segmentation"] = segmentation_loss(scores, targets)
        if "energy" in views.active:
            image = 255 * self._denormalized(pixel_values)
            losses["energy"] = dense_energy_loss(image, scores.softmax(dim=1), targets, views.box)
        return losses

    def _add_class_losses(self, encoded: EncoderFeatures, labels: Tensor, losses: dict[str, Tensor]) -> None:
        """Add the class losses of a scaled image, averaged with those of the original over all scales."""
        share = 1 / (1 + len(self.config.scale_factors))
        main = self._class_logits(encoded.features, self.classifier)
        auxiliary = self._class_logits(encoded.auxiliary, self.auxiliary_classifier)
        for name, scores in (("classification", main), ("auxiliary_classification", auxiliary)):
            losses[name] = losses[name] + share * F.multilabel_soft_margin_loss(scores, labels)

    def _add_msee(
        self, upright: dict[float, EncoderFeatures], labels: Tensor, box: Tensor, output: MSEEOutput
    ) -> None:
        """Multi-scale encoder enhancement, §3.1 to §3.3, and what it saw."""
        config = self.config
        with _full_precision(output.logits):
            student = upright[1.0].features.float()
            teachers = [upright[scale].features.float() for scale in config.scale_factors]
            grid = student.shape[-2:]
            segmentation = output.logits.detach().argmax(dim=1)
            maps = [
                F.interpolate(self._labelled_maps(teacher, labels), size=grid, mode="bilinear", align_corners=False)
                for teacher in teachers
            ]
            regions = reliable_regions(maps, segmentation, labels, config.threshold_mode)
            inside = box_mask(scale_box(box, 1 / config.patch_size), *grid)
            output.regions = [region & inside for region in regions]
            if not config.teacher_gradient:
                teachers = [teacher.detach() for teacher in teachers]
            output.losses["msee"] = msee_loss(
                student, teachers, output.regions, config.beta, config.distance, config.msee_loss_reduction
            )
            output.diagnostics = self._diagnostics(student, teachers, output.regions, segmentation, labels)

    @torch.no_grad()
    def _diagnostics(
        self, student: Tensor, teachers: list[Tensor], regions: list[Tensor], segmentation: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Without these the M-SEE term is blind: whether anything is selected, and how far features are apart."""
        seeded = seed_regions(segmentation, labels).amax(dim=(2, 3)).sum()
        diagnostics = {"seed_share": seeded / labels.sum().clamp(min=1), "feature_norm": student.norm(dim=1).mean()}
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
        return pixel_values.float() * std + mean

    def _check_image(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values: expected (batch, 3, height, width), got {tuple(pixel_values.shape)}.")
        if min(pixel_values.shape[-2:]) < self.config.patch_size:
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"pixel_values: expected images of at least one {self.config.patch_size} px patch, got {height}x{width}. "
                "MSEEImageProcessor enlarges small images."
            )

    def _checked_labels(self, labels: Tensor, pixel_values: Tensor) -> Tensor:
        expected = (len(pixel_values), self.config.num_classes)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"labels: expected multi-hot image-level labels of shape {expected} (batch, classes without background), "
                f"got {tuple(labels.shape)}."
            )
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError("labels: expected only 0 and 1, one column per class.")
        return labels.float()

    def _checked_box(self, box: Tensor | None, pixel_values: Tensor) -> Tensor:
        batch, _, height, width = pixel_values.shape
        if box is None:
            return torch.tensor([[0, height, 0, width]], device=pixel_values.device).expand(batch, 4)
        if tuple(box.shape) != (batch, 4):
            raise ValueError(f"box: expected {(batch, 4)} (top, bottom, left, right in pixels), got {tuple(box.shape)}.")
        return box


def _rescale(pixel_values: Tensor, scale: float) -> Tensor:
    """The image at a scale, bilinear, as §3.1."""
    if scale == 1.0:
        return pixel_values
    size = [int(scale * side) for side in pixel_values.shape[-2:]]
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


def _full_precision(tensor: Tensor) -> AbstractContextManager:
    """Losses and maps are computed in float32 whatever the encoder runs in."""
    return torch.autocast(tensor.device.type, enabled=False)


MSEEForWeaklySupervisedSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = ["MSEEDecoder", "MSEEForWeaklySupervisedSegmentation", "MSEEOutput", "MSEEPreTrainedModel", "MSEEProjectionHead"]
