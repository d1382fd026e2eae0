"""What of a graph is rewritten: immutable facts, no tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SubnetFacts:
    """One weight's subnet as a compiler sees it. Two weights with equal roles can share a graph."""

    fqn: str
    shape: tuple[int, int]
    """Of W: (out_features, in_features)."""
    rows: int
    cols: int
    whole_cols: bool
    """Every column learns (the output head): x is kept whole and no cols enter the graph."""
    dtype: str
    """Of S."""

    @property
    def role(self) -> tuple[object, ...]:
        """What a compiled graph has built in."""
        return (self.shape, self.rows, self.cols, self.whole_cols, self.dtype)


@dataclass(frozen=True)
class SubnetSlot:
    """A place for one weight's subnet in a graph. Whose it is, is seen at run time from the weight that arrives."""

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


@dataclass(frozen=True)
class LinearSite:
    """A linear node that is to be rewritten."""

    node: str
    body: tuple[str, ...]
    """Names of the nested GraphModules that lead to it, outermost first; () for the graph itself."""
    slot: int
    call: int
    """Number of this use among all rewritten uses of the graph."""


@dataclass(frozen=True)
class LeftAlone:
    """A use of a weight with a subnet that no pass can rewrite."""

    fqn: str
    node: str
    reason: str


@dataclass(frozen=True)
class SubnetPlan:
    slots: tuple[SubnetSlot, ...]
    sites: tuple[LinearSite, ...]
    left: tuple[LeftAlone, ...] = ()

    def sites_in(self, body: tuple[str, ...]) -> tuple[LinearSite, ...]:
        return tuple(site for site in self.sites if site.body == body)
