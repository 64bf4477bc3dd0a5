"""Four images give the same loss, gradients and scores in one process, in two, or accumulated."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from datasets_scripts import shapes


pytest_plugins = ["training_fixtures", "process_fixtures"]

EXTRAS = {
    "defaults": {},
    "sum": {"msee_loss_reduction": "sum", "msee_loss_weight": 1e-3, "distance": "elementwise"},
    "scaled": {"classify_scaled_images": True, "teacher_gradient": True, "threshold_mode": "per_image"},
}


def four_images() -> dict[str, torch.Tensor]:
    """Images that differ in the number of labels, in colour and in their valid part."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(4, 3, 5, 5, generator=generator) * torch.tensor([0.3, 1.0, 0.6, 1.5])[:, None, None, None]
    labels = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1]])
    return {
        "pixel_values": F.interpolate(coarse, size=(40, 48), mode="bilinear"),
        "labels": labels,
        "box": torch.tensor([[0, 40, 0, 48], [8, 40, 0, 24], [0, 40, 0, 48], [0, 32, 16, 48]]),
        "global_view": torch.randn(4, 3, 32, 32, generator=generator),
        "local_source": F.interpolate(coarse.flip(-1), size=(40, 48), mode="bilinear"),
        "crop_draws": torch.rand(4, 2, generator=generator),
    }


def of_parts(model, inputs: dict[str, torch.Tensor], size: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Means of terms and diagnostics over batches of `size`, and the gradient of the mean loss."""
    model.zero_grad()
    parts = [model(**{name: value[at : at + size] for name, value in inputs.items()}) for at in range(0, 4, size)]
    torch.stack([part.loss for part in parts]).mean().backward()
    logged = [{**part.losses, **part.diagnostics} for part in parts]
    means = {name: torch.stack([one[name] for one in logged]).mean().detach() for name in logged[0]}
    return means, {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("extra", EXTRAS)
def test_any_split_of_a_batch_gives_one_loss_and_one_gradient(tiny_model, extra) -> None:
    model = tiny_model(low_threshold=0.3, high_threshold=0.5, initializer_range=0.1, **EXTRAS[extra])
    inputs = four_images()
    whole, whole_gradient = of_parts(model, inputs, 4)
    assert all(whole[name] != 0 for name in ("patch_contrast", "class_contrast", "segmentation", "energy", "msee"))
    for size in (2, 1):
        split, split_gradient = of_parts(model, inputs, size)
        worst = {name: ((split[name] - whole[name]).abs() / whole[name].abs()).item() for name in whole}
        print(f"batches of {size}: largest relative difference of a term {max(worst.values()):.1e}")
        assert max(worst.values()) < 1e-5, worst
        # The key's bias has no gradient but rounding: attention does not see it.
        floor = 1e-3 * max(value.norm() for value in whole_gradient.values())
        largest = {
            name: ((split_gradient[name] - value).norm() / max(value.norm(), floor)).item()
            for name, value in whole_gradient.items()
        }
        name = max(largest, key=largest.get)
        print(f"batches of {size}: largest relative difference of a gradient {largest[name]:.1e}, of {name}")
        assert largest[name] < 1e-5, name


ALL_TERMS = (
    *("--segmentation_start_step", 0, "--msee_start_step", 0, "--classify_scaled_images", "true"),
    *("--teacher_gradient", "true", "--msee_loss_weight", 0.05, "--max_grad_norm", 1.0),
    *("--max_steps", 5, "--eval_strategy", "steps", "--eval_steps", 5),
)


@pytest.fixture
def odd_data(write_data) -> Path:
    """Eleven images to train on and five to score, all of different sizes."""
    scenes = list(shapes.examples("validation", 16, size=48, seed=1, with_masks=True))
    rows = [(scene.image, scene.labels, scene.mask) for scene in scenes]
    return write_data(rows[:11], rows[11:], names=shapes.CLASS_NAMES)


def test_one_process_two_processes_and_accumulation(start, tiny_recipe, odd_data, step_log, log, tmp_path) -> None:
    """Five steps from the first of which every term is on, over three epochs of two steps."""
    runs = {"one": (), "two": (), "accumulated": ("--gradient_accumulation_steps", 2)}
    running = [
        start(tmp_path / name, tiny_recipe, "--dataset", odd_data, *ALL_TERMS, *words, processes=1 + (name == "two"))
        for name, words in runs.items()
    ]
    for run in running:
        run.wait()
    one, two, accumulated = (step_log(tmp_path / name) for name in runs)
    assert [entry["step"] for entry in one] == [1, 2, 3, 4, 5]
    for name, other in (("two processes", two), ("accumulation", accumulated)):
        difference = {
            key: max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-6) for a, b in zip(one, other, strict=True))
            for key in one[0]
        }
        worst = max(difference, key=difference.get)
        print(f"{name}: largest relative difference over five steps {difference[worst]:.1e}, of {worst}")
        assert difference[worst] < 1e-5, difference
    tables = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs]
    assert tables[0]["results"] == tables[1]["results"] == tables[2]["results"]
    states = [load_file(tmp_path / name / "model.safetensors") for name in runs]
    for other in states[1:]:
        furthest = max((states[0][name] - value).abs().max().item() for name, value in other.items())
        print(f"largest difference of a weight {furthest:.1e}, at a learning rate of 1e-3")
        assert furthest < 1e-5
