"""GGUF files: gguf's own reader and transformers find in them the weights that were scored, or they are refused."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from studylib.config.settings import Format, Grid, Scheme
from studylib.data import models
from studylib.quant.formats import encode, encode_model
from studylib.quant.grids import quantize
from studylib.quant.layers import decoder_linears, round_to_nearest
from studylib.quant.storage import Codes
from studylib.study import gguf


@given(
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "asymmetric", "full-range"]),
    group=st.sampled_from([None, 32, 64]),
    scale=st.floats(1e-3, 1e2),
    offset=st.one_of(st.none(), st.floats(-2, 2)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_blocks_are_the_codes_but_for_fp16(bits, kind, group, scale, offset, seed):
    grid = Grid(bits, kind, group)
    found = quantize(scale * torch.randn(6, 128, generator=torch.Generator().manual_seed(seed)), grid)
    shift = None if offset is None else torch.full_like(found.scale, offset) * found.scale
    codes = Codes.of_integers(found.codes, bits, grid.low, found.scale, found.zero, shift)
    if (offset is not None and bits > 5) or (kind == "asymmetric" and bits == 8):
        with pytest.raises(
            ValueError, match=f"^format: no block of GGUF has {bits} bits with a .*; use another --format$"
        ):
            gguf.pack(codes)
        return
    kind, rows = gguf.pack(codes)
    away = (torch.from_numpy(dequantize(rows, kind)).double() - codes.decode().double()).abs()
    bound = gguf.rounding_bound(codes)
    assert (away.view(*bound.shape, -1) <= bound[..., None] * (1 + 1e-3)).all()
    affine = codes.zero is not None or offset is not None
    wanted = (("Q4_0", "Q5_0", "Q8_0"), ("Q4_1", "Q5_1", "Q8_0"))[affine][(bits > 4) + (bits > 5)]
    assert kind.name == wanted


def test_scales_that_fp16_holds_come_back_to_the_bit():
    codes = encode(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), Format("int", 4, 32, scale_bits=16))
    kind, rows = gguf.pack(codes)
    assert kind is GGMLQuantizationType.Q4_0 and np.array_equal(dequantize(rows, kind), codes.decode().numpy())


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (encode(torch.randn(2, 64), Format("nf", 4, 32)), "no block of GGUF has such a table of levels"),
        (encode(torch.randn(2, 64), Format("int", 4, 16)), "groups of 16 do not fill GGUF's blocks of 32"),
        (encode(1e9 * torch.randn(2, 64), Format("int", 4, 32)), "a scale is larger than fp16"),
    ],
    ids=["table", "groups", "scale"],
)
def test_codes_that_no_block_holds_are_refused(codes, message):
    with pytest.raises(ValueError, match=f"^format: {message}.*; use another --format$"):
        gguf.pack(codes)


CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "a head of its own": (LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2, with biases": (Qwen2Config, {}),
    "qwen3, with norms of heads": (Qwen3Config, {"head_dim": 128}),
}


@pytest.fixture
def network(shape):
    def make(kind, **fields):
        wide = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.skeleton(kind(**shape | wide | fields)).eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, 1)
        return model

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_was_written(network, byte_tokenizer, tmp_path, name):
    kind, fields = CONFIGS[name]
    model = network(kind, **fields)
    round_to_nearest(model, "4-16-16", Scheme("asymmetric", 32))
    written, moved = gguf.write(tmp_path / "model-Q4_1.gguf", model, byte_tokenizer(), "a name")
    assert written == "Q4_1" and 0 < moved < 0.02
    tokens = torch.arange(48)[None]
    right = model(tokens).logits
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model-Q4_1.gguf", dtype=torch.float32),
        gguf.read(tmp_path, model.config),
    ):
        assert (loaded(tokens).logits - right).abs().max() < 5e-3 * right.abs().max()
    for own, linear in decoder_linears(model).items():
        assert torch.allclose(
            loaded.get_submodule(own).weight, linear.weight, atol=2e-3 * linear.weight.abs().max().item()
        )


def test_the_file_tells_llama_cpp_what_it_asks_for(network, byte_tokenizer, tmp_path):
    tokenizer = byte_tokenizer(bos="<s>", around="<s> $A")
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    model = network(LlamaConfig, rope_parameters=scaling, tie_word_embeddings=True)
    encode_model(model, Format("int", 4, 32))
    gguf.write(tmp_path / "model-Q4_0.gguf", model, tokenizer, "a name")
    reader = GGUFReader(tmp_path / "model-Q4_0.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.name"] == "a name" and told["llama.attention.head_count_kv"] == 2
    assert told["tokenizer.ggml.pre"] == "gpt-2" and told["tokenizer.chat_template"] == tokenizer.chat_template
    assert told["tokenizer.ggml.add_bos_token"] and not told["tokenizer.ggml.add_eos_token"]
    assert told["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    tokens = told["tokenizer.ggml.tokens"]
    assert len(tokens) == 320 and tokens[:260] == tokenizer.convert_ids_to_tokens(range(260))
    assert tokens[260] == "[PAD260]"
    assert told["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1] and told["tokenizer.ggml.token_type"][260] == 5
    assert len(told["tokenizer.ggml.merges"]) == 1  # llama.cpp takes no file without
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "F16" and kinds["output_norm.weight"] == "F32" and "output.weight" not in kinds
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1e4 ** (-torch.arange(8) / 8)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5) and factors[-1] == 8


def test_numbers_beyond_fp16_are_bf16(network, byte_tokenizer, tmp_path):
    model = network(LlamaConfig)
    model.model.embed_tokens.weight.data[0, 0] = 1e5
    assert gguf.write(tmp_path / "model-F16.gguf", model, byte_tokenizer(), "a name") == ("F16", None)
    back = gguf.read(tmp_path, model.config).model.embed_tokens.weight
    assert torch.equal(back, model.model.embed_tokens.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GPT2Config, {}, "GGUF is written for llama, mistral, qwen2 and qwen3, and this is gpt2"),
        (LlamaConfig, {"hidden_act": "gelu"}, "the activation 'gelu' is one that llama.cpp's models here do not have"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "embedding 'dynamic'",
        ),
        (MistralConfig, {"sliding_window": 32}, "attention to the last 32 tokens"),
    ],
)
def test_other_models_are_refused(kind, fields, message, byte_tokenizer):
    with pytest.raises(ValueError, match=f"^format: .*{message}.*; use another --format$"):
        gguf.check(kind(**fields), byte_tokenizer())


def test_tokenizers_are_named_by_how_they_cut_words(byte_tokenizer):
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    for name, own in steps.items():
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(own)
        assert gguf._split(tokenizer) == name
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"llama\.cpp has no name here for how this tokenizer cuts a text"):
        gguf.check(LlamaConfig(), tokenizer)
    with pytest.raises(ValueError, match="puts more around a text than BOS and EOS"):
        gguf.check(LlamaConfig(), byte_tokenizer(around="<|im_start|> $A"))
