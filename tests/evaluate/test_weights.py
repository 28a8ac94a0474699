import copy

import numpy as np
import pytest
import torch
from scipy import stats

from studylib.evaluate.weights import NEURONS, normal_error, weight_scores
from studylib.config.settings import Format
from studylib.quant.formats import encode, encode_model
from studylib.quant.layers import decoder_linears


@pytest.mark.parametrize(("block", "error"), [(64, 0.072798), (128, 0.0768)])
def test_the_error_on_normal_numbers_is_the_published_one(block, error):
    assert normal_error(Format("nf", 4, block)) == pytest.approx(error, rel=5e-3)
    with pytest.raises(ValueError, match="block: None"):
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
    with pytest.raises(ValueError, match="only encoded layers have an error"):
        weight_scores(original, original)
