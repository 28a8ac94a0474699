"""How decoding is timed."""

from studylib.config.budgets import EXECUTIONS, OWN, Decoding
from studylib.config.settings import Format
from studylib.data.models import load_model
from studylib.evaluate import scores
from studylib.evaluate.scores import decoding_seconds

AFFINE = Format("affine", 4, 32)


def test_every_execution_of_every_model_is_timed(monkeypatch):
    monkeypatch.setattr(scores, "_layers_of", lambda shape: load_model("tiny-random"))
    found = decoding_seconds(lambda: load_model("tiny-random"), AFFINE, Decoding(4, 2, 3, ("llama-7b",)))
    assert set(found) == {(name, kind) for name in (OWN, "llama-7b") for kind in EXECUTIONS}
    assert all(times.shape == (3,) and (times > 0).all() for times in found.values())
