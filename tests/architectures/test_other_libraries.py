"""Models of other libraries than transformers: exact against plain autograd, every linear accounted for."""

from __future__ import annotations

import pytest
import torch

from losia_fx.errors import LosiaError
from losia_fx.tools.coverage.check import EXACT, REFUSED, UNBUILT, check
from losia_fx.tools.coverage.libraries import LIBRARIES

CORE = (
    ("torch", "MultiheadAttention, crossed"),
    ("torch", "MultiheadAttention, widths"),
    ("torch", "Transformer, norm first"),
    ("torch", "TransformerEncoder, masked"),
    ("diffusers", "DiTTransformer2DModel"),
    ("diffusers", "FluxTransformer2DModel"),
    ("diffusers", "PixArtTransformer2DModel"),
    ("diffusers", "SD3Transformer2DModel"),
    ("diffusers", "Transformer2DModel"),
    ("diffusers", "UNet2DConditionModel"),
    ("sentence-transformers", "bert, mean, dense"),
    ("timm", "swin_tiny_patch4_window7_224"),
    ("timm", "xcit_nano_12_p16_224"),
    ("torchvision", "VisionTransformer"),
    ("x-transformers", "Decoder, gated"),
)
OTHERS = [name for name in LIBRARIES if name != "transformers"]


def names_of(library: str) -> tuple[str, ...]:
    try:
        return LIBRARIES[library].names()
    except LosiaError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(("library", "name"), CORE)
def test_core(library: str, name: str) -> None:
    assert name in names_of(library)
    result = check(name, "aot_eager", "float64", library)
    assert result.verdict == EXACT, result
    assert (result.subnets > 0, result.share, result.why) == (True, 1.0, "")


@pytest.mark.slow
@pytest.mark.parametrize("library", OTHERS)
def test_every_model(library: str) -> None:
    results = [check(name, "eager", "float64", library) for name in names_of(library)]
    assert [result for result in results if result.verdict not in (EXACT, REFUSED)] == []
    assert sum(result.verdict == EXACT for result in results) > len(results) // 2


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_the_same_at_every_call_and_still(library: str) -> None:
    name = next(name for of, name in CORE if of == library)
    first, second = (LIBRARIES[library].build(name, torch.float64) for _ in range(2))
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(first.batch, second.batch, rtol=0, atol=0)
    losses = [tiny.loss(tiny.model(**tiny.batch)) for tiny in (first, first, second)]
    assert losses[0] == losses[1] == losses[2]  # no dropout
    assert all(p.dtype == torch.float64 for p in first.model.parameters())


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_a_name_that_is_none(library: str) -> None:
    with pytest.raises(LosiaError, match="'lama' is none of the"):
        LIBRARIES[library].build("lama", torch.float32)
    assert check("lama", "eager", "float64", library).verdict == UNBUILT


def test_names_in_order() -> None:
    for library in ("transformers", "torch", "diffusers"):
        names = LIBRARIES[library].names()
        assert list(names) == sorted(set(names))
