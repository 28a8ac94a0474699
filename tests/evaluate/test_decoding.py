"""Times of the 4-bit kernel: which are taken, and in how many processes."""

import numpy as np
import pytest
import torch

from studylib.config import EXECUTIONS, OWN, Adapter, Decoding, Format
from studylib.data import models
from studylib.evaluate import decoding
from studylib.methods import attach
from studylib.quant import encode_model, int4_model

AFFINE = Format("affine", 4, 32)


def test_every_execution_of_every_model_is_timed(monkeypatch):
    monkeypatch.setattr(decoding, "_layers_of", lambda shape: models.load_model("tiny-random"))
    found = decoding.seconds_in_this_process("tiny-random", AFFINE, Decoding(4, 2, 3, ("llama-7b",)))
    assert set(found) == {f"seconds/{name}/{kind}" for name in (OWN, "llama-7b") for kind in EXECUTIONS}
    assert all(len(times) == 3 and min(times) > 0 for times in found.values())


def test_an_adapter_beside_integers_is_as_qlora_leaves_it(tiny_model):
    integers = int4_model(encode_model(models.load_model("tiny-random"), AFFINE), torch.bfloat16)
    adapted = attach(tiny_model, "qlora", format=AFFINE, adapter=Adapter())
    expected = int4_model(adapted, torch.bfloat16).state_dict()
    found = decoding.with_adapter(integers).state_dict()
    names = {name.replace("base_model.model.", ""): own for name, own in expected.items()}
    assert {name: (own.shape, own.dtype) for name, own in found.items()} == {
        name: (own.shape, own.dtype) for name, own in names.items()
    }
    assert all(torch.equal(found[name], names[name]) for name in names if "lora_A" not in name)
    assert not any("lora" in name for name in integers.state_dict())


def test_rounds_are_shared_between_fresh_processes(monkeypatch):
    started, run = [], decoding.subprocess.run

    def watched(*args, **kwargs):
        started.append(kwargs["input"])
        return run(*args, **kwargs)

    monkeypatch.setattr(decoding.subprocess, "run", watched)
    found = decoding.decoding_seconds("tiny-random", AFFINE, Decoding(4, 2, 5))
    assert len(started) == 2 and found["process"].tolist() == [0, 0, 1, 1, 1]
    assert set(found) == {"process", *(f"seconds/{OWN}/{kind}" for kind in EXECUTIONS)}
    assert all(times.shape == (5,) and (times > 0).all() for name, times in found.items() if name != "process")


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 16, 17, 100])
def test_no_round_is_lost(rounds):
    shared = decoding._shared(rounds)
    assert sum(shared) == rounds and min(shared) >= 1 and np.ptp(shared) <= 1 and len(shared) <= decoding.PROCESSES


def test_a_process_that_fails_says_why():
    with pytest.raises(ValueError, match=r"decoding: a process .* status 1 \(.*'no-such-model'"):
        decoding.decoding_seconds("no-such-model", AFFINE, Decoding(4, 2, 2))
