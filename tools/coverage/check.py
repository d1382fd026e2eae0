"""One model under losia_fx: its gradients against plain autograd, and which of its linears learn."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import losia_fx
from losia_fx.errors import LosiaError
from losia_fx.model.blocks import block_of, find_blocks, plain_name

from ..tiny.model import SEED, TinyModel
from .libraries import LIBRARIES, Build

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
ROUNDING = {"float64": 1e-6, "float32": 1e-5}
"""A gradient that is this much smaller than the model's largest is all rounding: it is judged by the largest."""

EXACT, INEXACT, REFUSED, UNBUILT = "exact", "INEXACT", "refused", "cannot be built"
DIED = "no result"
"""Of the process: for who runs checks in processes of their own."""


@dataclass(frozen=True)
class Result:
    """What came out for one model."""

    architecture: str
    """As its library names it."""
    verdict: str
    why: str = ""
    model: str = ""
    """Class of the model."""
    dtype: str = ""
    subnets: int = 0
    share: float | None = None
    """Of the elements of linear weights inside the repeated blocks: those of weights that learn through a subnet."""
    error: float | None = None
    """The largest difference between a subnet's gradient and the plain one, relative to the weight's largest."""


def check(architecture: str, compiler: str, dtype: str, library: str = "transformers") -> Result:
    """Never raises for what the model or losia_fx does: that is a verdict."""
    torch.set_num_threads(1)
    try:
        tiny, used = _built(LIBRARIES[library].build, architecture, dtype)
    except LosiaError as error:
        return Result(architecture, UNBUILT, _one_line(error))
    name = type(tiny.model).__name__
    plain = _Run(tiny, _trainable(tiny.model))
    plain.backward()
    if any(p.grad is not None and not p.grad.isfinite().all() for p in plain.model.parameters()):
        return Result(architecture, UNBUILT, "its plain gradients are not finite", name, used)
    linears = linears_of(plain.model)
    if not linears:
        return Result(architecture, REFUSED, "no linear inside a repeated block", name, used)
    model = copy.deepcopy(tiny.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losia_fx.transform(model, rank_factor=0.25, compiler=compiler)
    except LosiaError as error:
        return Result(architecture, REFUSED, _one_line(error), name, used)
    ours = _Run(tiny, model)
    try:
        ours.backward()
    except Exception as error:
        return _failed(architecture, tiny, used, compiler, error)
    share, left, silent = coverage(model, linears)
    faults, worst = compare(ours, plain, used)
    if faults and (against := _against_compiler(tiny, ours, plain, compiler, used)) is not None:
        faults, worst = [], against[0]
        left.append(against[1])
    left += [tiny.note] if tiny.note else []
    faults += silent
    verdict, why = (INEXACT, faults) if faults else (EXACT, left)
    return Result(architecture, verdict, "; ".join(why), name, used, len(losia_fx.subnets(model)), share, worst)


def _built(build: Build, architecture: str, dtype: str) -> tuple[TinyModel, str]:
    if dtype == "float64":
        try:
            return build(architecture, torch.float64), dtype
        except LosiaError:  # some models make float32 constants on their way
            pass
    return build(architecture, torch.float32), "float32"


def _trainable(model: nn.Module, names: Container[str] | None = None) -> nn.Module:
    """A copy that asks for every gradient: some models freeze a part of themselves, which transform() does not mind.
    names: of the parameters that are to learn, where not all are."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (names is None or name in names))
    return twin


class _Run:
    """A model's loss and, after ``backward``, its gradients."""

    def __init__(self, tiny: TinyModel, model: nn.Module, call: Callable[..., Any] | None = None) -> None:
        self.tiny, self.model, self.call = tiny, model, model if call is None else call
        self.loss = torch.zeros(())

    def backward(self) -> None:
        torch.manual_seed(SEED)
        loss = self.tiny.loss(self.call(**self.tiny.batch))
        loss.backward()
        self.loss = loss.detach()


AS_FAR = 4
"""How many times as far from eager mode as torch.compile alone is rounding of the same kind, in another order."""


def _against_compiler(tiny: TinyModel, ours: _Run, plain: _Run, compiler: str, dtype: str) -> tuple[float, str] | None:
    """The largest difference from the model under torch.compile alone, or from eager mode where that is as far from it,
    and in words which of them it is; None where it is neither. With all that learns, then with the subnets' weights
    alone, as other weights are frozen under losia_fx too, and compilers make other graphs of that."""
    for names, of in ((None, ""), (losia_fx.subnets(ours.model), " of a model whose other weights are frozen")):
        torch.compiler.reset()
        model = _trainable(tiny.model, names)
        compiled = _Run(tiny, model, torch.compile(model, backend=compiler))
        try:
            compiled.backward()
        except Exception:  # then it is no measure
            return None
        faults, worst = compare(ours, compiled, dtype)
        if not faults:
            return worst, f"torch.compile alone{of} differs from eager mode here: held against that"
        faults, worst = compare(ours, plain, dtype, compiled)
        if not faults:
            return worst, f"torch.compile alone{of} is as far from eager mode"
    return None


def _loss_off(one: _Run, other: _Run) -> float:
    return float((one.loss - other.loss).abs()) / max(float(other.loss.abs()), 1e-30)


def _failed(architecture: str, tiny: TinyModel, dtype: str, compiler: str, error: Exception) -> Result:
    """losia_fx raised. Where torch.compile alone cannot run the model either, that is no fault of ours."""
    name = type(tiny.model).__name__
    torch.compiler.reset()
    model = copy.deepcopy(tiny.model)
    try:
        _Run(tiny, model, torch.compile(model, backend=compiler)).backward()
    except Exception as alone:
        return Result(architecture, REFUSED, f"torch.compile cannot run it either: {_one_line(alone)}", name, dtype)
    return Result(architecture, INEXACT, f"raises {type(error).__name__}: {_one_line(error)}", name, dtype)


def linears_of(model: nn.Module) -> dict[str, int]:
    """Weights of linears inside the repeated blocks -> their number of elements."""
    blocks = find_blocks(model)
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and block_of(plain_name(name), blocks):
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                found[f"{plain_name(name)}.weight"] = weight.numel()
    return found


def coverage(model: nn.Module, linears: dict[str, int]) -> tuple[float, list[str], list[str]]:
    """Share of the elements of ``linears`` in weights that learn through a subnet, why the others do not, and which
    of them the report passes over in silence."""
    rows = {row.name: row for row in losia_fx.report(model).weights}
    learns, silent, reasons = 0, list[str](), Counter[str]()
    for name, size in linears.items():
        row = rows.get(name)
        if row is None or not row.why:
            silent.append(f"{name}: the report does not say what becomes of it")
        elif row.trained == "subnet":
            learns += size
        else:
            reasons[f"{row.trained}: {row.why}"] += 1
    return learns / sum(linears.values()), [f"{count} x {why}" for why, count in reasons.items()], silent


def compare(ours: _Run, plain: _Run, dtype: str, compiled: _Run | None = None) -> tuple[list[str], float]:
    """What differs from plain autograd, in words, and the largest relative difference of a gradient. compiled: the
    plain model under a compiler, AS_FAR times whose own differences are let pass."""
    faults, worst, tolerance = [], 0.0, TOLERANCE[dtype]
    there = {} if compiled is None else {name: p.grad for name, p in compiled.model.named_parameters()}
    if not _loss_off(ours, plain) <= tolerance + (0.0 if compiled is None else AS_FAR * _loss_off(compiled, plain)):
        faults.append(f"loss {float(ours.loss):.10g} instead of {float(plain.loss):.10g}")
    expected = {name: p.grad for name, p in plain.model.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None and grad.numel())
    for name, subnet in losia_fx.subnets(ours.model).items():
        if subnet.weight.grad is not None:
            faults.append(f"{name}: the weight itself has a gradient")
        dense = expected.get(name)
        error = _difference(subnet.values.grad, dense, subnet.rows, subnet.cols, ROUNDING[dtype] * largest)
        worst = max(worst, error)
        allowed = TOLERANCE["float32"] if _made_in_float32(dense) else tolerance
        if dense is not None and (grad := there.get(name)) is not None:
            least = ROUNDING[dtype] * largest
            allowed += AS_FAR * _difference(
                block(grad, subnet.rows, subnet.cols), dense, subnet.rows, subnet.cols, least
            )
        if not error <= allowed:
            missing = " (no gradient)" if subnet.values.grad is None else ""
            faults.append(f"{name}: off by {error:.2g}{missing}")
    return faults, worst


def _made_in_float32(dense: Tensor | None) -> bool:
    """Whether a gradient has no bit beyond float32: the model casts there (routers do), whatever its own dtype is."""
    return dense is not None and bool((dense.float().to(dense.dtype) == dense).all())


def block(dense: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """dense (out, in) -> (r, c); dense (E, out, in), rows (E, r), cols (E, c) -> (E, r, c)."""
    if dense.dim() == 2:
        return dense[rows][:, cols]
    return torch.stack([block(*parts) for parts in zip(dense, rows, cols, strict=True)])


def _difference(actual: Tensor | None, dense: Tensor | None, rows: Tensor, cols: Tensor, least: float) -> float:
    """Largest difference, relative to the largest element of the plain gradient (or to ``least``)."""
    if dense is None:
        return 0.0 if actual is None or not actual.any() else float("inf")
    expected = block(dense, rows, cols)
    actual = torch.zeros_like(expected) if actual is None else actual
    difference = float((actual - expected).abs().max())
    return difference / max(float(dense.abs().max()), least, 1e-300)


def _one_line(error: BaseException) -> str:
    """The first lines of a message that say something, as one."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
