"""A table of runs as text: rows of typed cells, each mistake with its file, line and column."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.errors import PlannerError
from planner.spec.files import read_text
from planner.units import MB

_LARGEST_TABLE_BYTES = 64 * MB
_NO_NUMBER = ("", "nan", "na", "n/a", "none", "-")
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row: its cells by column, and where it stands."""

    cells: Mapping[str, str]
    where: str  # file:line

    def text(self, column: str, missing: str = "") -> str:
        """A cell without the blanks around it; `missing` where it is empty or there is no such column."""
        return self.cells.get(column, "").strip() or missing

    def has(self, column: str) -> bool:
        """Whether a cell holds a value."""
        return self.text(column).lower() not in _NO_NUMBER

    def number(self, column: str) -> float | None:
        """A number that is not negative, or None where the cell is empty."""
        if not self.has(column):
            return None
        try:
            value = float(self.text(column))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0.0):
            rule = "a number that is not negative is needed"
            raise self.wrong(column, rule, "give a number, or leave the cell empty")
        return value

    def whole(self, column: str, missing: int = 0) -> int:
        """A whole number (8 and 8.0 alike); `missing` where the cell is empty."""
        value = self.number(column)
        if value is None:
            return missing
        if value != int(value):
            raise self.wrong(column, "a whole number is needed", "give a whole number, or leave the cell empty")
        return int(value)

    def degree(self, column: str) -> int:
        """How many ways something is divided: 1 where the cell is empty."""
        value = self.whole(column, 1)
        if value == 0:
            raise self.wrong(column, "a degree is at least 1", "write 1, or leave the cell empty")
        return value

    def flag(self, column: str) -> bool | None:
        """True or false, or None where the cell is empty."""
        word = self.text(column).lower()
        if word in _NO_NUMBER:
            return None
        if word not in _YES + _NO:
            raise self.wrong(column, "True or False is needed", "write True or False, or leave the cell empty")
        return word in _YES

    def wrong(self, column: str, rule: str, remedy: str) -> PlannerError:
        """The error for a cell."""
        return PlannerError(rule, value=self.text(column), remedy=remedy, key=column, where=self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of a file under its columns."""

    name: str
    columns: tuple[str, ...]
    records: tuple[Record, ...]

    def require(self, columns: Sequence[str]) -> None:
        """Refuse a table that lacks a column; a choice is written `this|that`."""
        for choice in columns:
            options = choice.split("|")
            if not any(option in self.columns for option in options):
                raise PlannerError(
                    f"a table of runs has the column {' or '.join(options)}",
                    value=", ".join(self.columns),
                    remedy="add it; its cells may be empty where the value is not known",
                    key=options[0],
                    where=f"{self.name}:1",
                )


def read_table(path: Path) -> Table:
    """A CSV file; a row of too few or too many cells is an error that names its line."""
    reader = csv.reader(io.StringIO(read_text(path, _LARGEST_TABLE_BYTES).removeprefix("\ufeff")), strict=True)
    columns: tuple[str, ...] = ()
    records: list[Record] = []
    line = 1
    try:
        for cells in reader:
            where = f"{path}:{line}"
            line = reader.line_num + 1
            if not any(cells):
                continue
            if not columns:
                columns = _header(cells, where)
                continue
            if len(cells) != len(columns):
                raise PlannerError(
                    f"a row has a cell for each of the {len(columns)} columns",
                    value=f"{len(cells)} cells",
                    remedy="mend the row: it may be cut off, or text with commas lacks its quotes",
                    key="file",
                    where=where,
                )
            records.append(Record(cells=dict(zip(columns, cells, strict=True)), where=where))
    except csv.Error as error:
        raise PlannerError(
            "the file is not sound CSV",
            value=str(error),
            remedy="mend the quotes of that line; the file may be cut off",
            key="file",
            where=f"{path}:{line}",
        ) from None
    if not records:
        raise PlannerError(
            "a table of runs has a header and a row",
            value=str(path),
            remedy="give a CSV file of measured runs",
            key="file",
        )
    return Table(name=str(path), columns=columns, records=tuple(records))


def words(*texts: str) -> str:
    """Texts as one line in small letters, to look for words in."""
    return re.sub(r"\s+", " ", " | ".join(text for text in texts if text)).lower()


def _header(cells: Sequence[str], where: str) -> tuple[str, ...]:
    columns = tuple(cell.strip() for cell in cells)
    for column in columns:
        if columns.count(column) > 1:
            raise PlannerError(
                "each column has a name of its own",
                value=column,
                remedy="rename or remove one of them",
                key="file",
                where=where,
            )
    return columns
