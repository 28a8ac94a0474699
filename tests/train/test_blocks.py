"""Blocks trained one by one, beside rounding to nearest and beside hidden states of whole models."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig

from studylib.config.settings import Format
from studylib.data.corpora import windows
from studylib.quant.formats import decode_model, encode_model
from studylib.quant.layers import decoder_linears
from studylib.quant.learned import FixedIntegersLinear, learned_grid_model
from studylib.train.blocks import PASSES, decoder_blocks, train_blocks

FORMATS = {"l4q": Format("int-full", 4, 32), "affine": Format("affine", 3, 32)}  # by how they start


@pytest.fixture
def text(tiny_tokenizer):
    return windows("c4", tiny_tokenizer, 64, 32, "training")


@torch.no_grad()
def outputs(model, tokens):
    """What each block gives, [blocks, N, T, D]."""
    found = []
    hooks = [block.register_forward_hook(lambda *call: found.append(call[2])) for block in model.model.layers]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([output if isinstance(output, torch.Tensor) else output[0] for output in found])


@pytest.mark.parametrize("init", FORMATS)
def test_each_block_is_nearer_to_full_precision_than_rounded_on_windows_it_never_saw(
    fp32, tiny_model, tiny_tokenizer, text, init
):
    unseen = windows("wikipedia", tiny_tokenizer, 64, 8, "evaluation")
    wanted = outputs(tiny_model, unseen)
    rounded = decode_model(encode_model(copy.deepcopy(tiny_model), FORMATS[init]))
    trained = copy.deepcopy(tiny_model)
    train_blocks(trained, text, FORMATS[init], init)
    assert {type(layer) for layer in decoder_linears(trained).values()} == {FixedIntegersLinear}
    error, before = ((outputs(model, unseen) - wanted).square().mean((1, 2, 3)) for model in (trained, rounded))
    assert (error < 0.6 * before).all()


def test_a_block_gets_what_rounded_blocks_give_and_learns_what_full_precision_gave(fp32, tiny_model, text, monkeypatch):
    seen = []
    monkeypatch.setattr(
        F, "mse_loss", lambda own, wanted: seen.append((own.detach(), wanted)) or own.sub(wanted).square().mean()
    )
    trained = copy.deepcopy(tiny_model).requires_grad_(False)
    train_blocks(trained, text[:5], FORMATS["affine"], "affine")
    steps = PASSES * 2  # two batches of two; the fifth window is left out
    assert len(seen) == 2 * steps
    full = outputs(tiny_model, text[:4])
    for block in range(2):
        for step in range(steps):
            torch.testing.assert_close(seen[block * steps + step][1], full[block].split(2)[step % 2])
    begun = learned_grid_model(copy.deepcopy(tiny_model), 3, 32, torch.float32, "affine")
    torch.testing.assert_close(seen[0][0], outputs(begun, text[:2])[0])
    begun.model.layers[0] = trained.model.layers[0]
    torch.testing.assert_close(seen[steps][0], outputs(begun, text[:2])[1])


def test_the_same_windows_give_the_same_numbers_whatever_was_drawn_before(fp32, tiny_model, text):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = copy.deepcopy(tiny_model)
        train_blocks(model, text, FORMATS["l4q"], "l4q")
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_all_but_the_linear_weights_stays(fp32, tiny_model, text):
    before = copy.deepcopy(dict(tiny_model.named_parameters()))
    train_blocks(tiny_model.requires_grad_(False), text[:2], FORMATS["affine"], "affine")
    after = dict(tiny_model.named_parameters())
    kept = before.keys() & after.keys()
    assert kept == {name for name in before if "norm" in name or "embed" in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_decoder_whose_blocks_are_elsewhere_is_refused_unchanged():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32))
    names = list(decoder_linears(opt))
    with pytest.raises(ValueError, match=r"OPTForCausalLM: its layer .* is in none of base_model\.layers") as caught:
        train_blocks(opt, torch.zeros(2, 8, dtype=torch.int64), FORMATS["l4q"], "l4q")
    assert "\n" not in str(caught.value) and list(decoder_linears(opt)) == names
    assert len(decoder_blocks(AutoModelForCausalLM.from_config(GPTNeoXConfig(**small, intermediate_size=48)))) == 1
