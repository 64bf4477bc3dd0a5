"""`msee export`: programs and ONNX files that give the model's scores at any size, and predicting with them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_msee import MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.inference import export as module
from modeling_msee.inference.export import export, exported_program
from modeling_msee.inference.network import InferencePath


pytest_plugins = ["checkpoint_fixtures"]

# Grids of 8 px patches: unlike the traced 5 x 7, smaller, larger, that of pre-training (4 x 4), other batches.
SHAPES = [(1, 3, 16, 24), (1, 3, 32, 32), (3, 3, 88, 40), (2, 3, 64, 72)]


def scores(model, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return InferencePath(model)(pixel_values)


@pytest.mark.parametrize(
    "backbone",
    ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit", "dinov2_with_registers", "dinov3_vit"))],
)
def test_program_follows_the_size(tiny_model, backbone: str) -> None:
    model = tiny_model(backbone).eval()
    program = exported_program(InferencePath(model)).module()
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        pixel_values = torch.randn(shape, generator=generator)
        for found, expected in zip(program(pixel_values), scores(model, pixel_values), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_export_leaves_the_model_alone(tiny_model) -> None:
    model = tiny_model("dinov2").eval()
    exported_program(InferencePath(model))
    assert "interpolate_pos_encoding" not in vars(model.backbone.embeddings)


def test_pt2_file(tiny_model, tmp_path) -> None:
    model = tiny_model("vit", num_hidden_layers=1).eval()
    differences = export(model, MSEEImageProcessor(patch_size=8), tmp_path / "model.pt2")
    assert {difference.shape for difference in differences} >= {(1, 3, 32, 32), (3, 3, 72, 32)}
    extra = {"msee": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["msee"])["class_names"] == model.config.label_names
    pixel_values = torch.randn(1, 3, 40, 16)
    assert torch.allclose(program(pixel_values)[0], scores(model, pixel_values)[0], atol=1e-5)


@pytest.fixture(scope="module")
def onnx_file(shapes_model, tmp_path_factory):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    processor = MSEEImageProcessor(patch_size=8, size={"shortest_edge": 24}, image_mean=[0.4, 0.4, 0.4])
    differences = export(shapes_model, processor, path)
    assert max(difference.value for difference in differences) <= 1e-4
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    return path


def test_onnx_scores_at_other_sizes(onnx_file, shapes_model) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    for shape in [*SHAPES, (1, 3, 8, 8)]:
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = session.run(["logits", "class_logits"], {"pixel_values": pixel_values.numpy()})
        for got, expected in zip(found, scores(shapes_model, pixel_values), strict=True):
            assert np.abs(got - expected.numpy()).max() <= 1e-4


def test_predict_with_the_onnx_file(onnx_file, shapes_model, tmp_path, capsys) -> None:
    """Class names and processor settings come from the file; masks are those of the checkpoint."""
    checkpoint = tmp_path / "checkpoint"
    shapes_model.save_pretrained(checkpoint)
    MSEEImageProcessor(patch_size=8, size={"shortest_edge": 24}, image_mean=[0.4, 0.4, 0.4]).save_pretrained(
        checkpoint
    )
    (tmp_path / "in").mkdir()
    for seed, size in enumerate([(30, 41), (64, 20)]):
        values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "in" / f"{seed}.png")
    for name, model in (("onnx", onnx_file), ("torch", checkpoint)):
        assert main(["predict", str(model), str(tmp_path / "in"), "--output", str(tmp_path / name)]) == 0
    lines = [(tmp_path / name / "scores.jsonl").read_text().splitlines() for name in ("onnx", "torch")]
    for seed, (got, expected) in enumerate(zip(*(map(json.loads, rows) for rows in lines), strict=True)):
        assert got["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-4)
        masks = [np.asarray(Image.open(tmp_path / name / "masks" / f"{seed}.png")) for name in ("onnx", "torch")]
        assert (masks[0] == masks[1]).mean() > 0.999
    assert main(["predict", str(onnx_file), str(tmp_path / "in"), "--output", str(tmp_path / "x"), "--cams"]) == 1
    assert "CAMs and regions need the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_files_that_are_not_ours(tmp_path, capsys) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def error(model: str) -> str:
        words = ["predict", str(tmp_path / model), str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
        assert main(words) == 1
        return capsys.readouterr().err

    assert "there is no such file" in error("nope.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    assert "expected an ONNX file, onnxruntime cannot load it" in error("text.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "other.onnx")
    assert "expected class names and processor settings" in error("other.onnx")


def test_nothing_is_written_where_the_check_fails(tiny_model, tmp_path, monkeypatch) -> None:
    model = tiny_model("vit").eval()
    with pytest.raises(ValueError, match=r"ends in .onnx or .pt2, got '.pth'"):
        export(model, MSEEImageProcessor(patch_size=8), tmp_path / "model.pth")
    monkeypatch.setattr(
        module,
        "exported_program",
        lambda path: torch.export.export(
            InferencePath(tiny_model("vit", seed=1).eval()), (torch.zeros(1, 3, 16, 24),)
        ),
    )
    monkeypatch.setattr(module, "_check_inputs", lambda model: [torch.ones(1, 3, 16, 24)])
    with pytest.raises(ValueError, match=r"was not written: for pixel_values .* differ from the model's"):
        export(model, MSEEImageProcessor(patch_size=8), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tiny_model, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for package in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "model.onnx")]) == 1
    assert 'pip install "msee[onnx]"' in capsys.readouterr().err
    words = ["predict", str(tmp_path / "model.onnx"), str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert 'pip install "msee[onnx]"' in capsys.readouterr().err
