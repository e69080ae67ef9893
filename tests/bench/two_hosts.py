"""Which axis may cross a slow link: python tests/bench/two_hosts.py [MEGABITS …], as root

Two hosts of one process each, in network namespaces joined at 0.1, 1 and 10 Gbit/s. At each rate the pair is
profiled, planned for freely and with each axis across the link, and each of these plans is run; predicted and
measured steps stand side by side. Both hosts are one machine, so that the rates differ and nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import planner  # noqa: E402
from planner.spec.hardware_sources import load_hardware  # noqa: E402
from planner.spec.measured import load_measured  # noqa: E402
from planner.spec.model import ModelSpec  # noqa: E402
from tests.bench.ranking import Pairs, regret, verdict  # noqa: E402
from tests.hosts import Hosts, NoHostsError, ended, two_hosts  # noqa: E402
from tests.tiny import tiny_spec  # noqa: E402

RATES = (100, 1000, 10000)  # Mbit/s
STEPS, LONGEST_SECONDS = 7, 300
WORKLOAD = {"seq_len": 128, "global_batch": 8, "precision": "fp32"}
CHOICES: dict[str, dict[str, object]] = {
    "tensor": {"tp": 2, "microbatch": 8, "zero": 0, "recompute": "none"},
    "data": {"dp": 2, "microbatch": 4, "zero": 0, "recompute": "none"},
    "pipeline": {"pp": 2, "microbatch": 2, "zero": 0, "recompute": "none"},
}


def model() -> ModelSpec:
    """Its gradients are as large as a few exchanges of its activations: neither is left out of the question."""
    sizes = {"layers": 4, "hidden": 384, "heads": 6, "kv_heads": 6, "ffn": 1024, "vocab": 4096}
    return tiny_spec("llama", **sizes)


def on_both(hosts: Hosts, *words: str) -> None:
    """A job on both hosts, to its end."""
    for code, _, error in ended([host.torchrun(1, *words) for host in hosts], LONGEST_SECONDS):
        if code:
            sys.exit(f"{' '.join(words)}\n{error}")


def measured_at(hosts: Hosts, hardware: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds of each choice under a profile."""
    found = {}
    for name, fix in CHOICES.items():
        own = folder / name
        own.mkdir()
        plan = planner.plan(model=model(), hardware=hardware, gpus=2, workload=WORKLOAD, fix=fix)
        plan.save(own / "plan.yaml")
        on_both(hosts, "-m", "planner.execute", str(own / "plan.yaml"), "--steps", str(STEPS), "--device", "cpu")
        found[name] = (plan.estimate.step_seconds, load_measured(own / "measured.json").step_seconds)
    return found


def lines(megabits: int, hosts: Hosts, folder: Path) -> Iterator[str]:
    """What one rate shows."""
    hardware = folder / "two-hosts.yaml"
    on_both(
        hosts, "-m", "planner", "profile", "--quick", "--device", "cpu", "--dtype", "fp32", "-o", str(hardware)
    )
    (level,) = load_hardware(hardware).topology.values()
    yield f"{megabits} Mbit/s, profiled as {8e3 * level.bandwidth_gb_per_second:.0f} Mbit/s"
    best = planner.plan(model=model(), hardware=hardware, gpus=2, workload=WORKLOAD)
    yield f"  planned freely: {best.strategy.label}, {1e3 * best.estimate.step_seconds:.0f} ms"
    found = measured_at(hosts, hardware, folder)
    for name, (predicted, measured) in found.items():
        yield f"  {name:9} predicted {1e3 * predicted:8.1f} ms   measured {1e3 * measured:8.1f} ms"
    for place, kind in enumerate(("predicted", "measured")):
        order = sorted(found, key=lambda name: found[name][place])
        yield f"  {kind:9} {' < '.join(order)}"
    pairs: Pairs = list(found.values())
    yield f"  {verdict(pairs)}, regret {regret(pairs):.1%}"


def main() -> None:
    """Print what each rate shows as it is known."""
    try:
        for megabits in map(int, sys.argv[1:] or RATES):
            with two_hosts(megabits) as hosts, tempfile.TemporaryDirectory() as folder:
                for line in lines(megabits, hosts, Path(folder)):
                    print(line, flush=True)
    except NoHostsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
