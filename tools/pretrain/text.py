"""What pretraining makes of text: documents, a held-out part by their names, blocks of tokens, batches of blocks."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from losia_fx.errors import LosiaError
from losia_fx.finetune.settings import LEFT_OUT_OF_STDLIB

HELD_OUT_SHARE = 0.08


@dataclass(frozen=True)
class Document:
    """One text and the name that decides on which side of the split it falls."""

    name: str
    text: str


def read_documents(folder: Path, pattern: str) -> list[Document]:
    """Files of the folder, by their names in it; what is no UTF-8 (old encodings kept on purpose) is replaced."""
    names = sorted(path.relative_to(folder) for path in folder.rglob(pattern))
    return [Document(name.as_posix(), (folder / name).read_text("utf-8", errors="replace")) for name in names]


def standard_library() -> list[Document]:
    """The sources of the interpreter's standard library that losia-fx finetune learns from."""
    found = read_documents(Path(sysconfig.get_path("stdlib")), "*.py")
    return [document for document in found if LEFT_OUT_OF_STDLIB.isdisjoint(document.name.split("/"))]


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out) by the hash of each name, the same on every machine (hash() of a string is not)."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64
        sides[place < HELD_OUT_SHARE].append(document)
    return sides


def token_blocks(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Tensor:
    """(n, length) int64 token ids of all texts in seeded order, an end token after each.

    Raises LosiaError where the text is shorter than one block.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    texts = [documents[index].text for index in order]
    # verbose=False: the warning about texts longer than the model's context means nothing, they are cut below
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    tokens = [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]
    count = len(tokens) // length
    if count == 0:
        raise LosiaError(f"{len(tokens)} tokens of text are less than one block of {length}")
    return torch.tensor(tokens[: count * length], device="cpu").view(count, length)


def held_out_blocks(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, limit: int
) -> Tensor:
    """At most ``limit`` blocks, spread evenly over the text."""
    blocks = token_blocks(documents, tokenizer, length, seed=0)
    return blocks[torch.linspace(0, len(blocks) - 1, min(limit, len(blocks)), device=blocks.device).long()]


def batches(blocks: Tensor, size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, length) of the blocks, in a new seeded order on each pass over them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        while len(order) < size:
            order = torch.cat((order, torch.randperm(len(blocks), generator=generator, device="cpu")))
        yield blocks[order[:size]]
        order = order[size:]


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean loss in nats a token over all blocks (n, length), in eval mode; the mode it found is put back."""
    training = model.training
    model.eval()
    losses = [
        float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in blocks.split(batch_size)
    ]
    model.train(training)
    return sum(losses) / len(blocks)
