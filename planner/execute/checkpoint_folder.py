"""The folder of a run's checkpoints: which one is whole, and whether another fits. Free of torch.

`FOLDER/latest` names the last whole checkpoint, `FOLDER/step-00000100/run.json` says where its run stood.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner.errors import PlannerError
from planner.spec.codec import Count, decode
from planner.spec.files import read_text
from planner.units import in_binary_bytes

LATEST = "latest"
FACTS = "run.json"
UNFINISHED = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run needs besides tensors to go on."""

    version: Literal[1] = 1
    model: str  # digest
    layout: str  # digest of the plan that ran
    optimizer: str
    step: Count  # steps done
    sequences: Count  # read so far: where the data goes on
    seed: Count


def latest(folder: Path) -> Facts | None:
    """Of the last whole checkpoint in a folder, if there is one."""
    named = folder / LATEST
    if not named.is_file():
        return None
    path = folder / read_text(named).strip() / FACTS
    try:
        return decode(Facts, json.loads(read_text(path)))
    except ValueError:
        raise PlannerError(
            "a checkpoint tells its step",
            value=f"{path} is no JSON",
            remedy=f"write the name of a whole checkpoint into {named}",
            key="checkpoint",
        ) from None


def require_room(folder: Path, size_bytes: float, *, resume: bool) -> None:
    """Make the folder, drop what was cut short; refuse it where a checkpoint would not fit, or join others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"\0")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PlannerError(
            "checkpoints can be written",
            value=f"{error.filename or folder}: {error.strerror}",
            remedy="give a folder that can be written to",
            key="checkpoint",
        ) from None
    if free < size_bytes:
        raise PlannerError(
            f"a checkpoint takes {in_binary_bytes(size_bytes)}",
            value=f"{folder} has {in_binary_bytes(free)} left",
            remedy="free space, or give a folder on a larger disk",
            key="checkpoint",
        )
    if not resume and (folder / LATEST).exists():
        raise PlannerError(
            "the folder has no checkpoints of another run",
            value=str(folder),
            remedy="go on from them with --resume, or give another folder",
            key="checkpoint",
        )


def require_resumable(facts: Facts, *, model: str, optimizer: str, seed: int) -> None:
    """Refuse to go on with another model, optimizer or seed."""
    for key, told, wanted in (
        ("model", facts.model, model), ("optimizer", facts.optimizer, optimizer), ("seed", facts.seed, seed)
    ):  # fmt: skip
        if told != wanted:
            raise PlannerError(
                f"a run goes on with the {key} that it began with",
                value=f"{str(wanted)[:12]}, and the checkpoint has {str(told)[:12]}",
                remedy=f"--seed {told}" if key == "seed" else f"give a plan of that {key}, or another folder",
                key="checkpoint",
            )


def name_of(step: int) -> str:
    """Of the checkpoint after so many steps, in its folder."""
    return f"step-{step:08d}"
