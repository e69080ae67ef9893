"""How tensor parallelism cuts a block unless a plan says otherwise: Megatron's pairing, found in the graph.

Values flow from operator to operator either whole (on every rank, or cut along the sequence between the
tensor-parallel regions) or cut by features, heads or vocabulary. A product with weights that meets a whole
value is cut by columns and hands on cut values, one that meets cut values is cut by rows and its partial sums
are reduced. A column cut is taken back where what follows needs the whole value: a norm over all features, the
choice of experts, the end of the block. So a low-rank projection before its norm, or a router, stays replicated.
An assignment may keep more of them whole than that: `whole` names what it does not cut though it could.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from planner.spec.graph import Block, Graph, Operator, joined
from planner.spec.plan import Layout, ModuleSplit, Split
from planner.spec.sizes import Tensor

_OWN_TOKENS = ModuleSplit(split="sequence", input="sequence", output="sequence")
_CHOICES = ("routing",)  # operators that need every score


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSplit:
    """How one operator is cut, and the layout of its result before any reduction."""

    split: Split
    output: Layout  # replicate (whole), features (cut) or partial (to be summed)
    gathers: tuple[str, ...] = ()  # whole values that it takes into a tensor-parallel region
    hands_over: bool = False  # its whole result enters such a region as it is: gathered behind it
    inside: bool = False  # whole on every rank, and its gradient a sum over the ranks' heads

    @property
    def is_cut(self) -> bool:
        """Whether a rank does a share of the work; what is whole may still be cut along the sequence."""
        return self.split not in ("replicate", "sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """What one walk through a block finds."""

    splits: Mapping[str, OperatorSplit]
    spoiled: frozenset[str]  # products whose cut reaches what needs the whole value
    meetings: frozenset[tuple[str, str]]  # operators with a cut operand, and the storages that they read whole


def block_splits(block: Block, whole: frozenset[str] = frozenset()) -> dict[str, OperatorSplit]:
    """A split for each operator of a block, by its name.

    `whole` names products and vocabulary tables that stay whole although they could be cut. What can then no
    longer be cut, because it would meet their whole values, stays whole as well.
    """
    known = usual_meetings(block) if whole else None
    return _handed_over(block, _settled(block, whole, known).splits)


def usual_meetings(block: Block) -> frozenset[tuple[str, str]]:
    """Where whole values meet cut ones if all is cut that can be: masks at scores, a shared key at others."""
    return _settled(block, frozenset(), None).meetings


def _settled(block: Block, whole: frozenset[str], known: frozenset[tuple[str, str]] | None) -> Walk:
    """The walk in which nothing has to be taken back any more."""
    kept = whole
    while True:
        found = walk(block, kept, known)
        further = found.spoiled | _unequally_cut(block, found.splits)
        if further <= kept:
            return found
        kept |= further


def _unequally_cut(block: Block, splits: Mapping[str, OperatorSplit]) -> frozenset[str]:
    """Products that use the same weights, where each would cut them in another way."""
    users: dict[str, list[str]] = {}
    for operator in block.operators:
        if operator.kind in ("matmul", "embedding"):
            for path in operator.parameters:
                users.setdefault(path, []).append(operator.name)
    return frozenset(
        name for names in users.values() if len({splits[name].split for name in names}) > 1 for name in names
    )


def could_be_cut(block: Block) -> tuple[str, ...]:
    """Names of products with weights and of vocabulary tables, on which assignments may differ."""
    of_experts = _modules_of_experts(block)
    return tuple(
        operator.name
        for operator in block.operators
        if _is_vocabulary(block, operator)
        or (_multiplies_weights(operator) and operator.module not in of_experts and not _is_out_of_reach(operator))
    )


def _multiplies_weights(operator: Operator) -> bool:
    return operator.kind == "matmul" and bool(operator.parameters)


def _is_out_of_reach(operator: Operator) -> bool:
    """Whether a product reads weights past the module that would be cut, as attention in one module does.

    What is cut are modules of one `weight`; a tied one may stand elsewhere.
    """
    for path in operator.parameters:
        parent, _, name = path.rpartition(".")
        inside = parent != operator.module and (not operator.module or parent.startswith(f"{operator.module}."))
        if inside or name not in ("weight", "bias"):
            return True
    return False


def graph_splits(graph: Graph) -> dict[str, dict[str, OperatorSplit]]:
    """The splits of every block of a graph, by block and operator."""
    return {name: block_splits(block) for name, block in graph.blocks.items()}


def own_operators(block: Block, splits: Mapping[str, OperatorSplit]) -> tuple[str, ...]:
    """Names of operators that work on a rank's own tokens, from the router to the experts' weighted sum.

    Each rank routes its own, also where what surrounds them is whole.
    """
    places = [place for place, operator in enumerate(block.operators) if operator.kind == "grouped_matmul"]
    if not places:
        return ()
    mixture = block.operators[places[0]].module.rpartition(".")[0]
    inside = [
        (place, operator)
        for place, operator in enumerate(block.operators)
        if operator.module == mixture or operator.module.startswith(f"{mixture}.")
    ]
    # the weighted sum over a token's experts puts rows back in the order of tokens
    ends = [place for place, operator in inside if place > places[-1] and operator.kind == "indexing"]
    last = max(ends, default=places[-1])
    return tuple(
        operator.name
        for place, operator in inside
        if place <= last and splits[operator.name].split in ("replicate", "sequence", "expert")
    )


def module_splits(
    graph: Graph, *, sequence_parallel: bool = False, whole: Mapping[int, frozenset[str]] | None = None
) -> dict[str, ModuleSplit]:
    """The same by module path, for modules with weights and for attention cores: what an executor applies.

    `whole` names, by its place in the sequence, what a block keeps whole; other blocks are cut where they can be.
    """
    found: dict[str, ModuleSplit] = {}
    known: dict[tuple[str, frozenset[str]], dict[str, ModuleSplit]] = {}
    for place, placement in enumerate(graph.sequence):
        key = placement.block, (whole or {}).get(place, frozenset())
        if key not in known:
            block = graph.blocks[placement.block]
            known[key] = split_modules(block, block_splits(block, key[1]), sequence_parallel=sequence_parallel)
        for module, split in known[key].items():
            path = joined(placement.path, module)
            if path not in found or found[path].split != "expert":
                found[path] = split
    return found


def split_modules(
    block: Block, splits: Mapping[str, OperatorSplit], *, sequence_parallel: bool
) -> dict[str, ModuleSplit]:
    """The modules of one block under its splits, by their paths in it."""
    whole: Layout = "sequence" if sequence_parallel else "replicate"
    own = own_operators(block, splits)
    found: dict[str, ModuleSplit] = {}
    for operator in _with_modules(block):
        split, module = splits[operator.name], operator.module
        if module not in found or found[module].split != "expert":  # look-ups of biases stand beside products
            routes = split.split == "replicate" and operator.name in own
            found[module] = _OWN_TOKENS if routes else _module_split(operator, split, whole)
    return found


def _module_split(operator: Operator, split: OperatorSplit, whole: Layout) -> ModuleSplit:
    if split.hands_over:
        return ModuleSplit(
            split="sequence" if whole == "sequence" else "replicate", input=whole, output="replicate"
        )
    if split.inside:
        return ModuleSplit(split=split.split, output=split.output)
    if split.split in ("row", "heads"):
        return ModuleSplit(
            split=split.split, input="features", output=whole if split.split == "row" else "features"
        )
    if split.split in ("column", "vocab") and operator.kind != "embedding":
        return ModuleSplit(split=split.split, input=whole, output="features")
    if split.split == "vocab":
        return ModuleSplit(split="vocab", output=whole)
    if split.split == "replicate" and operator.kind == "norm" and split.output == "features":
        return ModuleSplit(split="replicate", input="features", output="features")
    own: Split = "sequence" if whole == "sequence" and split.split == "replicate" else split.split
    return ModuleSplit(split=own, input=whole, output=whole)


def _with_modules(block: Block) -> Iterator[Operator]:
    for operator in block.operators:
        if operator.module and (operator.parameters or operator.kind == "attention"):
            yield operator


def walk(block: Block, whole: AbstractSet[str], known: frozenset[tuple[str, str]] | None = None) -> Walk:
    """Splits with the given products kept whole, and further products that must be.

    Where `known` is given, whole values may meet cut ones at these places only.
    """
    splits: dict[str, OperatorSplit] = {}
    origins: dict[str, frozenset[str]] = {}  # storages that are cut, and the products that cut them
    spoiled: set[str] = set()
    meetings: set[tuple[str, str]] = set()
    of_experts = _modules_of_experts(block)
    for operator in block.operators:
        before = frozenset[str]().union(*(origins.get(tensor.name, frozenset()) for tensor in operator.inputs))
        cut_input = any(tensor.name in origins for tensor in operator.inputs)
        split = _split(block, operator, cut_input, operator.name in whole, operator.module in of_experts)
        splits[operator.name] = split
        if cut_input:
            met = {(operator.name, tensor.name) for tensor in operator.inputs if _is_whole(tensor, origins)}
            meetings |= met
            if _needs_whole(operator) or (known is not None and not met <= known):
                spoiled |= before
        if split.output != "features":
            continue
        starts = split.split == "column"
        for tensor in operator.outputs:
            origins[tensor.name] = frozenset((operator.name,)) if starts else before
    for name in block.outputs:
        spoiled |= origins.get(name, frozenset())
    return Walk(
        splits=_vocabularies(block, splits, origins), spoiled=frozenset(spoiled), meetings=frozenset(meetings)
    )


def _is_whole(tensor: Tensor, origins: Mapping[str, frozenset[str]]) -> bool:
    return tensor.name not in origins and not tensor.dtype.startswith(("int", "bool"))


def _is_vocabulary(block: Block, operator: Operator) -> bool:
    """Tables of positions or types stay whole."""
    return operator.kind == "embedding" and operator.inputs[0].name in block.inputs


def _modules_of_experts(block: Block) -> frozenset[str]:
    return frozenset(item.module for item in block.operators if item.kind == "grouped_matmul")


def _split(
    block: Block, operator: Operator, cut_input: bool, stays_whole: bool, of_experts: bool
) -> OperatorSplit:
    has_weights = bool(operator.parameters)
    if _is_vocabulary(block, operator) and not stays_whole:
        return OperatorSplit(split="vocab", output="partial")
    if operator.kind == "grouped_matmul" or (has_weights and of_experts):
        return OperatorSplit(split="expert", output="replicate")
    if _multiplies_weights(operator):
        if cut_input:
            return OperatorSplit(split="row", output="partial")
        stays_whole = stays_whole or _is_out_of_reach(operator)
        if stays_whole or operator.dims["n"].constant < 2:
            return OperatorSplit(split="replicate", output="replicate")
        return OperatorSplit(split="column", output="features", gathers=(operator.inputs[0].name,))
    if not cut_input:
        return OperatorSplit(split="replicate", output="replicate")
    if operator.kind in ("attention", "matmul"):
        return OperatorSplit(split="heads", output="features")
    if operator.kind == "loss":
        return OperatorSplit(split="vocab", output="replicate")
    return OperatorSplit(split="heads", output="features")


def _handed_over(block: Block, splits: Mapping[str, OperatorSplit]) -> dict[str, OperatorSplit]:
    """Marks a product whose whole result heads read directly, and what works on that result before they do.

    The one rotary key of latent attention joins the keys of every head: ranks need the whole of it, so the
    product's result is gathered once, and what is expanded from it is not gathered again.
    """
    makers = {tensor.name: operator for operator in block.operators for tensor in operator.outputs}
    waiting = [
        tensor.name
        for operator in block.operators
        if splits[operator.name].split == "heads"
        for tensor in operator.inputs
    ]
    inside: set[str] = set()  # storages
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        maker = makers.get(name)
        if name in seen or maker is None or not maker.needs_grad or splits[maker.name].split != "replicate":
            continue
        seen.add(name)
        if maker.kind == "matmul":
            inside.add(name)
        elif maker.kind in ("elementwise", "copy", "norm"):
            waiting += [tensor.name for tensor in maker.inputs]
    changed = dict(splits)
    for operator in block.operators:
        split, made = splits[operator.name], {tensor.name for tensor in operator.outputs}
        if made & inside:
            changed[operator.name] = replace(split, hands_over=True)
        elif any(tensor.name in inside for tensor in operator.inputs):
            if split.split == "replicate":
                changed[operator.name] = replace(split, inside=True)
                inside |= made
            elif split.split == "column":
                changed[operator.name] = replace(split, gathers=(), inside=True)
    return changed


def _needs_whole(operator: Operator) -> bool:
    """Whether an operator mixes all features of a cut value, or chooses among them."""
    if _multiplies_weights(operator) and _is_out_of_reach(operator):
        return True
    if operator.kind in _CHOICES or operator.kind == "grouped_matmul":
        return True
    if operator.kind != "norm":
        return False
    # a norm of single heads sees a view with a dim of heads; a norm of all features does not
    return len(operator.inputs[0].shape) < 4


def _vocabularies(
    block: Block, splits: dict[str, OperatorSplit], origins: dict[str, frozenset[str]]
) -> dict[str, OperatorSplit]:
    """Column cuts that lead to a loss are cuts of the vocabulary."""
    heads: set[str] = set()
    for operator in block.operators:
        if operator.kind == "loss":
            for tensor in operator.inputs:
                heads |= origins.get(tensor.name, frozenset())
    return {
        name: OperatorSplit(split="vocab", output=split.output, gathers=split.gathers)
        if name in heads and split.split == "column"
        else split
        for name, split in splits.items()
    }
