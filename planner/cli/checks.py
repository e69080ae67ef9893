"""`tp-plan verify`: a plan proven before anything is rented."""

from __future__ import annotations

import click

from planner.errors import EXIT_ANSWER_IS_NO
from planner.report.options import common, hint, print_json


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--numerics", is_flag=True, help="Run a small copy on local processes too, against one process.")
@click.option("--nproc", default=8, show_default=True, help="Processes of --numerics, at most.")
@click.option("--transformers", is_flag=True, help="Check the library's module, as planner.parallelize has it.")
@click.option("--no-cache", is_flag=True, help="Trace anew, whatever is cached.")
@common
def verify(plan: str, numerics: bool, nproc: int, transformers: bool, no_cache: bool, as_json: bool) -> None:
    """Dry-run PLAN at its full size in this process, without a GPU: does its executor do what it says?

    For every pipeline rank the collectives of a step are compared (axis, phase, kind, number, bytes), messages
    between stages and the norm for clipping among them, and its peak memory with the plan's interval. With
    --numerics a small copy of the model, laid out alike, runs in fp64: its loss, gradients and a step of AdamW are
    to equal those of one process. With --transformers both are of the library's own module, not of the bundled
    model, which `run` trains. Of FILE.py:FUNCTION both are as planner.parallelize spreads it, and its small copy
    is the module as it is, with fewer ranks, sequences and tokens. A plan that was edited is checked as it stands.
    Exit 1 where something differs.
    """
    from planner import api
    from planner.report.verification import show_verification

    found = api.verify(
        plan, numerics=numerics, transformers=transformers, nproc=nproc, told=hint, use_cache=not no_cache
    )
    if as_json:
        print_json(found.to_dict())
    else:
        show_verification(found)
    if not found.agrees:
        raise click.exceptions.Exit(EXIT_ANSWER_IS_NO)
