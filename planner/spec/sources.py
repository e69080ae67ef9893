"""What stands behind the word MODEL: a bundled name, a spec, a Hugging Face config, a user's file, a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.files import read_text, read_yaml
from planner.spec.graph import Graph
from planner.spec.huggingface import is_huggingface_config, spec_data_from_config
from planner.spec.model import ModelSpec, load_bundled, unknown_model
from planner.spec.yaml_text import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class UserModule:
    """A function of a user's Python file."""

    path: Path
    function: str


ModelLike = str | Path | Mapping[str, Any] | ModelSpec | UserModule | Graph


def resolve_model(model: ModelLike) -> ModelSpec | UserModule | Graph:
    """What a name, path or dict stands for: a spec, a user's function, or a graph that was traced before."""
    if isinstance(model, (ModelSpec, UserModule, Graph)):
        return model
    if isinstance(model, Mapping):
        return _from_data(dict(model), Source(), name="unnamed")
    if not isinstance(model, (str, Path)):
        raise PlannerError(
            "a model is a name, a path or a dict",
            value=type(model).__name__,
            remedy="see `tp-plan list models`",
            key="model",
        )
    text = str(model)
    bundled = load_bundled(text)
    if bundled is not None:
        return ModelSpec.from_dict(bundled)
    named = named_function(text)
    if named is not None:
        return UserModule(path=_existing(named[0]), function=named[1])
    if text.endswith(".py"):
        raise PlannerError(
            "a Python file is given with the function that returns the model",
            value=text,
            remedy=f"write {text}:FUNCTION",
            key="model",
        )
    return _from_path(text)


def named_function(text: str) -> tuple[str, str] | None:
    """The file and the function of `FILE.py:FUNCTION`."""
    file, colon, function = text.rpartition(":")
    return (file, function) if colon and file.endswith(".py") else None


def load_model(model: ModelLike) -> ModelSpec:
    """The spec of a model; a user's file and a traced graph have none."""
    found = resolve_model(model)
    if not isinstance(found, ModelSpec):
        raise PlannerError(
            "a model from a Python file, or a traced graph, has no spec",
            value=str(model) if isinstance(model, (str, Path)) else type(model).__name__,
            remedy="use planner.trace on it",
            key="model",
        )
    return found


def _from_path(text: str) -> ModelSpec | Graph:
    looks_like_path = "/" in text or "\\" in text or text.endswith((".yaml", ".yml", ".json"))
    path = Path(text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name with a NUL, or longer than the system allows
        raise unknown_model(text) from None
    if is_folder and (path / "config.json").is_file():
        path = path / "config.json"
    elif not exists or is_folder:
        raise _missing(text) if looks_like_path or is_folder else unknown_model(text)
    name = path.parent.name if path.name == "config.json" else path.stem
    if path.suffix == ".json":
        return _from_data(_read_json(path), Source(name=str(path)), name=name)
    data, source = read_yaml(path)
    return _from_data(data, source, name=name)


def _from_data(data: Any, source: Source, name: str) -> ModelSpec | Graph:
    if isinstance(data, Mapping) and is_huggingface_config(data):
        return ModelSpec.from_dict(spec_data_from_config(data, name), source)
    if isinstance(data, Mapping) and "blocks" in data and "sequence" in data:
        return Graph.from_dict(data, source)
    if isinstance(data, Mapping):
        data = {"name": name, **data}
    return ModelSpec.from_dict(data, source)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise PlannerError(
            "the file is not sound JSON",
            value=str(error),
            remedy="give the config.json of the model as it was published",
            key="model",
            where=str(path),
        ) from None


def _existing(file: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise _missing(file)
    return path


def _missing(text: str) -> PlannerError:
    return PlannerError(
        "the file or folder does not exist, or holds no config.json",
        value=text,
        remedy="check the path; `tp-plan list models` shows the names that need none",
        key="model",
    )
