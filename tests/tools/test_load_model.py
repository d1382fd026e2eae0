"""MODEL arguments: what each kind gives, and one clear line for each that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from losia_fx import ConfigError
from losia_fx.finetune.settings import EMBEDDED_MODEL
from losia_fx.tools.load_model import Example, load_model
from losia_fx.tools.tiny.architectures import build

MODULE = """
import torch
def make(): return torch.nn.Linear(3, 2), torch.ones(1, 3)
def keywords(): return torch.nn.Linear(3, 2), {"input": torch.ones(1, 3)}
def no_model(): return 3, torch.ones(1)
def alone(): return torch.nn.Linear(3, 2)
def empty(): return torch.nn.Linear(3, 2), ()
def raises(): raise KeyError("lost")
value = 3
"""


def write_config(path: Path, model_type: str, **changes: Any) -> None:
    config: Any = build(model_type).model.config
    path.write_text(json.dumps({**config.to_dict(), **changes}, default=str))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import nothing_like_it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return tmp_path


def test_embedded_model() -> None:
    loaded = load_model(None)
    assert loaded.name == str(EMBEDDED_MODEL)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.model.training
    assert set(loaded.example.kwargs) == {"input_ids", "labels"}
    output = loaded.model(**loaded.example.kwargs)
    assert output.loss.requires_grad
    assert output.past_key_values is None


@pytest.mark.parametrize(("model_type", "name"), [("bert", "BertForMaskedLM"), ("mixtral", "MixtralForCausalLM")])
def test_config_file(tmp_path: Path, model_type: str, name: str) -> None:
    path = tmp_path / "config.json"
    write_config(path, model_type, architectures=[name])
    first, second = load_model(str(path)), load_model(str(path))
    assert type(first.model).__name__ == name
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    assert first.model(**first.example.kwargs).loss.requires_grad


def test_config_file_without_a_class(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_config(path, "vit", architectures=None)
    loaded = load_model(str(path))
    assert type(loaded.model).__name__ == "ViTForImageClassification"
    assert "pixel_values" in loaded.example.kwargs


def test_function(here: Path) -> None:
    loaded = load_model("models_of_mine:make")
    assert isinstance(loaded.model, torch.nn.Linear)
    assert loaded.model(*loaded.example.args, **loaded.example.kwargs).shape == (1, 2)
    assert load_model("models_of_mine:keywords").example.kwargs.keys() == {"input"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere", "no such file or folder; give a checkpoint folder, a config.json or module:function"),
        ("nowhere:make", "module 'nowhere' cannot be imported: ModuleNotFoundError"),
        (":make", "module '' cannot be imported"),
        ("broken_module:make", "module 'broken_module' cannot be imported: ModuleNotFoundError: No module named"),
        ("models_of_mine:lost", "module 'models_of_mine' has no function 'lost'"),
        ("models_of_mine:value", "module 'models_of_mine' has no function 'value'"),
        ("models_of_mine:no_model", r"returned \(int, Tensor\); return a torch.nn.Module and inputs for it"),
        ("models_of_mine:alone", "returned Linear; return a torch.nn.Module and inputs for it"),
        ("models_of_mine:raises", r"raises\(\) raised KeyError: 'lost'"),
        ("models_of_mine:empty", "example inputs are empty"),
        (".", "is no folder with a transformers checkpoint"),
        ("models_of_mine.py", "is no transformers configuration"),
    ],
)
def test_wrong(here: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_model(text)


@pytest.mark.parametrize("content", ["{}", '{"model_type": "lama"}', "[]", '{"model_type": "llama", "hidden_size": 5}'])
def test_wrong_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^MODEL {path}: "):
        load_model(str(path))


def test_torn_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((EMBEDDED_MODEL / "config.json").read_text())
    with pytest.raises(ConfigError, match="cannot be loaded as LlamaForCausalLM"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be loaded as LlamaForCausalLM"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("value", [(), [], {}])
def test_no_input(value: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        Example.of(value)


def test_example() -> None:
    x = torch.ones(1)
    assert Example.of(x) == Example((x,), {})
    assert Example.of([x, 3]) == Example((x, 3), {})
    assert Example.of({"x": x}) == Example((), {"x": x})
    assert Example.of(Example((x,), {})) == Example((x,), {})
