"""LosiaConfig: every knob of the method, its unit and its symbol in the paper; validated once, here."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from losia_fx.errors import ConfigError

SCHEDULES = ("async", "sync", "static", "all")
HEAD_SCORES = ("mixed", "first", "second", "gradient")
"""Importances of every element of a weight, which the head may have by itself."""
IMPORTANCES = (*HEAD_SCORES, "random")
"""Of every element, or of none."""
BY_SUMS = ("visits", "sample")
"""Importances of rows and of columns: out + in numbers of a weight."""
HEAD_ROWS = ("importance", *HEAD_SCORES, "frequent", "random", "fixed")
COMPILERS = ("inductor", "aot_eager", "eager")
FROZEN_PRODUCTS = ("int8", "float8")
CHOICES = {
    "schedule": SCHEDULES,
    "importance": (*IMPORTANCES, *BY_SUMS),
    "head_rows": HEAD_ROWS,
    "compiler": COMPILERS,
    "frozen_products": FROZEN_PRODUCTS,
}
"""Of the options that are one word of several; frozen_products may be None, too."""
BELONGS_TO = {"rewarm_steps": "rewarm", "count_steps": "head_rows", "head_period": "schedule"}
"""An option that is said of one value of another."""


@dataclass(frozen=True)
class LosiaConfig:
    """The options of LoSiA (Wang, Qi, Xu, EMNLP 2025, arXiv 2507.04487), validated on construction.

    rank_factor: p, the share of a weight's rows and of its columns that learns; in (0, 1].
    output_rank_factor: p_o, the share of the output head's rows that learns (every column does); in [0, 1],
        0 leaves the head frozen.
    period: T, the length of a time slot in optimizer steps; at least 1.
    schedule: "async" profiles one group a slot in turn, "sync" all groups in one slot of every round,
        "static" keeps the first subnets, "all" profiles every group in every slot and re-selects all at its end.
    importance: how a slot scores the elements of W: "mixed" |WG - (WG)^2/2|, "first" |WG|, "second" (WG)^2,
        "gradient" G^2 alone, "random" draws new subnets and profiles nothing, "visits" and "sample" score whole rows
        and columns. These two do so by the running mean of a row's or column's sum of G^2, and keep nothing of W's
        size: "visits" takes the largest of these over 1 + the subnets so far that an index was in, "sample" draws in
        proportion to them, without replacement.
    beta1, beta2: decay of the importance and of its uncertainty, an optimizer step at a time; in [0, 1).
    rewarm: whether the k-th update after a re-selection counts k/``rewarm_steps``.
    target: patterns of module names whose linear weights learn; None means every linear inside the repeated blocks,
        and the head.
    exclude: patterns of module names that stay as they are.
    trainable: patterns of other parameters to train in full (norms, biases, a classification head).
    seed: of the first rows and columns, and of importance="random".
    compiler: what compiles the rewritten graph.
    profile_steps: how many steps of a slot, its last, measure importance; at most ``period`` (or ``head_period``, where
        that is more), None for the whole slot.
    train_tied_head: whether an output head that shares its weight with the embedding learns too, by rows, from both
        uses; by default it stays as it is.
    track_delta: whether to keep what the weights were before training, so that save_delta can tell what has changed;
        it costs host memory, up to one copy of every weight that learns (losia-fx explain says how much).
    rewarm_steps: how many updates rewarming takes; None for a period, and for none with schedule="all", where it would
        lower the learning rate of the whole run.
    head_rows: how the output head's rows are chosen: "importance" as all others', "mixed", "first", "second" and
        "gradient" by this importance whatever the others go by, "random" drawn at the times at which
        the head re-selects, "fixed" as drawn at first, "frequent" those of the labels that were most frequent in the
        first ``count_steps`` steps, from then on for good: of the ``labels`` that the model is called with, or of its
        ``input_ids`` where there are none; -100 does not count, nor does a rank of many by itself.
    count_steps: how many steps that takes; None for a period of the head.
    head_period: with schedule="all", the length of the head's own slots in optimizer steps; None for ``period``.
    carry_moments: whether an optimizer's exp_avg_sq (Adam's) goes on after a re-selection from what is known of the
        rows and columns, instead of from zero: their running means of S.grad^2 (losia_fx.method.factored, decay 0.99),
        times the correction 1 - beta2^step that the optimizer takes off again, beta2 being that of its group's betas.
        Its step count is kept, its other moments start anew. The state of an optimizer that has no step, exp_avg,
        exp_avg_sq and betas starts anew as without this, and it is named once.
    frozen_products: "int8" or "float8" (e4m3) computes the forward and the input gradient of linear weights with a
        subnet from 8-bit numbers, quantised by token and by row of W, of a copy of W that follows it; the gradient of
        the subnet stays as it is, and so does W. None computes them as the model does. The output head and experts
        stay as they are, and without gradients the model runs on W itself.
    keep_dense: whether W itself is kept beside the 8-bit numbers of frozen_products. False, which needs those, keeps
        them and a scale a row in the place of each W that has them, rounded so: a byte an element, where W and the copy
        take three in 16 bits. A step's write to W is rounded to the nearest number, S itself is not; where a subnet
        leaves a place, to one of the two around at random, so that on average nothing is lost. Whatever reads W is
        given it in its own dtype, made for the moment: the model without gradients, the importance in a profiled slot,
        state_dict() and with it save_pretrained(), which are dense. A row that is loaded is rounded, unless the scale
        that it has can say it; the LoSiA state of the same moment brings the scales. restore() gives a dense W of the
        values it has then. Not with track_delta, nor for a weight that several modules share.

    A pattern is a shell-style glob (``*``, ``?``, ``[...]``). It matches a module or parameter of that dotted name, any
    whose name ends in ``.<pattern>``, and everything inside a module so matched: "q_proj", "layers.0", "*norm*".
    Raises ConfigError (a ValueError) that names the option, the value and what is allowed.
    """

    rank_factor: float = 0.125
    output_rank_factor: float = 0.125
    period: int = 50
    schedule: str = "async"
    importance: str = "mixed"
    beta1: float = 0.85
    beta2: float = 0.85
    rewarm: bool = True
    target: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    seed: int = 0
    compiler: str = "inductor"
    train_tied_head: bool = False
    profile_steps: int | None = None
    track_delta: bool = False
    rewarm_steps: int | None = None
    head_rows: str = "importance"
    count_steps: int | None = None
    carry_moments: bool = False
    frozen_products: str | None = None
    head_period: int | None = None
    keep_dense: bool = True

    def __post_init__(self) -> None:
        _number("rank_factor", self.rank_factor, "in (0, 1]", lambda v: 0 < v <= 1)
        _number("output_rank_factor", self.output_rank_factor, "in [0, 1]", lambda v: 0 <= v <= 1)
        _number("beta1", self.beta1, "in [0, 1)", lambda v: 0 <= v < 1)
        _number("beta2", self.beta2, "in [0, 1)", lambda v: 0 <= v < 1)
        _integer("period", self.period, least=1)
        _integer("seed", self.seed, least=0)
        for option in ("rewarm_steps", "count_steps", "head_period"):
            if getattr(self, option) is not None:
                _integer(option, getattr(self, option), least=1)
        if self.profile_steps is not None:
            _integer("profile_steps", self.profile_steps, least=1, most=max(self.period, self.head_period or 0))
        for option, allowed in CHOICES.items():
            _choice(option, getattr(self, option), (*allowed, None) if option == "frozen_products" else allowed)
        for option in ("rewarm", "train_tied_head", "track_delta", "carry_moments", "keep_dense"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"{option}={getattr(self, option)!r}: give True or False")
        self._refuse_contradictions()
        for option in ("target", "exclude", "trainable"):
            object.__setattr__(self, option, _patterns(option, getattr(self, option)))

    def _refuse_contradictions(self) -> None:
        if self.rewarm_steps is not None and not self.rewarm:
            raise ConfigError(
                f"rewarm_steps={self.rewarm_steps}: with rewarm=False nothing is rewarmed; drop one of them"
            )
        if self.count_steps is not None and self.head_rows != "frequent":
            raise ConfigError(f'count_steps={self.count_steps}: only head_rows="frequent" counts; drop it')
        if self.head_period is not None and self.schedule != "all":
            raise ConfigError(
                f"head_period={self.head_period}: with schedule={self.schedule!r} the groups take turns, the head too; "
                'drop it, or take schedule="all"'
            )

        if not self.keep_dense and self.frozen_products is None:
            raise ConfigError(
                f"keep_dense=False and frozen_products=None: W is kept in 8 bits for products of these; give "
                f"frozen_products one of {', '.join(map(repr, FROZEN_PRODUCTS))}, or drop keep_dense"
            )
        if not self.keep_dense and self.track_delta:
            raise ConfigError(
                "keep_dense=False and track_delta=True: W is rounded to 8 bits, so what it was before training is not "
                "what training changes; drop one of them"
            )

    @classmethod
    def of(cls, base: LosiaConfig | None, options: Mapping[str, Any]) -> LosiaConfig:
        """``base`` (or the defaults) with ``options`` on top. Raises ConfigError at an option that does not exist."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
                raise ConfigError(f"no option {name!r}: {hint}")
        if base is not None and not isinstance(base, LosiaConfig):
            raise ConfigError(f"config={base!r}: give a LosiaConfig, or its fields as keywords")
        start = {} if base is None else {field.name: getattr(base, field.name) for field in fields(base)}
        measured = start.get("profile_steps") if start.get("head_period") else None
        for option, of in BELONGS_TO.items():  # what the base says of a choice that is replaced goes with it
            if options.get(of, start.get(of)) != start.get(of):
                start[option] = None
        slots = [{**start, **options}.get(name) for name in ("period", "head_period")]
        if measured and not any(isinstance(steps, int) and steps >= measured for steps in slots):
            start["profile_steps"] = None  # they were of the head's slots, which are shorter now: all of them
        return cls(**{**start, **options})

    @classmethod
    def roaming(cls, **options: Any) -> LosiaConfig:
        """Every subnet is drawn anew after every step; the head's rows go by importance, at a pace of their own.

        That is schedule="all", importance="random", period=1, head_rows="mixed", head_period=50, profile_steps=10;
        ``options`` on top. Only the head is profiled, in ten steps of fifty. Made for losia_fx.optim.SubnetRMS: an
        optimizer whose state starts anew with every move takes the sign of the gradient here.
        """
        head: dict[str, Any] = {"head_rows": "mixed", "head_period": 50, "profile_steps": 10}
        return cls.of(cls(schedule="all", importance="random", period=1, **head), options)

    def scored_by(self, head: bool) -> str | None:
        """The importance that slots measure of the output head, or of other weights; None where they measure none."""
        kind = self.head_rows if head and self.head_rows != "importance" else self.importance
        return kind if self.schedule != "static" and kind in (*HEAD_SCORES, *BY_SUMS) else None

    def period_of(self, head: bool) -> int:
        """The length of a slot of the output head, or of other weights, in optimizer steps."""
        return self.head_period or self.period if head else self.period

    @property
    def profiles(self) -> bool:
        """Whether any slot measures importance: only then do graphs carry localization nodes."""
        return any(self.scored_by(head) for head in (False, True))


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that names ``name`` or a module around it, or None."""
    parts = name.split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    for pattern in patterns:
        if any(
            fnmatch.fnmatchcase(prefix, pattern) or fnmatch.fnmatchcase(prefix, f"*.{pattern}") for prefix in prefixes
        ):
            return pattern
    return None


def subnet_size(rank_factor: float, size: int) -> int:
    """floor(p * size), at least 1: how many of ``size`` rows or columns a subnet has (LoSiA section 3)."""
    return max(1, math.floor(rank_factor * size))


def _number(option: str, value: Any, allowed: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ConfigError(f"{option}={value!r}: give a number {allowed}")


def _integer(option: str, value: Any, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = "" if most == math.inf else f" and at most the period, {most}"
        raise ConfigError(f"{option}={value!r}: give a whole number of at least {least}{limit}")


def _choice(option: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}={value!r}: give one of {', '.join(map(repr, allowed))}")


def _patterns(option: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        if option == "target":
            return None
        raise ConfigError(f"{option}=None: give patterns of names, or ()")
    several = isinstance(value, Iterable) and not isinstance(value, str)
    listed = tuple(value) if several else (value,)
    if not all(isinstance(pattern, str) and pattern for pattern in listed):
        raise ConfigError(f"{option}={value!r}: give a name pattern or several, as non-empty strings")
    return listed


def described() -> dict[str, str]:
    """Option -> the first clause of what LosiaConfig's docstring says of it, as the help of an argument."""
    found: dict[str, str] = {}
    text = inspect.cleandoc(LosiaConfig.__doc__ or "")
    for names, entry in re.findall(r"^(\w+(?:, \w+)*): (.+(?:\n {4}.+)*)", text, re.MULTILINE):
        clause = re.split(r"[;.](?= |$)", " ".join(entry.split()))[0]
        found |= dict.fromkeys(names.split(", "), clause.replace("%", "%%").replace("``", ""))
    return found
