"""`tp-plan list`, `trace` and `explain`: what there is, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.report.options import EDITED, OutputFile, common, hint, note, print_json, traced

if TYPE_CHECKING:
    from planner.spec.hardware import HardwareProfile


@click.group(name="list")
def list_() -> None:
    """List what is bundled."""


@list_.command()
@common
def models(as_json: bool) -> None:
    """List the bundled models."""
    from planner import api

    specs = api.list_models()
    if as_json:
        print_json([spec.to_dict() for spec in specs])
        return
    from planner.report.terminal import show_models

    show_models(specs)


@list_.command()
@common
def hardware(as_json: bool) -> None:
    """List the bundled hardware profiles."""
    from planner import api

    profiles = api.list_hardware()
    if as_json:
        print_json([profile.to_dict() for profile in profiles])
        return
    from planner.report.hardware import show_profiles

    show_profiles(profiles)


@click.command()
@traced
@click.option("-o", "--output", type=OutputFile(), help="Write the graph as YAML.")
@common
def trace(
    model: str, dtype: str, lengths: tuple[int, ...], no_cache: bool, output: str | None, as_json: bool
) -> None:
    """Trace MODEL into its operator graph.

    MODEL is a bundled name, a spec file, a Hugging Face config.json or its folder, or file.py:callable that
    returns (module, example).
    """
    from planner import api

    graph = api.trace(model, dtype=dtype, lengths=lengths, use_cache=not no_cache, output=output)
    if output is not None:
        note(f"wrote {output}")
    if as_json:
        print_json(graph.to_dict())
    elif output is None:
        from planner.spec.yaml_text import dump_yaml

        print(dump_yaml(graph.to_dict()), end="")
    else:
        blocks = ", ".join(f"{name} × {count}" for name, count in graph.repeats().items())
        print(f"{graph.name}: {graph.parameter_count:,} parameters; {blocks}")
        print(f"next: tp-plan explain {model}")


@click.command()
@traced
@click.option("--microbatch", default=1, show_default=True, help="Sequences in the microbatch.")
@click.option("--seq-len", default=0, help="Tokens in a sequence [the model's context, at most 4096].")
@click.option("--kv-len", default=0, help="Decode against a cache of so many tokens, the new ones included.")
@click.option("--all", "every_operator", is_flag=True, help="Show operators without weights or products too.")
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Of solving again around a plan: nothing is begun after that [60].",
)
@click.option("-o", "--output", type=OutputFile(), help="Draw a profile's topology as PNG.")
@common
def explain(
    model: str,
    dtype: str,
    lengths: tuple[int, ...],
    no_cache: bool,
    microbatch: int,
    seq_len: int,
    kv_len: int,
    every_operator: bool,
    time_limit: float | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Show MODEL's operators with their sizes, parameters, FLOPs and the bytes kept for backward.

    MODEL may also be a hardware profile: then its links, its kernels and where each number comes from. Or a plan:
    then why it is the best, what lost, which limit binds, what easing it buys and what flips the choice.
    """
    from planner import api
    from planner.spec.hardware_sources import is_hardware

    if is_hardware(model):
        _explain_hardware(api.load_hardware(model), output, as_json)
        return
    if api.is_plan(model):
        _explain_plan(model, time_limit, output, not no_cache, as_json)
        return
    if output is not None:
        raise click.UsageError("--output draws the topology of a hardware profile, and this is a model")
    summary = api.explain(
        model,
        microbatch=microbatch,
        seq_len=seq_len,
        kv_len=kv_len,
        dtype=dtype,
        lengths=lengths,
        use_cache=not no_cache,
    )
    if as_json:
        print_json(summary.to_dict())
        return
    from planner.report.terminal import show_graph

    show_graph(summary, every_operator=every_operator)


def _explain_hardware(profile: HardwareProfile, output: str | None, as_json: bool) -> None:
    if as_json:
        numbers = [{"key": n.key, "value": n.value, "source": n.source, "reference": n.reference}
                   for n in profile.numbers()]  # fmt: skip
        print_json({"profile": profile.to_dict(), "numbers": numbers})
    else:
        from planner.report.hardware import show_hardware

        show_hardware(profile)
    if output is not None:
        from planner.report.hardware import draw_hardware

        draw_hardware(profile, Path(output))
        note(f"wrote {output}")


def _explain_plan(path: str, time_limit: float | None, output: str | None, use_cache: bool, as_json: bool) -> None:
    if output is not None:
        raise click.UsageError("--output draws the topology of a hardware profile, and this is a plan")
    from planner import api

    hint("solving again around the plan: this may take a minute")
    seconds = api.EXPLAINING_SECONDS if time_limit is None else time_limit
    found = api.explain_plan(path, seconds=seconds, use_cache=use_cache)
    if found.opened.edited:
        note(EDITED.format(path))
    if as_json:
        print_json(found.to_dict())
        return
    from planner.report.plan import explain_plan

    explain_plan(found.opened.plan, found.findings, path=path)
