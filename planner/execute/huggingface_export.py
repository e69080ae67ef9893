"""Weights written as a Hugging Face checkpoint: safetensors of some GB each, their index and the configuration."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from planner.errors import PlannerError
from planner.models.build import build_model
from planner.models.huggingface import names_of_paths, weights_of
from planner.spec.files import write_text
from planner.spec.huggingface import model_type_of, spec_data_from_config
from planner.spec.model import ModelSpec
from planner.units import GB

_BESIDE = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


def export_huggingface(
    folder: str | Path,
    config: Mapping[str, Any],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    shard_bytes: int = 5 * GB,
    writes: bool = True,
) -> None:
    """Write the folder, whole or not at all. `read` gives a whole weight by our path.

    Ranks that gather weights together all call this, since all must read in the same order; one of them writes.
    """
    spec = ModelSpec.from_dict(spec_data_from_config(config))
    if not writes:
        for _ in _stored(spec, config, read, None):
            pass
        return
    with _whole_folder(Path(folder)) as partial:
        used = _write_shards(partial, _stored(spec, config, read, dtype), shard_bytes)
        write_text(partial / "config.json", _config_text(config, used))
        for pattern in _BESIDE:
            for file in tokenizer_from.glob(pattern) if tokenizer_from else ():
                shutil.copy(file, partial / file.name)


def _stored(
    spec: ModelSpec, config: Mapping[str, Any], read: Callable[[str], Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, one after the other, in an order that follows from the model alone."""
    paths = weights_of(build_model(spec, device="meta"))
    for name, (ours, form) in names_of_paths(paths, model_type_of(config)).items():
        parts = [read(path).detach() for path in ours]
        if "#" not in name:
            yield name, form.join(parts, spec).to(dtype or parts[0].dtype)
            continue
        for number in range(parts[0].shape[0]):
            one = [part[number] for part in parts]
            yield name.replace("#", str(number)), form.join(one, spec).to(dtype or parts[0].dtype)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> set[torch.dtype]:
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = held = 0
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        waiting[name] = tensor.clone(memory_format=torch.contiguous_format)  # files hold no views
        held, total = held + tensor.nbytes, total + tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return dtypes
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return dtypes


def _config_text(config: Mapping[str, Any], dtypes: set[torch.dtype]) -> str:
    written = dict(config)
    key = "torch_dtype" if "torch_dtype" in written else "dtype"  # before and since transformers 4.56
    if len(dtypes) == 1:
        written[key] = str(next(iter(dtypes))).removeprefix("torch.")
    written.pop("quantization_config", None)
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def require_new(folder: Path) -> None:
    """Refuse a folder that an export could not make."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PlannerError(
            "an export makes a folder of its own",
            value=f"{folder} is there already",
            remedy="give the name of a new folder",
            key="output",
        )
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PlannerError(
            "the folder can be made",
            value=f"{folder}: {above} is {'not to be written to' if above.is_dir() else 'a file'}",
            remedy="give a folder in one that can be written to",
            key="output",
        )


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the name at the end."""
    partial = folder.parent / f".{folder.name[:50]}.{secrets.token_hex(8)}.part"
    try:
        require_new(folder)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise PlannerError(
            "the folder cannot be written",
            value=f"{folder}: {getattr(error, 'strerror', None) or error}",
            remedy="check the folder above, its permissions and the space left",
            key="output",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
