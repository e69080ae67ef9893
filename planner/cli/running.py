"""`tp-plan run`: a plan trains on this machine."""

from __future__ import annotations

from typing import Any

import click

from planner.report.options import common, note, print_json, run_options


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--nproc", default=0, metavar="N", help="Processes to start [one for each GPU of the plan].")
@run_options
@common
def run(plan: str, nproc: int, as_json: bool, **flags: Any) -> None:
    """Train under PLAN on this machine: torchrun's agent starts a process for each of its GPUs.

    Where there are no GPUs the ranks run on the CPU, over gloo. Across machines start torchrun yourself on each,
    with the same flags: torchrun --nnodes N --node-rank I --master-addr HOST --nproc-per-node M -m --
    planner.execute PLAN --steps 1000; without the -- torchrun takes --log for a flag of its own. Exit 1 where a
    rank failed: it is named, with its stage and module, also where its whole host is lost. SIGTERM and Ctrl-C
    write a checkpoint and end the run.
    """
    from planner import api
    from planner.report.measured import measured_lines
    from planner.spec.plan import load_plan

    told = click.get_current_context().obj
    planned = load_plan(plan)  # as it is before the run, which may take days
    measured = api.run(plan, nproc=nproc, quiet=told["quiet"], verbose=told["verbose"], **flags)
    note(f"wrote {flags['measured'] or api.measured_path(plan)}")
    if as_json:
        print_json(measured.to_dict())
    else:
        print("\n".join(measured_lines(measured, planned)))
