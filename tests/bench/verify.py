"""What a dry run at full size takes beside its targets: python tests/bench/verify.py [NAME …] [--limit SECONDS]

Every case is planned first; then `tp-plan verify` runs in a process of its own on one core: CPU seconds and peak
memory are of that whole process. A case that passes the limit is ended and told as such.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.bench.search import taken  # noqa: E402

TARGET_SECONDS, TARGET_MB = 60.0, 8_000.0
CASES = {  # model, GPUs, what is fixed
    "405B tp8 pp16 FSDP": ("llama3.1-405b", 1024, "tp=8,pp=16,cp=1,zero=3,schedule=1f1b"),
    "Mixtral 8x22B ep8": ("mixtral-8x22b", 64, "pp=1,ep=8"),
    "Mixtral 8x22B ep8, free stages": ("mixtral-8x22b", 64, "ep=8"),
}


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases whose names have one of these words; all if none")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a case")
    given = parser.parse_args()
    print(f"{'plan':32} {'CPU s':>6} {'target':>6} {'peak MB':>8} {'target':>6}  verdict")
    for name, (model, gpus, fixed) in CASES.items():
        if given.names and not any(word in name for word in given.names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            plan = str(Path(folder) / "plan.yaml")
            options = ["--hardware=dgx-h100", f"--gpus={gpus}", "--seq-len=4096", "--global-batch=256"]
            made = [sys.executable, "-m", "planner", "plan", model, *options, f"--fix={fixed}", "-q", "-o", plan]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
            found = taken(["verify", plan, "--json", "-q"], limit_seconds=given.limit)
        verdict = "ended at the limit" if found.answer is None else {0: "agrees"}.get(found.exit_code, "differs")
        print(
            f"{name:32} {found.cpu_seconds:6.1f} {TARGET_SECONDS:6.0f} {found.peak_mb:8.0f} {TARGET_MB:6.0f}"
            f"  {verdict}",
            flush=True,
        )


if __name__ == "__main__":
    main()
