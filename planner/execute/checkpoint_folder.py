"""The folder of a run's checkpoints: which one is whole, and whether another fits. Free of torch.

`FOLDER/latest` names the last whole checkpoint, `FOLDER/step-00000100/run.json` says where its run stood.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from planner.errors import PlannerError
from planner.spec.codec import Count, decode
from planner.spec.yaml_text import Source
from planner.units import in_binary_bytes

LATEST = "latest"
FACTS = "run.json"
UNFINISHED = ".part"
_CLAIM = ".run"  # held by the run that writes there, and says which
ALTERED = "not what was written"


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
    data: str = ""  # that was read; empty where it was not told
    files: dict[str, Count] = field(default_factory=dict)  # bytes of each; empty where it was not told
    sums: dict[str, Count] = field(default_factory=dict)  # CRC-32 of small files; those of tensors hold their own


def latest(folder: Path) -> Facts | None:
    """Of the last whole checkpoint in a folder, if there is one."""
    path = _latest_path(folder)
    if path is None:
        return None
    facts, fault = _told(path)
    if facts is None:
        raise damaged(folder, path, fault)
    return facts


def whole_step(folder: Path) -> int:
    """Where a run can go on from; 0 where there is no checkpoint, or the one that `latest` names tells nothing."""
    with contextlib.suppress(PlannerError):
        facts = latest(folder)
        return facts.step if facts is not None else 0
    return 0


def require_whole(folder: Path) -> None:
    """Refuse the checkpoint to go on from where a file of it is gone or not as it was.

    The tensors themselves are compared when they are read, by the ranks that read them.
    """
    path = _latest_path(folder)
    fault = _fault(path) if path is not None else ""
    if path is not None and fault:
        raise damaged(folder, path, fault)


def written(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, the last one first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != UNFINISHED), reverse=True)


def _latest_path(folder: Path) -> Path | None:
    """The one that `latest` names. A run may be killed before it names its first: that one is whole as well."""
    named = folder / LATEST
    if named.is_file():
        return folder / (named.read_text(encoding="utf-8", errors="replace").strip() or LATEST)
    return next(iter(written(folder)), None)


def _told(path: Path) -> tuple[Facts | None, str]:
    """What a checkpoint tells of itself, or why it does not."""
    file = f"{path.name}/{FACTS}"  # the folder's own name is long, and in the remedy
    try:
        facts = decode(Facts, json.loads((path / FACTS).read_text(encoding="utf-8")), Source(name=file))
    except OSError as error:
        return None, f"{file}: {error.strerror}"
    except (ValueError, RecursionError):
        return None, f"{file} is no JSON"
    except PlannerError as error:
        return None, f"{file}: {error.rule}"
    if path.name != name_of(facts.step):
        return None, f"{file} is of step {facts.step}"
    return facts, ""


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint; nothing where it is whole."""
    facts, fault = _told(path)
    for name, size in facts.files.items() if facts is not None else ():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{path.name}/{name}: {error.strerror}"
        if found != size:
            return f"{path.name}/{name}: {found:,} of {size:,} bytes"
    for name, told in facts.sums.items() if facts is not None else ():
        if sum_of(path / name) != told:
            return f"{path.name}/{name}: {ALTERED}"
    return fault


def sum_of(path: Path) -> int:
    """The CRC-32 of a small file."""
    return zlib.crc32(path.read_bytes())


def damaged(folder: Path, path: Path, fault: str) -> PlannerError:
    """The refusal of a checkpoint, which names one before it that is whole."""
    others = (other.name for other in written(folder) if other != path and not _fault(other))
    whole = next(others, "")
    return PlannerError(
        "the checkpoint that a run goes on from is whole",
        value=fault,
        remedy=f"write {whole} into {folder / LATEST}" if whole else "give another folder: this one has no other",
        key="checkpoint",
    )


def claim(folder: Path) -> IO[str]:
    """Make the folder and hold it for one run: until the file that this returns is closed, or its process ends.

    Of two runs one would take away what the other is writing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _CLAIM).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unfit(folder, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read(100) or "another"
        raise PlannerError(
            "one run at a time keeps checkpoints in a folder",
            value=f"{folder} is that of {holder}",
            remedy="wait until that one has ended, or give another folder",
            key="checkpoint",
        ) from None
    except OSError:  # some file systems hold nothing
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _unfit(folder: Path, error: OSError) -> PlannerError:
    return PlannerError(
        "checkpoints can be written",
        value=f"{error.filename or folder}: {error.strerror}",
        remedy="give a folder that can be written to",
        key="checkpoint",
    )


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
        raise _unfit(folder, error) from None
    if free < size_bytes:
        raise PlannerError(
            f"a checkpoint takes {in_binary_bytes(size_bytes)}",
            value=f"{folder} has {in_binary_bytes(free)} left",
            remedy="free space, or give a folder on a larger disk",
            key="checkpoint",
        )
    if not resume and _latest_path(folder) is not None:
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
