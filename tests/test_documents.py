"""The documents hold what they say: commands are accepted, links lead somewhere, the file tree is complete.

Every line of every `bash` block is looked at. `msee`, the data set builders, `train_msee.py` (also behind `accelerate
launch`), scripts of the repository, `make` and `pip` are parsed by what they call, without running them; a recipe must
exist and its overrides be fields. Anything else must be a plain shell tool of the list below, or its line, or the line
of text above its block, says `needs a GPU`, `needs the Hub` or `needs PyPI`; our own commands are parsed there, too.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, ROOT, bash_commands, simple_commands

from modeling_msee.cli import WITH_RECIPE_FIELDS, build_parser
from modeling_msee.training.arguments import check_known_fields, parse_overrides, parse_recipe


try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib  # type: ignore[no-redef]

SHELL_TOOLS = {".", "cat", "cd", "cp", "du", "export", "git", "ls", "mkdir", "mv", "source", "tar", "unzip"}


class Unaccepted(Exception):
    """A command of a document that would not run."""


# --- Checking a command ---------------------------------------------------------------------------


@contextmanager
def accepted(name: str, words: list[str]) -> Iterator[None]:
    """Raise Unaccepted where a parser refuses the words."""
    try:
        yield
    except SystemExit as stop:
        if stop.code != 0:  # --help ends with 0
            raise Unaccepted(f"{name} does not accept {shlex.join(words)}") from stop


def check_msee(words: list[str]) -> None:
    """A command of msee; some also take any field of a recipe."""
    parser = build_parser()
    with accepted("msee", words):
        if words[0] not in WITH_RECIPE_FIELDS:
            parser.parse_args(words)
            return
        _, fields = parser.parse_known_args(words)
    try:
        check_known_fields(parse_overrides(fields), "the command line")
    except ValueError as error:
        raise Unaccepted(str(error)) from error


def check_builder(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder of datasets_scripts: its `main` parses, and what it would then run is left out."""
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        raise Unaccepted(f"there is no module {module}")
    if not module.startswith("datasets_scripts."):
        return
    loaded = importlib.import_module(module)
    monkeypatch.setattr(loaded, "run_command", lambda build: 0)
    with accepted(module, words):
        loaded.main(words)


def check_training(words: list[str]) -> None:
    if words in (["--help"], ["-h"]):
        return
    recipe, *overrides = words
    if not (ROOT / recipe).is_file():
        raise Unaccepted(f"there is no recipe {recipe}")
    try:
        parse_recipe([str(ROOT / recipe), *overrides])
    except ValueError as error:
        raise Unaccepted(str(error)) from error


def check_script(words: list[str]) -> None:
    if words[0] == "train_msee.py":
        check_training(words[1:])
    elif not (ROOT / words[0]).is_file():
        raise Unaccepted(f"there is no script {words[0]}")


def check_accelerate(words: list[str], marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_command_parser().parse_args(words)
    if arguments.config_file is not None and not (ROOT / arguments.config_file).is_file():
        raise Unaccepted(f"there is no file {arguments.config_file}")
    script = [arguments.training_script, *arguments.training_script_args]
    check_command(["python", *(["-m"] if arguments.module else []), *script], marked, monkeypatch)


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    unknown = set(words) - targets
    if unknown:
        raise Unaccepted(f"the Makefile has no target {', '.join(sorted(unknown))}")


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        for names in re.findall(r"^(?:\.|msee)\[(.*)\]$", word):
            unknown = set(names.split(",")) - extras.keys()
            if unknown:
                raise Unaccepted(f"there is no extra {', '.join(sorted(unknown))}")


def check_command(words: list[str], marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Unaccepted unless the command would be accepted, or is marked and none of ours."""
    name, *rest = (Path(words[0]).name, *words[1:])
    if name == "msee":
        check_msee(rest)
    elif name in ("python", "python3", "torchrun") and rest and rest[0] == "-m":
        if rest[1] == "modeling_msee.cli":
            check_msee(rest[2:])
        elif rest[1] == "pip":
            check_pip(rest[2:])
        elif rest[1] not in ("pytest", "venv", "mypy"):
            check_builder(rest[1], rest[2:], monkeypatch)
    elif name in ("python", "python3") and rest:
        check_script(rest)
    elif name == "accelerate" and rest[:1] == ["launch"]:
        check_accelerate(rest[1:], marked, monkeypatch)
    elif name == "make":
        check_make(rest)
    elif name == "pip":
        check_pip(rest)
    elif name not in SHELL_TOOLS and not marked:
        raise Unaccepted(f"no test knows {name!r}; mark its line with `# needs a GPU` or `# needs the Hub`")


def command_cases() -> list:
    cases = []
    for document in DOCUMENTS:
        for line, marked in bash_commands(document.read_text(encoding="utf-8")):
            cases.append(pytest.param(line, marked, id=f"{document.relative_to(ROOT)}: {line[:60]}"))
    return cases


@pytest.mark.parametrize(("line", "marked"), command_cases())
def test_command_is_accepted(line: str, marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)
    for words in simple_commands(line):
        check_command(words, marked, monkeypatch)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("msee evaluate outputs/demo", "does not accept"),
        ("msee figures M --data D --output O --colour red", "does not accept"),
        ("cd x && msee nonsense", "does not accept"),
        ("msee ablate configuration/ablations/table3.yaml --output x --max_step 3", "did you mean 'max_steps'"),
        ("python -m datasets_scripts.voc --output x", "does not accept"),
        ("python -m datasets_scripts.ade20k --output x", "no module datasets_scripts.ade20k"),
        ("python train_msee.py configuration/none.yaml", "no recipe configuration/none.yaml"),
        ("A=1 python train_msee.py configuration/demo.yaml --max_step 3", "did you mean 'max_steps'"),
        ("accelerate launch --config_file none.yaml train_msee.py configuration/demo.yaml", "no file none.yaml"),
        ("python examples/none.py", "no script examples/none.py"),
        ("make coffee", "no target coffee"),
        ('pip install ".[all,nothing]"', "no extra nothing"),
        ("frobnicate --all", "no test knows 'frobnicate'"),
    ],
)
def test_wrong_commands_are_found(line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)
    with pytest.raises(Unaccepted, match=re.escape(message)):
        for words in simple_commands(line):
            check_command(words, False, monkeypatch)


def test_blocks_and_marks_are_read() -> None:
    text = "Text:\n\n```bash\n# note\nls \\\n  -l  # all\nmsee x | cat > y\n```\nIt needs a GPU.\n```sh\nrun\n```\n"
    assert bash_commands(text) == [("ls    -l  # all", False), ("msee x | cat > y", False), ("run", True)]
    assert simple_commands("A=1 ls -l  # all") == [["ls", "-l"]]
    assert simple_commands("msee x | cat > y && z") == [["msee", "x"], ["cat"], ["z"]]


# --- Links ----------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{document.name} links to {link}, which has no such heading"


# --- File tree ------------------------------------------------------------------------------------


def file_tree() -> set[str]:
    """Paths in the README's file tree; an indented name is in the last folder named before it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"## Files\n+```\n(.*?)```", text, re.DOTALL)
    assert match, "README.md: expected a file tree in the section Files"
    listed, folder = set(), ""
    for line in match[1].splitlines():
        paths = re.match(r"((?:\s*[\w./-]+(?:/|\.\w+))+)(?:\s{2,}|$)", line)
        for path in paths[1].split() if paths else ():
            listed.add(folder + path if line.startswith(" ") else path)
            if not line.startswith(" ") and path.endswith("/"):
                folder = path
    return listed


def test_file_tree_is_complete() -> None:
    """Every module and document is listed, by itself or by a folder of which no file is; nothing else is."""
    listed = file_tree()
    assert {path for path in listed if not (ROOT / path).exists()} == set()
    files = [*ROOT.glob("*.py"), *ROOT.glob("docs/**/*.md")]
    for folder in ("modeling_msee", "datasets_scripts", "examples", "benchmarks", "configuration", "tests"):
        files += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]
    itemised = {str(Path(path).parent) for path in listed if not path.endswith("/")}
    missing = []
    for file in files:
        path = file.relative_to(ROOT)
        folders = [str(parent) for parent in path.parents][:-1]
        whole = any(f"{parent}/" in listed and parent not in itemised for parent in folders)
        if path.name != "__init__.py" and not whole and str(path) not in listed:
            missing.append(str(path))
    assert not missing, f"README.md, section Files: not listed: {', '.join(sorted(missing))}"
