"""state_dict and load_state_dict: all that LoSiA adds to a training run, so that it goes on to the bit.

The weights are not in it: they are in the model's own checkpoint. Either may be loaded first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from losia_fx.api.views import controller
from losia_fx.errors import StateError
from losia_fx.runtime.snapshot import AS_JSON
from losia_fx.storage.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata  # not in every build of torch


def state_dict(model: nn.Module, *, sharded: bool = False, like: Metadata | None = None) -> dict[str, Any]:
    """The state of the subnets of ``model``: plain values and tensors, copies on the CPU.

    Holds the options, the step, rows, cols and S of every subnet (S in float32 under a narrower W), the importance
    gathered in the slot under way, rewarming, the re-selections so far, and the generator's state. torch.save and
    torch.load(weights_only=True) take it. Gradients are not in it, as in no optimizer's: save between steps. Of a model
    that fully_shard has sharded all ranks have to call it, and each gets the whole, for any number of ranks.

    sharded: for torch.distributed.checkpoint, which writes it from any number of ranks and reads it on any other. What
        is of the size of W or S comes as DTensors, of which each rank has its part, and nothing is copied: save it
        before the next step. like: in the place of that, what ``dcp.load`` is to fill: empty, with the entries of the
        checkpoint whose metadata it is, as those of a slot under way are other ones in each slot.

    Raises TransformError for a model without subnets, StateError for metadata of a checkpoint without one LoSiA state.

    >>> dcp.save({"losia": losia_fx.state_dict(model, sharded=True)}, checkpoint_id=folder)
    >>> state = {"losia": losia_fx.state_dict(model, like=dcp.FileSystemReader(folder).read_metadata())}
    >>> dcp.load(state, checkpoint_id=folder)
    >>> losia_fx.load_state_dict(model, state["losia"])
    """
    followed = controller(model)
    if like is not None:
        return followed.sharded_state_dict(_names(like))
    return followed.sharded_state_dict() if sharded else followed.state_dict()


def _names(metadata: Metadata) -> set[str]:
    """Of the entries of the one LoSiA state in a checkpoint, wherever in it that is."""
    entries = getattr(metadata, "state_dict_metadata", None)
    if entries is None:
        raise StateError(
            f"like={metadata!r}: give a checkpoint's metadata: dcp.FileSystemReader(folder).read_metadata()"
        )
    found = [key.removesuffix(AS_JSON) for key in entries if f".{key}".endswith(f".{AS_JSON}")]
    if len(found) != 1:
        raise StateError(
            f"the checkpoint holds {len(found)} states of losia_fx.state_dict(model, sharded=True), and has to hold one"
        )
    return {key.removeprefix(found[0]) for key in entries if key.startswith(found[0])}


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Goes on from ``state``, of either form; before the first forward, and before or after loading the weights and the
    optimizer.

    Raises StateError, naming the entries, where one is unknown or missing or does not fit; nothing is changed then.
    """
    controller(model).load_state_dict(state)


def save_state(model: nn.Module, path: Path, write: bool = True) -> None:
    """Writes ``state_dict(model)`` to one safetensors file, atomically.

    Of a sharded model on every rank, of which one is to ``write``.
    """
    state = state_dict(model)
    if not write:
        return
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    write_tensors(path, tensors, {name: value for name, value in state.items() if name not in tensors})


def load_state(model: nn.Module, path: Path) -> None:
    """Goes on from the file that ``save_state`` wrote.

    Raises StateError naming the file where it is damaged or does not fit, OSError where it cannot be read; the model is
    unchanged then.
    """
    tensors, plain = read_tensors(path)
    if tensors.keys() & plain.keys():
        raise StateError(f"{path}: names an entry twice")
    try:
        load_state_dict(model, {**plain, **tensors})
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
