"""A whole step and a re-selection with the model on "meta": what the device does, apart from what the host reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import losia_fx
from losia_fx.runtime.state import SubnetState
from tests.architectures.test_experts import MIXTRAL
from tests.device.dry import CASES, DryRun, Waits
from tests.support.table import TOY

PERIOD = 2


def written(states: list[SubnetState]) -> list[int]:
    return [state.weight._version for state in states]


@pytest.mark.filterwarnings("ignore:losia_fx.*outside the repeated blocks")
@pytest.mark.parametrize("name", CASES)
def test_a_step_and_a_re_selection(name: str, waits: Waits) -> None:
    run = DryRun(*CASES[name], period=PERIOD, schedule="sync")
    loss = run.forward()
    assert loss.is_meta
    loss.backward()
    only_handles_and_tickets_are_on_the_cpu(run)
    for state in run.states:
        assert state.values.grad is not None, state.name
        assert (state.values.grad.shape, state.values.grad.device.type) == (state.values.shape, "meta")
        assert state.profile is not None
        assert state.profile.grad is not None, state.name
        assert (state.profile.grad.shape, state.profile.grad.is_meta) == (state.weight.shape, True)
        assert state.weight.grad is None
    before = written(run.states)
    run.optimizer.step()
    for state, version in zip(run.states, before, strict=True):
        assert state.profile is not None
        assert state.profile.importance is not None, state.name
        assert state.profile.uncertainty is not None
        assert state.profile.importance.is_meta
        assert state.profile.uncertainty.is_meta
        assert state.profile.grad is None
        assert state.weight._version > version, state.name
    run.optimizer.zero_grad()
    places = [(state.rows._version, state.cols._version) for state in run.states]
    run.step()
    controller = losia_fx.controller(run.model)
    assert [(event.step, event.group) for event in controller.history] == [
        (PERIOD, group) for group in range(len(controller.groups))
    ]
    for state, (rows, cols) in zip(run.states, places, strict=True):
        assert state.rows._version > rows
        assert state.cols._version > cols
        assert state.rows.is_meta
        assert state.values not in run.optimizer.state
    assert controller.left_out == 0


def only_handles_and_tickets_are_on_the_cpu(run: DryRun) -> None:
    """One graph, cut in two; and in neither a value that the host would have to wait for."""
    assert len(run.graphs) == 2
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for graph in run.graphs:
        off = [node for node in graph.graph.nodes if not is_on_device(node)]
        assert off
        assert all(is_number(node) for node in off), [(node.name, node.meta.get("val")) for node in off]
        assert not [node for node in graph.graph.nodes if waits_for_device(node)]
    arriving = [node for node in run.graphs[0].graph.find_nodes(op="placeholder") if not is_on_device(node)]
    assert len(arriving) == len(run.states)


def is_on_device(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.device.type == "meta"


def is_number(node: fx.Node) -> bool:
    """A handle or a ticket."""
    value = node.meta["val"]
    return value.dtype == torch.int64 and tuple(value.shape) == (1,)


aten = torch.ops.aten
WAITING = {
    *(aten.nonzero, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.masked_select, aten.equal),
    *(aten._local_scalar_dense, aten.item, aten.median, aten.nanmedian, aten.bincount, aten.isin),
}


def waits_for_device(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    masked = packet is aten.index and any(
        index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in node.args[1]
    )
    return packet in WAITING or masked


def test_the_graphs_of_a_dtype_without_a_kernel_ask_once_a_router(waits: Waits) -> None:
    """float32 experts: where their rows end is known to the host by the forward, for every product and its backward."""
    run = DryRun(MIXTRAL, torch.float32)
    run.forward().backward()
    asked = [len(graph.graph.find_nodes(op="call_function", target=torch.ops.losia.ends_on_host.default))
             for graph in run.graphs]  # fmt: skip
    assert asked == [2, 0]


def test_a_mixture_of_devices_is_refused_as_a_gpu_would(waits: Waits) -> None:
    """Or the runs above would prove nothing."""
    run = DryRun(TOY, torch.float32)
    state = run.states[0]
    state.owner._buffers[state.rows_name] = torch.zeros(state.rows.shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"device|meta"):
        run.forward().backward()
