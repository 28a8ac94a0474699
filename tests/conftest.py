import dataclasses
import gc
import importlib.util
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the tests need no hub, and must not ask it
os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores; this is for those that they start

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data import models
from studylib.methods.arms import build_arm
from studylib.quant.formats import bits_per_parameter
from studylib.study.records import FINISHED, Record, arm_key, digest

torch.set_num_threads(1)


LONGEST = "test_cli.py", "test_independent.py", "test_install.py", "test_verify.py", "test_faults.py", "test_launch.py"


def pytest_collection_modifyitems(items):
    """Files that take a minute or more come first, and the rest of tests/study after them: no worker is left alone with
    one of them at the end. (As testpaths they would not: pytest drops a path that lies in another one.)"""
    turn = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.path.name, len(turn) + (item.path.parent.name != "study")))


@pytest.fixture(autouse=True)
def libraries_frozen(monkeypatch):
    """Every arm asks for garbage collections, which else walk through all libraries for a quarter of a second each."""
    gc.freeze()
    monkeypatch.setattr(gc, "unfreeze", lambda: None)  # a run lets go at its end what it has frozen
    yield
    gc.collect()  # what the test has left, which the next one would freeze


@pytest.fixture(scope="session")
def script():
    """Given its path from the repository's root, a script as a module."""

    def load(path):
        file = Path(__file__).parents[1] / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # where dataclasses look
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def text_of():
    """Given the file of a page, its HTML without the marks that keep bits and names on one line."""
    return lambda page: re.sub(r'<span class="bits">([^<]*)</span>', r"\1", page.read_text(encoding="utf-8"))


BUDGET = dataclasses.replace(
    profile("smoke"), evaluation=Evaluation(("wikipedia", "c4"), 32, 48, ("piqa", "arc_easy"), 100, pairs=20)
)


@pytest.fixture
def tiny_model():
    return models.load_model("tiny-random")


@pytest.fixture
def heeding():
    """For preexec_fn: a process that was started in the background ignores Ctrl-C, and so do those that it starts."""
    return lambda: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on any machine, for comparisons that bf16 would blur."""
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: torch.float32)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return models.load_tokenizer("tiny-random")


@pytest.fixture(scope="session")
def language_model():
    """The smallest real one, with its tokenizer. Do not change it."""
    return models.load_model("smollm2-135m"), models.load_tokenizer("smollm2-135m")


@pytest.fixture
def shape():
    """The configuration of a decoder of any family, small enough to run in milliseconds."""
    return {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of one token a byte after its special ones; `around`: what it puts around a text, "$A"."""

    def make(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"),
        eos="<|im_end|>",
        bos=None,
        around="$A",
        chat_template=TEMPLATE,
        added=(),
    ):
        symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        tokenizer = Tokenizer(BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([*special])
        ids = [(token, vocabulary[token]) for token in around.split() if token != "$A"]
        tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
        named = {name: token for name, token in (("eos_token", eos), ("bos_token", bos)) if token}
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **named)
        made.add_tokens([*added], special_tokens=True)
        return made

    return make


@pytest.fixture
def make_folder(tmp_path, byte_tokenizer):
    """A model's folder as a user would have it: two layers, hidden size 64."""

    def make(tokenizer=None, kind=LlamaConfig, name="own", **fields):
        shape = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        torch.manual_seed(0)
        models.skeleton(kind(**shape | fields)).save_pretrained(tmp_path / name)
        (tokenizer or byte_tokenizer()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def make_record():
    """A record with chosen scores: mean losses (nats) by corpus, a share of right answers, noise shared by all arms."""

    def make(
        method, bits="16-16-16", loss=3.0, accuracy=0.5, seed=0, status=FINISHED, spread=0.1, changes=None, **fields
    ):
        arm = build_arm(BUDGET, "tiny-random", method, bits, seed, **(changes or {}))
        scores, metrics = {}, {"bytes/weights": 1e6 * int(bits.split("-")[0]), "bytes/cache_per_token": 100.0}
        for at, corpus in enumerate(arm.evaluation.corpora):
            noise = np.random.default_rng(at).normal(size=32)
            scores[f"loss/{corpus}"] = (loss + at + spread * (noise - noise.mean())).tolist()
            metrics[f"perplexity/{corpus}"] = math.exp(np.mean(scores[f"loss/{corpus}"]))
        if arm.evaluation.pairs:
            scores["loss/responses"] = np.linspace(loss - 0.5, loss + 0.5, arm.evaluation.pairs).tolist()
            scores["tokens/responses"] = [40.0] * arm.evaluation.pairs
        if arm.method == "encoded":
            scores["bits"] = [bits_per_parameter(arm.format)]
            scores |= {"non_normal": [0.05, 0.06] * 20, "error/q_proj": [0.1, 0.1], "error/up_proj": [0.1, 0.2]}
        for task in arm.evaluation.tasks:
            scores[f"accuracy/{task}"] = [float(item < accuracy * 150) for item in range(150)]
            metrics[f"accuracy/{task}"] = accuracy
        trained = arm.training is not None or arm.tuning is not None
        steps = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0} for step in range(1, 21)]
        curve = [{"step": step, "tokens": 256 * step, "loss": loss + 1 / (1 + step)} for step in (0, 5, 10, 15, 20)]
        statistics = dict.fromkeys(("entropy", "loss"), 2.5) | dict.fromkeys(("distinct_2", "distinct_4"), 0.9)
        statistics |= {"repetition": 0.1, "vocabulary": 0.4}
        record = Record(
            key=digest(arm_key(arm), str(seed)),
            arm=arm,
            status=status,
            metrics=metrics,
            scores={} if status != FINISHED else scores,
            training=steps * trained,
            curve=curve * trained,
            data={"statistics": statistics, "samples": ["some | text with ``` in it"]} if arm.data else {},
            cost={
                "seconds": {"load": 1.0, "evaluate": 2.0} | ({"train": 60.0} if trained else {}),
                "tokens": {"evaluated": 1000} | ({"data": 256} if arm.data else {}),
                "peak_bytes": 2**30,
            },
            provenance={
                "commit": "c0ffee",
                "dirty": False,
                "python": "3.11.7",
                "hardware": {"processor": "AVX2", "cores": 2, "memory_bytes": 2**34, "accelerator": None},
                "compute_dtype": "float32",
                "source": "ef" * 32,
                "libraries": {"torch": "2.13.0", "transformers": "5.17.0", "lm-eval": "0.4.13"},
                "numerics": {"models": 1},
                "contents": {},
                "model": {"name": "tiny <random>", "note": "a note", "sha256": "ab" * 32},
                "corpora": dict.fromkeys(arm.evaluation.corpora, "cd" * 32),
                "finished": "2026-01-01T00:00:00Z",
            },
        )
        return dataclasses.replace(record, **fields)

    return make


@pytest.fixture(scope="module")
def picture(make_record):
    """Records of the papers' picture: 8 bits cost nothing, 4-8-4 breaks, training wins most of it back."""
    return [
        make_record("full-precision", loss=3.0, accuracy=0.60),
        make_record("rtn", "8-8-8", loss=3.01, accuracy=0.60),
        make_record("rtn", "8-8-4", loss=3.3, accuracy=0.50),
        make_record("rtn", "4-8-8", loss=3.12, accuracy=0.56),
        make_record("rtn", "4-8-4", loss=4.2, accuracy=0.30),
        make_record("rtn", "8-4-8", loss=9.0, accuracy=0.25),
        make_record("llm-qat", "8-8-8", loss=3.02, accuracy=0.60),
        make_record("llm-qat", "4-8-8", loss=3.1, accuracy=0.56),
        make_record("llm-qat", "4-8-4", loss=3.3, accuracy=0.52),
    ]


@pytest.fixture
def tuned(make_record):
    """The papers' picture of QLoRA and L4Q: NF4 keeps up with 16 bits, L4Q is ahead of all others at low bits."""
    formats = [
        ("nf", False, 3.01),
        ("nf", True, 3.01),
        ("int", False, 3.2),
        ("fp-e2m1", False, 3.15),
        ("fp-e3m0", False, 3.3),
    ]
    records = [
        make_record("encoded", "4-16-16", loss, 0.6 - (loss - 3), changes={"format": Format(kind, 4, 64, double)})
        for kind, double, loss in formats
    ]
    records += [
        make_record("encoded", "4-16-16", loss, 0.6 - (loss - 3), changes={"format": Format(kind, 4, group)})
        for kind, group, loss in (("nvfp4", 16, 3.01), ("mxfp4", 32, 3.25), ("mxfp4-even", 32, 3.15))
    ]
    nf, nf3 = Format("nf", 4, 64, True), Format("nf", 3, 64, True)
    variants = [
        ("lora", "16-16-16", 2.80, {}),
        ("qlora", "4-16-16", 2.80, {"format": nf}),
        ("qlora", "4-16-16", 2.80, {"format": nf, "merge": "merged-distilled"}),
        ("qlora", "4-16-16", 2.90, {"format": Format("fp-bnb", 4, 64, True)}),
        ("qlora", "4-16-16", 2.95, {"format": nf, "adapter": Adapter(layers="q_proj+v_proj")}),
        ("qlora", "4-16-16", 2.80, {"format": nf, "adapter": Adapter(4, 4)}),
        ("qlora", "4-16-16", 2.80, {"format": nf, "adapter": Adapter(64, 64)}),
        ("qlora", "3-16-16", 2.805, {"format": nf3}),
        ("l4q", "4-16-16", 2.75, {"format": Format("int-full", 4), "adapter": Adapter(4, 4)}),
        ("l4q", "4-16-16", 2.75, {"format": Format("int-full", 4), "adapter": Adapter(64, 64)}),
        ("l4q", "4-16-16", 2.73, {"format": Format("int-full", 4, 32)}),
        *(
            ("l4q", "4-16-16", 2.85, {"format": Format("int-full", 4), "adapter": Adapter(init=init)})
            for init in ("lsq+", "symmetric", "asymmetric")
        ),
    ]
    for bits, worse in ((4, 0.0), (3, 0.2)):
        loftq = {"format": Format("int-full", bits), "adapter": Adapter(kind="loftq")}
        variants.append(("qlora", f"{bits}-16-16", 2.86 + worse, loftq))
        variants += [
            (method, f"{bits}-16-16", loss + worse, {"format": Format("int-full", bits)})
            for method, loss in (
                ("l4q", 2.75),
                ("qlora", 2.85),
                ("qa-lora", 2.9),
                ("gptq+qa-lora", 2.89),
                ("qat-lora", 2.87),
                ("gptq+lora", 2.95),
            )
        ]
    return records + [
        make_record(method, bits, loss, 0.55 - (loss - 2.75) * 0.5, seed, spread=0.02, changes=changes)
        for method, bits, loss, changes in variants
        for seed in (0, 1)
    ]


@pytest.fixture
def ablations(picture, make_record):
    """The papers' picture with the variants of LLM-QAT at 4-8-4 that are all worse, and SmoothQuant's part at 4-4.

    Trained arms were run with three seeds, which came out the same.
    """
    changes = [
        *({"sampling": {"strategy": name}} for name in ("sampled", "greedy")),
        *({"corpus": name} for name in ("wikipedia", "c4")),
        *({"training": {"loss": loss}} for loss in ("labels", "kl+attention", "kl+raw-hidden")),
        *({"scheme": Scheme(grid=grid)} for grid in ("statsq", "lsq")),
    ]
    worse = [
        make_record("llm-qat", "4-8-4", loss=3.32 + 0.1 * at, accuracy=0.48 - 0.04 * at, changes=change)
        for at, change in enumerate(changes)
    ]
    records = [
        *picture,
        *worse,
        make_record("rtn", "4-4-16", loss=9.5, accuracy=0.25),
        make_record("llm-qat", "4-4-16", loss=5.0, accuracy=0.30),
        make_record("smoothquant+llm-qat", "4-4-16", loss=4.5, accuracy=0.45),
        make_record("smoothquant+llm-qat", "4-8-4", loss=3.3, accuracy=0.52),
        make_record("smoothquant", "4-4-16", loss=9.0, accuracy=0.26),
        make_record("rtn", "4-4-16", loss=4.4, accuracy=0.40, changes={"scheme": Scheme(rotated=True)}),
        make_record("llm-qat", "4-4-16", loss=3.4, accuracy=0.50, changes={"scheme": Scheme(rotated=True)}),
        make_record("rtn", "4-4-16", loss=3.6, accuracy=0.45, changes={"scheme": Scheme("nvfp")}),
        make_record("llm-qat", "4-4-16", loss=3.1, accuracy=0.60, changes={"scheme": Scheme("nvfp")}),
    ]
    return [run for record in records for run in repeated(record)]


def repeated(record, seeds=(0, 1, 2), losses=(0.0, 0.0, 0.0)):
    """Records of the same arm with other seeds, whose mean losses differ by `losses`; of an untrained one, itself."""
    arm = record.arm
    if arm.budget is None:
        return [record]
    part = "instructions" if arm.tuning else "data"
    runs = []
    for seed, more in zip(seeds, losses, strict=True):
        own = dataclasses.replace(arm, **{part: dataclasses.replace(getattr(arm, part), seed=seed)})
        scores = {
            name: [value + more for value in values] if name.startswith("loss/") else values
            for name, values in record.scores.items()
        }
        runs.append(dataclasses.replace(record, key=digest(record.key, str(seed)), arm=own, scores=scores))
    return runs


@pytest.fixture
def seeded():
    return repeated


@pytest.fixture
def of_model():
    """A record as one of another model of the family: `times` as large, with losses that differ by `more`."""

    def make(record, model, times=1.0, more=0.0):
        scores = {
            name: [value + more for value in values] if name.startswith("loss/") else values
            for name, values in record.scores.items()
        }
        metrics = record.metrics | {
            name: value * times for name, value in record.metrics.items() if name.startswith("bytes/")
        }
        arm = dataclasses.replace(record.arm, model=model)
        return dataclasses.replace(record, key=digest(record.key, model), arm=arm, scores=scores, metrics=metrics)

    return make


@pytest.fixture
def family(make_record, of_model, seeded):
    """A small model and one of nearly twice its size, which is better at equal bytes; three seeds of what is trained.

    Further settings of LLM-QAT tell how far runs lie apart.
    """
    losses = {("full-precision", "16-16-16"): 3.0, ("rtn", "8-8-8"): 3.01, ("rtn", "4-8-4"): 4.2}
    losses |= {("llm-qat", bits): 3.2 for bits in ("4-8-8", "4-8-4", "4-8-16", "8-8-4", "4-6-16", "8-8-8")}
    records = [run for (name, bits), loss in losses.items() for run in seeded(make_record(name, bits, loss=loss))]
    return [of_model(record, "a/small") for record in records] + [
        of_model(record, "a/large", 1.9, -0.5) for record in records
    ]
