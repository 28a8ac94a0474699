"""One object a method, and the registry of all. To add one: its file, and its line below."""

from studylib.methods.base import METHODS, Look, Method, Work, check, find, register
from studylib.methods.llm_qat import LLMQAT, SmoothQuantLLMQAT
from studylib.methods.lora import L4Q, QAT, FineTuned, GPTQLoRA, LoRA, QALoRA, QATLoRA, QLoRA
from studylib.methods.ptq import AWQ, GPTQ, FourBitKernel, FullPrecision, RoundedWeights, RoundToNearest, SmoothQuant

register(  # in the order of tables and legends
    FullPrecision(),
    RoundToNearest(),
    SmoothQuant(),
    GPTQ(),
    AWQ(),
    LLMQAT(),
    SmoothQuantLLMQAT(),
    RoundedWeights(),
    FourBitKernel(),
    LoRA(),
    QLoRA(),
    GPTQLoRA(),
    QALoRA(),
    QATLoRA(),
    L4Q(),
    QAT(),
)

