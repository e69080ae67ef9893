"""What a person meant by a line of a plan that does not fit: the nearest path, the nearest assignment."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from planner.errors import PlannerError
from planner.spec.graph import Block, joined
from planner.spec.paths import breadth, folded, lookup
from planner.spec.plan import ModuleSplit
from planner.spec.regions import canonical
from planner.spec.splits import block_splits, could_be_cut, split_modules

_MOST_LISTED = 5


def nearest_pattern(pattern: str, paths: Iterable[str]) -> str:
    """A remedy that names what is closest to a pattern which matches none of these paths."""
    known = tuple(dict.fromkeys(paths))
    shapes = {_shape(path): path for path in known}
    close = difflib.get_close_matches(_shape(pattern), shapes, n=1)
    listed = tuple(folded(dict.fromkeys(known, 0)))
    if not close:
        more = ", …" if len(listed) > _MOST_LISTED else ""
        return "use one of: " + ", ".join(listed[:_MOST_LISTED]) + more
    guess = _with_numbers_of(pattern, close[0])
    if any(breadth(guess, path) for path in known):
        return f"did you mean {guess}?"
    return f"did you mean {next(item for item in listed if breadth(item, shapes[close[0]]))}?"


def _shape(path: str) -> str:
    """`layers.0-79.mlp` → `layers.*.mlp`."""
    return ".".join("*" if part[:1].isdigit() else part for part in path.split("."))


def _with_numbers_of(pattern: str, shape: str) -> str:
    """A shape with the numbers of a pattern, as far as it has any."""
    numbers = iter([part for part in pattern.split(".") if part[:1].isdigit()])
    return ".".join(next(numbers, part) if part == "*" else part for part in shape.split("."))


def spell_out_misfit(
    block: Block, lines: Mapping[str, ModuleSplit], path: str, *, sequence_parallel: bool
) -> None:
    """Raise for the lines of the block at `path` that differ from the nearest assignment, the first of them named.

    Returns where lines are missing or no assignment is nearer than the one that they ask for.
    """
    said = {
        module: lookup(lines, joined(path, module))
        for module in split_modules(block, block_splits(block), sequence_parallel=sequence_parallel)
    }
    if None in said.values():
        return
    nearest = min(
        (_differing(said, block, whole, sequence_parallel) for whole in _assignments_nearby(block, said)), key=len
    )
    if not nearest:
        return
    (module, wanted), *others = nearest.items()
    full, line = joined(path, module), said[module]
    assert line is not None
    further = "".join(f", and {joined(path, name)} {_written(other)}" for name, other in others)
    raise PlannerError(
        "the splits of a block's modules fit together",
        value=f"{full} with {_written(line)}",
        remedy=f"beside its other modules write {_written(wanted)}{further}",
        key=f"modules.{full}",
    )


def _assignments_nearby(block: Block, said: Mapping[str, ModuleSplit | None]) -> list[frozenset[str]]:
    """What the lines ask for, all or one product less of that, one more, and the usual assignment."""
    could = could_be_cut(block)
    modules = {operator.name: operator.module for operator in block.operators}
    lines = {name: said[modules[name]] for name in could}
    asked = frozenset(name for name, line in lines.items() if line and line.split in ("replicate", "sequence"))
    near = [asked, frozenset[str](), *(asked ^ {name} for name in could)]
    return list(dict.fromkeys(canonical(block, whole) for whole in near))


def _differing(
    said: Mapping[str, ModuleSplit | None], block: Block, whole: frozenset[str], sequence_parallel: bool
) -> dict[str, ModuleSplit]:
    """Modules whose lines are not those of an assignment, with those that are."""
    wanted = split_modules(block, block_splits(block, whole), sequence_parallel=sequence_parallel)
    return {module: line for module, line in wanted.items() if said[module] != line}


def _written(line: ModuleSplit) -> str:
    return f"{{split: {line.split}, input: {line.input}, output: {line.output}}}"
