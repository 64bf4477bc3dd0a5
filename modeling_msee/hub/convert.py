"""Weights of the published baseline (ToCo) as a checkpoint of ours."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration_msee import MSEEConfig, label_fields
from ..modeling_msee import MSEEForWeaklySupervisedSegmentation


# Name there -> here; `\1` is the number of the block.
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


def convert_toco_checkpoint(
    path: str | Path, num_attention_heads: int | None = None, class_names: Sequence[str] | None = None, **config_fields
) -> MSEEForWeaklySupervisedSegmentation:
    """A model with the weights of a ToCo checkpoint; its sizes are read off the weights.

    Args:
        path: the `.pth` that ToCo's training wrote, or an `.npz` of the same state dict.
        num_attention_heads: of the encoder, which the weights do not tell; default one per 64 channels, as ViT-S and
            ViT-B have.
        class_names: names of the foreground classes in order; default `class 1`, `class 2`, ...
        config_fields: further fields of [`MSEEConfig`], such as `scale_factors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds code or is no state dict, a weight without a counterpart or one that is missing, a
            number of class names or heads that does not fit.
    """
    state = read_state(path)
    missing = {"classifier.weight", "encoder.pos_embed", "proj_head.mlp.0.weight"} - state.keys()
    if missing:
        raise ValueError(f"{path}: expected the state dict of ToCo's network, found no {min(missing)!r}.")
    config = MSEEConfig(**{**_sizes(state, num_attention_heads), **_labels(state, class_names), **config_fields})
    model = MSEEForWeaklySupervisedSegmentation(config)
    converted = convert_state(state)
    absent = model.state_dict().keys() - converted.keys()
    if absent:
        raise ValueError(f"{path}: {len(absent)} weights are missing there, such as {min(absent)!r}.")
    model.load_state_dict(converted)
    return model.eval()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a `.pth` or `.npz` file; nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a .pth or .npz file, found none.")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a file of tensors alone, but it holds other Python objects, which could run code: "
            f"{error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict, a mapping of names to tensors.")
    # Distributed training puts a prefix before every name.
    return {name.removeprefix("module."): value for name, value in state.items()}


def convert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The baseline's state dict under this model's names.

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
    raise ValueError(f"{name} is not a weight of ToCo's network.")


def _sizes(state: dict[str, Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """Fields of the configuration that the shapes of the weights tell."""
    width, _, patch_size, _ = state["encoder.patch_embed.proj.weight"].shape
    heads = max(width // 64, 1) if num_attention_heads is None else num_attention_heads
    if width % heads:
        raise ValueError(f"num_attention_heads: expected a divisor of the {width} channels, got {heads}.")
    depth = 1 + max(int(match[1]) for match in map(QKV.fullmatch, state) if match)
    return {
        "backbone_config": {
            "model_type": "vit",
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": len(state["encoder.blocks.0.mlp.fc1.weight"]),
            "image_size": patch_size * round((state["encoder.pos_embed"].shape[1] - 1) ** 0.5),
            "patch_size": patch_size,
            "layer_norm_eps": 1e-6,
        },
        "decoder_channels": len(state["decoder.conv6.weight"]),
        "projection_hidden_size": len(state["proj_head.mlp.0.weight"]),
        "projection_bottleneck_size": len(state["proj_head.mlp.4.weight"]),
        "projection_size": len(state["proj_head.last_layer.weight_v"]),
    }


def _labels(state: dict[str, Tensor], class_names: Sequence[str] | None) -> dict[str, Any]:
    count = len(state["classifier.weight"])
    names = [f"class {index + 1}" for index in range(count)] if class_names is None else list(class_names)
    if len(names) != count:
        raise ValueError(f"class_names: expected {count} names, one per output of the classifier, got {len(names)}.")
    return label_fields(["background", *names])
