import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from studylib.config.settings import Grid, Scheme
from studylib.quant import layers
from studylib.quant.grids import fake_quantize, initial_step, quantize
from studylib.quant.layers import (
    QuantizedLinear,
    cache_bytes_per_token,
    decoder_linears,
    freeze_weights,
    quantize_model,
    trained_grids,
)
from studylib.quant.storage import stored_bytes

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=16),
    "qwen2": Qwen2Config(**SHAPE),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[request.param])).eval()


tokens = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def numpy_linear(x, weight, bias, bits):
    """x and weight rounded to max|row| / (2^(b-1) - 1) in float64."""

    def rounded(rows, b):
        step = rows.abs().amax(-1, keepdim=True) / (2 ** (b - 1) - 1)
        return torch.round(rows / step) * step

    y = rounded(x.double(), bits[1]) @ rounded(weight.double(), bits[0]).T
    return rounded(y + (0 if bias is None else bias.double()), bits[2])


def test_quantized_linear_agrees_with_float64():
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    x = torch.randn(2, 5, 48)
    ours = QuantizedLinear(linear, Grid(4), Grid(8), Grid(6))(x)
    exact = numpy_linear(x, linear.weight, linear.bias, (4, 8, 6))
    step = exact.abs().amax(-1, keepdim=True) / 31
    assert ((ours - exact).abs() <= 1.001 * step).all()  # a tie may fall on the neighbouring level
    assert ((ours - exact).abs() > 1e-3 * step).float().mean() < 0.02


def test_every_decoder_linear_is_replaced_and_the_rest_stays(model):
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    linears = set(decoder_linears(model))
    quantize_model(model, "4-8-4")
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == linears
    assert len(linears) == 7 * 2
    assert not isinstance(model.lm_head, QuantizedLinear)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    grids = {
        name.rsplit(".")[-1]: module.output_grid
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert {name for name, grid in grids.items() if grid} == {"k_proj", "v_proj"}


def test_sixteen_bits_leave_the_model_untouched(model):
    modules = list(model.modules())
    quantize_model(model, "16-16-16")
    assert list(model.modules()) == modules
    quantize_model(model, "16-16-4")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 4  # k and v of two layers


@torch.no_grad()
def test_quantized_cache_gives_the_same_logits_step_by_step_as_in_one_pass(model):
    quantize_model(model, "4-8-4")
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    steps = [model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(tokens.shape[1])]
    # Sums run in another order, so a value on the edge of two levels may fall on the other one: compare all but those.
    apart = (torch.cat(steps, 1) - whole).abs().amax(-1)
    assert (apart < 1e-4).float().mean() > 0.9
    assert apart.max() < 0.1 * whole.abs().max()


@torch.no_grad()
def test_quantization_does_not_look_into_the_future(model):
    quantize_model(model, "4-8-4")
    other = tokens.clone()
    other[:, 12:] = 5
    torch.testing.assert_close(model(other).logits[:, :12], model(tokens).logits[:, :12])


@torch.no_grad()
def test_keys_are_quantized_per_token_over_all_heads_before_rotary(model):
    seen = {}
    layer = model.model.layers[0].self_attn.k_proj
    reference = copy.deepcopy(layer)
    quantize_model(model, "16-16-4")
    new = model.model.layers[0].self_attn.k_proj
    new.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    model(tokens)
    assert torch.equal(seen["y"], quantize(reference(seen["x"]), Grid(4)).dequantize())
    assert quantize(seen["y"], Grid(4)).scale.shape == (*tokens.shape, 1)


@torch.no_grad()
def test_each_head_may_have_a_scale_of_its_own(model):
    quantize_model(model, "16-16-4", Scheme(cache_scale="head"))
    seen = {}
    layer = model.model.layers[0].self_attn.v_proj
    layer.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    model(tokens)
    plain = nn.functional.linear(seen["x"], layer.weight, layer.bias)
    each = [fake_quantize(part, Grid(4)) for part in plain.unflatten(-1, (2, 16)).unbind(-2)]
    assert torch.equal(seen["y"], torch.cat(each, -1))


@torch.no_grad()
@pytest.mark.parametrize("cache_scale", ["token", "head"])
def test_rotated_keys_are_those_that_transformers_rotates_then_rounded(model, cache_scale, monkeypatch):
    seen = []
    scheme = Scheme(keys="after-rotary", cache_scale=cache_scale)

    def watched(module, query, key, *rest, **settings):
        seen.append(key)
        return sdpa_attention_forward(module, query, key, *rest, **settings)

    monkeypatch.setattr(layers, "sdpa_attention_forward", watched)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :12], past_key_values=cache, use_cache=True)  # the plain model's cache holds keys after rotary
    keys = cache.layers[0].keys
    quantize_model(model, "16-16-4", scheme)
    assert model.model.layers[0].self_attn.k_proj.__class__ is nn.Linear
    model(tokens[:, :12])
    rows = keys.transpose(1, 2).flatten(2)
    expected = fake_quantize(rows, Grid(4, group=16 if cache_scale == "head" else None))
    torch.testing.assert_close(seen[0].transpose(1, 2).flatten(2), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_rotated_keys_give_the_same_logits_step_by_step_as_in_one_pass(model):
    quantize_model(model, "16-16-4", Scheme(keys="after-rotary"))
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    steps = [model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(tokens.shape[1])]
    apart = (torch.cat(steps, 1) - whole).abs().amax(-1)
    assert (apart < 1e-4).float().mean() > 0.9
    other = tokens.clone()
    other[:, 12:] = 5
    torch.testing.assert_close(model(other).logits[:, :12], whole[:, :12])


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("grid", ["lsq", "paretoq"])
def test_learned_scales_are_those_of_the_weights_and_learn(model, grid, group):
    quantize_model(model, "4-8-4", Scheme(grid, group))
    layer = model.model.layers[0].self_attn.k_proj
    assert torch.equal(layer.weight_step, initial_step(layer.weight.detach(), Grid(4, grid, group)))
    model(tokens, labels=tokens).loss.backward()
    learned = {name: p for name, p in model.named_parameters() if name.endswith("_step")}
    assert len(learned) == 2 * 7 and all((p.grad != 0).any() for p in learned.values())
    assert [own for (own,) in trained_grids(model)] == list(learned.values())
    with torch.no_grad():
        whole = model(tokens).logits
        torch.testing.assert_close(freeze_weights(model)(tokens).logits, whole, rtol=1e-4, atol=1e-6)  # of integers


@pytest.mark.parametrize("grid", ["statsq", "lsq", "paretoq"])
def test_beside_a_grid_of_weights_activations_and_cache_are_those_of_the_default(model, grid):
    scheme = Scheme(grid, cache_scale="head", keys="after-rotary")
    plain = quantize_model(copy.deepcopy(model), "4-8-4", Scheme(cache_scale="head", keys="after-rotary"))
    quantize_model(model, "4-8-4", scheme)
    for name, layer in plain.named_modules():
        if isinstance(layer, QuantizedLinear):
            own = model.get_submodule(name)
            assert own.weight_grid == Grid(4, grid)
            assert (own.activation_grid, own.output_grid) == (layer.activation_grid, layer.output_grid)
    assert model.model.layers[0].self_attn.key_grid == Grid(4, group=16)
    assert cache_bytes_per_token(model, "4-8-4", scheme) == cache_bytes_per_token(
        model, "4-8-4", Scheme(cache_scale="head")
    )


def test_schemes_that_make_no_sense_are_refused(model):
    for grid in ("lsq", "paretoq"):
        with pytest.raises(ValueError, match=rf"mask: 2\.0 does not go with the grid '{grid}'"):
            quantize_model(model, "4-8-4", Scheme(grid), mask=2.0)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="needs scaled dot-product attention"):
        quantize_model(model, "4-8-4", Scheme(keys="after-rotary"))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_gradients_are_those_of_the_plain_layer_at_the_quantized_point():
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    layer = QuantizedLinear(linear, Grid(4), Grid(4), None)
    upstream = torch.randn(4, 8)
    layer(x).backward(upstream)
    w_q, x_q = fake_quantize(linear.weight, Grid(4)).detach(), fake_quantize(x, Grid(4)).detach()
    torch.testing.assert_close(linear.weight.grad, upstream.T @ x_q)
    torch.testing.assert_close(x.grad, upstream @ w_q)
    torch.testing.assert_close(linear.bias.grad, upstream.sum(0))


@torch.no_grad()
def test_frozen_weights_give_the_same_outputs(model):
    quantize_model(model, "3-8-4")
    before = model(tokens).logits
    torch.testing.assert_close(freeze_weights(model)(tokens).logits, before, rtol=1e-4, atol=1e-6)  # of integers
    assert len(model.model.layers[0].mlp.up_proj.weight[0].unique()) <= 7


def test_what_cannot_be_quantized_is_refused_and_left_as_it_was(model):
    modules = list(model.modules())
    with pytest.raises(ValueError, match="48 does not divide the row length 64"):
        quantize_model(model, "4-8-4", Scheme(group=48))
    assert list(model.modules()) == modules
    quantize_model(model, "4-8-4", Scheme(group=32))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, "8-8-8")
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_model(gpt2, "4-8-4")


def test_projections_that_are_one_layer_are_not_taken_for_another(model):
    fused = AutoModelForCausalLM.from_config(Phi3Config(**SHAPE, pad_token_id=0))
    with pytest.raises(ValueError, match="no layers named k_proj and v_proj"):
        quantize_model(fused, "4-8-4")
    assert not any(isinstance(module, QuantizedLinear) for module in fused.modules())
    assert cache_bytes_per_token(fused, "16-16-16") == 2 * 2 * 32 * 2  # layers, keys and values, numbers, bytes
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    assert cache_bytes_per_token(AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape)), "16-16-16") == 2 * 2 * 64 * 2


def test_what_would_be_left_out_is_refused(model):
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=2))
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has experts that share a tensor \(model\.layers\.0"):
        quantize_model(experts, "4-8-4")
    sees = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        images = AutoModelForCausalLM.from_config(Gemma3Config(text_config=SHAPE, vision_config=sees))
    with pytest.raises(ValueError, match="is more than a decoder of text"):
        quantize_model(images, "4-8-4")


def test_counted_bytes_equal_bytes_of_the_codes(model):
    linears = decoder_linears(model)
    packed = sum(
        quantize(l.weight.detach(), Grid(4)).codes.numel() // 2 + quantize(l.weight.detach(), Grid(4)).scale.nbytes
        for l in linears.values()
    )
    rest = sum(p.numel() * 2 for p in model.parameters()) - sum(l.weight.numel() * 2 for l in linears.values())

    def counted(bits, scheme=Scheme()):
        return stored_bytes(quantize_model(copy.deepcopy(model), bits, scheme))

    assert counted("4-8-4") == packed + rest
    assert counted("16-8-4") == sum(p.numel() * 2 for p in model.parameters())
    assert cache_bytes_per_token(model, "4-8-4") == 2 * 2 * (32 // 2 + 4)  # layers x (k, v) x (codes + fp32 scale)
    assert cache_bytes_per_token(model, "4-8-16") == 2 * 2 * 32 * 2
    assert cache_bytes_per_token(model, "4-8-4", Scheme(cache_scale="head")) == 2 * 2 * (32 // 2 + 2 * 4)
    grouped = [quantize(l.weight.detach(), Grid(4, "asymmetric", 32)) for l in linears.values()]
    packed = sum(q.codes.numel() // 2 + q.scale.nbytes + q.zero.numel() // 2 for q in grouped)
    assert counted("4-8-4", Scheme("asymmetric", 32)) == packed + rest
