"""What a number format does to weights: its error on normal numbers and layer by layer; how normal the weights are."""

import math
from collections import defaultdict

import torch
from scipy.stats import shapiro
from torch import Tensor, nn

from studylib.config.settings import Format
from studylib.data.corpora import evenly_spaced
from studylib.quant.formats import check_matrix, encode
from studylib.quant.layers import decoder_linears

NEURONS = 16  # of each layer whose weights are tested for normality, evenly spaced
SHAPIRO_LIMIT = 5000  # numbers up to which the p-values of the Shapiro-Wilk test are accurate


def normal_error(format: Format, groups: int = 16_384, seed: int = 0) -> float:
    """Mean |x - x_q| of x from N(0, 1), over `groups` groups of the format.

    Worked: NF4 in groups of 64: 0.0728, bitsandbytes' published number. Raises ValueError for whole rows as groups.
    """
    if format.group is None:
        raise ValueError("group: None is not allowed; the error on a normal distribution depends on the group")
    x = torch.randn(groups, format.group, generator=torch.Generator().manual_seed(seed))
    return (x - encode(x, format).decode()).abs().mean().item()


def non_normal_share(weight: Tensor, level: float = 0.05) -> float:
    """The share of the rows (output neurons) of `weight` [out, in] that fail the Shapiro-Wilk test at `level`.

    QLoRA, appendix F, tests LLaMA-7B's neurons so: 7.5% fail at 5%, where 5% of exactly normal ones would. Of a row of
    more than 5000 numbers, for which the test's p-values are not accurate, every k-th is used, with the least k that
    leaves at most 5000. A row of equal numbers fails.
    Raises ValueError for a weight that is no matrix, not finite, or has rows of fewer than 3 numbers.
    """
    check_matrix(weight, columns=3)
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} is not allowed; use a number between 0 and 1")
    rows = weight.detach().double().cpu()[:, :: math.ceil(weight.shape[1] / SHAPIRO_LIMIT)]
    varied = rows[rows.amin(1) < rows.amax(1)]
    passed = (shapiro(varied.numpy(), axis=1).pvalue >= level).sum() if len(varied) else 0
    return 1 - float(passed) / len(rows)


@torch.no_grad()
def weight_scores(original: nn.Module, model: nn.Module) -> dict[str, list[float]]:
    """Scores of the layers of `model`, whose weights are in low bits, beside those of `original`, in their order.

    "error/<layer>", for q_proj, ... each: |W - W_q| / |W| (Frobenius norms) of the decoder's layers. "non_normal": the
    share of NEURONS neurons of each layer whose weights fail the Shapiro-Wilk test at 5%. "bits": stored bits a weight.
    """
    scores, layers, originals = defaultdict(list), decoder_linears(model), decoder_linears(original)
    stored = numbers = 0
    for name, layer in layers.items():
        codes = layer.codes() if hasattr(layer, "codes") else None
        if codes is None:
            raise ValueError(f"{name}: it is a {type(layer).__name__}; only weights in low bits have an error")
        weight = originals[name].weight
        error = (weight - codes.decode()).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
        scores[f"error/{name.rpartition('.')[2]}"].append(error.item())
        rows = weight[evenly_spaced(NEURONS, len(weight)).to(weight.device)]
        scores["non_normal"].append(non_normal_share(rows))
        stored += codes.nbytes
        numbers += weight.numel()
    return dict(scores) | {"bits": [8 * stored / numbers]}
