"""The tiny network of the reference figures, and random weights under the names of the published baseline."""

from pathlib import Path

import torch

from modeling_msee import MSEEForWeaklySupervisedSegmentation
from modeling_msee.hub.convert import convert_toco_checkpoint


def reference_network(path: Path, **fields) -> MSEEForWeaklySupervisedSegmentation:
    """From its `net_state.npz`; `fields` are of MSEEConfig."""
    return convert_toco_checkpoint(path, num_attention_heads=4, **fields)


def random_toco_state(width: int, depth: int, patch: int, classes: int) -> dict[str, torch.Tensor]:
    """State dict of a small ToCo network: position embedding for 3 x 3 patches, MLP twice as wide as the encoder."""
    torch.manual_seed(0)
    blocks: dict[str, torch.Tensor] = {}
    for index in range(depth):
        name = f"encoder.blocks.{index}"
        blocks |= _norm(width, f"{name}.norm1") | _norm(width, f"{name}.norm2")
        blocks |= _linear(3 * width, width, f"{name}.attn.qkv") | _linear(width, width, f"{name}.attn.proj")
        blocks |= _linear(2 * width, width, f"{name}.mlp.fc1") | _linear(width, 2 * width, f"{name}.mlp.fc2")
    return {
        "encoder.cls_token": torch.randn(1, 1, width),
        "encoder.pos_embed": torch.randn(1, 1 + 9, width),
        "encoder.patch_embed.proj.weight": torch.randn(width, 3, patch, patch),
        "encoder.patch_embed.proj.bias": torch.randn(width),
        **blocks,
        **_norm(width, "encoder.norm"),
        **_linear(5, width, "encoder.head"),
        "classifier.weight": torch.randn(classes, width, 1, 1),
        "aux_classifier.weight": torch.randn(classes, width, 1, 1),
        "decoder.conv6.weight": torch.randn(7, width, 3, 3),
        "decoder.conv7.weight": torch.randn(7, 7, 3, 3),
        "decoder.conv8.weight": torch.randn(classes + 1, 7, 1, 1),
        **_head(width, "proj_head"),
        **_head(width, "proj_head_t"),
    }


def _linear(rows: int, columns: int, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}


def _norm(width: int, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _head(width: int, name: str) -> dict[str, torch.Tensor]:
    return {
        **_linear(10, width, f"{name}.mlp.0"),
        **_linear(10, 10, f"{name}.mlp.2"),
        **_linear(6, 10, f"{name}.mlp.4"),
        f"{name}.last_layer.weight_v": torch.randn(12, 6),
        f"{name}.last_layer.weight_g": torch.ones(12, 1),
    }
