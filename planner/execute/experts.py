"""Experts over ranks: every token reaches its top-k, wherever those live, however uneven the load.

Each rank routes its own tokens; under tp a rank's own tokens are its part of the sequence. Rows travel to
their experts in one all-to-all and come back in another. Where etp ranks share an expert's matrices, rows
are gathered among them before the products and summed back after.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # no public test for a tensor without values exists

from planner.errors import PlannerError
from planner.execute.mesh import Meshes, Peers
from planner.execute.moves import convert
from planner.execute.parameters import Piece, cut, local_parameters, replace_forward
from planner.execute.phases import phase
from planner.models.feedforward import Experts, MixtureOfExperts
from planner.spec.plan import ModuleSplit


def spread_experts(mixture: MixtureOfExperts, plan: ModuleSplit, meshes: Meshes) -> None:
    """Let a mixture run with ep·etp ranks to one set of experts. `plan` has the layouts of its tokens."""
    if plan.split != "expert":
        raise PlannerError(
            "experts are spread over ep ranks",
            value=f"split: {plan.split}",
            remedy="set split: expert",
            key="modules",
        )
    _cut_experts(mixture.experts, meshes)
    replace_forward(mixture, lambda _: _Spread(mixture, plan, meshes))


def _cut_experts(experts: Experts, meshes: Meshes) -> None:
    """Matrices by expert over ep; over etp the inner width, of gate and up each where they are stored as one."""
    assert meshes.experts is not None
    inner = {"gate": 2, "up": 2, "down": 1, "gate_bias": 1, "up_bias": 1, "gate_up_proj": 1, "down_proj": 2}
    axes = ("ep", "etp") if meshes.etp.size > 1 else ("ep",)
    for name, value in list(experts._parameters.items()):
        if value is None:
            continue
        if meshes.etp.size > 1 and name not in inner:
            raise PlannerError(
                "a bias behind the experts' sum is not split",
                value=f"etp {meshes.etp.size}",
                remedy="set etp to 1",
                key="etp",
            )
        pieces = [Piece(0, meshes.ep.size, meshes.ep.rank)]
        if len(axes) == 2:
            parts = (value.shape[1] // 2,) * 2 if name == "gate_up_proj" else ()
            pieces.append(Piece(inner[name], meshes.etp.size, meshes.etp.rank, parts=parts))
        cut(experts, name, meshes.experts[axes] if len(axes) == 2 else meshes.experts["ep"], *pieces)

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(rows: Tensor, expert: Tensor, counts: Tensor) -> Any:
            with local_parameters(experts):
                return forward(rows, expert, counts)

        return run

    replace_forward(experts, wrap)


class _Spread:
    """The forward of a mixture whose experts live on several ranks."""

    def __init__(self, mixture: MixtureOfExperts, plan: ModuleSplit, meshes: Meshes) -> None:
        self.mixture = mixture
        self.plan = plan
        self.tp, self.ep, self.etp = meshes.tp, meshes.ep, meshes.etp

    def __call__(self, x: Tensor) -> Tensor:
        mixture = self.mixture
        own = convert(x, self.plan.input, "sequence", self.tp)
        tokens = own.flatten(0, -2)
        weights, chosen = mixture.router(tokens)
        expert, order = chosen.flatten().sort(stable=True)
        counts = _counted(expert, mixture.moe.experts)
        token = order // mixture.moe.top_k
        rows = self._through_experts(tokens[token], expert, counts)
        rows = rows * weights.flatten()[order, None].to(rows.dtype)
        out = torch.zeros_like(tokens).index_add(0, token, rows).view_as(own)
        out = convert(out, "sequence", self.plan.output, self.tp)
        if mixture.shared is not None:
            shared = mixture.shared(x)
            if mixture.shared_gate is not None:
                shared = shared * mixture.shared_gate(x).sigmoid()
            out = out + shared
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many rows arrive is known when they do
    def _through_experts(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        """Rows [n, hidden], sorted by expert, to their experts and back in the same order."""
        if self.ep.size == 1:
            return self._products(rows, expert, counts)
        arriving = _exchanged(counts, self.ep)  # [from rank, own expert]
        send, receive = _sizes(counts, arriving, self.ep, rows.shape[0])
        rows = _AllToAll.apply(rows, send, receive, self.ep)  # one name, so that none outlives its use
        own = _repeated(arriving, rows.shape[0])
        expert, order = own.sort(stable=True)
        rows = rows[order]
        rows = self._products(rows, expert, arriving.sum(0))
        rows = rows[order.argsort()]
        back: Tensor = _AllToAll.apply(rows, receive, send, self.ep)
        return back

    def _products(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        if self.etp.size == 1:
            out: Tensor = self.mixture.experts(rows, expert, counts)
            return out
        held = rows.shape[0]
        most = _greatest(held, rows, self.etp)
        # rows added to make lengths equal go to the last expert and are dropped again
        rows = F.pad(rows, (0, 0, 0, most - held))
        last = counts.shape[0] - 1
        expert = F.pad(expert, (0, most - held), value=last)
        rows = convert(rows, "sequence", "replicate", self.etp, gradient="partial")
        experts = _gathered_plainly(expert, self.etp)
        sorted_experts, order = experts.sort(stable=True)
        rows = rows[order]
        rows = self.mixture.experts(rows, sorted_experts, _counted(experts, last + 1))
        rows = rows[order.argsort()]
        return convert(rows, "partial", "sequence", self.etp)[:held]


def _counted(expert: Tensor, experts: int) -> Tensor:
    counts = torch.zeros(experts, dtype=torch.long, device=expert.device)
    return counts.scatter_add(0, expert, torch.ones_like(expert))


def _exchanged(counts: Tensor, peers: Peers) -> Tensor:
    """How many rows come from each rank for each of the own experts."""
    arriving = torch.empty_like(counts)
    with phase("metadata"):
        dist.all_to_all_single(arriving, counts, group=peers.group)
    return arriving.view(peers.size, -1)


def _sizes(counts: Tensor, arriving: Tensor, peers: Peers, rows: int) -> tuple[list[int], list[int]]:
    """Rows to and from each rank; without values, an even load."""
    if isinstance(counts, FakeTensor):
        even = [rows // peers.size + (rank < rows % peers.size) for rank in range(peers.size)]
        return even, even
    return counts.view(peers.size, -1).sum(1).tolist(), arriving.sum(1).tolist()


def _repeated(arriving: Tensor, rows: int) -> Tensor:
    """The own expert of each row that arrived: by rank, and within a rank by expert."""
    own = torch.arange(arriving.shape[1], device=arriving.device).repeat(arriving.shape[0])
    return own.repeat_interleave(arriving.flatten(), output_size=rows)


def _greatest(rows: int, like: Tensor, peers: Peers) -> int:
    if isinstance(like, FakeTensor):
        return rows
    most = torch.tensor(rows, device=like.device)
    with phase("metadata"):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=peers.group)
    return int(most)


def _gathered_plainly(expert: Tensor, peers: Peers) -> Tensor:
    out = expert.new_empty(peers.size * expert.numel())
    with phase("metadata"):
        dist.all_gather(list(out.chunk(peers.size)), expert.contiguous(), group=peers.group)
    return out


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks that they belong to; gradients the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], peers: Peers) -> Tensor:
        ctx.back = receive, send, peers
        return _all_to_all(rows, send, receive, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], *ctx.back), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], peers: Peers) -> Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=peers.group)
    return out
