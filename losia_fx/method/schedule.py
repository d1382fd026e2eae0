"""When what happens: pure functions of t, the number of optimizer steps completed (losia.md, "The controller").

A slot is ``period`` steps, a round is one slot a group.
"""

from __future__ import annotations

from losia_fx.config import LosiaConfig


def slot_groups(config: LosiaConfig, groups: int, step: int) -> tuple[int, ...]:
    """The groups whose slot optimizer step ``step`` (0 is the first) is in: those that re-select at its end."""
    if config.schedule == "static" or groups == 0:
        return ()
    position = (step // config.period) % groups
    if config.schedule == "async":
        return (position,)
    return tuple(range(groups)) if position == 0 else ()


def profiled_groups(config: LosiaConfig, groups: int, step: int) -> tuple[int, ...]:
    """The groups whose importance optimizer step ``step`` measures: only the last ``profile_steps`` of a slot do."""
    left = config.period - step % config.period
    if not config.profiles or left > (config.profile_steps or config.period):
        return ()
    return slot_groups(config, groups, step)


def ends_slot(config: LosiaConfig, step: int) -> bool:
    """Whether optimizer step ``step`` is the last of its slot: (t + 1) % T == 0."""
    return (step + 1) % config.period == 0


def rewarm_factor(config: LosiaConfig, updates: int) -> float:
    """k/T, the share of the k-th update after a re-selection that counts; 1.0 from the T-th on. ``updates``: k >= 1."""
    if not config.rewarm or updates >= config.period:
        return 1.0
    return updates / config.period


def round_length(config: LosiaConfig, groups: int) -> int:
    """T * L: the optimizer steps in which every group has its slot once."""
    return config.period * max(1, groups)
