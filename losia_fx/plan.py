"""What of a graph is rewritten: immutable facts, no tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SubnetFacts:
    """One weight's subnet as a compiler sees it. Two weights with equal roles can share a graph."""

    fqn: str
    shape: tuple[int, ...]
    """Of W as the module stores it: (out_features, in_features), or (experts, out_features, in_features)."""
    rows: int
    cols: int
    whole_cols: bool
    """Every column learns (the output head): x is kept whole and no cols enter the graph."""
    dtype: str
    """Of S."""
    packed: str | None = None
    """What its frozen products are computed in ("int8", "float8"); None for what the model does."""

    @property
    def dims(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class SubnetPort:
    """Where a weight and its subnet enter a graph. Whose they are is seen at run time, from the weight that arrives."""

    index: int
    weight: str
    """Name of the graph's placeholder for W."""
    position: int
    """Index of that placeholder among the graph's inputs."""
    facts: SubnetFacts

    @property
    def input_names(self) -> tuple[str, ...]:
        """Placeholders for S, rows and (unless every column learns) cols.

        The prefix is ours: a placeholder that is called like a call node would shadow it in the generated code.
        """
        parts = ("values", "rows") if self.facts.whole_cols else ("values", "rows", "cols")
        return tuple(f"losia_{part}_{self.index}" for part in parts)

    @property
    def handle_name(self) -> str:
        """Placeholder for the handle that names the subnet to tap and localize."""
        return f"losia_handle_{self.index}"

    @property
    def packed_names(self) -> tuple[str, str]:
        """Placeholders for W in 8 bits and its scales, in a graph with a product of these."""
        return f"losia_packed_{self.index}", f"losia_scales_{self.index}"

    @property
    def state_names(self) -> tuple[str, ...]:
        """All placeholders that a graph may have for the port's subnet."""
        return (*self.input_names, self.handle_name, *self.packed_names)


@dataclass(frozen=True)
class ProductSite:
    """A product of an input and a weight that is to be rewritten: only the subnet's part of dL/dW is computed."""

    node: str
    body: tuple[str, ...]
    """Names of the nested GraphModules that lead to it, outermost first; () for the graph itself."""
    port: int
    call: int
    """Number of this use among all rewritten uses of the graph."""
    use: str
    """How the graph writes the product: "linear", "addmm", "matmul", "einsum", "grouped_mm", "bmm"."""
    packed: bool = False
    """Its frozen products are those of SubnetFacts.packed."""


@dataclass(frozen=True)
class WholeSite:
    """Uses of a weight that no product rewrite covers: they get dL/dW in full, and the subnet's part is cut out of it.

    Exact for whatever is done with the weight, at the cost of the full gradient.
    """

    holder: str
    """The placeholder for W in its graph."""
    users: tuple[str, ...]
    body: tuple[str, ...]
    port: int
    call: int
    use: str
    """What the users are, for the report."""


@dataclass(frozen=True)
class SubnetPlan:
    ports: tuple[SubnetPort, ...]
    sites: tuple[ProductSite, ...]
    whole: tuple[WholeSite, ...] = ()

    @property
    def places(self) -> list[ProductSite | WholeSite]:
        return [*self.sites, *self.whole]

    @property
    def packed_ports(self) -> list[int]:
        """The ports whose weights enter the graph in 8 bits too, in order."""
        return sorted({site.port for site in self.sites if site.packed})

    def ports_within(self, body: tuple[str, ...]) -> list[int]:
        """The ports whose weights are used in this body or in one nested in it, in order."""
        return sorted({place.port for place in self.places if place.body[: len(body)] == body})
