"""The planner against real steps, and both against numbers counted by hand."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from studylib.config.budgets import SHAPES
from studylib.config.settings import Adapter, Format
from studylib.data import models
from studylib.evaluate import memory
from studylib.evaluate.memory import CONFIGURATIONS, GB, inference_bytes, measure, plan
from studylib.methods import attach, merge
from studylib.methods.base import find
from studylib.quant import formats
from studylib.quant.storage import stored_bytes

BLOCK, RANK = 16, 4


def settings(method, rank=RANK, **adapter):
    return {
        "format": find(method).usual_format(4, BLOCK),
        "adapter": Adapter(rank, **adapter) if "adapter" in find(method).needs else None,
    }


@pytest.fixture
def config(shape):
    """A configuration by family; the shape of each is a different one."""

    def make(family, layers=3):
        if family == "llama":
            return LlamaConfig(**shape | {"num_hidden_layers": layers, "tie_word_embeddings": True})
        if family == "mistral":  # its window is the context: no mask is needed
            fields = {"intermediate_size": 64, "num_key_value_heads": 4, "sliding_window": None}
            return MistralConfig(**shape | {"num_hidden_layers": layers} | fields)
        if family == "opt":  # which asks at each layer whether it is dropped
            return OPTConfig(**shape | {"num_hidden_layers": layers, "ffn_dim": 48})
        return Qwen2Config(**shape | {"num_hidden_layers": layers, "hidden_size": 64})  # with biases

    return make


@pytest.fixture
def prepared(config, monkeypatch):
    """A real model, prepared for training with everything in one type."""

    def make(family, method, dtype=torch.float32, layers=3, **adapter):
        monkeypatch.setattr(models, "compute_dtype", lambda on=None: dtype)
        return attach(models.skeleton(config(family, layers)), method, **settings(method, **adapter))

    return make


@pytest.mark.parametrize(
    ("family", "method", "checkpointing", "batch", "length", "dtype"),
    [
        ("llama", "lora", False, 1, 32, torch.bfloat16),
        ("llama", "lora", True, 2, 24, torch.float32),
        ("llama", "qlora", True, 1, 64, torch.bfloat16),
        ("qwen2", "qa-lora", False, 3, 17, torch.float32),
        ("llama", "qat-lora", True, 1, 32, torch.bfloat16),
        ("llama", "l4q", False, 2, 24, torch.bfloat16),
        ("llama", "qat", False, 1, 8, torch.bfloat16),
        ("llama", "qat", True, 2, 24, torch.float32),
        ("llama", "lsq", False, 1, 8, torch.bfloat16),
        ("qwen2", "lsq", True, 2, 24, torch.float32),
        ("mistral", "lora", True, 3, 17, torch.bfloat16),
        ("mistral", "qlora", False, 1, 24, torch.float32),
        ("mistral", "l4q", True, 2, 24, torch.bfloat16),
        ("qwen2", "qlora", True, 2, 24, torch.bfloat16),
        ("qwen2", "l4q", False, 1, 24, torch.bfloat16),
        ("qwen2", "qat", True, 1, 16, torch.bfloat16),
        ("opt", "lora", False, 2, 24, torch.bfloat16),
        ("opt", "qlora", True, 1, 24, torch.float32),
    ],
)
def test_a_plan_is_what_is_measured(config, prepared, family, method, checkpointing, batch, length, dtype):
    measured = measure(prepared(family, method, dtype), batch, length, checkpointing=checkpointing)
    step = {"batch": batch, "length": length, "checkpointing": checkpointing}
    assert plan(config(family), method, **settings(method), **step, dtype=dtype) == measured


@pytest.mark.parametrize(
    ("method", "format", "adapter"),
    [
        ("qlora", Format("nf", 3, BLOCK, True), Adapter(RANK, dropout=0.1, layers="q_proj+v_proj")),
        ("qlora", Format("int", 4, None), Adapter(RANK, kind="loftq")),
        ("qlora", Format("int-full", 4, BLOCK), Adapter(RANK)),
        *((method, Format("affine", 4, BLOCK), Adapter(RANK)) for method in ("qa-lora", "qat-lora", "l4q")),
        *((method, Format("affine", 4, BLOCK), None) for method in ("qat", "lsq")),
        ("lora", None, Adapter(RANK, kind="dora")),
        ("lora", None, Adapter(RANK, kind="pissa")),
    ],
)
def test_any_format_and_any_adapter(config, monkeypatch, method, format, adapter):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: torch.bfloat16)
    model = attach(models.skeleton(config("llama", 2)), method, format=format, adapter=adapter)
    assert plan(config("llama", 2), method, format=format, adapter=adapter, length=24) == measure(model, 1, 24)


def test_a_model_of_one_layer_or_of_unlike_layers_is_planned_whole(config, prepared):
    step = {"batch": 1, "length": 24, "dtype": torch.float32}
    planned = plan(config("llama", 1), "l4q", **settings("l4q"), **step)
    assert planned == measure(prepared("llama", "l4q", layers=1), 1, 24)
    mixed = config("qwen2")
    mixed.layer_types, mixed.sliding_window = ["full_attention", "full_attention", "sliding_attention"], 16
    model = attach(models.skeleton(mixed), "l4q", **settings("l4q"))
    assert plan(mixed, "l4q", **settings("l4q"), **step) == measure(model, 1, 24)


def kept_by_a_layer(config, tokens, rank):
    """Numbers that an fp32 layer with LoRA of this rank (0: L4Q, which keeps no A x) keeps for the backward pass."""
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    cache = config.num_key_value_heads * (width // heads)
    norms = 2 * (width + 1 + width)  # input, reciprocal of its length, output, which q, k, v or gate, up multiply
    attention = width + cache + cache + width + heads  # rotated q and k, v, output (o's input), log of the softmax sum
    gated = 4 * mlp  # gate, up, silu(gate), their product (down's input)
    return tokens * (norms + attention + gated + 7 * rank)


@pytest.mark.parametrize(("method", "rank"), [("lora", RANK), ("qlora", RANK), ("l4q", 0)])
def test_kept_tensors_counted_by_hand(config, prepared, method, rank):
    two, three = (measure(prepared("llama", method, layers=layers), 2, 24).activations for layers in (2, 3))
    assert three - two == 4 * kept_by_a_layer(config("llama"), 48, rank)


@pytest.mark.parametrize("method", ["lora", "l4q", "qat"])
def test_checkpointing_keeps_one_input_for_a_further_layer(prepared, method):
    two, three = (prepared("llama", method, layers=layers) for layers in (2, 3))
    without, more = measure(three, 2, 24), measure(three, 2, 24, checkpointing=True)
    assert more.activations < without.activations
    assert more.activations - measure(two, 2, 24, checkpointing=True).activations == 48 * 32 * 4
    assert more.total - more.activations == without.total - without.activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_l4q_keeps_at_most_what_lora_keeps(prepared, checkpointing):
    lora, l4q, plain = (
        measure(prepared("llama", method, torch.bfloat16), 2, 64, checkpointing=checkpointing).activations
        for method in ("lora", "l4q", "qat-lora")
    )
    assert l4q <= 1.05 * lora < plain


def test_measuring_changes_nothing(prepared):
    model = prepared("llama", "l4q").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = measure(model, 2, 24, checkpointing=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and not model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert measure(model, 2, 24, checkpointing=True) == first


def test_planning_leaves_the_levels_of_formats_real(config):
    formats.levels.cache_clear()
    formats.scale_levels.cache_clear()
    format = Format("nf", 4, BLOCK, double=True)
    plan(config("llama", 1), "qlora", format=format, adapter=Adapter(RANK), length=8)
    weight = torch.randn(8, 32)
    assert (formats.encode(weight, format).decode() - weight).abs().max() < 0.5


def test_llama_7b_counted_by_hand():
    config = CONFIGURATIONS["llama-7b"]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in models.skeleton(config).parameters()) == 6_738_415_616
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    others = 2 * 32000 * 4096 + 65 * 4096  # embeddings and head, norms
    assert linear + others == 6_738_415_616
    inverse_frequencies = 2 * 64 * 4
    lora = plan(config, "lora", adapter=Adapter(4), length=16)
    assert lora.base == 2 * 6_738_415_616 + inverse_frequencies
    adapters = 4 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert lora.trained == lora.gradients == 4 * adapters
    assert lora.optimizer == 8 * adapters + 4 * (2 * 7 * 32)  # two moments, and a step count for every tensor
    nf4 = plan(config, "qlora", format=find("qlora").usual_format(), adapter=Adapter(4), length=16)
    scales = linear // 64 + 4 * linear // (64 * 256) + 32 * 7 * (4 + 64 + 1024)  # with each layer's mean and tables
    assert nf4.base == linear // 2 + scales + 2 * others + inverse_frequencies


def test_7b_answers_on_a_phone_of_6_gb():
    config, nf4 = CONFIGURATIONS["llama-7b"], find("qlora").usual_format()
    cache = 2 * 2 * 32 * 4096  # keys and values, 2 bytes, 32 layers
    deployed = {"format": nf4, "adapter": Adapter(4)}
    weights = inference_bytes(config, "qlora", **deployed, length=1) - cache
    assert inference_bytes(config, "qlora", **deployed, length=2048) == weights + 2048 * cache < 6 * GB
    assert inference_bytes(config, "qlora", **deployed, length=100, batch=3) == weights + 300 * cache
    adapter = 2 * 32 * 4 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    plain = inference_bytes(config, "lora", format=None, adapter=Adapter(4), length=1)
    assert plain == 2 * 6_738_415_616 + adapter + cache
    affine = {"format": find("l4q").usual_format(), "adapter": Adapter(4), "length": 1}
    scales = 8 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 64  # an fp32 scale and an fp32 offset a group
    codes, others = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2, 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert inference_bytes(config, "l4q", **affine) == codes + scales + others + cache


def test_the_commands_text():
    text = memory.plan_text("llama-65b", "qlora", rank=64, batch=1, length=512, checkpointing=True)
    first, *rows, fits, inference, note = text.splitlines()
    assert first == "llama-65b, qlora, NF4 + DQ, rank 64, batch 1 x 512 tokens, with gradient checkpointing"
    sizes = [float(row.split()[-2]) for row in rows]
    assert len(sizes) == 6 and sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.03) and sizes[-1] < 48
    assert (
        fits == "With 1 GB for the driver, that fits cards of 48 GB, 80 GB." and "34.8" in inference and "2^30" in note
    )
    assert "fits no card of 80 GB" in memory.plan_text("llama-7b", "qat")
    tight = memory.plan_text("llama-7b", "qlora")  # 7.4 GB: not beside the driver on a card of 8
    assert "that fits cards of 12 GB, 16 GB" in tight


def test_configurations_by_name(config, tmp_path):
    config("mistral").save_pretrained(tmp_path)
    assert memory.read_config(str(tmp_path)).intermediate_size == 64
    assert memory.read_config(str(tmp_path / "config.json")).model_type == "mistral"
    assert memory.read_config("llama-13b").hidden_size == 5120
    assert memory.read_config("tiny-random").hidden_size == 64


@pytest.mark.parametrize("content", ["{", json.dumps({"hidden_size": 8}), json.dumps({"model_type": "abacus"})])
def test_a_configuration_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json' holds no configuration that can be read \("):
        memory.read_config(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-8b", "model: 'llama-8b' is not known; use smollm2-135m, .* or one of llama-7b, llama-13b"),
        ("nowhere/config.json", "model: 'nowhere/config.json' holds no configuration that can be read"),
    ],
)
def test_a_name_that_leads_nowhere(name, message):
    with pytest.raises(ValueError, match=message):
        memory.read_config(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch: 0 is not allowed; use a whole number from 1 to"),
        ({"length": 1}, "length: 1 is not allowed; use a whole number from 2 to"),
        ({"length": 65}, "length: 65 tokens is longer than the model's context of 64"),
        ({"dtype": torch.float16}, "dtype: torch.float16 is not allowed; use torch.bfloat16 or torch.float32"),
        ({"method": "gptq+lora"}, "method: 'gptq\\+lora' calibrates on tokens; .* plan 'lora' for it"),
        ({"method": "gptq+qa-lora"}, "method: 'gptq\\+qa-lora' calibrates on tokens; .* plan 'lora' for it"),
        ({"adapter": Adapter(RANK, kind="dora")}, "kind: 'dora' cannot be planned on NF4, groups of 16"),
        ({"method": "lorax"}, "method: 'lorax' is not known"),
        ({"format": Format("nf", 4, 7)}, "group: 7 does not divide the row length 32"),
    ],
)
def test_bad_input_of_a_plan(config, change, message):
    given = {"method": "qlora", "format": Format("nf", 4, BLOCK), "adapter": Adapter(RANK), "length": 8} | change
    with pytest.raises(ValueError, match=message):
        plan(config("llama"), given.pop("method"), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "batch: 0 is not allowed"),
        ((1, 1), "length: 1 is not allowed"),
        ((1, 8), "LlamaForCausalLM: no parameter requires gradients"),
    ],
)
def test_bad_input_of_a_measurement(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(models.skeleton(config("llama")).requires_grad_(False), *arguments)


@pytest.mark.parametrize("method", ["lora", "qlora", "qa-lora", "qat-lora", "l4q", "qat", "lsq"])
def test_what_is_deployed_is_counted_without_weights(config, monkeypatch, method):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: torch.float32)
    model = models.skeleton(config("llama"))
    cache = 2 * 2 * 3 * 16  # keys and values, 2 bytes, 3 layers of 2 heads of 8 numbers
    attached = attach(copy.deepcopy(model), method, **settings(method))
    counted = inference_bytes(config("llama"), method, **settings(method), length=5)
    assert counted == stored_bytes(merge(attached)) + 5 * cache


def test_bad_input_of_inference(config):
    with pytest.raises(ValueError, match="length: 0 is not allowed; use a whole number from 1 to"):
        inference_bytes(config("llama"), "lora", format=None, adapter=Adapter(4), length=0)
    with pytest.raises(ValueError, match="bits: 5 is not allowed"):
        find("qlora").usual_format(5)


def test_there_is_a_configuration_of_every_shape_that_settings_may_name():
    assert tuple(CONFIGURATIONS) == SHAPES
