"""Profile, plan, run on this machine, predicted beside measured: python tests/bench/closed_loop.py [--thorough]

Twelve plans of two processes on the CPU through the command line, as a user would. All are run once before any is
run again, so that a busy minute of the machine falls on all alike; each counts with the median of its repeats. The
machine is profiled before the runs and after them, for it may be busier then: a prediction is the mean of both.
The launch costs refined by the first run alone are judged on the other eleven.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

from planner.spec.files import write_text  # noqa: E402
from planner.spec.measured import load_measured  # noqa: E402
from planner.spec.plan import load_plan  # noqa: E402
from planner.spec.yaml_text import dump_yaml  # noqa: E402
from tests.bench.ranking import verdict, verdicts  # noqa: E402
from tests.tiny import tiny_spec  # noqa: E402

STEPS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model, and what a step of it reads."""

    kind: str  # of tests/tiny.py
    sizes: dict[str, int]
    seq_len: int
    global_batch: int


MODELS = {
    "narrow": Work(
        kind="gpt",
        sizes={"layers": 6, "hidden": 256, "heads": 4, "ffn": 1024, "vocab": 2048},
        seq_len=128,
        global_batch=8,
    ),
    "long": Work(
        kind="llama",
        sizes={"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocab": 4096},
        seq_len=256,
        global_batch=8,
    ),
    "wide": Work(
        kind="llama",
        sizes={"layers": 2, "hidden": 768, "heads": 12, "kv_heads": 4, "ffn": 2048, "vocab": 16384},
        seq_len=64,
        global_batch=4,
    ),
}
LAYOUTS = {
    "tp2": "tp=2,microbatch={batch},zero=0",
    "dp2": "dp=2,microbatch={half},zero=0",
    "dp2 zero3": "dp=2,microbatch={half},zero=3",
    "pp2": "pp=2,microbatch={quarter},zero=0,schedule=1f1b",
}


@dataclass(slots=True, kw_only=True, eq=False)
class Case:
    """One plan, what it predicts, and its runs."""

    model: str
    layout: str
    folder: Path
    before: float = 0.0  # predicted by the profile of then
    after: float = 0.0
    refined: float = 0.0
    medians: list[float] = dataclasses.field(default_factory=list)  # of each run

    @property
    def plan(self) -> Path:
        """Its file."""
        return self.folder / "plan.yaml"

    @property
    def predicted(self) -> float:
        """By both profiles."""
        return (self.before + self.after) / 2

    @property
    def measured(self) -> float:
        """The median run's step."""
        return statistics.median(self.medians)

    @property
    def spread(self) -> float:
        """Of its runs, from the fastest to the slowest."""
        return (max(self.medians) - min(self.medians)) / self.measured


def tp_plan(*words: object) -> None:
    """Run a verb; its own words are shown only where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "planner", *map(str, words)], cwd=sys.path[0], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"tp-plan {' '.join(map(str, words))}\n{done.stderr}")


def planned(case: Case, hardware: Path) -> float:
    """Plan a case, and the step that its plan predicts."""
    work = MODELS[case.model]
    spec = case.folder / "model" / "spec.yaml"  # apart: the plan of a run is looked for beside its measurements
    if not spec.exists():
        spec.parent.mkdir(parents=True)
        write_text(spec, dump_yaml(tiny_spec(work.kind, **work.sizes).to_dict()))
    batch = work.global_batch
    fix = LAYOUTS[case.layout].format(batch=batch, half=batch // 2, quarter=batch // 4)
    output = case.plan if not case.plan.exists() else case.folder / "model" / "another-plan.yaml"
    asked: dict[str, Any] = {"hardware": hardware, "gpus": 2, "seq-len": work.seq_len, "global-batch": batch}
    flags = [word for key, value in asked.items() for word in (f"--{key}", value)]
    tp_plan("plan", spec, *flags, "--precision", "fp32", "--fix", f"{fix},recompute=none", "-o", output)
    return load_plan(output).estimate.step_seconds


def run(case: Case) -> None:
    """Run its plan once more."""
    output = case.folder / f"measured-{len(case.medians)}.json"
    tp_plan("run", case.plan, "--steps", STEPS, "--device", "cpu", "--measured", output)
    case.medians.append(load_measured(output).step_seconds)


def table(cases: Iterable[Case]) -> Iterable[str]:
    """A line for each case."""
    heads = "".join(f"{word:>11}" for word in ("predicted", "refined", "measured"))
    yield f"{'model':8} {'layout':10}{heads} {'error':>7} {'spread':>7}"
    for case in cases:
        milliseconds = "".join(f"{1e3 * value:8.1f} ms" for value in (case.predicted, case.refined, case.measured))
        error = case.predicted / case.measured - 1.0
        yield f"{case.model:8} {case.layout:10}{milliseconds} {error:+7.1%} {case.spread:7.1%}"


def judged(cases: Sequence[Case], key: str) -> Iterable[str]:
    """How well the predictions of one kind choose: over all, and among the layouts of each model."""
    pairs = {case: (getattr(case, key), case.measured) for case in cases}
    yield f"{key}: {verdict(list(pairs.values()))}"
    yield from verdicts({model: [pairs[case] for case in cases if case.model == model] for model in MODELS})


def profiled(output: Path, *, thorough: bool) -> Path:
    """A profile of this machine."""
    effort = () if thorough else ("--quick",)
    tp_plan("profile", "--nproc", 2, "--device", "cpu", "--dtype", "fp32", *effort, "-o", output)
    return output


def main() -> None:
    """Print the table and the verdicts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--thorough", action="store_true", help="take minutes to profile instead of one")
    parser.add_argument("--hardware", type=Path, help="a profile of this machine that was measured before")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each plan")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hardware = given.hardware or profiled(folder / "before.yaml", thorough=given.thorough)
        cases = [
            Case(model=model, layout=layout, folder=folder / f"{model}-{layout.replace(' ', '-')}")
            for model in MODELS
            for layout in LAYOUTS
        ]
        for case in cases:
            case.before = planned(case, hardware)
        for _ in range(given.repeats):
            for case in cases:
                run(case)
        later = given.hardware or profiled(folder / "after.yaml", thorough=given.thorough)
        for case in cases:
            case.after = planned(case, later)
        refined = folder / "refined.yaml"
        tp_plan("profile", "--from", cases[0].folder / "measured-0.json", "-o", refined)
        for case in cases:
            case.refined = planned(case, refined)
    print("\n".join(table(cases)))
    print(f"noise floor: repeats of one plan lie {statistics.median(case.spread for case in cases):.1%} apart")
    drift = statistics.median(case.after / case.before - 1.0 for case in cases)
    print(f"the profile after the runs predicts steps {drift:+.1%} longer than the one before them")
    print("\n".join(judged(cases, "predicted")))
    print(f"launch costs refined by one run of {cases[0].model} {cases[0].layout}, judged on the others:")
    print("\n".join(judged(cases[1:], "refined")))


if __name__ == "__main__":
    main()
