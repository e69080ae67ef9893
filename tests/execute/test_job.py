"""What weights are exported with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from planner.execute.job import Job, export_config
from planner.spec.huggingface_config import config_from_spec
from tests.tiny import tiny_spec


def test_a_configuration_that_is_there_goes_before_one_that_is_made(tmp_path: Path) -> None:
    spec = tiny_spec("llama")

    def config_for(model: str, weights: str | None) -> dict[str, Any]:
        job = SimpleNamespace(spec=spec, plan=SimpleNamespace(model=model), run=SimpleNamespace(weights=weights))
        return export_config(cast("Job", job))

    assert config_for("tiny", None) == config_from_spec(spec)
    given = {"model_type": "llama", "architectures": ["Theirs"]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert config_for("tiny", str(tmp_path)) == config_for(str(tmp_path), None) == given
