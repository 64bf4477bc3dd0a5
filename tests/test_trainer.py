"""Training through train_msee.py: what moves, what is logged and scored, resuming, and odd input."""

import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, List, load_dataset
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from modeling_msee import MSEEConfig, MSEEForWeaklySupervisedSegmentation, MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.data.contract import load_split, read_image
from modeling_msee.training.arguments import parse_recipe
from modeling_msee.training.callbacks import AveragedHead


pytest_plugins = ["training_fixtures"]

TERMS = (
    "classification",
    "auxiliary_classification",
    "patch_contrast",
    "class_contrast",
    "segmentation",
    "energy",
    "msee",
)
DIAGNOSTICS = (
    "seed_share",
    "feature_norm",
    *(f"{name}_{scale}" for name in ("region_share", "feature_distance") for scale in (1.5, 0.5)),
)
CLASSES = ["background", "boat", "dog", "kite", "tree", "umbrella"]
ONLY_CLASSES = [
    word
    for term in ("patch_contrast", "class_contrast", "segmentation", "energy", "msee")
    for word in (f"--{term}_loss_weight", 0)
]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def initial(script: ModuleType, recipe: Path, *overrides: object) -> MSEEForWeaklySupervisedSegmentation:
    """The model that a run starts from."""
    set_seed(42)
    return script.build_model(parse_recipe([str(recipe), "--dataset", "x", *map(str, overrides)]), CLASSES)


def labelled_pixels(data: Path) -> int:
    """Pixels of the validation masks that are not ignored."""
    masks = [np.asarray(read_image(row, "segmentation_map")) for row in load_split(str(data), "validation")]
    return sum(int((mask != 255).sum()) for mask in masks)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, bool]:
    assert before.keys() == after.keys()
    return {name: not torch.equal(before[name], after[name]) for name in before}


# --- What moves -----------------------------------------------------------------------------------


def test_every_trainable_parameter_moves(script, tiny_recipe, train) -> None:
    model = initial(script, tiny_recipe)
    changed = moved(model.state_dict(), weights(train("run", "--eval_split", "none")))
    for name, parameter in model.named_parameters():
        # The averaged head is no parameter of the optimiser, and follows the head.
        expected = parameter.requires_grad or name.startswith("averaged_projection.")
        assert changed[name] == expected, name
    assert not changed["backbone.embeddings.position_embeddings"]


def test_averaged_head_follows_the_head(script, tiny_recipe, train) -> None:
    start = initial(script, tiny_recipe).state_dict()
    end = weights(train("run", "--eval_split", "none", "--max_steps", 1))
    name = "projection.layer1.weight"
    expected = 0.9 * start[name] + 0.1 * end[name]
    assert torch.allclose(end[f"averaged_{name}"], expected, rtol=0, atol=1e-7)


def test_frozen_layers_stay(script, tiny_recipe, train) -> None:
    words = ("--frozen_backbone_layers", 2, "--eval_split", "none", "--max_steps", 2)
    changed = moved(initial(script, tiny_recipe, *words).state_dict(), weights(train("run", *words)))
    frozen = [name for name, value in changed.items() if not value]
    assert any("embeddings.cls_token" in name for name in frozen)
    assert any(".0." in name for name in frozen) and any(".1." in name for name in frozen)
    assert all(changed[name] for name in changed if ".2." in name or not name.startswith("backbone."))
    assert sum("backbone" in name and value for name, value in changed.items()) == 16 + 2  # a block, the norm


# --- What is logged -------------------------------------------------------------------------------


def test_log_has_every_term(trained, step_log) -> None:
    entries = step_log(trained)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        assert all(math.isfinite(value) for value in entry.values())
        assert {f"loss_{term}" for term in TERMS} <= entry.keys()
        started = {f"loss_{name}" for name in DIAGNOSTICS} <= entry.keys()
        assert started == (entry["step"] >= 3)
    # Terms start after one and two steps.
    assert [entry["loss_segmentation"] > 0 for entry in entries] == [False, *[True] * 5]
    assert [entry["loss_energy"] != 0 for entry in entries] == [False, *[True] * 5]
    assert [entry["loss_msee"] > 0 for entry in entries[:2]] == [False, False]
    assert all(entry["loss_patch_contrast"] > 0 for entry in entries)


def test_loss_is_the_weighted_sum_of_its_terms(trained, step_log) -> None:
    factors = dict(zip(TERMS, (1, 1, 0.2, 0.5, 0.1, 0.05, 0.01), strict=True))
    for entry in step_log(trained):
        total = sum(factor * entry[f"loss_{term}"] for term, factor in factors.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_log_entry_is_the_mean_since_the_last(train, step_log) -> None:
    single = step_log(train("single", "--eval_split", "none"))
    double = step_log(train("double", "--eval_split", "none", "--logging_steps", 2))
    assert [entry["step"] for entry in double] == [2, 4]
    for index, entry in enumerate(double):
        for key in ("loss", "loss_classification", "loss_segmentation"):
            expected = (single[2 * index][key] + single[2 * index + 1][key]) / 2
            assert entry[key] == pytest.approx(expected, rel=1e-5)


def test_learning_rates_are_logged(trained, step_log) -> None:
    expected = [1e-3 * (1 - step / 6) ** 0.9 for step in range(6)]
    assert [entry["learning_rate"] for entry in step_log(trained)] == pytest.approx(expected)


def test_runs_repeat_and_seeds_differ(train, step_log) -> None:
    words = ("--eval_split", "none", "--max_steps", 2)
    first, second = (train(name, *words) for name in ("first", "second"))
    assert step_log(first) == step_log(second)
    assert not any(moved(weights(first), weights(second)).values())
    other = train("other", *words, "--seed", 1)
    assert step_log(other)[0]["loss_classification"] != step_log(first)[0]["loss_classification"]


def test_workers_change_nothing(train, step_log) -> None:
    words = ("--eval_split", "none", "--max_steps", 3)
    alone, workers = train("alone", *words), train("workers", *words, "--dataloader_num_workers", 2)
    assert step_log(alone) == step_log(workers)


# --- Scores ---------------------------------------------------------------------------------------


def test_metrics_file(trained, tiny_data) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics["results"]) == ["CAM", "Auxiliary CAM", "Seg"]
    assert metrics["class_names"] == CLASSES and metrics["protocol"] == "msee"
    for row in metrics["results"].values():
        assert row["pixels"] == labelled_pixels(tiny_data) > 10_000
        assert 0 <= row["mean_iou"] <= 1 and len(row["per_class_iou"]) == 6


def test_evaluation_while_training_is_the_same(trained, tiny_data, log) -> None:
    """All five images count, although two at a time leave one over."""
    sizes = {read_image(row).size for row in load_split(str(tiny_data), "validation")}
    assert len(sizes) > 3
    entries = [entry for entry in log(trained) if "eval_pixels" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    assert all(entry["eval_pixels"] == labelled_pixels(tiny_data) for entry in entries)
    rows = json.loads((trained / "metrics.json").read_text())["results"]
    for key, name in (("cam", "CAM"), ("auxiliary_cam", "Auxiliary CAM"), ("seg", "Seg")):
        assert entries[1][f"eval_{key}_miou"] == rows[name]["mean_iou"]
        assert entries[1][f"eval_{key}_pixel_accuracy"] == rows[name]["pixel_accuracy"]
    assert entries[0]["eval_cam_miou"] != entries[1]["eval_cam_miou"]


def test_ignored_pixels_do_not_count(write_data, train, log) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), np.zeros((40, 56), dtype=np.uint8)
    mask[:10], mask[10:25] = 255, 1
    rows = [(image, [0], Image.fromarray(mask)), (image, [], Image.fromarray(0 * mask))]
    evaluation = ("--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 1)
    output = train("run", "--dataset", write_data([(image, [0])] * 4, rows), *evaluation)
    assert [entry["eval_pixels"] for entry in log(output) if "eval_pixels" in entry] == [30 * 56 + 40 * 56]
    results = json.loads((output / "metrics.json").read_text())["results"]
    assert all(row["pixels"] == 30 * 56 + 40 * 56 for row in results.values())


def test_no_evaluation(train) -> None:
    output = train("run", "--eval_split", "none", "--max_steps", 1)
    assert (output / "model.safetensors").is_file() and not (output / "metrics.json").exists()


# --- What is left behind --------------------------------------------------------------------------


def test_output_loads_by_itself(trained) -> None:
    model = MSEEForWeaklySupervisedSegmentation.from_pretrained(trained)
    assert list(model.config.id2label.values()) == CLASSES and model.config.label2id["kite"] == 3
    assert not any(moved(model.state_dict(), weights(trained)).values())
    processor = MSEEImageProcessor.from_pretrained(trained)
    assert processor.patch_size == 8 and processor.size is None


def test_recipe_beside_the_results_is_the_recipe(trained, tiny_recipe, tiny_data, six_steps) -> None:
    words = ["--dataset", tiny_data, "--output_dir", trained, *six_steps]
    given = parse_recipe([str(tiny_recipe), *map(str, words)])
    kept = parse_recipe([str(trained / "recipe.yaml")])
    assert (kept.data, kept.model, kept.config_fields) == (given.data, given.model, given.config_fields)
    assert kept.training.to_dict() == given.training.to_dict()


def test_evaluation_size_is_kept(train) -> None:
    output = train("run", "--eval_size", 32, "--max_steps", 1, "--eval_split", "none")
    assert json.loads((output / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 32}


# --- Going on -------------------------------------------------------------------------------------


def results(run: Path) -> dict:
    """The scores of a run; the rest of its result file names its own folder."""
    return json.loads((run / "metrics.json").read_text())["results"]


def test_resumed_run_is_the_same_run(trained, tiny_recipe, train, step_log, six_steps, tmp_path) -> None:
    """Started again in the middle of an epoch."""
    (tmp_path / "again").mkdir()
    shutil.copytree(trained / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = train("again", *six_steps)
    assert step_log(resumed) == step_log(trained)  # 1 to 3 as stored, 4 to 6 computed again
    assert not any(moved(weights(trained), weights(resumed)).values())
    optimizers = [
        torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"] for run in (trained, resumed)
    ]
    assert len(optimizers[0]) > 50 and optimizers[0].keys() == optimizers[1].keys()
    for key, state in optimizers[0].items():
        assert all(torch.equal(state[name], optimizers[1][key][name]) for name in state)
    assert results(resumed) == results(trained)


def test_finished_run_is_scored_again(trained, train, step_log, six_steps, tmp_path, capsys) -> None:
    shutil.copytree(trained, tmp_path / "again")
    (tmp_path / "again" / "metrics.json").unlink()
    train("again", *six_steps)
    assert f"Going on from {tmp_path / 'again' / 'checkpoint-6'}" in capsys.readouterr().out
    assert results(tmp_path / "again") == results(trained)


def test_run_can_start_anew(trained, train, step_log, six_steps, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "again")
    words = ("--resume_from_checkpoint", "false", "--max_steps", 2, "--eval_split", "none")
    output = train("again", "--seed", 5, *words)
    assert [entry["step"] for entry in step_log(output)] == [1, 2]
    assert step_log(output)[0] != step_log(trained)[0]


def test_interrupted_run_is_not_scored(train, step_log, monkeypatch, capsys) -> None:
    """As after SIGTERM, when training returns as if it were done."""

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    monkeypatch.setattr(AveragedHead, "on_step_end", stop)
    output = train("run")
    assert "Stopped after step 2 of 4" in capsys.readouterr().out
    assert not (output / "metrics.json").exists() and not (output / "model.safetensors").exists()


def test_sigterm_while_scoring(train, script, monkeypatch, capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(script, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    output = train("run", "--max_steps", 1)
    assert f"{output} holds the model, which `msee evaluate` can score" in capsys.readouterr().out
    assert (output / "model.safetensors").exists() and not (output / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_in_a_thread(train) -> None:
    """Where Python lets nobody handle signals."""
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(train, "run", "--max_steps", 1).result()
    assert (output / "metrics.json").exists()


def test_training_goes_on_from_a_checkpoint(trained, train) -> None:
    words = ("--model", trained, "--eval_split", "none", "--max_steps", 1)
    still = moved(weights(trained), weights(train("still", *words, "--learning_rate", 0)))
    assert {name.split(".")[0] for name, value in still.items() if value} == {"averaged_projection"}
    assert moved(weights(trained), weights(train("on", *words)))["classifier.weight"]
    output = train("changed", *words, "--beta", 3, "--scale_factors", "[0.75]")
    config = MSEEConfig.from_pretrained(output)
    assert (config.beta, config.scale_factors, config.low_threshold) == (3, (0.75,), 0.25)


def renamed(data: Path, names: list[str], folder: Path) -> Path:
    """The data set under other class names."""
    feature = List(ClassLabel(names=names))
    splits = {name: split.cast_column("labels", feature) for name, split in load_dataset(str(data)).items()}
    DatasetDict(splits).save_to_disk(folder)
    return folder


def test_checkpoint_of_other_classes(trained, train, tiny_data, tmp_path) -> None:
    other = renamed(tiny_data, ["boat", "dog", "tree", "kite", "umbrella"], tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained for 6 labels \(background, boat, .* the data set has 6"):
        train("run", "--model", trained, "--dataset", other)


def test_validation_of_other_classes(train, tiny_data, tmp_path) -> None:
    splits = load_dataset(str(tiny_data))
    other = List(ClassLabel(names=["boat", "dog", "tree", "kite", "umbrella"]))
    splits["validation"] = splits["validation"].cast_column("labels", other)
    splits.save_to_disk(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"split 'train' has 6 labels .* the data set has 6"):
        train("run", "--dataset", tmp_path / "mixed")


def test_order_of_many_classes_is_kept(script, tiny_recipe, tmp_path) -> None:
    """Sorted as words, class 10 would come before class 2."""
    names = ["background", *(f"class {index}" for index in range(1, 14))]
    words = [str(tiny_recipe), "--dataset", "x"]
    script.build_model(parse_recipe(words), names).save_pretrained(tmp_path)
    again = script.build_model(parse_recipe([*words, "--model", str(tmp_path)]), names)
    assert again.config.id2label == dict(enumerate(names))
    assert list(dict(again.config.id2label or {}).values()) == names


def test_warm_start_from_a_backbone(script, tiny_recipe, tmp_path) -> None:
    source = initial(script, tiny_recipe)
    source.backbone.save_pretrained(tmp_path)
    words = ("--backbone_config", "null", "--backbone", tmp_path, "--seed", 1)
    model = initial(script, tiny_recipe, *words)
    assert not any(moved(source.backbone.state_dict(), model.backbone.state_dict()).values())
    assert list(model.config.id2label.values()) == CLASSES and model.config.auxiliary_layer == -2


# --- Other ways to run ----------------------------------------------------------------------------


def test_gradient_accumulation_sees_the_same_images(train, step_log) -> None:
    """Five batches of two an epoch: the fifth belongs to no whole step, so it is left out."""
    words = ("--eval_split", "none", *ONLY_CLASSES)
    whole = step_log(train("whole", *words))
    parts = step_log(train("parts", *words, "--gradient_accumulation_steps", 2))
    assert [entry["epoch"] for entry in parts] == [0.5, 1.0, 1.5, 2.0]
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss", "loss_classification", "loss_auxiliary_classification"):
            assert other[key] == pytest.approx(one[key], rel=1e-3)


def test_gradient_accumulation_with_all_terms(train, step_log) -> None:
    output = train("run", "--gradient_accumulation_steps", 2, "--eval_split", "none")
    assert [entry["step"] for entry in step_log(output)] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for entry in step_log(output) for value in entry.values())


def test_bfloat16(script, tiny_recipe, train, step_log) -> None:
    output = train("run", "--bf16", "--max_steps", 3)
    entries = step_log(output)
    assert entries[-1]["loss_msee"] >= 0 and entries[-1]["loss_segmentation"] > 0
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert all(value.isfinite().all() for value in weights(output).values())
    assert {value.dtype for value in weights(output).values()} == {torch.float32}
    model = initial(script, tiny_recipe)
    changed = moved(model.state_dict(), weights(output))
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learnt if not changed[name]} == set()


def test_images_of_different_sizes(write_data, train, log, step_log) -> None:
    rng = np.random.default_rng(0)
    sizes = [(16, 19), (70, 30), (48, 48), (20, 120), (33, 47)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images[2], images[3] = images[2].convert("L"), images[3].convert("RGBA")
    masks = [Image.fromarray(np.ones((height, width), dtype=np.uint8)) for height, width in sizes]
    rows = [(image, [0], mask) for image, mask in zip(images, masks, strict=True)]
    words = ("--eval_strategy", "steps", "--eval_steps", 4, "--per_device_eval_batch_size", 2)
    output = train("run", "--dataset", write_data(rows, rows), *words)
    assert all(math.isfinite(value) for entry in step_log(output) for value in entry.values())
    pixels = sum(height * width for height, width in sizes)
    assert [entry["eval_pixels"] for entry in log(output) if "eval_pixels" in entry] == [pixels]


# --- Bad input ------------------------------------------------------------------------------------


def test_training_images_smaller_than_a_patch(write_data, train, step_log) -> None:
    rng = np.random.default_rng(0)
    rows = [(Image.fromarray(rng.integers(0, 256, (5, 3, 3), dtype=np.uint8)), [0])] * 4
    output = train("run", "--dataset", write_data(rows), "--eval_split", "none")
    assert all(math.isfinite(value) for entry in step_log(output) for value in entry.values())


def test_scored_images_smaller_than_a_patch(write_data, trained, tmp_path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 3, 3), dtype=np.uint8))
    mask = Image.fromarray(np.ones((5, 3), dtype=np.uint8))
    data = write_data([(image, [0])], [(image, [0], mask)], CLASSES[1:])
    assert main(["figures", str(trained), "--data", str(data), "--output", str(tmp_path)]) == 0
    output = tmp_path / "scores.json"
    assert main(["evaluate", str(trained), "--data", str(data), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["results"]["Seg"]["pixels"] == 15


def test_no_label_at_all(write_data, train, step_log) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    empty = Image.fromarray(np.zeros((48, 48), dtype=np.uint8))
    output = train("run", "--dataset", write_data([(image, [])] * 4, [(image, [], empty)]))
    entries = step_log(output)
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert all(entry["loss_seed_share"] == entry["loss_msee"] == 0 for entry in entries[2:])
    assert all(value.isfinite().all() for value in weights(output).values())


def test_fewer_images_than_a_step_needs(train) -> None:
    with pytest.raises(ValueError, match=r"at least effective_batch_size = 16 training images, found 10"):
        train("run", "--effective_batch_size", 16, "--eval_split", "none")


def test_broken_images(write_data, train, step_log, capsys: pytest.CaptureFixture) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    mask = Image.fromarray(np.ones((48, 48), dtype=np.uint8))
    data = write_data(
        [(image, [0]), (b"\xff\xd8 cut", [0]), *[(image, [1])] * 3],
        [(image, [0], mask), (b"\xff\xd8 cut", [0], mask), (image, [0], b"cut")],
    )
    words = ("--dataset", data, "--max_steps", 2)
    with pytest.raises(ValueError, match=r"image photo_1.jpg \(image_id photo_1\) cannot be read"):
        train("stops", *words)
    output = train("goes_on", *words, "--skip_bad_images")
    assert len(step_log(output)) == 2
    printed = capsys.readouterr().out
    assert "train: skipped 1 images" in printed and "validation: skipped 2 images" in printed
    rows = json.loads((output / "metrics.json").read_text())["results"]
    assert rows["Seg"]["pixels"] == 48 * 48


def test_usage_names_every_field(script) -> None:
    text = script.usage()
    for name in (
        "--field value",
        "crop_size",
        "frozen_backbone_layers",
        "effective_batch_size",
        "scale_factors",
    ):
        assert name in text
