"""Publish checkpoints, data sets and Spaces on the Hub; a push is one commit, so it is there whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    RepoCard,
    RepoUrl,
)

# The class of the HTTP library that huggingface_hub was built on, whichever that is.
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from .card import shareable_recipe, write_model_card


# What is published of a folder; anything else in it (optimizer, pickles, logs, checkpoints) never is.
CHECKPOINT_FILES = (
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*_msee.py",
    "metrics.json",
    "recipe.yaml",
    "figures/*.png",
)
NEEDED_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "modeling_msee.py")
DATASET_FILES = ("README.md", "data/*.parquet")
SPACE_FILES = ("README.md", "app.py", "requirements.txt")
SPACE_FOLDER = Path(__file__).parent / "space"
DATASET_TAGS = ("msee", "weakly-supervised-segmentation")
DATASET_USE = """
## Use

```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}")  # streaming=True reads it as it comes
```

Train a segmentation model on its tags: `python train_msee.py configuration/tags.yaml --dataset {repo_id}`.
"""

Files = Mapping[str, Path | bytes]


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a checkpoint with its processor, code, results, recipe and model card; returns the address.

    The model card is written into the folder first, unless it holds one that was edited (see `write_model_card`).

    Args:
        folder: a checkpoint, such as the `output_dir` of a training.
        repo_id: `name` or `owner/name`; created if it is not there.
        private: who may see a new repository; default: what the account's new repositories are.
        revision: branch, created if it is not there; default main.
        token: default: `HF_TOKEN` or the one that `hf auth login` keeps.

    Raises:
        ValueError: no checkpoint, or the repository exists and is not `private` as asked.
        PermissionError: the Hub does not accept the token, or no writing with it.
        ConnectionError: the Hub cannot be reached, or an upload broke off; the repository is then as it was.
    """
    folder = Path(folder)
    _check_folder(folder, NEEDED_FILES, "a checkpoint, such as the output_dir of train_msee.py")
    repo_id = create_repository(repo_id, "model", private, token)
    write_model_card(folder, repo_id)
    files = _files(folder, CHECKPOINT_FILES)
    if "recipe.yaml" in files:
        files["recipe.yaml"] = shareable_recipe(folder).encode()
    return _commit(repo_id, "model", files, CHECKPOINT_FILES, revision, token)


def push_dataset(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a Parquet data set with its card; returns the address. Arguments and errors as `push_checkpoint`."""
    folder = Path(folder)
    _check_folder(folder, DATASET_FILES, "a data set as a builder of datasets_scripts writes it")
    card = DatasetCard.load(folder / "README.md")
    repo_id = create_repository(repo_id, "dataset", private, token)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *DATASET_TAGS})
    if "load_dataset(" not in card.text:
        card.text = card.text.rstrip() + "\n" + DATASET_USE.format(repo_id=repo_id)
    files = _files(folder, DATASET_FILES)
    files["README.md"] = str(card).encode()
    return _commit(repo_id, "dataset", files, DATASET_FILES, revision, token)


def push_space(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Publish a Space of the same name that shows the model `repo_id`; returns the address. Errors as above."""
    repo_id = create_repository(repo_id, "space", private, token)
    files = _files(SPACE_FOLDER, SPACE_FILES)
    files["README.md"] = space_card(repo_id).encode()
    return _commit(repo_id, "space", files, SPACE_FILES, None, token)


def space_card(model: str) -> str:
    """README.md of the Space; its front matter tells app.py which model to show."""
    card = RepoCard.load(SPACE_FOLDER / "README.md", repo_type="space")
    card.data.title = model.split("/")[-1]
    card.data.models = [model]
    return str(card)


def create_repository(repo_id: str, repo_type: str, private: bool | None = None, token: str | None = None) -> str:
    """Create a repository unless it is there; returns its whole name, `owner/name`. Errors as `push_checkpoint`."""
    api = HfApi(token=token)
    sdk = "gradio" if repo_type == "space" else None
    with _explained_errors(repo_id, api):
        url: RepoUrl = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
        # The Hub leaves a repository that is there as it is, and a private model must not end up in a public one.
        if private is not None and api.repo_info(url.repo_id, repo_type=repo_type).private != private:
            found, asked = ("public", "private") if private else ("private", "public")
            raise ValueError(
                f"{url.repo_id}: expected a {asked} repository, but it exists and is {found}. Change that in its "
                "settings on the Hub, or choose another name."
            )
    return url.repo_id


def _check_folder(folder: Path, needed: Sequence[str], expected: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected {expected}; there is no such folder.")
    missing = [pattern for pattern in needed if not any(folder.glob(pattern))]
    if missing:
        raise ValueError(f"{folder}: expected {expected}, but there is no {' and no '.join(missing)}.")


def _files(folder: Path, patterns: Sequence[str]) -> dict[str, Path | bytes]:
    """Path in the repository and on the disk of every file of a folder that matches a pattern."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path in a repository is one that `_files` would give."""
    parts = PurePosixPath(path)
    return any(parts.match(pattern) and len(parts.parts) == pattern.count("/") + 1 for pattern in patterns)


def _commit(
    repo_id: str, repo_type: str, files: Files, patterns: Sequence[str], revision: str | None, token: str | None
) -> str:
    """Make the files that match the patterns those given, in one commit; returns the address."""
    api = HfApi(token=token)
    with _explained_errors(repo_id, api):
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        stale = [path for path in present if _matches(path, patterns) and path not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, source) for path, source in files.items()),
            *(CommitOperationDelete(path) for path in stale),
        ]
        try:
            api.create_commit(
                repo_id, operations, commit_message="Pushed by msee", repo_type=repo_type, revision=revision
            )
        except RuntimeError as error:  # how the library wraps what stopped the upload of a large file
            raise ConnectionError(
                f"{repo_id}: {error} ({error.__cause__}) The repository is as it was; the same command sends again "
                "only what is missing."
            ) from error
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    branch = "" if revision is None else f"/tree/{revision}"
    return f"{api.endpoint}/{kind}{repo_id}{branch}"


@contextmanager
def _explained_errors(repo_id: str, api: HfApi) -> Iterator[None]:
    """Errors of the Hub that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise PermissionError(
                f"{repo_id}: the Hub does not know the token, or there is none. Log in with `hf auth login`, or set "
                "HF_TOKEN to a token with write access."
            ) from error
        if error.response.status_code == 403:
            raise PermissionError(
                f"{repo_id}: the Hub does not let this token write there. Use a token with write access to the "
                f"repository, or a name of your own. The Hub says: {error.server_message}"
            ) from error
        raise
    except HTTPError as error:
        raise ConnectionError(f"{repo_id}: no answer from {api.endpoint}: {error}") from error
