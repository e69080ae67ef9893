"""`tp-plan profile`: measure, fit, write; nothing half-written, and nothing measured twice."""

from __future__ import annotations

import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.measure.against import Comparison, compare, expected
from planner.measure.cases import Case, DeviceKind, key_of
from planner.measure.fitting import Formulas
from planner.measure.launch import measure, under_torchrun
from planner.measure.profile import Setting, build, measured_cases
from planner.measure.progress import Reporter
from planner.measure.records import Measurement, RecordFolder
from planner.measure.request import Request, require_dtypes
from planner.spec.files import write_text
from planner.spec.hardware import HardwareProfile
from planner.spec.yaml_text import dump_yaml

_DEFAULT_CPU_RANKS = 2  # enough for a collective


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMachine:
    """What a measurement gives."""

    profile: HardwareProfile
    measured: dict[Case, Measurement]
    comparison: Comparison | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [{"key": key_of(case), **asdict(item)} for case, item in self.measured.items()]
        return {
            "profile": self.profile.to_dict(),
            "measurements": rows,
            "comparison": self.comparison.to_dict() if self.comparison else None,
            "seconds": self.seconds,
        }


def measure_machine(
    formulas: Formulas,
    *,
    output: Path | None = None,
    nproc: int = 0,
    device: str = "auto",
    dtypes: Sequence[str] = (),
    quick: bool = False,
    name: str = "",
    against: HardwareProfile | None = None,
    peaks: HardwareProfile | None = None,
    quiet: bool = False,
) -> MeasuredMachine | None:
    """Measure this machine and write its profile; under torchrun only rank 0 has a result.

    Without `nproc` every GPU takes part, or two processes on a CPU. One device alone gives a profile that
    assumes its link to a second one, says so, and refuses more. Records stay beside the output until it is
    written: a run that ends early is taken up by the next.
    """
    start = time.monotonic()
    kind = _device(device)
    ranks = _ranks(nproc, kind)
    known = require_dtypes(dtypes, kind)
    if int(os.environ.get("RANK", "0")) if under_torchrun() else 0:
        with tempfile.TemporaryDirectory() as scratch:
            measure(Request(folder=scratch, device=kind, dtypes=known, quick=quick), 1, lambda _: None)
        return None
    with _records(output) as folder, Reporter(quiet=quiet) as reporter:
        measure(Request(folder=str(folder.folder), device=kind, dtypes=known, quick=quick), ranks, reporter.hear)
        setting = Setting.of(folder)
        measured = measured_cases(folder, setting)
        profile = build(
            setting,
            measured,
            folder.memory(),
            formulas,
            name=name or _name_from(output, setting.device_name),
            peaks=peaks,
            refusals=folder.refusals(),
        )
        if output is not None:
            write_text(output, dump_yaml(profile.to_dict()))
        folder.remove()
    comparison = None
    if against is not None:
        base = against
        comparison = compare(measured, lambda case: expected(case, base, formulas), base.name)
    return MeasuredMachine(
        profile=profile, measured=measured, comparison=comparison, seconds=time.monotonic() - start
    )


@contextmanager
def _records(output: Path | None) -> Iterator[RecordFolder]:
    """The folder beside the output, held by one run at a time; without an output one that does not last."""
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield RecordFolder.beside(Path(scratch) / "profile.yaml")
        return
    folder = RecordFolder.beside(output)
    with (folder.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlannerError(
                "one run at a time writes a profile",
                value=str(output),
                remedy="wait for the other run, or give another output",
                key="output",
            ) from None
        yield folder


def _device(device: str) -> DeviceKind:
    if device not in ("auto", "cpu", "cuda"):
        raise PlannerError(
            "one of auto, cpu, cuda is needed", value=device, remedy="give --device cpu or cuda", key="device"
        )
    if device == "cpu":
        return "cpu"
    import torch

    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise PlannerError(
            "torch sees no CUDA device",
            value=f"torch {torch.__version__}",
            remedy="install a CUDA build of torch and a driver, or give --device cpu",
            key="device",
        )
    return "cuda" if found else "cpu"


def _ranks(nproc: int, device: DeviceKind) -> int:
    """How many workers to start: every GPU, or two on a CPU; under torchrun the one of this rank."""
    if under_torchrun():
        if nproc:
            raise PlannerError(
                "under torchrun it decides how many processes there are",
                value=nproc,
                remedy="leave --nproc out, or run without torchrun",
                key="nproc",
            )
        return 1
    if nproc < 0:
        raise PlannerError("nproc is at least 1", value=nproc, remedy="give a positive number", key="nproc")
    if device == "cpu":
        return nproc or _DEFAULT_CPU_RANKS
    import torch

    there = torch.cuda.device_count()
    if nproc > there:
        raise PlannerError(
            f"a process for each GPU, and there are {there}",
            value=nproc,
            remedy=f"give --nproc {there} or fewer",
            key="nproc",
        )
    return nproc or there


def _name_from(output: Path | None, device_name: str) -> str:
    text = output.stem if output is not None else device_name.lower()
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or sys.platform
