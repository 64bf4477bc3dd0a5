"""What a step must not do: keep what needs no gradient, or give other figures where it is compiled or recomputed."""

import shutil

import pytest
import torch
from PIL import Image

from benchmarks import energy
from benchmarks.parts import PARTS, counted_step
from benchmarks.step import report
from benchmarks.workload import PRESETS, Case, Workload, growth


pytest_plugins = ["training_fixtures"]

TINY = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def saved_bytes(function):
    """Bytes that autograd keeps of a call for its backward pass, weights apart."""
    kept: dict[int, int] = {}

    def remember(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


class TestWhatIsKept:
    @pytest.mark.parametrize("backbone", ["vit", "dinov2"])
    def test_frozen_blocks_keep_nothing_and_get_no_gradient(self, tiny_model, backbone):
        """Two of four blocks: half of what a trained encoder keeps, and gradient stops at the first trained block."""
        model = tiny_model(backbone)
        every, _ = saved_bytes(lambda: model.encode(images()))
        model.freeze_backbone_layers(2)
        half, student = saved_bytes(lambda: model.encode(images(), output_hidden_states=True))
        assert half < 0.55 * every
        assert [state.requires_grad for state in student.hidden_states] == [False, False, False, True, True]

    def test_all_blocks_frozen(self, tiny_model):
        model = tiny_model()
        model.freeze_backbone_layers(4)
        model.backbone.layernorm.requires_grad_(False)
        assert saved_bytes(lambda: model.encode(images()))[0] == 0

    def test_maps_of_the_teachers_keep_nothing(self, tiny_model):
        model = tiny_model()
        student = model.encode(images())
        kept, _ = saved_bytes(lambda: model.multi_scale_activation_maps(images(), unscaled=student))
        assert kept == 0

    @pytest.mark.parametrize("backbone", ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
    def test_attention_is_scaled_dot_product_attention(self, tiny_model, backbone):
        """The attention matrix is never stored, and is counted as one kernel."""
        model = tiny_model(backbone)
        assert model.backbone.config._attn_implementation == "sdpa"


class TestCheckpointing:
    @pytest.mark.parametrize("frozen", [0, 1])
    def test_through_the_trainer(self, train, step_log, frozen):
        """Every logged figure of four steps with all terms."""
        options = ("--frozen_backbone_layers", frozen)
        plain = step_log(train("plain", *options))
        recomputed = step_log(train("recomputed", *options, "--gradient_checkpointing", "true"))
        assert len(plain) == len(recomputed) == 4
        for one, other in zip(plain, recomputed, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


class TestCompile:
    def check(self, tiny_model, backend):
        """Loss, its terms and every gradient of the whole forward; what cannot be compiled runs as it is."""
        labels = torch.tensor([[0.0, 1, 0, 1, 0], [1, 0, 0, 0, 0]])
        draws = torch.rand(2, 2, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": images(), "labels": labels, "crop_draws": draws}
        results = []
        for compiled in (False, True):
            # Local views are negatives here. Without any the class contrast, as the reference writes it, is the
            # logarithm of a quotient near one, and the last bit of a pixel moves its gradients by a thousandth.
            model = tiny_model(uncertain_share=1.0)
            if compiled:
                torch._dynamo.reset()
                model.compile(backend=backend)
            output = model(**inputs)
            output.loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append(({"loss": output.loss, "logits": output.logits, **output.losses}, gradients))
        (expected_output, expected_gradients), (output, gradients) = results
        torch.testing.assert_close(output, expected_output, rtol=1e-6, atol=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        for name, expected in expected_gradients.items():
            # Of the gradient's largest element; the keys' biases have none but noise.
            allowed = 1e-5 * expected.abs().max() + 1e-9
            assert (gradients[name] - expected).abs().max() <= allowed, name

    @pytest.mark.slow
    def test_as_traced(self, tiny_model):
        self.check(tiny_model, "aot_eager")

    @pytest.mark.slow
    def test_as_compiled(self, tiny_model):
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler, g++")
        self.check(tiny_model, "inductor")


class TestBenchmark:
    CASE = Case("demo.yaml", {**TINY, "image_size": 48, "patch_size": 8}, image_size=48, batch_size=2, num_classes=3)

    def test_report(self):
        text = report([self.CASE, growth(self.CASE)[1]], repeats=1)
        for name in PARTS:
            assert f"| {name} |" in text
        assert "scale factors none" in text

    def test_energy(self, tmp_path, capsys):
        Image.new("RGB", (40, 30), "olive").save(tmp_path / "photograph.png")
        energy.main([str(tmp_path / "photograph.png"), "--repeats", "1"])
        assert "| photograph.png |" in capsys.readouterr().out

    def test_operations_of_the_student_pass(self):
        """By hand: 36 patches and a class token, 3 blocks of width 32; twice a product's multiplications."""
        tokens, width, hidden = 37, 32, 64
        block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
        expected = 2 * 2 * (3 * block + 36 * 3 * 8 * 8 * width)
        assert counted_step(Workload.build(self.CASE))["student pass"] == expected

    def test_growth_changes_one_thing_at_a_time(self):
        for case in PRESETS.values():
            first, *others = growth(case)
            assert first == case
            for other in others:
                changed = [name for name, value in vars(other).items() if value != vars(case)[name]]
                assert len(changed) == 1
