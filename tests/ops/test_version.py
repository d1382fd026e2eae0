"""The ops' bodies and their version move together."""

from __future__ import annotations

import hashlib
import inspect

import torch

from losia_fx._compat import inductor_order, inductor_pooling, int8_product
from losia_fx.method import packing, subnet
from losia_fx.ops import experts, first_order, grouped, library, packed
from losia_fx.ops import linear as ops
from losia_fx.passes.joint import graph as joint
from losia_fx.passes.joint import remake_inputs, sink_gathers

BODIES = {
    "v1": "6fb44b75615f1539269240fc6d05054a7fa4483a4c535dfbd9f88f223e6f1d17",
    "v2": "bcab9f4db2ef0933f73e7d4051a28e2d4dfacc0bbc13dfcfbd58ae25a0b06eb9",
    "v3": "d19623d3062c9693b91d7c85a53a84558f5053822ff52e6bfd4b1074963b9990",
    "v4": "e8b677c185e0b23eeabe1873888eeb49f35622dd386e56b3f4524954b8f8792b",
    "v5": "a3886351c528f64af73552aa02cf83c82e0be23913cbf12db6109895786a2a9f",
    "v6": "8b1e2998f46550f4a3bece7fdcbc6576c890799f383987d75c4943166e00e7bb",
    "v7": "9db2597058274117dffd563019caa5878e3462815f2378145a4e65a82df4546e",
    "v8": "691cabd6aa49cc4186082794f1d303a10c8118c07defd1f56fd03cf2d62aeeed",
    "v9": "0c57d3332c19c326e059ee0cdfad630c9a0207899d99472b94e9496dca486eac",
    "v10": "4f8e2eeb6dffbddaada4b3aad4c370695f89ec0acfef74794009a5cd5da3c0e3",
    "v11": "09c03e5f106b695c63327ec6604aea7a50ddf209c897604d92acd73d82d3ad08",
}
"""Version -> sha256 of the sources of all bodies. Add a line; never change one."""

OPS = {
    "subnet_linear": ops.subnet_linear,
    "subnet_weight": ops.subnet_weight,
    "subnet_grouped": experts.subnet_grouped,
    "subnet_batched": experts.subnet_batched,
    "packed_linear": packed.packed_linear,
    "quantised": packed.quantised,
}


def bodies() -> str:
    parts = [
        *(
            ops.autocasted,
            ops.pick,
            ops.subnet_gradient,
            ops.as_gradient,
            ops._SubnetLinear,
            ops._input_gradient,
            ops._subnet_linear,
            ops._SubnetWeight,
            ops._subnet_weight,
            subnet.gather,
            first_order.first_order,
            first_order.refuse_second,
        ),
        *(experts._SubnetGrouped, experts._subnet_grouped, grouped),
        *(experts._SubnetBatched, experts._subnet_batched),
        *(packed, packing.quantise, int8_product),
        *(joint, sink_gathers, remake_inputs, inductor_order, inductor_pooling),  # no ops, but as unknown to the caches
    ]
    return hashlib.sha256("".join(inspect.getsource(part) for part in parts).encode()).hexdigest()


def test_a_changed_body_has_a_new_version() -> None:
    assert BODIES.get(library.VERSION) == bodies(), (
        f"the bodies of the ops are not those of version {library.VERSION!r}. The compilers' disk caches know an op by "
        "its name and not by its body: a process that finds an old entry would run the OLD gradients. Set "
        f"library.VERSION to a new name and add it here with {bodies()!r}"
    )


def test_the_overload_is_the_version() -> None:
    for name, op in OPS.items():
        packet = getattr(torch.ops.losia, name)
        assert op is getattr(packet, library.VERSION)
        assert op.name() == f"losia::{name}.{library.VERSION}"
        assert packet.overloads() == [library.VERSION]
