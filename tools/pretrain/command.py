"""Makes the small Llama that losia_fx ships: pretrained from nothing on the Perl manual.

    apt-get download perl-doc
    python -m losia_fx.tools.pretrain perl-doc_*.deb --out default_model --heldout-text old_domain_heldout.txt.gz

It is small (1.3M parameters, 5.2 MB in float32) so that it can travel inside the package, and it knows one domain, so
that fine-tuning it on another shows both what is learnt and what is forgotten. The head is not tied to the embedding:
a tied head could not learn by rows. Same text, seed, threads and versions give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar

from losia_fx.console import progress
from losia_fx.errors import LosiaError

from .text import (
    Document,
    batches,
    held_out_blocks,
    held_out_loss,
    read_documents,
    split,
    standard_library,
    token_blocks,
)

END_OF_TEXT = "<|endoftext|>"
LEFT_OUT = ("perltoc.pod", "perluniprops.pod")  # a table of contents and a table of characters: lists, not language
LENGTH = 128
BATCH = 16
PEAK_LR = 3e-3
HELD_OUT_BLOCKS = 512
HELD_OUT_TEXT_BYTES = 200_000


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks (n, LENGTH): what is learnt, what the old domain is judged by, and the domain to come."""

    train: Tensor
    old_held_out: Tensor
    new_held_out: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    disable_progress_bar()
    try:
        with _pod_folder(args.source) as folder:
            train, held_out = split(_manual(folder))
    except LosiaError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    tokenizer = train_tokenizer([document.text for document in train])
    sample = _sample(held_out, HELD_OUT_TEXT_BYTES)
    blocks = TokenBlocks(
        token_blocks(train, tokenizer, LENGTH, seed=args.seed),
        held_out_blocks([sample], tokenizer, LENGTH, limit=HELD_OUT_BLOCKS),
        held_out_blocks(split(standard_library())[1], tokenizer, LENGTH, limit=HELD_OUT_BLOCKS),
    )
    model = new_model(tokenizer, seed=args.seed)
    pretrain(model, blocks.train, steps=args.steps, seed=args.seed, console=console)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if args.heldout_text is not None:
        args.heldout_text.parent.mkdir(parents=True, exist_ok=True)
        args.heldout_text.write_bytes(_compressed(sample.text))
    _print_figures(console, model, blocks)
    return 0


def train_tokenizer(texts: Sequence[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the texts: any text can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, blocks: Tensor, *, steps: int, seed: int, console: Console) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=max(1, steps // 20), num_training_steps=steps, min_lr_rate=0.05
    )
    model.train()
    with progress(console, steps, every=100) as tell:
        for batch in itertools.islice(batches(blocks, BATCH, seed=seed), steps):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            tell(f"loss {loss.item():.3f}")


def _print_figures(console: Console, model: LlamaForCausalLM, blocks: TokenBlocks) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    old = held_out_loss(model, blocks.old_held_out, BATCH)
    new = held_out_loss(model, blocks.new_held_out, BATCH)
    console.print(f"parameters                 {parameters:,}")
    console.print(f"tokens to learn from       {blocks.train.numel():,}")
    console.print(f"held-out, Perl manual      {old:.4f} nats a token over {blocks.old_held_out.numel():,}")
    console.print(f"held-out, Python library   {new:.4f} nats a token over {blocks.new_held_out.numel():,}")


@contextmanager
def _pod_folder(source: Path) -> Iterator[Path]:
    """The folder of POD files: the one given, or that of the unpacked Debian package."""
    if source.suffix != ".deb":
        yield source
        return
    if shutil.which("dpkg") is None:
        raise LosiaError(f"{source}: dpkg is needed to unpack it; unpack it elsewhere and name the folder of POD files")
    with tempfile.TemporaryDirectory() as folder:
        unpacked = subprocess.run(["dpkg", "-x", str(source), folder], capture_output=True, text=True, check=False)
        if unpacked.returncode != 0:
            raise LosiaError(f"{source}: {unpacked.stderr.strip()}")
        pods = sorted(path.parent for path in Path(folder).rglob("perlfunc.pod"))
        if not pods:
            raise LosiaError(f"{source}: holds no perlfunc.pod: is it perl-doc?")
        yield pods[0]


def _manual(folder: Path) -> list[Document]:
    documents = [document for document in read_documents(folder, "*.pod") if document.name not in LEFT_OUT]
    if not documents:
        raise LosiaError(f"{folder}: holds no POD files")
    return documents


def _sample(documents: Sequence[Document], size: int) -> Document:
    """The texts, shortest first, that fit in ``size`` bytes compressed: many small texts tell more than a big one."""
    text = ""
    for document in sorted(documents, key=lambda d: (len(d.text), d.name)):
        if len(_compressed(text + document.text)) > size:
            break
        text += document.text
    return Document("held-out", text)


def _compressed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)  # mtime=0: the same text gives the same bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m losia_fx.tools.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="Debian's perl-doc package (.deb), or a folder of POD files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--heldout-text", type=Path, help="also write the held-out sample of the text here (.txt.gz)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the weights depend on it in the last bits")
    return parser
