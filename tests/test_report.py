"""The command in a result file."""

import pytest

from modeling_msee.evaluation.report import command_line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate", "my model", "--crf"], "msee evaluate 'my model' --crf"),
        (["run", "--hub_token", "hf_abc", "--seed", "1"], "msee run --hub_token '***' --seed 1"),
        (["run", "--hub-token=hf_abc", "--token"], "msee run '--hub-token=***' --token"),
        (["run", "token", "--tokens", "3"], "msee run token --tokens 3"),
    ],
)
def test_command_line_holds_no_token(words: list[str], expected: str) -> None:
    assert command_line("msee", words) == expected
