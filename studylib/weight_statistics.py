"""What a number format does to weights: its error on normal numbers and layer by layer; how normal the weights are."""

from collections import defaultdict

import torch
from torch import nn

from studylib.corpora import evenly_spaced
from studylib.formats import EncodedLinear, Format, encode, non_normal_share
from studylib.layers import decoder_linears

NEURONS = 16  # of each layer whose weights are tested for normality, evenly spaced


def normal_error(format: Format, blocks: int = 16_384, seed: int = 0) -> float:
    """Mean |x - x_q| of x from N(0, 1), over `blocks` blocks of the format.

    Worked: NF4 in blocks of 64: 0.0728, bitsandbytes' published number. Raises ValueError for whole rows as blocks.
    """
    if format.block is None:
        raise ValueError("block: None is not allowed; the error on a normal distribution depends on the block")
    x = torch.randn(blocks, format.block, generator=torch.Generator().manual_seed(seed))
    return (x - encode(x, format).decode()).abs().mean().item()


@torch.no_grad()
def weight_scores(original: nn.Module, encoded: nn.Module) -> dict[str, list[float]]:
    """Scores of the layers of `encoded` (see formats.encode_model) beside those of `original`, in their order.

    "error/<layer>", for q_proj, ... each: |W - W_q| / |W| (Frobenius norms) of the decoder's layers. "non_normal": the
    share of NEURONS neurons of each layer whose weights fail the Shapiro-Wilk test at 5%. "bits": stored bits a weight.
    """
    scores, layers, originals = defaultdict(list), decoder_linears(encoded), decoder_linears(original)
    stored = numbers = 0
    for name, layer in layers.items():
        if not isinstance(layer, EncodedLinear):
            raise ValueError(f"{name}: it is a {type(layer).__name__}; only encoded layers have an error")
        weight = originals[name].weight
        error = (weight - layer.encoded.decode()).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
        scores[f"error/{name.rpartition('.')[2]}"].append(error.item())
        rows = weight[evenly_spaced(NEURONS, len(weight)).to(weight.device)]
        scores["non_normal"].append(non_normal_share(rows))
        stored += layer.encoded.nbytes
        numbers += weight.numel()
    return dict(scores) | {"bits": [8 * stored / numbers]}
