"""Oracle: lm-eval's own padded batches, in fp32."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from studylib.config.settings import Scheme
from studylib.evaluate import packing as scoring
from studylib.evaluate.packing import log_likelihoods
from studylib.evaluate.scores import PackedLM
from studylib.quant import layers

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "gemma2": {"sliding_window": 8, "head_dim": 8, "final_logit_softcapping": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": {},
}
ALONE = ("lfm2", "mpt", "mamba")  # convolutions, ALiBi, a recurrent state: nothing that can be packed

tokens = st.lists(st.integers(1, 9), min_size=1, max_size=40)
items = st.lists(
    st.tuples(tokens, st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def family():
    """A model of the family, with weights large enough for any leak between sequences to show."""
    made = {}

    def make(name, shape):
        if name not in made:
            config = AutoConfig.for_model(name)
            config = AutoConfig.for_model(
                name, **{key: value for key, value in shape.items() if hasattr(config, key)}, **FAMILIES[name]
            )
            torch.manual_seed(0)
            made[name] = AutoModelForCausalLM.from_config(config).eval()
            for parameter in made[name].parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        return made[name]

    return make


def expected(model, tokenizer, requests):
    return HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)


def assert_same(found, expected, tolerance=1e-4):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=items, row=st.sampled_from([1, 20, 100, 1000]))
def test_any_requests_of_any_family(fp32, family, shape, tiny_tokenizer, monkeypatch, name, items, row):
    monkeypatch.setattr(scoring, "ROW", row)
    model = family(name, shape)
    requests = [((str(i), ""), context, ending) for i, (context, endings) in enumerate(items) for ending in endings]
    found = PackedLM(pretrained=model, tokenizer=tiny_tokenizer)._loglikelihood_tokens(requests)
    assert_same(found, expected(model, tiny_tokenizer, requests))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_packed_where_that_changes_nothing(fp32, family, shape, monkeypatch, name):
    model, rows = family(name, shape), []
    inputs, longest = scoring._Row.inputs, scoring._longest_packed(model)
    assert longest == (0 if name in ALONE else FAMILIES[name].get("sliding_window", torch.inf))
    monkeypatch.setattr(scoring, "_longest_packed", lambda model: longest)
    monkeypatch.setattr(scoring._Row, "inputs", lambda row, model: rows.append(row.tokens) or inputs(row, model))
    log_likelihoods(model, [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([1, 2, 3], [7]), ([1, 2, 8], [4, 5]), ([9], [9])])
    # what a model is given: contexts once, no last token, and nothing at all for endings of one token
    assert rows == ([[1, 2, 3, 4], [1, 2, 8, 4], [9]] if name in ALONE else [[1, 2, 3, 4, 8, 4, 9]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", [None, Scheme(), Scheme(keys=layers.AFTER_ROTARY, cache_scale=layers.PER_HEAD)])
def test_any_attention_function(fp32, tiny_model, tiny_tokenizer, attention, scheme):
    tiny_model.set_attn_implementation(attention)
    if scheme and (attention == "sdpa" or scheme.keys != layers.AFTER_ROTARY):
        layers.quantize_model(tiny_model, "4-8-4", scheme)
    generator = torch.Generator().manual_seed(0)
    contexts = [torch.randint(1, 320, (n,), generator=generator).tolist() for n in (5, 30, 200, 30)]
    requests = [
        (None, context, torch.randint(1, 320, (length,), generator=generator).tolist())
        for context in contexts
        for length in (1, 1, 7, 20)
    ]
    found = log_likelihoods(tiny_model, [request[1:] for request in requests])
    assert_same(found, expected(tiny_model, tiny_tokenizer, requests), 1e-4 if scheme is None else 1e-3)


def test_what_cannot_be_scored(tiny_model, tiny_tokenizer):
    scored = PackedLM(pretrained=tiny_model, tokenizer=tiny_tokenizer)
    for context, continuation in (([1], [2] * 513), ([1], []), ([], [1])):
        with pytest.raises(ValueError, match=f"of {len(continuation)} tokens after {len(context)} cannot"):
            scored._loglikelihood_tokens([(None, context, continuation)])
    assert scored._loglikelihood_tokens([]) == []
