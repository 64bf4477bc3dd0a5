"""The commands of the documents, read for the tests that parse them and the one that runs them."""

import re
import shlex
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MARK = re.compile(r"needs (a GPU|the Hub|PyPI)")


def bash_commands(text: str) -> list[tuple[str, bool]]:
    """Command lines of all bash blocks, continuation lines joined, each with whether it is marked."""
    found = []
    for match in re.finditer(r"(?:^|(?<=\n))([^\n]*)\n*```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL):
        block_is_marked = MARK.search(match[1]) is not None
        for line in match[2].replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                found.append((line.strip(), block_is_marked or MARK.search(line) is not None))
    return found


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, split at `&&`, `|`, `;`; no comments, assignments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skipped = False
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        elif set(word) <= set("<>"):
            skipped = True
        elif skipped:
            skipped = False
        elif commands[-1] or not re.match(r"^\w+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
