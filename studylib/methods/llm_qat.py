"""LLM-QAT: weights, activations and cache trained at their bit widths towards the full-precision model."""

from typing import TYPE_CHECKING

from studylib.config import AFTER_ROTARY, ATTENTION, HIDDEN, LEARNED, OFF, RAW_HIDDEN, Arm
from studylib.methods.base import LLM_QAT_PAPER, Look, Method, Work
from studylib.methods.ptq import CALIBRATION_WINDOWS, check_gptq, check_smoothable, gptq_once, put_codes, smoothquant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from studylib.config import Log

HELD_OUT_WINDOWS = 1  # of each evaluation corpus, for learning curves
VALIDATION_WINDOWS = 2  # of each corpus, for choosing the rate of an arm that is scored on nothing


class LLMQAT(Method):
    name, title, source = "llm-qat", "LLM-QAT", "arXiv 2305.17888"
    papers: tuple[str, ...] = (LLM_QAT_PAPER,)
    look = Look("#0072B2", "o")
    needs, takes = frozenset({"data", "training"}), frozenset({"scheme"})
    few_shot_at: tuple[str, ...] = ("4-8-4",)

    def check(self, arm: Arm) -> None:
        super().check(arm)
        assert arm.training is not None
        if self.trains_grid(arm.scheme) and arm.training.mask is not None:
            learned = f"the grid {arm.scheme.grid!r}" if arm.scheme.grid in LEARNED else f"the grid of {self.name!r}"
            raise ValueError(f"mask: {arm.training.mask} does not go with {learned}, whose gradients are its own")
        if arm.scheme.rotated and {HIDDEN, RAW_HIDDEN} & {*arm.training.features}:
            raise ValueError(
                f"loss: {arm.training.loss!r} compares hidden states, which lie in another basis in a rotated model"
            )
        if ATTENTION in arm.training.features and arm.scheme.keys == AFTER_ROTARY and arm.widths.cache < OFF:
            raise ValueError(
                f"loss: {arm.training.loss!r} needs attention maps, which the kernel that quantizes keys "
                f"{AFTER_ROTARY!r} does not return"
            )

    def apply(self, work: Work) -> "Log":
        from studylib.quant import freeze_weights
        from studylib.train import held_out_windows, train_llm_qat, validation_windows

        arm, model, data = work.arm, work.model, work.data
        assert arm.training is not None and data is not None
        with work.phase("quantize"):
            self.quantize(work)
        with work.phase("train"):
            attention, length = model.config._attn_implementation, data.windows.shape[1]
            if ATTENTION in arm.training.features:
                model.set_attn_implementation("eager")
            log = train_llm_qat(
                model,
                data.teacher,
                data.head,
                data.windows,
                arm.training,
                work.checkpoints,
                seed=arm.seed,
                held_out=held_out_windows(arm.evaluation.corpora, work.tokenizer, length, HELD_OUT_WINDOWS)
                if arm.evaluation.corpora
                else validation_windows(work.tokenizer, length, VALIDATION_WINDOWS),
                keep=work.keep,
                progress=work.progress,
                report=work.report,
            )
            if ATTENTION in arm.training.features:
                model.set_attn_implementation(attention)
            freeze_weights(model)
        return log

    def quantize(self, work: Work) -> None:
        """Make work.model the student, as it is before training."""
        from studylib.quant import quantize_model

        assert work.arm.training is not None
        quantize_model(work.model, work.arm.bits, work.arm.scheme, mask=work.arm.training.mask)


class SmoothQuantLLMQAT(LLMQAT):
    name, title = "smoothquant+llm-qat", "SmoothQuant + LLM-QAT"
    look = Look("#56B4E9", "X")
    numerics = ("grids", "ptq")
    few_shot_at = ()

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_smoothable(skeleton)

    def quantize(self, work: Work) -> None:
        smoothquant(work.model, work.calibration(CALIBRATION_WINDOWS))
        super().quantize(work)


class GPTQLLMQAT(LLMQAT):
    """LLM-QAT of the weights that GPTQ leaves: of its integers, with steps that begin at its scales and are learned as
    LSQ's are."""

    name, title, source = "gptq+llm-qat", "GPTQ + LLM-QAT", ""
    papers, look = (), Look("#009E73", "X")
    numerics = ("grids", "weight grids", "ptq")
    learns_grid = by_gptq = True
    relative_rate = 0.02  # by validation text: scales learn, and weights are best left nearly where GPTQ put them
    version = 2  # -2^(bits-1), which GPTQ uses, had been clipped
    few_shot_at = ()

    def check(self, arm: Arm) -> None:
        super().check(arm)
        check_gptq(arm, self)

    def quantize(self, work: Work) -> None:
        from studylib.quant import QuantizedLinear

        put_codes(work.model, work.arm.bits, gptq_once(work), work.arm.scheme)
        for module in work.model.modules():
            if isinstance(module, QuantizedLinear):
                module.learn_steps()
