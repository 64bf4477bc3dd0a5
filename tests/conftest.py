"""Fixtures of the model's tests: tiny models, and the reference figures of ../shared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation


SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# What the encoders call their own way.
TINY_EXTRAS = {
    "vit": {"intermediate_size": 64},
    "deit": {"intermediate_size": 64},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 2},
    "dinov3_vit": {"intermediate_size": 64, "num_register_tokens": 2},
}
TINY_FIELDS = {
    "num_labels": 6,
    "decoder_channels": 16,
    "projection_hidden_size": 16,
    "projection_bottleneck_size": 8,
    "projection_size": 12,
    "local_crop_size": 16,
    "local_crop_count": 2,
    "refinement_iterations": 2,
    "refinement_dilations": (1, 2),
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference figures, data and checkpoints beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared) -> Callable[..., dict[str, torch.Tensor]]:
    """`golden(name, case)`: the arrays of one reference file as tensors, by their names within the case."""

    def load(name: str, case: str = "") -> dict[str, torch.Tensor]:
        prefix = f"{case}/" if case else ""
        with np.load(shared / "golden" / f"{name}.npz") as arrays:
            keys = [key for key in arrays.files if key.startswith(prefix) and arrays[key].dtype.kind != "U"]
            assert keys, f"{name}.npz holds no case {case!r}"
            return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in keys}

    return load


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MSEEConfig]:
    """`tiny_config(backbone="vit", **fields)`: 32 channels, 4 blocks, 8 px patches, 5 classes and a background."""

    def build(backbone: str = "vit", **fields) -> MSEEConfig:
        encoder = {"model_type": backbone, **TINY_ENCODER, **TINY_EXTRAS[backbone]}
        return MSEEConfig(**{"backbone_config": encoder, **TINY_FIELDS, **fields})

    return build


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Callable[..., MSEEForWeaklySupervisedSegmentation]:
    """`tiny_model(backbone="vit", seed=0, **fields)`: such a model with random weights, in training mode."""

    def build(backbone: str = "vit", seed: int = 0, **fields) -> MSEEForWeaklySupervisedSegmentation:
        torch.manual_seed(seed)
        return MSEEForWeaklySupervisedSegmentation(tiny_config(backbone, **fields)).train()

    return build
