"""Which linears belong together: the repeated blocks of any module tree, and the output head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from .kinds import holds_weights, holds_weights_itself, is_bare


def find_blocks(root: nn.Module) -> list[str]:
    """Dotted names of the repeated blocks, in the order of the module tree; [] where nothing repeats.

    A block is an entry of an outermost ModuleList, or one of several of a class in a Sequential, that has linear
    weights inside. Where such an entry is a stage, itself little but a list of blocks, those are the blocks, and the
    stage comes after them for what is left of it; a list of different modules (attention, then an MLP) makes no stage.
    Lists of bare linears count only where no such block exists.
    """
    composite: list[str] = []
    bare: list[str] = []
    _search(root, "", composite, bare)
    return [plain_name(name) for name in composite or bare]


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


Entries = list[tuple[str, nn.Module]]


def _search(module: nn.Module, prefix: str, composite: list[str], bare: list[str]) -> None:
    entries = [(f"{prefix}{name}", child) for name, child in module.named_children() if holds_weights(child)]
    repeated, linears = _repeated(module, entries)
    bare += linears
    for name, child in entries:
        if name in repeated:
            composite += [*_blocks_of_stage(name, child), name]
        elif name not in linears:
            _search(child, f"{name}.", composite, bare)


def _repeated(module: nn.Module, entries: Entries) -> tuple[set[str], list[str]]:
    """Names of the entries that are blocks, and of those that are bare linears in a row."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return set(), []
    blocks = [(name, child) for name, child in entries if not is_bare(child)]
    linears = [name for name, child in entries if is_bare(child)]
    if isinstance(module, nn.Sequential):
        count = Counter(type(child) for _, child in blocks)
        blocks = [(name, child) for name, child in blocks if count[type(child)] > 1]
        linears = linears if len(linears) > 1 else []
    return {name for name, _ in blocks}, linears


def _blocks_of_stage(name: str, stage: nn.Module) -> list[str]:
    """The blocks that a stage is made of: all its linear weights but one at most (a downsampling) are in them."""
    inner: list[str] = []
    _search(stage, f"{name}.", inner, [])
    inner = _without_parts(inner, {f"{name}.{path}": type(child) for path, child in stage.named_modules()})
    weights = [f"{name}.{path}" for path, child in stage.named_modules() if holds_weights_itself(child)]
    outside = [path for path in weights if block_of(path, inner) is None]
    return inner if inner and len(outside) <= 1 else []


def _without_parts(names: list[str], types: dict[str, type]) -> list[str]:
    """Of the entries of lists, those that repeat: a list in which no two are alike holds the parts of one block."""
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    parts = [n for n in lists.values() if len(n) > 1 and len({types[name] for name in n}) == len(n)]
    return [name for name in names if not any(name in siblings for siblings in parts)]


def block_of(name: str, blocks: Iterable[str]) -> str | None:
    """The block that the module or parameter ``name`` is in."""
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)


def find_heads(root: nn.Module) -> list[nn.Module]:
    """The output heads: what get_output_embeddings() of the model, or of a model inside it, gives."""
    heads: list[nn.Module] = []
    for module in root.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter()
        except (NotImplementedError, AttributeError):  # transformers' default for models that have none
            continue
        if isinstance(head, nn.Module) and not any(head is known for known in heads):
            heads.append(head)
    return heads


def group_names(names: Iterable[str], heads: Iterable[str], blocks: Iterable[str]) -> list[list[str]]:
    """Weight names by group: each head first, then a group a block, then each weight outside of both by itself."""
    blocks, heads = list(blocks), list(heads)
    grouped: dict[tuple[int, str], list[str]] = {}
    order = {block: index for index, block in enumerate(blocks)}
    for name in names:
        block = block_of(name, blocks)
        key = (0, name) if name in heads else (1, f"{order[block]:08d}") if block is not None else (2, name)
        grouped.setdefault(key, []).append(name)
    head_keys = [key for key in grouped if key[0] == 0]
    block_keys = sorted(key for key in grouped if key[0] == 1)
    other_keys = [key for key in grouped if key[0] == 2]
    return [grouped[key] for key in (*head_keys, *block_keys, *other_keys)]
