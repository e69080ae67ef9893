"""`tp-plan profile` and `validate`: this machine measured, and estimates beside measured runs."""

from __future__ import annotations

import math

import click

from planner.errors import EXIT_ANSWER_IS_NO
from planner.report.options import OutputFile, common, note, print_json


@click.command()
@click.option("-o", "--output", type=OutputFile(), help="Write the profile, which --hardware takes.")
@click.option("--nproc", default=0, help="Processes to start [every GPU; 2 on a CPU].")
@click.option("--device", default="auto", show_default=True, help="What to measure: auto, cpu or cuda.")
@click.option("--dtype", "dtypes", multiple=True, help="Precision to measure; may be repeated [all it has].")
@click.option("--quick", is_flag=True, help="Under a minute: fewer sizes, fewer repeats.")
@click.option("--name", default="", help="Name of the profile [that of the file].")
@click.option("--against", default="", help="Compare with a PROFILE; exit 1 where a link or device is slower.")
@click.option(
    "--from",
    "runs",
    multiple=True,
    type=click.Path(),
    metavar="MEASURED",
    help="Measure nothing: refine launch costs by the measured.json of runs; may be repeated.",
)
@click.option("--peaks", default="", help="Take peaks and memory bandwidth from a PROFILE, such as a datasheet's.")
@common
def profile(
    output: str | None,
    nproc: int,
    device: str,
    dtypes: tuple[str, ...],
    quick: bool,
    name: str,
    against: str,
    peaks: str,
    runs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure this machine and write its hardware profile; a run that was ended early is taken up.

    Under torchrun (torchrun … -m planner profile …) it measures all nodes, and rank 0 writes.
    """
    from planner import api

    if runs:
        unread = {"nproc": nproc, "device": device != "auto", "dtype": dtypes, "quick": quick}
        unread |= {"against": against, "peaks": peaks}
        if given := [f"--{flag}" for flag, value in unread.items() if value]:
            raise click.UsageError(f"--from measures nothing: leave {', '.join(given)} out")
        _refine(runs, output, name, as_json)
        return
    found = api.profile(
        output,
        nproc=nproc,
        device=device,
        dtypes=dtypes,
        quick=quick,
        name=name,
        against=against or None,
        peaks=peaks or None,
        quiet=click.get_current_context().obj["quiet"],
    )
    if found is None:  # another rank of torchrun tells
        return
    if output is not None:
        note(f"wrote {output} in {found.seconds:.0f} s")
    if as_json:
        print_json(found.to_dict())
    elif found.comparison is not None:
        print("\n".join(found.comparison.lines()))
    elif output is None:
        from planner.spec.yaml_text import dump_yaml

        print(dump_yaml(found.profile.to_dict()), end="")
    if found.comparison is not None and found.comparison.flagged:
        raise click.exceptions.Exit(EXIT_ANSWER_IS_NO)


def _refine(runs: tuple[str, ...], output: str | None, name: str, as_json: bool) -> None:
    from planner import api
    from planner.spec.yaml_text import dump_yaml

    profile, found = api.refine(runs, output, name=name)
    if not found.felt:
        note("the steps do not depend on launch costs: nothing was refined")
    else:
        errors = f"{100 * math.expm1(found.error_before):.1f} % to {100 * math.expm1(found.error_after):.1f} %"
        note(f"launch costs times {found.factor:.3g}: the error of a step goes from {errors}")
        if found.at_limit:
            note("no larger change is tried: the steps differ by more than launch costs, see tp-plan compare")
    if output is not None:
        note(f"wrote {output}")
    if as_json:
        print_json(profile.to_dict())
    elif output is None:
        print(dump_yaml(profile.to_dict()), end="")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=OutputFile(folder=True), help="Write a page and pictures into a FOLDER.")
@click.option("--left-out", type=click.Path(), metavar="FILE", help="Show errors of a JSON FILE, by source, too.")
@click.option("--rows", is_flag=True, help="Show each run too.")
@common
def validate(runs: tuple[str, ...], output: str | None, left_out: str | None, rows: bool, as_json: bool) -> None:
    """Compare estimates with the measured RUNS of CSV files: errors by source, ranks, repeats, intervals.

    A row needs gpu, gpus, seq_len, micro_batch, global_batch, the name of a bundled model or its layers, hidden
    and heads, and step_seconds or mem_gb_per_gpu. --left-out names errors of sources with constants fitted without
    them, such as {"source": 0.08}. Exit 1 where no run could be judged.
    """
    from planner import api

    found = api.validate(runs, output=output, left_out=left_out, quiet=click.get_current_context().obj["quiet"])
    if output is not None:
        note(f"wrote {output}")
    if as_json:
        print_json(found.to_dict(rows=rows))
    else:
        from planner.report.accuracy_terminal import show_validation

        show_validation(found, rows=rows)
    if all(prediction.estimate is None for prediction in found.predictions):
        raise click.exceptions.Exit(EXIT_ANSWER_IS_NO)
