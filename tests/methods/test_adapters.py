"""Oracles: dense copies of the layers under autograd, bitsandbytes' own decoding, the papers' equations."""

import copy
import subprocess
import sys

import pytest
import torch
from attached import AFFINE, FULL, NF4, SETTINGS, SMALL, TUNED, logits, loss_of, stir, tokens, train, trained_names
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

from studylib.config.settings import Adapter, Format
from studylib.data import models
from studylib.methods import adapters, attach, merge
from studylib.methods.adapters import split
from studylib.methods.lora import in_bitsandbytes
from studylib.quant.formats import EncodedLinear, encode, encode_model
from studylib.quant.layers import decoder_linears, quantize_model
from studylib.quant.learned import LearnedGridLinear, QALoRALinear
from studylib.train.finetuning import check_paged, check_paging

QLORA_FORMATS = [
    NF4,
    Format("nf", 4, 32, double=True),
    Format("fp-bnb", 4, 32),
    Format("nf", 3, 32),
    Format("nf", 2, 32, double=True),
    Format("int", 4, 32, scale_bits=16),
    Format("affine", 3, None),
]
DOUBLE = 2e-3  # bitsandbytes rounds a scale that lies midway between two of 256 levels the other way


@pytest.mark.parametrize("bits16", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", TUNED)
def test_every_method_trains_what_it_should_and_nothing_else(tiny_model, monkeypatch, method, bits16):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: bits16)
    names = list(decoder_linears(tiny_model))
    assert attach(tiny_model, method, **SETTINGS[method]) is tiny_model
    parts = {
        "qat": ("weight",),
        "lsq": ("weight", "scale"),
        "l4q": ("lora_A", "lora_B", "scale", "offset"),
        "qa-lora": ("lora_A", "lora_B"),
        "gptq+qa-lora": ("lora_A", "lora_B"),
        "efficientqat": ("scale",),
        "qat-lora": ("lora_A.default.weight", "lora_B.default.weight", "base_layer.scale", "base_layer.offset"),
    }.get(method, ("lora_A.default.weight", "lora_B.default.weight"))
    assert trained_names(tiny_model) == {f"{name}.{part}" for name in names for part in parts}
    for parameter in tiny_model.parameters():
        if parameter.is_floating_point():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else bits16)
    assert tiny_model.lm_head.weight is tiny_model.model.embed_tokens.weight
    losses = train(tiny_model)
    assert losses[-1] < losses[0] - 0.1
    assert not tiny_model.training and all(p.grad is None for p in tiny_model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", TUNED)
def test_checkpointing_changes_no_gradient(tiny_model, fp32, method):
    stir(attach(tiny_model, method, **SETTINGS[method])).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(tiny_model).backward()
        gradients.append([p.grad for p in tiny_model.parameters() if p.requires_grad])
        tiny_model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["qlora", "qa-lora", "qat-lora", "l4q"])
def test_only_the_named_layers_get_an_adapter(tiny_model, fp32, method):
    adapter = Adapter(4, layers="q_proj+mlp.down_proj")
    if method == "l4q":
        with pytest.raises(ValueError, match=r"layers: 'q_proj.*' is not allowed for 'l4q'; use 'all'"):
            attach(tiny_model, method, format=AFFINE, adapter=adapter)
        return
    attach(tiny_model, method, format=AFFINE, adapter=adapter)
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in trained_names(tiny_model) if "lora" in n} == {
        "q_proj",
        "down_proj",
    }
    up = tiny_model.model.layers[0].mlp.up_proj
    assert isinstance(up, LearnedGridLinear if method == "qat-lora" else EncodedLinear)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("format", QLORA_FORMATS, ids=lambda format: format.title)
def test_qlora_starts_as_its_quantized_base(tiny_model, fp32, format, kind):
    base = encode_model(copy.deepcopy(tiny_model), format)
    attach(tiny_model, "qlora", format=format, adapter=Adapter(4, kind=kind))
    tolerance = DOUBLE if format.double else 2e-5
    torch.testing.assert_close(logits(tiny_model), logits(base), rtol=tolerance, atol=tolerance)
    layer = tiny_model.model.layers[1].mlp.up_proj.base_layer
    assert type(layer).__name__ == ("Linear4bit" if in_bitsandbytes(format) else "EncodedLinear")


def test_other_methods_start_as_their_bases(tiny_model, fp32):
    def start(method, **settings):
        return logits(attach(copy.deepcopy(tiny_model), method, **(settings or SETTINGS[method])))

    exact = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(start("lora"), logits(tiny_model), **exact)
    torch.testing.assert_close(start("qa-lora"), logits(encode_model(copy.deepcopy(tiny_model), AFFINE)), **exact)
    for format in (FULL, AFFINE):
        started = start("qat-lora", format=format, adapter=SMALL)
        torch.testing.assert_close(started, start("l4q", format=format, adapter=SMALL), **exact)
        torch.testing.assert_close(started, start("lsq", format=format), **exact)
        rounded = logits(encode_model(copy.deepcopy(tiny_model), format))
        torch.testing.assert_close(start("qat", format=format), rounded, **exact)
        if format is AFFINE:  # else L4Q's start uses one end of the range, and GPTQ's grid neither
            torch.testing.assert_close(started, rounded, rtol=1e-4, atol=1e-5)
    gptq = start("gptq+lora", format=FULL, adapter=SMALL, tokens=tokens)
    torch.testing.assert_close(start("gptq+qa-lora"), gptq, **exact)
    torch.testing.assert_close(
        start("lora", adapter=Adapter(4, kind="pissa")), logits(tiny_model), rtol=1e-4, atol=1e-5
    )


def test_the_same_seed_gives_the_same_adapter_on_every_base(tiny_model, fp32):
    state = torch.get_rng_state()

    def first(method, seed):
        model = attach(copy.deepcopy(tiny_model), method, **SETTINGS[method], seed=seed)
        return model.model.layers[1].mlp.down_proj.lora_A.default.weight

    assert torch.equal(first("lora", 3), first("qlora", 3)) and torch.equal(first("lora", 3), first("gptq+lora", 3))
    assert not torch.equal(first("lora", 3), first("lora", 4))
    assert torch.equal(torch.get_rng_state(), state)


# --- bitsandbytes and peft --------------------------------------------------------------------------------------------


def cosine(one, other):
    return F.cosine_similarity(torch.cat([g.flatten() for g in one]), torch.cat([g.flatten() for g in other]), dim=0)


def adapter_gradients(model):
    model.train()
    loss_of(model).backward()
    return [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("bits16", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_evaluation_before_training_leaves_bitsandbytes_gradients_right(tiny_model, monkeypatch, kind, bits16):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: bits16)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # the processors that have the trap
    dense = copy.deepcopy(tiny_model)
    for linear in decoder_linears(dense).values():
        linear.weight.data = encode(linear.weight, NF4).decode()
    attach(dense, "lora", adapter=Adapter(4, kind=kind))
    attach(tiny_model, "qlora", format=NF4, adapter=Adapter(4, kind=kind))
    codes = tiny_model.model.layers[0].mlp.up_proj.base_layer.weight.data.clone()
    stir(dense), stir(tiny_model)
    logits(tiny_model.eval())
    assert torch.equal(tiny_model.model.layers[0].mlp.up_proj.base_layer.weight.data, codes)
    assert cosine(adapter_gradients(tiny_model), adapter_gradients(dense)) > 0.99


def test_bitsandbytes_stores_and_computes_what_our_formats_do(tiny_model, fp32, monkeypatch):
    theirs = stir(attach(copy.deepcopy(tiny_model), "qlora", format=NF4, adapter=SMALL))
    monkeypatch.setattr(adapters, "in_bitsandbytes", lambda format: False)
    ours = stir(attach(tiny_model, "qlora", format=NF4, adapter=SMALL))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    pairs = zip(theirs.modules(), ours.modules(), strict=True)
    layers = [(a.base_layer, b.base_layer) for a, b in pairs if isinstance(a, LoraLayer)]
    assert len(layers) == 14
    for a, b in layers:
        assert torch.equal(a.weight.data.flatten(), b.codes().codes)
        assert torch.equal(a.weight.quant_state.absmax.flatten(), b.codes().scales)


@pytest.mark.parametrize("format", QLORA_FORMATS, ids=lambda format: format.title)
def test_adapters_gradients_on_any_base_are_those_of_a_dense_model_in_float64(tiny_model, fp32, format):
    dense = copy.deepcopy(tiny_model)
    for linear in decoder_linears(dense).values():
        linear.weight.data = encode(linear.weight, format).decode()
    stir(attach(dense, "lora", adapter=SMALL)).double()
    stir(attach(tiny_model, "qlora", format=format, adapter=SMALL))
    for found, expected in zip(adapter_gradients(tiny_model), adapter_gradients(dense), strict=True):
        expected = expected.float()
        assert (found - expected).norm() < (DOUBLE if format.double else 1e-4) * expected.norm()


def test_layers_with_biases_are_adapted_too(shape, fp32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    for method in TUNED:
        settings = dict(SETTINGS[method])
        if "format" in settings:
            settings["format"] = Format(settings["format"].kind, 4, 16)
        made = stir(attach(copy.deepcopy(model), method, **settings))
        before = logits(made)
        torch.testing.assert_close(logits(merge(made)), before, rtol=1e-2, atol=5e-3)


def test_a_new_process_imports_peft_and_bitsandbytes_only_where_they_are_used_and_in_silence(tmp_path):
    code = """
import sys
from studylib.data import models
from studylib.study import run, schedule
from studylib.config.settings import Adapter, Format
from studylib.methods import attach
model = models.load_model("tiny-random")
assert not {"peft", "bitsandbytes", "llmcompressor"} & set(sys.modules)
attach(model, "qlora", format=Format("nf", 4, 32), adapter=Adapter())
assert {"peft", "bitsandbytes"} < set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


# --- PiSSA and LoftQ --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_pissa_takes_the_largest_singular_values_and_leaves_the_rest_to_be_rounded(tiny_model, fp32, alpha):
    original = copy.deepcopy(tiny_model)
    attach(tiny_model, "qlora", format=NF4, adapter=Adapter(4, alpha, kind="pissa"))
    for name, linear in decoder_linears(original).items():
        layer = tiny_model.get_submodule(name)
        product = alpha / 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight
        u, s, vh = torch.linalg.svd(linear.weight)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        left = (linear.weight - product).norm()
        assert left < 1.01 * (linear.weight - best).norm()
        rest, _, _ = split(linear.weight, NF4, Adapter(4, alpha, kind="pissa"))
        torch.testing.assert_close(rest + product, linear.weight, rtol=0, atol=1e-6)
        assert torch.equal(layer.base_layer.weight.data.flatten(), encode(rest, NF4).codes)


@pytest.mark.parametrize("format", [NF4, Format("nf", 2, 32), Format("affine", 3, 32)], ids=lambda f: f.title)
def test_loftq_is_nearer_to_the_weights_than_rounding_alone(tiny_model, fp32, format):
    original = copy.deepcopy(tiny_model)
    attach(tiny_model, "qlora", format=format, adapter=Adapter(8, kind="loftq"))
    for name, linear in decoder_linears(original).items():
        layer = tiny_model.get_submodule(name)
        base = encode(split(linear.weight, format, Adapter(8, kind="loftq"))[0], format).decode()
        start = base + 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight
        assert (start - linear.weight).norm() < 0.95 * (encode(linear.weight, format).decode() - linear.weight).norm()


# --- QA-LoRA and QAT-LoRA ---------------------------------------------------------------------------------------------


def test_qa_lora_merges_into_the_zero_points_exactly(tiny_model, fp32):
    layer = QALoRALinear(EncodedLinear(tiny_model.model.layers[0].mlp.down_proj, AFFINE), Adapter(4, 8.0)).double()
    layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merged = layer.dense()
    torch.testing.assert_close(F.linear(x, merged), layer(x), rtol=1e-12, atol=1e-12)
    pooled = x.view(3, 5, 5, 32).sum(-1)  # Algorithm 1: AvgPool1d times the group's size
    expected = layer.base(x) + 8 / 4 * pooled @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    change = (merged - layer.base.codes().decode(torch.float64)).view(64, 5, 32)
    torch.testing.assert_close(change, change[..., :1].expand_as(change), rtol=0, atol=1e-12)  # a zero point a group


@pytest.mark.parametrize("format", [FULL, AFFINE], ids=lambda format: format.title)
def test_qa_lora_on_a_base_of_gptq_deploys_what_it_computed(tiny_model, fp32, format):
    attach(tiny_model, "gptq+qa-lora", format=format, adapter=SMALL, tokens=tokens)
    stir(tiny_model)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1))
    layer = tiny_model.model.layers[1].mlp.down_proj
    stored, base = layer.codes(), layer.base.codes()
    assert layer.group == 32 and stored.zeros is None and torch.equal(stored.codes, base.codes)
    torch.testing.assert_close(F.linear(x, stored.decode()), layer(x), rtol=1e-5, atol=1e-5)
    change = (stored.decode().double() - base.decode().double()).view(64, 5, 32)
    torch.testing.assert_close(change, change[..., :1].expand_as(change), rtol=0, atol=1e-6)  # one number a group
    before = logits(tiny_model)
    torch.testing.assert_close(logits(merge(tiny_model)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [FULL, AFFINE], ids=lambda format: format.title)
def test_qat_with_learned_steps_has_the_gradients_of_autograd_in_float64(tiny_model, fp32, format):
    attach(tiny_model, "lsq", format=format)
    layer = tiny_model.model.layers[0].mlp.down_proj
    assert (layer.offset is None) == (format is FULL)
    layer.scale.data *= 0.6  # some weights are clipped now
    x, dy = (torch.randn(7, width, generator=torch.Generator().manual_seed(width)) for width in (160, 64))
    layer(x).backward(dy)
    weight, scale = (p.detach().double().requires_grad_() for p in (layer.weight, layer.scale))
    offset = 0 if layer.offset is None else layer.offset.detach().double()
    w = ((weight.view(64, 5, 32) - offset) / scale).clamp(-8, 7)
    exact = F.linear(x.double(), ((w + (w.round() - w).detach()) * scale + offset).flatten(1))
    exact.backward(dy.double())
    assert 0.01 < (weight.grad == 0).double().mean() < 0.5
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-4)


def test_qat_lora_learns_scale_and_offset_by_the_gradients_of_the_l4q_paper(tiny_model):
    layer = LearnedGridLinear(tiny_model.model.layers[0].mlp.down_proj, 3, 32, torch.float32).double()
    layer.scale.data *= 0.6  # some weights are clipped now
    layer.offset.data += 0.003
    x = torch.randn(7, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    w = (layer.weight.view(64, 5, 32) - layer.offset) / layer.scale
    levels = w.clamp(-4, 3).round()
    inside = (w >= -4) & (w <= 3)
    g = (dy.T @ x).view(64, 5, 32)
    assert 0.02 < 1 - inside.double().mean() < 0.5
    torch.testing.assert_close(layer.dense(), (levels * layer.scale + layer.offset).flatten(1))
    torch.testing.assert_close(layer.scale.grad, (g * (levels - w * inside)).sum(-1, keepdim=True))
    torch.testing.assert_close(layer.offset.grad, (g * ~inside).sum(-1, keepdim=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("vera", {}, "method: 'vera' is not known; use one of lora, qlora"),
        ("qlora", {"format": None}, "format: missing for 'qlora'"),
        ("lora", {"format": NF4}, "format: NF4, groups of 32 is not allowed for 'lora'"),
        ("lora", {"adapter": None}, "adapter: missing for 'lora'"),
        ("qat", {"adapter": SMALL}, "adapter: not allowed for 'qat'"),
        ("qa-lora", {"format": NF4}, "format: 'nf' is not allowed for 'qa-lora'; use 'int-full' or 'affine'"),
        ("qat", {"format": Format("int", 4, 32)}, "format: 'int' is not allowed for 'qat'; use 'int-full' or 'aff"),
        ("lsq", {"format": NF4}, "format: 'nf' is not allowed for 'lsq'; use 'int-full' or 'affine'"),
        ("l4q", {"format": Format("int", 4, 32)}, "format: 'int' is not allowed for 'l4q'; use 'int-full' or 'aff"),
        (
            "l4q",
            {"adapter": Adapter(4, init="l4q")},
            "init: 'l4q' is how scales of full-range Int4, groups of 32 start by default; leave it out",
        ),
        (
            "l4q",
            {"format": Format("affine", 4, 32, double=True)},
            r"\+ DQ, groups of 32 is not allowed for 'l4q'; use fp32",
        ),
        ("gptq+lora", {"format": NF4}, "format: 'nf' is not allowed for 'gptq\\+lora'; use 'int-full' or 'aff"),
        ("gptq+lora", {"tokens": None}, "tokens: missing; its base is calibrated on them"),
        ("qlora", {"tokens": tokens}, "tokens: 'qlora' takes none"),
        ("qlora", {"format": Format("nf")}, "group: 64 does not divide the row length 160"),
        ("l4q", {"format": Format("affine", 4, 48)}, "group: 48 does not divide the row length 64"),
        ("lora", {"adapter": Adapter(4, kind="loftq")}, "kind: 'loftq' is not allowed for 'lora', whose base"),
        ("qa-lora", {"adapter": Adapter(4, kind="dora")}, "kind: 'dora' is not allowed for 'qa-lora'; use 'lora'"),
        ("qlora", {"adapter": Adapter(4, init="symmetric")}, "init: 'symmetric' is not allowed for 'qlora'; use None"),
        ("l4q", {"adapter": Adapter(4, dropout=0.1)}, "dropout: 0.1 is not allowed for 'l4q'; use 0"),
        (
            "lora",
            {"adapter": Adapter(4, layers="q_proj+c_attn")},
            "layers: the model has no 'c_attn'; use 'all', or .*v_p",
        ),
        ("lora", {"adapter": Adapter(4, layers="lm_head")}, "layers: the model has no 'lm_head'"),
        (
            "lora",
            {"adapter": Adapter(33, kind="pissa")},
            "rank: 33 is not allowed with 'pissa'; .*k_proj has 32 singular",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_changes(tiny_model, method, changes, message):
    with pytest.raises(ValueError, match=message):
        attach(tiny_model, method, **(SETTINGS.get(method, {}) | changes))
    assert str(tiny_model) == str(models.load_model("tiny-random"))
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


@pytest.mark.parametrize("method", TUNED)
def test_a_model_that_is_quantized_or_adapted_already_is_refused(tiny_model, method):
    for made in (
        attach(copy.deepcopy(tiny_model), method, **SETTINGS[method]),
        quantize_model(copy.deepcopy(tiny_model), "4-16-16"),
        encode_model(copy.deepcopy(tiny_model), NF4),
    ):
        with pytest.raises(ValueError, match="quantized or adapted already; load it anew"):
            attach(made, method, **SETTINGS[method])


def test_paging_of_nothing_is_refused():
    check_paged([16 * 4096, 16 * 11008])
    with pytest.raises(ValueError, match="100,000 numbers or more, and the largest that is trained has 88,064; use a"):
        check_paged([8 * 4096, 8 * 11008])


def test_paging_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="paging needs CUDA, and there is none here"):
        check_paging()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_paging()
