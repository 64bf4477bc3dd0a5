"""The published baseline's weights in this model's names."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation


# Reference name -> ours; `\1` is the number of the block.
RENAMED = {
    r"encoder\.cls_token": r"backbone.embeddings.cls_token",
    r"encoder\.pos_embed": r"backbone.embeddings.position_embeddings",
    r"encoder\.patch_embed\.proj\.(weight|bias)": r"backbone.embeddings.patch_embeddings.projection.\1",
    r"encoder\.blocks\.(\d+)\.norm1\.(weight|bias)": r"backbone.layers.\1.layernorm_before.\2",
    r"encoder\.blocks\.(\d+)\.norm2\.(weight|bias)": r"backbone.layers.\1.layernorm_after.\2",
    r"encoder\.blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"backbone.layers.\1.attention.o_proj.\2",
    r"encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"backbone.layers.\1.mlp.\2.\3",
    r"encoder\.norm\.(weight|bias)": r"backbone.layernorm.\1",
    r"classifier\.weight": r"classifier.weight",
    r"aux_classifier\.weight": r"auxiliary_classifier.weight",
    r"decoder\.conv6\.weight": r"decoder.conv1.weight",
    r"decoder\.conv7\.weight": r"decoder.conv2.weight",
    r"decoder\.conv8\.weight": r"decoder.classifier.weight",
    r"proj_head\.mlp\.0\.(weight|bias)": r"projection.layer1.\1",
    r"proj_head\.mlp\.2\.(weight|bias)": r"projection.layer2.\1",
    r"proj_head\.mlp\.4\.(weight|bias)": r"projection.layer3.\1",
    r"proj_head\.last_layer\.weight_v": r"projection.last_layer.weight",
    r"proj_head_t\.mlp\.0\.(weight|bias)": r"averaged_projection.layer1.\1",
    r"proj_head_t\.mlp\.2\.(weight|bias)": r"averaged_projection.layer2.\1",
    r"proj_head_t\.mlp\.4\.(weight|bias)": r"averaged_projection.layer3.\1",
    r"proj_head_t\.last_layer\.weight_v": r"averaged_projection.last_layer.weight",
}
# The encoder's own image classifier is never used.
UNUSED = r"encoder\.head\.(weight|bias)"
QKV = re.compile(r"encoder\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def convert_reference_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's state dict under this model's names.

    Raises:
        ValueError: a name without a counterpart, or a last projection layer whose rows are not of length 1.
    """
    converted = {}
    for name, value in state.items():
        if re.fullmatch(UNUSED, name):
            continue
        if name.endswith("last_layer.weight_g"):
            if not torch.all(value == 1):
                raise ValueError(f"{name}: expected ones, because the rows of the layer are normalised.")
        elif match := QKV.fullmatch(name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"backbone.layers.{match[1]}.attention.{part}_proj.{match[2]}"] = rows
        elif name in ("classifier.weight", "aux_classifier.weight"):
            converted[_renamed(name)] = value.flatten(1)  # 1x1 convolution -> linear layer
        else:
            converted[_renamed(name)] = value
    return converted


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(f"{name} is not a weight of the reference network.")


def reference_network(path: Path, **fields) -> MSEEForWeaklySupervisedSegmentation:
    """The tiny network of the reference figures, from its `net_state.npz`; `fields` are of MSEEConfig."""
    encoder = {
        "model_type": "vit",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "image_size": 64,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    config = MSEEConfig(
        backbone_config=encoder,
        num_labels=21,
        decoder_channels=512,
        projection_hidden_size=96,
        projection_bottleneck_size=32,
        projection_size=48,
        **fields,
    )
    model = MSEEForWeaklySupervisedSegmentation(config)
    with np.load(path) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model.load_state_dict(convert_reference_weights(state))
    return model.eval()
