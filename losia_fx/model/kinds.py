"""What a parameter is to losia_fx, told from the module that owns it: no model and no graph is needed."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

LINEAR = "linear"
TRANSPOSED = "linear, stored (in, out)"
ATTENTION = "attention projection"
MATRIX = "matrix of a module of its own"
EXPERTS = "experts"

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def kind_of(owner: nn.Module, key: str, parameter: nn.Parameter) -> str | None:
    """The kind of linear weight that ``owner.key`` is, or None.

    "experts" is a 3-D parameter (E, out, in) of a module that counts E experts, or that has another of E. "matrix of a
    module of its own" is the 2-D ``weight`` of a module that is none of torch's, as routers have it. How a graph uses
    the weight makes no difference to whether it trains rightly, only to what it costs (see
    losia_fx.passes.match).
    """
    if isinstance(owner, nn.Linear):
        return LINEAR if key == "weight" else None
    if isinstance(owner, nn.MultiheadAttention):
        return ATTENTION if key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") else None
    if isinstance(owner, _transposed_linears()):
        return TRANSPOSED if key == "weight" else None
    if _is_torchs(owner) or not parameter.is_floating_point():
        return None
    if _is_stack(parameter) and (parameter.shape[0] in _expert_counts(owner) or _stacks(owner, parameter.shape[0]) > 1):
        return EXPERTS
    return MATRIX if key == "weight" and parameter.dim() == 2 and min(parameter.shape) > 1 else None


def reparametrised(owner: nn.Module, key: str) -> bool:
    """Whether ``owner.key`` is a part from which the weight that runs is computed (weight norm and the like)."""
    parts = (nn.Linear, nn.Bilinear, *_transposed_linears())
    return isinstance(owner, ParametrizationList) or (isinstance(owner, parts) and key.startswith("weight_"))


def is_embedding(owner: nn.Module) -> bool:
    return isinstance(owner, _EMBEDDINGS)


def is_sharded(parameter: Tensor) -> bool:
    """Whether the process holds a part of it only, as a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has made one has imported it
    return module is not None and isinstance(parameter, module.DTensor)


def adapters_in(root: nn.Module) -> set[int]:
    """The ids of the parameters that PEFT's layers have put beside or around the layers they adapt."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # a model that has such a layer has imported it
    kinds: tuple[type, ...] = () if peft is None else (peft.BaseTunerLayer,)
    found: set[int] = set()
    for layer in root.modules():
        if isinstance(layer, kinds):
            base = layer._modules.get("base_layer")
            adapted = set() if base is None else {id(parameter) for parameter in base.parameters()}
            found |= {id(parameter) for parameter in layer.parameters()} - adapted
    return found


def holds_weights(module: nn.Module) -> bool:
    """Whether any linear weight is in ``module``."""
    return any(holds_weights_itself(owner) for owner in module.modules())


def holds_weights_itself(owner: nn.Module) -> bool:
    """Whether a parameter of ``owner`` is a linear weight."""
    return any(p is not None and kind_of(owner, key, p) is not None for key, p in owner._parameters.items())


def is_bare(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer and nothing more."""
    return isinstance(module, (nn.Linear, *_transposed_linears()))


def _transposed_linears() -> tuple[type[nn.Module], ...]:
    """transformers' Conv1D, a linear layer in spite of its name. A model that has one has imported it."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def _is_torchs(owner: nn.Module) -> bool:
    """A layer of torch (convolution, norm, embedding, ...), or one made from it."""
    bases = [base for base in type(owner).__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    return any(base.__module__.startswith("torch.") for base in bases)


def _is_stack(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and min(parameter.shape[1:]) > 1


def _stacks(owner: nn.Module, count: int) -> int:
    """How many stacks of ``count`` matrices a module has; of one alone it would be a table as often as a weight."""
    return sum(_is_stack(p) and p.shape[0] == count for p in owner._parameters.values() if p is not None and count > 1)


def _expert_counts(owner: nn.Module) -> set[int]:
    """The numbers of experts that a module keeps as attributes (num_experts, n_shared_experts, ...)."""
    return {value for name, value in vars(owner).items() if "expert" in name and type(value) is int}
