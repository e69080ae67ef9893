"""`tp-plan` with its words in this process: the exit code, the output and the errors that a user gets."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from planner import cli
from planner.execute.parameters import replaced


@dataclass(frozen=True, slots=True)
class Told:
    """As a process of its own would tell it."""

    returncode: int
    stdout: str
    stderr: str


def tp_plan(*words: str) -> Told:
    """The answer to these words."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        replaced(sys, "argv", ["tp-plan", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert isinstance(ended.value.code, int)
    for stream in (out, err):
        stream.seek(0)
    return Told(ended.value.code, out.read(), err.read())
