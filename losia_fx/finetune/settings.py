"""What a fine-tuning run is asked to do, and the YAML that says it again. A leaf: it imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from losia_fx.config import LosiaConfig
from losia_fx.errors import ConfigError
from losia_fx.storage.atomic import write_file

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED_MODEL = ASSETS / "default_model"
EMBEDDED_OLD_TEXT = ASSETS / "old_domain_heldout.txt.gz"
RUN_FILE, CONFIG_FILE = "run.json", "finetune.yaml"
"""In the folder of a run: its record, and the options that repeat it."""
HELD_OUT_SHARE = 0.08
# Tests are no prose of the library, and the others are mostly tables: they would be the easiest part to predict.
LEFT_OUT_OF_STDLIB = frozenset(
    {"test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
DTYPES = ("float32", "bfloat16", "float16")

ALIASES = {
    "out": "output_dir",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "seq_length": "max_length",
    "accumulate": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "checkpoint_every": "save_steps",
    "text_column": "dataset_text_field",
    "chat_template": "chat_template_path",
}
"""Short names -> those of transformers and TRL."""
SHORT = {long: short for short, long in ALIASES.items()}
PATHS = {"model", "data", "eval_data", "old_data", "chat_template_path"}
LOSIA_OPTIONS = tuple(option.name for option in fields(LosiaConfig) if option.name != "seed")
RULES = ("roaming", "paper")
FORMER = {"rule": "paper"}
"""Of what was written before there were rules."""
OF_A_RULE = (
    "schedule", "importance", "period", "profile_steps", "beta1", "beta2", "rewarm", "rewarm_steps", "head_rows",
    "count_steps", "carry_moments",
)  # fmt: skip
"""Options of LosiaConfig that say where subnets go and when; of the paper's rule, unless --rule says otherwise. (It
has no head_period.)"""
OF_AN_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Options of SFTConfig that one of transformers' optimizers is asked for by; roaming brings its own."""


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run is asked to do. None, or a name that is not there: chosen for the model, the data and the machine.

    data, eval_data, old_data: files, folders, globs and names of cached datasets. old_data is text that the model must
    not forget. rule: of RULES. losia: fields of LosiaConfig, training: fields of trl.SFTConfig, both without ``seed``.
    Raises ConfigError naming the option, its value and what is allowed.
    """

    model: Path | None = None
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    old_data: tuple[str, ...] = ()
    held_out: float = HELD_OUT_SHARE
    show_example: bool = False
    output_dir: Path = Path("losia-out")
    overwrite: bool = False
    resume: bool = False
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    rule: str | None = None
    losia: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out {self.held_out}: give a share of the examples, in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: give a whole number of at least 0, below 2**32")
        _check_numbers(self.training)
        self._check_judging()
        if self.training.get("resume_from_checkpoint") is not None:
            raise ConfigError("--resume-from-checkpoint: --resume goes on from the newest whole checkpoint in --out")
        if self.training.get("dataset_kwargs"):
            raise ConfigError("--dataset-kwargs: its one key, skip_prepare_dataset, is for data that is tokens already")
        if self.training.get("trust_remote_code"):
            raise ConfigError("--trust-remote-code: a checkpoint's own code is never run: give one transformers knows")
        if self.resume and self.training.get("save_total_limit") == 1:
            raise ConfigError("--save-total-limit 1: a run killed while it saves needs another one: give at least 2")
        if self.rule not in (None, *RULES):
            raise ConfigError(f"--rule {self.rule}: give one of {', '.join(RULES)}")
        try:
            self.config()
        except ConfigError as error:
            name, _, why = str(error).partition("=")
            raise ConfigError(f"{flag(name)} {why}") from None

    def _check_judging(self) -> None:
        """What says how to judge must not be given where nothing is judged: it would be left aside unsaid."""
        if self.eval_data and self.held_out not in (0, HELD_OUT_SHARE):
            raise ConfigError(f"--held-out {self.held_out}: --eval-data says what to judge by: drop one of them")
        if self.judges and (self.eval_data or self.held_out):
            return
        why = "--held-out 0" if self.judges else "--eval-strategy no"
        for name, given in (
            ("eval_data", self.eval_data),
            ("old_data", self.old_data),
            ("load_best_model_at_end", self.training.get("load_best_model_at_end")),
        ):
            if given:
                raise ConfigError(f"{flag(name)}: with {why} there is nothing to judge by: drop one of them")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> FinetuneSettings:
        """From one flat mapping of options by their long names."""
        own = {option.name for option in fields(cls)} - {"losia", "training"}
        mine = {name: value for name, value in given.items() if name in own}
        for name in ("model", "output_dir"):
            if mine.get(name) is not None:
                mine[name] = Path(mine[name])
        for name in ("data", "eval_data", "old_data"):
            mine[name] = tuple(mine.get(name, ()))
        losia = {name: value for name, value in given.items() if name in LOSIA_OPTIONS}
        training = {name: value for name, value in given.items() if name not in own and name not in LOSIA_OPTIONS}
        return cls(**mine, losia=losia, training=training)

    @property
    def roams(self) -> bool:
        """Whether subnets go by LosiaConfig.roaming(). Where no rule is named, options that say where subnets go, and
        those of an optimizer, ask for the paper's."""
        if self.rule is not None:
            return self.rule == "roaming"
        return self.losia.keys().isdisjoint(OF_A_RULE) and not self.names_optimizer

    @property
    def names_optimizer(self) -> bool:
        return not self.training.keys().isdisjoint(OF_AN_OPTIMIZER)

    def config(self) -> LosiaConfig:
        """Raises ConfigError."""
        rule = LosiaConfig.roaming if self.roams else LosiaConfig
        tracks = self.losia.get("keep_dense", True)  # of a W that is rounded there is no base to tell a change from
        return rule(**{"track_delta": tracks, **self.losia, "seed": self.seed})

    @property
    def model_folder(self) -> Path:
        return EMBEDDED_MODEL if self.model is None else self.model

    @property
    def old_texts(self) -> tuple[str, ...]:
        """Held-out text of what the model knew before; of a model that is not ours only its owner can name it."""
        return (str(EMBEDDED_OLD_TEXT),) if self.model is None and not self.old_data else self.old_data

    @property
    def judges(self) -> bool:
        """Whether losses on held-out text are asked for."""
        return bool(self.training.get("eval_strategy", "steps") != "no")

    @property
    def keeps_checkpoints(self) -> bool:
        asked = self.training.get("save_strategy", "no") != "no" or self.training.get("load_best_model_at_end")
        return self.resume or "save_steps" in self.training or bool(asked)

    def flat(self) -> dict[str, Any]:
        """All that is set, by long names, as plain values: what ``of`` takes and the YAML holds.

        Paths are whole ones, so that it says the same from anywhere.
        """
        own = {name: getattr(self, name) for name in ("model", "data", "eval_data", "old_data", "dtype", "device")}
        own = {name: value for name, value in own.items() if value not in (None, ())}
        own |= {"held_out": self.held_out, "seed": self.seed, "rule": RULES[not self.roams]}
        found = {name: _plain(value) for name, value in {**own, **self.losia, **self.training}.items()}
        steps = {
            n: int(v) for n, v in found.items() if n.endswith("_steps") and isinstance(v, float) and v.is_integer()
        }
        found |= steps  # SFTConfig has floats there, for those that are shares of the run
        for name in PATHS & found.keys():
            value = found[name]
            found[name] = [_whole_path(p) for p in value] if isinstance(value, list) else _whole_path(value)
        return found


def _check_numbers(training: Mapping[str, Any]) -> None:
    for name, value in training.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag(name)} {value}: give a finite number")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise ConfigError(f"{flag(name)} {value}: give a whole number below 2**31")
    if (decay := training.get("weight_decay", 0)) < 0:
        raise ConfigError(f"--weight-decay {decay}: give a number of at least 0")
    for name, least in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("max_length", 2),
        ("gradient_accumulation_steps", 1),
        ("eval_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
    ):
        value = training.get(name)
        if value is not None and value < least:
            raise ConfigError(f"{flag(name)} {value}: give a whole number of at least {least}")
    for name in ("max_steps", "num_train_epochs", "learning_rate", "save_steps", "eval_steps"):
        value = training.get(name)
        if value is not None and value <= 0:
            what = "whole number of at least 1" if name.endswith("_steps") else "number above 0"
            raise ConfigError(f"{flag(name)} {value}: give a {what}")


def write_config(path: Path, options: Mapping[str, Any]) -> None:
    """Writes what repeats a run, atomically."""
    import yaml

    head = f"# losia-fx finetune --config {path.name} --out FOLDER repeats this run\n"
    text = head + yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)

    def write(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8")

    write_file(path, write)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by long names. Raises ConfigError naming the file."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError(f"--config {path}: needs yaml: install losia-fx[cli]") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"--config {path}: give names of options and their values, a line each: learning_rate: 1e-4")
    options: dict[str, Any] = {}
    for name, value in found.items():
        long = name.replace("-", "_")
        long = ALIASES.get(long, long)
        if long in options:
            raise ConfigError(
                f"--config {path}: {name}: {flag(long)} is there twice, under two names: drop one of them"
            )
        options[long] = value
    return options


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end here: its record says so. A run that begins removes the record of another."""
    path = out / RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["interrupted"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


def flag(name: str) -> str:
    """How an option is written on the command line, by its short name where it has one."""
    return "--" + SHORT.get(name, name).replace("_", "-")


def _whole_path(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _plain(value: Any) -> Any:
    """``value`` as YAML has it: enumerations by their values, paths as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(getattr(value, "value", value))
