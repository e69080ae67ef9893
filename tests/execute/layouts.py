"""The splits by which decoders are run over tp, written by hand."""

from __future__ import annotations

from planner.spec.model import ModelSpec
from planner.spec.plan import Layout, ModuleSplit


def decoder_splits(spec: ModelSpec, *, sp: bool = False, logits: Layout = "features") -> dict[str, ModuleSplit]:
    """As Megatron splits: columns then rows, vocabulary at both ends; with sp, norms on parts of the sequence."""
    between: Layout = "sequence" if sp else "replicate"
    aside = ModuleSplit(split="sequence" if sp else "replicate", input=between, output=between)
    column = ModuleSplit(split="column", input=between, output="features")
    row = ModuleSplit(split="row", input="features", output=between)
    heads = ModuleSplit(split="heads", input="features", output="features")
    table = ModuleSplit(split="sequence" if sp else "replicate", output=between)
    splits = {
        "embedding.tokens": ModuleSplit(split="vocab", output=between),
        "blocks.*.attention_norm": aside,
        "blocks.*.attention.core": heads,
        "blocks.*.attention.output": row,
        "head.projection": ModuleSplit(split="vocab", input=between, output=logits),
    }
    if spec.mla is None:
        splits |= dict.fromkeys((f"blocks.*.attention.{name}" for name in ("query", "key", "value")), column)
    else:
        whole = ModuleSplit(split="replicate")
        splits |= {
            "blocks.*.attention.query_up": column,
            "blocks.*.attention.latent": ModuleSplit(split=aside.split, input=between, output="replicate"),
            "blocks.*.attention.latent_norm": whole,
            "blocks.*.attention.expand": ModuleSplit(split="column", output="features"),
        }
        if spec.mla.query_rank:
            splits |= dict.fromkeys(("blocks.*.attention.query_down", "blocks.*.attention.query_norm"), aside)
    if spec.positions == "learned":
        splits["embedding.positions"] = table
    if spec.embedding_norm:
        splits["embedding.norm"] = aside
    if spec.qk_norm:
        splits |= dict.fromkeys(("blocks.*.attention.query_norm", "blocks.*.attention.key_norm"), heads)
    if spec.parallel_block != "one_norm":
        splits["blocks.*.ffn_norm"] = aside
    if spec.norm_position == "sandwich":
        splits |= dict.fromkeys(("blocks.*.attention_post_norm", "blocks.*.ffn_post_norm"), aside)
    if spec.final_norm:
        splits["norm"] = aside
    experts = {spec.has_experts(layer) for layer in range(spec.layers)}
    if False in experts:
        splits |= _feed_forward("blocks.*.ffn", spec.gated, column, row)
    if spec.moe is not None:
        splits["blocks.*.ffn.experts"] = ModuleSplit(split="expert", input=between, output=between)
        own = ModuleSplit(split="sequence", input="sequence", output="sequence")
        splits["blocks.*.ffn.router"] = own
        if spec.moe.shared_ffn:
            splits |= _feed_forward("blocks.*.ffn.shared", spec.gated, column, row)
        if spec.moe.shared_expert_gate:
            splits["blocks.*.ffn.shared_gate"] = aside
    return splits


def _feed_forward(path: str, gated: bool, column: ModuleSplit, row: ModuleSplit) -> dict[str, ModuleSplit]:
    splits = {f"{path}.up": column, f"{path}.down": row}
    return splits | ({f"{path}.gate": column} if gated else {})
