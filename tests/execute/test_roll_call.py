"""Which ranks of other hosts are lost: those that tell nothing more."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from planner.execute.failure import Record
from planner.execute.roll_call import RollCall, Word, spread_over_hosts
from planner.execute.where import Where

HOSTS = ("near (10.0.0.1)", "near (10.0.0.1)", "far (10.0.0.2)")


class Lost(dist.HashStore):
    """A store whose host can go."""

    gone = False

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")
        return super().multi_get(keys)


def where(rank: int) -> Where:
    return Where(rank=rank, stage=rank // 2, pid=1, step=6, phase="backward", module="blocks.1", events=9)


def calls(store: dist.Store) -> list[RollCall]:
    """Three ranks, the last on another host, which have met."""
    made = [RollCall(lambda rank=rank: where(rank), host, store, 3) for rank, host in enumerate(HOSTS)]
    for call in (*made, *reversed(made)):
        call.beat()
    return made


def test_a_word_is_read_as_it_was_told() -> None:
    for told in (where(2), Where(rank=0, stage=0, pid=7)):
        word = Word(beats=3, host=HOSTS[0], where=told)
        assert Word.parsed(word.line) == word


def test_ranks_that_tell_nothing_more_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = calls(dist.HashStore())
    monkeypatch.setattr("time.sleep", lambda _: [call.beat() for call in (second, first)])
    assert [word.where for word in first.lost()] == [where(2)]
    monkeypatch.setattr("time.sleep", lambda _: [call.beat() for call in (second, third, first)])
    assert first.lost() == ()


def test_with_the_store_the_ranks_beside_it_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Lost()
    *_, third = calls(store)
    store.gone = True
    monkeypatch.setattr("time.sleep", lambda _: None)
    third.run()
    assert [(word.where.rank, word.host) for word in third.lost()] == [(0, HOSTS[0]), (1, HOSTS[0])]


def test_the_error_names_the_lost_ranks_and_where_they_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = calls(dist.HashStore())
    monkeypatch.setattr("time.sleep", lambda _: [call.beat() for call in (second, first)])
    record = Record(0)
    record.roll_call = first
    told = str(record.report(RuntimeError("[gloo/pair.cc:537] Connection closed by peer [10.0.0.2]:1")).error())
    assert "error[rank.2]: rank 2 is gone" in told
    assert "rank 2 (stage 1), step 7, backward, blocks.1, on far (10.0.0.2)" in told
    own = str(record.report(ValueError("boom")).error())
    assert "boom" in own
    assert "gone" not in own


@pytest.mark.parametrize(("here", "all_", "spread"), [("2", "2", False), ("1", "2", True)])
def test_hosts_are_told_apart_by_their_launchers(here: str, all_: str, spread: bool) -> None:
    assert spread_over_hosts({"LOCAL_WORLD_SIZE": here, "WORLD_SIZE": all_}) is spread
    assert not spread_over_hosts({})
