"""When what happens: pure functions of t, the number of optimizer steps completed (losia.md, "The controller").

A slot is ``period`` steps, a round is one slot a group.
"""

from __future__ import annotations

from losia_fx.config import LosiaConfig


def slot_groups(config: LosiaConfig, groups: int, step: int) -> tuple[int, ...]:
    """The groups whose slot optimizer step ``step`` (0 is the first) is in: those that re-select at its end."""
    if config.schedule == "static" or groups == 0:
        return ()
    if config.schedule == "all":
        return tuple(range(groups))
    position = (step // config.period) % groups
    if config.schedule == "async":
        return (position,)
    return tuple(range(groups)) if position == 0 else ()


def profiled_groups(config: LosiaConfig, groups: int, step: int, head: int | None = None) -> tuple[int, ...]:
    """The groups whose importance optimizer step ``step`` measures: only the last ``profile_steps`` of a slot do.

    head: the group of the output head, which ``head_rows`` may choose for in another way; None where none learns.
    """
    left = config.period - step % config.period
    if not config.profiles or left > (config.profile_steps or config.period):
        return ()
    return _without_head(config, slot_groups(config, groups, step), head)


def reselecting_groups(config: LosiaConfig, groups: int, step: int, head: int | None = None) -> tuple[int, ...]:
    """The groups that re-select at the end of optimizer step ``step``; the head is among them once it has counted."""
    due = slot_groups(config, groups, step) if ends_slot(config, step) else ()
    if config.head_rows in ("frequent", "fixed"):
        due = _without_head(config, due, head)
    if head is not None and config.head_rows == "frequent" and step + 1 == counted_steps(config):
        due = (head, *due)
    return due


def _without_head(config: LosiaConfig, groups: tuple[int, ...], head: int | None) -> tuple[int, ...]:
    return groups if config.head_rows == "importance" else tuple(group for group in groups if group != head)


def counted_steps(config: LosiaConfig) -> int:
    """The first optimizer steps whose labels head_rows="frequent" counts."""
    return config.count_steps or config.period


def ends_slot(config: LosiaConfig, step: int) -> bool:
    """Whether optimizer step ``step`` is the last of its slot: (t + 1) % T == 0."""
    return (step + 1) % config.period == 0


LEAST_CHECKED = 16
"""Steps that a check at the end of a slot covers at least, where all groups re-select and slots may be short."""


def checked_steps(config: LosiaConfig) -> int:
    """How many steps apart it is checked that S and W are the same and that everything learns: whole slots."""
    slots = -(-LEAST_CHECKED // config.period) if config.schedule == "all" else 1
    return slots * config.period


def rewarmed_steps(config: LosiaConfig) -> int:
    """The updates after a re-selection that rewarming takes; 1 is none."""
    if not config.rewarm:
        return 1
    return config.rewarm_steps or (1 if config.schedule == "all" else config.period)


def rewarm_factor(config: LosiaConfig, updates: int) -> float:
    """k/R, the share of the k-th update after a re-selection that counts, where R is ``rewarmed_steps``; 1.0 from the
    R-th on. ``updates``: k >= 1."""
    steps = rewarmed_steps(config)
    return 1.0 if updates >= steps else updates / steps


def round_length(config: LosiaConfig, groups: int) -> int:
    """The optimizer steps in which every group has its slot once: T * L, or T where all have it at once."""
    return config.period * (1 if config.schedule == "all" else max(1, groups))
