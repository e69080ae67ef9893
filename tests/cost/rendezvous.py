"""torch's GPipe and 1F1B, event by event: a message starts once both its ranks have asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Message(NamedTuple):
    """A microbatch's result, or its gradient, on its way from a rank."""

    rank: int
    kind: str
    microbatch: int


Action = tuple[str, Sequence[Message]]  # "F" or "B": compute; "ask" for messages; "wait" for them


def flush_seconds(
    schedule: str, forward: Sequence[float], backward: Sequence[float], hop: float, microbatches: int
) -> float:
    """From the first forward to the last backward."""
    pp = len(forward)
    program = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward}[schedule]
    left = [list(program(_Ends(rank, pp), microbatches))[::-1] for rank in range(pp)]
    now, asked = [0.0] * pp, dict[Message, list[float]]()
    rank = 0
    while any(left):
        while left[rank]:
            word, messages = left[rank][-1]
            if word == "wait" and any(len(asked[message]) < 2 for message in messages):
                break
            left[rank].pop()
            if word == "ask":
                for message in messages:
                    asked.setdefault(message, []).append(now[rank])
            elif word == "wait":
                now[rank] = max([now[rank], *(max(asked[message]) + hop for message in messages)])
            else:
                now[rank] += (forward if word == "F" else backward)[rank]
        rank = (rank + 1) % pp
    return max(now)


class _Ends(NamedTuple):
    """What a rank exchanges with its neighbours for a microbatch."""

    rank: int
    pp: int

    def input(self, microbatch: int) -> list[Message]:
        return [Message(self.rank - 1, "F", microbatch)] if self.rank > 0 else []

    def result(self, microbatch: int) -> list[Message]:
        return [Message(self.rank, "F", microbatch)] if self.rank < self.pp - 1 else []

    def gradient(self, microbatch: int) -> list[Message]:
        return [Message(self.rank + 1, "B", microbatch)] if self.rank < self.pp - 1 else []

    def back(self, microbatch: int) -> list[Message]:
        return [Message(self.rank, "B", microbatch)] if self.rank > 0 else []


def _now(messages: Sequence[Message]) -> Iterator[Action]:
    yield "ask", messages
    yield "wait", messages


def _gpipe(ends: _Ends, count: int) -> Iterator[Action]:
    """Receive and wait, compute, send; what was sent is waited for between the passes and at the end."""
    for word, needs, makes in (("F", ends.input, ends.result), ("B", ends.gradient, ends.back)):
        for number in range(count):
            yield from _now(needs(number))
            yield word, ()
            yield "ask", makes(number)
        yield "wait", [message for number in range(count) for message in makes(number)]


def _one_forward_one_backward(ends: _Ends, count: int) -> Iterator[Action]:
    """In the middle a send and the receive after it are waited for as one; at both ends sends are later."""
    ahead = min(count, ends.pp - ends.rank)
    sent: list[Message] = []
    for number in range(ahead):
        yield from _now(ends.input(number))
        yield "F", ()
        yield "wait", sent
        if number < ahead - 1:
            sent = ends.result(number)
            yield "ask", sent
    sent = ends.result(ahead - 1)
    for number in range(count - ahead + 1):
        yield from _now(sent + ends.gradient(number))
        yield "B", ()
        sent = ends.back(number)
        if number + ahead < count:
            yield from _now(sent + ends.input(number + ahead))
            yield "F", ()
            sent = ends.result(number + ahead)
    yield "ask", sent
    for number in range(count - ahead + 1, count):
        yield from _now(ends.gradient(number))
        yield "B", ()
        yield "wait", sent
        sent = ends.back(number)
        yield "ask", sent
    yield "wait", sent
