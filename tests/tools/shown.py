"""The models that every command is shown on, and one capture of each for all tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from losia_fx import LosiaConfig
from losia_fx.tools import load_model as load_module
from losia_fx.tools.graphs import capture as capture_module
from losia_fx.tools.graphs.capture import Captured, capture
from losia_fx.tools.load_model import Loaded, load_model
from losia_fx.tools.tiny.architectures import build
from tests.support.toys import needs_traced_experts

MODELS = ("embedded", "llama", "bert", "mixtral")
"""The model that ships with the package, a decoder, an encoder, a mixture of experts."""
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name == "embedded" else []) for name in MODELS]
"""For parametrize: the first is a larger decoder."""
CLASSES = {"bert": "BertForMaskedLM", "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
CONFIG = LosiaConfig(rank_factor=0.25, compiler="aot_eager")
OPTIONS = ["--rank-factor", "0.25", "--compiler", "aot_eager"]
FOLDER = TemporaryDirectory(prefix="losia-configs-")


@cache
def config_file(model_type: str) -> Path:
    config: Any = build(model_type).model.config
    path = Path(FOLDER.name, f"{model_type}.json")
    path.write_text(json.dumps({**config.to_dict(), "architectures": [CLASSES[model_type]]}, default=str))
    return path


def argument(name: str) -> list[str]:
    """What names the model on a command line."""
    return [] if name == "embedded" else [str(config_file(name))]


@cache
def loaded(name: str) -> Loaded:
    return load_model(next(iter(argument(name)), None))


@cache
def captured(name: str) -> Captured:
    if name == "mixtral":
        needs_traced_experts()
    return capture(loaded(name).model, loaded(name).example, CONFIG)


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands get the capture that another test has made of the same model."""
    names = {" ".join(argument(name)): name for name in MODELS}
    by_model: dict[int, str] = {}

    def load(text: str | None) -> Loaded:
        name = names[text or ""]
        by_model[id(loaded(name).model)] = name
        return loaded(name)

    def taken(model: Any, example: Any, config: LosiaConfig) -> Captured:
        assert config == CONFIG
        return captured(by_model[id(model)])

    monkeypatch.setattr(load_module, "load_model", load)
    monkeypatch.setattr(capture_module, "capture", taken)


def linears(name: str) -> int:
    """How many weights get a subnet: projections, MLPs, routers and experts of the layers, and the head."""
    return {"embedded": 4 * 7 + 1, "llama": 2 * 7 + 1, "bert": 2 * 6, "mixtral": 2 * 7 + 1}[name]
