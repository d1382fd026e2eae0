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
    return tuple(
        group
        for group in slot_groups(config, groups, step)
        if config.scored_by(group == head) and _is_measured(config, config.period_of(group == head), step)
    )


def _is_measured(config: LosiaConfig, period: int, step: int) -> bool:
    return period - step % period <= (config.profile_steps or period)


def reselecting_groups(config: LosiaConfig, groups: int, step: int, head: int | None = None) -> tuple[int, ...]:
    """The groups that re-select at the end of optimizer step ``step``; the head is among them once it has counted."""
    if config.head_rows in ("frequent", "fixed"):
        counted = config.head_rows == "frequent" and step + 1 == counted_steps(config)
        due = (head,) if head is not None and counted else ()
        movable = [group for group in slot_groups(config, groups, step) if group != head]
    else:
        due, movable = (), list(slot_groups(config, groups, step))
    return (*due, *(group for group in movable if (step + 1) % config.period_of(group == head) == 0))


def chosen_apart(config: LosiaConfig) -> bool:
    """Whether the head is chosen for by itself, by another importance than the other weights."""
    return config.scored_by(True) is not None and config.scored_by(True) != config.scored_by(False)


def counted_steps(config: LosiaConfig) -> int:
    """The first optimizer steps whose labels head_rows="frequent" counts."""
    return config.count_steps or config.period_of(head=True)


def ends_slot(config: LosiaConfig, step: int) -> bool:
    """Whether optimizer step ``step`` is the last of its slot: (t + 1) % T == 0."""
    return (step + 1) % config.period == 0


LEAST_CHECKED = 16
"""Steps that a check at the end of a slot covers at least, where all groups re-select and slots may be short."""


def checked_steps(config: LosiaConfig) -> int:
    """How many steps apart it is checked that S and W are the same and that everything learns: whole slots."""
    slots = -(-LEAST_CHECKED // config.period) if config.schedule == "all" else 1
    return slots * config.period


def recorded_moves(config: LosiaConfig) -> int:
    """Of how many slots the record of a run has one."""
    return checked_steps(config) // config.period


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
