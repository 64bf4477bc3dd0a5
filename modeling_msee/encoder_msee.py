"""The encoder with its two image-level classifiers, and the activation maps that are read off them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from .activation_msee import activation_scores, class_activation_maps, fuse_activation_maps, take_classes
from .configuration_msee import MSEEConfig
from .inputs_msee import check_image


@dataclass
class EncoderFeatures:
    """What one encoder pass gives: feature maps (B, D, h, w), class token (B, D)."""

    features: Tensor
    auxiliary: Tensor
    class_token: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MSEEPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading of M-SEE models."""

    config: MSEEConfig
    config_class = MSEEConfig
    base_model_prefix = "msee"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # declared as a list, a tuple in the library's own models
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

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


class MSEEEncoder(MSEEPreTrainedModel):
    """ViT encoder with a classifier on its last and one on an earlier block (§3.1, §5.1)."""

    def __init__(self, config: MSEEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # A pooler would be a head of the encoder's own that nothing reads.
        pooling = {"add_pooling_layer": False} if config.encoder_config.model_type in ("vit", "deit") else {}
        self.backbone = AutoModel.from_config(config.encoder_config, **pooling)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes, bias=False)
        self.auxiliary_classifier = nn.Linear(config.hidden_size, config.num_classes, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's whole embedding: accelerate shards it as one, and cannot shard a part of it once more."""
        return self.backbone.embeddings

    def freeze_constant_parameters(self):
        """Stop gradients where there are none in the method: position embedding, mask token."""
        for name, parameter in self.backbone.named_parameters():
            if name.endswith(("position_embeddings", "mask_token")):
                parameter.requires_grad_(False)

    def freeze_backbone_layers(self, count: int):
        """Keep the weights of the embedding and of the first `count` encoder blocks; 0 trains everything.

        Raises:
            ValueError: the encoder has fewer blocks.
        """
        depth = self.config.encoder_config.num_hidden_layers
        if not 0 <= count <= depth:
            raise ValueError(f"frozen_backbone_layers: expected 0 to {depth}, got {count}.")
        # Every supported encoder keeps its blocks in one list, whose name differs.
        blocks = next(module for module in self.backbone.modules() if isinstance(module, nn.ModuleList))
        for module in (self.backbone.embeddings, *blocks[:count]) if count else ():
            module.requires_grad_(False)

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
        check_image(pixel_values, self.config.patch_size)
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        interpolate = (
            {} if self.config.encoder_config.model_type.startswith("dino") else {"interpolate_pos_encoding": True}
        )
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
        upright = self.upright_passes(pixel_values, unscaled, self.config.activation_scale_factors)
        mirrored = self.mirrored_passes(pixel_values)
        return self.fused_maps(upright, mirrored, pixel_values.shape[-2:], indices)

    def class_logits(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        """Image-level scores W · max over positions: (B, D, h, w) -> (B, K - 1)."""
        with full_precision(features):
            return F.linear(features.float().amax(dim=(2, 3)), classifier.weight.float())

    def upright_passes(
        self,
        pixel_values: Tensor,
        student: EncoderFeatures,
        activation_scales: Sequence[float],
        teachers: Sequence[float] = (),
    ) -> dict[float, EncoderFeatures]:
        """The image at every scale in use; one pass per scale serves the fused maps and the M-SEE teachers."""
        trained = self.config.teacher_gradient or self.config.classify_scaled_images
        differentiable = trained and torch.is_grad_enabled()
        passes = {1.0: student}
        for scale in (*activation_scales, *teachers):
            if scale not in passes:
                with torch.set_grad_enabled(differentiable and scale in teachers):
                    passes[scale] = self.encode(_rescale(pixel_values, scale, self.config.patch_size))
        return passes

    @torch.no_grad()
    def mirrored_passes(self, pixel_values: Tensor) -> dict[float, EncoderFeatures]:
        """The mirror image at every scale of the fused maps, its feature maps mirrored back."""
        passes = {}
        for scale in self.config.activation_scale_factors:
            encoded = self.encode(_rescale(pixel_values, scale, self.config.patch_size).flip(-1))
            passes[scale] = EncoderFeatures(encoded.features.flip(-1), encoded.auxiliary.flip(-1), encoded.class_token)
        return passes

    @torch.no_grad()
    def fused_maps(
        self,
        upright: dict[float, EncoderFeatures],
        mirrored: dict[float, EncoderFeatures],
        size: tuple[int, ...],
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fused main and auxiliary maps (B, P, H, W) of the classes in `indices` (B, P), or of all."""
        main, auxiliary = [], []
        for scale, flipped in mirrored.items():
            views = (upright[scale], flipped)
            main.append(self._view_scores([view.features for view in views], self.classifier, indices))
            auxiliary.append(self._view_scores([view.auxiliary for view in views], self.auxiliary_classifier, indices))
        return fuse_activation_maps(main, size), fuse_activation_maps(auxiliary, size)

    @torch.no_grad()
    def labelled_activation_maps(self, features: Tensor, labels: Tensor) -> Tensor:
        """Eq. 1 maps (B, K - 1, h, w) of the labelled classes."""
        with full_precision(features):
            return class_activation_maps(features.float(), self.classifier.weight.float(), labels)

    def _view_scores(self, views: Sequence[Tensor], classifier: nn.Linear, indices: Tensor | None) -> Tensor:
        """Scores of an image and its mirror image, (2, B, P, h, w)."""
        with full_precision(views[0]):
            weight = classifier.weight.float()
            scores = torch.stack([activation_scores(features.float(), weight) for features in views])
        return scores if indices is None else take_classes(scores, indices)


def _rescale(pixel_values: Tensor, scale: float, patch_size: int) -> Tensor:
    """The image at a scale, bilinear, as §3.1; at least one patch."""
    if scale == 1.0:
        return pixel_values
    size = [max(int(scale * side), patch_size) for side in pixel_values.shape[-2:]]
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Losses and maps are computed in float32 whatever the encoder runs in."""
    return torch.autocast(tensor.device.type, enabled=False)


__all__ = ["EncoderFeatures", "MSEEEncoder", "MSEEPreTrainedModel"]
