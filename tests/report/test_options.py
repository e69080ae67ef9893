"""Flags and dataclasses say the same."""

from __future__ import annotations

import typing

import click
import pytest

from planner.cli import cli
from planner.report import options
from planner.spec.codec import field_types
from planner.spec.requests import STRATEGY_KEYS, WORKLOAD_KEYS
from planner.spec.strategy import Strategy
from planner.spec.training_run import TrainingRun
from planner.spec.workload import TrainWorkload

FLAGS = {item.name: item for item in cli.commands["estimate"].params}


def test_each_key_has_a_flag_and_each_flag_a_key() -> None:
    keys = {*STRATEGY_KEYS, *WORKLOAD_KEYS}
    own = {"model", "hardware", "gpus", "no_cache", "output", "events", "as_json", "quiet", "verbose"}
    assert {name for name in FLAGS if name is not None} == keys | own
    assert set(options._HELP) == keys | set(field_types(TrainingRun))


@pytest.mark.parametrize("key", [*STRATEGY_KEYS, *WORKLOAD_KEYS])
def test_a_flag_is_named_like_its_key_and_left_out_by_default(key: str) -> None:
    flag = FLAGS[key]
    assert isinstance(flag, click.Option)
    assert f"--{key.replace('_', '-')}" in flag.opts
    given = cli.commands["estimate"].make_context("estimate", ["gpt2", "--hardware", "dgx-h100", "--gpus", "8"])
    assert given.params[key] is None
    assert flag.help
    assert "[" in flag.help, "its default is told"


@pytest.mark.parametrize(
    ("cls", "key"),
    [(Strategy, "recompute"), (Strategy, "schedule"), (TrainWorkload, "precision"), (TrainWorkload, "stack")],
)
def test_words_are_those_of_the_dataclass(cls: type, key: str) -> None:
    words = typing.get_args(field_types(cls)[key])
    assert FLAGS[key].metavar == "|".join(words)
    context = click.Context(cli.commands["estimate"])
    found = FLAGS[key].shell_complete(context, words[0][:1])
    assert words[0] in [item.value for item in found]


def test_defaults_in_help_are_those_of_the_dataclass() -> None:
    def told(key: str) -> str:
        return str(getattr(FLAGS[key], "help", ""))

    neutral = Strategy()
    assert told("zero").endswith(f"[{neutral.zero}].")
    assert told("order").endswith(f"[{neutral.order}].")
    assert told("overlap").endswith("[dp].")
    assert told("sp").endswith("[off].")
    assert told("imbalance").endswith("[1].")
