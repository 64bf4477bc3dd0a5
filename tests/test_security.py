"""What comes from outside is read, never run, and stays where it belongs.

Proven elsewhere: tar members that leave their folder and links (test_datasets_voc.py, test_tar_members_cannot_escape),
paths in lists and metadata that do (test_datasets_voc.py, test_datasets_coco.py, test_datasets_image_tags.py), weights
with pickled code (test_convert.py, test_pickled_code_is_refused), tokens in logs and files (test_hub.py).
"""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from modeling_msee import MSEEImageProcessor
from modeling_msee.cli import main
from modeling_msee.data.contract import load_split
from modeling_msee.training.arguments import RecipeLoader, parse_recipe


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*(ROOT / "modeling_msee").rglob("*.py"), *(ROOT / "datasets_scripts").rglob("*.py"), ROOT / "train_msee.py"]
)
# The Space shows a model of its own owner; its README says that it runs that model's code.
MAY_RUN_REMOTE_CODE = {ROOT / "modeling_msee" / "hub" / "space" / "app.py"}
# Unpacking writes where the archive says; the others run what a string says.
FORBIDDEN = {"extract", "extractall", "unpack_archive", "urlretrieve", "eval", "exec", "system", "full_load"}
# What these calls must say to be safe.
DEMANDED = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "RecipeLoader"),
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file with the name that it calls, such as `torch.load`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe_calls(path: Path) -> list[str]:
    found = []
    for name, call in calls(path):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        option, value = DEMANDED.get(name, (None, None))
        unsafe = option is not None and given.get(option) != value
        # `model.eval()` is the module's training switch.
        unsafe |= name.split(".")[-1] in FORBIDDEN and not (name.endswith(".eval") and not call.args)
        unsafe |= given.get("trust_remote_code", "False") != "False" and path not in MAY_RUN_REMOTE_CODE
        unsafe |= given.get("shell", "False") != "False"
        if unsafe:
            found.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    return found


def test_no_unsafe_call_in_the_package() -> None:
    assert len(SOURCES) > 40
    assert not [call for path in SOURCES for call in unsafe_calls(path)]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "tarfile.open(path).extractall(folder)",
        "shutil.unpack_archive(path, folder)",
        "load_dataset(name, trust_remote_code=True)",
        "pipeline('image-segmentation', model=name, trust_remote_code=trust)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_unsafe_calls(tmp_path: Path, line: str) -> None:
    (tmp_path / "source.py").write_text(f"model.eval()\n{line}\n")
    assert len(unsafe_calls(tmp_path / "source.py")) == 1


# --- Recipes --------------------------------------------------------------------------------------


def test_recipe_that_holds_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(RecipeLoader, yaml.SafeLoader)
    monkeypatch.chdir(tmp_path)
    value = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]"
    Path("evil.yaml").write_text(f"dataset: {value}\n")
    with pytest.raises(yaml.constructor.ConstructorError, match="could not determine a constructor"):
        parse_recipe(["evil.yaml"])
    with pytest.raises(yaml.constructor.ConstructorError, match="could not determine a constructor"):
        Path("good.yaml").write_text("dataset: x\n")
        parse_recipe(["good.yaml", "--output_dir", value])
    assert not Path("executed").exists()


# --- Data sets ------------------------------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set folder as they were once: a script of the folder's name that builds it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "photos.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    return folder


def test_data_set_with_a_script_is_refused(scripted: Path) -> None:
    with pytest.raises(ValueError, match=r"photos: .*found photos\.py.* The code of a data set is never run"):
        load_split(str(scripted), "train")
    assert not Path("executed").exists()


def test_command_on_a_data_set_with_a_script(scripted: Path, tiny_model, tmp_path: Path, capsys) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    MSEEImageProcessor(patch_size=8).save_pretrained(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), "--data", str(scripted)]) == 1
    assert "The code of a data set is never run" in capsys.readouterr().err
    assert not Path("executed").exists()


# --- Addresses ------------------------------------------------------------------------------------


def test_only_web_addresses_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a path; of addresses none but http and https is followed, not even to a file that is there."""
    picture = tmp_path / "photo.png"
    Image.new("RGB", (16, 16)).save(picture)
    processor = MSEEImageProcessor()
    assert processor(images=[str(picture)], return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)

    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for address in (f"file://{picture}", "ftp://127.0.0.1/photo.png", "gopher://127.0.0.1/"):
        with pytest.raises((ValueError, RuntimeError)):  # it is tried as an image in base64
            processor(images=[address], return_tensors="pt")
