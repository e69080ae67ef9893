"""A Hugging Face checkpoint: a folder of safetensors, read under our names and no more of it than is asked for.

Files are mapped into memory, so that of a tensor only the pages of what a rank keeps are read from the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planner.errors import PlannerError
from planner.models.build import build_model
from planner.models.huggingface import Piece, base_prefix, pieces_by_path, weights_of
from planner.spec.files import read_text
from planner.spec.huggingface import model_type_of, spec_data_from_config
from planner.spec.model import ModelSpec
from planner.units import MB

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LARGEST_INDEX_BYTES = 256 * MB
_TABLE, _HEAD = "embedding.tokens.weight", "head.projection.weight"


class HuggingFaceFolder:
    """Weights by the paths of the bundled module. What is missing is refused when the folder is opened."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_object(self.folder / "config.json")
        self.spec = ModelSpec.from_dict(spec_data_from_config(self.config, self.folder.resolve().name))
        self.model_type = model_type_of(self.config)
        files = self._files_by_name()
        prefix = base_prefix(self.model_type)
        if any(name.startswith(prefix) for name in files):
            prefix = ""  # only a model that was saved without its head has names without it
        self._places = {prefix + name: (file, name) for name, file in files.items()}
        self._open: dict[Path, Any] = {}
        self._shapes = {
            path: tuple(w.shape) for path, w in weights_of(build_model(self.spec, device="meta")).items()
        }
        self._pieces = self._pieces_of_model()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of every weight of the model; what is tied stands once."""
        return tuple(self._shapes)

    def __call__(self, path: str) -> Tensor:
        """A whole weight, a view of the file where it is stored as it is or transposed."""
        return self.rows(path)

    def rows(self, path: str, first: int = 0, count: int | None = None) -> Tensor:
        """Some rows of a weight: along its first dim, which for experts is their number."""
        if path == _HEAD and self.spec.tied_embeddings:
            path = _TABLE
        if path not in self._shapes:
            raise KeyError(path)
        pieces, shape = self._pieces[path], self._shapes[path]
        count = shape[0] - first if count is None else count
        if pieces[0].expert is None:
            whole = self._piece(pieces[0])
            self._require(path, tuple(whole.shape), shape)
            return whole.narrow(0, first, count)
        chosen = [self._piece(piece) for piece in pieces[first : first + count]]
        self._require(path, (len(pieces), *chosen[0].shape), shape)
        return torch.stack(chosen)

    def _piece(self, piece: Piece) -> Tensor:
        return piece.form.split(self._read(piece.name), self.spec)[piece.part]

    def _read(self, name: str) -> Tensor:
        file, stored_as = self._places[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(stored_as)
        except (SafetensorError, OSError) as error:
            raise _broken(file, str(error)) from None
        return tensor

    def _files_by_name(self) -> dict[str, Path]:
        """Which file each tensor is in. Every file must be whole."""
        index, single = self.folder / _INDEX, self.folder / _SINGLE
        if index.is_file():
            places = _read_object(index, _LARGEST_INDEX_BYTES).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
                raise _broken(index, "no weight_map from tensors to files")
            files = {name: self.folder / Path(place).name for name, place in places.items()}
        elif single.is_file():
            files = dict.fromkeys(_names_in(single), single)
        else:
            raise PlannerError(
                "weights are read from safetensors",
                value=f"{self.folder}: neither {_SINGLE} nor {_INDEX}",
                remedy="give a folder that save_pretrained wrote, or convert its weights to safetensors",
                key="weights",
            )
        for file in sorted(set(files.values())):
            absent = {name for name, place in files.items() if place == file} - _names_in(file)
            if absent:
                raise _broken(file, f"the index promises {min(absent)}, which is not in it")
        return files

    def _pieces_of_model(self) -> dict[str, list[Piece]]:
        try:
            found = pieces_by_path(self._places, self.model_type, files=True)
        except ValueError as error:
            raise PlannerError(
                f"each tensor of the checkpoint is a weight of a {self.model_type} model",
                value=str(error),
                remedy="give an unquantised checkpoint of this model type",
                key="weights",
                where=str(self.folder),
            ) from None
        missing = self._missing(found)
        if missing:
            raise PlannerError(
                f"the checkpoint holds every weight of the model; {len(missing)} missing",
                value=missing[0],
                remedy="fetch the checkpoint again, or mend its config.json",
                key="weights",
                where=str(self.folder),
            )
        surplus = [path for path in found if path not in self._shapes and not self._may_be_left(path)]
        if surplus:
            raise PlannerError(
                "each tensor of the checkpoint is a weight of the model that its config.json describes",
                value=surplus[0],
                remedy="mend the config.json",
                key="weights",
                where=str(self.folder),
            )
        return {path: sorted(found[path], key=lambda piece: piece.expert or 0) for path in self._shapes}

    def _missing(self, found: Mapping[str, list[Piece]]) -> list[str]:
        missing = [path for path in self._shapes if path not in found]
        experts = set(range(self.spec.moe.experts if self.spec.moe else 0))
        for path in self._shapes.keys() & found.keys():
            held = {piece.expert for piece in found[path]}
            if None not in held and experts - held:
                missing.append(f"{path} of expert {min(experts - held)}")
        return sorted(missing)

    def _may_be_left(self, path: str) -> bool:
        """A tied head that was stored too, and layers behind the last that predict further tokens."""
        parts = path.split(".")
        behind = parts[0] == "blocks" and int(parts[1]) >= self.spec.layers
        return behind or (path == _HEAD and self.spec.tied_embeddings)

    @staticmethod
    def _require(path: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if given != wanted:
            raise PlannerError(
                "a weight of the checkpoint has the shape that its config.json says",
                value=f"{path} is {given}, wanted {wanted}",
                remedy="mend the config.json, or fetch the checkpoint again",
                key="weights",
            )


def _names_in(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _broken(file, str(error)) from None


def _read_object(file: Path, largest_bytes: int = 4 * MB) -> dict[str, Any]:
    try:
        data = json.loads(read_text(file, largest_bytes))
    except (ValueError, RecursionError) as error:
        raise _broken(file, str(error)) from None
    if not isinstance(data, Mapping):
        raise _broken(file, "no mapping")
    return dict(data)


def _broken(file: Path, reason: str) -> PlannerError:
    return PlannerError(
        "a file of the checkpoint is whole",
        value=reason,
        remedy="fetch it again",
        key="weights",
        where=str(file),
    )
