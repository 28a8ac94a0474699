"""The methods that train nothing: full precision, rounding, SmoothQuant, GPTQ, AWQ, formats, the 4-bit kernel."""

import contextlib
import copy
import dataclasses
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from studylib import data, quant  # doors: what stands behind them is loaded when it is used
from studylib.config import OFF, Arm, BitWidths, Format, Scheme, check_width, kept_if_possible, usable
from studylib.methods.base import L4Q_PAPER, LLM_QAT_PAPER, PAPERS, QLORA_PAPER, Look, Method, Work

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from studylib.quant import Codes


CALIBRATION_WINDOWS = 32  # of the data, at most, for SmoothQuant and GPTQ, whose time grows with them
AWQ_WINDOWS = 8  # and for AWQ, which runs each of them some twenty times through every layer
AUTOROUND_WINDOWS = 8  # and for AutoRound, which trains on BATCH of them in every one of AUTOROUND_STEPS a layer
AUTOROUND_STEPS = 50  # auto-round's own "light" recipe; the paper has 200
AUTOROUND_RATE = 5e-3  # of that recipe: a share of a level each step


class FullPrecision(Method):
    name, title = "full-precision", "full precision"
    papers, look = PAPERS, Look("#000000", "D")
    rounds, numerics = False, ()
    few_shot_at = ("16-16-16",)

    def apply(self, work: Work) -> None:
        pass


class RoundToNearest(Method):
    """RTN: every number to the nearest level of its grid, by default LLM-QAT's MinMax grid."""

    name, title, source = "rtn", "RTN", "LLM-QAT, section 2.2"
    papers, look = (LLM_QAT_PAPER,), Look("#D55E00", "s", hollow=True)
    takes = frozenset({"scheme"})
    few_shot_at = ("4-8-4",)

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            quant.round_to_nearest(work.model, work.arm.bits, work.arm.scheme)


class SmoothQuant(Method):
    name, title, source = "smoothquant", "SmoothQuant", "arXiv 2211.10438"
    papers, look = (LLM_QAT_PAPER,), Look("#E69F00", "^", hollow=True)
    needs, takes = frozenset({"data"}), frozenset({"scheme"})
    numerics = ("grids", "ptq")

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_smoothable(skeleton)

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            smoothquant(work.model, work.calibration(CALIBRATION_WINDOWS))
            quant.round_to_nearest(work.model, work.arm.bits, work.arm.scheme)


class GPTQ(Method):
    name, title, source = "gptq", "GPTQ", "arXiv 2210.17323"
    papers, look = (LLM_QAT_PAPER,), Look("#009E73", "v", hollow=True)
    needs, takes, numerics = frozenset({"data"}), frozenset({"format", "scheme"}), ("grids", "ptq")
    by_gptq = True

    def check(self, arm: Arm) -> None:
        super().check(arm)
        check_gptq(arm, self)

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            put_codes(work.model, work.arm.bits, gptq_once(work), work.arm.scheme)


class AWQ(Method):
    name, title, source = "awq", "AWQ", "arXiv 2306.00978"
    papers, look = (LLM_QAT_PAPER,), Look("#CC79A7", "P", hollow=True)
    needs, takes, numerics = frozenset({"data"}), frozenset({"format"}), ("grids", "ptq")

    def check(self, arm: Arm) -> None:
        super().check(arm)
        _with_weights(arm.bits, self.title, arm.format)

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_smoothable(skeleton)

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            awq(work.model, work.arm.bits, work.calibration(AWQ_WINDOWS), work.arm.format)


class AutoRound(Method):
    name, title, source = "autoround", "AutoRound", "arXiv 2309.05516"
    look = Look("#56B4E9", "<", hollow=True)
    needs, takes, numerics = frozenset({"data"}), frozenset({"format"}), ("grids", "ptq")

    def check(self, arm: Arm) -> None:
        super().check(arm)
        _with_weights(arm.bits, self.title, arm.format)

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_roundable(skeleton)

    def apply(self, work: Work) -> None:
        with work.phase("quantize"):
            autoround(work.model, work.arm.bits, work.calibration(AUTOROUND_WINDOWS), work.arm.format)


class RoundedWeights(Method):
    """The decoder's weights rounded once to a number format; everything else as it was."""

    name, title, source = "encoded", "rounded weights", "QLoRA, section 3"
    papers, look = (QLORA_PAPER,), Look("#8C564B", "p", hollow=True)
    needs, numerics = frozenset({"format"}), ("formats",)
    checks_weights = True

    def usual_format(self, bits: int = 4, group: int | None = 64, double: bool = True) -> None:
        """None: which format it is, is what is asked."""

    def apply(self, work: Work) -> None:
        assert work.arm.format is not None
        with work.phase("quantize"):
            quant.decode_model(quant.encode_model(work.model, work.arm.format))


class Executed(Method):
    """A method whose 4-bit integers are multiplied as they are stored."""

    numerics = ("formats", "execution")

    def check(self, arm: Arm) -> None:
        super().check(arm)
        quant.check_format(arm.format)

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        quant.check_executable(skeleton, arm.format)


class FourBitKernel(Executed):
    """4-bit integers multiplied as they are stored, by PyTorch's kernel for processors; its decoding is timed."""

    name, title, source = "4-bit kernel", "4-bit kernel", "L4Q, section 5.4"
    papers, look = (L4Q_PAPER,), Look("#009E73", "P")
    needs = frozenset({"format", "decoding"})

    def apply(self, work: Work) -> None:
        assert work.arm.format is not None
        with work.phase("quantize"):
            encoded = quant.encode_model(work.model.cpu(), work.arm.format)
            work.model = quant.int4_model(encoded, data.compute_dtype(encoded.device))


class SideBySide(Executed):
    """The same 4-bit integers in llama.cpp, whose prefill and decoding are timed beside this study's kernel and 16
    bits. Its weights are those of "encoded", and scored there."""

    name, title, look = "llama.cpp", "llama.cpp", Look("#0072B2", "P")
    needs = frozenset({"format", "engines"})

    def apply(self, work: Work) -> None:
        assert work.arm.format is not None
        with work.phase("quantize"):
            quant.decode_model(quant.encode_model(work.model, work.arm.format))


GROUP_FORMATS = {"int-full": True, "affine": False}  # whose weights llm-compressor rounds: whether they are symmetric


def check_gptq(arm: Arm, method: Method) -> None:
    """Raise ValueError unless the arm has weights to round, on a grid of GPTQ's: its scheme may say how activations and
    cache are rounded, and whether the model is rotated."""
    if dataclasses.replace(arm.scheme, activations=None, rotated=False) != Scheme():
        raise ValueError(f"scheme: {method.name!r} takes activations and rotated alone; its grid of weights is its own")
    _with_weights(arm.bits, method.title, arm.format)


def _check_format(bits: BitWidths, format: Format | None, method: str) -> None:
    """Raise ValueError unless the format, if any, is one of GROUP_FORMATS, with fp32 scales, of weights alone."""
    if format is None:
        return
    if format.kind not in GROUP_FORMATS:
        allowed = " or ".join(map(repr, GROUP_FORMATS))
        raise ValueError(f"format: {format.kind!r} is not allowed for {method}; use {allowed}")
    if format.double or format.scale_bits != 32:
        raise ValueError(f"format: {format.title} is not allowed for {method}; use fp32 scales")
    if str(bits) != f"{format.bits}-16-16":
        raise ValueError(f"bits: {bits} does not go with the format {format.title}; use {format.bits}-16-16")


def check_smoothable(model: "PreTrainedModel") -> None:
    """Raise ValueError where it is not known which norms SmoothQuant and AWQ may put their scales into."""
    if model.config.model_type not in quant.LLAMA_LIKE:
        raise ValueError(
            f"model: which norms to smooth is not known for {model.config.model_type!r}; use one of "
            f"{', '.join(quant.LLAMA_LIKE)}"
        )


def check_roundable(model: "nn.Module") -> None:
    """Raise ValueError where AutoRound would leave a layer as it is: one with a side that WIDTH does not divide."""
    for name, layer in quant.decoder_linears(model).items():
        if layer.in_features % WIDTH or layer.out_features % WIDTH:
            sides = f"{layer.out_features} x {layer.in_features}"
            raise ValueError(
                f"model: {name} is {sides}: AutoRound leaves it as it is, for it takes multiples of {WIDTH}"
            )


BATCH = 4  # windows in one forward pass
WIDTH = 32  # that AutoRound asks of both sides of a layer

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # with logging off altogether GPTQ fails


def smoothquant(model: "nn.Module", tokens: "Tensor", strength: float = 0.5) -> "nn.Module":
    """Move the scale of the activations into the weights; nothing is rounded and the model computes the same function.

    Input channel j of q, k, v and of gate, up is divided by s_j = max|X_j|^strength / max|W_j|^(1 - strength) (Xiao et
    al. 2023, Eq. 4) in the weight of the norm before them, and their weights are multiplied by it. llm-compressor takes
    max X_j - min X_j for max|X_j| and 2 max|W_j| for max|W_j|: the same s_j up to a factor, but for one-sided channels.
    strength: 0.5 as in the paper; its authors' repository takes 0.8 to 0.85 for Llama and Mistral, at 8-bit weights.
    Raises ValueError for a strength outside 0..1, tokens that are no windows, a model that is quantized already, or one
    whose layers are not known to be smoothable.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: {strength!r} is not allowed; use a number from 0 to 1")
    _check(model, tokens, smoothed=True)
    from llmcompressor.modifiers.transform import SmoothQuantModifier
    from llmcompressor.pipelines.basic import BasicPipeline

    _calibrate(model, tokens, BasicPipeline, SmoothQuantModifier(smoothing_strength=strength))
    return model


def gptq(
    model: "nn.Module",
    bits: str | BitWidths,
    tokens: "Tensor",
    format: Format | None = None,
    scheme: Scheme = Scheme(),
) -> "nn.Module":
    """GPTQ (Frantar et al. 2023) for the weights, then activations and cache rounded on the fly as by RTN.

    Layer after layer, the weights' columns are rounded one by one, and those to come make up for the error on the
    layer's inputs. These inputs come from layers whose weights are rounded already, but are not rounded themselves
    (llm-compressor's default, as are columns in the order of their activations' size and a dampening of 1%).
    format: the weights' grid, one of GROUP_FORMATS with fp32 scales; by default full-range integers, one scale an
    output channel. scheme: the grid of activations and cache.
    Raises ValueError for weights at 16 bits, another format, tokens that are no windows, a group that does not divide a
    layer's input, a model that is quantized already or has no linear layers.
    """
    return put_codes(model, bits, gptq_codes(model, bits, tokens, format), scheme)


def gptq_codes(
    model: "nn.Module", bits: str | BitWidths, tokens: "Tensor", format: Format | None = None
) -> "dict[str, Codes]":
    """By name, what `gptq` makes of the weights of each layer. The model computes with them afterwards, in fp32. Raises
    what `gptq` raises."""
    bits = _with_weights(bits, "GPTQ", format)
    group, symmetric = _group(format)
    _check(model, tokens, group)
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.pipelines.sequential import SequentialPipeline

    grid = _weight_grid(model, bits, group, symmetric)
    calibrated = _calibrate(model, tokens, SequentialPipeline, GPTQModifier(config_groups=grid))
    low = -(2 ** (bits.weights - 1))
    zeros = (
        {}
        if symmetric
        else {name: layer.weight_zero_point.short() - low for name, layer in _linears(model, calibrated)}
    )
    return _codes(model, bits, calibrated, symmetric, zeros)


def gptq_once(work: Work) -> "dict[str, Codes]":
    """`gptq_codes` of the arm's weights, found by the first of the arms that share them."""
    arm = work.arm
    with work.rounded() as file:
        if file is not None and usable(file):
            return quant.read_codes(file)
        codes = gptq_codes(work.model, arm.bits, work.calibration(CALIBRATION_WINDOWS), arm.format)
        if file is not None:
            with kept_if_possible(f"what GPTQ makes of {arm.model}"):
                quant.write_codes(codes, file)
    return codes


def autoround(model: "nn.Module", bits: str | BitWidths, tokens: "Tensor", format: Format | None = None) -> "nn.Module":
    """AutoRound (Cheng et al. 2024) for the weights, then activations and cache rounded on the fly as by RTN.

    Layer after layer, signed gradient descent moves what is added to each weight before it is rounded, by up to half a
    level, and the ends of each group's range, for the least squared error of the layer's output (their Eq. 3-5); the
    best of AUTOROUND_STEPS steps is kept. Symmetric scales are negative where a group's largest magnitude is positive,
    which so comes back exactly. Of affine weights llm-compressor keeps no zero points: they are found from the
    weights, which are whole multiples of their scale.
    Raises ValueError as `gptq` does, and for a layer with a side that is no multiple of WIDTH.
    """
    bits = _with_weights(bits, "AutoRound", format)
    group, symmetric = _group(format)
    _check(model, tokens, group)
    check_roundable(model)
    import torch

    with torch.random.fork_rng(), _silent("autoround"):
        from llmcompressor.modifiers.autoround import AutoRoundModifier
        from llmcompressor.pipelines.sequential import SequentialPipeline

        class InFP32(AutoRoundModifier):
            """Where a processor computes in bf16, auto-round would round the weights to it first."""

            def _update_device_map_for_dp(self, kwargs: dict[str, Any]) -> None:
                super()._update_device_map_for_dp(kwargs)
                kwargs["amp"] = False

        modifier = InFP32(
            config_groups=_weight_grid(model, bits, group, symmetric),
            iters=AUTOROUND_STEPS,
            lr=AUTOROUND_RATE,
            batch_size=BATCH,
            enable_torch_compile=False,
        )
        calibrated = _calibrate(model, tokens, SequentialPipeline, modifier)
    layers = [] if symmetric else _linears(model, calibrated)
    zeros = {name: (-_multiples(layer).amin(-1)).clamp(0, 2**bits.weights - 1) for name, layer in layers}
    return put_codes(model, bits, _codes(model, bits, calibrated, symmetric, zeros))


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Inside, the logger of this name says nothing, and nothing is warned of."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _linears(model: "nn.Module", calibrated: "nn.Module") -> "list[tuple[str, nn.Module]]":
    return [(name, calibrated.get_submodule(name)) for name in quant.decoder_linears(model)]


def _multiples(layer: "nn.Module") -> "Tensor":
    """The weights of a layer that llm-compressor has rounded as multiples of their scales, [out, groups, group]."""
    scale = layer.weight_scale.float()
    return (layer.weight.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None]).round()


def _codes(
    model: "nn.Module", bits: BitWidths, calibrated: "nn.Module", symmetric: bool, zeros: "Mapping[str, Tensor]"
) -> "dict[str, Codes]":
    """By name, the integers of the layers of `calibrated`. zeros: [out, groups], from 0 up, of affine weights."""
    low, found = -(2 ** (bits.weights - 1)), {}
    for name, layer in _linears(model, calibrated):
        scale, integers = layer.weight_scale.float(), _multiples(layer)
        if symmetric:
            integers = integers.clamp(low, -low - 1).flatten(1)
            found[name] = quant.Codes.of_integers(integers, bits.weights, low, scale)
        else:
            integers = (integers + zeros[name][..., None]).clamp(0, 2 * -low - 1).flatten(1)
            found[name] = quant.Codes.of_integers(integers, bits.weights, 0, scale, zeros[name])
    return found


def put_codes(
    model: "nn.Module", bits: str | BitWidths, codes: "Mapping[str, Codes]", scheme: Scheme = Scheme()
) -> "nn.Module":
    """Give each linear layer of the decoder the weights of its codes, by name; activations and cache are rounded on the
    fly."""
    import torch

    quant.quantize_model(model, bits, scheme)
    for name, module in model.named_modules():
        if isinstance(module, quant.QuantizedLinear):
            module.weight_grid = None  # they lie on a grid of the method's own
            module.stored = codes[name]
            with torch.no_grad():
                module.weight.copy_(codes[name].decode())
    return model


def awq(model: "nn.Module", bits: str | BitWidths, tokens: "Tensor", format: Format | None = None) -> "nn.Module":
    """AWQ (Lin et al. 2024): scale the weights' input channels, as SmoothQuant does, for less error; then RTN, to
    `format` if it is given.

    A layer's scales are the best of 20 candidates, by the squared error of the block's output: 1, and 19 that grow with
    the mean activation (their Eq. 4-5) and fall with the mean weight. llm-compressor tries them on its own grid (see
    `gptq`); what follows is our `round_to_nearest`. The inputs of down (and of o, where values have as many heads as
    queries) are scaled, too, in the rows of up (of v). Slow on a CPU: each window passes every block 20 times.
    Raises ValueError for weights at 16 bits, a format that `gptq` does not take either, tokens that are no windows, a
    group that does not divide a layer's input, a model that is quantized already, or one whose layers are not known to
    be smoothable.
    """
    bits = _with_weights(bits, "AWQ", format)
    group, symmetric = _group(format)
    _check(model, tokens, group, smoothed=True)
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.pipelines.sequential import SequentialPipeline

    grid = QuantizationModifier(config_groups=_weight_grid(model, bits, group, symmetric))
    _calibrate(model, tokens, SequentialPipeline, AWQModifier(), grid)
    if format is not None:
        return quant.decode_model(quant.encode_model(model, format))
    return quant.round_to_nearest(model, bits)


def _group(format: Format | None) -> tuple[int | None, bool]:
    """How many input columns share a scale (None: all), and whether the grid is symmetric."""
    return (None, True) if format is None else (format.group, GROUP_FORMATS[format.kind])


def _with_weights(bits: str | BitWidths, method: str, format: Format | None) -> BitWidths:
    """The bit widths, which must round the weights and go with the format."""
    bits = BitWidths.parse(bits)
    if bits.weights == OFF:
        raise ValueError(f"bits of the weights: {OFF} (off) is not allowed for {method}, which rounds them; use 2 to 8")
    _check_format(bits, format, method)
    return bits


def _check(model: "nn.Module", tokens: "Tensor", group: int | None = None, smoothed: bool = False) -> None:
    linears = quant.decoder_linears(model).values()
    if any(isinstance(module, quant.QuantizedLinear) for module in linears):
        raise ValueError("the model is quantized already; load it anew to quantize it in another way")
    for linear in linears:
        check_width(group, linear.in_features)
    import torch

    if tokens.ndim != 2 or not tokens.numel() or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: {tokens.dtype} of shape {list(tokens.shape)} is not allowed; use int64 [N, T]")
    if smoothed:
        check_smoothable(model)


def _weight_grid(model: "nn.Module", bits: BitWidths, group: int | None = None, symmetric: bool = True) -> dict:
    blocks = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits.weights, "type": "int", "symmetric": symmetric} | blocks
    return {"weights": {"targets": list(quant.decoder_linears(model)), "weights": weights}}


def _calibrate(model: "nn.Module", tokens: "Tensor", pipeline: type, *modifiers: Any) -> "nn.Module":
    """What llm-compressor's `oneshot` does, without its traces: all but the weights happens to a copy that shares them,
    which is returned.

    (`oneshot` wants a checkpoint on disk and shuffles; it leaves hooks, wrapped forwards and a session behind.)
    """
    import torch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.args import DatasetArguments
    from llmcompressor.core import create_session
    from llmcompressor.pipelines.cache import IntermediatesCache

    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    shell = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    batches = [{"input_ids": batch} for batch in tokens.split(BATCH)]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # progress bars
        stack.enter_context(patch_attr(logging.getLogger("torch.fx._symbolic_trace"), "disabled", True))
        if data.device().type != "cuda":  # AWQ pins memory, which takes an accelerator
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda self, index: None))
        session = stack.enter_context(create_session())
        session.initialize(model=shell, start=-1, recipe=list(modifiers), calib_data=batches)
        pipeline()(shell, batches, DatasetArguments())
        session.finalize()
        for name, parameter in model.named_parameters():
            parameter.copy_(shell.get_parameter(name))
    for parameter, trained in trains.items():  # AutoRound freezes them all
        parameter.requires_grad_(trained)
    return shell
