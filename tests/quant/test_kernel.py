"""4-bit integers multiplied as they are stored, against the decoded weights."""

import copy

import pytest
import torch
from torch import nn

from studylib.config.budgets import EXECUTIONS, OWN, profile
from studylib.config.settings import INTEGER_FORMATS, Adapter, Format
from studylib.data.models import compute_dtype, load_model
from studylib.methods import attach, merge
from studylib.methods.arms import build_arm
from studylib.quant.formats import EncodedLinear
from studylib.quant.kernel import KERNEL, Int4Linear, int4_model
from studylib.quant.storage import stored_bytes
from studylib.study import schedule

TOKENS = torch.arange(24).view(2, 12)
AFFINE = Format("affine", 4, 32)


@pytest.fixture
def tuned():
    """tiny-random, attached, with what training would have changed drawn at random."""

    def make(method, format=AFFINE, **adapter):
        model = attach(load_model("tiny-random"), method, format=format, adapter=Adapter(rank=4, alpha=4, **adapter))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data += 1e-3 * torch.randn(parameter.shape, generator=generator)
        return model.float().eval()

    return make


@pytest.mark.parametrize("kind", INTEGER_FORMATS)
@pytest.mark.parametrize(("out", "width", "group"), [(16, 32, 32), (48, 192, 64), (16, 512, 256)])
def test_the_kernel_multiplies_what_the_codes_stand_for(kind, out, width, group):
    torch.manual_seed(0)
    encoded = EncodedLinear(nn.Linear(width, out), Format(kind, 4, group))
    x = torch.randn(3, 2, width)
    packed = int4_model(nn.Sequential(copy.deepcopy(encoded)), torch.float32, torch.float32)
    torch.testing.assert_close(packed(x), encoded(x), rtol=1e-5, atol=1e-5)
    stored = packed[0]
    assert stored.packed.nbytes == out * width // 2 and stored.grid.nbytes == 2 * 4 * out * width // group


@pytest.mark.parametrize("method", ["l4q", "qa-lora", "qlora", "qat-lora"])
def test_a_model_answers_as_its_decoded_one(tuned, method):
    model = tuned(method)
    packed = int4_model(copy.deepcopy(model), torch.float32, torch.float32)
    decoded = merge(copy.deepcopy(model)) if method == "l4q" else model
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS).logits, decoded(TOKENS).logits, rtol=1e-4, atol=1e-4)
    layers = [module for module in packed.modules() if isinstance(module, Int4Linear)]
    beside = sum(layer.lora_A is not None for layer in layers)
    assert len(layers) == 14 and beside == (14 if method in ("qlora", "qat-lora") else 0)
    assert stored_bytes(packed) == sum(t.nbytes for t in (*packed.buffers(), *packed.parameters())) - left_out(packed)


def left_out(packed):
    """Bytes of rotary frequencies, and half of what is fp32 here and counts as 16 bits."""
    frequencies = sum(buffer.nbytes for name, buffer in packed.named_buffers() if name.endswith("inv_freq"))
    return frequencies + sum(parameter.nbytes for parameter in packed.parameters()) // 2


def test_whatever_the_model_computes_in_the_kernel_is_entered_in_bf16(tuned):
    model = tuned("qlora")
    packed = int4_model(copy.deepcopy(model), torch.float32)
    layers = [module for module in packed.modules() if isinstance(module, Int4Linear)]
    assert {layer.grid.dtype for layer in layers} == {torch.bfloat16}
    assert {layer.lora_A.dtype for layer in layers} == {torch.float32}
    x = torch.randn(3, layers[0].in_features)
    found = layers[0](x)
    assert found.dtype == torch.float32
    decoded = layers[0].codes().decode().float()
    rounded = x.bfloat16().float() @ decoded.T
    wanted = rounded.bfloat16().float() + x @ layers[0].lora_A.T @ layers[0].lora_B.T
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-3)
    assert not torch.equal(found, x @ decoded.T + x @ layers[0].lora_A.T @ layers[0].lora_B.T)


def test_bf16_costs_the_rounding_of_scales_only(tuned):
    model = tuned("l4q")
    packed = int4_model(copy.deepcopy(model), torch.bfloat16)
    assert packed.lm_head.weight.dtype == torch.bfloat16 and not packed(TOKENS).logits.requires_grad
    merge(model)
    with torch.no_grad():
        wanted, found = model(TOKENS).logits, packed(TOKENS).logits.float()
    assert 0 < (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("method", "format", "message"),
    [
        (
            "qlora",
            Format("nf", 3, 32),
            "q_proj: format: NF3, groups of 32 is not allowed; the 4-bit kernel takes int, int-full, affine of 4 bits",
        ),
        ("qlora", Format("affine", 4, 32, double=True), "format: affine Int4 .* DQ, groups of 32 is not allowed"),
        ("l4q", Format("affine", 3, 32), "bits: 3 is not allowed; the 4-bit kernel takes 4"),
        ("l4q", Format("affine", 4, 16), "group: 16 is not allowed; the 4-bit kernel takes 32, 64, 128, 256"),
        ("lora", None, "LlamaForCausalLM has no layers of 4-bit integers"),
        ("qat-lora", Format("affine", 2, 32), "bits: 2 is not allowed; the 4-bit kernel takes 4"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_and_nothing_changes(tuned, method, format, message):
    model = tuned(method, format)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        int4_model(model, torch.float32)
    assert [type(module) for module in model.modules()] == before


def test_dora_is_refused(tuned):
    with pytest.raises(ValueError, match="q_proj: kind: 'dora' is not allowed beside 4-bit integers"):
        int4_model(tuned("qlora", kind="dora"), torch.float32)


def test_an_arm_scores_the_kernel_as_the_decoded_weights_and_keeps_its_times(tmp_path):
    budget = profile("smoke")
    decoded, packed = schedule.run(
        [build_arm(budget, "tiny-random", method, "4-16-16", format=AFFINE) for method in ("encoded", "4-bit kernel")],
        tmp_path,
    )
    for metric in ("perplexity/wikipedia", "perplexity/responses"):
        assert packed.metrics[metric] == pytest.approx(decoded.metrics[metric], rel=1e-3)
    replaced = int4_model(
        attach(load_model("tiny-random"), "qlora", format=AFFINE, adapter=Adapter()), compute_dtype()
    ).modules()
    blocks = sum(
        layer.in_features * layer.out_features // AFFINE.group for layer in replaced if isinstance(layer, Int4Linear)
    )
    kept, once = 2 * KERNEL.itemsize, 4 + AFFINE.bits / 8  # bytes of a group's scale and offset
    assert packed.metrics["bytes/weights"] - decoded.metrics["bytes/weights"] == blocks * (kept - once)
    assert all(len(packed.scores[f"seconds/{OWN}/{kind}"]) == budget.decoding.rounds for kind in EXECUTIONS)
    assert "execution" in packed.provenance["numerics"] and packed.cost["seconds"]["decode"] > 0


def test_an_arm_that_the_kernel_does_not_take_is_refused_before_it_runs(tmp_path):
    budget = profile("smoke")
    with pytest.raises(ValueError, match="format: NF4, groups of 32 is not allowed; the 4-bit kernel"):
        build_arm(budget, "tiny-random", "4-bit kernel", "4-16-16", format=Format("nf", 4, 32))
    with pytest.raises(ValueError, match="format: is missing, but '4-bit kernel' needs it"):
        build_arm(budget, "tiny-random", "4-bit kernel", "4-16-16")
    with pytest.raises(ValueError, match="q_proj: group: 16 is not allowed"):
        schedule.run(
            [build_arm(budget, "tiny-random", "4-bit kernel", "4-16-16", format=Format("affine", 4, 16))], tmp_path
        )


def test_a_number_of_outputs_that_the_kernel_lacks_is_refused():
    with pytest.raises(ValueError, match="out: 24 rows are not allowed; the 4-bit kernel takes multiples of 16"):
        int4_model(nn.Sequential(EncodedLinear(nn.Linear(64, 24), AFFINE)), torch.float32)
