"""What a node of a joint graph says of how it may be made again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

from losia_fx.passes.joint.graph import moves_over


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    made = torch.library.Library("losia_tests", "DEF")
    yield made
    made._destroy()


@pytest.mark.parametrize("random", [False, True])
def test_what_draws_numbers_is_not_made_again(library: torch.library.Library, random: bool) -> None:
    """A second call would draw others, element by element though it works."""
    tags = (torch.Tag.pointwise, *((torch.Tag.nondeterministic_seeded,) if random else ()))
    library.define("noisy(Tensor x) -> Tensor", tags=tags)
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.losia_tests.noisy.default, (x,))
    for each in (x, node):
        each.meta["val"] = torch.empty(3, 4, device="meta")
    assert moves_over(node) == (None if random else [x])
