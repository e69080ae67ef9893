"""Raw measurements, kept as they come so that a run that was killed goes on where it stopped.

`OUTPUT.partial/records.jsonl` holds a line per case and round, `setting.json` what was measured: records
of another setting are not used.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.files import write_text

_BORROWED = 4  # degrees of freedom that a case's spread borrows from its kind
_SHORTEST = 1e-12  # seconds; no clock tells less


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One case in one round: the median of its samples, their relative median deviation, each rank's median."""

    key: str
    round_: int
    seconds: float
    spread: float
    samples: int
    by_rank: tuple[float, ...] = ()
    refusal: str = ""  # why this machine cannot run the case; there are no samples then


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One case over all rounds."""

    seconds: float
    spread: float  # relative standard deviation between rounds; twice it holds a further run, nine times of ten
    by_rank: tuple[float, ...] = ()


def combine(by_case: Mapping[str, Sequence[Record]]) -> dict[str, Measurement]:
    """The middle round of each case, and how far apart its rounds lie.

    The least disturbed round would promise what no step sees: a run is disturbed as a round is, by others on the
    machine and by ranks that wait for one another. A few rounds tell little about their own spread, so that each
    case borrows from its kind, which is the first word of its key: spread² = (b·typical² + ν·own²)/(b + ν) with ν
    one less than its rounds and b the weight of what is borrowed (Smyth 2004, moderated variances). A case of a
    single round has what is typical alone.
    """
    rounds = {key: [record.seconds for record in records] for key, records in by_case.items()}
    typical: dict[str, list[float]] = {}
    for key, seconds in rounds.items():
        if len(seconds) > 1:
            typical.setdefault(_kind(key), []).append(deviation(seconds) / _median_share(len(seconds) - 1))
    found = {}
    for key, records in by_case.items():
        free, own = len(records) - 1, deviation(rounds[key])
        within = statistics.median(record.spread for record in records)
        usual = statistics.median(typical.get(_kind(key), [within]))
        columns = zip(*(record.by_rank for record in records), strict=True)
        found[key] = Measurement(
            seconds=statistics.median(rounds[key]),
            spread=math.sqrt((_BORROWED * usual**2 + free * own**2) / (_BORROWED + free)),
            by_rank=tuple(statistics.median(column) for column in columns),
        )
    return found


def deviation(seconds: Sequence[float]) -> float:
    """Standard deviation of the logarithms: relative, and as large for half the time as for twice it."""
    return statistics.stdev(math.log(max(one, _SHORTEST)) for one in seconds) if len(seconds) > 1 else 0.0


def relative_deviation(values: Sequence[float]) -> float:
    """Median absolute deviation over the median; 0 for values that are 0."""
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values) / middle if middle else 0.0


def _kind(key: str) -> str:
    return key.partition(" ")[0]


def _median_share(free: int) -> float:
    """Median of a standard deviation with so many degrees of freedom, over the true one (Wilson and Hilferty)."""
    return math.pow(1.0 - 2.0 / (9.0 * free), 1.5)


def _parsed(line: str) -> Record | None:
    try:
        data = json.loads(line)
        return Record(**(data | {"by_rank": tuple(data["by_rank"])}))
    except (ValueError, TypeError, KeyError):
        return None


class RecordFolder:
    """The folder beside the output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "records.jsonl"
        self._setting = folder / "setting.json"

    @classmethod
    def beside(cls, output: Path) -> RecordFolder:
        """`OUTPUT.partial`, made if it is not there; an error where nothing can be written."""
        if output.is_dir():
            raise PlannerError(
                "the profile is a file", value=str(output), remedy="give a file, not a folder", key="output"
            )
        folder = output.with_name(f"{output.name}.partial")
        try:
            folder.mkdir(exist_ok=True)
            (folder / "records.jsonl").open("a").close()
        except OSError as error:
            raise PlannerError(
                "the file cannot be written",
                value=f"{output}: {error.strerror or error}",
                remedy="check the folder, its permissions and the space left",
                key="output",
            ) from None
        return cls(folder)

    def open_for(self, setting: Mapping[str, Any]) -> list[Record]:
        """The records of the same setting; those of another are dropped."""
        text = json.dumps(dict(setting), indent=1, sort_keys=True)
        if self._setting.exists() and self._setting.read_text(encoding="utf-8") == text:
            return self.read()
        self._lines.write_text("", encoding="utf-8")
        write_text(self._setting, text)
        return []

    def setting(self) -> dict[str, Any]:
        """What was measured."""
        data: dict[str, Any] = json.loads(self._setting.read_text(encoding="utf-8"))
        return data

    def write_memory(self, facts: Mapping[str, float]) -> None:
        """Memory that the context and the communicators take."""
        write_text(self.folder / "memory.json", json.dumps(dict(facts)))

    def memory(self) -> dict[str, float]:
        """What `write_memory` wrote."""
        data: dict[str, float] = json.loads((self.folder / "memory.json").read_text(encoding="utf-8"))
        return data

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def read(self) -> list[Record]:
        """Every whole record; a line that a kill cut short is dropped, also from the file."""
        records = []
        lines = self._lines.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            record = _parsed(line)
            if record is not None:
                records.append(record)
        if len(records) < len(lines) or not all(line.endswith("\n") for line in lines):
            whole = "".join(json.dumps(asdict(record)) + "\n" for record in records)
            write_text(self._lines, whole)
        return records

    def measurements(self) -> dict[str, Measurement]:
        """All rounds of each case together."""
        by_key: dict[str, list[Record]] = {}
        for record in self.read():
            if not record.refusal:
                by_key.setdefault(record.key, []).append(record)
        return combine(by_key)

    def refusals(self) -> dict[str, str]:
        """The cases that the machine cannot run, and why."""
        return {record.key: record.refusal for record in self.read() if record.refusal}

    def remove(self) -> None:
        """The profile is written: the records have served."""
        shutil.rmtree(self.folder, ignore_errors=True)
