"""The command that makes a plan again, and what a plan's command says of the user's wishes."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.api.asked import PlanRequest, wishes_of
from planner.errors import PlannerError
from planner.spec.files import bundled_names
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import load_hardware
from planner.spec.model import ModelSpec, load_bundled
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload
from planner.units import GIB

_SHELL, _PYTHON = "tp-plan plan ", "planner.plan("
_GOALS = {"gpus": "gpus", "cost_per_token": "cost"}
_SINGLE = ("max_memory", "memory_margin", "minimize", "deadline", "price", "time_limit", "solver")
_SEVERAL = ("fix", "recompute", "schedule")
_NUMBERS = ("memory_margin", "deadline", "price", "time_limit")


def command_of(request: PlanRequest) -> str:
    """A line for the shell; one of Python where the model or the hardware was given by its keys."""
    model, hardware = _word(request.model), _word(request.hardware)
    if isinstance(model, str) and isinstance(hardware, str):
        words = [model, "--hardware", hardware, "--gpus", request.gpus_text]
        words += _workload_flags(request.workload)
        words += _wish_flags(request.wishes)
        return _SHELL + shlex.join(words)
    given: dict[str, Any] = {"model": model, "hardware": hardware, "gpus": request.gpus_text}
    given |= {"workload": request.workload.to_dict(), **request.wishes.to_dict()}
    return _PYTHON + ", ".join(f"{key}={value!r}" for key, value in given.items()) + ")"


def wishes_in(command: str) -> Wishes:
    """The wishes that a plan was made with; none where its command is not one of planning."""
    try:
        if command.startswith(_SHELL):
            return _from_words(shlex.split(command.removeprefix(_SHELL)))
        if command.startswith(_PYTHON):
            return _from_call(command)
    except (SyntaxError, ValueError, AttributeError) as error:
        raise PlannerError(
            "the command of a plan is one that runs",
            value=str(error),
            remedy="restore it as tp-plan wrote it",
            key="command",
        ) from None
    return Wishes()


def model_name(request: PlanRequest) -> str:
    """What the plan calls its model: the user's word, else the name that it has."""
    word = _word(request.model)
    if isinstance(word, str):
        return word
    return getattr(request.found, "name", "") or "unnamed"


def hardware_name(request: PlanRequest) -> str:
    """What the plan calls its hardware."""
    word = _word(request.hardware)
    return word if isinstance(word, str) else request.profile.name


def given_by_keys(thing: Any) -> bool:
    """Whether a model or a profile has no name or file that it could be read from again."""
    return not isinstance(_word(thing), str)


def _word(thing: Any) -> Any:
    """A name or path, else the keys."""
    if isinstance(thing, (str, Path)):
        return str(thing)
    if isinstance(thing, ModelSpec):
        data = load_bundled(thing.name)
        return thing.name if data and ModelSpec.from_dict(data) == thing else thing.to_dict()
    if isinstance(thing, HardwareProfile):
        bundled = thing.name in bundled_names("hardware_profiles") and load_hardware(thing.name) == thing
        return thing.name if bundled else thing.to_dict()
    if isinstance(thing, Mapping):
        return dict(thing)
    path, function = getattr(thing, "path", None), getattr(thing, "function", None)
    return f"{path}:{function}" if path and function else getattr(thing, "name", "unnamed")


def _workload_flags(workload: TrainWorkload) -> list[str]:
    words = []
    for key, value in workload.to_dict().items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif (key, value) not in (("mode", "train"), ("precision", "bf16")):
            words += [f"--{flag}", str(value)]
    return words


def _wish_flags(wishes: Wishes) -> list[str]:
    usual, words = Wishes(), list[str]()
    if wishes.fix.text:
        words += ["--fix", wishes.fix.text]
    if wishes.max_memory_bytes:
        words += ["--max-memory", f"{_number(wishes.max_memory_bytes / GIB)}GiB"]
    if wishes.memory_margin:
        words += ["--memory-margin", _number(wishes.memory_margin)]
    if wishes.recompute == ("none",):
        words.append("--no-recompute")
    elif set(wishes.recompute) != set(usual.recompute):
        words += [part for word in wishes.recompute for part in ("--recompute", word)]
    if set(wishes.schedules) != set(usual.schedules):
        words += [part for word in wishes.schedules for part in ("--schedule", word)]
    if wishes.minimize in _GOALS:
        words += ["--minimize", _GOALS[wishes.minimize]]
    numbers = {
        "deadline": wishes.deadline_seconds,
        "price": wishes.price_per_gpu_hour,
        "time-limit": wishes.time_limit_seconds,
    }
    words += [part for flag, value in numbers.items() if value for part in (f"--{flag}", _number(value))]
    return words if wishes.solver == usual.solver else [*words, "--solver", wishes.solver]


def _number(value: float) -> str:
    """As short as reads back the same."""
    return str(int(value)) if value == int(value) and value < 1e15 else repr(value)


def _from_words(words: list[str]) -> Wishes:
    given: dict[str, Any] = {}
    following: Iterator[str] = iter(words)
    for word in following:
        key = word.removeprefix("--").replace("-", "_")
        if word == "--no-recompute":
            given["no_recompute"] = True
        elif word.startswith("--") and key in _SINGLE:
            value = next(following, "")
            given[key] = float(value) if key in _NUMBERS else value
        elif word.startswith("--") and key in _SEVERAL:
            given.setdefault(key, []).append(next(following, ""))
    return wishes_of(",".join(given.pop("fix", [])), given)


def _from_call(command: str) -> Wishes:
    call: Any = ast.parse(command, mode="eval").body
    given = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    for name in ("model", "hardware", "gpus", "workload"):
        given.pop(name, None)
    return wishes_of(given.pop("fix", None), given)
