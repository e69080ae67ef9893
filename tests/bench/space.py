"""How many candidates a plan has, and what listing the legal ones takes: python tests/bench/space.py

Every case is a process of its own, since peak memory is a process's; interpreter and imports are told first.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import planner  # noqa: E402
from planner.search.space import space_of  # noqa: E402
from planner.spec.wishes import Wishes  # noqa: E402
from planner.spec.workload import TrainWorkload  # noqa: E402

CASES = (
    ("llama3.1-8b", 8, 128),
    ("llama3.1-70b", 64, 256),
    ("llama3.1-405b", 1024, 1024),
    ("llama3.1-405b", 16_384, 4096),
    ("deepseek-v3", 2048, 4096),
    ("deepseek-v3", 2048, 15_360),
    ("llama3.1-405b", 13_824, 13_824),
)
SEQ_LEN = 8192
ALONE = "--alone"


def measured(name: str, gpus: int, batch: int) -> dict[str, float]:
    """One case in this process."""
    model = planner.load_model(name)
    workload = TrainWorkload(seq_len=SEQ_LEN, global_batch=batch, precision="bf16")
    before = _peak_bytes()
    began = time.process_time()
    space = space_of(model, workload, gpus, Wishes())
    return {
        "seconds": time.process_time() - began,
        "candidates": space.candidates,
        "legal": len(space),
        "imports_bytes": before,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print a line per case."""
    print(f"{'model':16}{'GPUs':>8}{'batch':>8}{'candidates':>14}{'legal':>12}{'CPU s':>8}{'peak MiB':>10}"
          f"{'imports MiB':>13}")  # fmt: skip
    for name, gpus, batch in CASES:
        command = [sys.executable, __file__, ALONE, name, str(gpus), str(batch)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:16}{gpus:>8}{batch:>8}{told['candidates']:>14,}{told['legal']:>12,}{told['seconds']:>8.2f}"
              f"{told['peak_bytes'] / 2**20:>10.0f}{told['imports_bytes'] / 2**20:>13.0f}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == [ALONE]:
        print(json.dumps(measured(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
