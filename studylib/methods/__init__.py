"""One object a method, and the registry of all. To add one: its file, and its line below."""

import lazy_loader

from studylib.methods.base import register
from studylib.methods.llm_qat import GPTQLLMQAT, LLMQAT, SmoothQuantLLMQAT
from studylib.methods.lora import (
    L4Q,
    QAT,
    EfficientQAT,
    GPTQLoRA,
    GPTQQALoRA,
    LearnedStepQAT,
    LoRA,
    QALoRA,
    QATLoRA,
    QLoRA,
)
from studylib.methods.ptq import (
    AWQ,
    GPTQ,
    AutoRound,
    FourBitKernel,
    FullPrecision,
    RoundedWeights,
    RoundToNearest,
    SideBySide,
    SmoothQuant,
)

register(  # in the order of tables and legends
    FullPrecision(),
    RoundToNearest(),
    SmoothQuant(),
    GPTQ(),
    AWQ(),
    AutoRound(),
    LLMQAT(),
    SmoothQuantLLMQAT(),
    GPTQLLMQAT(),
    RoundedWeights(),
    FourBitKernel(),
    SideBySide(),
    LoRA(),
    QLoRA(),
    GPTQLoRA(),
    QALoRA(),
    GPTQQALoRA(),
    QATLoRA(),
    L4Q(),
    QAT(),
    LearnedStepQAT(),
    EfficientQAT(),
)

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
