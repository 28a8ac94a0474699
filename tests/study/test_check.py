"""What passes a check can be run, what is refused is refused before any work, and nothing is kept under a name."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data import corpora, models
from studylib.evaluate.scores import window_losses
from studylib.methods.arms import build_arm
from studylib.study import run, schedule
from studylib.study.check import check
from studylib.study.records import Store, arm_key
from studylib.train.distillation import _real_windows, last_hidden

BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=32))
WIDE = dataclasses.replace(BUDGET, evaluation=Evaluation(("wikipedia",), 2, 32, ("arc_easy",), 2, pairs=4))


def arm(folder, method="full-precision", bits="16-16-16", budget=BUDGET, **changes):
    return build_arm(budget, str(folder), method, bits, **changes)


def trained(folder, **changes):
    return arm(folder, "llm-qat", "4-8-16", **changes)


def chat(folder, **sampling):
    return trained(folder, sampling={"strategy": "chat", **sampling})


def refused(checked, match):
    with pytest.raises(ValueError, match=match) as caught:
        check(checked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("kind", "fields", "causes"),
    [
        (CohereConfig, {}, "a bias, a scale or soft-capping"),
        (GraniteConfig, {"logits_scaling": 8.0}, "a bias, a scale or soft-capping"),
        (Gemma2Config, {"head_dim": 16}, "a bias, a scale or soft-capping"),
        (PhiConfig, {"num_key_value_heads": 4}, "a bias, a scale or soft-capping"),
        (GraniteConfig, {"logits_scaling": 1.0}, None),
        (OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 32}, None),
        (BloomConfig, {}, None),
        (GPTNeoXConfig, {}, None),
        (MistralConfig, {"sliding_window": 16}, None),
        (Qwen3Config, {"head_dim": 32}, None),
    ],
)
def test_heads_are_known_before_training(make_folder, kind, fields, causes):
    folder = make_folder(kind=kind, **fields)
    check(arm(folder, "rtn", "4-8-16"))  # which needs no more of a head than its logits
    if causes:
        refused(trained(folder), causes)
    else:
        check(trained(folder))


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (BertConfig, {}, "sees the tokens that it should predict; use a decoder"),
        (FalconConfig, {"alibi": True}, "has layers that are FalconLinear"),
        (MambaConfig, {}, "has a matrix outside of its nn.Linear layers"),
    ],
)
def test_architectures_of_which_not_everything_would_be_quantized(make_folder, kind, fields, named):
    refused(arm(make_folder(kind=kind, **fields), "rtn", "4-8-16"), named)


@pytest.mark.parametrize("added", [("<extra>",), ("<|im_start|>",)])
def test_tokens_that_the_embedding_does_not_have(make_folder, byte_tokenizer, added):
    tokenizer = byte_tokenizer(special=("<|endoftext|>", "<|im_end|>"), added=added)
    folder = make_folder(tokenizer, vocab_size=258, eos_token_id=1)
    if added == ("<extra>",):  # which no text makes
        check(chat(folder))
        check(arm(folder, budget=WIDE))
        return
    message = "the tokenizer of .* makes token 258, but its embedding has 258 rows"
    refused(chat(folder), message)
    refused(arm(folder, budget=WIDE), message)
    refused(arm(folder, "lora"), message)
    check(trained(folder))  # neither pairs nor chats


def test_a_template_is_tried_where_it_is_used(make_folder, byte_tokenizer):
    folder = make_folder(byte_tokenizer(chat_template="{{ raise_exception('no system role') }}"))
    for wanted in (chat(folder), arm(folder, budget=WIDE), arm(folder, "lora")):
        refused(wanted, r"the chat template of .* fails \(TemplateError: no system role\)")
    check(arm(folder))


def test_a_tokenizer_that_lm_eval_cannot_use(make_folder, byte_tokenizer):
    folder = make_folder(byte_tokenizer(special=(), eos=None, chat_template=None), eos_token_id=None)
    refused(arm(folder, budget=WIDE), "tasks: lm-eval needs a BOS or an EOS token")
    check(trained(folder))


def test_contexts_shorter_than_pairs(make_folder, byte_tokenizer, tmp_path):
    plain = byte_tokenizer(chat_template=None)
    lengths = [len(prompt) for prompt in ("a" * 20, "a" * 200)]
    short = make_folder(plain, name="short", max_position_embeddings=96, kind=OPTConfig, ffn_dim=96)
    refused(arm(short, budget=WIDE), "length: 96 tokens hold nothing of the response of pair 0")
    refused(chat(short, length=97), "a chat template|97 tokens is longer than the model's context of 96")
    folder = make_folder(name="enough", max_position_embeddings=128, kind=OPTConfig, ffn_dim=96)
    rows = [{"instruction": "a" * length, "output": "b" * 200} for length in lengths for _ in range(12)]
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([row | {"instruction": f"{i} {row['instruction']}"} for i, row in enumerate(rows)]))
    tuned = arm(folder, "lora")
    fine = dataclasses.replace(tuned, instructions=dataclasses.replace(tuned.instructions, source=str(pairs)))
    (record,) = schedule.run([fine], tmp_path / "results")  # pairs are cut at the context
    assert record.status == "finished"


def test_answers_of_benchmarks_are_tried_too(make_folder, byte_tokenizer):
    tasks = dataclasses.replace(BUDGET, evaluation=Evaluation(("wikipedia",), 2, 32, ("arc_easy",), items=40))
    short = make_folder(max_position_embeddings=40)  # one token a byte
    refused(arm(short, budget=tasks), "task arc_easy: a continuation of [0-9]+ tokens .* takes 1 to 40")
    check(arm(make_folder(name="enough", max_position_embeddings=400), budget=tasks))
    few = dataclasses.replace(tasks, evaluation=Evaluation(("wikipedia",), 2, 32, ("triviaqa",)))
    check(arm(make_folder(name="few", max_position_embeddings=400), budget=few))


def test_an_opening_that_leaves_no_room(make_folder, byte_tokenizer):
    folder = make_folder(
        byte_tokenizer(chat_template="a long beginning of a chat, " * 2 + byte_tokenizer().chat_template)
    )
    refused(chat(folder), "length: 32 tokens leave no room after an opening of")
    check(chat(folder, length=128))


def test_more_likely_tokens_than_there_are(make_folder):
    refused(
        trained(make_folder(), sampling={"top_k": 10**6}), "top_k: 1000000 is more than the vocabulary; use 0 for all"
    )


def test_paging_that_would_page_nothing(make_folder):
    folder, paged = make_folder(), {"tuning": {"paged": True}}
    with pytest.raises(ValueError, match="paged: bitsandbytes pages the states of tensors of 100,000 numbers or more"):
        check(arm(folder, "lora", adapter=Adapter(rank=64), **paged), elsewhere=True)
    check(arm(folder, "qat", "4-16-16", format=Format("int-full", 4, 32), **paged), elsewhere=True)


def test_layers_are_tried_with_the_arms_scheme(make_folder):
    folder = make_folder()
    refused(arm(folder, "rtn", "4-8-4", scheme=Scheme(group=48)), "48 does not divide the row length 64")
    check(arm(folder, "rtn", "4-8-4", scheme=Scheme(keys="after-rotary", cache_scale="head")))
    edit(folder / "config.json", attention_dropout=1.5)
    check(arm(folder))
    refused(trained(folder), "cannot be computed with")  # where there is dropout


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_edited_model_gives_new_records(make_folder, tmp_path):
    folder, wide = make_folder(), dataclasses.replace(BUDGET, evaluation=dataclasses.replace(WIDE.evaluation, tasks=()))
    arms = [arm(folder, "rtn", "4-8-4", budget=wide)]
    (first,) = schedule.run(arms, tmp_path / "results")
    edit(folder / "config.json", rms_norm_eps=0.1)
    (second,) = schedule.run(arms, tmp_path / "results")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "### "))
    (third,) = schedule.run(arms, tmp_path / "results")
    assert len({record.key for record in (first, second, third)}) == 3
    assert first.scores["loss/wikipedia"] != second.scores["loss/wikipedia"] == third.scores["loss/wikipedia"]
    assert second.scores["loss/responses"] != third.scores["loss/responses"]
    template.write_text("{{ broken")
    refused(arms[0], "the chat template of .* fails")  # a check is not remembered for another template


def test_a_replaced_corpus_gives_new_text_and_new_states(fp32, make_folder, tmp_path):
    folder, path = make_folder(), tmp_path / "own.txt"
    arms = [trained(folder, corpus=str(path)), arm(folder, "llm-qat", "8-8-16", corpus=str(path))]
    samples = []
    for text in ("Cats purr, number {}. ", "Stock prices fell {} percent! "):
        path.write_text("\n".join(12 * text.format(i) for i in range(30)))
        records = schedule.run(arms, tmp_path / "results")
        assert records[0].data == records[1].data
        samples.append(records[0].data["samples"][0])
    assert "purr" in samples[0] and "percent" in samples[1]
    model, tokenizer = models.load_model(str(folder)), models.load_tokenizer(str(folder))
    states = sorted(
        (tmp_path / "results" / "data").glob("*/teacher_states-*.npy"), key=lambda file: file.stat().st_mtime_ns
    )
    assert len(states) == 2
    windows = _real_windows(arms[0].data, tokenizer)
    np.testing.assert_allclose(np.load(states[1]), last_hidden(model, windows).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("at", ["prepare", "score"])
def test_weights_that_are_replaced_while_an_arm_runs(make_folder, tmp_path, monkeypatch, at):
    folder, original = make_folder(), getattr(run, at)
    file = folder / "model.safetensors"

    def replacing(*arguments):
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        return original(*arguments)

    monkeypatch.setattr(run, at, replacing)
    with pytest.raises(ValueError, match=r"files were changed while .* was computed from them"):
        schedule.run([trained(folder)], tmp_path / "results")
    assert not list((tmp_path / "results" / "records").iterdir())


def test_text_is_not_kept_under_the_name_of_other_weights(make_folder, tmp_path, monkeypatch):
    folder, original = make_folder(), run.check_head

    def replacing(model):
        file = folder / "model.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        return original(model)

    monkeypatch.setattr(run, "check_head", replacing)  # between loading and the making of the text
    with pytest.raises(ValueError, match="files were changed while"):
        schedule.run([trained(folder)], tmp_path / "results")
    assert not list((tmp_path / "results").glob("data/*/*"))


def test_a_model_that_begins_with_bos(fp32, make_folder, byte_tokenizer, tmp_path):
    folder = make_folder(byte_tokenizer(bos="<s>", around="<s> $A"), bos_token_id=3)
    records = schedule.run([arm(folder, budget=WIDE), trained(folder), trained(folder, corpus="c4")], tmp_path)
    model, tokenizer = models.load_model(str(folder)), models.load_tokenizer(str(folder))
    windows = corpora.windows("wikipedia", tokenizer, 32, 2, "evaluation")
    assert (windows[:, 0] == 3).all()
    assert records[0].scores["loss/wikipedia"] == window_losses(model, windows).tolist()
    assert all(text.startswith("<s>") for record in records[1:] for text in record.data["samples"])
    assert all(record.provenance["text"] == {"beginning": "<s>"} for record in records)


def test_a_template_with_a_date_gives_the_same_on_all_days(make_folder, byte_tokenizer, tmp_path, monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }}|" + byte_tokenizer().chat_template
    folder = make_folder(byte_tokenizer(chat_template=template))
    arms = [arm(folder, budget=WIDE), chat(folder, length=64)]
    first = schedule.run(arms, tmp_path / "first")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", None)  # what a template's clock would read
    second = schedule.run(arms, tmp_path / "second")
    assert [record.scores for record in first] == [record.scores for record in second]
    assert first[1].data == second[1].data and first[1].data["samples"][0].startswith("26 Jul 2024|")
    assert first[0].provenance["text"] == {"date": "2024-07-26"}
    store = Store(tmp_path / "first")
    assert all(store.load(arm_key(each)) for each in arms)


def test_nothing_is_said_of_text_that_nothing_is_added_to(tmp_path):
    (record,) = schedule.run([arm("tiny-random")], tmp_path)
    assert record.provenance["text"] == {}


def test_a_check_leaves_random_numbers_as_they_are(make_folder):
    folder = make_folder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check(trained(folder))
    assert torch.equal(torch.rand(3), expected)
