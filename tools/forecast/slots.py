"""The controller put where a measurement wants it: at the start of a group's slot, or at rest."""

from __future__ import annotations

from losia_fx.runtime.controller import Controller


def open_slot(controller: Controller, group: int) -> None:
    """Has the next step be the first of the group's slot."""
    asynchronous = controller.config.schedule == "async"
    controller.step = group * controller.config.period if asynchronous else 0
    controller.set_groups(controller.states, controller.groups)


def rest(controller: Controller) -> None:
    """Has the next step profile no group, whatever the schedule says; to be called before every step."""
    controller.step = 0
    for state in controller.states:
        state.profile = None
