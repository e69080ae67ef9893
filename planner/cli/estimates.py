"""`tp-plan estimate`: one layout of a training step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.errors import EXIT_ANSWER_IS_NO
from planner.report.options import (
    OutputFile,
    common,
    complete_model,
    note,
    print_json,
    strategy_options,
    workload_options,
)

if TYPE_CHECKING:
    from planner.spec.estimate import Estimate


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--hardware", shell_complete=complete_model, help="The cluster: a profile or a file.")
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="GPUs of it that are used.")
@strategy_options
@workload_options
@click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
@click.option("-o", "--output", type=OutputFile(), help="Write the estimate as YAML.")
@click.option(
    "--timeline", "events", type=OutputFile(), help="Simulate the pipeline and write its events as JSON."
)
@common
def estimate(
    model: str,
    hardware: str | None,
    gpus: int | None,
    no_cache: bool,
    output: str | None,
    events: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Estimate one layout of a training step of MODEL: does it fit, how long does it take, how sure is that.

    MODEL is what trace takes, or a graph that it wrote. Degrees left out are 1, and dp takes the GPUs that
    remain. Or MODEL is a plan, that says all of this itself: then it is estimated anew. Exit 1 where it does not
    fit.
    """
    from planner import api
    from planner.spec.requests import training_request
    from planner.spec.sources import resolve_model

    if api.is_plan(model):
        _require_none({"hardware": hardware, "gpus": gpus} | flags)
        _estimate_plan(model, output, events, use_cache=not no_cache, as_json=as_json)
        return
    if hardware is None or gpus is None:
        raise click.UsageError(f"Missing option '--{'hardware' if hardware is None else 'gpus'}'")
    found, profile = resolve_model(model), api.load_hardware(hardware)
    asked = training_request(found, gpus, flags)
    answer = api.estimate(found, profile, gpus, asked.workload, asked.strategy, use_cache=not no_cache)
    answer = asked.told_with(answer)
    remedies = None if answer.fits else api.remedies(found, profile, answer, use_cache=not no_cache)
    simulated = None
    if events is not None:
        pipeline = api.timeline(found, profile, gpus, asked.workload, answer.strategy, use_cache=not no_cache)
        simulated = pipeline.to_dict()
    _keep(answer, output, simulated, events)
    if as_json:
        further = {} if remedies is None else {"remedies": [remedy.to_dict() for remedy in remedies]}
        print_json(answer.to_dict() | further)
    else:
        from planner.report.estimate import show_estimate

        show_estimate(answer, profile, model=model, hardware=hardware, remedies=remedies)
    _require_fits(answer)


def _estimate_plan(path: str, output: str | None, events: str | None, *, use_cache: bool, as_json: bool) -> None:
    from planner import api

    opened = api.open_plan(path, again=True, use_cache=use_cache)
    answer = opened.plan.estimate
    _keep(answer, output, None if events is None else api.plan_timeline(opened).to_dict(), events)
    if as_json:
        print_json(answer.to_dict())
    else:
        from planner.report.estimate import show_estimate

        show_estimate(answer, opened.profile, model=opened.plan.model, hardware=opened.plan.hardware)
    _require_fits(answer)


def _keep(answer: Estimate, output: str | None, simulated: dict[str, Any] | None, events: str | None) -> None:
    """Write what files were asked for."""
    from planner.spec.files import write_text
    from planner.spec.requests import write_estimate

    if output is not None:
        write_estimate(answer, Path(output))
        note(f"wrote {output}")
    if simulated is not None and events is not None:
        write_text(Path(events), json.dumps(simulated) + "\n")
        note(f"wrote {events}")


def _require_none(flags: dict[str, Any]) -> None:
    given = [f"--{key.replace('_', '-')}" for key, value in flags.items() if value is not None]
    if given:
        raise click.UsageError(f"A plan says all of its layout and work itself, {given[0]} too: edit its file")


def _require_fits(answer: Estimate) -> None:
    if not answer.fits:
        raise click.exceptions.Exit(EXIT_ANSWER_IS_NO)
