"""Workers are ended with all that they started."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from planner.measure import launch

# a worker that started a compiler and died with it still writing to the same output
_WORKER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"child": %d}' % child.pid, flush=True)
os._exit(1)
"""


def test_what_a_worker_started_ends_with_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    worker = launch.Started(0, process, tmp_path / "errors")
    heard: list[bytes] = []
    assert process.stdout is not None
    reader = threading.Thread(target=heard.extend, args=(process.stdout,), daemon=True)
    reader.start()
    process.wait()
    launch._end([worker])  # would wait for the child to close the output
    reader.join(timeout=60)
    assert not reader.is_alive()
    child = int(heard[0].split(b":")[1].strip(b" }\n"))
    until = time.monotonic() + 60  # a signal sent is not yet a process ended
    while (state := _state(child)) not in ("", "Z") and time.monotonic() < until:
        time.sleep(0.01)
    assert state in ("", "Z")


def _state(process: int) -> str:
    """As the kernel has it, empty where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
