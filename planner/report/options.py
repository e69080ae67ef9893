"""The flags of the command line: those that every verb has, of tracing, of a training request, of a plan's wishes.

Those of a request are made from its dataclasses: keys, words and defaults cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import click

from planner.report.streams import tell
from planner.spec.codec import field_types
from planner.spec.requests import OVERLAPS, STRATEGY_KEYS, WORKLOAD_KEYS
from planner.spec.strategy import AXES, Strategy
from planner.spec.training_run import RUN_KEYS, TrainingRun
from planner.spec.wishes import RECOMPUTES, SCHEDULES
from planner.spec.workload import TrainWorkload

_F = TypeVar("_F", bound=Callable[..., Any])

EDITED = "{} was edited since it was made: estimated again"

_HELP = {
    "tp": "Tensor-parallel ranks: layers cut across them.",
    "pp": "Pipeline stages.",
    "dp": "Data-parallel replicas [what the other degrees leave of the GPUs].",
    "cp": "Context-parallel ranks: the sequence cut across them.",
    "ep": "Ranks that experts are spread over.",
    "etp": "Tensor-parallel ranks of one expert.",
    "vpp": "Virtual stages that a pipeline rank holds.",
    "microbatch": "Sequences in a microbatch.",
    "zero": "State sharded over dp: 1 optimizer, 2 and gradients, 3 and parameters.",
    "dp_replicate": "Copies of the sharded state among the dp ranks (HSDP).",
    "sp": "Cut activations between tensor-parallel regions along the sequence.",
    "recompute": "What backward computes again; auto: the least that fits.",
    "schedule": "Order of the pipeline's work [1f1b; interleaved with vpp].",
    "order": "Mesh axes, neighbouring ranks first.",
    "overlap": "Communication beside computation, or none.",
    "grad_dtype": "Precision that gradients are summed in.",
    "seq_len": "Tokens in a sequence [the model's context, at most 4096].",
    "global_batch": "Sequences in a step [256, or the nearest that divides].",
    "precision": "Of the matrix products [bf16].",
    "optimizer": "Whose state is kept.",
    "stack": "Software that runs it: its kernels, launches and memory.",
    "imbalance": "Tokens of the busiest expert rank over their mean.",
    "loss_in_place": "Gradients overwrite probabilities, instead of F.cross_entropy.",
    "data": "synthetic, a file of tokens, or the folder of a Hugging Face dataset.",
    "data_dtype": "Of a token in a file [uint16 where the vocabulary fits].",
    "steps": "Of the optimizer, those before a resume included.",
    "lr": "Highest learning rate.",
    "min_lr": "Where its cosine ends [a tenth of --lr].",
    "warmup": "Steps from nothing to --lr.",
    "weight_decay": "Of AdamW; norms and biases do not decay.",
    "beta1": "Of AdamW.",
    "beta2": "Of AdamW.",
    "clip": "Greatest norm of the gradients; 0: not clipped.",
    "seed": "Of weights, dropout and the order of the data.",
    "dtype": "Of weights and optimizer; fp64 computes in it too.",
    "compile": "Run each block through torch.compile; the first step takes minutes.",
    "context": "Keys and values over cp: gathered, or passed around torch's ring.",
    "device": "What ranks run on.",
    "weights": "Start from a Hugging Face FOLDER of safetensors [drawn from the seed].",
    "export": "Write the weights as a Hugging Face FOLDER at the end [none].",
    "checkpoint": "Keep checkpoints in this FOLDER [none].",
    "every": "Steps between checkpoints [at the end alone].",
    "keep": "Checkpoints that are kept.",
    "resume": "Go on from the last whole checkpoint, if there is one.",
    "log": "Write metrics as JSON lines to this FILE [none].",
    "measured": "Write what was measured to this FILE [measured.json beside the plan].",
    "timeout": "Seconds that ranks wait for one another [30 predicted steps, at least 300].",
}  # what an own default stands for is told here; the others follow from the dataclass

_PLACES = {
    "data": "SOURCE",
    "checkpoint": "FOLDER",
    "weights": "FOLDER",
    "export": "FOLDER",
    "log": "FILE",
    "measured": "FILE",
}


def strategy_options(function: _F) -> _F:
    """A flag for each key of a training strategy."""
    return _with_flags(function, Strategy, STRATEGY_KEYS)


def workload_options(function: _F) -> _F:
    """A flag for each key of a training workload."""
    return _with_flags(function, TrainWorkload, WORKLOAD_KEYS)


def run_options(function: _F) -> _F:
    """A flag for each thing that a plan leaves open of a run."""
    return _with_flags(function, TrainingRun, RUN_KEYS)


def wish_options(function: _F) -> _F:
    """A flag for each thing that a plan may have to keep to, or to be best at."""
    flags = (
        click.option("--fix", multiple=True, metavar="KEY=VALUE,…",
                     help="Hold keys of the strategy, such as tp=8,pp=4; may be repeated."),
        click.option("--max-memory", metavar="SIZE", help="Of a GPU, such as 70GiB [all it has]."),
        click.option("--memory-margin", type=float, metavar="SHARE",
                     help="Of the memory, kept free above an estimate's upper end [0]."),
        click.option("--no-recompute", is_flag=True, help="Recompute nothing; short for --recompute none."),
        click.option("--recompute", multiple=True, type=click.Choice(RECOMPUTES),
                     help="What a block may recompute; may be repeated [any]."),
        click.option("--schedule", multiple=True, type=click.Choice(SCHEDULES),
                     help="Of the pipeline; may be repeated [any]."),
        click.option("--minimize", type=click.Choice(["time", "gpus", "cost"]),
                     help="Of a step, GPUs for a --deadline, or cost of a token at a --price [time]."),
        click.option("--deadline", type=float, metavar="SECONDS", help="Longest step that will do."),
        click.option("--price", type=float, metavar="AMOUNT", help="Of a GPU for an hour."),
        click.option("--time-limit", type=float, metavar="SECONDS",
                     help="End the search with the best so far [until proven best]."),
        click.option("--solver", type=click.Choice(["highs", "cbc"]), help="Of the integer programs [highs]."),
    )  # fmt: skip
    for flag in reversed(flags):
        function = flag(function)
    return function


def _with_flags(function: _F, cls: type, keys: tuple[str, ...]) -> _F:
    kinds = field_types(cls)
    defaults = {item.name: item.default for item in dataclasses.fields(cls)}
    for key in reversed(keys):
        function = _flag(key, kinds[key], defaults[key])(function)
    return function


def _flag(key: str, kind: Any, default: Any) -> Callable[[_F], _F]:
    """One flag; nothing is checked here, since the codec says better what is wrong."""
    name, text = key.replace("_", "-"), _HELP[key]
    plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    if plain is bool:
        return click.option(f"--{name}/--no-{name}", key, default=None, help=f"{text[:-1]} [{_shown(default)}].")
    words = typing.get_args(plain) if typing.get_origin(plain) is Literal else ()
    told = text if "[" in text else f"{text[:-1]} [{_shown(default)}]."

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return click.option(
        f"--{name}",
        key,
        type=plain if plain in (int, float) else str,
        metavar=_metavar(key, words, plain),
        shell_complete=complete if words else None,
        help=told,
    )


def _metavar(key: str, words: tuple[str, ...], plain: Any) -> str:
    if key == "overlap":
        return ",".join(OVERLAPS)
    if key == "order":
        return "-".join(AXES)
    if key in _PLACES:
        return _PLACES[key]
    return "|".join(words) or ("NUMBER" if plain is float else "N")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if dataclasses.is_dataclass(default):
        return ",".join(axis for axis in OVERLAPS if getattr(default, axis)) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


class OutputFile(click.Path):
    """A file or folder to write; a flag that follows -o is not taken for its name."""

    def __init__(self, *, folder: bool = False) -> None:
        super().__init__(dir_okay=folder, file_okay=not folder)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as given."""
        if str(value).startswith("-"):
            self.fail(f"{value!r} is a flag, not a file (a file of that name is written ./{value})", param, ctx)
        return super().convert(value, param, ctx)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that every verb has."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")
    @click.option("-q", "--quiet", is_flag=True, help="Print results only.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more; show the traceback of a bug.")
    @functools.wraps(function)
    def wrapped(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        context = click.get_current_context()
        context.obj = {"quiet": quiet, "verbose": verbose}
        return function(*args, **kwargs)

    return wrapped


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A word on stderr, unless --quiet."""
    if not click.get_current_context().obj["quiet"]:
        tell(text)


def hint(text: str) -> None:
    """The same where a person waits at a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        note(text)


def complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from planner.spec.files import bundled_names

    known = [*bundled_names("model_specs"), *bundled_names("hardware_profiles")]
    names = [CompletionItem(name) for name in known if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


def _lengths(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("three whole numbers are needed, such as 64,128,192") from None


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument MODEL and the flags of tracing."""
    model = click.argument("model", shell_complete=complete_model)
    dtype = click.option("--dtype", default="bf16", show_default=True, help="Precision to trace in.")
    lengths = click.option(
        "--lengths", default="", callback=_lengths, help="Lengths to trace an own module at [64,128,192]."
    )
    cache = click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
    return model(dtype(lengths(cache(function))))
