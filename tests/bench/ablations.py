"""Our plans beside experts' and published ablations, as Markdown: python tests/bench/ablations.py [RUNS.csv …]

Without tables the experts alone. Every expert is a process of its own, ended at --limit seconds; then our plan
gets the expert's degrees and decides the rest. Progress goes to stderr; `> reports/plans.md` keeps the page.

An ablation is a group of measured runs that differ in their layout only. Its regret is by how much the layout that
we rank first was slower than the fastest measured one; repeats of a layout count as their mean.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

import planner  # noqa: E402
from planner.report.accuracy import rank_correlation  # noqa: E402
from planner.spec.estimate import Estimate  # noqa: E402
from planner.spec.runs_predicted import Prediction, configuration_of, task_of  # noqa: E402
from planner.spec.strategy import Strategy  # noqa: E402
from planner.units import GIB  # noqa: E402
from tests.search.experts import EXPERTS, Beside, Expert, beside  # noqa: E402

NEAR = 0.02  # regret up to which the choice counts as right
PARTS_TOLD = 3

# why a source's choices may miss; the figures are of the rows themselves
SOURCES_OF_REGRET = {
    "bigscience": (
        "single iterations, before and after the cluster was improved. One layout of one model took from 114.0 to "
        "121.5 s (tp8 pp6 dp8 of GPT-181B), T1269 72.1 ms a sequence where the same layout in T1270 took 55.7. "
        "Beyond that, steps with few stages and much data parallel (pp6 dp16, pp2 dp24) are predicted 6 to 15 % "
        "too fast."
    ),
    "amp": "one group on 16 T4, whose steps are predicted 19.5 % off on average.",
    "megatron_a100_single_node": (
        "steps put together from layers timed by themselves, some of which fall where work grows (see the page on "
        "accuracy): with tp 4 at hidden size 2048 a microbatch of two sequences took less time than one of one."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in their layout only."""

    source: str
    name: str
    runs: int
    measured: tuple[float, ...]  # of each layout
    predicted: tuple[float, ...]
    layouts: tuple[str, ...]

    @property
    def ours(self) -> int:
        """The layout that we rank first."""
        return int(np.argmin(self.predicted))

    @property
    def fastest(self) -> int:
        """The layout that was."""
        return int(np.argmin(self.measured))

    @property
    def regret(self) -> float:
        """By how much ours was slower."""
        return self.measured[self.ours] / self.measured[self.fastest] - 1.0


def groups(predictions: Iterable[Prediction]) -> list[Group]:
    """Of trusted runs, those with two layouts or more."""
    rows = [row for row in predictions if row.run.judged and row.run.trust != "C" and row.time_error is not None]
    found = []
    for task in _grouped(rows, task_of):
        layouts = list(_grouped(task, configuration_of))
        if len(layouts) < 2:
            continue
        run = task[0].run
        hardware = run.hardware if isinstance(run.hardware, str) else run.hardware.get("base", "")
        found.append(
            Group(
                source=run.source,
                name=f"{run.model.get('name')} on {run.gpus} {hardware}, {run.workload['global_batch']} × "
                f"{run.workload['seq_len']}, {run.workload['precision']}",
                runs=len(task),
                measured=tuple(float(np.mean([row.run.step_seconds or 0.0 for row in same])) for same in layouts),
                predicted=tuple(float(np.mean([row.step_seconds or 0.0 for row in same])) for same in layouts),
                layouts=tuple(same[0].run.layout for same in layouts),
            )
        )  # fmt: skip
    return found


def _grouped(rows: Sequence[Prediction], key: object) -> Iterator[list[Prediction]]:
    by_key: dict[str, list[Prediction]] = {}
    for row in rows:
        by_key.setdefault(key(row.run), []).append(row)  # type: ignore[operator]
    yield from by_key.values()


def ablation_lines(found: Sequence[Group], *, every: bool) -> Iterator[str]:
    """The section on ablations; unless `every`, of the groups those alone where ours was not the fastest."""
    regrets = np.array([group.regret for group in found])
    within = int((regrets <= NEAR).sum())
    yield f"## Published ablations: {len(found)} groups of runs that differ in their layout only\n"
    yield (
        f"**The layout that we rank first is within 2 % of the fastest measured in {within} of "
        f"{len(found)} groups; it is {regrets.mean():.1%} slower on average, {regrets.max():.1%} at worst.**\n"
    )
    yield "| source | groups | within 2 % | mean regret | worst | mean rank correlation |"
    yield "|---|---:|---:|---:|---:|---:|"
    for source in dict.fromkeys(group.source for group in found):
        mine = [group for group in found if group.source == source]
        lost = np.array([group.regret for group in mine])
        ranks = [rank for group in mine if (rank := rank_correlation(group.predicted, group.measured)) is not None]
        agreed = f"{np.mean(ranks):.2f} ({len(ranks)})" if ranks else "–"
        near = int((lost <= NEAR).sum())
        yield f"| {source} | {len(mine)} | {near} | {lost.mean():.1%} | {lost.max():.1%} | {agreed} |"
    yield "\nA rank correlation needs three layouts; in brackets the groups that have them.\n"
    yield "### Groups, the largest regret first\n" if every else "### Groups where ours was not the fastest\n"
    yield "| source | group | runs | layouts | regret | rank | fastest | ours |"
    yield "|---|---|---:|---:|---:|---:|---|---|"
    for group in sorted(found, key=lambda item: -item.regret):
        if not every and group.ours == group.fastest:
            continue
        value = rank_correlation(group.predicted, group.measured)
        yield (
            f"| {group.source} | {group.name} | {group.runs} | {len(group.layouts)} | {group.regret:.1%} | "
            f"{'–' if value is None else f'{value:.2f}'} | {_timed(group, group.fastest)} | "
            f"{'the same' if group.ours == group.fastest else _timed(group, group.ours)} |"
        )
    yield "\nWhy ours is slower by more than 2 %:\n"
    for source in dict.fromkeys(group.source for group in found if group.regret > NEAR):
        yield f"- **{source}**: {SOURCES_OF_REGRET.get(source, 'not looked into.')}"


def _timed(group: Group, place: int) -> str:
    return f"{group.layouts[place]} ({group.measured[place]:.4g} s, predicted {group.predicted[place]:.4g})"


def compared(experts: Sequence[Expert], limit_seconds: float) -> Iterator[tuple[Expert, Beside | str]]:
    """Each expert's layout and our plan, with their degrees where the whole search takes long, or why none."""
    for expert in experts:
        print(expert.name, file=sys.stderr, flush=True)
        answer = _in_time(expert, limit_seconds, degrees=False)
        yield expert, answer if isinstance(answer, Beside) else _in_time(expert, limit_seconds, degrees=True)


def _in_time(expert: Expert, limit_seconds: float, *, degrees: bool) -> Beside | str:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compare, args=(expert, degrees, sender))
    process.start()
    sender.close()  # so that a process that fails is seen as one
    answer: Beside | str = f"not done in {limit_seconds:.0f} s"
    if receiver.poll(limit_seconds):
        try:
            answer = receiver.recv()
        except EOFError:
            answer = "failed"
    process.kill()
    process.join()
    return answer


def _compare(expert: Expert, degrees: bool, sender: object) -> None:
    sender.send(beside(expert, degrees=degrees))  # type: ignore[attr-defined]


def expert_lines(found: Sequence[tuple[Expert, Beside | str]]) -> Iterator[str]:
    """The section on experts."""
    done = [answer for _, answer in found if isinstance(answer, Beside)]
    slower = sum(answer.ratio > 1 + 1e-9 for answer in done)
    faster = f"{np.mean([1 - answer.ratio for answer in done]):.0%} shorter on average" if done else ""
    yield f"## Experts' layouts: {len(found)} published ones\n"
    yield (
        f"**On GPUs that hold both, our plan is slower in {slower} of {len(done)} comparisons; its step is "
        f"{faster}.** {sum(answer.degrees for answer in done)} whole searches were not done in time: there our "
        f"plan has their degrees and decides the rest; {len(found) - len(done)} not even so. "
        f"{sum(not answer.theirs.fits for answer in done)} of the experts' layouts do not fit by our memory "
        "model, though they ran: they are compared with our plan on GPUs of the memory that they need, told "
        "behind the one that fits.\n"
    )
    yield (
        "| expert | GPUs | their layout | measured | our estimate of it | memory | our plan | ratio | "
        "where they differ (seconds, theirs → ours) |"
    )
    yield "|---|---:|---|---:|---:|---:|---|---:|---|"
    for expert, answer in found:
        measured = f"{expert.seconds:.4g} s" if expert.seconds else "–"
        head = f"| {expert.name} | {expert.gpus} | {_said(expert.layout)} | {measured} |"
        if isinstance(answer, str):
            yield f"{head} – | – | {answer} | – | – |"
            continue
        needs = answer.theirs.uncertainty.memory_bytes.high
        room = f"{needs / GIB:.0f} of {answer.theirs.capacity_bytes / GIB:.0f} GiB"
        plan = "with their degrees " if answer.degrees else ""
        plan += _planned(answer.ours) if answer.ours else "nothing fits"
        plan += f"; with {needs / GIB:.0f} GiB {_planned(answer.roomy)}" if answer.roomy else ""
        differ = _differences(answer.theirs, answer.comparable) if answer.comparable else ""
        yield f"{head} {answer.theirs.step_seconds:.4g} s | {room} | {plan} | {answer.ratio:.3f} | {differ} |"
    yield "\nSources, and what of a run is told otherwise:\n"
    for citation in dict.fromkeys(expert.citation for expert, _ in found):
        named = [expert for expert, _ in found if expert.citation == citation]
        remarks = "; ".join(dict.fromkeys(expert.remark for expert in named if expert.remark))
        yield f"- {citation}: {', '.join(expert.name for expert in named)}." + (f" {remarks}." if remarks else "")


def _said(layout: Strategy) -> str:
    words = [layout.label, f"microbatch {layout.microbatch}"]
    words += [layout.schedule] if layout.pp > 1 else []
    return ", ".join([*words, f"recompute {layout.recompute}"])


def _planned(estimate: Estimate) -> str:
    return f"{_said(estimate.strategy)}: {estimate.step_seconds:.4g} s"


def _differences(theirs: Estimate, ours: Estimate) -> str:
    """The parts of the step that differ most."""
    one, other = theirs.breakdown.parts, ours.breakdown.parts
    names = sorted(one, key=lambda name: -abs(one[name] - other[name]))[:PARTS_TOLD]
    return ", ".join(f"{name.removesuffix('_seconds')} {one[name]:.3g} → {other[name]:.3g}" for name in names)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="tables of measured runs, as `tp-plan validate` reads them")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for an expert")
    parser.add_argument("--most-gpus", type=int, default=10**6, help="leave experts with more out")
    parser.add_argument("--all", action="store_true", help="tell of every group of runs")
    given = parser.parse_args()
    names = " ".join(["python tests/bench/ablations.py", *(Path(run).name for run in given.runs), "--limit"])
    print("# Our plans beside experts' and published ablations\n")
    print(
        f"Written by `{names} {given.limit:g} > reports/plans.md`. "
        "All steps but measured ones are by our cost model.\n"
    )
    experts = [expert for expert in EXPERTS if expert.gpus <= given.most_gpus]
    print("\n".join(expert_lines(list(compared(experts, given.limit)))))
    if given.runs:
        print()
        print("\n".join(ablation_lines(groups(planner.validate(given.runs).predictions), every=given.all)))


if __name__ == "__main__":
    main()
