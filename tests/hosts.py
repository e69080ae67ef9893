"""Two hosts on one machine: network namespaces joined by a link of a given rate.

Needs root, and `ip` and `tc` of iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.213.77.1", "10.213.77.2")

Hosts = tuple["Host", "Host"]


class NoHostsError(Exception):
    """This machine gives no namespaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A network namespace with one link to the other."""

    number: int
    name: str
    link: str

    def torchrun(
        self, ranks: int, *words: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """This host's launcher of a job on both, with so many ranks here."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", str(ranks), "--node-rank", str(self.number)]
        command += ["--master-addr", ADDRESSES[0], "--master-port", "29555", *words]
        usual = {"GLOO_SOCKET_IFNAME": self.link, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **usual, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def shape(self, megabits: int) -> None:
        """Let the link send so much, and no more."""
        shape = ["rate", f"{megabits}mbit", "burst", _burst(megabits), "latency", "100ms"]
        _must("tc", "-n", self.name, "qdisc", "replace", "dev", self.link, "root", "tbf", *shape)

    def unplug(self) -> None:
        """Cut the link: as where a host loses power, not even the end of a connection is told."""
        _must("ip", "-n", self.name, "link", "set", self.link, "down")

    def kill(self) -> None:
        """End every process of this host at once."""
        for pid in _call("ip", "netns", "pids", self.name).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def two_hosts(megabits: int) -> Iterator[Hosts]:
    """Both hosts, removed whatever happens; NoHostsError where this machine has none to give."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise NoHostsError("two hosts need network namespaces, and those need root")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NoHostsError(f"two hosts need {' and '.join(missing)} of iproute2")
    first, second = hosts = tuple(
        Host(number=number, name=f"tp-plan-{os.getpid()}-{side}", link=f"tpp{os.getpid() % 100_000}{side}")
        for number, side in enumerate("ab")
    )
    if _call("ip", "netns", "add", first.name).returncode != 0:
        raise NoHostsError("this machine gives root no network namespaces")
    try:
        _must("ip", "netns", "add", second.name)
        peer = ["type", "veth", "peer", second.link, "netns", second.name]
        _must("ip", "link", "add", first.link, "netns", first.name, *peer)
        for host, address in zip(hosts, ADDRESSES, strict=True):
            _must("ip", "-n", host.name, "address", "add", f"{address}/24", "dev", host.link)
            _must("ip", "-n", host.name, "link", "set", "lo", "up")
            _must("ip", "-n", host.name, "link", "set", host.link, "up")
            host.shape(megabits)
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            _call("ip", "netns", "delete", host.name)


def ended(launchers: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code and words of each launcher, none of which outlives this."""
    try:
        said = [launcher.communicate(timeout=seconds) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    return [(launcher.returncode, *words) for launcher, words in zip(launchers, said, strict=True)]


def _burst(megabits: int) -> str:
    """A bucket must hold what the rate lets through between two ticks of the kernel, and a packet of 64 KiB."""
    return f"{max(64, megabits // 4)}kb"


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=20)


def _must(*words: str) -> None:
    done = _call(*words)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
