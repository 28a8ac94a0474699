"""How decoding is timed."""

import pytest

from studylib.config.budgets import EXECUTIONS, OWN, Decoding
from studylib.config.settings import Format
from studylib.data.models import load_model
from studylib.evaluate import speed
from studylib.evaluate.speed import decoding_seconds

AFFINE = Format("affine", 4, 32)


def test_every_execution_of_every_model_is_timed(monkeypatch):
    monkeypatch.setattr(speed, "_layers_of", lambda shape: load_model("tiny-random"))
    found = decoding_seconds(lambda: load_model("tiny-random"), AFFINE, Decoding(4, 2, 3, ("llama-7b",)))
    assert set(found) == {(name, kind) for name in (OWN, "llama-7b") for kind in EXECUTIONS}
    assert all(times.shape == (3,) and (times > 0).all() for times in found.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens: 0 is not allowed; use 1 or more"),
        ({"shapes": ("llama-9b",)}, "shape: 'llama-9b' is not known; use llama-7b, llama-13b"),
    ],
)
def test_what_cannot_be_timed_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**fields)
