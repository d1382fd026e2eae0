"""The arguments of ``losia-fx finetune``: its own, those of LosiaConfig, and every one of trl.SFTConfig.

SFTConfig's are read from its source, and so are what each means: importing it takes ten seconds, which --help and a
misspelt option should not.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from losia_fx.config import CHOICES, LosiaConfig, described
from losia_fx.errors import LosiaError

from .settings import DTYPES, HELD_OUT_SHARE, LOSIA_OPTIONS, RULES, SHORT

SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
"""The classes that SFTConfig is made of, base first: package, file in it, name."""

COMMON = {
    "max_steps": "optimizer steps (default: 400 without --model and --data, else --epochs counts)",
    "num_train_epochs": "passes over the data (default: 3)",
    "per_device_train_batch_size": "examples, or blocks of packed text (default: 8)",
    "max_length": "tokens of an example or block (default: 128 for the embedded model, else 1024 or the model's most)",
    "gradient_accumulation_steps": "batches a step (default: 1)",
    "learning_rate": "its peak (default: by the size of the model)",
    "lr_scheduler_type": "linear, cosine, constant, ... (default: cosine)",
    "warmup_steps": "steps, or below 1 a share of them (default: 0.1)",
    "weight_decay": "default: 0.01, and 0 with --rule roaming",
    "optim": "adamw_torch, sgd, ... (default: SubnetRMS with --rule roaming, else that of transformers)",
    "packing": "fill blocks with several examples (default: for plain text)",
    "eval_strategy": "no, steps or epoch (default: steps, four times a run)",
    "report_to": "tensorboard, wandb, ... (default: none)",
    "logging_steps": "steps between two reports (default: 10)",
    "save_steps": "keep the last two checkpoints (default: none; with --resume, ten over the run)",
    "bf16": "mixed precision (default: where the device has it)",
    "fp16": "mixed precision with a scaler",
    "gradient_checkpointing": "less memory for more time",
}
"""Options of SFTConfig that --help shows; the others are shown by --help-all."""

NAMES: dict[str, dict[str, Any]] = {
    "dataset_text_field": {"metavar": "COLUMN"},
    "chat_template_path": {"metavar": "FILE"},
}


@dataclass(frozen=True)
class TrainingOption:
    """A field of SFTConfig: its name, the names of its types, and the first sentence of what it is for."""

    name: str
    types: frozenset[str]
    summary: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option is left out of the namespace unless it is given, so that what was asked for can be told."""
    parser.argument_default = argparse.SUPPRESS
    chat = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    _add_data(parser.add_argument_group("what to train on what", f"a line of a .jsonl of chats: {chat}"))
    run = parser.add_argument_group(
        "the run",
        "these and all options of trl.SFTConfig (--help-all), - or _ in names; BOOL: true (or nothing), false",
    )
    options = list(training_options())
    for option in sorted(options, key=lambda o: list(COMMON).index(o.name) if o.name in COMMON else len(COMMON)):
        if option.name in COMMON:
            _add_training(run, option, COMMON[option.name])
    run.add_argument("--seed", type=int, help="of the data's order, dropout and the first subnets (default: 0)")
    _add_losia(parser.add_argument_group("LoSiA", "the options of losia_fx.LosiaConfig; a PATTERN is a name or a glob"))
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 where the device has it)")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    others = parser.add_argument_group("other options of trl.SFTConfig")
    for option in options:
        if option.name not in COMMON and option.name not in ("output_dir", "seed", *NAMES):
            _add_training(others, option, argparse.SUPPRESS)
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, summaries={o.name: o.summary for o in options})


def _add_data(data: argparse._ArgumentGroup) -> None:
    data.add_argument("--model", type=Path, help="folder of a transformers checkpoint (default: the embedded Llama)")
    data.add_argument(
        "--data", nargs="+", metavar="DATA",
        help="files, folders, globs, names of datasets in the local cache: text, jsonl, json, csv, parquet, also .gz, "
        ".bz2, .xz, .zst; columns text, prompt and completion, or messages (default: the Python standard library)",
    )  # fmt: skip
    _add(data, "eval_data", "what to judge by (default: a share held out)", nargs="+", metavar="DATA")
    _add(data, "held_out", f"of --data (default: {HELD_OUT_SHARE}; 0: none)", type=float, metavar="SHARE")
    _add(
        data, "old_data", "text to judge by what is forgotten (default: of the embedded model the Perl manual)",
        nargs="+", metavar="DATA",
    )  # fmt: skip
    for name, help_text in (
        ("dataset_text_field", "column that holds the text (default: text)"),
        ("chat_template_path", "Jinja template that makes text of messages, where the tokenizer has none"),
    ):
        _add(data, name, help_text, **NAMES[name])
    _add(data, "show_example", "show an example as the model sees it", **_switch())
    _add(data, "output_dir", "folder to write (default: losia-out)", type=Path, metavar="FOLDER")
    data.add_argument("--overwrite", **_switch(), help="write into --out though it is not empty")
    data.add_argument("--resume", **_switch(), help="go on from the last checkpoint in --out (none yet: begin)")
    data.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with any of these options; those given here go before"
    )


CHOSEN = {
    "compiler": "inductor where it can run, else aot_eager",
    "track_delta": "as keep_dense; false writes no delta",
}
"""Options of LosiaConfig whose default here is chosen for the run."""
OF_PAPER = {
    "period": "four rounds over all groups, 50 at most",
    "profile_steps": "the whole slot",
    "head_period": "none",
}
OF_ROAMING = {"head_period": "50, or a quarter of the steps", "profile_steps": "10, or the whole slot"}
"""Those chosen for the run with one rule."""


def _add_losia(group: argparse._ArgumentGroup) -> None:
    types, said = get_type_hints(LosiaConfig), described()
    _add(
        group, "rule", "where subnets go: roaming, drawn anew after every step, or paper, by importance, a group at a "
        "time (default: roaming; paper where an option of it, or --optim, is given)", choices=RULES,
    )  # fmt: skip
    for option in fields(LosiaConfig):
        if option.name in LOSIA_OPTIONS:
            default = CHOSEN.get(option.name, option.default)
            roaming, paper = (getattr(rule, option.name) for rule in (LosiaConfig.roaming(), LosiaConfig()))
            if roaming != paper:
                default = f"{OF_ROAMING.get(option.name, roaming)}; of paper: {OF_PAPER.get(option.name, paper)}"
            shown = f" (default: {default})" if isinstance(default, (str, int, float)) else ""
            _add(
                group, option.name, said[option.name] + shown, **_kind_of(types[option.name], CHOICES.get(option.name))
            )


def _kind_of(annotated: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """add_argument's keywords for a field: bool, int, float or str, or one of them or None, or several str."""
    kinds = (annotated, *get_args(annotated))
    if annotated is bool:
        return _switch()
    if tuple[str, ...] in kinds:
        return {"nargs": "+", "metavar": "PATTERN"}
    if choices is not None:
        return {"choices": choices}
    return {"type": next(each for each in kinds if each in (int, float, str)), "metavar": "VALUE"}


def _add_training(group: argparse._ArgumentGroup, option: TrainingOption, help_text: str) -> None:
    kind: dict[str, Any]
    if "bool" in option.types and "str" not in option.types:
        kind = _switch()
        no = (f"--no-{option.name.replace('_', '-')}", f"--no_{option.name}")
        group.add_argument(*dict.fromkeys(no), dest=option.name, action="store_false", help=argparse.SUPPRESS)
    elif any(name.startswith("list[") for name in option.types):
        kind = {"nargs": "+", "metavar": "VALUE"}
    else:
        kind = {"type": _number(option), "metavar": "VALUE"}
    _add(group, option.name, help_text, **kind)


def _add(group: argparse._ArgumentGroup, name: str, help_text: str, **kind: Any) -> None:
    """An option by its short name; its long name and those with underscores are taken too, and not shown."""
    first, *others = flags(name)
    long = f" (also --{name.replace('_', '-')})" if name in SHORT and help_text is not argparse.SUPPRESS else ""
    group.add_argument(first, dest=name, help=help_text + long, **kind)
    if others:
        group.add_argument(*others, dest=name, help=argparse.SUPPRESS, **kind)


def flags(name: str) -> list[str]:
    """All ways to write an option: short, with dashes, with underscores."""
    names = (SHORT.get(name, name), name)
    return list(dict.fromkeys("--" + form for n in names for form in (n.replace("_", "-"), n)))


def _switch() -> dict[str, Any]:
    return {"nargs": "?", "const": True, "type": truth, "metavar": "BOOL"}


def truth(text: str) -> bool:
    """Raises ArgumentTypeError unless the text says yes or no."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: give true or false")


OF_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Options that are an object or the name of a file that holds one."""


def _object(text: str) -> dict[str, Any] | None:
    """Raises ArgumentTypeError unless the text is a JSON object, or says none."""
    try:
        found = None if text.lower() in ("none", "null") else json.loads(text)
    except ValueError:
        found = text
    if found is None or isinstance(found, dict):
        return found
    raise argparse.ArgumentTypeError(f"""{text!r}: give a JSON object, such as '{{"name": 1}}'""")


def _number(option: TrainingOption) -> Callable[[str], Any]:
    """What makes a value of an argument; its name is what argparse calls it in an error."""
    if any(name.startswith("dict") for name in option.types) and option.name not in OF_FILES:
        return _object
    if "str" in option.types:
        return str
    kind: type = float if "float" in option.types else int if "int" in option.types else str

    def convert(text: str) -> Any:
        return None if "None" in option.types and text.lower() in ("none", "null") else kind(text)

    convert.__name__ = kind.__name__
    return convert


def training_options() -> Iterator[TrainingOption]:
    """The fields of SFTConfig. Raises LosiaError where trl or transformers are not installed."""
    found: dict[str, TrainingOption] = {}
    for package, file, name in SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise LosiaError(f"finetune needs {package}: install losia-fx[cli]")
        source = Path(spec.origin).with_name(file) if "/" not in file else Path(spec.origin).parent / file
        tree = ast.parse(source.read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for field in body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                types = frozenset(part.strip() for part in ast.unparse(field.annotation).split("|"))
                found[field.target.id] = TrainingOption(field.target.id, types, _summary(field.value))
    yield from found.values()


def _summary(value: ast.expr | None) -> str:
    """The first sentence of a field's help."""
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Dict):
            for key, entry in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(entry, ast.Constant):
                    return " ".join(str(entry.value).replace("%%", "%").split()).split(". ")[0].rstrip(".")
    return ""


class _HelpAll(argparse.Action):
    """--help with every option of SFTConfig, and what TRL and transformers say of it."""

    def __init__(self, option_strings: list[str], dest: str, summaries: dict[str, str], **kwargs: Any) -> None:
        super().__init__(option_strings, dest, help="show all options of trl.SFTConfig too, and end", **kwargs)
        self.summaries = summaries

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        shown = {action.dest for action in parser._actions if action.help is not argparse.SUPPRESS}
        for action in parser._actions:
            if action.dest not in shown and action.nargs != 0:
                shown.add(action.dest)
                action.help = self.summaries.get(action.dest, "").replace("%", "%%") or None
        parser.print_help()
        parser.exit()
