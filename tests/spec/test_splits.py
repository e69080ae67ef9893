"""Splits by dataflow: Megatron's pairing where it applies, and what has to stay whole."""

from __future__ import annotations

import pytest

from planner.spec.graph import Block, Graph
from planner.spec.plan import Layout, ModuleSplit, Split
from planner.spec.splits import OperatorSplit, block_splits, could_be_cut, graph_splits, module_splits
from tests.cost.training_cases import tiny, user

LAYERS = {
    "gpt": ("blocks.0", {
        "attention_norm": "replicate", "attention.query": "column", "attention.key": "column",
        "attention.value": "column", "attention.core": "heads", "attention.output": "row",
        "ffn_norm": "replicate", "ffn.up": "column", "ffn.activation": "heads", "ffn.down": "row",
    }),
    "llama": ("blocks.0", {
        "attention.query": "column", "attention.key": "column", "attention.value": "column",
        "attention": "heads", "attention.core": "heads", "attention.output": "row", "ffn.gate": "column",
        "ffn.up": "column", "ffn.activation": "heads", "ffn.down": "row",
    }),
    "qwen3": ("blocks.0", {
        "attention.query_norm": "heads", "attention.key_norm": "heads", "ffn_norm": "replicate",
    }),
    "deepseek": ("blocks.1", {
        "attention.query_down": "replicate", "attention.query_norm": "replicate", "attention.query_up": "column",
        "attention.latent": "replicate", "attention.latent_norm": "replicate", "attention.expand": "column",
        "attention.core": "heads", "attention.output": "row", "ffn.router": "replicate",
        "ffn.shared.gate": "column", "ffn.shared.up": "column", "ffn.shared.down": "row",
    }),
    "mixtral": ("blocks.0", {"ffn.router": "replicate", "attention.core": "heads", "attention.output": "row"}),
    "vit": ("blocks.0", {
        "attention.query": "column", "attention.output": "row", "ffn.up": "column", "ffn.down": "row",
    }),
    "t5": ("decoder_blocks.0", {
        "cross_norm": "replicate", "cross.query": "column", "cross.key": "column", "cross.value": "column",
        "cross.core": "heads", "cross.output": "row", "ffn.up": "column", "ffn.down": "row",
    }),
    "unfused": ("blocks.0", {"attention.query": "column", "attention.output": "row", "ffn.down": "row"}),
}  # fmt: skip
ENDS = {
    "gpt": {"embedding.tokens": "vocab", "embedding.positions": "replicate", "head.projection": "vocab"},
    "bert": {"embedding.types": "replicate", "head.dense": "replicate", "head.projection": "vocab"},
    "vit": {"patches": "replicate", "head": "vocab"},
    "t5": {"embedding.tokens": "vocab", "encoder_bias.table": "replicate", "decoder_bias.table": "replicate",
           "head.projection": "vocab"},
}  # fmt: skip
USERS = {
    "mlp": {"net.0": "column", "net.2": "row", "net.3": "column", "net.5": "row", "net.8": "row"},
    "hybrid": {"stem.0": "replicate", "stem.2": "replicate", "layers.0.qkv": "column", "layers.0.out": "row",
               "layers.3.mlp.1": "column", "layers.3.mlp.3": "row", "head": "vocab"},
    "scaled": {"layers.0.qkv": "column", "layers.2.out": "row", "bridge": "replicate"},
    "relu_chain": {"layers.0.linear": "replicate", "layers.5.linear": "replicate"},
}  # fmt: skip
EVERY_TINY = ("gpt", "llama", "qwen3", "deepseek", "mixtral", "vit", "t5", "unfused", "bert")


def of_modules(block: Block) -> dict[str, set[str]]:
    """The splits of the operators of each module."""
    splits, found = block_splits(block), {}
    for operator in block.operators:
        found.setdefault(operator.module, set()).add(splits[operator.name].split)
    return found


def graphs() -> list[Graph]:
    return [tiny(name) for name in EVERY_TINY] + [user(name) for name in USERS]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    block, expected = LAYERS[name]
    found = of_modules(tiny(name).blocks[block])
    assert {module: found[module] for module in expected} == {key: {split} for key, split in expected.items()}


@pytest.mark.parametrize("name", ENDS)
def test_what_stands_around_the_layers(name: str) -> None:
    splits = module_splits(tiny(name))
    assert {module: splits[module].split for module in ENDS[name]} == ENDS[name]


@pytest.mark.parametrize("name", USERS)
def test_modules_of_users(name: str) -> None:
    splits = module_splits(user(name))
    assert {module: splits[module].split for module in USERS[name]} == USERS[name]


def test_the_shared_rotary_part_of_latent_attention_stays_whole() -> None:
    """DeepSeek's one rotary key meets every head: it is rotated whole and joins keys that are cut."""
    block = tiny("deepseek").blocks["blocks.1"]
    splits = block_splits(block)
    latent = next(op.outputs[0].name for op in block.operators if op.module == "attention.latent")
    rotated = [
        op.name for op in block.operators if op.inputs and op.inputs[0].name == latent and op.kind == "elementwise"
    ]
    assert len(rotated) == 4
    assert {splits[name].split for name in rotated} == {"replicate"}
    joined = [op for op in block.operators if op.call == "cat"]
    assert [splits[op.name].split for op in joined] == ["heads", "heads"]


@pytest.mark.parametrize(("name", "block"), [("mixtral", "blocks.0"), ("deepseek", "blocks.1")])
def test_experts_take_whole_tokens_and_give_whole_ones(name: str, block: str) -> None:
    operators = tiny(name).blocks[block].operators
    splits = block_splits(tiny(name).blocks[block])
    products = [splits[op.name] for op in operators if op.kind == "grouped_matmul"]
    assert products == [OperatorSplit(split="expert", output="replicate")] * 3
    assert {splits[op.name].split for op in operators if op.kind == "routing"} == {"replicate"}


def test_masks_stay_whole_and_scores_are_cut() -> None:
    block = tiny("unfused").blocks["blocks.0"]
    splits = block_splits(block)
    by_call = {op.call: splits[op.name].split for op in block.operators if op.module == "attention.core"}
    assert by_call["lt"] == by_call["sub"] == "replicate"
    assert by_call["matmul"] == by_call["softmax"] == by_call["masked_fill"] == "heads"


def test_what_a_loss_sees_is_cut_along_the_vocabulary() -> None:
    block = tiny("gpt").blocks["end"]
    splits = block_splits(block)
    names = {op.call: op.name for op in block.operators}
    assert splits[names["cross_entropy_loss"]] == OperatorSplit(split="vocab", output="replicate")
    assert splits[names["linear"]].split == "vocab"
    assert splits[names["layer_norm"]].split == "replicate"


def test_nothing_leaves_a_block_cut() -> None:
    for graph in graphs():
        for name, block in graph.blocks.items():
            splits = block_splits(block)
            makers = {tensor.name: op.name for op in block.operators for tensor in op.outputs}
            for output in block.outputs:
                if output in makers:
                    assert splits[makers[output]].output != "features", (graph.name, name, output)


def test_row_cuts_meet_cut_values_and_column_cuts_whole_ones() -> None:
    for graph in graphs():
        for name, splits in graph_splits(graph).items():
            block = graph.blocks[name]
            cut = {t.name for op in block.operators if splits[op.name].output == "features" for t in op.outputs}
            for op in block.operators:
                split = splits[op.name]
                if split.split == "row":
                    assert op.inputs[0].name in cut
                    assert split.output == "partial"
                if split.split in ("column", "vocab") and op.kind == "matmul":
                    assert op.inputs[0].name not in cut
                    assert split.gathers in ((op.inputs[0].name,), ()), "or gathered behind what made it"
                if op.kind == "routing" or (op.kind == "norm" and len(op.inputs[0].shape) < 4):
                    assert not {tensor.name for tensor in op.inputs} & cut


def test_every_operator_has_one_split() -> None:
    for graph in graphs():
        for name, splits in graph_splits(graph).items():
            assert set(splits) == {op.name for op in graph.blocks[name].operators}


def test_modules_with_and_without_sequence_parallelism() -> None:
    plain, sequence = module_splits(tiny("gpt")), module_splits(tiny("gpt"), sequence_parallel=True)
    assert plain["blocks.1.ffn.up"] == ModuleSplit(split="column", input="replicate", output="features")
    assert sequence["blocks.1.ffn.up"] == ModuleSplit(split="column", input="sequence", output="features")
    assert plain["blocks.0.ffn.down"] == ModuleSplit(split="row", input="features", output="replicate")
    assert sequence["blocks.0.ffn.down"] == ModuleSplit(split="row", input="features", output="sequence")
    assert plain["norm"] == ModuleSplit(split="replicate")
    assert sequence["norm"] == ModuleSplit(split="sequence", input="sequence", output="sequence")
    assert sequence["blocks.0.attention.core"] == ModuleSplit(split="heads", input="features", output="features")
    assert sequence["embedding.tokens"].output == "sequence"
    assert sequence["head.projection"] == ModuleSplit(split="vocab", input="sequence", output="features")


def test_norms_of_heads_see_cut_values_in_either_case() -> None:
    for sequence_parallel in (False, True):
        split = module_splits(tiny("qwen3"), sequence_parallel=sequence_parallel)["blocks.0.attention.query_norm"]
        assert (split.input, split.output) == ("features", "features")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_all_heads_read_is_gathered_once(sequence_parallel: bool) -> None:
    """DeepSeek's latent and its rotary key come from one product: its result is whole on every rank."""
    splits = module_splits(tiny("deepseek"), sequence_parallel=sequence_parallel)
    between: Layout = "sequence" if sequence_parallel else "replicate"
    own: Split = "sequence" if sequence_parallel else "replicate"
    attention = {
        path.rpartition(".")[2]: splits[path] for path in splits if path.startswith("blocks.1.attention.")
    }
    assert attention["latent"] == ModuleSplit(split=own, input=between, output="replicate")
    assert attention["latent_norm"] == ModuleSplit(split="replicate")
    assert attention["expand"] == ModuleSplit(split="column", output="features")
    assert attention["query_norm"] == ModuleSplit(split=own, input=between, output=between)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_rank_routes_its_own_tokens(name: str, sequence_parallel: bool) -> None:
    """Also where activations between modules are whole; the experts' biases are spread as their matrices are."""
    splits = module_splits(tiny(name), sequence_parallel=sequence_parallel)
    assert splits["blocks.0.ffn.router"] == ModuleSplit(split="sequence", input="sequence", output="sequence")
    assert splits["blocks.0.ffn.experts"].split == "expert"


def names(block: Block, *modules: str) -> frozenset[str]:
    return frozenset(
        operator.name
        for operator in block.operators
        if operator.name in could_be_cut(block) and operator.module.startswith(modules)
    )


def test_a_whole_feed_forward_beside_cut_attention() -> None:
    block = tiny("llama").blocks["blocks.0"]
    splits = block_splits(block, names(block, "ffn."))
    by_module = {operator.module: splits[operator.name] for operator in block.operators}
    for module in ("ffn.gate", "ffn.up", "ffn.activation", "ffn.down"):
        assert by_module[module] == OperatorSplit(split="replicate", output="replicate")
    usual = block_splits(block)
    assert all(splits[op.name] == usual[op.name] for op in block.operators if op.module.startswith("attention"))


def test_one_whole_operand_makes_the_others_whole() -> None:
    """Keys of all heads do not meet queries of some."""
    block = tiny("gpt").blocks["blocks.0"]
    splits = block_splits(block, names(block, "attention.key"))
    assert not any(splits[op.name].is_cut for op in block.operators if op.module.startswith("attention"))
    assert any(splits[op.name].is_cut for op in block.operators if op.module.startswith("ffn"))


def test_cuts_move_along_a_chain() -> None:
    """With the first of six layers whole, the second is cut by columns where it was cut by rows."""
    block = user("mlp").blocks["start"]
    splits = block_splits(block, names(block, "net.0"))
    products = [splits[name].split for name in could_be_cut(block)]
    assert products == ["replicate", "column", "row", "column", "row", "replicate"]


def test_whole_tables_and_heads() -> None:
    for sequence_parallel, between in ((False, "replicate"), (True, "sequence")):
        graph = tiny("gpt")
        whole = {place: frozenset(could_be_cut(graph.blocks[graph.sequence[place].block])) for place in (0, 3)}
        lines = module_splits(graph, sequence_parallel=sequence_parallel, whole=whole)
        for path in ("embedding.tokens", "head.projection"):
            assert lines[path] == ModuleSplit(split=between, input=between, output=between)  # type: ignore[arg-type]


def test_what_all_heads_read_is_no_concern_of_whole_attention() -> None:
    block = tiny("deepseek").blocks["blocks.1"]
    splits = block_splits(block, names(block, "attention."))
    assert not any(split.hands_over or split.inside for split in splits.values())


def test_each_placement_has_its_own_whole_products() -> None:
    graph = tiny("llama")
    whole = {1: names(graph.blocks["blocks.0"], "ffn."), 2: frozenset[str]()}
    lines = module_splits(graph, sequence_parallel=True, whole=whole)
    assert lines["blocks.0.ffn.up"] == ModuleSplit(split="sequence", input="sequence", output="sequence")
    assert lines["blocks.0.attention.query"] == lines["blocks.1.attention.query"]
    usual = module_splits(graph, sequence_parallel=True)
    assert {path for path in lines if lines[path] != usual[path]} == {
        "blocks.0.ffn.gate", "blocks.0.ffn.up", "blocks.0.ffn.down"
    }  # fmt: skip
