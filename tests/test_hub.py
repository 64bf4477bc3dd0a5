"""Publishing and loading over real HTTP, with a stand-in Hub on this machine (stand_in_hub.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard, RepoCard, constants
from PIL import Image
from stand_in_hub import StandInHub

from modeling_msee.cli import main
from modeling_msee.hub.push import SPACE_FILES
from modeling_msee.training.arguments import parse_recipe


pytest_plugins = ["training_fixtures"]

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (StandInHub.write_token, StandInHub.read_token, "hf_nobody_knows_this_token")
CODE = {path.name for path in (ROOT / "modeling_msee").glob("*_msee.py")}
PUBLISHED = {
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "metrics.json",
    "recipe.yaml",
}
CREATED = {".gitattributes"}

Run = Callable[..., tuple[int, str]]


def check_no_token(text: str | bytes) -> None:
    text = text.encode() if isinstance(text, str) else text
    assert not any(token.encode() in text for token in TOKENS)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    """An empty Hub; at the end no file of the test holds a token, and little was sent."""
    with StandInHub() as hub:
        yield hub
    assert len(hub.requests) < 500 and hub.received < 50_000_000
    for path in tmp_path.rglob("*"):
        if path.is_file():
            check_no_token(path.read_bytes())


@pytest.fixture
def here(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """This process talks to the stand-in, with the token that may write."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub


@pytest.fixture
def run(here: StandInHub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """`run("push", ...)`: exit code of an msee command, and everything it printed or logged."""

    def run_command(*words: object) -> tuple[int, str]:
        code = main([str(word) for word in words])
        text = "".join(capfd.readouterr()) + caplog.text
        check_no_token(text)
        return code, text

    return run_command


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """What six steps of training leave behind, and a picture."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "figures").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "figures" / "validation.png")
    return folder


def client(hub: StandInHub, home: Path, *words: object) -> subprocess.Popen:
    """A Python process that knows nothing of this machine but the package and its own cache."""
    environment = {**os.environ, **hub.environment(hub.write_token, home), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=home.parent, **pipes)


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=300)
    check_no_token(text)
    assert process.returncode == 0, text
    return text


# --- Pushing a checkpoint -------------------------------------------------------------------------


def test_push_creates_the_repository(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    leftovers = {path.name for path in checkpoint.iterdir()}
    assert {"training_args.bin", "trainer_state.json", "checkpoint-6"} <= leftovers
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 0 and f"Published: {hub.url}/alice/boats\n" in text
    files = hub.files("model", "alice/boats")
    assert files.keys() == PUBLISHED | CODE | CREATED | {"figures/validation.png"}
    for name in files.keys() - CREATED - {"recipe.yaml"}:
        assert files[name] == (checkpoint / name).read_bytes(), name
    assert not hub.repositories["model", "alice/boats"].private
    assert 'model="alice/boats"' in files["README.md"].decode()


def test_one_commit_holds_everything(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    run("push", checkpoint, "alice/boats")
    assert len(hub.repositories["model", "alice/boats"].commits) == 2  # the Hub's own, and ours
    writing = [path for method, path in hub.requests if method in ("POST", "PUT")]
    assert writing[-1] == "/api/models/alice/boats/commit/main"


def test_name_without_an_owner(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    assert run("push", checkpoint, "boats", "--private")[0] == 0
    assert hub.repositories["model", "alice/boats"].private
    assert 'model="alice/boats"' in hub.files("model", "alice/boats")["README.md"].decode()


def test_push_again(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    """Nothing is sent twice, and what is gone from the folder goes from the repository."""
    run("push", checkpoint, "alice/boats")
    hub.requests.clear()
    assert run("push", checkpoint, "alice/boats")[0] == 0
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert len(hub.repositories["model", "alice/boats"].commits) == 2
    (checkpoint / "figures" / "validation.png").unlink()
    hub.files("model", "alice/boats")["notes.txt"] = b"written on the Hub's own page"
    assert run("push", checkpoint, "alice/boats")[0] == 0
    files = hub.files("model", "alice/boats")
    assert files.keys() == PUBLISHED | CODE | CREATED | {"notes.txt"}
    assert "figures/validation.png" not in files["README.md"].decode()


def test_branch(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    code, text = run("push", checkpoint, "alice/boats", "--revision", "v2/large")
    assert code == 0 and f"{hub.url}/alice/boats/tree/v2/large" in text
    assert hub.files("model", "alice/boats").keys() == CREATED
    assert hub.files("model", "alice/boats", "v2/large").keys() >= PUBLISHED
    assert run("push", checkpoint, "alice/boats", "--revision", "v2/large")[0] == 0


@pytest.mark.parametrize(
    ("private", "asked", "found"), [(False, "--private", "public"), (True, "--public", "private")]
)
def test_visibility_of_a_repository_that_exists(
    run: Run, hub: StandInHub, checkpoint: Path, private: bool, asked: str, found: str
) -> None:
    hub.create("model", "alice/boats", private)
    code, text = run("push", checkpoint, "alice/boats", asked)
    assert code == 1 and f"expected a {asked[2:]} repository, but it exists and is {found}" in text
    assert hub.files("model", "alice/boats").keys() == CREATED
    assert run("push", checkpoint, "alice/boats")[0] == 0
    assert hub.repositories["model", "alice/boats"].private == private


def test_folder_that_is_no_checkpoint(run: Run, hub: StandInHub, checkpoint: Path, tmp_path: Path) -> None:
    code, text = run("push", tmp_path / "nope", "alice/boats")
    assert code == 1 and "expected a checkpoint" in text and "there is no such folder" in text
    (checkpoint / "modeling_msee.py").unlink()
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 1 and "but there is no modeling_msee.py" in text
    assert not hub.requests


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["hf_nobody_knows_this_token", None])
def test_wrong_token(run: Run, hub: StandInHub, checkpoint: Path, monkeypatch, token: str | None) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkpoint / "no_token"))
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 1 and not hub.repositories
    assert text.startswith("error: alice/boats: the Hub does not know the token, or there is none. Log in with")


@pytest.mark.parametrize("exists", [False, True])
def test_token_that_may_only_read(run: Run, hub: StandInHub, checkpoint: Path, monkeypatch, exists: bool) -> None:
    if exists:
        hub.create("model", "alice/boats")
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 1 and "error: alice/boats: the Hub does not let this token write there." in text
    assert "rights to write to the namespace 'alice'" in text
    assert not exists or hub.files("model", "alice/boats").keys() == CREATED


def test_repository_of_somebody_else(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    hub.create("model", "bob/boats")
    code, text = run("push", checkpoint, "bob/boats")
    assert code == 1 and "the Hub does not let this token write there" in text
    assert hub.files("model", "bob/boats").keys() == CREATED


def test_no_hub_there(run: Run, checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 1 and "error: alice/boats: no answer from http://127.0.0.1:9" in text


def test_name_that_is_none(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    code, text = run("push", checkpoint, "alice/my boats!")
    assert code == 1 and "alice/my boats!" in text and not hub.requests


# --- A push that dies -----------------------------------------------------------------------------


def test_push_that_is_killed_half_way(run: Run, hub: StandInHub, checkpoint: Path, tmp_path: Path) -> None:
    """One of two large files is there, the other hangs, then the process is killed: nobody sees half a model."""
    hub.uploads_before_hold = 1
    process = client(hub, tmp_path / "home", "-m", "modeling_msee.cli", "push", checkpoint, "alice/boats")
    held = hub.holding.wait(240) and hub.stored.wait(240)
    process.kill()
    text, _ = process.communicate(timeout=60)
    check_no_token(text)
    assert held, text
    assert hub.files("model", "alice/boats").keys() == CREATED and len(hub.large) == 1
    hub.uploads_before_hold = None
    hub.requests.clear()
    assert run("push", checkpoint, "alice/boats")[0] == 0
    assert len([path for method, path in hub.requests if method == "PUT"]) == 1
    assert hub.files("model", "alice/boats").keys() == PUBLISHED | CODE | CREATED | {"figures/validation.png"}


def test_upload_that_breaks_off(run: Run, hub: StandInHub, checkpoint: Path, monkeypatch) -> None:
    """Where the program lives on, it says that nothing is lost."""

    def broken(*_, **__):
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from OSError("connection reset")

    monkeypatch.setattr("huggingface_hub._commit_api._upload_lfs_files", broken)
    code, text = run("push", checkpoint, "alice/boats")
    assert code == 1 and "'model.safetensors'" in text and "(connection reset)" in text
    assert "The repository is as it was; the same command sends again only what is missing." in text


# --- Loading back by name -------------------------------------------------------------------------

# Runs the code blocks of the model card, as a reader would paste them, where the package cannot be imported.
WITHOUT_PACKAGE = """
import json
import re
import sys

sys.modules["modeling_msee"] = sys.modules["datasets_scripts"] = None  # importing them fails
sys.path = [path for path in sys.path if path != {root!r}]

from datasets import load_dataset
from huggingface_hub import ModelCard

for block in re.findall(r"```python\\n(.*?)```", ModelCard.load("alice/boats").text, flags=re.DOTALL):
    exec(block)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(segmenter.model) is type(model)

data = load_dataset("alice/shapes")
stream = load_dataset("alice/shapes", streaming=True)
first, streamed = data["validation"][0], next(iter(stream["validation"]))
assert streamed["image_id"] == first["image_id"] and streamed["image"].tobytes() == first["image"].tobytes()
with torch.inference_mode():
    logits = model(**processor(images=first["image"], return_tensors="pt")).logits
sizes = {{name: len(split) for name, split in data.items()}}
names = data["train"].features["labels"].feature.names
print(json.dumps({{"sum": logits.sum().item(), "sizes": sizes, "names": names}}))
"""


def test_load_back_in_clean_processes(run: Run, hub: StandInHub, checkpoint: Path, tiny_data: Path, tmp_path) -> None:
    """With the package and without it, both at once: model, processor, pipeline, data set, stream, evaluation."""
    assert run("push", checkpoint, "alice/boats", "--private")[0] == 0
    assert run("push-data", tiny_data, "alice/shapes", "--private")[0] == 0
    Image.new("RGB", (50, 37), "blue").save(tmp_path / "photo.jpg")
    without = client(hub, tmp_path / "without", "-c", WITHOUT_PACKAGE.format(root=str(ROOT)))
    words = ("evaluate", "alice/boats", "--data", "alice/shapes", "--output", "scores.json")
    with_package = client(hub, tmp_path / "with", "-m", "modeling_msee.cli", *words)

    result = json.loads(finish(without).splitlines()[-1])
    assert result["sizes"] == {"train": 10, "validation": 5}
    assert result["names"] == ["boat", "dog", "kite", "tree", "umbrella"]
    assert result["sum"] == pytest.approx(_logits_sum(checkpoint, tiny_data), rel=1e-4)
    finish(with_package)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["results"] == json.loads((checkpoint / "metrics.json").read_text())["results"]


def _logits_sum(checkpoint: Path, data: Path) -> float:
    """What the local folder gives for the first validation image."""
    import torch

    from modeling_msee.commands.common import load_model
    from modeling_msee.data.contract import load_split, read_rgb

    model, processor = load_model(str(checkpoint))
    image = read_rgb(load_split(str(data), "validation")[0])
    with torch.inference_mode():
        return model(**processor(images=image, return_tensors="pt")).logits.sum().item()


# --- Training -------------------------------------------------------------------------------------


def test_training_publishes_at_its_end(here: StandInHub, train, capfd) -> None:
    """Once, whole and with its results, though the run saves in between."""
    words = ("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--push_to_hub")
    output = train("boats", *words, "--hub_private_repo", "true", "--hub_model_id", "alice/fleet")
    printed = "".join(capfd.readouterr())
    check_no_token(printed)
    assert f"Published: {here.url}/alice/fleet" in printed
    files = here.files("model", "alice/fleet")
    assert files.keys() == PUBLISHED | CODE | CREATED
    assert (
        len(here.repositories["model", "alice/fleet"].commits) == 2
        and here.repositories["model", "alice/fleet"].private
    )
    assert files["README.md"] == (output / "README.md").read_bytes()
    card = ModelCard(files["README.md"].decode())
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    miou = json.loads(files["metrics.json"])["results"]["Seg"]["mean_iou"]
    assert results["mIoU of Seg"] == pytest.approx(miou, abs=5e-5)


def test_training_with_a_wrong_token_does_not_start(here: StandInHub, train, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_knows_this_token")
    with pytest.raises(PermissionError, match="run: the Hub does not know the token"):
        train("run", "--push_to_hub")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hub_token", "hf_nobody_knows_this_token"), "Set the environment variable HF_TOKEN"),
        (("--hub_strategy", "every_save"), "expected 'end'"),
    ],
)
def test_fields_that_would_leak_or_publish_half(tiny_recipe: Path, words: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_recipe([str(tiny_recipe), "--dataset", "x", *words])
    check_no_token(str(raised.value))


# --- Data sets and Spaces -------------------------------------------------------------------------


def test_push_data(run: Run, hub: StandInHub, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(tiny_data, data)
    code, text = run("push-data", data, "alice/shapes")
    assert code == 0 and f"Published: {hub.url}/datasets/alice/shapes\n" in text
    files = hub.files("dataset", "alice/shapes")
    shards = {f"data/{path.name}" for path in (data / "data").iterdir()}
    assert files.keys() == {"README.md"} | shards | CREATED
    card = DatasetCard(files["README.md"].decode())
    assert card.data.task_categories == ["image-segmentation"] and "msee" in card.data.tags
    assert 'load_dataset("alice/shapes")' in card.text and card.text.count("## Use") == 1
    for shard in (data / "data").iterdir():  # written anew, with another digest in the name
        shard.rename(shard.with_name(re.sub(r"[0-9a-f]{16}", "0" * 16, shard.name)))
    assert run("push-data", data, "alice/shapes")[0] == 0
    renewed = hub.files("dataset", "alice/shapes").keys()
    assert len(renewed) == len(files) and not renewed & shards


def test_push_data_that_is_none(run: Run, hub: StandInHub, write_data, tmp_path: Path) -> None:
    saved = write_data([(Image.new("RGB", (8, 8)), [0])])
    code, text = run("push-data", saved, "alice/shapes")
    assert code == 1 and "a data set as a builder of datasets_scripts writes it" in text
    assert "no README.md and no data/*.parquet" in text and not hub.requests


def test_space(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    code, text = run("push", checkpoint, "boats", "--private", "--space")
    assert code == 0 and f"Published: {hub.url}/spaces/alice/boats" in text
    assert hub.repositories["space", "alice/boats"].private
    files = hub.files("space", "alice/boats")
    assert files.keys() == set(SPACE_FILES) | CREATED
    card = RepoCard(files["README.md"].decode())
    assert (card.data.models, card.data.sdk, card.data.app_file) == (["alice/boats"], "gradio", "app.py")


def test_space_of_a_branch(run: Run, hub: StandInHub, checkpoint: Path) -> None:
    code, text = run("push", checkpoint, "alice/boats", "--space", "--revision", "v2")
    assert code == 1 and "--space shows the branch main" in text and not hub.requests
