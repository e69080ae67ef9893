"""Training data: one long run of tokens, cut into windows of a sequence and the token after it.

`synthetic` draws tokens that depend on seed and place alone. A file holds tokens one after another, little-endian,
without a header: uint16 where the vocabulary has at most 65,536 words, else uint32, unless `--data-dtype` says
which. A folder is a Hugging Face dataset as `save_to_disk` writes it, with a column `input_ids`.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.errors import PlannerError
from planner.execute.order import mixed, windows_at
from planner.spec.training_run import SYNTHETIC, TrainingRun

Tokens = npt.NDArray[Any]

_LOOKED_AT_FIRST = 1 << 24  # tokens whose values are checked before a run starts
_COLUMN = "input_ids"


class TokenSource(Protocol):
    """A run of tokens."""

    def __len__(self) -> int: ...

    def read(self, first: int, count: int) -> Tokens:
        """`count` tokens from a place on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What a run reads: the same global batch at the same place, whatever the layout."""

    source: TokenSource | None  # none: tokens are made up
    name: str
    vocab: int
    length: int  # of a sequence
    seed: int

    @property
    def told(self) -> str:
        """What it is, so that a resumed run sees whether it is the same."""
        return self.name if self.source is None else f"{Path(self.name).resolve()}, {len(self.source):,} tokens"

    @property
    def windows(self) -> int:
        """Sequences that the data has; each shares its last token with the next one's first."""
        assert self.source is not None
        return (len(self.source) - 1) // self.length

    def batch(self, first: int, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Tokens and labels [rows, length] of the sequences from a place of the run on."""
        read = np.stack(self._windows(first, rows))
        both = torch.from_numpy(read.astype(np.int64, copy=False))
        if torch.device(device).type == "cuda":
            both = both.pin_memory()
        both = both.to(device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _windows(self, first: int, rows: int) -> list[Tokens]:
        span = self.length + 1
        if self.source is None:
            makers = (np.random.default_rng(mixed(self.seed, place)) for place in range(first, first + rows))
            return [maker.integers(self.vocab, size=span) for maker in makers]
        places = np.arange(first, first + rows, dtype=np.uint64)
        return [self._checked(int(window)) for window in windows_at(places, self.windows, self.seed)]

    def _checked(self, window: int) -> Tokens:
        assert self.source is not None
        tokens = self.source.read(window * self.length, self.length + 1)
        require_known(tokens, self.vocab, self.name, window * self.length)
        return tokens


def open_data(run: TrainingRun, *, vocab: int, length: int) -> TrainingData:
    """The data of a run, or a PlannerError that says what is wrong with it."""
    if run.data == SYNTHETIC:
        return TrainingData(source=None, name=SYNTHETIC, vocab=vocab, length=length, seed=run.seed)
    path = Path(run.data)
    if not path.exists():
        raise PlannerError(
            "the data exists",
            value=run.data,
            remedy=f"give a file of tokens, the folder of a dataset, or {SYNTHETIC}",
            key="data",
        )
    source: TokenSource = ArrowFolder(path) if path.is_dir() else TokenFile(path, _dtype(run, vocab))
    if len(source) < length + 1:
        raise PlannerError(
            f"the data has at least one sequence of {length} tokens and the one after",
            value=f"{run.data}: {len(source)} tokens",
            remedy="give more data, or plan with a shorter --seq-len",
            key="data",
        )
    first = source.read(0, min(len(source), _LOOKED_AT_FIRST))
    require_known(first, vocab, run.data, 0)
    if run.data_dtype == "auto" and isinstance(source, TokenFile) and first[::2].any() and not first[1::2].any():
        raise PlannerError(
            "tokens of a file are as wide as its vocabulary asks for, unless --data-dtype says otherwise",
            value=f"read as {_dtype(run, vocab)}, every second token is 0: {run.data}",
            remedy="say how wide its tokens were written: --data-dtype uint16 or uint32",
            key="data_dtype",
        )
    return TrainingData(source=source, name=run.data, vocab=vocab, length=length, seed=run.seed)


def require_known(tokens: Tokens, vocab: int, name: str, first: int) -> None:
    """Refuse tokens that the model has no row for."""
    highest, lowest = int(tokens.max()), int(tokens.min())
    if highest < vocab and lowest >= 0:
        return
    place = int(tokens.argmax() if highest >= vocab else tokens.argmin())
    raise PlannerError(
        f"a token is one of the model's {vocab}",
        value=f"{name}: {highest if highest >= vocab else lowest} at token {first + place}",
        remedy="use the data of this model's tokenizer; --data-dtype says how wide a token of a file is",
        key="data",
    )


class TokenFile:
    """Tokens of a fixed width one after another, mapped into memory."""

    def __init__(self, path: Path, dtype: str) -> None:
        wide = np.dtype(dtype).newbyteorder("<")
        try:
            size = path.stat().st_size
            self._tokens: Tokens = np.memmap(path, dtype=wide, mode="r") if size else np.empty(0, wide)
        except (OSError, ValueError) as error:
            told = isinstance(error, ValueError)
            rule = f"a file of {dtype} tokens is a multiple of {wide.itemsize} bytes long" if told else ""
            raise PlannerError(
                rule or "the data can be read",
                value=f"{path}: " + (f"{size} bytes" if told else str(error.strerror)),  # type: ignore[union-attr]
                remedy="see which width its tokens have (--data-dtype), and whether it was written to the end",
                key="data",
            ) from None

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, first: int, count: int) -> Tokens:
        """`count` tokens from a place on."""
        return self._tokens[first : first + count]


class ArrowFolder:
    """The documents of a dataset one after another, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise PlannerError(
                "a dataset is read with pyarrow",
                value=f"{folder}, and pyarrow is not installed",
                remedy="pip install pyarrow, or give the tokens as a file",
                key="data",
            )
        chunks = [chunk for path in _arrow_files(folder) for chunk in _documents(path)]
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, first: int, count: int) -> Tokens:
        """`count` tokens from a place on, across documents and files."""
        number = int(np.searchsorted(self._starts, first, "right")) - 1
        parts: list[Tokens] = []
        while count:
            within = first - int(self._starts[number])
            parts.append(self._chunks[number][within : within + count])
            first, count, number = first + len(parts[-1]), count - len(parts[-1]), number + 1
        return np.concatenate(parts)


def _arrow_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    try:
        told = json.loads(state.read_text())
        names = [entry["filename"] for entry in told["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        inside = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise PlannerError(
            "a folder of data is a dataset that save_to_disk wrote",
            value=f"{folder} has no sound state.json",
            remedy=f"give one of its parts, {', '.join(inside)}" if inside else "write it with save_to_disk",
            key="data",
        ) from None
    if told.get("_indices_files"):
        raise PlannerError(
            "a dataset is read in the order of its files",
            value=f"{folder} was shuffled or filtered and holds indices",
            remedy="call flatten_indices() before save_to_disk",
            key="data",
        )
    return [folder / name for name in names]


def _documents(path: Path) -> list[Tokens]:
    import pyarrow as arrow

    try:
        column = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all().column(_COLUMN)
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise _untokenized(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not arrow.types.is_integer(getattr(column.type, "value_type", column.type)) or column.type.num_fields != 1:
        raise _untokenized(path, f"one of {column.type}")
    documents = [chunk.flatten() for chunk in column.chunks]
    if any(tokens.null_count for tokens in documents):
        raise _untokenized(path, "some tokens are null")
    return [tokens.to_numpy() for tokens in documents]


def _untokenized(path: Path, value: str) -> PlannerError:
    return PlannerError(
        f"a dataset has a column {_COLUMN} of lists of tokens",
        value=f"{path}: {value}",
        remedy="tokenize it, and save it again",
        key="data",
    )


def _dtype(run: TrainingRun, vocab: int) -> str:
    if run.data_dtype != "auto":
        return run.data_dtype
    return "uint16" if vocab <= 1 << 16 else "uint32"
