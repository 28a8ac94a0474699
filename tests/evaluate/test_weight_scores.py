import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from studylib.config.settings import Format
from studylib.evaluate.scores import NEURONS, non_normal_share, normal_error, weight_scores
from studylib.quant.formats import encode, encode_model
from studylib.quant.layers import decoder_linears


@pytest.mark.parametrize(("group", "error"), [(64, 0.072798), (128, 0.0768)])
def test_the_error_on_normal_numbers_is_the_published_one(group, error):
    assert normal_error(Format("nf", 4, group)) == pytest.approx(error, rel=5e-3)
    with pytest.raises(ValueError, match="group: None"):
        normal_error(Format("affine", 4, None))


def test_scores_of_the_weights_are_what_numpy_finds(tiny_model):
    original, format = copy.deepcopy(tiny_model), Format("nf", 4, 32, double=True)
    scores = weight_scores(original, encode_model(tiny_model, format))
    linears = decoder_linears(original)
    down = [linear.weight.detach().double().numpy() for name, linear in linears.items() if name.endswith("down_proj")]
    rounded = [encode(torch.tensor(weight), format).decode().double().numpy() for weight in down]
    expected = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(down, rounded, strict=True)]
    np.testing.assert_allclose(scores["error/down_proj"], expected, rtol=1e-4)
    assert len(scores["non_normal"]) == len(linears) == 14
    first = next(iter(linears.values())).weight.detach().double().numpy()
    rows = first[np.arange(NEURONS) * len(first) // NEURONS]
    assert scores["non_normal"][0] == np.mean([stats.shapiro(row).pvalue < 0.05 for row in rows])
    assert 4.1 < scores["bits"][0] < 4.4
    with pytest.raises(ValueError, match="q_proj: it is a Linear; only weights in low bits have an error"):
        weight_scores(original, original)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_non_normal_share_counts_the_rows_that_fail():
    weight = normal(200, 300)
    one_by_one = sum(stats.shapiro(row).pvalue < 0.05 for row in weight.double().numpy()) / 200
    assert non_normal_share(weight) == pytest.approx(one_by_one) and 0.01 < one_by_one < 0.1
    assert non_normal_share(weight, level=0.5) > 0.3
    assert non_normal_share(weight.pow(3)) == 1
    half = torch.cat([weight[:10] * 0, weight[:10].bfloat16().float()])
    assert non_normal_share(half) == pytest.approx(0.5 + non_normal_share(half[10:]) / 2)
    assert non_normal_share(torch.ones(3, 8)) == 1


def test_long_rows_are_thinned_out_for_the_normality_test():
    long = normal(3, 11008)
    expected = sum(stats.shapiro(row).pvalue < 0.5 for row in long[:, ::3].double().numpy()) / 3
    assert non_normal_share(long, level=0.5) == pytest.approx(expected)
    long[:, 1::3] = 100  # what is not looked at
    assert non_normal_share(long, level=0.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "level", "message"),
    [
        (torch.ones(2, 2), 0.05, r"the shape \[2, 2\] is not allowed"),
        (torch.ones(8), 0.05, r"the shape \[8\] is not allowed"),
        (torch.full((2, 8), math.nan), 0.05, "holds NaN or infinity"),
        (torch.ones(2, 8), 5, "level: 5 is not allowed; use a number between 0 and 1"),
    ],
)
def test_bad_normality_tests_are_refused(weight, level, message):
    with pytest.raises(ValueError, match=message):
        non_normal_share(weight, level)
