"""An exported folder in the engines that are there: what llama.cpp computes is what the study's own model does."""

import dataclasses

import pytest
import torch

from studylib.config.budgets import Decoding, Evaluation
from studylib.config.engines import INSTALL_LLAMA_CPP, llama_cpp_installed
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data import models
from studylib.evaluate import llamacpp
from studylib.evaluate.scores import score
from studylib.methods.adapters import merge
from studylib.methods.arms import build_arm
from studylib.methods.base import GGUF, INTEGERS
from studylib.methods.lora import attach
from studylib.quant.formats import encode_model
from studylib.quant.layers import round_to_nearest
from studylib.study import engines, export, gguf
from studylib.study.records import Store

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32)
TOKENS = torch.arange(64)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_record):
    """An arm's model in GGUF and in compressed-tensors, with its record's own perplexity."""
    folder = tmp_path_factory.mktemp("exported")
    model, tokenizer = models.load_model("tiny-random"), models.load_tokenizer("tiny-random")
    round_to_nearest(model, "4-16-16")
    metrics, _ = score(model, tokenizer, EVALUATION)
    record = make_record("rtn", "4-16-16")
    provenance = record.provenance | {"model": models.identity("tiny-random")}
    arm = dataclasses.replace(record.arm, evaluation=EVALUATION)
    record = dataclasses.replace(record, arm=arm, metrics=metrics, provenance=provenance)
    for name, wanted in (("gguf", GGUF), ("integers", INTEGERS)):
        export.export_model(record, Store(folder / "results"), folder / name, wanted)
    return folder


def test_each_engine_s_perplexity_stands_beside_the_record_s(folders):
    table = engines.run_check(folders / "gguf")
    assert "perplexity on Wikipedia" in table and "| transformers |" in table
    told, wanted = engines.read_note(folders / "gguf")
    for ran in engines.results(folders / "gguf", told, wanted, None):
        if ran.why:
            assert ran.engine == "llama.cpp" and not llama_cpp_installed() and INSTALL_LLAMA_CPP in ran.why
            assert f"llama.cpp: {ran.why}" in table
        else:
            assert ran.perplexity["wikipedia"] == pytest.approx(told["perplexity"]["wikipedia"], rel=5e-3)
            assert ran.seconds > 0


def test_what_an_engine_cannot_read_is_said(folders, tmp_path):
    table = engines.run_check(folders / "integers")
    assert "| transformers |" in table and "llama.cpp: reads GGUF alone; `study export --format gguf`" in table
    with pytest.raises(ValueError, match=r"has no study\.json that can be read; use one that `study export` wrote"):
        engines.run_check(tmp_path)


@pytest.mark.skipif(llama_cpp_installed(), reason="llama.cpp is there")
def test_a_missing_engine_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^llama\.cpp is not installed; use pip install '\.\[llama-cpp\]'$"):
        llamacpp.LlamaCpp(tmp_path / "model.gguf", 64)


def written(model, folder):
    kind, _ = gguf.write(folder / "model.gguf", model, models.load_tokenizer("tiny-random"), "tiny")
    return (folder / "model.gguf").rename(folder / f"model-{kind}.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_llama_cpp_computes_what_the_codes_say(tiny_model, tmp_path, kind):
    pytest.importorskip("llama_cpp")
    if kind in ("Q4_0", "Q4_1"):
        encode_model(tiny_model, Format("int" if kind == "Q4_0" else "affine", 4, 32))
    elif kind != "F16":
        round_to_nearest(tiny_model, f"{kind[1]}-16-16", Scheme("asymmetric" if kind == "Q5_1" else "symmetric", 32))
    path = written(tiny_model, tmp_path)
    assert path.name == f"model-{kind}.gguf"
    right = gguf.read(tmp_path, tiny_model.config)(TOKENS).logits
    found = llamacpp.LlamaCpp(path, 64)(input_ids=TOKENS).logits
    assert found.shape == right.shape
    # activations are rounded to 16 bits beside F16, and to 8 beside all others
    assert (found - right).abs().max() < (1e-3 if kind == "F16" else 2e-2) * right.abs().max()


def test_llama_cpp_takes_an_adapter_beside_integers(tiny_model, tmp_path):
    arm = build_arm_of("gptq+lora", Format("affine", 4, 32))
    tokens = torch.arange(64).repeat(4, 1)
    attach(tiny_model, "gptq+lora", format=arm.format, adapter=arm.adapter, tokens=tokens)
    for name, parameter in tiny_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator().manual_seed(0))
    merge(tiny_model)
    path = written(tiny_model, tmp_path)
    gguf.write_adapter(tmp_path / gguf.ADAPTER, tiny_model, arm.adapter.alpha, "tiny")
    read = gguf.read(tmp_path, tiny_model.config)
    for name, layer in tiny_model.named_modules():
        if getattr(layer, "beside", None) is not None:
            assert torch.allclose(read.get_submodule(name).weight, layer.weight, atol=1e-3)
    right = tiny_model(TOKENS).logits
    assert (read(TOKENS).logits - right).abs().max() < 1e-2 * right.abs().max()
    pytest.importorskip("llama_cpp")
    found = llamacpp.LlamaCpp(path, 64, tmp_path / gguf.ADAPTER)(input_ids=TOKENS).logits
    alone = llamacpp.LlamaCpp(path, 64)(input_ids=TOKENS).logits
    assert (found - right).abs().max() < 2e-2 * right.abs().max() < (alone - right).abs().max()


def build_arm_of(method, format):
    from studylib.config.budgets import profile

    return build_arm(
        profile("smoke"), "tiny-random", method, f"{format.bits}-16-16", format=format, adapter=Adapter(4, 8)
    )


def test_llama_cpp_refuses_in_a_line_and_times_a_token(tiny_model, tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"^llama\.cpp does not take .*model\.gguf"):
        llamacpp.LlamaCpp(tmp_path / "model.gguf", 64)
    engine = llamacpp.LlamaCpp(written(tiny_model, tmp_path), 64, sequences=2)
    assert min(engine.pass_seconds(Decoding(context=8, tokens=4), batch=2)) > 0
