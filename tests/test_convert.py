"""Weights of the published baseline as a checkpoint of ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_weights import random_toco_state

from modeling_msee import MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.hub.convert import convert_toco_checkpoint


WIDTH, DEPTH, PATCH = 8, 3, 4


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A tiny network under the baseline's names, two classes."""
    return random_toco_state(WIDTH, DEPTH, PATCH, classes=2)


def test_sizes_are_read_off_the_weights(state, tmp_path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "toco.pth")
    model = convert_toco_checkpoint(tmp_path / "toco.pth", num_attention_heads=2, class_names=["cat", "dog"])
    backbone = model.config.backbone_config
    assert (backbone.hidden_size, backbone.num_hidden_layers, backbone.intermediate_size) == (WIDTH, DEPTH, 16)
    assert (backbone.image_size, backbone.patch_size) == (12, PATCH)
    assert model.config.label_names == ["background", "cat", "dog"]
    attention = model.backbone.layers[1].attention
    rows = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(rows, state["encoder.blocks.1.attn.qkv.weight"])
    assert torch.equal(model.classifier.weight, state["classifier.weight"][:, :, 0, 0])
    assert torch.equal(model.decoder.conv2.weight, state["decoder.conv7.weight"])
    assert torch.equal(model.averaged_projection.layer3.bias, state["proj_head_t.mlp.4.bias"])


def test_command_line(state, tmp_path: Path) -> None:
    np.savez(tmp_path / "toco.npz", **{name: value.numpy() for name, value in state.items()})
    arguments = [
        "convert",
        str(tmp_path / "toco.npz"),
        "--output",
        str(tmp_path / "out"),
        "--num-attention-heads",
        "2",
    ]
    assert main(arguments) == 0
    model = MSEEForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "out").eval()
    expected = convert_toco_checkpoint(tmp_path / "toco.npz", num_attention_heads=2)
    image = torch.randn(1, 3, 16, 12)
    assert torch.equal(model(image).logits, expected(image).logits)
    assert MSEEImageProcessor.from_pretrained(tmp_path / "out").patch_size == PATCH


class Code:
    """Unpickling this would run a command."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"classifier.weight": Code()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: expected a file of tensors alone"):
        convert_toco_checkpoint("evil.pth")
    assert not Path("executed").exists()


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", weights=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        convert_toco_checkpoint(tmp_path / "evil.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.weight": None}, "found no 'classifier.weight'"),
        ({"decoder.conv7.weight": None}, "1 weights are missing there, such as 'decoder.conv2.weight'"),
        ({"decoder.conv9.weight": torch.zeros(1)}, "decoder.conv9.weight is not a weight"),
        ({"proj_head.last_layer.weight_g": torch.full((12, 1), 2.0)}, "expected ones"),
    ],
)
def test_states_that_do_not_fit(state, tmp_path: Path, change, message) -> None:
    changed = {name: value for name, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "toco.pth")
    with pytest.raises(ValueError, match=message):
        convert_toco_checkpoint(tmp_path / "toco.pth", num_attention_heads=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 3}, "expected a divisor of the 8 channels, got 3"),
        ({"num_attention_heads": 2, "class_names": ["cat"]}, "expected 2 names, .* got 1"),
    ],
)
def test_arguments_that_do_not_fit(state, tmp_path: Path, arguments, message) -> None:
    torch.save(state, tmp_path / "toco.pth")
    with pytest.raises(ValueError, match=message):
        convert_toco_checkpoint(tmp_path / "toco.pth", **arguments)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npz file, found none"):
        convert_toco_checkpoint(tmp_path / "toco.pth")
