"""What a rank of a test does with a Hugging Face module: a step of a plan, compared with the module's own step."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from planner.execute.huggingface_build import in_double
from planner.execute.huggingface_stage import spec_of_huggingface
from planner.execute.parameters import local, pieces_of
from planner.execute.runner import Runner, parallelize
from planner.execute.weights import own_shard, owner_of
from planner.spec.strategy import Strategy
from tests.execute.cases import global_batch
from tests.execute.plans import plan_of
from tests.models.huggingface_cases import CASES

SEQUENCES = 4


def module_of(name: str, changed: dict[str, Any], *, values: bool = True) -> nn.Module:
    """A module of the library in double precision, every weight at random and without dropout."""
    import transformers

    model_type, config = CASES[name]
    dropless = dict.fromkeys(("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"), 0.0)
    built = transformers.AutoConfig.for_model(model_type, **dropless | config | changed)
    with in_double():
        module = transformers.AutoModelForCausalLM.from_config(
            built, attn_implementation="eager", experts_implementation="eager"
        )
    with torch.no_grad():
        for path, weight in module.named_parameters() if values else ():
            digest = hashlib.sha256(path.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.1)
    return module.train()


def batch_of(module: nn.Module) -> dict[str, Tensor]:
    """Tokens and labels as the library takes them: what is not counted stands at the end of some sequences."""
    tokens, labels = global_batch(spec_of_huggingface(module), SEQUENCES)
    return {"input_ids": tokens, "labels": torch.where(labels == -100, labels, tokens)}


@functools.cache
def reference(name: str, changed: tuple[tuple[str, Any], ...]) -> tuple[float, dict[str, Tensor]]:
    """The library's own loss of the whole batch, and its gradients."""
    module = module_of(name, dict(changed))
    with in_double():
        loss = module(**batch_of(module), use_cache=False).loss
        loss.backward()
    return float(loss.detach()), {path: p.grad for path, p in module.named_parameters() if p.grad is not None}


def errors_of(name: str, changed: dict[str, Any], keys: dict[str, Any], ranks: int) -> dict[str, float]:
    """Largest relative error of the loss and of each gradient that this rank holds a part of."""
    module = module_of(name, changed)
    strategy = Strategy.from_dict(keys, gpus=ranks)
    spec = spec_of_huggingface(module)
    with in_double():
        runner = parallelize(module, plan_of(spec, strategy, SEQUENCES))
        each = SEQUENCES // strategy.dp
        first = runner.meshes.data_rank // strategy.cp * each
        own = {key: value[first : first + each] for key, value in batch_of(module).items()}
        loss = float(runner.step(own))
    wanted_loss, wanted = reference(name, tuple(sorted(changed.items())))
    errors = {"loss": abs(loss - wanted_loss) / abs(wanted_loss)}
    assert set(dict(runner.named_parameters())) <= set(wanted) | {"lm_head.weight"}
    return errors | gradient_errors(runner, wanted, tied={"lm_head.weight": next(iter(wanted))})


def gradient_errors(runner: Runner, wanted: dict[str, Tensor], tied: dict[str, str]) -> dict[str, float]:
    """By path; a gradient's part is compared with that part of what one process has."""
    floor = 1e-4 * max(float(grad.abs().max()) for grad in wanted.values())
    errors = {}
    for path, parameter in runner.named_parameters():
        whole = wanted[path if path in wanted else tied[path]]
        owner, name = owner_of(runner.module, path)
        part = whole
        for piece in pieces_of(owner, name):
            part = piece.of(part)
        part = own_shard(parameter, part)
        assert parameter.grad is not None, f"{path} has no gradient"
        grad = local(parameter.grad)
        assert grad.shape == part.shape, path
        difference = float((grad - part).abs().max()) if part.numel() else 0.0
        errors[path] = difference / max(float(whole.abs().max()), floor)
    return errors


def run_cases(cases: list[tuple[str, dict[str, Any], dict[str, Any]]], ranks: int) -> list[str]:
    """What went wrong in each of several cases, one after another in one world."""
    wrong = []
    for name, changed, keys in cases:
        errors = errors_of(name, changed, keys, ranks)
        found = {path: error for path, error in errors.items() if not error < 1e-10}
        if found:
            wrong.append(f"{name} {changed} {keys}: {found}")
    return wrong
