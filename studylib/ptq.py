"""Post-training quantization: methods that need no training."""

from torch import nn

from studylib.layers import freeze_weights, quantize_model
from studylib.quantizers import BitWidths


def round_to_nearest(model: nn.Module, bits: str | BitWidths) -> nn.Module:
    """RTN on LLM-QAT's symmetric MinMax grid: weights are rounded once in place, activations and cache on the fly."""
    return freeze_weights(quantize_model(model, bits))
