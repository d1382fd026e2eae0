"""Analysis: which nodes use which weight, in what form, and the plan that follows. Edits nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from losia_fx.errors import UnsupportedGraphError
from losia_fx.plan import ProductSite, SubnetFacts, SubnetPlan, SubnetPort, WholeSite

from .base import placeholders, region_of
from .nodes import renorms, use_of
from .products import Product, find_products


@dataclass
class Uses:
    """What a graph does with one of its inputs, in the graph itself and in the bodies nested in it."""

    products: list[tuple[tuple[str, ...], Product]] = field(default_factory=list)
    """(body, product)"""
    others: list[tuple[tuple[str, ...], fx.Node, list[fx.Node]]] = field(default_factory=list)
    """(body, placeholder there, its users that are no product and lead to none)"""

    @property
    def only_products(self) -> bool:
        return bool(self.products) and not self.others

    @property
    def names(self) -> set[str]:
        """What is done with the input, in a word each."""
        others = {use_of(user) for _, _, users in self.others for user in users}
        return others | {product.use for _, product in self.products}


def find_uses(gm: fx.GraphModule, dims: Mapping[str, int]) -> dict[str, Uses]:
    """What the graph does with the inputs that ``dims`` names, by placeholder; dims: dimensions of each weight."""
    holders = {node.name: node for node in placeholders(gm)}
    return {name: _uses(gm, (), holders[name], count) for name, count in dims.items()}


def _uses(gm: fx.GraphModule, body: tuple[str, ...], holder: fx.Node, dims: int) -> Uses:
    found = Uses()
    products, others = find_products(holder, dims)
    found.products += [(body, product) for product in products]
    left = []
    for user in others:
        region = region_of(gm, user)
        if region is not None:
            for inner in [inside for inside, outer in region.passed() if outer is holder]:
                nested = _uses(region.body, (*body, region.name), inner, dims)
                found.products += nested.products
                found.others += nested.others
        elif user.op != "output":  # what is handed out keeps its identity: later graphs find its subnet by that
            left.append(user)
    if left:
        found.others.append((body, holder, left))
    return found


def plan_subnets(gm: fx.GraphModule, facts: Mapping[str, SubnetFacts]) -> SubnetPlan:
    """The plan for the weights that ``facts`` names by placeholder.

    Products are rewritten as such. Whatever else is done with a weight, and a product that another weight has taken
    (of two weights multiplied with each other), gets the full gradient cut down to the subnet.
    """
    uses = find_uses(gm, {name: fact.dims for name, fact in facts.items()})
    position = {node.name: index for index, node in enumerate(placeholders(gm))}
    ports: list[SubnetPort] = []
    sites: list[ProductSite] = []
    whole: list[WholeSite] = []
    taken: set[fx.Node] = set()
    calls = iter(range(10**9))
    for holder, fact in facts.items():
        mine = uses[holder]
        if not mine.products and not mine.others:
            continue
        port = SubnetPort(len(ports), holder, position[holder], fact)
        ports.append(port)
        fitting, unfit = _sort(mine.products, fact, taken)
        for body, product in fitting:
            packed = fact.packed is not None and _is_plain(product)
            sites.append(ProductSite(product.node.name, body, port.index, next(calls), product.use, packed))
        whole += _whole_sites([*mine.others, *unfit], port, calls)
    return SubnetPlan(tuple(ports), tuple(sites), tuple(whole))


Other = tuple[tuple[str, ...], fx.Node, list[fx.Node]]


def _sort(
    products: Iterable[tuple[tuple[str, ...], Product]], fact: SubnetFacts, taken: set[fx.Node]
) -> tuple[list[tuple[tuple[str, ...], Product]], list[Other]]:
    """The products to rewrite, taken from now on; and the users of the placeholder behind which one cannot be.

    That is one taken already, or one whose input comes from the weight by the same way.
    """
    branches: dict[tuple[tuple[str, ...], fx.Node], list[Product]] = {}
    for body, product in products:
        branches.setdefault((body, product.branch), []).append(product)
    fitting: list[tuple[tuple[str, ...], Product]] = []
    unfit: list[Other] = []
    for (body, branch), behind in branches.items():
        nodes = {product.node for product in behind}
        alone = len(nodes) == len(behind) and not nodes & taken
        if alone and not any(fact.whole_cols and product.transposed for product in behind):
            fitting += [(body, product) for product in behind]
            taken |= nodes
        else:
            unfit.append((body, behind[0].holder, [branch]))
    return fitting, unfit


def _is_plain(product: Product) -> bool:
    """Whether the product is one with the weight as the module stores it, and not with a transpose, cast or part."""
    return product.form == "linear" and not product.view.path and not product.transposed


def _whole_sites(others: Iterable[Other], port: SubnetPort, calls: Iterator[int]) -> Iterator[WholeSite]:
    joined: dict[tuple[tuple[str, ...], fx.Node], list[fx.Node]] = {}
    for body, holder, users in others:
        joined.setdefault((body, holder), []).extend(users)
    for (body, holder), users in joined.items():
        names = tuple(dict.fromkeys(user.name for user in users))
        uses = {use_of(user) for user in users}
        if any(use_of(user).rpartition(".")[2] == "set_" and not _keeps_memory(user, holder) for user in users):
            # What the users get is an alias of the weight: that would be given the memory, and not the weight.
            raise UnsupportedGraphError(
                f"{port.facts.fqn}: the forward itself gives the weight other memory (weight.data = ..., set_()), "
                "where its subnet cannot follow: write weight.copy_(...) under torch.no_grad() instead, or name the "
                "weight in exclude"
            )
        if any(renorms(user) for user in users):
            raise UnsupportedGraphError(
                f"{port.facts.fqn}: an embedding with max_norm rewrites it in every forward, so no subnet of it can "
                "learn: leave max_norm out, or name the weight in exclude"
            )
        said = ", ".join(sorted(uses))
        yield WholeSite(holder.name, names, body, port.index, next(calls), said)


def _keeps_memory(user: fx.Node, holder: fx.Node) -> bool:
    """Of weight.data = given: whether that is the weight's own memory, as Module.to() in a forward has it where there
    is nothing to convert (routers of some mixtures do)."""
    given = user.args[1] if len(user.args) > 1 else None
    while given is not holder:
        if not isinstance(given, fx.Node) or given.op != "call_method" or given.target not in ("to", "detach"):
            return False
        source = given.args[0]
        copies = True in given.args or given.kwargs.get("copy", False)
        if copies or not isinstance(source, fx.Node) or _kind(source) != _kind(given):
            return False
        given = source
    return True


def _kind(node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
    value = node.meta.get("example_value")
    return (value.dtype, value.device) if isinstance(value, torch.Tensor) else None
