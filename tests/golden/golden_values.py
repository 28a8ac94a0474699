"""Golden values: for each component of config.numerics a few statistics that move when its numbers do.

They are computed in fp32 on one thread of the CPU, on tiny models and on fixed tensors, and are sums over many numbers:
other processors, BLAS libraries and builds of torch move them by less than its tolerance, a changed formula by more.
What draws at random is avoided where torch draws differently on other platforms.
"""

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from studylib.config.budgets import (
    CONSTANT,
    LOGIT_LOSSES,
    Budget,
    Evaluation,
    Instructions,
    RealText,
    Sampling,
    Training,
    Tuning,
)
from studylib.config.data import CORPORA
from studylib.config.numerics import NUMERICS
from studylib.config.settings import (
    ADAPTER_KINDS,
    AFFINE,
    AT_ONCE,
    FLOAT_BITS,
    FLOATING,
    FULL,
    INITS,
    LEARNED,
    OF_WEIGHTS,
    Adapter,
    Format,
    Grid,
    Scheme,
)
from studylib.data import corpora, generation, models, prompts
from studylib.quant import floats, formats, grids, kernel, layers, learned, rotation, storage

FILE = Path(__file__).with_name("numerics.json")
TOLERANCE = 2e-3
# More where roundings fall otherwise. AWQ takes the best of many ratios: of two nearly alike, each machine its own.
TOLERANCES = {"fine-tuning": 5e-3, "weight grids": 5e-3, "ptq": 0.06}
COMPUTE_DTYPE = models.compute_dtype  # as it decides, before it is told to be fp32


@contextlib.contextmanager
def everywhere_alike() -> Iterator[None]:
    """Inside: fp32, the CPU, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(models, "compute_dtype", lambda on=None: torch.float32),
            mock.patch.object(torch.cuda, "is_available", lambda: False),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers [shape], fp32, the same on every platform: quantiles of an additive recurrence."""
    count = math.prod(shape)
    even = ((torch.arange(1, count + 1, dtype=torch.float64) + 1000.0 * seed) * 0.6180339887498949) % 1.0
    mixed = (even * (1 + 3 * math.sqrt(2)) * count**0.5) % 1.0
    return torch.special.ndtri(mixed.clamp(1e-9, 1 - 1e-9)).float().view(shape)


def summary(x: Tensor) -> list[float]:
    """Mean magnitude, root of the mean square, mean of the positive part, mean magnitude weighted by position."""
    x = x.detach().double().flatten()
    position = torch.linspace(0, 1, len(x), dtype=torch.float64)
    return [float(v) for v in (x.abs().mean(), x.square().mean().sqrt(), x.relu().mean(), (x.abs() * position).mean())]


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return (torch.arange(rows * length) * 37 % 319 + 1).view(rows, length)


def tiny(opinionated: bool = False) -> nn.Module:
    """tiny-random; opinionated: with larger weights, since a random model is almost uniform."""
    model = models.load_model("tiny-random")
    if opinionated:
        for name, parameter in model.named_parameters():
            parameter.data.mul_(1 if "norm" in name else 8)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens(), use_cache=False).logits


def weights(model: nn.Module) -> Tensor:
    return torch.cat([layer.weight.detach().float().flatten() for layer in layers.decoder_linears(model).values()])


# --- one function a component: its values, in order -------------------------------------------------------------------


def of_models() -> Iterator[float]:
    own = tiny()
    for name in ("model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        yield from summary(own.get_submodule(name).weight)
    yield from summary(logits(own))
    for name, rows in (("smollm2-135m", 2000), ("tiny-random", 2)):
        model = own if name == "tiny-random" else models.load_model(name)
        yield sum(parameter.numel() for parameter in model.parameters())
        for parameter in (parameter for i, parameter in enumerate(model.parameters()) if i % 40 == 0):
            yield from summary(parameter[:rows])
    capable = [{"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}, {"avx512_bf16": False}, {}]
    for have in capable:
        with mock.patch.object(torch.cpu, "get_capabilities", lambda have=have: have):
            yield COMPUTE_DTYPE.__wrapped__().itemsize


def of_corpora() -> Iterator[float]:
    from studylib.train.distillation import _real_windows

    tokenizer, theirs = (models.load_tokenizer(name) for name in ("tiny-random", "smollm2-135m"))
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for split in corpora.SPLITS:
        for corpus in CORPORA:
            documents = corpora.documents(corpus, split)
            yield from (len(documents), sum(map(len, documents)))
            for own in (tokenizer, theirs):
                windows = corpora.windows(corpus, own, 64, 8, split)
                yield from (len(corpora.windows(corpus, own, 64, None, split)), *summary(windows))
        pairs = corpora.instruction_pairs(split)
        yield from (len(pairs), sum(len(pair.instruction) for pair in pairs), sum(len(pair.response) for pair in pairs))
        for own in (tokenizer, plain, theirs):
            found = [prompts.conversation(own, pair) for pair in pairs[:40]]
            yield from (sum(len(ids) for ids, _ in found), sum(start for _, start in found))
            yield from summary(torch.tensor([token for ids, _ in found for token in ids]))
    yield from summary(_real_windows(RealText("c4", 40, 32, seed=3), tokenizer))
    yield from (float(i) for i in corpora.evenly_spaced(4, 11))


def of_evaluation() -> Iterator[float]:
    from studylib.evaluate import packing, scores

    model, tokenizer = tiny(opinionated=True), models.load_tokenizer("tiny-random")
    yield from scores.window_losses(model, tokens(4), batch=3)
    pairs = corpora.instruction_pairs("evaluation")[:4]
    for values in scores.response_losses(model, tokenizer, pairs, scores.PAIR_TOKENS):
        yield from values
    metrics, _ = scores.score(model, tokenizer, Evaluation(("c4", "wikipedia"), 2, 32, pairs=2))
    yield from (math.log(value) for value in metrics.values())
    asked, original = [], packing.log_likelihoods

    def watched(model: nn.Module, requests: list) -> list:
        answers = original(model, requests)
        asked.extend(zip(requests, answers, strict=True))
        return answers

    with mock.patch.object(scores, "log_likelihoods", watched):
        for task, items in (("openbookqa", 6), ("mmlu", 2)):  # as they are asked, and what is found out about them
            asked.clear()
            scores.task_scores(model, tokenizer, [task], items)
            yield from (len(asked), *(sum(len(request[i]) for request, _ in asked) for i in (0, 1)))
            yield from (-answer for _, (answer, _) in asked)
    yield from (spec.items + spec.shots for spec in scores.TASKS.values())
    for format in (Format("nf"), Format("nf", 3, 32, True)):
        yield scores.normal_error(format, groups=1024)
    x = normal(20, 200)
    yield from (scores.non_normal_share(x), scores.non_normal_share(x**3))
    encoded = formats.encode_model(tiny(), Format("nf", 4, 32))
    found = scores.weight_scores(tiny(), encoded)
    yield from (sum(values) for name, values in found.items() if name != "non_normal")


def of_grids() -> Iterator[float]:
    x = normal(32, 128)
    for bits in (2, 3, 4, 8):
        for kind in ("symmetric", "asymmetric", "full-range"):
            for group in (None, 32):
                found = grids.quantize(x, Grid(bits, kind, group))
                yield from (*summary(found.dequantize()), *summary(found.scale))
                if found.zero is not None:
                    yield from summary(found.zero)
    upstream = normal(32, 128, seed=1)
    for mask in (None, 1.0):
        own = x.clone().requires_grad_()
        grids.fake_quantize(own, Grid(4), mask).backward(upstream)
        yield from summary(own.grad)
    plain = logits(tiny(opinionated=True))
    for bits, scheme in (
        ("8-16-16", Scheme()),
        ("3-16-16", Scheme("asymmetric", 32)),
        ("16-8-16", Scheme()),
        ("16-16-4", Scheme()),
        ("16-16-4", Scheme(cache_scale="head", keys="after-rotary")),
    ):
        model = layers.quantize_model(tiny(opinionated=True), bits, scheme)
        yield from summary(logits(model) - plain)
        yield from (storage.stored_bytes(model), layers.cache_bytes_per_token(tiny(), bits, scheme))
    yield from summary(weights(layers.round_to_nearest(tiny(), "4-8-4")))


def of_weight_grids() -> Iterator[float]:
    x, upstream = normal(32, 128), normal(32, 128, seed=1)
    for kind in OF_WEIGHTS:
        for bits in (2, 3, 4, 8):
            for group in (None, 32):
                grid = Grid(bits, kind, group)
                step = grids.initial_step(x, grid) if kind in LEARNED else None
                found = grids.quantize(x, grid, step)
                yield from (*summary(found.dequantize()), *summary(found.scale))
        own = x.clone().requires_grad_()
        step = torch.full((32, 1), 0.3, requires_grad=True) if kind in LEARNED else None
        grids.fake_quantize(own, Grid(4, kind), step=step).backward(upstream)
        yield from (*summary(own.grad), *([] if step is None else summary(step.grad)))
    plain = logits(tiny(opinionated=True))
    for bits, scheme in (("4-16-16", Scheme("statsq")), ("8-8-8", Scheme("lsq")), ("4-8-8", Scheme("paretoq", 32))):
        model = layers.quantize_model(tiny(opinionated=True), bits, scheme)
        yield from summary(logits(model) - plain)
        yield from (storage.stored_bytes(model), layers.cache_bytes_per_token(tiny(), bits, scheme))


def of_float_grids() -> Iterator[float]:
    x = normal(32, 128) * torch.logspace(-2, 2, 32)[:, None]
    plain = logits(tiny(opinionated=True))
    for kind in FLOATING:
        for bits in FLOAT_BITS[kind]:
            for whole in (False, True):
                yield from summary(floats.rounded(x, Grid(bits, kind), whole))
        model = layers.quantize_model(tiny(opinionated=True), "4-8-8", Scheme(kind))
        yield from (*summary(logits(model) - plain), layers.cache_bytes_per_token(tiny(), "4-8-8", Scheme(kind)))


def of_rotation() -> Iterator[float]:
    signs = torch.arange(576) % 3 % 2 * 2 - 1
    for width, given in ((64, None), (576, signs), (848, None), (1536, None)):
        own = rotation.Rotation(width, given)
        turned = own(normal(4, width))
        yield from (turned.std(), turned.abs().max(), *turned[1, 3:6], own.back(normal(4, width))[2, 5])


def of_formats() -> Iterator[float]:
    x = normal(32, 128)
    for kind, widths in (
        ("nf", (2, 3, 4)),
        ("fp-e2m1", (4,)),
        ("fp-bnb", (4,)),
        ("fp-e3m0", (4,)),
        ("int", (2, 3, 4, 8)),
        ("affine", (2, 3, 4, 8)),
        ("int-full", (2, 3, 4, 8)),
    ):
        for bits in widths:
            for group, double, scale_bits in ((64, False, 32), (32, True, 32), (32, False, 16), (None, False, 32)):
                format = Format(kind, bits, group, double, scale_bits)
                stored = formats.encode(x, format)
                yield from (*summary(stored.decode()), *summary(stored.decode() - x), stored.nbytes)
                yield formats.bits_per_parameter(format, 128)
            if kind != "affine":
                yield from summary(formats.levels(Format(kind, bits)))
    yield from summary(formats.scale_levels())
    layer = formats.EncodedLinear(nn.Linear(128, 32, bias=False), Format("nf"))
    yield storage.stored_bytes(nn.Sequential(layer))
    own = x.clone().requires_grad_()
    linear = nn.Linear(128, 32, bias=False)
    linear.weight.data = normal(32, 128, seed=1)
    y = formats.EncodedLinear(linear, Format("affine", 3, 32))(own)
    y.backward(normal(32, 32, seed=2))
    yield from (*summary(y), *summary(own.grad))


def of_generation() -> Iterator[float]:
    """torch draws from a multinomial in another way where it has no MKL, so that here it is drawn by its quantiles."""
    drawn = iter(range(10**6))

    def multinomial(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
        u = torch.tensor([[(next(drawn) * 0.6180339887498949 + 0.1234) % 1.0] for _ in p], dtype=torch.float64)
        return (p.double().cumsum(-1) < u).sum(-1, keepdim=True).clamp_max(p.shape[-1] - 1)

    model = tiny(opinionated=True)
    model.generation_config.eos_token_id = list(range(0, 320, 16))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch, "multinomial", multinomial):
        for strategy, top_k, temperature in (
            ("greedy", 50, 1.0),
            ("sampled", 0, 0.7),
            ("hybrid", 50, 1.0),
            ("hybrid-4", 5, 2.0),
            ("chat", 50, 1.0),
        ):
            settings = Sampling(6, 16, strategy, top_k, temperature, seed=5, batch=4)
            opening = [5, 9, 7] if strategy == "chat" else ()
            windows = generation.generate_windows(model, settings, Path(folder, strategy), opening)
            yield from map(float, windows.flatten())
        yield from corpora.text_statistics(model, windows).values()
    yield from map(float, generation._start_tokens(320, 3, 310, 20)[:, 0])
    yield from map(float, prompts.chat_opening(models.load_tokenizer("tiny-random")))


def trained_by(model: nn.Module, log: object, before: dict[str, Tensor]) -> Iterator[float]:
    """Of a short training: its log, and how far its parameters have moved, all together."""
    for entry in log.steps:
        yield from (entry["loss"], entry["learning_rate"], entry["grad_norm"])
    yield from (entry["loss"] for entry in log.curve)
    moved = [parameter.detach() - before[name] for name, parameter in model.named_parameters() if name in before]
    yield from summary(torch.cat([change.flatten() for change in moved]))[:2]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def of_training() -> Iterator[float]:
    from studylib.train.loop import fit

    for budget in (
        Budget(20, 2, 1.0),
        Budget(20, 2, 1.0, warmup=0.2),
        Budget(30, 2, 1.0, warmup=0.2, extended_from=(20,)),
        Budget(20, 2, 1.0, warmup=0.2, schedule=CONSTANT),
    ):
        yield from (budget.rate(step) for step in range(0, budget.steps, 3))
        yield from (step for step in range(1, budget.steps + 1) if budget.measured_at(step))
    examples = [{"tokens": row} for row in tokens(8, 12)]

    def loss(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        # Not all numbers count alike: the final norm makes their sum of squares a constant, without a gradient.
        return {"loss": (hidden.square() * torch.linspace(0, 1, hidden.shape[-1])).sum(-1).mean()}

    model = tiny(opinionated=True)
    before = copied(model)
    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(4, 2, 1e-3, max_grad_norm=0.5, weight_decay=0.1, warmup=0.25)
        log = fit(
            model,
            lambda tokens: {"loss": loss(model, tokens)["loss"] + model.lm_head.weight.square().mean()},
            examples,
            budget,
            folder,
            tokens_per_step=24,
            held_out_loss=lambda: {"loss": model.lm_head.weight.abs().mean().item()},
        )
    yield from trained_by(model, log, before)
    learned.l4q_model(tuned := tiny(opinionated=True), 4, group=32)
    before = copied(tuned)
    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(3, 2, 1e-3, grid_rate=0.02, schedule=CONSTANT)
        log = fit(tuned, lambda tokens: loss(tuned, tokens), examples, budget, folder, tokens_per_step=24)
    yield from (*trained_by(tuned, log, before), log.moved)


def of_distillation() -> Iterator[float]:
    from studylib.train import distillation, losses

    hidden, head = normal(300, 24), normal(50, 24, seed=1)
    theirs, labels = normal(300, 24, seed=2), torch.arange(300) * 7 % 50
    for kind in LOGIT_LOSSES:
        for temperature in (1.0, 2.0):
            own, matrix = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            if kind == "labels":
                loss = losses.label_loss(own, matrix, labels)
            else:
                loss = losses.soft_logit_loss(own, matrix, theirs, head, kind, temperature)
            loss.backward()
            yield from (loss.item(), *summary(own.grad), *summary(matrix.grad))
    maps = [normal(2, 3, 8, 8, seed=seed).softmax(-1) for seed in (3, 4)]
    yield losses.attention_loss((maps[0],), (maps[1],)).item()
    yield losses.raw_hidden_loss((hidden,), (theirs,)).item()
    for bits, settings in (
        ("4-8-4", Training(1, 2, 1e-3)),
        ("4-8-4", Training(1, 2, 1e-3, loss="symmetric-kl", temperature=2.0, scale="batchmean")),
        ("4-16-16", Training(1, 2, 1e-3, loss="labels+attention+raw-hidden")),
        ("4-16-16", Training(3, 2, 1e-4, mask=0.5)),
        ("4-16-16", Training(1, 2, 1e-3, masters="bf16")),
    ):
        teacher, student = tiny(opinionated=True), tiny(opinionated=True)
        for model in (teacher, student):
            model.set_attn_implementation("eager")
        layers.quantize_model(student, bits, mask=settings.mask)
        before = copied(student)
        with tempfile.TemporaryDirectory() as folder:
            states = distillation.keep_teacher_states(teacher, tokens(4), Path(folder, "states.npy"))
            given = teacher if settings.features else states
            log = distillation.train_llm_qat(
                student, given, teacher.lm_head.weight, tokens(4), settings, folder, held_out=tokens(2, 12)
            )
        yield from trained_by(student, log, before)


def of_hidden_states() -> Iterator[float]:
    from studylib.train import losses

    for seed in range(4):
        own, theirs = normal(2, 12, 24, seed=seed).requires_grad_(), normal(2, 12, 24, seed=seed + 4)
        theirs[0, 0] *= 300
        loss = losses.hidden_loss((own, own.square()), (theirs, theirs + 1))
        loss.backward()
        yield from (loss.item(), *summary(own.grad))
        yield from own.grad.flatten()[:8].tolist()


def of_fine_tuning() -> Iterator[float]:
    from studylib.methods import attach, merge
    from studylib.methods.adapters import split
    from studylib.train import finetuning

    tokenizer, pairs = models.load_tokenizer("tiny-random"), corpora.instruction_pairs("training")[:24]
    rows = finetuning.encode(tokenizer, pairs, 96)
    yield from (len(rows), sum(label != finetuning.IGNORED for row in rows for label in row["labels"]))
    yield from finetuning.random_order([len(row["tokens"]) for row in rows], 2, 7)
    batch = finetuning.collate(rows[:3])
    yield from (*summary(batch["tokens"]), *summary(batch["labels"]))
    yield finetuning.response_loss(tiny(opinionated=True), **batch).item()
    yield from (len(part) for part in finetuning.training_pairs("alpaca"))
    weight = normal(64, 96)
    for kind in ("pissa", "loftq"):
        base, a, b = split(weight, Format("nf", 4, 32), Adapter(4, 8.0, kind=kind))
        yield from (*summary(base), *summary(b @ a))
    nf4 = Format("nf", 4, 32, double=True)
    affine = Format("affine", 3, 32)
    original = tiny(opinionated=True)
    for method, format, kind, merges in (
        ("lora", None, "lora", (AT_ONCE[0], AT_ONCE[3])),
        ("lora", None, "dora", (AT_ONCE[1],)),
        ("qlora", nf4, "lora", AT_ONCE),
        ("qlora", nf4, "loftq", (AT_ONCE[4],)),
        ("qlora", affine, ADAPTER_KINDS[2], (AT_ONCE[0],)),
        ("qa-lora", affine, "lora", (AT_ONCE[0],)),
    ):
        adapter = Adapter(4, 8.0, kind=kind)
        for how in merges:
            model = attach(tiny(opinionated=True), method, format=format, adapter=adapter, seed=2)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data += 0.1 * normal(*parameter.shape)
            merge(model, how, original=original)
            yield from (*summary(weights(model) - weights(original)), storage.stored_bytes(model))
        model = attach(tiny(opinionated=True), method, format=format, adapter=adapter, seed=2)
        before = copied(model)
        yield from summary(torch.cat([p.flatten() for name, p in before.items() if "lora_A" in name]))
        settings = Tuning(3, 2, 1e-3, weight_decay=0.01, warmup=0.34)
        with tempfile.TemporaryDirectory() as folder:
            learn = Instructions(length=192, seed=1)
            log = finetuning.fine_tune(model, tokenizer, pairs, learn, settings, folder, held_out=pairs[:2])
        yield from trained_by(model, log, before)


def of_merging() -> Iterator[float]:
    from studylib.methods import attach
    from studylib.methods.adapters import merged_student
    from studylib.train import finetuning

    tokenizer, pairs = models.load_tokenizer("tiny-random"), corpora.instruction_pairs("training")[:8]
    for format in (Format("nf", 4, 32, double=True), Format("affine", 3, 32)):
        adapter = Adapter(4, 8.0)
        teacher = attach(tiny(opinionated=True), "qlora", format=format, adapter=adapter, seed=2)
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1 * normal(*parameter.shape)
        student = merged_student(teacher, format, tiny(opinionated=True))
        before = copied(student)
        with tempfile.TemporaryDirectory() as folder:
            learn, settings = Instructions(length=192, seed=1), Tuning(3, 2, 1e-3)
            log = finetuning.fine_tune(student, tokenizer, pairs, learn, settings, folder, teacher=teacher)
        yield from trained_by(student, log, before)
        yield from summary(weights(formats.decode_model(student)))


def of_learned_grids() -> Iterator[float]:
    weight = normal(32, 96) * 0.1 + 0.02
    for bits in learned.BITS:
        for init in (*INITS, AFFINE):
            for group in (None, 32):
                scale, offset = learned.initial_grid(weight, bits, group, init)
                yield from (*summary(scale), *summary(offset))
    for bits in (2, 4):
        linear = nn.Linear(96, 32, bias=False)
        linear.weight.data = weight.clone()
        generator = torch.Generator().manual_seed(3)
        layer = learned.L4QLinear(linear, bits, group=32, rank=4, init="asymmetric", generator=generator)
        layer.lora_B.data = normal(32, 4, seed=1) * 0.05
        layer.scale.data *= 0.7
        alone = learned.LearnedGridLinear(copy.deepcopy(linear), bits, 32, torch.float32)
        steps = learned.LearnedGridLinear(copy.deepcopy(linear), bits, 32, torch.float32, offsets=False)
        alone.scale.data *= 0.7
        steps.scale.data *= 0.7
        for own in (layer, alone, steps):
            x = normal(20, 96, seed=2).requires_grad_()
            y = own(x)
            y.backward(normal(20, 32, seed=4))
            yield from (*summary(y), *summary(x.grad), *summary(own.dense()), own.codes().nbytes)
            for name, parameter in own.named_parameters():
                if parameter.grad is not None and not (own is alone and name == "weight"):
                    yield from summary(parameter.grad)
        yield from summary(layer.lora_A)
    model = learned.l4q_model(tiny(), 4, group=32, seed=5)
    yield from summary(torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("lora_A")]))


def of_ptq() -> Iterator[float]:
    from studylib.methods import ptq

    text = tokens(6, 24)
    plain = tiny()
    embedding = plain.get_input_embeddings().weight.data  # channels that are correlated, some larger, as in real models
    embedding += 2 * embedding[:, :8] @ normal(8, embedding.shape[1])
    for name, parameter in plain.named_parameters():
        if "layernorm" in name:
            parameter.data[::8] *= 20
    for apply in (
        lambda model: ptq.smoothquant(model, text),
        lambda model: ptq.smoothquant(model, text, strength=0.8),
        lambda model: ptq.gptq(model, "4-16-16", text),
        lambda model: ptq.gptq(model, "3-16-16", text, Format(AFFINE, 3, 16)),
        lambda model: ptq.awq(model, "4-16-16", text),
        lambda model: ptq.gptq(model, "4-16-16", text, Format(FULL, 4, 16)),
        lambda model: ptq.awq(model, "3-16-16", text, Format(FULL, 3, 16)),
    ):
        model = apply(copy.deepcopy(plain))
        yield from summary(weights(model))
        yield from (summary(parameter)[0] for name, parameter in model.named_parameters() if "layernorm" in name)
        if isinstance(model.model.layers[0].mlp.up_proj, layers.QuantizedLinear):
            yield from (summary(weights(model) - weights(plain))[0], storage.stored_bytes(model))


def of_execution() -> Iterator[float]:
    x = normal(5, 128, seed=1)
    for kind in ("int", "affine"):
        linear = nn.Linear(128, 48, bias=False)
        linear.weight.data = normal(48, 128)
        stored = formats.encode(linear.weight, Format(kind, 4, 32))
        for dtype in (torch.float32, torch.bfloat16):
            layer = kernel.Int4Linear(stored, None, dtype)
            yield from (*summary(layer.grid.float()), *summary(layer.codes().decode()), storage.stored_bytes(layer))
            if dtype == torch.float32:
                yield from summary(layer(x))
    encoded = formats.encode_model(tiny(opinionated=True), Format("affine", 4, 32))
    model = kernel.int4_model(encoded, torch.float32, torch.float32)
    yield from (*summary(logits(model)), storage.stored_bytes(model))


VALUES: dict[str, Callable[[], Iterable[float]]] = {
    "models": of_models,
    "corpora": of_corpora,
    "evaluation": of_evaluation,
    "grids": of_grids,
    "weight grids": of_weight_grids,
    "float grids": of_float_grids,
    "rotation": of_rotation,
    "formats": of_formats,
    "generation": of_generation,
    "training": of_training,
    "distillation": of_distillation,
    "hidden states": of_hidden_states,
    "fine-tuning": of_fine_tuning,
    "merging": of_merging,
    "learned grids": of_learned_grids,
    "ptq": of_ptq,
    "execution": of_execution,
}


# --- what is kept, and what is wrong with it --------------------------------------------------------------------------


def compute(component: str) -> list[float]:
    """The values of a component as the code makes them now, four significant digits."""
    with everywhere_alike():
        return [float(f"{float(value):.4g}") for value in VALUES[component]()]


def read() -> dict[str, dict]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(components: Iterable[str]) -> None:
    """Write the values of the given components anew, with their versions; the others stay."""
    kept = read()
    kept |= {name: {"version": NUMERICS[name].number, "values": compute(name)} for name in components}
    lines = [f" {json.dumps(name)}: {json.dumps(kept[name])}" for name in NUMERICS if name in kept]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def problem(component: str) -> str | None:
    """What is wrong with the golden values of a component, and what to do; None where they are as they should be."""
    anew = f"write the golden values anew with `python tests/golden/write.py {json.dumps(component)}`"
    kept, version = read().get(component), NUMERICS[component].number
    if kept is None:
        return f"{component}: it has no golden values; {anew}"
    if kept["version"] != version:
        return f"{component}: its version is {version}, its golden values are of version {kept['version']}; {anew}"
    values = compute(component)
    if len(values) == len(kept["values"]):
        near = partial(math.isclose, rel_tol=TOLERANCES.get(component, TOLERANCE), abs_tol=1e-12)
        apart = [i for i, pair in enumerate(zip(values, kept["values"], strict=True)) if not near(*pair)]
        if not apart:
            return None
        first = apart[0]
        moved = (
            f"{len(apart)} of its {len(values)} values moved, the first from {kept['values'][first]} to {values[first]}"
        )
    else:
        moved = f"it has {len(values)} values, not {len(kept['values'])}"
    return (
        f"{component}: its numbers changed ({moved}). If that is meant, raise its version in config/numerics.py, with "
        f"one line why, and {anew}"
    )
