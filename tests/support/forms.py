"""The ways in which a module can use a weight, as data: what tests of products run over, and what each must come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers its grouped product)
from torch import Tensor, nn

OUT, IN, EXPERTS, TOKENS = 10, 7, 3, 5
Use = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One use. ``use(module, x)``: module.weight and module.bias are Parameters, x floats with a gradient."""

    name: str
    use: Use
    x: tuple[int, ...]
    said: str
    """In the report."""
    weight: tuple[int, ...] = (OUT, IN)
    bias: int = 0
    """Its length; 0 for none."""
    whole: bool = False
    """Exact by the full gradient, which is then cut down: the report must say so."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)


class Holder(nn.Module):
    """A weight and what is done with it. Losia_fx knows it for a linear weight by its name, or for experts by E."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(form.weight) / 3)
        self.bias = nn.Parameter(torch.randn(form.bias)) if form.bias else None
        self.num_experts = form.weight[0]
        self.form = form
        self.scale = nn.Parameter(torch.rand(form.x[-1:]) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """() something that depends on every element of y differently."""
        y = self.form.use(self, x * self.scale)
        slope = torch.linspace(0.3, 1.7, y.numel(), dtype=y.dtype).reshape(y.shape)
        return (y * slope + 0.1 * y.square()).sum().to(self.scale.dtype)


class Model(nn.Module):
    """Every form a block."""

    def __init__(self, *forms: Form) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Holder(form) for form in forms)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        total = inputs[0].new_zeros(())
        for layer, x in zip(self.layers, inputs, strict=True):
            total = total + layer(x)
        return total


def addmm_scaled(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2.0)


def sliced(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight[2:8])


def chunked(m: Any, x: Tensor) -> Tensor:
    first, second = m.weight.chunk(2)
    return F.linear(x, first) * F.linear(x, second)


def concatenated(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([m.weight, m.weight.flip(0)]))


def reshaped(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight.view(OUT // 2, 2 * IN))


def several(m: Any, x: Tensor) -> Tensor:
    back = F.linear(x, m.weight) @ m.weight
    return F.linear(back, m.weight) + torch.einsum("...i,oi->...o", x, m.weight)


def products_and_more(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight) + m.weight.square().sum(1)


def both_behind_a_cast(m: Any, x: Tensor) -> Tensor:
    w = m.weight.to(x.dtype).contiguous()
    return F.linear(F.linear(x, w) @ w, w)


def through_itself(m: Any, x: Tensor) -> Tensor:
    return x @ (m.weight @ m.weight.t())


def itself_behind_a_cast(m: Any, x: Tensor) -> Tensor:
    w = m.weight.to(x.dtype).contiguous()
    return x @ (w @ w.t())


def inplace(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.weight).add_(1.0).relu_()


def inplace_left(m: Any, x: Tensor) -> Tensor:
    return torch.matmul(m.weight, x).mul_(0.5).add_(x.sum())


def inplace_addmm(m: Any, x: Tensor) -> Tensor:
    y = torch.addmm(m.bias, x, m.weight)
    y[:, 1:3] = 0.0
    return y.relu_()


def loop(m: Any, x: Tensor) -> Tensor:
    return torch.stack([F.linear(x[e], m.weight[e]) for e in range(EXPERTS)])


def from_the_end(m: Any, x: Tensor) -> Tensor:
    return F.linear(x[0], m.weight[-1]) + F.linear(x[1], m.weight[0])


def by_tensor(m: Any, x: Tensor) -> Tensor:
    index = torch.arange(EXPERTS)
    return sum(x[i] @ m.weight[index[i]] for i in (0, 2))  # type: ignore[return-value]


def by_negative_tensor(m: Any, x: Tensor) -> Tensor:
    index = torch.arange(EXPERTS) - EXPERTS
    return x[0] @ m.weight[index[2]]


def unbound(m: Any, x: Tensor) -> Tensor:
    first, second, _ = m.weight.unbind()
    return torch.relu(F.linear(x[0], first)) @ second


def selected(m: Any, x: Tensor) -> Tensor:
    return F.linear(x[0], torch.select(m.weight, 0, 1)) + F.linear(x[1], m.weight.select(0, 2))


INDEX = (2, 0, 2, 1)


def gathered(m: Any, x: Tensor) -> Tensor:
    return torch.bmm(x, m.weight[torch.tensor(INDEX)])


def gathered_left(m: Any, x: Tensor) -> Tensor:
    return torch.bmm(m.weight[torch.tensor(INDEX)], x)


def gathered_from_the_end(m: Any, x: Tensor) -> Tensor:
    return torch.bmm(x, m.weight[torch.tensor(INDEX) - EXPERTS])


def offsets() -> Tensor:
    """The second expert sees no token."""
    return torch.tensor([2, 2, TOKENS], dtype=torch.int32)


def grouped(m: Any, x: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, m.weight, offs=offsets())


def grouped_transposed(m: Any, x: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, m.weight.transpose(-2, -1), offs=offsets())


def grouped_by_torch(m: Any, x: Tensor) -> Tensor:
    return F.grouped_mm(x, m.weight.transpose(-2, -1), offs=offsets())


def grouped_by_torch_untransposed(m: Any, x: Tensor) -> Tensor:
    return F.grouped_mm(x, m.weight, offs=offsets())


def broadcast(m: Any, x: Tensor) -> Tensor:
    return torch.matmul(x, m.weight)


def relu_of_itself(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("oi,pi->op", m.weight, m.weight) @ x.t()


X, XT = (4, TOKENS, IN), (TOKENS, OUT)
MATRIX = (IN, OUT)  # stored (in, out)
E_OUT_IN, E_IN_OUT = (EXPERTS, OUT, IN), (EXPERTS, IN, OUT)
BF16 = (torch.bfloat16,)

LINEARS = (
    Form("linear-1d", lambda m, x: F.linear(x, m.weight), (IN,), "linear"),
    Form("linear-2d", lambda m, x: F.linear(x, m.weight, m.bias), (TOKENS, IN), "linear", bias=OUT),
    Form("linear-3d", lambda m, x: F.linear(x, m.weight, m.bias), X, "linear", bias=OUT),
    Form("linear-4d", lambda m, x: F.linear(input=x, weight=m.weight), (2, *X), "linear"),
    Form("linear-bias-of-one", lambda m, x: F.linear(x, m.weight, m.bias.expand(OUT)), X, "linear", bias=1),
    Form("addmm", lambda m, x: torch.addmm(m.bias, x, m.weight), (TOKENS, IN), "addmm", MATRIX, OUT),
    Form("addmm-method", lambda m, x: m.bias.addmm(x, m.weight), (TOKENS, IN), "addmm", MATRIX, OUT),
    Form("addmm-transposed", lambda m, x: torch.addmm(m.bias, x, m.weight.t()), (TOKENS, IN), "addmm", bias=OUT),
    Form("addmm-bias-of-one", lambda m, x: torch.addmm(m.bias, x, m.weight), (TOKENS, IN), "addmm", MATRIX, 1, True),
    Form("addmm-scaled", addmm_scaled, (TOKENS, IN), "addmm", MATRIX, OUT, True),
    Form("right", lambda m, x: x @ m.weight, X, "matmul", MATRIX),
    Form("right-1d", lambda m, x: torch.matmul(x, m.weight), (IN,), "matmul", MATRIX),
    Form("right-method", lambda m, x: x.matmul(m.weight), X, "matmul", MATRIX),
    Form("right-reversed", lambda m, x: x.__matmul__(m.weight), X, "matmul", MATRIX),
    Form("right-t", lambda m, x: x @ m.weight.t(), X, "matmul"),
    Form("right-T", lambda m, x: x @ m.weight.T, X, "matmul"),
    Form("right-aten-T", lambda m, x: x @ torch.ops.aten.numpy_T(m.weight), X, "matmul"),  # what 2.14 writes for .T
    Form("right-aten-mT", lambda m, x: x @ torch.ops.aten.mT(m.weight), X, "matmul"),
    Form("aten-linear", lambda m, x: torch.ops.aten.linear.default(x, m.weight, m.bias), X, "linear", bias=OUT),
    Form("aten-mm", lambda m, x: torch.ops.aten.mm.default(x, m.weight), (TOKENS, IN), "matmul", MATRIX),
    Form("right-mT", lambda m, x: torch.matmul(x, m.weight.mT), X, "matmul"),
    Form("right-transpose", lambda m, x: x @ m.weight.transpose(0, 1), X, "matmul"),
    Form("right-transpose-negative", lambda m, x: x @ torch.transpose(m.weight, -1, -2), X, "matmul"),
    Form("right-permute", lambda m, x: x @ m.weight.permute(1, 0), X, "matmul"),
    Form("right-permute-list", lambda m, x: x @ torch.permute(m.weight, (1, 0)), X, "matmul"),
    Form("right-permute-keyword", lambda m, x: x @ m.weight.permute(dims=(1, 0)), X, "matmul"),
    Form("right-keywords", lambda m, x: x @ torch.transpose(input=m.weight, dim0=0, dim1=1), X, "matmul"),
    Form("right-H", lambda m, x: x @ m.weight.H, X, "matmul"),
    Form("right-mH", lambda m, x: x @ m.weight.mH, X, "matmul"),
    Form("right-adjoint", lambda m, x: x @ torch.adjoint(m.weight), X, "matmul"),
    Form("right-swapaxes", lambda m, x: x @ m.weight.swapaxes(0, 1), X, "matmul"),
    Form("right-swapdims", lambda m, x: x @ torch.swapdims(m.weight, 1, 0), X, "matmul"),
    Form("right-movedim", lambda m, x: x @ m.weight.movedim(0, -1), X, "matmul"),
    Form("right-moveaxis", lambda m, x: x @ torch.moveaxis(m.weight, (0, 1), (1, 0)), X, "matmul"),
    Form("right-twice-turned", lambda m, x: x @ m.weight.t().mT, X, "matmul", MATRIX),
    Form("linear-turned", lambda m, x: F.linear(x, m.weight.t()), X, "linear", MATRIX),
    Form("not-turned", lambda m, x: x @ m.weight.permute(0, 1), X, "matmul", MATRIX),
    Form("mm", lambda m, x: torch.mm(x, m.weight), (TOKENS, IN), "matmul", MATRIX),
    Form("mm-left", lambda m, x: m.weight.mm(x), (IN, TOKENS), "matmul"),
    Form("left-1d", lambda m, x: m.weight @ x, (IN,), "matmul"),
    Form("left-2d", lambda m, x: m.weight @ x, (IN, TOKENS), "matmul"),
    Form("left-3d", lambda m, x: torch.matmul(m.weight, x), (4, IN, TOKENS), "matmul"),
    Form("left-3d-turned", lambda m, x: m.weight.t() @ x, (4, IN, TOKENS), "matmul", MATRIX),
    Form("left-4d", lambda m, x: m.weight @ x, (2, 4, IN, TOKENS), "matmul"),
    Form("mv", lambda m, x: torch.mv(m.weight, x), (IN,), "mv", whole=True),
    Form("einsum", lambda m, x: torch.einsum("bti,oi->bto", x, m.weight), X, "einsum"),
    Form("einsum-dots", lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), X, "einsum"),
    Form("einsum-stored-otherwise", lambda m, x: torch.einsum("...i, io -> ...o", x, m.weight), X, "einsum", MATRIX),
    Form("einsum-first", lambda m, x: torch.einsum("oi,bti->bto", m.weight, x), X, "einsum"),
    Form("einsum-permuted", lambda m, x: torch.einsum("bti,oi->otb", x, m.weight), X, "einsum"),
    Form("einsum-middle", lambda m, x: torch.einsum("bit,oi->bot", x, m.weight), (4, IN, TOKENS), "einsum"),
    Form("einsum-list", lambda m, x: torch.einsum("bti,oi->bto", [x, m.weight]), X, "einsum"),
    Form("einsum-capitals", lambda m, x: torch.einsum("Bi,Oi->OB", x, m.weight), (TOKENS, IN), "einsum"),
    Form("einsum-dots-moved", lambda m, x: torch.einsum("...i,oi->o...", x, m.weight), X, "einsum", whole=True),
    Form("einsum-implicit", lambda m, x: torch.einsum("bi,oi", x, m.weight), (TOKENS, IN), "einsum", whole=True),
    Form("einsum-sums-more", lambda m, x: torch.einsum("bti,oi->bo", x, m.weight), X, "einsum", whole=True),
    Form("einsum-diagonal", lambda m, x: torch.einsum("bii,oi->bo", x, m.weight), (4, IN, IN), "einsum", whole=True),
    Form("einsum-elementwise", lambda m, x: torch.einsum("bi,oi->boi", x, m.weight), (4, IN), "einsum", whole=True),
    Form("einsum-one-wide", lambda m, x: torch.einsum("bi,oi->bo", x, m.weight), (4, 1), "einsum", whole=True),
    Form("einsum-with-itself", relu_of_itself, (TOKENS, OUT), "einsum", whole=True),
    Form(
        "einsum-square",
        lambda m, x: torch.einsum("bi,ii->bi", x, m.weight),
        (4, IN),
        "einsum",
        (IN, IN),
        whole=True,
    ),
    Form("cast-to", lambda m, x: F.linear(x, m.weight.to(x.dtype)), X, "linear"),
    Form("cast-type-as", lambda m, x: x @ m.weight.type_as(x).t(), X, "matmul"),
    Form("cast-contiguous", lambda m, x: x @ m.weight.t().contiguous(), X, "matmul"),
    Form("cast-float", lambda m, x: F.linear(x.float(), m.weight.float()), X, "linear", dtypes=(torch.float32,)),
    Form("cast-down", lambda m, x: F.linear(x.bfloat16(), m.weight.bfloat16()), X, "linear", dtypes=BF16),
    Form("sliced", sliced, X, "getitem", whole=True),
    Form("chunked", chunked, X, "chunk", whole=True),
    Form("concatenated", concatenated, X, "cat, flip", whole=True),
    Form("viewed", reshaped, (4, 2 * IN), "view", whole=True),
    Form("several", several, X, "einsum, linear, matmul"),
    Form("with-itself-behind-a-cast", itself_behind_a_cast, XT, "matmul", whole=True),
    Form("several-behind-a-cast", both_behind_a_cast, X, "linear, matmul"),
    Form("products-and-more", products_and_more, X, "linear, square", whole=True),
    Form("through-itself", through_itself, XT, "matmul", whole=True),
    Form("left-viewed", lambda m, x: (m.weight @ x).view(4, -1), (4, IN, TOKENS), "matmul"),
    Form("einsum-permuted-viewed", lambda m, x: torch.einsum("bti,oi->otb", x, m.weight).view(-1), X, "einsum"),
    Form(
        "einsum-middle-viewed",
        lambda m, x: torch.einsum("bit,oi->bot", x, m.weight).mT.view(4, -1),
        (4, IN, TOKENS),
        "einsum",
    ),
    Form("inplace-turned", lambda m, x: F.linear(x.mT, m.weight).add_(1.0), (4, IN, TOKENS), "linear"),
    Form("inplace", inplace, X, "linear"),
    Form("inplace-left", inplace_left, (4, IN, TOKENS), "matmul"),
    Form("inplace-addmm", inplace_addmm, (TOKENS, IN), "addmm", MATRIX, OUT),
)

XE = (EXPERTS, TOKENS, IN)
EXPERT_FORMS = (
    Form("loop", loop, XE, "linear", E_OUT_IN),
    Form("from-the-end", from_the_end, XE, "linear", E_OUT_IN),
    Form("unbound", unbound, XE, "linear, matmul", E_OUT_IN),
    Form("selected", selected, XE, "linear", E_OUT_IN),
    Form("bmm", lambda m, x: torch.bmm(x, m.weight), XE, "bmm", E_IN_OUT),
    Form("bmm-turned", lambda m, x: torch.bmm(x, m.weight.transpose(1, 2)), XE, "bmm", E_OUT_IN),
    Form("bmm-turned-movedim", lambda m, x: torch.bmm(x, m.weight.movedim(-1, 1)), XE, "bmm", E_OUT_IN),
    Form("turned-otherwise", lambda m, x: x @ m.weight.permute(1, 0, 2)[0].t(), XE, "permute", E_OUT_IN, whole=True),
    Form("bmm-left", lambda m, x: torch.bmm(m.weight, x), (EXPERTS, IN, TOKENS), "bmm", E_OUT_IN),
    Form("bmm-left-turned", lambda m, x: m.weight.mT.bmm(x), (EXPERTS, IN, TOKENS), "bmm", E_IN_OUT),
    Form("matmul", lambda m, x: x @ m.weight, XE, "matmul", E_IN_OUT),
    Form("matmul-left", lambda m, x: m.weight @ x, (EXPERTS, IN, TOKENS), "matmul", E_OUT_IN),
    Form("matmul-broadcast", broadcast, (1, TOKENS, IN), "matmul", E_IN_OUT, whole=True),
    Form("matmul-broadcast-2d", broadcast, (TOKENS, IN), "matmul", E_IN_OUT, whole=True),
    Form("einsum-3d", lambda m, x: torch.einsum("eti,eoi->eto", x, m.weight), XE, "einsum", E_OUT_IN, whole=True),
    Form("gathered", gathered, (4, TOKENS, IN), "bmm", E_IN_OUT),
    Form("gathered-left", gathered_left, (4, IN, TOKENS), "bmm", E_OUT_IN),
    Form("gathered-left-viewed", lambda m, x: gathered_left(m, x).view(4, -1), (4, IN, TOKENS), "bmm", E_OUT_IN),
    Form("gathered-from-the-end", gathered_from_the_end, (4, TOKENS, IN), "bmm", E_IN_OUT),
    Form("grouped", grouped, (TOKENS, IN), "grouped_mm", E_IN_OUT),
    Form("grouped-turned", grouped_transposed, (TOKENS, IN), "grouped_mm", E_OUT_IN),
    Form("grouped-single", grouped, (TOKENS, IN), "grouped_mm", E_IN_OUT, dtypes=(torch.float32,)),
    Form("grouped-torch", grouped_by_torch, (TOKENS, 24), "grouped_mm", (EXPERTS, 32, 24), dtypes=BF16),
    Form("grouped-torch-stored-otherwise", grouped_by_torch_untransposed, (TOKENS, 24), "grouped_mm", (EXPERTS, 24, 32),
         dtypes=BF16),
)  # fmt: skip
FORMS = (*LINEARS, *EXPERT_FORMS)
BROKEN = (
    Form("by-tensor", by_tensor, XE, "", E_IN_OUT),
    Form("by-negative-tensor", by_negative_tensor, XE, "", E_IN_OUT),
)
"""Dynamo asks for the number and breaks the graph."""
