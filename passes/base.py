"""GraphPass, the form of every pass, and PassPipeline, the one runner."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from losia_fx._compat import region_inputs

log = logging.getLogger("losia_fx")


@dataclass(frozen=True)
class GraphPass(ABC):
    """A function of a graph that edits it in place, leaves it valid, and says whether it changed anything.

    ``__call__``: requires -> apply -> (if changed) lint, recompile -> ensures. A subclass's fields are its options.
    """

    name: ClassVar[str]

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        self.requires(gm)
        changed = self.apply(gm)
        if changed:
            for module in graph_modules(gm):
                module.graph.lint()
                module.recompile()
        self.ensures(gm)
        log.debug("%s: %d changed", self.name, changed)
        return PassResult(gm, changed > 0)

    def requires(self, gm: fx.GraphModule) -> None:
        """Raises PassPreconditionError where the graph is not what the pass needs."""
        return None

    @abstractmethod
    def apply(self, gm: fx.GraphModule) -> int:
        """Edits the graph; the number of places changed."""

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raises PassPostconditionError where the graph is not what the pass promises."""
        return None


Observer = Callable[[str, fx.GraphModule], None]
"""Is told the name of a stage, and shown the graph in it; a pass's stage has the pass's name. Not to be edited."""


@dataclass(frozen=True)
class PassPipeline:
    """Runs passes in order. ``disabled`` names passes to leave out; ``observe`` sees the graph after each, and before
    all of them as the stage ``start``, where that has a name."""

    passes: tuple[GraphPass, ...]
    disabled: frozenset[str] = frozenset()
    start: str = ""
    observe: Observer | None = None

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        modified = False
        if self.start and self.observe is not None:
            self.observe(self.start, gm)
        for step in self.passes:
            if step.name in self.disabled:
                continue
            modified |= step(gm).modified
            if self.observe is not None:
                self.observe(step.name, gm)
        return PassResult(gm, modified)


@dataclass(frozen=True)
class Region:
    """A node that runs a nested GraphModule: a checkpointed region, or one compiled by itself."""

    node: fx.Node
    name: str
    """Of the body, in the GraphModule around it."""
    body: fx.GraphModule
    inputs: int
    """Where the inputs start in node.args; they match the body's placeholders one to one."""

    def passed(self) -> list[tuple[fx.Node, fx.Node]]:
        """(placeholder of the body, node passed for it), for the inputs that are nodes."""
        pairs = zip(placeholders(self.body), self.node.args[self.inputs :], strict=False)
        return [(holder, outer) for holder, outer in pairs if isinstance(outer, fx.Node)]


def region_of(gm: fx.GraphModule, node: fx.Node) -> Region | None:
    """The region that ``node`` is, if it is one."""
    inputs = region_inputs(node.target) if node.op == "call_function" else None
    if inputs is None:
        return None
    holder = node.args[0]
    assert isinstance(holder, fx.Node)
    name = str(holder.target)
    body = gm.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    return Region(node, name, body, inputs)


def bodies(gm: fx.GraphModule, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], fx.GraphModule]]:
    """(names of the regions' bodies that lead there, graph) of ``gm`` itself and of every region, outer ones first."""
    yield path, gm
    for node in gm.graph.nodes:
        region = region_of(gm, node)
        if region is not None:
            yield from bodies(region.body, (*path, region.name))


def graph_modules(gm: fx.GraphModule) -> Iterable[fx.GraphModule]:
    """``gm`` and every GraphModule nested in it."""
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def append_placeholders(graph: fx.Graph, names: Iterable[str]) -> list[fx.Node]:
    """New placeholders behind the last one, in the order given."""
    last = list(graph.find_nodes(op="placeholder"))[-1]
    added = []
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        added.append(last)
    return added


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be edited, nested GraphModules included; parameters and buffers are shared.

    Each region gets a body of its own, for its own weights' subnets. Dynamo's compile id is left out of ``meta``: with
    it AOTAutograd would ask every placeholder, those that we append too, for its source in the user's code.
    """
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(gm.graph, {}))
    output.meta = dict(gm.graph.output_node().meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta.update({key: value for key, value in gm.meta.items() if key != "dynamo_compile_id"})
    used: set[str] = set()
    for node in list(graph.nodes):
        region = region_of(copy, node)
        if region is None:
            continue
        own = region.name if region.name not in used else f"{region.name}_{node.name}"
        used.add(own)
        copy.add_submodule(own, copy_graph_module(region.body))
        if own != region.name:
            with graph.inserting_before(node):
                # what identifies the body, where something does, must change with it
                node.args = (graph.get_attr(own), *([own] * (region.inputs - 1)), *node.args[region.inputs :])
    copy.recompile()
    return copy
