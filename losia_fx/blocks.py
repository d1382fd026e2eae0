"""Which linears belong together: the repeated blocks of any module tree, and the output head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def find_blocks(root: nn.Module) -> list[str]:
    """Dotted names of the repeated blocks, in the order of the module tree; [] where nothing repeats.

    A block is an entry of an outermost ModuleList, or of a Sequential whose entries are of one class, that has linears
    inside. Lists of bare linears count only where no such block exists.
    """
    composite: list[str] = []
    bare: list[str] = []
    _search(root, "", composite, bare)
    return [plain_name(name) for name in composite or bare]


def plain_name(name: str) -> str:
    """A dotted name without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def _search(module: nn.Module, prefix: str, composite: list[str], bare: list[str]) -> None:
    entries = [(f"{prefix}{name}", child) for name, child in module.named_children() if _has_linear(child)]
    if entries and _is_repeated(module, entries):
        inside = [name for name, child in entries if not isinstance(child, nn.Linear)]
        composite += inside
        if not inside:
            bare += [name for name, _ in entries]
        return
    for name, child in entries:
        _search(child, f"{name}.", composite, bare)


def _is_repeated(module: nn.Module, entries: list[tuple[str, nn.Module]]) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len(entries) > 1 and len({type(child) for _, child in entries}) == 1


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


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
