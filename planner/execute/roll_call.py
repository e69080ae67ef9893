"""Which ranks of other hosts are still there: each tells the job's store every second where it is.

Who started the ranks of one host sees which of them ended. Of another host nothing is seen but connections that
close, or not even that where it lost power; what its ranks told last says which were lost, and where they stood.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.distributed import Store, TCPStore, barrier, get_world_size  # type: ignore[attr-defined]

from planner.execute.where import Where

_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 3.0  # so long a busy machine may keep a thread waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a rank told of itself: the number of its beats, its host, what it does."""

    beats: int
    host: str
    where: Where

    @property
    def line(self) -> str:
        """As `parsed` reads it."""
        return f"{self.beats}\n{self.host}\n{self.where.line}"

    @classmethod
    def parsed(cls, line: str) -> Word:
        """The inverse of `line`."""
        beats, host, where = line.split("\n")
        return cls(beats=int(beats), host=host, where=Where.parsed(where))


class RollCall(threading.Thread):
    """Tells where this rank is and hears where the others are, until the process ends."""

    def __init__(self, here: Callable[[], Where], host: str, store: Store, ranks: int) -> None:
        super().__init__(name="roll-call", daemon=True)
        self._here, self._host, self._store = here, host, store
        self._keys = [f"tp-plan/roll-call/{rank}" for rank in range(ranks)]
        self._beats = 0
        self._words: dict[int, Word] = {}
        self._heard: dict[int, float] = {}  # when a rank's beats last changed
        self._answered = time.monotonic()  # when the store last did
        self._tell()

    def run(self) -> None:
        """Every second, until the store is gone: then so is the host of rank 0, which keeps it."""
        try:
            while True:
                self.beat()
                time.sleep(_BEAT_SECONDS)
        except (RuntimeError, ValueError):
            self._answered = 0.0

    def beat(self) -> None:
        """Tell, and hear the others."""
        self._tell()
        told = self._store.multi_get(self._keys)
        self._answered = time.monotonic()
        for rank, line in enumerate(told):
            word = Word.parsed(line.decode())
            if rank not in self._words or word.beats != self._words[rank].beats:
                self._words[rank], self._heard[rank] = word, self._answered

    def lost(self) -> tuple[Word, ...]:
        """What the ranks told last that are silent; looks for as long as a rank that is there may be silent."""
        time.sleep(2 * _BEAT_SECONDS)  # what a rank told before it was lost may be read only now
        asked = time.monotonic()
        time.sleep(_SILENT_SECONDS)
        if self._answered < asked:
            kept = self._words[0].host if self._words else ""
            return tuple(word for word in self._words.values() if word.host == kept != self._host)
        return tuple(word for rank, word in self._words.items() if self._heard[rank] < asked)

    def _tell(self) -> None:
        self._beats += 1
        self._store.set(
            self._keys[self._here().rank], Word(beats=self._beats, host=self._host, where=self._here()).line
        )


def spread_over_hosts(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether some ranks of the job run under another launcher."""
    return environment.get("LOCAL_WORLD_SIZE", "0") != environment.get("WORLD_SIZE", "0")


def start_roll_call(here: Callable[[], Where]) -> RollCall:
    """Of a job that torchrun started; all ranks call this together, once they have met."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # a connection of its own: that of the process group is for the main thread
    store = TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=30))
    found = RollCall(here, _host_towards(address), store, get_world_size())
    barrier()  # everyone has told
    found.beat()
    found.start()
    return found


def _host_towards(address: str) -> str:
    """This host's name, and the address by which it reaches another: names may be alike."""
    family, kind, protocol, _, other = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(other)  # of datagrams: only chooses the way
        return f"{socket.gethostname()} ({probe.getsockname()[0]})"
