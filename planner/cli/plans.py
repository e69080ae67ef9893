"""`tp-plan plan`, `compare` and `sweep`: the best plan with its proof, plans side by side, where it changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.errors import EXIT_ANSWER_IS_NO
from planner.report.options import (
    EDITED,
    OutputFile,
    common,
    complete_model,
    hint,
    note,
    print_json,
    wish_options,
    workload_options,
)
from planner.report.streams import search_bar

if TYPE_CHECKING:
    from planner.spec.sweep import SweepPoint

_WORTH_SAYING = 1e-9  # of a gap


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--hardware", required=True, shell_complete=complete_model, help="The cluster: a profile or a file.")
@click.option(
    "--gpus",
    required=True,
    metavar="N|A..B",
    help="GPUs of it; of a range powers of two, even parts of a node and whole nodes are tried.",
)
@workload_options
@wish_options
@click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
@click.option("-o", "--output", type=OutputFile(), help="Write the plan as YAML.")
@common
def plan(
    model: str, hardware: str, gpus: str, no_cache: bool, output: str | None, as_json: bool, **flags: Any
) -> None:
    """Find the best plan for training MODEL, and prove it: degrees, splits, stages, recomputation, schedule.

    Ctrl-C or --time-limit gives the best so far, and how much a better one could save at most. Exit 1 where no
    layout fits: then what binds, and what would fit.
    """
    from planner import api
    from planner.report.outputs import require_writable
    from planner.spec.files import require_apart

    if output is not None:
        require_apart({"output": output}, {"model": model, "hardware": hardware})
        require_writable(Path(output))
    request = api.plan_request(model, hardware, gpus, **plan_keys(flags))
    if flags["global_batch"] is None and request.workload.global_batch != api.USUAL_BATCH:
        note(f"global batch {request.workload.global_batch}, which the GPUs can run; --global-batch sets it")
    started = time.perf_counter()
    with search_bar(quiet=click.get_current_context().obj["quiet"]) as hear:
        found = api.planned(request, progress=hear, told=hint, use_cache=not no_cache)
    seconds = time.perf_counter() - started
    if output is not None:
        found.save(output)
        note(f"wrote {output}")
    if as_json:
        print_json(found.to_dict() | {"seconds": seconds})
    else:
        from planner.report.plan import show_plan

        show_plan(found, request.profile, path=output or "plan.yaml")
    proof = found.certificate
    if proof is not None and proof.gap > _WORTH_SAYING:
        note(f"ended early: the best so far, from which a better one could save {100 * proof.gap:.2g} % at most")
    note(f"searched in {seconds:.1f} s" + ("" if output else "; -o plan.yaml keeps the plan"))


def plan_keys(flags: dict[str, Any]) -> dict[str, Any]:
    """What `api.plan_request` calls the flags of a workload and of wishes; those left out are left out."""
    from planner.spec.requests import WORKLOAD_KEYS

    given = {key: list(value) if isinstance(value, tuple) else value for key, value in flags.items()}
    told = {key: value for key, value in given.items() if value not in (None, [], False) or key in WORKLOAD_KEYS}
    workload = {key: value for key, value in told.items() if key in WORKLOAD_KEYS and value is not None}
    wishes = {key: value for key, value in told.items() if key not in WORKLOAD_KEYS}
    return wishes | {"workload": workload, "fix": ",".join(wishes.get("fix", []))}


@click.command()
@click.argument("plans", nargs=-1, required=True, type=click.Path())
@click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
@click.option("-o", "--output", type=OutputFile(), help="Write a page (.html) or a picture (.png).")
@common
def compare(plans: tuple[str, ...], no_cache: bool, output: str | None, as_json: bool) -> None:
    """Set PLANS side by side: which is the fastest and why, their memory, pipelines and differences.

    PLAN measured.json sets a plan beside what a run of it measured. A plan that was edited since it was made is
    estimated again.
    """
    from planner import api

    if len(plans) == 2 and plans[1].endswith(".json"):
        _compare_run(*plans, output=output, use_cache=not no_cache, as_json=as_json)
        return
    from planner.report.compare import comparison_data, show_comparison

    entries = api.compare(plans, output, use_cache=not no_cache, heard=lambda path: note(EDITED.format(path)))
    if output is not None:
        note(f"wrote {output}")
    if as_json:
        print_json(comparison_data(entries))
    else:
        show_comparison(entries)


def _compare_run(plan: str, measured: str, *, output: str | None, use_cache: bool, as_json: bool) -> None:
    from planner import api
    from planner.report.run_comparison import show_run_comparison

    if output is not None:
        raise click.UsageError("a run is compared on the terminal or with --json: leave -o out")
    found = api.compare_run(plan, measured, use_cache=use_cache)
    if as_json:
        print_json(found.to_dict())
    else:
        show_run_comparison(found)


@click.command()
@click.argument("model", metavar="PLAN|MODEL", shell_complete=complete_model)
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=A:B|KEY=V,…",
    help="A parameter and its range, such as inter_node_bandwidth=0.25x:4x, or values; two for a map.",
)
@click.option("--pareto", is_flag=True, help="Lower the memory that a GPU may take: speed against memory.")
@click.option("--hardware", shell_complete=complete_model, help="The cluster, beside a MODEL.")
@click.option("--gpus", metavar="N", help="GPUs of it, beside a MODEL.")
@workload_options
@wish_options
@click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
@click.option("-o", "--output", type=OutputFile(), help="Draw it as PNG.")
@common
def sweep(
    model: str,
    vary: tuple[str, ...],
    pareto: bool,
    no_cache: bool,
    output: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Plan again at every point of a parameter, and show where the best plan changes.

    Of a plan's file model, cluster, work and wishes are the plan's. A KEY is gpus, one of the work (seq_len,
    global_batch, …), max_memory in GiB, inter_node_bandwidth, intra_node_bandwidth, memory_bandwidth, memory,
    peak_flops, or any dotted key of the profile. Ctrl-C ends it with the points that are solved.
    """
    from planner import api

    if bool(vary) == pareto:
        raise click.UsageError("--vary names a parameter, --pareto asks for speed against memory: give one")
    done = 0

    def told(point: SweepPoint, of: int) -> None:
        nonlocal done
        done += 1
        hint(f"{done} of {of}: {point.label}")

    keys = {"hardware": flags.pop("hardware"), "gpus": flags.pop("gpus"), **plan_keys(flags)}
    found = api.sweep(model, vary, told=told, output=output, use_cache=not no_cache, **keys)
    if output is not None:
        note(f"wrote {output}")
    if as_json:
        print_json(found.to_dict())
    else:
        from planner.report.sweep import show_sweep

        show_sweep(found)
    if not any(point.strategy for point in found.points):
        raise click.exceptions.Exit(EXIT_ANSWER_IS_NO)
