import copy
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from studylib.config.budgets import STRATEGIES, Sampling
from studylib.config.files import SEAL
from studylib.data.generation import _rows_wanted, check_length, generate_windows
from studylib.data.prompts import chat_opening

OPENING = [5, 9, 7]


def sequences(windows, length, ends, opening=(), turns=1):
    """The sequences that were joined, by reading on until each has its ends or its length; the last may be cut."""
    rest, found = windows.flatten().tolist(), []
    while rest:
        given, size, left = max(len(opening), 1), 0, turns
        while left and size < min(length, len(rest)):
            left -= size >= given and rest[size] in ends
            size += 1
        found.append(rest[:size])
        rest = rest[size:]
    return found


def ending_often(model):
    """Make about every eighth sampled token an end of text."""
    ends = list(range(0, 320, 8))
    model.generation_config.eos_token_id = ends
    return ends


def test_greedy_text_is_what_transformers_generates(fp32, tiny_model, tmp_path):
    ends = [int(tiny_model(torch.tensor([[5]])).logits[0, 0].argmax()), 300]
    tiny_model.generation_config.eos_token_id = ends
    made = generate_windows(tiny_model, Sampling(count=5, length=20, strategy="greedy", batch=2), tmp_path)
    assert made.shape == (5, 20) and made.dtype == torch.int64
    joined = sequences(made, 20, ends)
    for text in joined[:-1]:
        theirs = tiny_model.generate(
            torch.tensor([text[:1]]), do_sample=False, max_new_tokens=19, pad_token_id=0, eos_token_id=ends
        )
        assert text == theirs[0].tolist()


def test_hybrid_begins_greedily_for_three_to_five_tokens_then_varies(tiny_model, tmp_path):
    tiny_model.generation_config.eos_token_id = None  # a window is a sequence
    made = {
        strategy: generate_windows(tiny_model, Sampling(320, 12, strategy), tmp_path / strategy)
        for strategy in STRATEGIES
        if strategy != "chat"
    }
    agreement = {strategy: (made["greedy"] == tokens).float().mean(0) for strategy, tokens in made.items()}
    assert agreement["sampled"][0] == 1 and agreement["sampled"][1] < 0.2  # start tokens do not depend on the strategy
    for j in (3, 4, 5):  # a text of j tokens in all is greedy
        assert (agreement[f"hybrid-{j}"][:j] == 1).all() and agreement[f"hybrid-{j}"][j] < 0.2
    mixed = agreement["hybrid"]
    # Of j = 3, 4, 5 in equal parts, two thirds write the fourth token greedily and one third the fifth.
    assert (mixed[:3] == 1).all() and 0.55 < mixed[3] < 0.8 and 0.2 < mixed[4] < 0.5 and mixed[6:].max() < 0.2


@pytest.mark.parametrize("length", [64, 12])
def test_a_chat_is_the_opening_and_two_turns(length, fp32, tiny_model, tmp_path):
    ends = [int(tiny_model(torch.tensor([OPENING])).logits[0, -1].argmax())]
    tiny_model.generation_config.eos_token_id = ends
    settings = Sampling(count=6, length=length, strategy="chat", top_k=1, batch=4)  # sampled from one: greedy
    made = generate_windows(tiny_model, settings, tmp_path, OPENING)
    theirs = tiny_model.generate(
        torch.tensor([OPENING]), do_sample=False, max_length=length, pad_token_id=0, eos_token_id=319
    )[0].tolist()
    at = [i for i, token in enumerate(theirs) if i >= len(OPENING) and token in ends]
    expected = theirs[: at[1] + 1] if len(at) > 1 else theirs
    assert made.flatten().tolist() == (expected * made.numel())[: made.numel()]


def test_chats_vary_and_end_at_their_second_end(tiny_model, tmp_path):
    ends = ending_often(tiny_model)
    made = generate_windows(tiny_model, Sampling(count=20, length=40, strategy="chat"), tmp_path, OPENING)
    chats = sequences(made, 40, ends, OPENING, turns=2)[:-1]
    assert len(chats) > 25 and len({tuple(chat) for chat in chats}) == len(chats)
    assert all(chat[:3] == OPENING for chat in chats)


def test_the_opening_is_the_template_up_to_the_users_message(tiny_tokenizer, language_model):
    assert tiny_tokenizer.decode(chat_opening(tiny_tokenizer)) == "user: "
    tokenizer = language_model[1]
    opening = tokenizer.decode(chat_opening(tokenizer))
    message = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == f"{opening}Hello<|im_end|>\n"


def test_a_tokenizer_without_chat_template_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="'chat' needs a chat template"):
        chat_opening(tokenizer)


@pytest.mark.parametrize(
    ("strategy", "opening", "message"),
    [
        ("chat", [], "opening: is missing"),
        ("hybrid", OPENING, "opening: is given"),
        ("chat", OPENING * 4, "no room after an opening of 12"),
    ],
)
def test_an_opening_where_it_does_not_belong_is_refused(strategy, opening, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate_windows(tiny_model, Sampling(4, 12, strategy), tmp_path / "data", opening)
    assert not (tmp_path / "data").exists()


def test_each_window_and_each_text_begins_with_what_the_tokenizer_puts_there(fp32, tiny_model, tmp_path):
    ends = ending_often(tiny_model)
    settings = Sampling(count=40, length=25, strategy="sampled")
    made = generate_windows(tiny_model, settings, tmp_path / "bos", first=[318, 319])
    assert made.shape == (40, 25) and made[:, :2].tolist() == [[318, 319]] * 40
    texts = sequences(made[:, 2:], 23, ends)[:-1]  # what follows, joined, is cut as ever
    starts = [text[0] for text in texts]
    assert len(set(starts[:320])) == min(len(starts), 320) > 40
    with np.load(tmp_path / "bos" / "batch-00000.npz") as stored:
        at = np.cumsum(stored["lengths"]) - stored["lengths"]
        assert (stored["tokens"][at[:, None] + [0, 1]] == [318, 319]).all()  # as the model saw them
    assert torch.equal(generate_windows(tiny_model, settings, tmp_path / "bos", first=[318, 319]), made)
    assert (generate_windows(tiny_model, settings, tmp_path / "bos")[:, :2] != torch.tensor([318, 319])).any()
    chat = Sampling(count=20, length=40, strategy="chat")
    for opening, name in (([318, 319, *OPENING], "with"), (OPENING, "without")):  # a template may write them or not
        made = generate_windows(tiny_model, chat, tmp_path / name, opening, first=[318, 319])
        assert made[:, :2].tolist() == [[318, 319]] * 20
        assert made[0, 2:5].tolist() == OPENING and (made[:, 2:] == 319).sum() < 10


def test_texts_end_at_the_tokenizers_end_as_well(fp32, tiny_model, tmp_path):
    tiny_model.generation_config.eos_token_id = None
    end = int(tiny_model(torch.tensor([OPENING])).logits[0, -1].argmax())
    settings = Sampling(count=2, length=64, strategy="chat", top_k=1)
    whole = generate_windows(tiny_model, settings, tmp_path / "whole", OPENING)
    ended = generate_windows(tiny_model, settings, tmp_path / "ended", OPENING, end=end)
    turns = [i for i, token in enumerate(whole[0].tolist()) if i >= len(OPENING) and token == end]
    expected = whole[0, : turns[1] + 1].tolist()
    assert ended.flatten().tolist() == (expected * 128)[:128]


def test_samples_follow_the_models_distribution(fp32, tiny_model, tmp_path):
    made = generate_windows(
        tiny_model, Sampling(count=320 * 40, length=2, strategy="sampled", top_k=0, batch=2560), tmp_path
    )
    start = 7
    seen = np.bincount(made[made[:, 0] == start, 1].numpy(), minlength=320)
    assert seen.sum() == 40  # every vocabulary id starts equally often
    with torch.no_grad():
        p = tiny_model(torch.tensor([[i] for i in range(320)])).logits[:, 0].softmax(-1).mean(0).numpy()
    total = np.bincount(made[:, 1].numpy(), minlength=320)
    chi2 = ((total - p * len(made)) ** 2 / (p * len(made))).sum()
    assert chi2 < 319 + 5 * np.sqrt(2 * 319)


def test_top_k_keeps_to_the_best(fp32, tiny_model, tmp_path):
    made = generate_windows(tiny_model, Sampling(count=320, length=2, strategy="sampled", top_k=3, batch=320), tmp_path)
    with torch.no_grad():
        best = tiny_model(made[:, :1]).logits[:, 0].topk(3).indices
    assert (best == made[:, 1:]).any(1).all()


def test_every_sequence_starts_from_an_id_of_its_own(tiny_model, tmp_path):
    ends = ending_often(tiny_model)
    made = generate_windows(tiny_model, Sampling(count=160, length=24, strategy="sampled"), tmp_path)
    texts = sequences(made, 24, ends)[:-1]
    starts = [text[0] for text in texts]
    assert len(texts) > 320 and sorted(starts[:320]) == list(range(320))  # the second round is another order
    assert len(set(starts[320:])) == len(starts[320:]) and starts[320:] != starts[: len(starts) - 320]
    assert {len(text) for text in texts} >= {2, 24} and all(text[-1] in ends for text in texts if len(text) < 24)


def test_little_is_decoded_in_vain(tiny_model, tmp_path):
    ending_often(tiny_model)
    settings, told = Sampling(count=100, length=48, strategy="sampled", batch=64), []
    generate_windows(tiny_model, settings, tmp_path, progress=told.append)
    written = 0
    for path in tmp_path.glob("*.npz"):
        with np.load(path) as stored:
            written += len(stored["tokens"])
            assert len(stored["tokens"]) == stored["lengths"].sum() and len(stored["lengths"]) <= 64
    assert 4800 <= written == sum(told) < 1.2 * 4800


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], 16),  # 40 windows need at least as many sequences, of which a batch takes 16
        ([10] * 30, 10),
        ([10] * 40, 0),
        ([2, 10] * 32, 5),  # 16 tokens, 6 a sequence: 2.67, and 2 x sqrt(2.67) x 4 / 6 = 2.18 more
        ([1] * 4, 16),
    ],
)
def test_rows_of_the_next_batch(lengths, rows):
    assert _rows_wanted(torch.tensor(lengths, dtype=torch.long), Sampling(count=40, length=10, batch=16)) == rows


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_model, tmp_path):
    first, again, other = (
        generate_windows(tiny_model, Sampling(count=10, length=16, batch=4, seed=seed), tmp_path / name)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_killed_run_goes_on_and_ends_with_the_same_text(tiny_model, tmp_path):
    settings = "Sampling(count=40, length=64, batch=4, seed=3)"
    script = (
        "from studylib.data import models; from studylib.data.generation import *; "
        f"generate_windows(models.load_model('tiny-random'), {settings}, {str(tmp_path / 'killed')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    folder = tmp_path / "killed"
    while not (folder / "batch-00001.npz").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The kill may leave a file half written beside these, under another name; going on removes it.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("batch-*.npz")}
    assert len(before) < 10
    told = []
    resumed = generate_windows(tiny_model, eval(settings), folder, progress=told.append)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    whole = generate_windows(tiny_model, eval(settings), tmp_path / "whole")
    assert torch.equal(resumed, whole)
    assert sum(told) >= whole.numel()


def test_a_folder_of_other_settings_is_made_again(tiny_model, tmp_path, capsys):
    first, second = (Sampling(count=2, length=length) for length in (8, 9))
    generate_windows(tiny_model, first, tmp_path / "a")
    (tmp_path / "a" / "note.txt").write_text("somebody's")
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["length"] == 8
    made = generate_windows(tiny_model, second, tmp_path / "a")
    assert f"study: {tmp_path / 'a'} is not of the settings {{" in capsys.readouterr().err
    assert torch.equal(made, generate_windows(tiny_model, second, tmp_path / "b"))
    assert not capsys.readouterr().err
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "note.txt",
        *(path.name for path in (tmp_path / "b").iterdir()),
    }


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path):
    path.write_bytes(path.with_name("batch-00000.npz").read_bytes())


def with_its_seal(path):
    for end in ("", SEAL):
        source = path.with_name("batch-00000.npz" + end)
        path.with_name(path.name + end).write_bytes(source.read_bytes())


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "another": swap,
    "another with its digest": with_its_seal,
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").write_text("")),
    "no digest": lambda path: path.with_name(path.name + SEAL).unlink(),
    "flipped digest": lambda path: flip(path.with_name(path.name + SEAL)),
    "a folder as digest": lambda path: (
        path.with_name(path.name + SEAL).unlink(),
        path.with_name(path.name + SEAL).mkdir(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["batch-00001.npz", "settings.json"])
def test_a_damaged_file_is_made_again_and_only_that(tiny_model, tmp_path, capsys, name, damage):
    settings = Sampling(count=10, length=16, batch=4)
    whole = generate_windows(tiny_model, settings, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if not path.name.startswith(name)}
    DAMAGES[damage](tmp_path / name)
    assert torch.equal(generate_windows(tiny_model, settings, tmp_path), whole)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"study: {tmp_path / name} ") and told.endswith("it is made again")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "bad",
    [
        {"strategy": "beam"},
        {"strategy": "hybrid-6"},
        {"count": 0},
        {"length": 1},
        {"top_k": -1},
        {"temperature": 0.0},
        {"batch": 0},
        {"strategy": "greedy", "top_k": 0},
        {"strategy": "greedy", "temperature": 0.7},
    ],
)
def test_bad_settings_name_the_value(bad):
    name, value = list(bad.items())[-1]
    with pytest.raises(ValueError, match=name) as caught:
        Sampling(**{"count": 4, "length": 8} | bad)
    assert repr(value) in str(caught.value)


def test_longer_than_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="513 tokens is longer than the model's context of 512"):
        check_length(tiny_model, 513)
