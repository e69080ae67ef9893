"""What a person sees of a run."""

from __future__ import annotations

import io

from rich.console import Console

from planner.execute.metrics import StepMetrics, bar_on, told


def test_a_narrow_terminal_hides_neither_steps_nor_figures() -> None:
    metrics = StepMetrics(step=12, loss=6.9429, learning_rate=1e-3, gradient_norm=None, seconds=0.184,
                          tokens_per_second=2780.0, mfu=0.0628, predicted_seconds=0.0323,
                          allocated_bytes=351 * 1024.0**2, reserved_bytes=1.0)  # fmt: skip
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=True, color_system=None)
    bar = bar_on(console)
    bar.add_task(told(metrics), total=100_000, completed=metrics.step)
    console.print(bar.get_renderable())
    shown = screen.getvalue()
    assert "12/100000" in shown
    assert all(word in shown for word in told(metrics).split())
