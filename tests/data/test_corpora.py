import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studylib.config.budgets import check_corpus
from studylib.data import corpora
from studylib.data.corpora import Pair, documents, instruction_pairs, windows


@pytest.mark.parametrize("corpus", ["wikipedia", "c4"])
def test_training_and_evaluation_share_no_document(corpus):
    evaluation, training = (documents(corpus, split) for split in ("evaluation", "training"))
    assert len(evaluation) > 10 and len(training) > 10
    assert not set(evaluation) & set(training)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 400), st.integers(1, 60))
def test_windows_are_pieces_of_the_text_and_never_overlap(tiny_tokenizer, length, count):
    found = windows("wikipedia", tiny_tokenizer, length, count, "evaluation")
    assert found.shape == (count, length)
    stream = corpora._stream("wikipedia", corpora.sha256("wikipedia"), tiny_tokenizer, "evaluation").numpy()
    view = np.lib.stride_tricks.sliding_window_view(stream, length)[::length]
    at = [int(np.flatnonzero((view == row).all(1))[0]) for row in found.numpy()]
    assert at == sorted(set(at)) or length < 20  # short windows can be equal by chance


def test_windows_decode_to_the_documents(tiny_tokenizer):
    text = tiny_tokenizer.decode(windows("c4", tiny_tokenizer, 100, 1, "evaluation")[0])
    assert documents("c4", "evaluation")[0].startswith(text)


def test_own_files(tmp_path, tiny_tokenizer):
    (tmp_path / "own.txt").write_text("one\n\ntwo\nthree\n")
    assert documents(str(tmp_path / "own.txt"), "evaluation") == ["one", "three"]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c d")))
    assert documents(str(tmp_path / "own.jsonl"), "training") == ["c d"]
    # one token a byte, and end-of-text after each document
    assert windows(str(tmp_path / "own.txt"), tiny_tokenizer, 5, 2, "evaluation").shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "only one\n", "is empty"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"text": "x"}\nnot json\n', "line 2 is not a JSON object"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        documents(str(tmp_path / name), "training")


@pytest.fixture
def own_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "fetch", lambda name: tmp_path)
    return tmp_path / corpora.PAIRS


def test_instruction_pairs_of_the_archive():
    evaluation, training = (instruction_pairs(split) for split in ("evaluation", "training"))
    assert len(evaluation) == 493 and len(training) == 492  # of 999, of which 14 are there twice
    assert not set(evaluation) & set(training)
    assert evaluation[0].instruction == "Describe a process of making crepes."
    assert evaluation[0].response.startswith("Making crepes is an easy and delicious process!")


def test_instruction_pairs_join_inputs_as_alpaca_does(own_pairs):
    rows = [("a", "", "1"), ("b", "of b", "2"), ("a", "", "1"), ("c", "", " "), ("d", "", " 4 "), ("e", "", "5")]
    own_pairs.write_text(json.dumps([dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]))
    assert instruction_pairs("evaluation") == [Pair("a", "1"), Pair("e", "5")]
    assert instruction_pairs("training") == [Pair("b\n\n### Input:\nof b", "2"), Pair("d", "4")]


def test_own_instruction_files(tmp_path):
    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(3)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    (tmp_path / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    for name in ("own.json", "own.jsonl"):
        assert instruction_pairs("evaluation", str(tmp_path / name)) == [Pair("q0", "a0"), Pair("q2", "a2")]
        assert instruction_pairs("training", str(tmp_path / name)) == [Pair("q1", "a1")]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("3", "it is not a JSON list"),
        ("[]", "it has no pairs for evaluation"),
        ("[3]", "entry 1 is no object"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "entry 2 is no object"),
        ('[{"instruction": 1, "output": ""}]', "entry 1 is no object"),
    ],
)
def test_malformed_instruction_files(tmp_path, content, named):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        instruction_pairs("evaluation", str(tmp_path / "own.json"))
    assert "own.json" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_names_and_numbers(tiny_tokenizer):
    for corpus in ("pile", "missing.text", "/tmp"):
        with pytest.raises(ValueError, match=f"corpus: '{corpus}' is not known; use one of wikipedia, c4"):
            check_corpus(corpus)
        with pytest.raises(ValueError, match=f"corpus: '{corpus}' is not known; use one of wikipedia, c4"):
            documents(corpus, "training")
    check_corpus("missing.txt")  # a record that names it can be read anywhere
    for use in (lambda: documents("missing.txt", "training"), lambda: corpora.sha256("missing.txt")):
        with pytest.raises(ValueError, match=r"^corpus: there is no file 'missing\.txt'$"):
            use()
    with pytest.raises(ValueError, match="split: 'test' is not known"):
        documents("c4", "test")
    with pytest.raises(ValueError, match="split: 'test' is not known"):
        instruction_pairs("test")
    for source in ("dolly", "missing.yaml", "/tmp"):
        with pytest.raises(ValueError, match=f"instructions: '{source}' is not known; use alpaca"):
            instruction_pairs("training", source)
    with pytest.raises(ValueError, match=r"^instructions: there is no file 'missing\.json'$"):
        instruction_pairs("training", "missing.json")
    with pytest.raises(ValueError, match=r"windows: 100000 of 512 tokens are more than the \d+"):
        windows("c4", tiny_tokenizer, 512, 100000, "evaluation")


def test_a_corpus_file_that_changed_is_read_anew(tmp_path, tiny_tokenizer):
    path = tmp_path / "own.txt"
    path.write_text("aaaa\nb\n")
    before = windows(str(path), tiny_tokenizer, 5, 1, "evaluation")
    path.write_text("cccc\nb\n")
    assert not (windows(str(path), tiny_tokenizer, 5, 1, "evaluation") == before).all()
