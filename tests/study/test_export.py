"""Exported models: transformers loads what the record scored, in as few bits, or it is refused beforehand."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from studylib.config.arm import Arm
from studylib.config.budgets import Evaluation, profile
from studylib.config.engines import llama_cpp_installed
from studylib.config.settings import (
    BESIDE,
    DEQUANTIZED,
    MERGED_DISTILLED,
    MERGED_QUANTIZED,
    REQUANTIZED,
    Adapter,
    Format,
    Grid,
    Scheme,
)
from studylib.data import models
from studylib.evaluate.scores import score
from studylib.methods import base
from studylib.methods.adapters import merge
from studylib.methods.arms import build_arm, container, title
from studylib.methods.lora import attach
from studylib.quant.formats import encode
from studylib.quant.grids import quantize
from studylib.quant.layers import decoder_linears
from studylib.quant.storage import Codes
from studylib.study import cards, compressed, engines, export, gguf, run, schedule
from studylib.study.records import DIVERGED, Store, arm_key
from studylib.train import distillation, finetuning

EVALUATION = Evaluation(("wikipedia",), windows=4, length=32, pairs=2)
BUDGET = dataclasses.replace(profile("smoke"), evaluation=EVALUATION)
NF4 = Format("nf", 4, 32, double=True)


def arm(method, bits="4-16-16", model="tiny-random", **fields):
    return build_arm(BUDGET, model, method, bits, **fields)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def exported(arm, store, folder, *options):
    """The record, what `export` says of it, and the files' tensors."""
    (record,) = schedule.run([arm], store.folder)
    found = export.export_model(record, store, folder, *options, scored=True)
    assert not list(folder.parent.glob("*.partial-*"))
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (file,) = folder.glob("*.safetensors")
    return record, found, load_file(file)


WEIGHTS = {
    "rtn": arm("rtn"),
    "3 bits": arm("rtn", "3-16-16"),
    "8 bits": arm("rtn", "8-16-16"),
    "groups": arm("rtn", scheme=Scheme("asymmetric", group=32)),
    "statsq": arm("rtn", scheme=Scheme("statsq")),
    "gptq": arm("gptq"),
    "awq": arm("awq"),
    "smoothquant": arm("smoothquant", "8-16-16"),
    "llm-qat": arm("llm-qat"),
    "lsq": arm("llm-qat", scheme=Scheme("lsq", 32)),
    "paretoq": arm("llm-qat", scheme=Scheme("paretoq")),
    "full range": arm("rtn", "3-16-16", scheme=Scheme("full-range", 32)),
    "gptq in groups": arm("gptq", format=Format("int-full", 4, 32)),
    "gptq, affine": arm("gptq", "3-16-16", format=Format("affine", 3, 32)),
    "autoround, affine": arm("autoround", format=Format("affine", 4, 32)),
    "awq in groups": arm("awq", format=Format("int-full", 4, 32)),
    "encoded": arm("encoded", "2-16-16", format=Format("int-full", 2, 32)),
    "affine": arm("encoded", "2-16-16", format=Format("affine", 2, 32)),
    "double": arm("encoded", format=Format("int", 4, 32, double=True)),
    "qat": arm("qat", format=Format("affine", 4, 32)),
    "qat, full range": arm("qat", format=Format("int-full", 4, 32)),
    "learned steps": arm("lsq", format=Format("int-full", 4, 32)),
    "merged": arm("lora", "16-16-16", merge=MERGED_QUANTIZED, format=Format("affine", 4, 32)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_integers_come_back_as_the_weights_that_were_scored(fp32, store, tmp_path, name):
    record, found, tensors = exported(WEIGHTS[name], store, tmp_path / "model")
    assert found.container == base.INTEGERS
    deployed, tokenizer = run.deployed(record.arm, store)
    perplexities = {name: value for name, value in record.metrics.items() if name.startswith("perplexity/")}
    # What LLM-QAT trains beside the decoder's weights is kept in 16 bits.
    exact = 1e-3 if record.arm.training else 0
    assert score(deployed, tokenizer, EVALUATION)[0] == pytest.approx(perplexities, rel=exact)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.arange(32)[None]
    assert torch.isfinite(loaded(tokens).logits).all()  # the first pass unpacks
    for name, linear in decoder_linears(deployed).items():
        back = loaded.get_submodule(name).weight
        assert torch.allclose(back, linear.weight, rtol=1e-5, atol=1e-6 * linear.weight.abs().max().item()), name
    bits = int(record.arm.bits.split("-")[0]) if record.arm.bits != "16-16-16" else 4
    for name, linear in decoder_linears(deployed).items():
        stored = tensors[f"{name}.weight" if f"{name}.weight" in tensors else f"{name}.weight_packed"]
        assert 8 * stored.nbytes == bits * linear.weight.numel()
    for name, value in found.metrics.items():  # embeddings and norms were rounded to bf16
        assert value == pytest.approx(record.metrics[name], rel=2e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("text").input_ids == tokenizer("text").input_ids


@pytest.mark.parametrize("bits", ["8-8-8", "4-8-16"])
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
def test_activations_are_rounded_by_who_loads_it(fp32, store, tmp_path, bits, grid, capfd):
    record, found, tensors = exported(arm("rtn", bits, scheme=Scheme(grid)), store, tmp_path / "model")
    assert "arning" not in capfd.readouterr().err.replace("WARNING", "warning")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.arange(32)[None]
    rounded = loaded(tokens).logits
    plain, _ = run.deployed(arm("rtn", "4-16-16" if bits[0] == "4" else "8-16-16", scheme=Scheme(grid)), store)
    away = (rounded - plain(tokens).logits).abs().mean()
    own = (run.deployed(record.arm, store)[0](tokens).logits - plain(tokens).logits).abs().mean()
    assert 0.5 * own < away < 2 * own
    summary = cards.summary(record, found)
    assert ("max|x|" in summary) == (grid == "symmetric")
    assert ("Key/value cache: 8 bits here as in the record" in summary) == (bits == "8-8-8")
    scheme = loaded.config.quantization_config.quantization_config.kv_cache_scheme
    assert (scheme is not None) == (bits == "8-8-8")
    if scheme:  # what a token's keys are rounded by does not depend on later tokens, and they are rounded
        assert (scheme.num_bits, scheme.symmetric, scheme.group_size) == (8, grid == "symmetric", 16)
        assert torch.equal(loaded(tokens[:, :16]).logits, loaded(tokens).logits[:, :16])
    assert any(tensor.dtype == torch.int32 for tensor in tensors.values()) == (bits == "4-8-16")


@pytest.mark.parametrize(
    "wanted",
    [
        arm("encoded", format=NF4),
        arm("encoded", format=Format("nf", 4, 32)),
        arm("encoded", format=Format("fp-bnb", 4, 32)),
        arm("qlora", format=NF4, merge=REQUANTIZED),
        arm("qlora", format=NF4, merge=MERGED_DISTILLED),
    ],
    ids=title,
)
def test_four_bit_floats_go_to_bitsandbytes(fp32, store, tmp_path, wanted):
    record, found, tensors = exported(wanted, store, tmp_path / "model")
    assert found.container == base.FOUR_BIT
    names = decoder_linears(models.load_model("tiny-random"))
    assert all(tensors[f"{name}.weight"].dtype == torch.uint8 for name in names)
    for name, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[name], rel=5e-3)


@pytest.fixture
def folder_model(tmp_path):
    """A model like tiny-random as a folder that transformers can load, with widths that blocks of 64 divide."""
    folder, config = tmp_path / "base", models.load_config("tiny-random")
    config.intermediate_size = 192
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.skeleton(config).save_pretrained(folder)
    models.load_tokenizer("tiny-random").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lora", "bits": "16-16-16"},
        {"method": "qlora", "format": Format("nf", double=True)},
        {"method": "qlora", "format": Format("fp-bnb"), "adapter": Adapter(4, 8, kind="dora")},
        {"method": "qlora", "format": Format("nf"), "adapter": Adapter(layers="q_proj+v_proj")},
    ],
    ids=["16 bits", "NF4 and double quantization", "FP4 and DoRA", "some layers"],
)
def test_an_adapter_is_loaded_by_peft_beside_its_base(fp32, store, tmp_path, folder_model, fields):
    record, found, tensors = exported(arm(model=folder_model, **fields), store, tmp_path / "model", None, folder_model)
    assert found.container == base.PEFT
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert 2 * sum(tensor.numel() for tensor in tensors.values()) < found.bytes
    for name, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[name], rel=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "model"))
    names = {}
    exec(code, names)  # as a reader would
    assert torch.isfinite(names["model"](torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "rtn"},
        {"method": "encoded", "format": Format("nf", 4, 32)},
        {"method": "qlora", "format": Format("nf", 4, 32), "merge": DEQUANTIZED},
    ],
    ids=[base.INTEGERS, base.FOUR_BIT, base.SIXTEEN_BITS],
)
def test_biases_and_a_head_of_its_own_come_along(fp32, store, tmp_path, shape, fields):
    longer = {"intermediate_size": 64, "max_position_embeddings": 512}  # than the pairs that are scored
    config = Qwen2Config(**shape | longer, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.skeleton(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    models.load_tokenizer("tiny-random").save_pretrained(tmp_path / "base")
    record, found, tensors = exported(arm(model=str(tmp_path / "base"), **fields), store, tmp_path / "model")
    assert sum(name.endswith("bias") for name in tensors) == 6 and "lm_head.weight" in tensors
    for name, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[name], rel=2e-3)


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (WEIGHTS["groups"], base.INTEGERS),
        (WEIGHTS["groups"], base.GGUF),
        (arm("rtn", "4-8-16"), base.INTEGERS),
        (arm("encoded", format=NF4), base.FOUR_BIT),
        (arm("qlora", format=NF4, merge=DEQUANTIZED), base.SIXTEEN_BITS),
    ],
)
def test_what_is_scored_takes_16_bits_a_number_and_scores_as_fp32_does(store, tmp_path, monkeypatch, wanted, kind):
    monkeypatch.setattr(models, "compute_dtype", lambda on=None: torch.bfloat16)
    (record,) = schedule.run([wanted], store.folder)
    folder, seen = tmp_path / "model", []
    monkeypatch.setattr(export, "score", lambda model, *given, **how: seen.append(model) or score(model, *given, **how))
    found = export.export_model(record, store, folder, kind, scored=True)
    config, tokenizer = models.load_config("tiny-random"), models.load_tokenizer("tiny-random")
    fp32 = gguf.read(folder, config) if kind == base.GGUF else export.load(kind, None, "", folder)
    assert found.metrics == score(fp32, tokenizer, EVALUATION, batch=1)[0]
    own, whole = (sum(layer.weight.nbytes for layer in decoder_linears(model).values()) for model in (seen[0], fp32))
    assert own == whole / (1 if kind == base.FOUR_BIT else 2)


def test_merged_into_16_bits(fp32, store, tmp_path):
    record, found, tensors = exported(arm("qlora", format=NF4, merge=DEQUANTIZED), store, tmp_path / "model")
    assert found.container == base.SIXTEEN_BITS and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[name], rel=2e-3)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (arm("full-precision", "16-16-16"), "it is the model as it was loaded"),
        (arm("qlora", "3-16-16", format=Format("nf", 3, 32)), "take an arm that is merged"),
        (arm("qlora", format=NF4, adapter=Adapter(4, 4, kind="pissa")), "take an arm that is merged"),
        (arm("qlora", format=Format("nf")), "take an arm that is merged"),  # tiny-random is in no file
        (arm("encoded", "3-16-16", format=Format("nf", 3, 64)), "neither compressed-tensors nor bitsandbytes has NF3"),
        (arm("rtn", "16-8-16"), "its weights are not quantized"),
    ],
    ids=lambda value: title(value) if isinstance(value, Arm) else None,
)
def test_what_no_container_holds_is_refused_with_the_reason(wanted, message):
    with pytest.raises(ValueError, match=f"^record: .*cannot be exported; .*{message}"):
        container(wanted)


def test_nothing_is_written_over_and_nothing_is_left_half(store, tmp_path, monkeypatch, make_record):
    (record,) = schedule.run([WEIGHTS["rtn"]], store.folder)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"output: .*there exists; give a new folder"):
        export.export_model(record, store, tmp_path / "there")
    with pytest.raises(ValueError, match="is diverged; there is no model to write"):
        export.export_model(make_record("rtn", "4-16-16", status=DIVERGED), store, tmp_path / "new")
    with pytest.raises(ValueError, match=r"output: .*model would be in no folder"):
        export.export_model(record, store, tmp_path / "none" / "model")
    other = record.provenance | {"model": record.provenance["model"] | {"sha256": "00" * 32}}
    with pytest.raises(ValueError, match="is of other weights than tiny-random has now"):
        export.export_model(dataclasses.replace(record, provenance=other), store, tmp_path / "new")
    monkeypatch.setattr(export, "score", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export_model(record, store, tmp_path / "new", scored=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "there"]


def test_what_was_trained_is_used_and_checkpoints_are_left_as_they_were(fp32, store, tmp_path, monkeypatch):
    adapted, distilled = arm("qlora", format=NF4, merge=REQUANTIZED), WEIGHTS["llm-qat"]
    schedule.run([adapted], store.folder)
    schedule.run([distilled], store.folder, keep_checkpoints=True)
    before = sorted(path.name for path in (store.folder / "checkpoints").rglob("*"))
    for trains, name in ((finetuning, "fine_tune"), (distillation, "train_llm_qat")):
        monkeypatch.setattr(trains, name, lambda *_, **__: 1 / 0)
    run.deployed(adapted, store)
    run.deployed(distilled, store)
    assert sorted(path.name for path in (store.folder / "checkpoints").rglob("*")) == before != []
    monkeypatch.undo()
    further = arm("llm-qat", "8-16-16")
    store.checkpoint_folder(arm_key(further)).mkdir()  # what a killed export leaves
    run.deployed(further, store)
    assert sorted(path.name for path in (store.folder / "checkpoints").rglob("*")) == before


def test_replaced_weights_are_not_exported_as_the_record_s(store, tmp_path, folder_model):
    (record,) = schedule.run([arm("rtn", model=folder_model)], store.folder)
    changed = models.load_model(folder_model)
    changed.model.norm.weight.data *= 2
    changed.save_pretrained(folder_model)
    with pytest.raises(ValueError, match=r"is of other weights than .*base has now"):
        export.export_model(record, store, tmp_path / "model")
    assert arm_key(record.arm) != record.key


@given(
    bits=st.integers(2, 8),
    kind=st.sampled_from(["symmetric", "asymmetric", "full-range", "statsq"]),
    group=st.sampled_from([None, 8, 32]),
    seed=st.integers(0, 2**16),
    scale=st.floats(1e-6, 1e4),
    offset=st.floats(-3, 3),
)
@settings(max_examples=150, deadline=None)
def test_codes_give_the_integers_of_compressed_tensors(bits, kind, group, seed, scale, offset):
    grid = Grid(bits, kind, group)
    weight = scale * (torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) + offset)
    weight[0] = 0
    found = quantize(weight, grid)
    rounded = found.dequantize()
    of = Codes.of_integers(found.codes, bits, grid.low, found.scale, found.zero)
    _, step, zero = compressed.integer_grid(of, bits)
    rows = rounded.unflatten(1, (-1, group or 64))
    zero = torch.zeros_like(step) if zero is None else zero
    codes = (rows / step[..., None]).round() + zero[..., None]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= codes.min() and codes.max() <= high and low <= zero.min() and zero.max() <= high
    assert torch.allclose((codes - zero[..., None]) * step[..., None], rows, rtol=1e-6, atol=0)


def test_codes_that_are_no_integers_are_refused():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a table of levels is no integer grid"):
        compressed.integer_grid(encode(weight, Format("nf", 4, 64)), 4)
    lowest = Codes.of_integers(torch.tensor([[-4.0, 1, 3]]), 3, -4, torch.ones(1, 1))  # GPTQ's lowest level
    assert np.isclose(compressed.integer_grid(lowest, 3)[1].item(), 1)


@given(bits=st.sampled_from([2, 3, 4]), offset=st.floats(-1, 1), sign=st.sampled_from([-1.0, 1.0]))
@settings(max_examples=50, deadline=None)
def test_an_offset_is_a_zero_point_within_the_bound_or_refused(bits, offset, sign):
    levels = torch.arange(2**bits).repeat(4, 1) - 2 ** (bits - 1)
    codes = Codes.of_integers(
        levels, bits, -(2 ** (bits - 1)), torch.full((4, 1), sign), offset=torch.tensor(offset).repeat(4, 1)
    )
    near = abs(offset - round(offset)) <= compressed.OFFSET_BOUND
    for width in (bits, 8):
        if width == bits and not near:
            with pytest.raises(compressed.OffsetError, match="use --format gguf, which has offsets"):
                compressed.integer_grid(codes, width)
            continue
        values, scale, zero = compressed.integer_grid(codes, width)
        zero = torch.zeros(4, 1) if zero is None else zero
        limit = 2 ** (width - 1)
        assert -limit <= min(values.min(), zero.min()) and max(values.max(), zero.max()) < limit
        assert (scale * (values - zero) - codes.decode()).abs().max() <= compressed.OFFSET_BOUND + 1e-5


def test_an_offset_beyond_all_zero_points_is_refused():
    codes = Codes.of_integers(torch.zeros(4, 64), 4, -8, torch.ones(4, 1), offset=torch.full((4, 1), 9.0))
    with pytest.raises(ValueError, match="or outside of them; use --format gguf"):
        compressed.integer_grid(codes, 8)


SHIFTED = {
    "l4q": ("l4q", "4-16-16", Format("int-full", 4, 32)),
    "affine l4q": ("l4q", "3-16-16", Format("affine", 3, 32)),
    "qa-lora": ("qa-lora", "4-16-16", Format("affine", 4, 32)),
    "learned steps": ("lsq", "4-16-16", Format("affine", 4, 32)),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_learned_offsets_go_to_both(tiny_model, tiny_tokenizer, tmp_path, name):
    method, bits, format = SHIFTED[name]
    wanted = arm(method, bits, format=format)
    attach(tiny_model, method, format=format, adapter=wanted.adapter)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:  # as if trained
                parameter.data += 0.02 * parameter.detach().abs().mean().clamp_min(1e-3) * torch.randn_like(parameter)
    merge(tiny_model, wanted.merge)
    assert container(wanted) == base.GGUF and container(wanted, base.INTEGERS) == base.INTEGERS
    export._write_weights(base.INTEGERS, wanted, *export.taken_over(copy.deepcopy(tiny_model)), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded(torch.arange(32)[None])  # the first pass unpacks
    gguf.check_arm(wanted, tiny_model.config, tiny_tokenizer)
    assert gguf.write(tmp_path / "model-Q4_1.gguf", tiny_model, tiny_tokenizer, "tiny")[0] == "Q4_1"
    read = gguf.read(tmp_path, tiny_model.config)
    for own, linear in decoder_linears(tiny_model).items():
        codes = linear.codes()
        assert (codes.offset != 0).any()
        for model, bound in ((loaded, compressed.OFFSET_BOUND * codes.scale.abs()), (read, gguf.rounding_bound(codes))):
            away = (model.get_submodule(own).weight - codes.decode()).abs().view(*codes.scale.shape, -1).amax(-1)
            assert (away <= 1.001 * bound + 1e-7).all(), own


INT4, AFFINE4 = Format("int-full", 4, 32), Format("affine", 4, 32)


@pytest.mark.parametrize(
    ("method", "format", "merge", "wanted"),
    [
        ("l4q", INT4, BESIDE, base.GGUF),
        ("l4q", AFFINE4, BESIDE, base.INTEGERS),
        ("qa-lora", AFFINE4, BESIDE, base.GGUF),
        ("qa-lora", INT4, BESIDE, base.INTEGERS),
        ("qat-lora", AFFINE4, BESIDE, base.GGUF),
        ("qat-lora", INT4, REQUANTIZED, base.GGUF),
        ("qat-lora", AFFINE4, REQUANTIZED, base.INTEGERS),
    ],
)
def test_what_was_trained_is_scored_as_its_record_in_every_engine(fp32, store, tmp_path, method, format, merge, wanted):
    (record,) = schedule.run([arm(method, format=format, merge=merge)], store.folder)
    assert container(record.arm) == (base.INTEGERS if merge == REQUANTIZED else base.GGUF)
    found = export.export_model(record, store, tmp_path / "model", wanted, scored=True)
    told, evaluation = cards.read_note(tmp_path / "model")
    assert (tmp_path / "model" / gguf.ADAPTER).exists() == (method == "qat-lora" and merge == BESIDE)
    for own, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[own], rel=2e-3)
    for ran in engines.results(tmp_path / "model", told, evaluation, None):
        if ran.why:
            assert ran.engine == "transformers" or wanted != base.GGUF or not llama_cpp_installed(), ran.why
        for corpus, value in ran.perplexity.items():
            assert value == pytest.approx(record.metrics[f"perplexity/{corpus}"], rel=2e-3), ran.engine


def test_dense_weights_hold_an_adapter_beside_its_base(tiny_model, tmp_path):
    attach(tiny_model, "qlora", format=Format("nf", 4, 32), adapter=Adapter(4, 4))
    for name, parameter in tiny_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(0))
    merge(tiny_model)
    wanted = arm("qlora", format=Format("nf", 4, 32))
    assert container(wanted, base.SIXTEEN_BITS) == base.SIXTEEN_BITS
    export._write_weights(base.SIXTEEN_BITS, wanted, *export.taken_over(copy.deepcopy(tiny_model)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for own, linear in decoder_linears(tiny_model).items():
        assert torch.equal(tensors[f"{own}.weight"], linear.weight.bfloat16()), own
        assert not torch.equal(tensors[f"{own}.weight"], linear.codes().decode().bfloat16())


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        (arm("encoded", format=NF4), base.GGUF, "GGUF does not hold 4-bit floats .*; use --format bnb$"),
        (arm("encoded", format=Format("mxfp4", 4, 32)), base.GGUF, "; --format safetensors writes it in 16 bits$"),
        (arm("rtn"), base.PEFT, "peft adapter does not hold integers; use --format compressed-tensors$"),
        (
            arm("gptq+lora", format=Format("affine", 4, 32)),
            base.PEFT,
            "a base that transformers does not make; take an",
        ),
        (
            arm("qat-lora", format=Format("affine", 4, 32)),
            base.INTEGERS,
            "an adapter beside its base; use --format gguf$",
        ),
        (arm("qlora", format=NF4), base.GGUF, "a base that llama.cpp does not make; take an arm that is merged$"),
        (arm("l4q", format=Format("affine", 4, 32)), base.FOUR_BIT, "use --format gguf$"),
    ],
)
def test_what_a_container_does_not_hold_is_refused_with_another(wanted, given, message):
    with pytest.raises(ValueError, match=message):
        container(wanted, given)


def test_the_card_names_no_place_and_tells_the_hub(fp32, store, tmp_path, folder_model):
    wanted = arm("l4q", model=folder_model, format=Format("int-full", 4, 32))
    (record,) = schedule.run([wanted], store.folder)
    found = export.export_model(record, store, tmp_path / "model", None, "owner/base", scored=True)
    assert found.container == base.GGUF and found.moved < 0.02
    for own, value in found.metrics.items():
        assert value == pytest.approx(record.metrics[own], rel=2e-3)
    for file in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    text = (tmp_path / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/base" and front["license"] == "cc-by-nc-4.0"
    assert front["datasets"] == ["tatsu-lab/alpaca"] and front["pipeline_tag"] == "text-generation"
    assert text.split("---\n")[2].startswith("\n# owner/base: L4Q 4-16-16")
    (file,) = (tmp_path / "model").glob("model-Q4_1.gguf")
    told, evaluation = cards.read_note(tmp_path / "model")
    assert told["file"] == file.name and evaluation == dataclasses.replace(EVALUATION, pairs=0)
    (Path(folder_model) / "README.md").write_text("---\nlicense: mit\n---\n")
    assert cards.licence(arm("rtn", model=folder_model)) == "mit"
    assert cards.licence(arm("rtn", model="smollm2-135m")) == "apache-2.0"
    local = dataclasses.replace(record, arm=arm("lora", "16-16-16", model=folder_model))
    with pytest.raises(ValueError, match="base-id: missing; an adapter names its base"):
        export.export_model(local, store, tmp_path / "adapter")
