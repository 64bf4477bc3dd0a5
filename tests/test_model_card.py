"""The model card: what it says of a checkpoint folder, what it keeps to itself, and whose it is."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_msee import MSEEConfig
from modeling_msee.hub.card import MARKER, is_hub_id, model_card, shareable_recipe, write_model_card
from modeling_msee.hub.results import read_metrics
from modeling_msee.training.arguments import written_recipe


NAMES = ["background", "boat", "dog|cat"]
SCORES = {
    "CAM": {"mean_iou": 0.51236, "pixel_accuracy": 0.9, "per_class_iou": [0.9, 0.4, None]},
    "Seg": {"mean_iou": 0.25, "pixel_accuracy": 0.8, "per_class_iou": [0.8, 0.2, 0.05]},
}
RECIPE = {
    "dataset": "alice/photos",
    "backbone": "facebook/dinov2-small",
    "output_dir": "/home/jane/runs/boats",
    "crop_size": 168,
    "learning_rate": 6e-5,
    "eval_split": "val",
}


@pytest.fixture
def folder(tmp_path: Path, tiny_config) -> Path:
    """A checkpoint without its weights, which the card does not need."""
    path = tmp_path / "boats"
    labels = dict(enumerate(NAMES))
    tiny_config(num_labels=3, id2label=labels).save_pretrained(path)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    content = {"protocol": "one scale", "class_names": NAMES, "results": SCORES, "versions": {"torch": "2.9"}}
    (path / "metrics.json").write_text(json.dumps(content))
    return path


def lines(folder: Path, repo_id: str | None = None) -> list[str]:
    return str(model_card(folder, repo_id)).splitlines()


def test_header(folder: Path) -> None:
    """What the Hub reads: task, data, encoder, and results labelled with their protocol."""
    write_model_card(folder, "alice/boats")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-segmentation")
    assert (data.base_model, data.datasets) == ("facebook/dinov2-small", "alice/photos")
    assert data.model_name == "boats"
    found = [(item.metric_name, item.metric_value, item.metric_args["protocol"]) for item in data.eval_results]
    assert found == [("mIoU of CAM", 0.5124, "one scale"), ("mIoU of Seg", 0.25, "one scale")]
    assert {(item.dataset_type, item.dataset_name, item.dataset_split) for item in data.eval_results} == {
        ("alice/photos", "photos", "val")
    }


def test_tables(folder: Path) -> None:
    text = lines(folder)
    assert "| | CAM | Seg |" in text and "|---|---:|---:|" in text
    assert "| **mIoU** | **51.2** | **25.0** |" in text
    assert "| dog\\|cat | - | 5.0 |" in text
    assert "- versions: `{torch: '2.9'}`" in text
    # From the recipe, the defaults of a training, the configuration.
    assert "| learning_rate | 6e-05 |" in text and "| max_steps | 20000 |" in text
    assert "| scale_factors | [1.5, 0.5] |" in text and "| crop_size | 168 |" in text


def test_where_it_is_loaded_from(folder: Path) -> None:
    assert 'model="alice/boats"' in str(model_card(folder, "alice/boats"))
    assert f'model="{folder.as_posix()}"' in str(model_card(folder))


def test_pictures(folder: Path) -> None:
    assert not [line for line in lines(folder) if line.startswith("![")]
    (folder / "figures").mkdir()
    for name in ("b.png", "a.png", "notes.txt"):
        (folder / "figures" / name).touch()
    pictures = [line.rsplit("(")[-1] for line in lines(folder) if line.startswith("![")]
    assert pictures == ["figures/a.png)", "figures/b.png)"]


def test_what_is_not_known_is_not_claimed(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()
    (folder / "metrics.json").unlink()
    text = str(model_card(folder))
    assert "It has not been scored" in text and "How it was trained is not recorded here." in text
    assert "without masks" not in text and "None" not in text and "model-index" not in text


def test_baseline_is_not_called_msee(folder: Path) -> None:
    assert "with\nM-SEE (multi-scale encoder enhancement)." in str(model_card(folder))
    config = MSEEConfig.from_pretrained(folder)
    config.scale_factors = ()
    config.save_pretrained(folder)
    assert "with\nToCo, the baseline of M-SEE" in str(model_card(folder))


# --- What is nobody else's business ---------------------------------------------------------------


@pytest.mark.parametrize("path", ["/home/jane/photos", "~/photos", "../../photos"])
def test_paths_outside_are_shortened(folder: Path, path: str) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "dataset": path, "backbone": path}))
    recipe = yaml.safe_load(shareable_recipe(folder))
    assert recipe == {**RECIPE, "dataset": "./photos", "backbone": "./photos", "output_dir": "./boats"}
    card = model_card(folder, "alice/boats")
    assert "jane" not in str(card) and "~" not in str(card) and "../" not in str(card)
    assert card.data.datasets is None and card.data.base_model is None
    assert card.data.eval_results[0].dataset_type == "photos"


def test_local_folder_does_not_pass_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/photos").mkdir(parents=True)
    assert is_hub_id("alice/photos") and not is_hub_id("outputs/photos") and not is_hub_id(None)
    values = {"dataset": "outputs/photos", "backbone": "facebook/dinov2-small", "model": None}
    written = yaml.safe_load(written_recipe(values))
    assert written == {**values, "dataset": "./outputs/photos"}
    shutil.rmtree("outputs")  # as on another machine
    assert is_hub_id(written["backbone"]) and not is_hub_id(written["dataset"])


# --- Whose card it is -----------------------------------------------------------------------------


def test_own_card_is_written_anew_and_the_user_s_stays(folder: Path) -> None:
    path = write_model_card(folder)
    before = path.read_text()
    write_model_card(folder, "alice/boats")
    assert path.read_text() != before
    edited = path.read_text().replace(MARKER + "\n", "") + "\nMy notes.\n"
    path.write_text(edited)
    write_model_card(folder, "alice/fleet")
    assert path.read_text() == edited
    assert [item.name for item in folder.iterdir() if ".partial" in item.name] == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": "msee", "class_names": []}'])
def test_damaged_results(folder: Path, content: str) -> None:
    (folder / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json: expected the results that `msee evaluate --output` writes"):
        read_metrics(folder / "metrics.json")
    with pytest.raises(ValueError, match=r"metrics\.json"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        write_model_card(tmp_path)
