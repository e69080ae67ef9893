"""Weights of a Hugging Face model under our names, and ours under theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from planner.errors import PlannerError
from planner.models.huggingface_forms import AS_IT_IS, Form
from planner.models.huggingface_names import FILE_TABLES, TABLES, Table
from planner.spec.model import ModelSpec

# tables of positions and masks that older files hold, though they follow from the configuration
_COMPUTED = re.compile(r"(.*\.)?(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass(frozen=True, slots=True)
class Piece:
    """One of their tensors, as a part of which ours is found; of one expert alone where it has a number."""

    name: str
    form: Form
    part: int
    expert: int | None = None


def table_of(model_type: str, *, files: bool) -> Table:
    """The names of an architecture: those of a module, or those that checkpoints have."""
    table = (FILE_TABLES if files else TABLES).get(model_type)
    if table is None:
        raise PlannerError(
            "weights are read and written for " + ", ".join(sorted(TABLES)),
            value=model_type,
            remedy="convert the checkpoint to one of these",
            key="model_type",
        )
    return table


def pieces_by_path(names: Iterable[str], model_type: str, *, files: bool = False) -> dict[str, list[Piece]]:
    """Our paths, each with the tensors of theirs that it is made of: one, or one for each expert."""
    table = table_of(model_type, files=files)
    found: dict[str, list[Piece]] = {}
    for name in names:
        if _COMPUTED.fullmatch(name) and not _rules_for(name, table):
            continue
        targets, form, expert = _target(name, table)
        for part, target in enumerate(targets):
            others = found.setdefault(target, [])
            if any(other.expert == expert for other in others):
                raise ValueError(f"{target} is set twice, the second time from {name}")
            others.append(Piece(name, form, part, expert))
    return found


def names_of_paths(paths: Iterable[str], model_type: str) -> dict[str, tuple[list[str], Form]]:
    """The names that a checkpoint has, each with our paths that it is joined from; `#` is any expert."""
    inverse = [
        (_pattern(target), name, targets, form)
        for name, rule in table_of(model_type, files=True).items()
        for targets, form in [_spread_rule(rule)]
        for target in targets
    ]
    found: dict[str, tuple[list[str], Form]] = {}
    for path in paths:
        known: set[str] = set()
        for pattern, name, targets, form in inverse:
            match = pattern.fullmatch(path)
            if match:
                theirs = _filled(name, match.groups())
                known.add(theirs)
                found[theirs] = [_filled(target, match.groups()) for target in targets], form
        if len(known) != 1:
            raise PlannerError(
                f"each weight of {model_type} has one name in its checkpoints",
                value=f"{path}: {', '.join(sorted(known)) or 'none'}",
                remedy="export a model of another type, or save with tp-plan's own checkpoints",
                key="model_type",
            )
    return found


def translate(theirs: Mapping[str, Tensor], model_type: str, spec: ModelSpec) -> dict[str, Tensor]:
    """A module's weights, or their gradients, under our names. Every one is used, none of ours set twice."""
    found = pieces_by_path(theirs, model_type)
    return {
        path: piece.form.split(theirs[piece.name], spec)[piece.part]
        for path, pieces in found.items()
        for piece in pieces
    }


def joined(read: Callable[[str], Tensor], model_type: str, spec: ModelSpec) -> Callable[[str], Tensor]:
    """Reads a module's weights by their names, given what reads them by ours."""
    table = table_of(model_type, files=False)

    def read_theirs(name: str) -> Tensor:
        paths, form, _ = _target(name, table)
        return form.join([read(path) for path in paths], spec)

    return read_theirs


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that a checkpoint stores; what is tied counts once."""
    stored = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in stored}
    return dict(module.named_parameters()) | buffers


def module_paths(model_type: str) -> dict[str, str]:
    """Modules that hold weights: theirs, each with ours. What is three of ours counts as the first of them."""
    found: dict[str, str] = {}
    for name, rule in table_of(model_type, files=False).items():
        targets, _ = _spread_rule(rule)
        found.setdefault(name.rpartition(".")[0], targets[0].rpartition(".")[0])
    attention = next(theirs for theirs, ours in found.items() if ours == "blocks.*.attention.query")
    return found | {f"{attention.rpartition('.')[0]}.core": "blocks.*.attention.core"}


def base_prefix(model_type: str) -> str:
    """What stands before the names of a checkpoint with a head, and not before those of one without."""
    return next(iter(table_of(model_type, files=True))).partition(".")[0] + "."


def _target(name: str, table: Table) -> tuple[list[str], Form, int | None]:
    """Our names for one of theirs, its form and the number of its expert."""
    found = _rules_for(name, table)
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules for {name}")
    return found[0]


def _rules_for(name: str, table: Table) -> list[tuple[list[str], Form, int | None]]:
    found = []
    for pattern, rule in table.items():
        match = _pattern(pattern).fullmatch(name)
        if match:
            targets, form = _spread_rule(rule)
            groups = list(match.groups())
            before, number, _ = pattern.partition("#")
            expert = int(groups.pop(before.count("*"))) if number else None
            found.append(([_filled(target, groups) for target in targets], form, expert))
    return found


@lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*", r"([^.]+?)").replace(r"\#", r"(\d+)"))


def _filled(pattern: str, parts: Iterable[str]) -> str:
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


def _spread_rule(rule: str | tuple[str, Form]) -> tuple[list[str], Form]:
    target, form = (rule, AS_IT_IS) if isinstance(rule, str) else rule
    return _spread(target), form


def _spread(target: str) -> list[str]:
    """`a.{b,c}.d` → `a.b.d`, `a.c.d`."""
    head, brace, rest = target.partition("{")
    if not brace:
        return [target]
    choices, _, tail = rest.partition("}")
    return [head + choice + tail for choice in choices.split(",")]
