"""Oracles: SciPy's Hadamard matrices, matrix products, and the model before it was rotated."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from studylib.config import Scheme
from studylib.quant.layers import QuantizedLinear, freeze_weights, quantize_model
from studylib.quant.rotation import Rotation, _sylvester, block_of, check_rotatable, factors, rotate_model

SMALL = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
}


@given(st.integers(1, 700))
def test_what_factors_gives_are_hadamard_matrices(order):
    found = factors(order)
    if found is None:
        return
    matrix = torch.kron(*found)
    assert matrix.abs().eq(1).all() and torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_the_orders_that_are_known():
    assert [order for order in range(4, 129, 4) if factors(order) is None] == [52, 92, 100, 116]
    assert all(factors(2**k) is not None for k in range(14))
    assert torch.equal(_sylvester(64), torch.tensor(linalg.hadamard(64)).double())


@pytest.mark.parametrize(
    ("width", "block"), [(576, 576), (1536, 1536), (64, 64), (11008, 256), (14336, 14336), (160, 160), (848, 16)]
)
def test_the_largest_block_that_divides_a_width(width, block):
    assert block_of(width) == block


@pytest.mark.parametrize("width", [8, 15, 17, 97, 6 * 11])
def test_a_width_without_a_block_is_refused(width):
    with pytest.raises(ValueError, match=f"rotated: {width} numbers cannot be rotated"):
        block_of(width)


@pytest.mark.parametrize("width", [64, 576, 848])
def test_a_rotation_is_the_product_with_an_orthogonal_matrix(width):
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (width,)) * 2 - 1
    x, rotation = torch.randn(3, 5, width, dtype=torch.float64), Rotation(width, signs)
    block = torch.kron(*factors(block_of(width))) / block_of(width) ** 0.5
    matrix = torch.diag(signs.double()) @ torch.block_diag(*[block] * (width // len(block)))
    assert torch.allclose(rotation(x), x @ matrix, atol=1e-12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(rotation.back(rotation(x)), x, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert (rotation(x.float()) - rotation(x).float()).abs().max() < 1e-5  # computed in fp32 all the same


def model_of(config, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.2, 3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_model_computes_what_it_did(config, tied):
    model = model_of(config, tie_word_embeddings=tied).double()
    tokens = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(1))
    before, weights = model(tokens).logits, copy.deepcopy(model.state_dict())
    assert rotate_model(model) is model
    assert (model(tokens).logits - before).abs().max() < 1e-6 * before.abs().max()  # norms compute in fp32
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert not any("embed" in name or "lm_head" in name or name == "model.norm.weight" for name in changed)
    assert all(f"model.layers.1.{name}.weight" in changed for name in ("self_attn.v_proj", "mlp.down_proj"))


def test_outliers_are_spread():
    model = model_of(LlamaConfig)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[3] *= 50
    seen = {}
    for name in ("q_proj", "down_proj"):
        for rotated in (False, True):
            own = rotate_model(copy.deepcopy(model)) if rotated else model
            layers = [module for key, module in own.named_modules() if key.endswith(name)]

            def note(module, inputs, key=(name, rotated)):
                x = inputs[0]
                seen[key] = (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()

            handle = layers[0].register_forward_pre_hook(note)
            own(torch.arange(32)[None])
            handle.remove()
    assert all(seen[name, True] < 0.5 * seen[name, False] for name in ("q_proj", "down_proj"))


def test_layers_that_are_put_in_do_on_the_way_what_the_rotated_ones_did():
    model = rotate_model(model_of(LlamaConfig))
    tokens = torch.arange(16)[None]
    before = model(tokens).logits
    quantize_model(model, "8-8-8", Scheme(rotated=True))
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    error = (model(tokens).logits - before).norm() / before.norm()
    assert error < 0.05
    freeze_weights(model)
    assert torch.allclose(model(tokens).logits, model(tokens).logits)


def test_gradients_pass_through():
    model = rotate_model(model_of(LlamaConfig))
    quantize_model(model, "4-4-4", Scheme(rotated=True))
    model(torch.arange(16)[None]).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_what_cannot_be_rotated_is_refused_in_one_line():
    with pytest.raises(ValueError, match="rotated: how to rotate 'gpt2' is not known; use one of llama, mistral"):
        check_rotatable(AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    model = model_of(LlamaConfig, intermediate_size=95)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="rotated: 95 numbers cannot be rotated"):
        rotate_model(model)
    assert all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="keys: 'after-rotary' does not go with rotated"):
        Scheme(rotated=True, keys="after-rotary")
