"""The methods that train nothing: full precision, rounding, SmoothQuant, GPTQ, AWQ, formats, the 4-bit kernel."""

from typing import TYPE_CHECKING

from studylib.config.arm import Arm
from studylib.methods.base import L4Q_PAPER, LLM_QAT_PAPER, PAPERS, QLORA_PAPER, Look, Method, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMOOTHABLE = ("llama", "mistral", "qwen2", "qwen3")  # norms that feed q, k, v and gate, up, and nothing else
CALIBRATION_WINDOWS = 32  # of the data, at most, for SmoothQuant and GPTQ, whose time grows with them
AWQ_WINDOWS = 8  # and for AWQ, which runs each of them some twenty times through every layer


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
        from studylib.quant.layers import round_to_nearest

        with work.phase("quantize"):
            round_to_nearest(work.model, work.arm.bits, work.arm.scheme)


class SmoothQuant(Method):
    name, title, source = "smoothquant", "SmoothQuant", "arXiv 2211.10438"
    papers, look = (LLM_QAT_PAPER,), Look("#E69F00", "^", hollow=True)
    needs, takes = frozenset({"data"}), frozenset({"scheme"})
    numerics = ("grids", "ptq")

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_smoothable(skeleton)

    def apply(self, work: Work) -> None:
        from studylib.methods.calibration import smoothquant
        from studylib.quant.layers import round_to_nearest

        with work.phase("quantize"):
            smoothquant(work.model, work.calibration(CALIBRATION_WINDOWS))
            round_to_nearest(work.model, work.arm.bits, work.arm.scheme)


class GPTQ(Method):
    name, title, source = "gptq", "GPTQ", "arXiv 2210.17323"
    papers, look = (LLM_QAT_PAPER,), Look("#009E73", "v", hollow=True)
    needs, numerics = frozenset({"data"}), ("grids", "ptq")

    def apply(self, work: Work) -> None:
        from studylib.methods.calibration import gptq

        with work.phase("quantize"):
            gptq(work.model, work.arm.bits, work.calibration(CALIBRATION_WINDOWS))


class AWQ(Method):
    name, title, source = "awq", "AWQ", "arXiv 2306.00978"
    papers, look = (LLM_QAT_PAPER,), Look("#CC79A7", "P", hollow=True)
    needs, numerics = frozenset({"data"}), ("grids", "ptq")

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        check_smoothable(skeleton)

    def apply(self, work: Work) -> None:
        from studylib.methods.calibration import awq

        with work.phase("quantize"):
            awq(work.model, work.arm.bits, work.calibration(AWQ_WINDOWS))


class RoundedWeights(Method):
    """The decoder's weights rounded once to a number format; everything else as it was."""

    name, title, source = "encoded", "rounded weights", "QLoRA, section 3"
    papers, look = (QLORA_PAPER,), Look("#D55E00", "s", hollow=True)
    needs, numerics = frozenset({"format"}), ("formats",)
    checks_weights = True

    def usual_format(self, bits: int = 4, group: int | None = 64, double: bool = True) -> None:
        """None: which format it is, is what is asked."""

    def apply(self, work: Work) -> None:
        from studylib.quant.formats import decode_model, encode_model

        assert work.arm.format is not None
        with work.phase("quantize"):
            decode_model(encode_model(work.model, work.arm.format))


class FourBitKernel(Method):
    """4-bit integers multiplied as they are stored, by PyTorch's kernel for processors; its decoding is timed."""

    name, title, source = "4-bit kernel", "4-bit kernel", "L4Q, section 5.4"
    papers, look = (L4Q_PAPER,), Look("#009E73", "P")
    needs, numerics = frozenset({"format", "decoding"}), ("formats", "execution")

    def check(self, arm: Arm) -> None:
        from studylib.quant.kernel import check_format

        super().check(arm)
        check_format(arm.format)

    def check_model(self, arm: Arm, skeleton: "PreTrainedModel") -> None:
        from studylib.quant.kernel import check_executable

        check_executable(skeleton, arm.format)

    def apply(self, work: Work) -> None:
        from studylib.data import models
        from studylib.quant.formats import encode_model
        from studylib.quant.kernel import int4_model

        assert work.arm.format is not None
        with work.phase("quantize"):
            work.model = int4_model(encode_model(work.model.cpu(), work.arm.format), models.compute_dtype())


def check_smoothable(model: "PreTrainedModel") -> None:
    """Raise ValueError where it is not known which norms SmoothQuant and AWQ may put their scales into."""
    if model.config.model_type not in SMOOTHABLE:
        raise ValueError(
            f"model: which norms to smooth is not known for {model.config.model_type!r}; use one of "
            f"{', '.join(SMOOTHABLE)}"
        )
