"""One rank of a measurement, started by `launch` with a request as its argument.

Rank 0 keeps the records and tells its progress on stdout, a JSON line per case. A worker ends when the
process that started it does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from planner.errors import PlannerError
from planner.measure import kernels, links, machine
from planner.measure.cases import (
    AttentionCase,
    Case,
    CollectiveCase,
    GemmCase,
    LaunchCase,
    MemoryCase,
    OverlapCase,
    PeerCase,
    cases_for,
    key_of,
    series_of,
)
from planner.measure.clock import QUICK, THOROUGH, Batch, Effort, sample
from planner.measure.records import Record, RecordFolder, deviation
from planner.measure.request import FAILED, LOST_PEER, Request
from planner.measure.topology import Layout, NodeShape, layout_of
from planner.measure.world import World

_DISAGREE = 0.08  # deviation of its rounds above which a case gets a further round
_LOST_WORDS = ("closed by peer", "connection reset", "timed out", "timeout", "monitoredbarrier", "broken pipe")


def main() -> None:
    """Measure, then leave; a failure is one line on stderr and an exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Request.from_json(sys.argv[1])
    try:
        world = World(request.device)
        _Run(world, request).all()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, PlannerError):
            text = json.dumps(error.to_dict())
        print(text, file=sys.stderr, flush=True)
        os._exit(LOST_PEER if any(word in text.lower() for word in _LOST_WORDS) else FAILED)
    world.leave()


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and never writes."""
    while os.read(0, 1):
        pass
    os._exit(FAILED)


class _Run:
    """All cases of one request on one rank; every rank holds the same records."""

    def __init__(self, world: World, request: Request) -> None:
        self.world = world
        self.request = request
        self.effort: Effort = QUICK if request.quick else THOROUGH
        self.folder = RecordFolder(Path(request.folder))
        self.records: dict[str, list[Record]] = {}
        self.slow: set[str] = set()
        self.start = time.monotonic()

    def all(self) -> None:
        """Every case in every round, then those again whose rounds disagree."""
        layout, setting = self._setting()
        self._memory_facts(layout)
        self._resume(setting)
        cases = cases_for(layout, self.request.device, self.request.dtypes, quick=self.request.quick)
        total = len(cases) * self.effort.rounds
        for round_ in range(self.effort.rounds):
            for index, case in enumerate(cases):
                if round_ and self._late():
                    break
                self._tell(done=round_ * len(cases) + index, total=total, case=key_of(case))
                self._case(case, round_)
        for extra in range(self.effort.extra_rounds):
            again = self._disagreeing(cases)
            total += len(again)
            for index, case in enumerate(again):
                if self._late():
                    break
                self._tell(done=total - len(again) + index, total=total, case=key_of(case))
                self._case(case, self.effort.rounds + extra)
        self._tell(done=total, total=total, case="")

    def _setting(self) -> tuple[Layout, dict[str, Any]]:
        """Where the ranks lie and what they are; rank 0 speaks for all where they must be alike."""
        device = self.request.device
        own = (machine.host_identity(), machine.node_shape(device), machine.describe(device))
        told: Any = self.world.tell(own)
        shapes: dict[str, NodeShape] = {host: shape for host, shape, _ in told}
        layout = layout_of([host for host, _, _ in told], shapes)
        names = sorted({facts.get("gpu", facts["cpu"]) for _, _, facts in told})
        if len(names) > 1:
            raise PlannerError(
                "all ranks run on the same kind of device",
                value=", ".join(names),
                remedy="profile each kind for itself",
                key="device",
            )
        memory = machine.memory_gib(device, layout.per_node)
        facts = told[0][2] | {"memory_gib": round(memory, 3)}
        kept = asdict(self.request)
        del kept["folder"]
        return layout, {"request": kept, "layout": asdict(layout), "facts": facts}

    def _memory_facts(self, layout: Layout) -> None:
        """What the device's context and the first collective take."""
        device = self.request.device
        torch.zeros(1, device=device)
        context = machine.used_gib(device)
        everyone = tuple(range(layout.world))
        if layout.world > 1:
            case = CollectiveCase(collective="all_reduce", level="", groups=(everyone,), bytes_=4096)
            links.collective(case, self.world)(1)
        communicator = max(0.0, machine.used_gib(device) - context) if device == "cuda" else 0.0
        if self.world.rank == 0:
            self.folder.write_memory({"context_gib": context, "communicator_gib": communicator})

    def _resume(self, setting: dict[str, Any]) -> None:
        found = self.folder.open_for(setting) if self.world.rank == 0 else []
        told: Any = self.world.tell(found)
        for record in told[0]:
            self.records.setdefault(record.key, []).append(record)
        if told[0]:
            self._tell(resumed=len(told[0]))

    def _case(self, case: Case, round_: int) -> None:
        key = key_of(case)
        known = self.records.setdefault(key, [])
        if series_of(case) in self.slow or any(item.round_ == round_ or item.refusal for item in known):
            self._end_series(case)
            return
        self.world.meet()
        batch, refusal = self._prepared(case)
        told: Any = self.world.tell(refusal)
        if any(told):
            record = Record(key=key, round_=round_, seconds=0.0, spread=0.0, samples=0, refusal=max(told))
            self._tell(refused=key, reason=record.refusal)
        else:
            taken = sample(batch, self.world, self.effort, slowest=bool(series_of(case)))
            record = Record(
                key=key,
                round_=round_,
                seconds=taken.median,
                spread=taken.spread,
                samples=len(taken.seconds),
                by_rank=taken.by_rank,
            )
        known.append(record)
        if self.world.rank == 0:
            self.folder.append(record)
        self._end_series(case)

    def _prepared(self, case: Case) -> tuple[Batch, str]:
        """The call, tried once where it needs no other rank, and why it cannot run."""
        device = self.request.device
        if isinstance(case, CollectiveCase):
            return links.collective(case, self.world), ""
        if isinstance(case, PeerCase):
            return links.peer(case, self.world), ""
        if isinstance(case, OverlapCase):
            return links.overlap(case, self.world), ""
        if isinstance(case, LaunchCase) and case.what == "collective":
            return links.launch(case, self.world), ""
        try:
            batch = _alone(case, device)
            batch(1)
        except (RuntimeError, NotImplementedError, kernels.NotMeasurableError) as error:
            return links.no_part, (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return batch, ""

    def _end_series(self, case: Case) -> None:
        """Larger cases of a series that has become slow are left out."""
        known = self.records[key_of(case)]
        series = series_of(case)
        if series and known and known[0].seconds * 4 > self.effort.slow_seconds:
            self.slow.add(series)

    def _disagreeing(self, cases: Sequence[Case]) -> list[Case]:
        """The cases whose rounds differ most, at most a third of all."""
        spreads = {}
        for case in cases:
            known = self.records.get(key_of(case), [])
            if known and not known[0].refusal:
                spreads[key_of(case)] = deviation([record.seconds for record in known])
        worst = sorted((key for key in spreads if spreads[key] > _DISAGREE), key=lambda key: -spreads[key])
        chosen = set(worst[: len(cases) // 3])
        self.slow.clear()
        return [case for case in cases if key_of(case) in chosen]

    def _late(self) -> bool:
        """Whether the time is spent, by the clock of rank 0."""
        return self.world.gather([time.monotonic() - self.start])[0][0] > self.effort.until_seconds

    def _tell(self, **news: object) -> None:
        if self.world.rank == 0:
            print(json.dumps(news), flush=True)


def _alone(case: Case, device: str) -> Batch:
    if isinstance(case, GemmCase):
        return kernels.gemm(case, device)
    if isinstance(case, AttentionCase):
        return kernels.attention(case, device)
    if isinstance(case, MemoryCase):
        return kernels.memory(case, device)
    assert isinstance(case, LaunchCase)
    return kernels.launch(case, device)
