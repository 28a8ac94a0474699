"""The methods of fine-tuning on low-bit weights: LoRA, QLoRA and their relatives, QA-LoRA, QAT-LoRA, L4Q, QAT.

Each prepares the base and what is trained; learning, keeping and deploying is the same for all (see FineTuned.apply).
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studylib.config import (
    AFFINE,
    ALL,
    BESIDE,
    DEFAULT_GROUP,
    DEQUANTIZED,
    DORA,
    FROM_ORIGINAL,
    FULL,
    INITS,
    INTEGER_FORMATS,
    LOFTQ,
    MERGED_16,
    PACKED,
    PISSA,
    PLAIN,
    TINY,
    Adapter,
    Arm,
    Format,
    Scheme,
    check_known,
    in_bitsandbytes,
    kept_if_possible,
    usable,
)
from studylib.methods.base import (
    ADAPTED,
    DENSE,
    GGUF,
    L4Q_PAPER,
    METHODS,
    PEFT,
    QLORA_PAPER,
    SHIFTED,
    SIXTEEN_BITS,
    Look,
    Method,
    Work,
)
from studylib.methods.ptq import CALIBRATION_WINDOWS, gptq_codes, gptq_once, put_codes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from studylib.config import Log
    from studylib.quant import Codes


READERS = {PEFT: "transformers", GGUF: "llama.cpp"}  # who makes the base that an adapter is beside
UNIFORM = (FULL, AFFINE)  # the formats of L4Q's comparison: its own grid, and one with a zero point


class FineTuned(Method):
    """A method that learns from instructions, on a base in `format` and through `adapter`.

    formats: the kinds of format that its base can have, None for any. kinds: the kinds of adapter. chooses_layers,
    drops_out: whether the adapter's layers and dropout can be chosen.
    """

    papers: tuple[str, ...] = (L4Q_PAPER,)
    needs = frozenset({"instructions", "tuning", "adapter", "format"})
    numerics: tuple[str, ...] = ("formats",)
    few_shot = ("mmlu",)
    formats: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = (PLAIN,)
    inits: tuple[str | None, ...] = (None,)
    chooses_layers = drops_out = keeps_adapter = True

    def usual_format(self, bits: int = 4, group: int | None = 64, double: bool = True) -> Format | None:
        """The integers of L4Q's comparison, with a level at 0 and no zero points, for a method that takes them."""
        return Format(self.formats[0], bits, group) if self.formats else super().usual_format(bits, group, double)

    @abstractmethod
    def prepare(
        self,
        model: "PreTrainedModel",
        format: Any,
        adapter: Any,
        names: list[str],
        seed: int,
        tokens: Any,
    ) -> None:
        """Put base and adapters in place; what requires gradients afterwards is what trains.

        format, adapter: as the method needs them, else None. names: the linear layers that get an adapter. tokens
        [N, T]: what a base is calibrated on, for a method that needs data. The model's parameters are fp32 and frozen.
        """

    def check(self, arm: Arm) -> None:
        super().check(arm)
        self.check_parts(arm.format, arm.adapter)
        self.check_merge(arm.merge, arm.format)

    def check_parts(self, format: Format | None, adapter: Adapter | None) -> None:
        """Raise ValueError unless format and adapter go with this method."""
        for name, given in (("format", format), ("adapter", adapter)):
            if (given is None) == (name in self.needs):
                wrong = f"{given.title} is not allowed" if isinstance(given, Format) else "not allowed"
                raise ValueError(f"{name}: {'missing' if given is None else wrong} for {self.name!r}")
        if self.formats is not None and format is not None:
            if format.kind not in self.formats:
                allowed = " or ".join(map(repr, self.formats))
                raise ValueError(f"format: {format.kind!r} is not allowed for {self.name!r}; use {allowed}")
            if format.double or format.scale_bits != 32:
                raise ValueError(f"format: {format.title} is not allowed for {self.name!r}; use fp32 scales")
        if adapter is None:
            return
        for name, chosen, fits in (
            ("kind", adapter.kind, adapter.kind in self.kinds),
            ("init", adapter.init, adapter.init in self.inits),
            ("dropout", adapter.dropout, not adapter.dropout or self.drops_out),
            ("layers", adapter.layers, adapter.layers == ALL or self.chooses_layers),
        ):
            if not fits:
                default = getattr(Adapter(), name)
                raise ValueError(f"{name}: {chosen!r} is not allowed for {self.name!r}; use {default!r}")

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        from studylib.methods.adapters import adapted_layers
        from studylib.quant import decoder_linears

        if arm.adapter:
            linears = decoder_linears(skeleton)
            check_rank(arm.adapter, {name: linears[name] for name in adapted_layers(skeleton, arm.adapter.layers)})

    def deploys(self, arm: Arm) -> str:
        if arm.adapter is None and self.learns_grid and arm.format is not None and arm.format.kind == AFFINE:
            return SHIFTED
        if arm.adapter is None or arm.merge in PACKED:
            return super().deploys(arm)
        if arm.merge in (DEQUANTIZED, MERGED_16):
            return DENSE
        return ADAPTED if self.keeps_adapter else SHIFTED

    def usual_container(self, arm: Arm) -> str | None:
        beside_integers = self.deploys(arm) == ADAPTED and "format" in self.needs and self._is_held(GGUF, arm)
        return GGUF if beside_integers else super().usual_container(arm)

    def _is_held(self, container: str, arm: Arm) -> bool:
        """Whether GGUF or peft holds an adapter that is beside its base."""
        assert arm.adapter is not None
        in_low_bits = arm.format if "format" in self.needs else None
        if container == PEFT:
            stock = in_low_bits is None or (in_bitsandbytes(in_low_bits) and in_low_bits.group == DEFAULT_GROUP)
            return stock and arm.adapter.kind in (PLAIN, DORA) and arm.model != TINY
        integers = in_low_bits is not None and in_low_bits.kind in INTEGER_FORMATS
        return in_low_bits is None or (integers and arm.adapter.kind != DORA)  # a 16-bit base takes the adapter in

    def container(self, arm: Arm, wanted: str | None = None) -> str:
        found = super().container(arm, wanted)
        if self.deploys(arm) == ADAPTED and found != SIXTEEN_BITS and not self._is_held(found, arm):
            raise ValueError(
                f"its adapter goes with a base that {READERS[found]} does not make; take an arm that is merged"
            )
        return found

    def apply(self, work: Work) -> "Log":
        from studylib.methods.adapters import load_trained, merge, merged_student, save_trained
        from studylib.quant import decode_model
        from studylib.train import fine_tune, training_pairs

        arm, model = work.arm, work.model
        assert arm.instructions is not None and arm.tuning is not None
        tokens: Any = None if work.data is None else work.calibration(CALIBRATION_WINDOWS)
        if self.by_gptq:
            with work.phase("quantize"):
                tokens = gptq_once(work)
        with work.phase("train"):
            format = arm.format if "format" in self.needs else None
            attach(model, self, format=format, adapter=arm.adapter, seed=arm.seed, tokens=tokens)
            pairs, validation = training_pairs(arm.instructions.source)
            if usable(work.trained):
                log = load_trained(model, work.trained)
                work.progress(arm.tuning.last * arm.tuning.batch * arm.instructions.length)
            else:
                log = fine_tune(
                    model,
                    work.tokenizer,
                    pairs,
                    arm.instructions,
                    arm.tuning,
                    work.checkpoints,
                    held_out=validation,
                    rows=work.rows,
                    keep=work.keep,
                    progress=work.progress,
                    report=work.report,
                )
                if self.keeps_adapter:
                    with kept_if_possible(f"the adapter of {arm.method} {arm.bits}"):
                        save_trained(model, log, work.trained)
            if not _finite(model):  # by its very last step
                log = _diverged(log)
            finite = math.isfinite(log.steps[-1]["loss"])
            original = work.load() if finite and arm.merge in FROM_ORIGINAL else None
            if finite and arm.merging:
                assert original is not None
                work.model = student = merged_student(model, arm.format, original)
                towards = fine_tune(
                    student,
                    work.tokenizer,
                    pairs,
                    arm.instructions,
                    arm.merging,
                    work.checkpoints / f"{work.checkpoints.name}-merging",
                    teacher=model,
                    rows=work.rows,
                    progress=work.progress,
                    report=dataclasses.replace(work.report, run=f"{work.report.run}, merging"),
                )
                if math.isfinite(towards.steps[-1]["loss"]) and _finite(student):
                    decode_model(student).requires_grad_(False)
                else:
                    log = _diverged(log)
            elif finite:
                merge(model, arm.merge, format=arm.format, original=original)
        return log


def _finite(model: "PreTrainedModel") -> bool:
    """Whether all that trains is."""
    return all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


def _diverged(log: "Log") -> "Log":
    return dataclasses.replace(log, steps=[*log.steps[:-1], log.steps[-1] | {"loss": math.nan}])


def attach(
    model: "PreTrainedModel",
    method: FineTuned | str,
    *,
    format: Format | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
    tokens: "Tensor | Mapping[str, Codes] | None" = None,
) -> "PreTrainedModel":
    """Prepare a transformers model (fp32, as loaded) in place for fine-tuning; what requires gradients is what trains.

    method: a FineTuned, or its name. seed draws the adapters. tokens [N, T]: what a base is calibrated on, for
    a method that needs it; or what ptq.gptq_codes found by them, for one whose base GPTQ rounds.
    Trained parameters are fp32; frozen ones bf16 where the hardware computes in bf16: run it under models.autocast.
    Raises ValueError, and changes nothing, for anything that does not fit together.
    """
    from torch import nn

    from studylib.methods.adapters import Adaptation, adapted_layers, compact
    from studylib.quant import DeployedLinear, decoder_linears

    linears = decoder_linears(model)
    plain = (nn.Linear, DeployedLinear)  # what is deployed can be adapted anew, from its dense weights
    if hasattr(model, "adaptation") or any(type(linear) not in plain for linear in linears.values()):
        raise ValueError("the model is quantized or adapted already; load it anew")
    own = find_tuned(method) if isinstance(method, str) else method
    own.check_parts(format, adapter)
    if (tokens is None) == ("data" in own.needs):
        raise ValueError(
            f"tokens: {'missing; its base is calibrated on them' if tokens is None else f'{own.name!r} takes none'}"
        )
    names = [] if adapter is None else adapted_layers(model, adapter.layers)
    for linear in linears.values():
        if format is not None:
            format.check_width(linear.in_features)
    if adapter is not None:
        check_rank(adapter, {name: linears[name] for name in names})
    for name, linear in linears.items():
        if isinstance(linear, DeployedLinear):
            model.set_submodule(name, linear.plain())
    model.requires_grad_(False)
    own.prepare(model, format, adapter, names, seed, tokens)
    compact(model)
    model.adaptation = Adaptation(own, format, adapter, tuple(linears))
    return model


def check_rank(adapter: Adapter, linears: "dict[str, nn.Linear]") -> None:
    """Raise ValueError for an adapter that begins with more singular vectors than one of the layers has."""
    for name, linear in linears.items():
        most = min(linear.in_features, linear.out_features)
        if adapter.kind in (PISSA, LOFTQ) and adapter.rank > most:
            raise ValueError(
                f"rank: {adapter.rank} is not allowed with {adapter.kind!r}; {name} has {most} singular values"
            )


def find_tuned(name: str) -> FineTuned:
    """The method of fine-tuning of this name; ValueError, with the names there are, where there is none."""
    tuned = {name: method for name, method in METHODS.items() if isinstance(method, FineTuned)}
    check_known("method", name, tuned)
    return tuned[name]


class LoRA(FineTuned):
    """A 16-bit base. A format says what it is rounded to when base and adapter are merged."""

    name, title, source = "lora", "LoRA", "arXiv 2106.09685"
    papers, look = (QLORA_PAPER, L4Q_PAPER), Look("#666666", "h")
    needs, takes = FineTuned.needs - {"format"}, frozenset({"format"})
    rounds, numerics = False, ()
    kinds = (PLAIN, DORA, PISSA)
    few_shot_at = ("16-16-16",)

    def check_parts(self, format: Format | None, adapter: Adapter | None) -> None:
        if adapter is not None and adapter.kind == LOFTQ:
            raise ValueError(
                f"kind: {LOFTQ!r} is not allowed for 'lora', whose base has no rounding error; use 'qlora'"
            )
        super().check_parts(format, adapter)

    def check(self, arm: Arm) -> None:
        base = dataclasses.replace(arm, format=None, merge=BESIDE, merging=None) if arm.merge in PACKED else arm
        super().check(base)
        self.check_merge(arm.merge, arm.format)

    def as_trained(self, arm: Arm) -> Arm:
        return dataclasses.replace(super().as_trained(arm), format=None)

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.methods.adapters import attach_lora

        attach_lora(model, format, adapter, names, seed)


class QLoRA(FineTuned):
    """A base in low bits, through bitsandbytes for NF4 and its FP4."""

    name, title, source = "qlora", "QLoRA", "arXiv 2305.14314"
    papers, look = (QLORA_PAPER, L4Q_PAPER), Look("#0072B2", "s")
    kinds = (PLAIN, DORA, PISSA, LOFTQ)
    few_shot_at = ("4-16-16",)

    def usual_format(self, bits: int = 4, group: int | None = 64, double: bool = True) -> Format:
        """NormalFloat, double quantized or not."""
        return Format("nf", bits, group, double)

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.methods.adapters import attach_lora

        attach_lora(model, format, adapter, names, seed)


def _round_by_gptq(model: "PreTrainedModel", format: Format, tokens: "Tensor | Mapping[str, Codes]") -> None:
    bits = f"{format.bits}-16-16"
    put_codes(model, bits, tokens if isinstance(tokens, Mapping) else gptq_codes(model, bits, tokens, format))


class GPTQLoRA(FineTuned):
    """LoRA on a base that GPTQ rounded."""

    name, title, source = "gptq+lora", "GPTQ + LoRA", "L4Q, section 5.1"
    look, numerics = Look("#009E73", "^"), ("formats", "grids", "ptq")
    needs, by_gptq = FineTuned.needs | {"data"}, True
    formats = UNIFORM

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.methods.adapters import inject

        _round_by_gptq(model, format, tokens)
        inject(model, adapter, names, seed)


class QALoRA(FineTuned):
    """An adapter that is merged into the zero points of its base."""

    name, title, source = "qa-lora", "QA-LoRA", "arXiv 2309.14717"
    look, formats, keeps_adapter = Look("#E69F00", "v"), UNIFORM, False
    relative_rate = 0.2

    def usual_adapter(self) -> Adapter:
        """Of twice the rank, as in L4Q, section 5.1: its A is a group's width smaller."""
        usual = Adapter()
        return Adapter(2 * usual.rank, 2 * usual.alpha)

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.quant import encode_model, qa_lora_model

        encode_model(model, format)
        qa_lora_model(model, adapter, names, seed)


class GPTQQALoRA(QALoRA):
    """QA-LoRA on a base that GPTQ rounded, as its paper and L4Q's have it."""

    name, title, source = "gptq+qa-lora", "GPTQ + QA-LoRA", "L4Q, section 5.1"
    look, numerics = Look("#E69F00", "^"), ("formats", "grids", "ptq")
    needs, by_gptq = FineTuned.needs | {"data"}, True

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.quant import qa_lora_model

        _round_by_gptq(model, format, tokens)
        qa_lora_model(model, adapter, names, seed)


class QATLoRA(FineTuned):
    """LoRA beside a frozen weight that is rounded to a grid whose scales and offsets are learned with it."""

    name, title, source = "qat-lora", "QAT-LoRA", "L4Q, section 4"
    learns_grid = True
    look, formats, numerics = Look("#56B4E9", "p"), UNIFORM, ("formats", "learned grids")
    relative_rate = 3.0
    inits = (None, *INITS)

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.data import models
        from studylib.methods.adapters import inject
        from studylib.quant import learned_grid_model, train_grids

        learned_grid_model(model, format.bits, format.group, models.compute_dtype(), adapter.init or first_grid(format))
        inject(model, adapter, names, seed)
        train_grids(model)


class L4Q(FineTuned):
    """A weight, its adapter and its grid trained as one, so that integers are left."""

    name, title, source = "l4q", "L4Q", "arXiv 2402.04902"
    learns_grid = True
    look, formats, numerics = Look("#D55E00", "X"), UNIFORM, ("formats", "learned grids")
    inits, keeps_adapter, chooses_layers, drops_out = (None, *INITS), False, False, False
    relative_rate = 3.0
    few_shot_at = ("4-16-16",)

    def check_parts(self, format: Format | None, adapter: Adapter | None) -> None:
        super().check_parts(format, adapter)
        if format is not None and adapter is not None and adapter.init == first_grid(format):
            raise ValueError(f"init: {adapter.init!r} is how scales of {format.title} start by default; leave it out")

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.methods.adapters import compact
        from studylib.quant import l4q_model

        compact(model)  # before scales are chosen: a weight that bf16 rounds up must not fall off its grid
        rank, alpha, init = adapter.rank, adapter.alpha, adapter.init or first_grid(format)
        l4q_model(model, format.bits, group=format.group, rank=rank, alpha=alpha, init=init, seed=seed)


def first_grid(format: Format) -> str:
    """How scales and offsets that are learned start (see quant.initial_grid): on the grid of their format."""
    return "l4q" if format.kind == FULL else AFFINE


class QAT(FineTuned):
    """All linear weights of the decoder train, rounded to the format in every pass; no adapter."""

    name, title, source = "qat", "QAT", "L4Q, section 5.1"
    look, numerics = Look("#CC79A7", "P"), ("formats", "grids")
    needs = FineTuned.needs - {"adapter"}
    formats, keeps_adapter = UNIFORM, False
    relative_rate = 0.05

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.quant import decoder_linears, quantize_model

        quantize_model(model, f"{format.bits}-16-16", Scheme(format.grid.kind, format.group))
        for linear in decoder_linears(model).values():
            linear.weight.requires_grad_(True)


class LearnedStepQAT(QAT):
    """QAT whose scales are trained with the weights; offsets too, where the format has any."""

    name, title, source = "lsq", "QAT with learned steps", "arXiv 1902.08153"
    learns_grid = True
    look, numerics = Look("#CC79A7", "D"), ("formats", "learned grids")

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        import torch

        from studylib.quant import decoder_linears, learned_grid_model, train_grids

        offsets = format.kind == AFFINE
        learned_grid_model(model, format.bits, format.group, torch.float32, first_grid(format), offsets)
        train_grids(model)
        for linear in decoder_linears(model).values():
            linear.weight.requires_grad_(True)


class EfficientQAT(FineTuned):
    """Decoder blocks trained one by one at the format, then integers fixed and scales trained on the instructions.

    Block-AP and E2E-QP of its paper. The first takes one block's gradients, optimizer and activations at a time, and
    the second trains a number a group. Interrupted in the second phase, it repeats the first, to the same end.
    """

    name, title, source = "efficientqat", "EfficientQAT", "arXiv 2407.11062"
    learns_grid = grid_alone = True
    look, numerics = Look("#8A7B00", "d"), ("formats", "learned grids")
    needs = FineTuned.needs - {"adapter"} | {"data"}
    formats, keeps_adapter = UNIFORM, False
    relative_rate = 0.05

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        from studylib.train import decoder_blocks

        super().check_model(arm, skeleton)
        decoder_blocks(skeleton)

    def prepare(
        self, model: "PreTrainedModel", format: Format, adapter: Adapter, names: list[str], seed: int, tokens: Any
    ) -> None:
        from studylib.train import train_blocks

        train_blocks(model, tokens, format, first_grid(format))
