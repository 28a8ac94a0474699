"""What can be wrong with an arm beyond its fields, found before anything long begins: what passes here can fail of
nothing that its model, tokenizer, template or text are."""

import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studylib.config import (
    ALPACA,
    ARCHIVE,
    CHAT,
    Arm,
    Evaluation,
    Instructions,
    Profile,
    RealText,
    Sampling,
    Scheme,
    check_llama_cpp,
    wanted_trackers,
)
from studylib.data import (
    beginning,
    chat_opening,
    check_length,
    check_template,
    corpora,
    fetch,
    generate_windows,
    instruction_pairs,
    models,
)
from studylib.evaluate import check_requests, pair_requests
from studylib.methods import adapted_layers, build_arm, find, usual_text
from studylib.quant import check_matrices, check_rotatable, decoder_linears, quantize_model
from studylib.study import launch
from studylib.study.records import contents
from studylib.train import check_head, check_paged, check_paging, encode, training_pairs, usable_length

TRIED = 8  # tokens that are generated
LOUD = 100.0  # times which a head's weights make logits as large as those of a trained model


def check(arm: Arm, elsewhere: bool = False) -> None:
    """Try one request of every kind that the arm will make, without the model's weights. ValueError, in one line, for
    what cannot be. elsewhere: other machines compute it, which may have the GPU that this one lacks."""
    method = find(arm.method)
    method.check(arm)
    if not elsewhere:
        launch.check(arm)
    if arm.budget:
        wanted_trackers()
    named = _named(arm)
    models.check(arm.model)
    skeleton = _skeleton(arm.model, named)
    names = adapted_layers(skeleton, arm.adapter.layers) if arm.adapter else []
    if arm.format:
        for linear in decoder_linears(skeleton).values():
            arm.format.check_width(linear.in_features)
    if arm.tuning and arm.tuning.paged:
        if not elsewhere:
            check_paging()
        if arm.adapter:
            check_paged(arm.adapter.rank * max(skeleton.get_submodule(name).weight.shape) for name in names)
    method.check_model(arm, skeleton)
    if arm.engines:
        _check_engines(arm, elsewhere)
    if arm.scheme.rotated:
        check_rotatable(skeleton)
    for length in (arm.evaluation.length, *([arm.data.length] if arm.data else [])):
        check_length(skeleton, length)
    if isinstance(arm.data, Sampling) and arm.data.top_k > skeleton.config.get_text_config().vocab_size:
        raise ValueError(f"top_k: {arm.data.top_k} is more than the vocabulary; use 0 for all of it")
    if arm.instructions:
        _check_instructions(arm.model, arm.instructions, named)
    if arm.data:
        _check_data(arm.model, arm.data, named)
    _check_evaluation(arm.model, arm.evaluation, named)
    _check_layers(arm.model, arm.bits, arm.scheme, named)
    if arm.budget:
        _check_trained(arm.model, named)


def _check_engines(arm: Arm, elsewhere: bool) -> None:
    from studylib.study import gguf

    if not elsewhere:
        check_llama_cpp()
    gguf.check_arm(arm, models.load_config(arm.model), models.load_tokenizer(arm.model))
    assert arm.engines is not None
    check_length(_skeleton(arm.model, _named(arm)), arm.engines.context + arm.engines.tokens)


def check_own_data(budget: Profile, model: str) -> None:
    """ValueError, in one line, where files of one's own are missing, hold no such data, or too little of it for a
    budget; before any notebook is started."""
    _check_evaluation(model, budget.evaluation, _named(build_arm(budget, model, "full-precision")))
    if budget.training_text:
        text = usual_text(budget)
        trained = set(corpora.documents(budget.training_text, "training"))
        for corpus in budget.evaluation.corpora:
            if common := len(trained.intersection(corpora.documents(corpus, "evaluation"))):
                raise ValueError(
                    f"training_text: {common} documents of {budget.training_text!r} are scored, of {corpus!r}; leave "
                    "them out of one of the files"
                )
        _check_data(model, text, _named(build_arm(budget, model, "llm-qat", "4-8-4")))
    if budget.instructions.source != ALPACA:
        _check_instructions(model, budget.instructions, _named(build_arm(budget, model, "lora")))


def _named(arm: Arm) -> str:
    return json.dumps(contents(arm), sort_keys=True)


# Each of these is remembered for all arms that share it, as long as the files that they name stay the same (`named`).


@functools.lru_cache(maxsize=2)
def _skeleton(model: str, named: str) -> PreTrainedModel:
    """The whole model without numbers, which nothing may change: to make one takes a tenth of a second."""
    config = models.load_config(model)  # which may write the weights first, so not under the meta device
    with torch.device("meta"):
        skeleton = models.skeleton(config)
    check_matrices(skeleton)
    return skeleton


@functools.lru_cache(maxsize=32)
def _check_instructions(model: str, wanted: Instructions, named: str) -> None:
    tokenizer, (sample, rows) = models.load_tokenizer(model), _sample(model, named)
    check_template(tokenizer, model)
    for pairs in training_pairs(wanted.source):
        for row in encode(tokenizer, pairs, usable_length(sample, wanted)):
            _check_tokens(model, torch.tensor(row["tokens"]), rows)


@functools.lru_cache(maxsize=32)
def _check_data(model: str, wanted: Sampling | RealText, named: str) -> None:
    tokenizer, (sample, rows) = models.load_tokenizer(model), _sample(model, named)
    if isinstance(wanted, RealText):
        corpora.windows(wanted.corpus, tokenizer, wanted.length, 1, "training")
        _check_tokens(model, corpora.windows(wanted.corpus, tokenizer, wanted.length, None, "training"), rows)
        return
    opening = []
    if wanted.strategy == CHAT:
        check_template(tokenizer, model)
        opening = chat_opening(tokenizer)
    first = beginning(tokenizer)
    _check_tokens(model, torch.tensor([*opening, *first, 0]), rows)
    given = max(len(opening), len(first) + 1)
    if given >= wanted.length:
        raise ValueError(f"length: {wanted.length} tokens leave no room after an opening of {given}")
    few = dataclasses.replace(wanted, count=1, length=min(wanted.length, given + TRIED), batch=1)
    with tempfile.TemporaryDirectory() as folder, _computing(model):
        small = sample.config.get_text_config().vocab_size
        generate_windows(
            sample,
            few,
            folder,
            [token % small for token in opening],
            first=[token % small for token in first],
            end=tokenizer.eos_token_id,
        )


@functools.lru_cache(maxsize=32)
def _check_evaluation(model: str, wanted: Evaluation, named: str) -> None:
    tokenizer, (sample, rows) = models.load_tokenizer(model), _sample(model, named)
    for corpus in wanted.corpora:
        _check_tokens(model, corpora.windows(corpus, tokenizer, wanted.length, wanted.windows, "evaluation"), rows)
    if wanted.pairs:
        check_template(tokenizer, model)
        pairs = instruction_pairs("evaluation", wanted.instructions)
        if wanted.pairs > len(pairs):
            raise ValueError(
                f"pairs: {wanted.pairs} are more than the {len(pairs)} of {wanted.instructions!r} that are held out"
            )
        for before, response in pair_requests(sample, tokenizer, pairs[: wanted.pairs]):
            _check_tokens(model, torch.tensor([*before, *response]), rows)
    if wanted.tasks and wanted.source == ARCHIVE:
        fetch("benchmarks")
    with _computing(model):
        check_requests(sample, tokenizer, wanted, lambda tokens: _check_tokens(model, torch.tensor(tokens), rows))


@functools.lru_cache(maxsize=64)
def _check_layers(model: str, bits: str, scheme: Scheme, named: str) -> None:
    """Quantize a small one of the architecture, and compute with it."""
    sample = quantize_model(_sample(model, named, fresh=True)[0], bits, scheme)
    with _computing(model):
        check_requests(sample, models.load_tokenizer(model), Evaluation((), 1, TRIED))


@functools.lru_cache(maxsize=8)
@torch.no_grad()
def _check_trained(model: str, named: str) -> None:
    sample, _ = _sample(model, named, fresh=True)
    head = sample.get_output_embeddings()
    head.weight.mul_(LOUD)
    if head.bias is not None:
        head.bias.fill_(1.0)
    with _computing(model):
        check_head(sample)
        sample.train()(input_ids=torch.arange(TRIED)[None])


@contextlib.contextmanager
def _computing(model: str) -> Iterator[None]:
    """Inside, what a model's code raises is a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        why = textwrap.shorten(str(error), 240, placeholder=" ...")
        raise ValueError(f"model: {model!r} cannot be computed with ({type(error).__name__}: {why})") from error


def _check_tokens(model: str, tokens: Tensor, rows: int) -> None:
    if tokens.numel() and (most := int(tokens.max())) >= rows:
        raise ValueError(f"model: the tokenizer of {model!r} makes token {most}, but its embedding has {rows} rows")


def _sample(model: str, named: str, fresh: bool = False) -> tuple[PreTrainedModel, int]:
    """A small model of the architecture, and how many rows the embedding of the whole one has. Only a fresh one may be
    changed."""
    sample, rows = _make_sample(model, named)
    return (copy.deepcopy(sample) if fresh else sample), rows


@functools.lru_cache(maxsize=2)
def _make_sample(model: str, named: str) -> tuple[PreTrainedModel, int]:
    config = models.load_config(model)
    with _computing(model):
        sample = models.sample(config)
        tokens = torch.arange(TRIED)[None]
        changed = tokens.clone()
        changed[0, -1] = TRIED
        with torch.no_grad():
            first, second = (sample(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (tokens, changed))
    if not torch.equal(first, second):
        raise ValueError(
            f"model: {model!r} ({config.model_type}) sees the tokens that it should predict; use a decoder"
        )
    return sample, config.get_text_config().vocab_size
