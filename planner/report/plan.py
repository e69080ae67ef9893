"""A plan on a terminal: which layout, why no other, where time and memory go, how modules are cut; and why."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _percent as in_percent
from planner.report.estimate import _rate as in_rate
from planner.report.estimate import _say as say
from planner.report.estimate import _scaled as in_unit_of
from planner.report.estimate import _show_memory as show_memory
from planner.report.estimate import _show_time as show_time
from planner.report.estimate import _unit as unit_of
from planner.report.estimate import _what as what
from planner.report.plan_words import interval_text, layers_text, ratio_text, recompute_by_stage, recompute_text
from planner.report.terminal import console, show_table
from planner.spec.findings import Finding
from planner.spec.hardware import HardwareProfile
from planner.spec.plan import Certificate, Plan
from planner.spec.requests import changed_flags
from planner.spec.strategy import Strategy

_MOST_SPLITS = 24  # patterns of modules that have a row
_EQUAL = 0.005
_BEST = {"step_seconds": "Best", "gpus": "Fewest GPUs", "cost_per_token": "Cheapest", "ttft_seconds": "Best",
         "tpot_seconds": "Best"}  # fmt: skip
_BETTER = {"gpus": "fewer GPUs", "cost_per_token": "cheaper"}


def show_plan(plan: Plan, profile: HardwareProfile, *, path: str = "plan.yaml") -> None:
    """The verdict and its proof first; `path` is where the plan is kept, for the commands that follow."""
    out = console()
    _show_verdict(out, plan)
    _show_proof(out, plan)
    say(out, what(plan.estimate))
    out.print()
    show_time(out, plan.estimate, profile)
    out.print()
    show_memory(out, plan.estimate)
    _show_stages(out, plan)
    if plan.modules and plan.strategy.tp > 1:
        out.print()
        _show_splits(out, plan, path)
    for warning in plan.estimate.warnings:
        say(out, f"! {warning}")
    out.print(Text(f"\nNext: {shlex.join(['tp-plan', 'explain', path])}"), soft_wrap=True)
    other = shlex.join(["tp-plan", "compare", path, "OTHER.yaml", "-o", "compare.html"])
    out.print(Text(f"      {other}"), soft_wrap=True)


def explain_plan(plan: Plan, findings: Sequence[Finding] = (), *, path: str = "plan.yaml") -> None:
    """Why this plan: what lost and by how much, which limit binds, what easing it buys, what flips the choice."""
    out = console()
    _show_verdict(out, plan)
    _show_proof(out, plan)
    found = [finding for finding in findings if finding.kind == "runner_up"] or _runners_up(plan)
    if found:
        out.print()
        _show_lost(out, plan, found)
    for kind, title in (
        ("binding", "What binds"),
        ("easing", "What easing buys"),
        ("flip", "What flips the choice"),
        ("untried", "Not tried for want of time"),
    ):
        lines = [_told(plan, finding) for finding in findings if finding.kind == kind]
        if lines:
            out.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            say(out, line)
    if not found and not findings:
        say(out, "Nothing was searched around this plan, so nothing is known of what it was chosen over.")
    following = shlex.join(["tp-plan", "sweep", path, "--vary", _varied(findings)])
    out.print(Text(f"\nNext: {following}"), soft_wrap=True)


def _show_verdict(out: Console, plan: Plan) -> None:
    """Layout, schedule and pace, on one line where there is room."""
    found, layout = plan.estimate, plan.strategy
    pipeline = f", {layout.schedule}" if layout.pp > 1 else ""
    word, colour = _word(plan)
    lead = f"{word}: {layout.label}{pipeline}, microbatch {layout.microbatch}"
    total = found.step_seconds
    interval = interval_text(found.uncertainty.step_seconds, total)
    numbers = (
        f"{in_unit_of(total, total)} {unit_of(total)[1]}/step {interval}",
        f"{in_rate(found.tokens_per_second_per_gpu)} tokens/s/GPU",
        f"MFU {in_percent(found.mfu, digits=1)}",
    )
    pace = "   ".join(numbers)
    if len(lead) + 6 + len(pace) <= out.width:
        say(out, f"{lead}      {pace}", style=f"bold {colour}")
        return
    say(out, lead, style=f"bold {colour}")
    say(out, f"  {pace}", style="bold")


def _word(plan: Plan) -> tuple[str, str]:
    if not plan.estimate.fits:
        return "Does not fit", "red"
    if plan.edited:
        return "Edited", "yellow"
    if plan.certificate is None:
        return "Given", "yellow"
    best = _BEST[plan.certificate.minimize]
    return (best, "green") if plan.certificate.gap < 1e-9 else (f"{best} found", "yellow")


def _show_proof(out: Console, plan: Plan) -> None:
    """The runner-up, and why nothing better is left."""
    parts = []
    proof = plan.certificate
    if plan.runners_up and proof is not None:
        following = min(plan.runners_up, key=lambda other: other.objective)
        parts.append(_ahead(plan, proof, following.strategy, following.objective))
    parts.append("given, not searched for: nothing proves it the best" if proof is None else _proof(proof))
    say(out, f"  {'; '.join(parts)}")
    known = plan.estimate.uncertainty.memory_bytes
    if not plan.estimate.fits:
        over = in_gib(known.high - plan.estimate.capacity_bytes)
        say(out, f"  takes up to {in_gib(known.high)} GiB of a GPU, {over} GiB too much", style="red")
    if plan.edited:
        say(out, "  edited since it was made: the figures are those from before", style="yellow")


def _ahead(plan: Plan, proof: Certificate, strategy: Strategy, objective: float) -> str:
    other = _named(plan, strategy)
    ratio = objective / proof.objective if proof.objective else 1.0
    if ratio < 1.0 + _EQUAL:
        return f"as good as {other} within {in_percent(_EQUAL, digits=1)}"
    return f"{ratio_text(ratio)} {_BETTER.get(proof.minimize, 'faster')} than {other}"


def _proof(proof: Certificate) -> str:
    """`proven optimal over 214 layouts (61 illegal: 58 memory, 3 divisibility; 120 bounded away, 33 solved)`."""
    lead = "proven optimal" if proof.gap < 1e-9 else f"at most {100 * proof.gap:.2g} % from the best"
    illegal = sorted(proof.illegal.items(), key=lambda item: (-item[1], item[0]))
    told = []
    if illegal:
        rules = ", ".join(f"{count:,} {rule}" for rule, count in illegal)
        told.append(f"{sum(proof.illegal.values()):,} illegal: {rules}")
    told.append(f"{proof.pruned:,} bounded away, {proof.solved:,} solved")
    left = proof.candidates - proof.pruned - proof.solved - sum(proof.illegal.values())
    told += [f"{left:,} not looked at"] if left else []
    layouts = "layout" if proof.candidates == 1 else "layouts"
    return f"{lead} over {proof.candidates:,} {layouts} ({'; '.join(told)}) by {proof.solver}"


def _show_stages(out: Console, plan: Plan) -> None:
    """Layers of the stages, and what is recomputed where they differ."""
    if plan.strategy.pp > 1:
        say(out, f"Layers by stage: {layers_text(plan)}")
    by_stage = recompute_by_stage(plan)
    if len({text for _, text in by_stage}) > 1:
        say(out, f"Recompute: {'; '.join(f'{where}: {text}' for where, text in by_stage)}")
    elif by_stage:
        say(out, f"Recompute: {by_stage[0][1]}{' on each stage' if plan.strategy.pp > 1 else ''}")
    else:
        say(out, f"Recompute: {recompute_text(plan)}")


def _show_splits(out: Console, plan: Plan, path: str) -> None:
    """One line for each pattern of modules."""
    patterns = list(plan.modules.items())
    rows = [(pattern, cut.split, cut.input, cut.output) for pattern, cut in patterns[:_MOST_SPLITS]]
    show_table(out, ("modules", "split", "takes", "gives"), rows, drop=("gives", "takes"))
    left = len(patterns) - len(rows)
    if left:
        say(out, f"and {left} {'pattern' if left == 1 else 'patterns'} more in {path}")


def _runners_up(plan: Plan) -> list[Finding]:
    """Those that the plan keeps."""
    objective = plan.certificate.objective if plan.certificate else plan.estimate.step_seconds
    return [
        Finding(
            kind="runner_up", text=other.reason, before=objective, after=other.objective, strategy=other.strategy
        )
        for other in plan.runners_up
        if other.reason.strip()
    ]


def _show_lost(out: Console, plan: Plan, found: Sequence[Finding]) -> None:
    memory = {other.strategy: in_gib(other.memory_bytes) for other in plan.runners_up}
    rows = [
        (_named(plan, finding.strategy), _objective(plan, finding.after), _more(finding),
         memory.get(finding.strategy, ""), finding.text)
        for finding in sorted(found, key=lambda finding: finding.after)
        if finding.strategy is not None
    ]  # fmt: skip
    show_table(out, ("what lost", ">its", ">more", ">GiB", "why"), rows, drop=(">GiB",))


def _told(plan: Plan, finding: Finding) -> str:
    if finding.kind == "untried":
        return f"- {finding.text}"
    if finding.kind == "binding":
        numbers = f"{_amount(plan, finding, finding.before)} of {_amount(plan, finding, finding.after)}"
        return f"- {finding.text}: {numbers}"
    after = _objective(plan, finding.after)
    other = "" if finding.strategy in (None, plan.strategy) else f"{_named(plan, finding.strategy)}, "
    if finding.kind == "flip":
        return f"- {finding.text}: then {other}{after}, and this plan {_objective(plan, finding.before)}"
    if finding.saving < 1e-9:
        return f"- {finding.text}: nothing saved"
    return f"- {finding.text}: {in_percent(finding.saving, digits=1)} saved, {other}{after}"


def _named(plan: Plan, strategy: Strategy | None) -> str:
    """A layout by its label; by its flags where the plan bears the same label."""
    if strategy is None or strategy == plan.strategy:
        return "this plan"
    if strategy.label != plan.strategy.label:
        return strategy.label
    return f"the same with {changed_flags(plan.strategy, strategy)}"


def _objective(plan: Plan, value: float) -> str:
    """In the unit of what was minimised."""
    minimize = plan.certificate.minimize if plan.certificate else "step_seconds"
    if minimize == "gpus":
        return f"{value:,.0f} GPUs"
    if minimize == "cost_per_token":
        return f"{1e6 * value:,.3g} a million tokens"
    whole = plan.estimate.step_seconds if minimize == "step_seconds" else value
    each = {"step_seconds": "/step", "tpot_seconds": "/token"}.get(minimize, "")
    return f"{in_unit_of(value, whole)} {unit_of(whole)[1]}{each}"


def _amount(plan: Plan, finding: Finding, value: float) -> str:
    if finding.unit == "bytes":
        return f"{in_gib(value)} GiB"
    return f"{value:,.0f} GPUs" if finding.unit == "gpus" else _objective(plan, value)


def _more(finding: Finding) -> str:
    return in_percent(max(0.0, -finding.saving), digits=1) if finding.before else ""


def _varied(findings: Sequence[Finding]) -> str:
    """The parameter that flips the choice, else the one that most often does."""
    flips = [finding.key for finding in findings if finding.kind == "flip" and finding.key]
    return f"{flips[0] if flips else 'inter_node_bandwidth'}=0.25x:4x"
