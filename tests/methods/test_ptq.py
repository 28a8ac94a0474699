import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from studylib.config.settings import Format, Grid, Scheme
from studylib.data import corpora
from studylib.methods import ptq
from studylib.quant import round_to_nearest
from studylib.quant.formats import encode_model
from studylib.quant.layers import QuantizedLinear, decoder_linears, quantize_model

METHODS = {
    "smoothquant": ptq.smoothquant,
    "gptq": lambda model, tokens: ptq.gptq(model, "4-8-4", tokens),
    "awq": lambda model, tokens: ptq.awq(model, "4-8-4", tokens),
    "autoround": lambda model, tokens: ptq.autoround(model, "4-8-4", tokens),
}
tokens = torch.randint(0, 320, (6, 24), generator=torch.Generator().manual_seed(1))


def build(config):
    """A random model with activations as trained ones have: channels are correlated, and some are much larger."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        embedding = model.get_input_embeddings().weight.data
        embedding += 2 * embedding[:, :8] @ torch.randn(8, embedding.shape[1])
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.data.uniform_(0.5, 2)
                parameter.data[::8] *= 20
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.1)
    return model


@pytest.fixture
def llama(shape):
    return build(LlamaConfig(**shape, tie_word_embeddings=True))


@pytest.fixture
def wide(shape):
    """As AutoRound takes them."""
    return build(LlamaConfig(**shape | {"num_key_value_heads": 4, "intermediate_size": 64}, tie_word_embeddings=True))


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3", "llama without groups"])
def model(request, shape):
    return build(
        {
            "llama": LlamaConfig(**shape, tie_word_embeddings=True),
            "mistral": MistralConfig(**shape, sliding_window=16),
            "qwen2": Qwen2Config(**shape),
            "qwen3": Qwen3Config(**shape, head_dim=16),
            "llama without groups": LlamaConfig(**shape | {"num_key_value_heads": 4}, attention_bias=True),
        }[request.param]
    )


@torch.no_grad()
def inputs_of(model, tokens):
    """What goes into each decoder linear, by name: [N T, in]."""
    seen = {}
    hooks = [
        linear.register_forward_hook(lambda module, args, out, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, linear in decoder_linears(model).items()
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def logits(model, tokens=tokens):
    return model(tokens, use_cache=False).logits


def spread(x):
    """How far the largest channel is above the usual one."""
    largest = x.abs().amax(0)
    return (largest.max() / largest.median()).item()


def test_smoothquant_keeps_the_function_and_flattens_the_inputs(model):
    before, original = inputs_of(model, tokens), copy.deepcopy(model)
    ptq.smoothquant(model, tokens)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-5)
    after = inputs_of(model, tokens)
    for name in before:
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert spread(after[name]) < 0.6 * spread(before[name])
        else:
            torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_smoothquant_scales_agree_with_float64(llama, strength):
    x = {name: seen.double().numpy() for name, seen in inputs_of(llama, tokens).items()}
    before = copy.deepcopy(llama.state_dict())
    ptq.smoothquant(llama, tokens, strength)
    after = llama.state_dict()
    for norm, layers in (
        ("model.layers.0.input_layernorm", [f"model.layers.0.self_attn.{c}_proj" for c in "qkv"]),
        ("model.layers.1.post_attention_layernorm", [f"model.layers.1.mlp.{c}_proj" for c in ("gate", "up")]),
    ):
        inputs = x[layers[0]]
        weight = np.concatenate([before[f"{layer}.weight"].double().numpy() for layer in layers])
        largest = np.abs(weight).max(0)
        exact = (inputs.max(0) - inputs.min(0)) ** strength / (2 * largest) ** (1 - strength)
        found = (before[f"{norm}.weight"].double() / after[f"{norm}.weight"].double()).numpy()
        np.testing.assert_allclose(found, exact, rtol=1e-3)  # x was computed in fp32
        for layer in layers:
            np.testing.assert_allclose(
                after[f"{layer}.weight"], before[f"{layer}.weight"].double().numpy() * found, rtol=1e-4
            )
        equation_4 = np.abs(inputs).max(0) ** strength / largest ** (1 - strength)
        factor = found / equation_4 / 2 ** (2 * strength - 1)
        assert (factor < 1.001).all() and (factor > 0.999 * 0.5**strength).all()


def test_smoothquant_helps_rounding_on_real_text(language_model):
    model, tokenizer = language_model
    calibration = corpora.windows("c4", tokenizer, 128, 4, "training")
    text = corpora.windows("wikipedia", tokenizer, 128, 2, "evaluation")
    smoothed = ptq.smoothquant(copy.deepcopy(model), calibration)
    plain = F.log_softmax(logits(model, text), -1)
    assert (F.log_softmax(logits(smoothed, text), -1) - plain).abs().max() < 1e-3

    def divergence(rounded):
        return F.kl_div(F.log_softmax(logits(rounded, text), -1), plain, log_target=True, reduction="sum").item()

    error = divergence(round_to_nearest(copy.deepcopy(model), "8-8-16"))
    assert divergence(round_to_nearest(smoothed, "8-8-16")) < 0.8 * error


def test_a_smoothed_model_can_be_trained(llama):
    quantize_model(ptq.smoothquant(llama, tokens), "4-8-4")
    llama(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in llama.parameters())


def output_error(x, rounded, exact):
    return (F.linear(x, rounded) - F.linear(x, exact)).square().sum()


def on_gptq_grid(weight, bits):
    """Rounded to the nearest of -2^(b-1)..2^(b-1)-1 times max|row| / (2^(b-1) - 0.5)."""
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_beats_rounding_on_its_own_grid(model, bits):
    original, inputs = copy.deepcopy(model), inputs_of(model, tokens)
    ptq.gptq(model, f"{bits}-16-16", tokens)
    for name, layer in decoder_linears(model).items():
        before = original.get_submodule(name).weight
        codes = layer.weight / (before.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5))
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.round().min() >= -(2 ** (bits - 1)) and codes.round().max() <= 2 ** (bits - 1) - 1
        if name.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")):
            x = inputs[name]  # later layers see the error of those before
            nearest = on_gptq_grid(before, bits)
            assert output_error(x, layer.weight, before) < 0.8 * output_error(x, nearest, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int-full", "affine"])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_in_groups_keeps_to_the_levels_of_each(model, bits, kind):
    original, inputs, symmetric = copy.deepcopy(model), inputs_of(model, tokens), kind == "int-full"
    ptq.gptq(model, f"{bits}-16-16", tokens, Format(kind, bits, 16))
    for name in decoder_linears(model):
        before, after = (m.get_submodule(name).weight.unflatten(1, (-1, 16)) for m in (original, model))
        low, high = before.amin(2, keepdim=True).clamp(max=0), before.amax(2, keepdim=True).clamp(min=0)
        step = torch.maximum(-low, high) * 2 / (2**bits - 1) if symmetric else (high - low) / (2**bits - 1)
        codes = after / step
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert (codes.amax(2) - codes.amin(2)).round().max() <= 2**bits - 1
        if name.endswith("layers.0.self_attn.q_proj"):
            zero = (-low / step).round() if not symmetric else 2.0 ** (bits - 1)
            nearest = ((before / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step
            x = inputs[name]
            error, of_nearest = (output_error(x, w.flatten(1), before.flatten(1)) for w in (after, nearest))
            assert error < 0.8 * of_nearest


def test_gptq_without_a_format_has_full_range_integers_one_scale_a_channel(llama):
    plain, told = (copy.deepcopy(llama) for _ in range(2))
    ptq.gptq(plain, "4-16-16", tokens)
    ptq.gptq(told, "4-16-16", tokens, Format("int-full", 4, None))
    for name, layer in decoder_linears(plain).items():
        own = told.get_submodule(name)
        assert torch.equal(own.weight, layer.weight) and torch.equal(own.codes().codes, layer.codes().codes)


@pytest.mark.parametrize("kind", ["int-full", "affine"])
def test_awq_rounds_to_its_format_and_beats_rounding_alone(llama, kind):
    format = Format(kind, 3, 16)
    exact, nearest = logits(llama), logits(encode_model(copy.deepcopy(llama), format))
    ptq.awq(llama, "3-16-16", tokens, format)
    assert (logits(llama) - exact).square().mean() < 0.9 * (nearest - exact).square().mean()
    for layer in decoder_linears(llama).values():
        stored = layer.codes()
        assert torch.equal(stored.decode(), layer.weight) and stored.groups == layer.in_features // 16
        assert (stored.zeros is None) == (kind == "int-full") and stored.integers.unique().numel() == 8


@pytest.mark.parametrize("kind", ["int-full", "affine"])
def test_autoround_rounds_to_its_format_and_beats_rounding(wide, kind):
    """Its zero points, which llm-compressor drops, give back what was rounded."""
    format, state = Format(kind, 3, 16), torch.random.get_rng_state()
    exact, nearest = logits(wide), logits(encode_model(copy.deepcopy(wide), format))
    ptq.autoround(wide, "3-16-16", tokens, format)
    assert (logits(wide) - exact).square().mean() < 0.9 * (nearest - exact).square().mean()
    assert torch.equal(torch.random.get_rng_state(), state)
    for layer in decoder_linears(wide).values():
        stored = layer.codes()
        assert torch.equal(stored.decode(), layer.weight) and stored.groups == layer.in_features // 16
        assert (stored.zeros is None) == (kind == "int-full") and stored.integers.unique().numel() == 8


def test_a_layer_that_autoround_would_leave_as_it_is_is_named(llama):
    message = "model: model.layers.0.self_attn.k_proj is 16 x 32: AutoRound leaves it as it is, for it takes mult"
    with pytest.raises(ValueError, match=message):
        ptq.autoround(llama, "4-16-16", tokens)


@pytest.mark.parametrize(("method", "name"), [(ptq.gptq, "GPTQ"), (ptq.awq, "AWQ"), (ptq.autoround, "AutoRound")])
def test_formats_that_they_do_not_take_are_refused_and_nothing_changes(llama, method, name):
    before = copy.deepcopy(llama.state_dict())
    for bits, format, message in (
        ("4-16-16", Format("nf", 4, 16), f"format: 'nf' is not allowed for {name}; use 'int-full' or 'affine'"),
        ("4-16-16", Format("int", 4, 16), f"format: 'int' is not allowed for {name}; use 'int-full' or 'affine'"),
        (
            "4-16-16",
            Format("affine", 4, 16, double=True),
            rf"format: affine Int4 \+ DQ, .* for {name}; use fp32 scales",
        ),
        (
            "4-16-16",
            Format("int-full", 4, 16, scale_bits=16),
            f"format: .*16-bit scales .* for {name}; use fp32 scales",
        ),
        ("3-16-16", Format("affine", 4), "bits: 3-16-16 does not go with the format affine Int4; use 4-16-16"),
        ("4-8-8", Format("affine", 4), "bits: 4-8-8 does not go with the format affine Int4; use 4-16-16"),
        ("4-16-16", Format("affine", 4, 48), "group: 48 does not divide the row length 32"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            method(llama, bits, tokens, format)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("bits", ["4-8-4", "4-16-16"])
def test_gptq_rounds_activations_and_cache_as_rtn_does(llama, bits):
    nearest = round_to_nearest(copy.deepcopy(llama), bits)
    ptq.gptq(llama, bits, tokens)
    assert str(llama) == str(nearest)  # the same layers and grids
    layer = llama.model.layers[0].self_attn.v_proj
    assert layer.weight_grid is None and layer.output_grid == (Grid(4) if bits == "4-8-4" else None)


def test_gptq_takes_another_grid_for_activations_and_cache(llama):
    ptq.gptq(llama, "4-8-4", tokens, scheme=Scheme(activations="asymmetric"))
    layer = llama.model.layers[0].self_attn.v_proj
    assert (layer.activation_grid, layer.output_grid) == (Grid(8, "asymmetric"), Grid(4, "asymmetric"))
    assert layer.weight_grid is None and layer.stored.low == -8 and layer.stored.zeros is None


@pytest.mark.parametrize("group", [None, 16])
def test_training_begins_with_the_integers_and_scales_that_gptq_left(llama, group):
    """The lowest of full-range integers, which LSQ's own grid has not, among them. No weight counts as clipped."""
    ptq.gptq(llama, "3-16-16", tokens, Format("int-full", 3, group))
    layer = llama.model.layers[0].mlp.up_proj
    stored = layer.stored
    layer.learn_steps()
    assert layer.grid_parameters == [layer.weight_step] and stored.integers.min() == -4 and stored.integers.max() == 3
    assert torch.equal(layer.codes().integers, stored.integers)
    torch.testing.assert_close(layer.codes().scales, stored.scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.dense(), stored.decode(), rtol=1e-6, atol=0)
    asked = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    (layer.dense() * asked).sum().backward()
    assert torch.equal(layer.weight.grad, asked) and layer.weight_step.grad.abs().max() < 1e-5  # on its levels already


def test_awq_keeps_the_function_until_it_rounds(model, monkeypatch):
    original = copy.deepcopy(model)
    monkeypatch.setattr("studylib.quant.round_to_nearest", lambda model, bits: model)
    ptq.awq(model, "4-8-4", tokens)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-5)
    changed = {
        name.rsplit(".", 1)[-1]
        for name, layer in decoder_linears(model).items()
        if not torch.equal(layer.weight, original.get_submodule(name).weight)
    }
    assert changed >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_awq_beats_rounding(model):
    exact, nearest = logits(model), round_to_nearest(copy.deepcopy(model), "4-16-16")
    ptq.awq(model, "4-16-16", tokens)
    assert (logits(model) - exact).square().mean() < 0.8 * (logits(nearest) - exact).square().mean()
    for layer in decoder_linears(model).values():
        assert isinstance(layer, QuantizedLinear) and all(len(row.unique()) <= 15 for row in layer.weight.detach())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(wide, method, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    wide.lm_head.weight.requires_grad = False
    plain, parameters = copy.deepcopy(wide), dict(wide.named_parameters())
    forward, random_state = type(wide).forward, torch.get_rng_state()
    assert METHODS[method](wide, tokens) is wide

    from llmcompressor.core import active_session
    from llmcompressor.pipelines.cache import IntermediatesCache

    again = METHODS[method](copy.deepcopy(plain), tokens)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in wide.named_parameters())  # deterministic
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert active_session().state.model is None and not active_session().lifecycle.recipe.modifiers
    assert IntermediatesCache.pin_memory.__qualname__ == "IntermediatesCache.pin_memory"

    expected = plain if method == "smoothquant" else round_to_nearest(plain, "4-8-4")
    assert type(wide).forward is forward and not wide.training
    assert {name: id(p) for name, p in wide.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert list(wide.state_dict()) == list(expected.state_dict())
    assert wide.config.to_dict() == expected.config.to_dict()
    for (name, module), (_, other) in zip(wide.named_modules(), expected.named_modules(), strict=True):
        assert type(module) is type(other) and vars(module).keys() == vars(other).keys(), name
        assert type(module._parameters) is dict and not module._forward_hooks and not module._forward_pre_hooks
    for name, parameter in wide.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.device == plain.device
        assert parameter.requires_grad == plain.get_parameter(name).requires_grad


def test_a_new_process_imports_llm_compressor_only_where_it_is_used_and_in_silence(tmp_path):
    code = """
import sys, torch
from studylib.data import models
from studylib.methods import ptq
assert "llmcompressor" not in sys.modules and "compressed_tensors" not in sys.modules
ptq.gptq(models.load_model("tiny-random"), "4-8-4", torch.arange(48).view(2, 24))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_calibrate_is_refused(wide, shape, method):
    run, before = METHODS[method], copy.deepcopy(wide.state_dict())
    for wrong in (tokens[:0], tokens[0], tokens[:, :0], tokens.float()):
        with pytest.raises(ValueError, match=r"tokens: torch\..* is not allowed; use int64 \[N, T\]"):
            run(wide, wrong)
    with pytest.raises(ValueError, match="quantized already"):
        run(round_to_nearest(copy.deepcopy(wide), "4-16-16"), tokens)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        run(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=320)), tokens)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


def test_settings_that_make_no_sense_are_refused(llama):
    for method, name in ((ptq.gptq, "GPTQ"), (ptq.awq, "AWQ"), (ptq.autoround, "AutoRound")):
        with pytest.raises(ValueError, match=rf"16 \(off\) is not allowed for {name}"):
            method(llama, "16-8-8", tokens)
    for strength in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"strength: {strength} is not allowed"):
            ptq.smoothquant(llama, tokens, strength)
    small = OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    for method in ("smoothquant", "awq"):
        with pytest.raises(ValueError, match="'opt'; use one of llama, mistral, qwen2, qwen3"):
            METHODS[method](AutoModelForCausalLM.from_config(small), tokens)
