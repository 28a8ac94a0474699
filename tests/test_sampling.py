import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from studylib.sampling import Sampling, Windows, check_length, generate_windows


def test_greedy_text_is_what_transformers_generates(fp32, tiny_model, tmp_path):
    made = generate_windows(tiny_model, Sampling(count=5, length=20, strategy="greedy", batch=2), tmp_path)
    for row, length in zip(made.tokens, made.lengths, strict=True):
        theirs = tiny_model.generate(row[None, :1], do_sample=False, max_new_tokens=19, pad_token_id=0)[0]
        assert row[:length].tolist() == theirs.tolist()


def test_hybrid_begins_greedily_for_three_to_five_tokens_then_varies(tiny_model, tmp_path):
    settings = dict(count=320, length=12, batch=64)
    greedy = generate_windows(tiny_model, Sampling(**settings, strategy="greedy"), tmp_path / "g").tokens
    hybrid = generate_windows(tiny_model, Sampling(**settings), tmp_path / "h").tokens
    sampled = generate_windows(tiny_model, Sampling(**settings, strategy="sampled"), tmp_path / "s").tokens
    assert torch.equal(greedy[:, 0], hybrid[:, 0])
    agreement = (greedy == hybrid).float().mean(0)
    assert (agreement[:3] == 1).all()  # a text of three tokens in all is greedy in every row
    # Of j = 3, 4, 5 in equal parts, two thirds write the fourth token greedily and one third the fifth.
    assert 0.55 < agreement[3] < 0.8 and 0.2 < agreement[4] < 0.5 and agreement[6:].max() < 0.2
    assert (greedy == sampled).float().mean(0)[1] < 0.2


def test_samples_follow_the_models_distribution(fp32, tiny_model, tmp_path):
    made = generate_windows(
        tiny_model, Sampling(count=320 * 40, length=2, strategy="sampled", top_k=0, batch=2560), tmp_path
    )
    start = 7
    seen = np.bincount(made.tokens[made.tokens[:, 0] == start, 1].numpy(), minlength=320)
    assert seen.sum() == 40  # every vocabulary id starts equally often
    with torch.no_grad():
        p = tiny_model(torch.tensor([[i] for i in range(320)])).logits[:, 0].softmax(-1).mean(0).numpy()
    total = np.bincount(made.tokens[:, 1].numpy(), minlength=320)
    chi2 = ((total - p * len(made.tokens)) ** 2 / (p * len(made.tokens))).sum()
    assert chi2 < 319 + 5 * np.sqrt(2 * 319)


def test_top_k_keeps_to_the_best(fp32, tiny_model, tmp_path):
    made = generate_windows(tiny_model, Sampling(count=320, length=2, strategy="sampled", top_k=3, batch=320), tmp_path)
    with torch.no_grad():
        best = tiny_model(made.tokens[:, :1]).logits[:, 0].topk(3).indices
    assert (best == made.tokens[:, 1:]).any(1).all()


def test_a_text_ends_at_end_of_text_and_is_padded(tiny_model, tmp_path):
    ends = [int(tiny_model(torch.tensor([[5]])).logits[0, 0].argmax()), 300]
    tiny_model.generation_config.eos_token_id = ends
    made = generate_windows(tiny_model, Sampling(count=320, length=24, batch=64), tmp_path)
    short = made.lengths < 24
    assert short.any()
    for row, length in zip(made.tokens, made.lengths, strict=True):
        inside = torch.isin(row[1:length], torch.tensor(ends)).nonzero()[:, 0].tolist()
        assert inside == ([length - 2] if length < 24 or inside else [])
        assert (row[length:] == ends[0]).all()
    assert torch.equal(made.mask.sum(1), made.lengths)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_model, tmp_path):
    first, again, other = (
        generate_windows(tiny_model, Sampling(count=10, length=16, batch=4, seed=seed), tmp_path / name)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)


def test_a_killed_run_goes_on_and_ends_with_the_same_text(tiny_model, tmp_path):
    settings = "Sampling(count=40, length=64, batch=4, seed=3)"
    script = (
        "from studylib import models; from studylib.sampling import *; "
        f"generate_windows(models.load_model('tiny-random'), {settings}, {str(tmp_path / 'killed')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    folder = tmp_path / "killed"
    while not (folder / "batch-00001.npz").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(os.listdir(folder))
    before = {name: (folder / name).stat().st_mtime_ns for name in kept if name.endswith(".npz")}
    assert len(before) < 10
    told = []
    resumed = generate_windows(tiny_model, eval(settings), folder, told.append)
    assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    whole = generate_windows(tiny_model, eval(settings), tmp_path / "whole")
    assert torch.equal(resumed.tokens, whole.tokens) and torch.equal(resumed.lengths, whole.lengths)
    assert sum(told) >= int((whole.lengths - 1).sum())


def test_a_folder_of_other_settings_is_refused(tiny_model, tmp_path):
    generate_windows(tiny_model, Sampling(count=2, length=8), tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["length"] == 8
    with pytest.raises(ValueError, match="use another folder"):
        generate_windows(tiny_model, Sampling(count=2, length=9), tmp_path)


@pytest.mark.parametrize(
    "bad", [{"strategy": "beam"}, {"count": 0}, {"length": 1}, {"top_k": -1}, {"temperature": 0.0}, {"batch": 0}]
)
def test_bad_settings_name_the_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=name) as caught:
        Sampling(**{"count": 4, "length": 8} | bad)
    assert repr(value) in str(caught.value)


def test_longer_than_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="513 tokens is longer than the model's context of 512"):
        check_length(tiny_model, 513)


def test_mask_marks_the_text():
    windows = Windows(torch.zeros(2, 4, dtype=torch.long), torch.tensor([1, 4]))
    assert windows.mask.tolist() == [[True, False, False, False], [True] * 4]
