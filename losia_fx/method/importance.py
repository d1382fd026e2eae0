"""How much each element of a weight matters: importance, its moving averages, and the score. Tensors in, tensors out.

Source: LoSiA, arXiv 2507.04487, section 3.1; the exact form is that of losia.md, "Localization".
"""

from __future__ import annotations

from torch import Tensor


def importance_of(kind: str, weight: Tensor, grad: Tensor) -> Tensor:
    """What one step says of every element of W, float32, shape of W (out_features, in_features).

    "mixed" |wg - (wg)^2 / 2|, the second-order Taylor term of the loss with the Fisher diagonal as its curvature;
    "first" |wg|; "second" (wg)^2; "gradient" g^2, blind to the weight's own size.
    """
    g = grad.float()
    if kind == "gradient":
        return g * g
    wg = weight.detach().float() * g
    if kind == "first":
        return wg.abs()
    squared = wg * wg
    return squared if kind == "second" else (wg - squared / 2).abs()


def smooth(ema: Tensor, new: Tensor, beta: float) -> Tensor:
    """beta * ema + (1 - beta) * new, in place in ``ema`` (float32, shape of W)."""
    return ema.mul_(beta).add_(new, alpha=1 - beta)


def score_of(kind: str, importance: Tensor, uncertainty: Tensor) -> Tensor:
    """I * U, or I alone for "gradient". float32, shape of W."""
    return importance if kind == "gradient" else importance * uncertainty
