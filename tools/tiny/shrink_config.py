"""Makes any transformers configuration tiny, by the names of its attributes; nothing here knows an architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .size_rules import (
    DEFAULTS,
    DEPTHS,
    FITTED_DEFAULTS,
    HEAD_DIM,
    HEADS,
    IMAGE,
    LAYER_COUNTS,
    LAYER_NUMBERS,
    LAYERS,
    MOST_LAYERS,
    MOST_PIXELS,
    OFF,
    ORDINARY_TOKENS,
    SIZES,
    SSM,
    STOPPED,
    TOKEN,
    VOCABULARY,
    Unit,
    Width,
)


def shrink(config: PretrainedConfig, ratio: int = 0) -> None:
    """Edits ``config`` and the configurations in it: widths, layers, heads, experts, vocabularies; no dropout.

    ratio: what all widths are divided by, for configurations whose widths have to fit in ways that their names do not
    tell; 0: each becomes what size_rules says.
    """
    tokens: dict[str, int] = {}
    for part in nested(config):
        _Shrinking(part, tokens, ratio).run()


def common_ratio(config: PretrainedConfig) -> int:
    """What the number of heads in every part of ``config`` can be divided by: 8, 4, 2 or 1."""
    heads = [size for part in nested(config) for name, size in vars(part).items() if rule(name) is HEADS]
    counts = [count for size in heads for count in (size if isinstance(size, (list, tuple)) else (size,))]
    return next(ratio for ratio in (8, 4, 2, 1) if all(type(n) is not int or n % ratio == 0 for n in counts))


def nested(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``config`` and every configuration inside it."""
    yield config
    for value in vars(config).values():
        values = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        for item in values:
            if isinstance(item, PretrainedConfig):
                yield from nested(item)


def rule(name: str) -> int | None:
    """The size that size_rules gives an attribute of this name."""
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def layer_counts(config: PretrainedConfig) -> dict[str, int]:
    values = vars(config)
    return {k: v for k, v in values.items() if type(v) is int and v > 0 and LAYER_COUNTS.fullmatch(k)}


def kept_layers(config: PretrainedConfig) -> dict[int, list[int]]:
    """Number of layers, as an attribute gives it -> the layers to keep, one of each kind at least."""
    kept = {}
    stages = next((len(v) for k, v in vars(config).items() if DEPTHS.fullmatch(k) and isinstance(v, (list, tuple))), 0)
    for count in set(layer_counts(config).values()) - {stages}:
        lists = [v for k, v in vars(config).items() if _per_layer(k, v) and len(v) == count > LAYERS]
        kinds: dict[Any, int] = {}
        for index in range(count):
            kinds.setdefault(tuple(str(values[index]) for values in lists if _is_kind(values)), index)
        least = max(LAYERS, 0 if stages else len(getattr(config, "_out_indices", None) or ()))
        chosen = sorted(kinds.values())[:MOST_LAYERS]
        chosen += [index for index in range(count) if index not in chosen][: max(0, least - len(chosen))]
        kept[count] = sorted(chosen)
    return kept


def _per_layer(name: str, values: Any) -> bool:
    return isinstance(values, (list, tuple)) or (isinstance(values, str) and "pattern" in name)


def _is_kind(values: Any) -> bool:
    return all(isinstance(value, (str, bool, list, tuple)) for value in values) or len(set(values)) <= 3


@dataclass(frozen=True)
class _Shrinking:
    """Of one configuration; ``tokens`` are common to all inside the same one."""

    config: PretrainedConfig
    tokens: dict[str, int]
    ratio: int

    def run(self) -> None:
        kept = kept_layers(self.config)
        before = dict(vars(self.config))
        for name, value in before.items():
            new = self.shrunk(name, value, kept)
            if new is not value:
                setattr(self.config, name, new)
        if isinstance(vars(self.config).get("stage_names"), list):
            _repair_stages(self.config)
        if sizes := vars(self.config).get("backbone_feature_sizes"):  # of an image of 1024 pixels
            pixels = MOST_PIXELS if self.ratio else IMAGE
            self.config.backbone_feature_sizes = [[pixels * side // 1024 for side in size] for size in sizes]
        if not self.ratio:
            _repair(self.config, before)

    def shrunk(self, name: str, value: Any, kept: dict[int, list[int]]) -> Any:
        if value is None:
            return None if self.ratio and name in FITTED_DEFAULTS else DEFAULTS.get(name)
        if name in OFF:
            return False
        if TOKEN.fullmatch(name):
            return _token(name, value, self.tokens)
        if isinstance(value, (bool, int, float)):
            return self.number(name, value, kept)
        if isinstance(value, (str, list, tuple)) and value:
            return self.sequence(name, value, kept)
        if isinstance(value, dict) and name in ("rope_parameters", "rope_scaling") and not self.ratio:
            return _rope(value)
        return value

    def number(self, name: str, value: bool | int | float, kept: dict[int, list[int]]) -> bool | int | float:
        if isinstance(value, bool):
            return value
        if STOPPED.fullmatch(name):
            return type(value)(0)
        if isinstance(value, float):
            return value
        if value in kept and LAYER_COUNTS.fullmatch(name):
            return min(value, len(kept[value]))
        return self.size(name, value)

    def size(self, name: str, value: int) -> int:
        size = rule(name)
        if self.ratio and isinstance(size, Unit):
            return min(value, MOST_PIXELS) if size is IMAGE else value
        if size is None:
            return value
        if name == "vocab_size":  # a smaller one would not have the tokens that batches are made of
            return VOCABULARY
        if self.ratio and isinstance(size, Width):
            return value if value % self.ratio else value // self.ratio
        return int(min(value, size))

    def sequence(self, name: str, values: Any, kept: dict[int, list[int]]) -> Any:
        if isinstance(values, str):
            if "pattern" not in name or len(values) not in kept or len(values) <= LAYERS:
                return values
            return "".join(values[i] for i in kept[len(values)])
        make = list if isinstance(values, list) else tuple
        if DEPTHS.fullmatch(name) and all(type(v) is int for v in values):
            return make(2 if i == 1 else 1 for i in range(len(values)))
        if len(values) in kept and len(values) > LAYERS:
            values = make(values[i] for i in kept[len(values)])
        elif LAYER_NUMBERS.fullmatch(name) and kept:
            return _indices(values, kept)
        if all(type(v) is int for v in values):
            return make(self.stages(name, values))
        return values

    def stages(self, name: str, values: Any) -> list[int]:
        """Sizes stage by stage, each as if it stood alone: channels of one list are the inputs of another."""
        if self.ratio:
            return [self.size(name.removesuffix("s") if rule(name) is None else name, v) for v in values]
        size = min(self.size(name.removesuffix("s"), max(values)), self.size(name, max(values)))
        if size == max(values):
            return list(values)
        return [min(v, 2 if size == HEADS else size) for v in values]  # 2 heads: what every stage is a multiple of


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    value = {key: _rope(item) if isinstance(item, dict) else item for key, item in value.items()}
    if "rope_theta" in value:
        half = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
        third = 3 * half // 8
        first, second = (value.get("mrope_section") or (0, 1))[:2]  # height and width are alike: which they are
        sections = [third, third, half - 2 * third]
        value["mrope_section"] = sections if first == second else sections[::-1]
    if "original_max_position_embeddings" in value:
        value["original_max_position_embeddings"] = 32
    for key in ("short_factor", "long_factor"):
        if key in value:
            value[key] = [1.0] * (HEAD_DIM // 2)
    return value


def _token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_token(f"{name}{i}", item, tokens) for i, item in enumerate(value))
    if not isinstance(value, int) or value < 0:
        return value
    if name in ORDINARY_TOKENS:
        return ORDINARY_TOKENS[name]
    return tokens.setdefault(name.removesuffix("_id").removesuffix("_index"), VOCABULARY - 1 - len(tokens))


def _indices(values: Any, kept: dict[int, list[int]]) -> Any:
    """Layer numbers, spread over the layers that are left."""
    make = list if isinstance(values, list) else tuple
    if not all(type(v) is int for v in values):
        return values
    count = max(kept)
    last = len(kept[count]) - 1
    return make(v if v < 0 else min(last, round(v * last / max(1, count - 1))) for v in values)


def _repair(config: PretrainedConfig, before: dict[str, Any]) -> None:
    """What has to fit together beyond each size by itself."""
    values = vars(config)
    for name in values:
        heads = name.replace("key_value", "attention")
        if heads != name and before.get(heads) == before[name]:
            setattr(config, name, values[heads])
    for inner, heads, head_dim in SSM:
        if {inner, heads, head_dim} <= values.keys() and "hidden_size" in values:
            setattr(config, head_dim, values[inner] * values["hidden_size"] // values[heads])
    if type(values.get("image_embedding_size")) is int and "patch_size" in values:
        config.image_embedding_size = values["image_size"] // values["patch_size"]
    if "embed_dim_per_stage" in values:
        config.hidden_size = values["embed_dim_per_stage"][0]
    if "qk_rope_head_dim" in values:
        _repair_latent_attention(config)


def _repair_latent_attention(config: PretrainedConfig) -> None:
    values = vars(config)
    if {"qk_nope_head_dim", "qk_head_dim"} <= values.keys():
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    rope = values.get("rope_parameters") or {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each kind of layer
        if isinstance(parameters, dict) and "partial_rotary_factor" in parameters:
            parameters["partial_rotary_factor"] = 1.0


def _repair_stages(config: PretrainedConfig) -> None:
    values = vars(config)
    names = values["stage_names"]
    counts = values.get("depths") or values.get("blocks_per_stage")
    stages = len(counts) if counts else getattr(config, "num_hidden_layers", len(names) - 1)
    if stages >= len(names) - 1:
        return
    config.stage_names = names[: stages + 1]
    wanted = len(values.get("_out_indices") or (0,))
    config._out_indices = list(range(stages + 1 - wanted, stages + 1))
    config._out_features = [config.stage_names[i] for i in config._out_indices]
