"""S and W[rows, cols] are the same numbers twice: whoever moves one of them, the other follows before the next use.

A followed optimizer step moves S, and the controller writes it to W. Everything else that a program can do to a
parameter is found here: tensors that took another's place, versions that have grown, storages that were swapped, and,
where none of these tells (``.data`` writes, fused kernels called by hand), the values themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_

import torch
from torch import Tensor, nn

from losia_fx import registry
from losia_fx._compat import untraced
from losia_fx.errors import StateError, Swapped, Torn, listed

from .copied import only_s_was_written
from .evidence import (
    READ_AT_ONCE,
    Sample,
    Samples,
    Witness,
    as_held,
    differ_by_lines,
    equal,
    in_shared_memory,
    line_of,
    marks_of,
    witnesses_of,
)
from .in_8_bits import keep_in_8_bits, refuse_lost_writes
from .quantised_weight import put_block
from .same import same
from .state import SubnetState

VIGILANT = 64
"""Comparisons in a row that find nothing, after which values are no longer compared at every look."""


class Agreement:
    """What the W and S of some subnets were when they last agreed.

    ``differing`` takes half a microsecond a weight and reads no value, so it can come before every forward.
    """

    def __init__(self, states: Sequence[SubnetState]) -> None:
        self.states = list(states)
        self._homes = [state.owner._parameters for state in states] * 2
        self._keys = [state.parameter for state in states] + [state.values_name for state in states]
        self._index = {state: number for number, state in enumerate(self.states)}
        self._dense = not any(state.packed is not None and state.packed.instead for state in states)
        self._witnesses: dict[SubnetState, Witness | None] = {}
        self._indices: dict[int, tuple[Tensor, Tensor | None]] = {}
        """rows and picked cols, by number of the subnet."""
        self._samples, self._sample = Samples(()), Sample()
        self._lines = Samples(())
        self._turn = False
        self.averaged = False
        """Of a copy that nothing has trained: what moved its S and W alike was an average, of which W is right."""
        self.waiting: set[SubnetState] = set()
        """A LoSiA state was loaded, and the weights of these are still to come: nothing is to agree yet."""
        self.unclear: list[SubnetState] = []
        """Found to differ, and nothing told whether S or W was written; until somebody has said so."""
        self.copied_behind: set[SubnetState] = set()
        """W has followed S for a copy that is being made: the copy's may not have."""
        self._vigilant = 0
        self.behind = [state for state in states if state.ahead or only_s_was_written(state)]
        """Of a copy: whose S was written before its first use."""
        with torch.no_grad():
            for state in self.behind:
                state.write_back()
        for state in states:
            state.ahead, state.at_copy, state.agreement = False, None, self
        self.remember(places=True)

    def _tensors(self) -> list[Tensor | None]:
        return list(map(dict.get, self._homes, self._keys))

    def remember(self, states: Iterable[SubnetState] | None = None, places: bool = False) -> None:
        """S and W of ``states`` (None: of all) agree as they are now. places: S may lie elsewhere in W than before."""
        chosen = self.states if states is None else list(states)
        whole = states is None or len(chosen) == len(self.states)
        self.copied_behind.difference_update(chosen)
        if whole:
            self._seen = self._tensors()
            self._versions, self._places = marks_of(self._seen, self._dense)
        else:
            for state in chosen:
                for at in self._positions(state):
                    self._seen[at] = tensor = self._homes[at].get(self._keys[at])
                    (self._versions[at],), (self._places[at],) = marks_of([tensor])
        if self._samples.places != (held := self._places[len(self.states) :]):
            self._sample_anew(held, () if whole else set(self.states) - set(chosen))
        elif whole:
            self._sample = self._samples.take()
        else:
            self._samples.renew(self._sample, [self._index[state] for state in chosen])
        if places or not self._dense:
            self._witnesses.update(witnesses_of(chosen if places else filter(self._may_have_moved, chosen)))
        if places:
            self._indices.update((self._index[state], (state.rows, state.picked_cols)) for state in chosen)
        self._remember_lines(chosen, whole, places)

    def _may_have_moved(self, state: SubnetState) -> bool:
        """Whether a write-back may write to its witness: to a column of a W in 8 bits, where a row gets a new scale."""
        witness = self._witnesses.get(state)
        return witness is not None and witness.dim == -1 and state.stored is not None

    def _sample_anew(self, places: Sequence[int], others: Iterable[SubnetState]) -> None:
        """Some S lie elsewhere now. others: what is known of these stays, as they may have been written since."""
        before, known = self._samples, self._sample
        self._samples = Samples([state.values for state in self.states], places)
        self._sample = self._samples.take()
        for number in (self._index[state] for state in others):
            self._samples.of(self._sample, number).copy_(before.of(known, number))

    @property
    def _has_lines(self) -> bool:
        return self._lines.places == self._places[: len(self.states)]

    def _remember_lines(self, chosen: Sequence[SubnetState], whole: bool, moved: bool) -> None:
        count = len(self.states)
        if whole and (moved or not self._has_lines):
            self._lines = Samples([line_of(state, count) for state in self.states], self._places[: len(self.states)])
            self._line = self._lines.take()
        elif whole:
            self._line = self._lines.take()
        elif self._has_lines:  # else W by W is going somewhere else: the next look compares values
            numbers = [self._index[state] for state in chosen]
            if moved:
                self._lines.look_at({number: line_of(self.states[number], count) for number in numbers})
            self._lines.renew(self._line, numbers)

    def _positions(self, state: SubnetState) -> tuple[int, int]:
        number = self._index[state]
        return number, number + len(self.states)

    @property
    def stands(self) -> bool:
        """Whether each W and S is the tensor that it was, and no shard of one."""
        tensors = self._tensors()
        return all(map(is_, tensors, self._seen)) and set(map(type, tensors)) == {nn.Parameter}

    def differing(self) -> list[SubnetState]:
        """The subnets of which W or S is not the tensor, the version or the storage that it was.

        Raises Swapped where tensors that are no parameters stand in the place of some.
        """
        tensors = self._tensors()
        if all(map(is_, tensors, self._seen)):
            versions, places = marks_of(tensors, self._dense)
            if versions == self._versions and places == self._places:
                return []
        elif not all(isinstance(tensor, nn.Parameter) for tensor in tensors if tensor is not None):
            raise Swapped(
                "tensors stand in the place of parameters (torch.func.functional_call): call the model itself"
            )
        return [state for state in self.states if any(self.moved(state))]

    def moved(self, state: SubnetState) -> tuple[bool, bool]:
        """Whether W, and whether S, is another tensor, version or storage than when they last agreed."""
        w, s = (self._is_new(at) for at in self._positions(state))
        return w, s

    def _is_new(self, at: int) -> bool:
        tensor = self._homes[at].get(self._keys[at])
        return tensor is not self._seen[at] or marks_of([tensor]) != ([self._versions[at]], [self._places[at]])

    @torch.no_grad()
    def settle(self, states: Iterable[SubnetState], idle: bool = False) -> list[SubnetState]:
        """Makes S and W of ``states`` agree, of which one or both have moved; returns those whose S had.

        S newer is written to W, W newer is gathered; of a pair that both moved, and not to the same numbers, W counts
        where the model is ``idle`` (a copy that nothing trains: its S is part of no optimizer's work).
        Raises StateError that names the weights where both moved, with those left as they are.
        """
        moved = {state: self.moved(state) for state in states}
        for state, (w, _) in moved.items():
            if w:
                self._take_in(state)
        written, torn = [], []
        for (state, (w, s)), alike in zip(moved.items(), same(list(moved)), strict=True):
            if alike:
                continue
            if s and not w:
                state.write_back()
                written.append(state)
            elif s and not idle:
                torn.append(state)
            else:
                state.gather_anew()
        done = [state for state in moved if state not in torn]
        self._witnesses.update(witnesses_of(state for state in done if moved[state][0]))
        self.remember(done)
        _refuse_torn(torn)
        return written

    @torch.no_grad()
    def compare(self, states: Sequence[SubnetState] | None = None) -> list[SubnetState]:
        """By value, what no version shows; the device is waited for once where all is well. Returns the subnets whose S
        was newer.

        Which of the two was written is told by some elements of S as it was when they last agreed, and by elements of W
        outside of the subnet, which nothing of ours writes. Raises StateError where both were.
        """
        # Of a meta tensor (offloaded, or a rehearsal without a device) there is no value to compare.
        chosen = [state for state in (self.states if states is None else states) if not state.weight.is_meta]
        stale = [state for state, alike in zip(chosen, same(chosen), strict=True) if not alike]
        written, torn = [], []
        for state in stale:
            s, w = self._were_written(state)
            if not (s or w or in_shared_memory(state)):
                self.unclear.append(state)
                w = differ_by_lines(state)
            average = self._is_average(state)
            torn_apart = w and s and not average
            if torn_apart and not in_shared_memory(state):  # where another process is writing the pair, S is the first
                torn.append(state)
            elif not torn_apart and (w or (average and not s)):
                state.gather_anew()
                self._note_unseen(state)
            else:
                state.write_back()
                written.append(state)
        self._vigilant = VIGILANT if stale else max(0, self._vigilant - (states is None))
        self.remember([state for state in stale if state not in torn])
        self._let_be([state for state in chosen if state not in stale])
        _refuse_torn(torn)
        return written

    @property
    def vigilant(self) -> bool:
        """Writes were found lately that no version shows: every look compares values."""
        return self._vigilant > 0

    def _let_be(self, states: Sequence[SubnetState]) -> None:
        """What was written to these W was not written to their subnets: nothing is to follow it."""
        if not self._has_lines:
            if len(states) == len(self.states):
                self._remember_lines(states, whole=True, moved=False)
            return
        if not self._lines.differ(self._line):
            return
        for state in states:
            number = self._index[state]
            now = self._lines.of(self._lines.take([number]), number, alone=True)
            if not equal(now, self._lines.of(self._line, number)):
                self._note_unseen(state)
                self._lines.renew(self._line, [number])

    def _note_unseen(self, state: SubnetState) -> None:
        """W was written, which no version shows."""
        self._witnesses.update(witnesses_of([state]))
        if state.packed is not None:
            state.packed.forget()

    def follow_beneath(self) -> None:
        """W follows an S that was written, while torch.export traces stand-ins in their places. Raises Torn."""
        now, _ = marks_of(self._seen)
        moved = [[now[at] != self._versions[at] for at in self._positions(state)] for state in self.states]
        _refuse_torn([state for state, (w, s) in zip(self.states, moved, strict=True) if w and s])
        for number, (_, s) in enumerate(moved):
            weight, values = (self._seen[at] for at in self._positions(self.states[number]))
            if s and weight is not None and values is not None:
                with untraced():
                    put_block(weight.detach(), *self._indices[number], values.detach())

    def shows_a_write(self) -> bool:
        """Whether the elements of S and W that are at hand on the CPU are others than when the two agreed; of many
        subnets, those of W every other time. Of those on a device nothing is asked, for which the host would wait."""
        if not self._has_lines:
            return True
        looks = [(self._samples, self._sample), (self._lines, self._line)]
        self._turn = not self._turn
        if self._turn and 2 * len(self.states) > READ_AT_ONCE:
            looks.pop()
        return any(samples.differ(sample) for samples, sample in looks)

    def shows_a_write_to(self, state: SubnetState) -> bool:
        """The same of one subnet."""
        number = self._index[state]
        looks = [(self._samples, self._sample), (self._lines, self._line)]
        return not self._has_lines or any(samples.differs(sample, number) for samples, sample in looks)

    @torch.no_grad()
    def is_ahead(self, state: SubnetState) -> bool:
        """Whether W has yet to follow S: what a copy of both has to know, which cannot tell by itself."""
        if state in self.copied_behind:
            return True
        if state in self.waiting or state.weight.is_meta or same([state])[0]:
            return False
        w, s = self.moved(state)
        if w or s:
            return s and not w
        s, w = self._were_written(state)
        return s and not w

    def values_of(self, state: SubnetState) -> Tensor | None:
        """S when the two last agreed."""
        return self._seen[self._positions(state)[1]]

    def _were_written(self, state: SubnetState) -> tuple[bool, bool]:
        """Whether S, and whether W, holds other numbers than when they last agreed."""
        number = self._index[state]
        before = self._samples.of(self._sample, number)
        now = self._samples.of(self._samples.take([number]), number, alone=True)
        stride = self._samples.strides[number]
        block, witness = state.block().reshape(-1)[::stride][: now.numel()], self._witnesses.get(state)
        s = not bool(equal(now, before))
        w = not bool(equal(block, as_held(state, before, stride)))
        w = w or (witness is not None and not witness.holds(state))
        return s, w

    def _is_average(self, state: SubnetState) -> bool:
        """Of a copy that nothing trains: what moved its S along with its W was an average, of which W is right."""
        return self.averaged and state.values.grad is None

    def _take_in(self, state: SubnetState) -> None:
        """A W that may be another tensor than before takes its place, or is refused."""
        weight, before = state.weight, self._seen[self._positions(state)[0]]
        if weight.is_meta:
            raise StateError(
                f"{state.name}: is on the meta device now, without values (accelerate's cpu_offload and disk_offload "
                "do that): it cannot be trained there. Keep the model on its device"
            )
        if tuple(weight.shape) != state.shape or not weight.is_floating_point():
            raise StateError(
                f"{state.name}: is {tuple(weight.shape)} {weight.dtype} now and was {state.shape}: its subnet does not "
                "fit it. Call losia_fx.restore(model) before such a change, and transform again after it"
            )
        refuse_lost_writes(state)
        if weight is not before:
            registry.place(weight, state)
            if before is not None:
                weight.requires_grad_(before.requires_grad)
            keep_in_8_bits(state)


def _refuse_torn(states: Sequence[SubnetState]) -> None:
    if states:
        raise Torn(
            f"{listed([state.name for state in states])}: both the weight and the values of its subnet were written "
            "since they last agreed, and they differ (an average of all parameters, say, of subnets that have moved). "
            "Write one of them only: the weight by its own name (as model.state_dict() has them), or the parameter in "
            "losia_fx.subnets(model)[name].values. model.load_state_dict(...) makes a model whole again"
        )
