"""A stage of a Hugging Face decoder: its own modules at their own paths, called layer by layer.

Norms, feed-forward layers and residuals run as the library wrote them. Attention and experts run through our
kernels, so that heads, windows and tokens may be spread over ranks. A plan names modules as the bundled model of
the same architecture does: the table that translates weights translates its lines too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.parameters import local, replace_forward
from planner.execute.stage import Stage
from planner.execute.weights import without_values
from planner.models.huggingface import module_paths, pieces_by_path
from planner.models.huggingface_modules import adopt_attention, adopt_experts, adopt_linear
from planner.models.positions import Positions
from planner.spec.huggingface import spec_data_from_config
from planner.spec.model import ModelSpec
from planner.spec.paths import Span

# architectures whose layers hand position_embeddings on to attention, and whose weights all have names of ours
_RUN = ("gemma", "gemma2", "gpt2", "llama", "mistral", "mixtral", "opt", "qwen2", "qwen3", "qwen3_moe")
_PARTS = ("query", "key", "value", "query_norm", "key_norm", "output")


class Tables:
    """The embeddings of a stage, which have no module in common. Each looks up, and does nothing else."""

    def __init__(self, spec: ModelSpec, tokens: nn.Module, positions: nn.Module | None, drop: nn.Module | None):
        self.spec = spec
        self.tokens = tokens
        self.positions = positions
        self.drop = drop
        for table in (tokens, positions):
            if table is not None:
                _look_up_alone(table)

    def __call__(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            first = self.spec.position_offset
            x = x + self.positions(torch.arange(first, first + tokens.shape[1], device=tokens.device))
        return x if self.drop is None else self.drop(x)


class HuggingFaceStage(Stage):
    """A stage of a Hugging Face model for causal language modelling. The model itself is left as it is."""

    shifts_labels = True

    def __init__(self, model: nn.Module, layers: Span, *, first: bool, last: bool) -> None:
        super().__init__()
        self.spec = spec_of_huggingface(model)
        self.length_factor = 1
        self.positions_of = None
        self._ours = module_paths(type_of_huggingface(model))
        self._theirs = {ours: theirs for theirs, ours in self._ours.items()}
        for name, child in without_values(model).named_children():
            self.add_module(name, child)
        for module in self.modules():
            module._buffers.clear()  # angles and scales are computed: nothing to lose on the meta device
        tokens, positions = (self._end(f"embedding.{name}", first) for name in ("tokens", "positions"))
        # further names of parts that have paths already
        self.__dict__["embedding"] = Tables(self.spec, tokens, positions, self._dropout()) if tokens else None
        self.__dict__["norm"] = self._end("norm", last)
        self.__dict__["head"] = self._end("head.projection", last)
        self.__dict__["blocks"] = self._own_blocks(layers)
        self.tie_weights()

    @property
    def embedding_modules(self) -> list[nn.Module]:
        """Those that hold the tables."""
        tables = self.embedding
        return [] if tables is None else [each for each in (tables.tokens, tables.positions) if each is not None]

    @property
    def projection(self) -> nn.Module | None:
        """The head's matrix."""
        return self.head

    def plan_path(self, path: str) -> str:
        """Where the bundled model of the architecture has this module."""
        for theirs, ours in self._ours.items():
            before, star, after = theirs.partition("*")
            if not star and path == theirs:
                return ours
            if star and path.startswith(before) and path.endswith(after):
                layer = path[len(before) : len(path) - len(after)]
                if layer.isdigit():
                    return ours.replace("*", layer)
        return path

    def fused_widths(self, path: str) -> tuple[int, ...]:
        """Of queries, keys and values where one layer gives them all."""
        if "blocks.*.attention.key" in self._theirs or not self.plan_path(path).endswith(".attention.query"):
            return ()
        spec = self.spec
        return tuple(heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads))

    def run_block(self, block: nn.Module, x: Tensor, positions: Positions) -> Tensor:
        """One layer, which takes angles by the library's name for them."""
        out: Tensor = block(x, position_embeddings=positions)
        # OPT's are views of what it adds up, from which torch cannot cut a backward in two
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """What the head gives, capped where the model does so behind it."""
        out: Tensor = head(x)
        softcap = self.spec.logit_softcap
        return (out / softcap).tanh() * softcap if softcap else out

    def _end(self, ours: str, keep: bool) -> nn.Module | None:
        """A module before or behind the layers; dropped where it belongs to another stage."""
        path = self._theirs.get(ours)
        if path is None:
            return None
        parent, name = self._owner(path)
        if not keep:
            setattr(parent, name, None)
        found: nn.Module | None = getattr(parent, name)
        return found

    def _dropout(self) -> nn.Module | None:
        """What follows the tables."""
        parent, _ = self._owner(self._theirs["embedding.tokens"])
        found: nn.Module | None = getattr(parent, "drop", None)
        return found

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        before, _, name = path.rpartition(".")
        return self.get_submodule(before), name

    def _own_blocks(self, layers: Span) -> dict[str, nn.Module]:
        before, _, _ = self._theirs["blocks.*.attention_norm"].partition(".*.")
        parent, name = self._owner(before)
        every = getattr(parent, name)
        own = {str(layer): every[layer] for layer in range(layers.first, layers.last + 1)}
        setattr(parent, name, nn.ModuleDict(own))
        parent.register_module("rotary_emb", None)
        for layer, block in own.items():
            block.gradient_checkpointing = False  # what runs again is for the plan to say
            self._prepare(block, f"{before}.{layer}.", int(layer))
        return own

    def _prepare(self, block: nn.Module, prefix: str, layer: int) -> None:
        """Let attention, experts and transposed layers of a block be modules that we can spread."""
        for module in block.modules():
            if type(module).__name__ == "Conv1D":
                adopt_linear(module)
        found: dict[str, Any] = {}
        for ours, theirs in self._theirs.items():
            path = theirs.replace("*", str(layer))
            if path.startswith(prefix):
                found[ours.removeprefix("blocks.*.")] = _part(self, path)
        attention = self.get_submodule(
            self._theirs["blocks.*.attention.core"].replace("*", str(layer)).rpartition(".")[0]
        )
        parts = {name: found.get(f"attention.{name}") for name in _PARTS}
        if parts["key"] is None:
            parts["fused"] = parts.pop("query")
        parts["dropped"] = getattr(attention, "resid_dropout", None)
        held = {name: part for name, part in parts.items() if part is not None}
        adopt_attention(attention, self.spec, self.spec.window_of(layer), held)
        if self.spec.moe is not None and self.spec.has_experts(layer):
            mixture, _ = self._owner(self._theirs["blocks.*.ffn.experts"].replace("*", str(layer)))
            adopt_experts(mixture, found["ffn.router"], found["ffn.experts"], self.spec)


def is_huggingface(model: nn.Module) -> bool:
    """Whether a module is one of transformers; which need not be installed to ask."""
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def type_of_huggingface(model: nn.Module) -> str:
    """The `model_type` of its configuration."""
    return str(_config(model).get("model_type"))


def spec_of_huggingface(model: nn.Module) -> ModelSpec:
    """What the model is, by its configuration."""
    config = _config(model)
    model_type = config.get("model_type")
    if model_type not in _RUN:
        raise PlannerError(
            "the executor runs these Hugging Face architectures: " + ", ".join(_RUN),
            value=model_type,
            remedy="load its checkpoint into the bundled model, or give a module of one of these",
            key="model",
        )
    spec = ModelSpec.from_dict(spec_data_from_config(config))
    try:
        pieces_by_path((name for name, _ in model.named_parameters()), model_type)
        model.get_submodule("lm_head")
    except (ValueError, AttributeError) as error:
        raise PlannerError(
            f"a {model_type} model for causal language modelling runs as transformers builds it",
            value=f"{type(model).__name__}: {error}",
            remedy="use AutoModelForCausalLM, without adapters or further weights",
            key="model",
        ) from None
    return spec


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    data: dict[str, Any] = config.to_dict()
    return data


def _part(stage: nn.Module, path: str) -> nn.Module | None:
    try:
        return stage.get_submodule(path)
    except AttributeError:
        return None


def _look_up_alone(table: Any) -> None:
    def forward(index: Tensor) -> Tensor:
        return F.embedding(index, local(table.weight), padding_idx=table.padding_idx)

    replace_forward(table, lambda _: forward)
