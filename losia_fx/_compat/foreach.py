"""torch's operations over lists of tensors, one call for all of them: torch's own optimizers are made of these, and
they are private in name alone."""

from torch import _foreach_add_ as foreach_add_
from torch import _foreach_addcdiv_ as foreach_addcdiv_
from torch import _foreach_addcmul_ as foreach_addcmul_
from torch import _foreach_div_ as foreach_div_
from torch import _foreach_expm1_ as foreach_expm1_
from torch import _foreach_lerp_ as foreach_lerp_
from torch import _foreach_mul as foreach_mul
from torch import _foreach_mul_ as foreach_mul_
from torch import _foreach_reciprocal_ as foreach_reciprocal_
from torch import _foreach_sqrt as foreach_sqrt
from torch._utils import _flatten_dense_tensors as flatten_dense

__all__ = [
    "flatten_dense",
    "foreach_add_",
    "foreach_addcdiv_",
    "foreach_addcmul_",
    "foreach_div_",
    "foreach_expm1_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_reciprocal_",
    "foreach_sqrt",
]
