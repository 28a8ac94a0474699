"""Fine-tuning on instruction pairs: what the adapters of QLoRA, L4Q and their baselines learn from."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from studylib.config import UNREPORTED, Instructions, Log, Report, Tuning
from studylib.data import Pair, context_length, conversation, device, instruction_pairs
from studylib.train.distillation import MEASURED, last_hidden
from studylib.train.losses import label_loss, label_losses, soft_logit_loss

IGNORED = -100  # the label of a position whose next token is not learned
PADDED_TO = 8  # rows are padded to a multiple of it,
PADDED_TO_COMPILED = 64  # and to one of this where layers are compiled, which are compiled anew for each shape
BATCH_TOKENS = 100  # of padding that cost as much as one batch more, for which low-bit weights are decoded again
DRAWN = 8  # batches whose rows are drawn together and sorted by their length
OPTIMIZER = "adamw_torch_fused"
PAGED_ADAMW = "paged_adamw_32bit"  # transformers' name for bitsandbytes' AdamW whose states are paged to the CPU
PAGED_FROM = 100_000  # numbers of a tensor that it pages (findings/paged-optimizer-pages-no-small-adapter)
COMPILED_STEPS = 500  # compiling layers for rows of several widths takes as long as some 20 steps, and saves 5% of each


def encode(tokenizer, pairs: Sequence[Pair], length: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of each pair: labels[t] is the token after t where the response has it, else IGNORED.

    Pairs whose response starts after `length` tokens teach nothing and are left out; ValueError where all are.
    What was encoded last is remembered, for all arms that learn from it: do not write to it.
    """
    return _encode(tokenizer, tokenizer.chat_template, tuple(pairs), length)


@functools.lru_cache(maxsize=8)
def _encode(tokenizer, template: str | None, pairs: tuple[Pair, ...], length: int) -> list[dict[str, list[int]]]:
    rows = []
    for tokens, start in (conversation(tokenizer, pair) for pair in pairs):
        tokens = tokens[:length]
        if start < len(tokens):
            labels = [IGNORED] * (start - 1) + tokens[start:] + [IGNORED]
            rows.append({"tokens": tokens, "labels": labels})
    if not rows:
        raise ValueError(f"length: {length} tokens hold nothing of any response; use more")
    return rows


def random_order(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """A random order in which the rows of a batch are about equally long, as QLoRA's own code trains: less padding.

    Rows are drawn for DRAWN batches at a time and sorted by length; these batches come in random order.
    """
    generator, order = torch.Generator().manual_seed(seed), []
    for drawn in torch.randperm(len(lengths), generator=generator).split(DRAWN * batch):
        rows = sorted(drawn.tolist(), key=lengths.__getitem__)
        batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
        for at in torch.randperm(len(batches), generator=generator):
            order += batches[at]
    return order


def collate(rows: Sequence[dict[str, list[int]]], multiple: int = PADDED_TO) -> dict[str, Tensor]:
    """Rows padded at their end, to a multiple of `multiple`: tokens and labels [B, T].

    Attention is causal, so that no token sees the padding.
    """
    longest = max(len(row["tokens"]) for row in rows)
    width = -(-longest // multiple) * multiple
    padding = {"tokens": 0, "labels": IGNORED}
    return {
        name: torch.stack([F.pad(torch.tensor(row[name]), (0, width - len(row[name])), value=fill) for row in rows])
        for name, fill in padding.items()
    }


def little_padded(lengths: Sequence[int], most: int) -> list[slice]:
    """Batches of at most `most` rows, whose lengths rise, in which padding and the batches' own cost are least.

    Worked: rows of 60, 64, 250 and 256 tokens are two batches, which saves some 380 tokens of padding.
    """
    best: list[tuple[int, list[slice]]] = [(0, [])]
    for end in range(1, len(lengths) + 1):
        ways = [
            (best[at][0] + BATCH_TOKENS + (end - at) * lengths[end - 1], [*best[at][1], slice(at, end)])
            for at in range(max(0, end - most), end)
        ]
        best.append(min(ways, key=lambda way: way[0]))
    return best[-1][1]


def response_loss(model: PreTrainedModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the labelled tokens [B, T]; logits are held for a few of them at a time."""
    learned = labels != IGNORED
    hidden = last_hidden(model, tokens)[learned]
    return label_loss(hidden, model.get_output_embeddings().weight, labels[learned])


def towards_teacher(model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean KL(teacher || model) in nats of the predictions of the labelled tokens [B, T] (see soft_logit_loss)."""
    learned = labels != IGNORED
    with torch.no_grad():
        given = last_hidden(teacher, tokens)[learned]
    heads = model.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    return soft_logit_loss(last_hidden(model, tokens)[learned], heads[0], given, heads[1])


@torch.no_grad()
def pair_losses(model: PreTrainedModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy in nats of the labelled tokens of each row [B, T], as in response_loss: [B]."""
    learned = labels != IGNORED
    each = label_losses(last_hidden(model, tokens)[learned], model.get_output_embeddings().weight, labels[learned])
    rows = learned.nonzero()[:, 0]
    return each.new_zeros(len(tokens)).index_add(0, rows, each)


def usable_length(model: PreTrainedModel, instructions: Instructions) -> int:
    """Where rows are cut: at instructions.length, and at what the model's context holds with the padding."""
    context = context_length(model)
    whole = instructions.length if context is None else context // PADDED_TO_COMPILED * PADDED_TO_COMPILED
    return min(instructions.length, whole)


def fine_tune(
    model: PreTrainedModel,
    tokenizer,
    pairs: Sequence[Pair],
    instructions: Instructions,
    settings: Tuning,
    folder: str | Path,
    *,
    teacher: PreTrainedModel | None = None,
    held_out: Sequence[Pair] = (),
    rows: int | None = None,
    keep: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
    report: Report = UNREPORTED,
) -> Log:
    """Train the parameters of `model` that require gradients (see methods.attach) on `pairs`, in place.

    Examples come in one random order (see random_order), drawn by instructions.seed, again and again. teacher: a model
    of the same vocabulary whose predictions are learned (see towards_teacher), in the place of the responses. held_out:
    pairs whose response loss is measured as training goes on, each by itself, the shortest first. rows: of a batch,
    computed at a time; the loss is the batch's mean over tokens all the same. folder, keep, report, and what happens
    to a killed training: as loop.fit.
    Raises ValueError for a model without trainable parameters, paging without CUDA or of nothing, or pairs that hold no
    response.
    """
    from studylib.train.loop import fit

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameters that require gradients; attach an adapter first")
    if settings.paged:
        check_paging()
        check_paged(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    length = usable_length(model, instructions)
    encoded = encode(tokenizer, pairs, length)
    lengths = [len(row["tokens"]) for row in encoded]
    examples = [encoded[i] for i in random_order(lengths, settings.batch, instructions.seed)]
    measured = encode(tokenizer, held_out, length) if held_out else []
    measured = sorted(measured, key=lambda row: len(row["tokens"]))
    batches = little_padded([len(row["tokens"]) for row in measured], max(settings.batch, MEASURED))
    compiled = settings.steps >= COMPILED_STEPS and not settings.checkpointing
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    loss = functools.partial(towards_teacher, model, teacher) if teacher else functools.partial(response_loss, model)

    def held_out_loss() -> dict[str, Any]:
        losses, counts = [], []
        for some in batches:
            part = {name: x.to(model.device) for name, x in collate(measured[some]).items()}
            counts.append((part["labels"] != IGNORED).sum(1))
            losses.append(pair_losses(model, **part))
        nats, tokens = torch.cat(losses).double(), torch.cat(counts)
        each = {"loss": (nats / tokens).tolist(), "tokens": tokens.double().tolist()}
        return {"loss": (nats.sum() / tokens.sum()).item(), "pairs": each}

    try:
        return fit(
            model,
            lambda tokens, labels: {"loss": loss(tokens, labels)},
            examples,
            settings,
            folder,
            tokens_per_step=settings.batch * sum(lengths) // len(encoded),
            held_out_loss=held_out_loss if held_out else None,
            held_out_text=repr(measured).encode() if held_out else b"",
            collate=functools.partial(collate, multiple=PADDED_TO_COMPILED) if compiled else collate,
            compiled=compiled,
            optimizer=PAGED_ADAMW if settings.paged else OPTIMIZER,
            rows=rows,
            weight=lambda part: (part["labels"] != IGNORED).sum().item(),
            seed=instructions.seed,
            keep=keep,
            progress=progress,
            report=report,
        )
    finally:
        if settings.checkpointing:
            model.gradient_checkpointing_disable()


VALIDATION_PAIRS = 8  # the last of the training split: for learning curves and learning rates, never trained on


def training_pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """The pairs that are trained on, and those kept apart for validation. ValueError where none would be left."""
    pairs = instruction_pairs("training", source)
    if len(pairs) <= VALIDATION_PAIRS:
        raise ValueError(
            f"instructions {source!r}: {len(pairs)} pairs for training are too few; {VALIDATION_PAIRS} are kept "
            "apart for validation"
        )
    return pairs[:-VALIDATION_PAIRS], pairs[-VALIDATION_PAIRS:]


def check_paging() -> None:
    """Raise ValueError where there is no CUDA, which pages PAGED_ADAMW's states between GPU and CPU memory."""
    if device().type != "cuda":
        raise ValueError("optimizer: paging needs CUDA, and there is none here; use AdamW without paging")


def check_paged(sizes: Iterable[int]) -> None:
    """Raise ValueError where PAGED_ADAMW would page nothing. sizes: the numbers of each tensor that is trained."""
    largest = max(sizes)
    if largest < PAGED_FROM:
        raise ValueError(
            f"paged: bitsandbytes pages the states of tensors of {PAGED_FROM:,} numbers or more, and the largest that "
            f"is trained has {largest:,}; use a higher rank, or no paging"
        )
