"""What a rank does, as a value and as the line that others read of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What a rank does."""

    rank: int
    stage: int
    pid: int
    step: int = -1  # before the first one
    phase: str = "setup"
    module: str = ""
    events: int = 0  # modules entered so far: the rank that hangs is behind the others

    @property
    def told(self) -> str:
        """`rank 3 (stage 1), step 12, backward, blocks.5.attention`."""
        words = [f"rank {self.rank} (stage {self.stage})"]
        words += [f"step {self.step + 1}", self.phase] if self.step >= 0 else ["before the first step"]
        return ", ".join(words + ([self.module] if self.module else []))

    @property
    def line(self) -> str:
        """As `parsed` reads it."""
        return f"{self.rank} {self.stage} {self.pid} {self.step} {self.events} {self.phase} {self.module}"

    @classmethod
    def parsed(cls, line: str) -> Where:
        """The inverse of `line`; a ValueError where it is none."""
        *numbers, phase, module = line.split(" ", 6)
        rank, stage, pid, step, events = map(int, numbers)
        return cls(rank=rank, stage=stage, pid=pid, step=step, events=events, phase=phase, module=module)
