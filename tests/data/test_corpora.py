import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studylib.config.data import check_corpus
from studylib.data import corpora
from studylib.data.corpora import Pair, documents, instruction_pairs, window_documents, windows


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
    stream = corpora._stream("wikipedia", corpora.sha256("wikipedia"), tiny_tokenizer, "evaluation")[0].numpy()
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


@pytest.mark.parametrize("around", ["$A", "<s> $A"])
def test_a_window_is_of_the_document_of_its_first_token(tmp_path, byte_tokenizer, around):
    """One token a byte, and end-of-text after each: documents of 4, 1, 9 and 2 bytes, windows of 3 tokens of text."""
    path, texts = tmp_path / "own.txt", ("aaaa", "b", "ccccccccc", "dd")
    path.write_text("\n".join(line for text in texts for line in (text, "training")))
    tokenizer = byte_tokenizer(around=around, bos="<s>" if "<s>" in around else None)
    wanted = (str(path), tokenizer, 3 + ("<s>" in around))
    letters = "aaaa.b.ccccccccc.dd."
    expected = [0, 0, 1, 2, 2, 2]  # aaa, a.b (begins in a), .cc (the end of b), ccc, ccc, c.d
    for count in (6, 3):
        found = window_documents(*wanted, count, "evaluation").tolist()
        assert found == [expected[i * 6 // count] for i in range(count)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in windows(*wanted, 6, "evaluation")]
    assert texts == [letters[at : at + 3].replace(".", "") for at in range(0, 18, 3)]


def jsonl(*texts):
    return "\n".join(json.dumps({"text": text}) for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n\n", "is empty"),
        ("a.txt", "only one\n", "is empty"),
        ("a.jsonl", jsonl("x") + '\n{"txt": "y"}\n', "line 2 is not a JSON object"),
        ("a.jsonl", jsonl("x") + "\nnot json\n", "line 2 is not a JSON object"),
        ("a.jsonl", jsonl("x", "y") + '\n{"text": "z', "line 3 is not a JSON object"),
        ("a.jsonl", jsonl("x") + "\n" + "[" * 100_000, "line 2 is not a JSON object"),
        ("a.jsonl", "[1, 2]\n", "line 1 is not a JSON object"),
        ("a.jsonl", '"text"\n', "line 1 is not a JSON object"),
        ("a.jsonl", '{"text": 1' + "0" * 5000 + "}", "line 1 is not a JSON object"),
        ("a.jsonl", jsonl("x", None), 'line 2 has a "text" that is null'),
        ("a.jsonl", jsonl("x", 5), 'line 2 has a "text" that is of type int'),
        ("a.jsonl", jsonl("x", ["y"]), 'line 2 has a "text" that is of type list'),
        ("a.jsonl", jsonl("x", "y\ud800"), "line 2 holds half a character"),
        ("a.txt", "a\nb\ncafé\n".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\)"),
        ("a.txt", "a\nb\n".encode("utf-16"), r"line 1 is not UTF-8 \(byte 0xff\)"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        documents(str(tmp_path / name), "training")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "one\ntwo\n"), ("a.jsonl", jsonl("one", "two"))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert documents(str(tmp_path / name), "evaluation") == ["one"]
    rows = [{"instruction": f"q{i}", "input": None, "output": f"a{i}"} for i in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    assert instruction_pairs("evaluation", str(tmp_path / "a.json")) == [Pair("q0", "a0")]  # null is no input


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    for name, use, kind in (
        ("a.txt", documents, "corpus"),
        ("a.jsonl", documents, "corpus"),
        ("a.json", instruction_pairs, "instructions"),
    ):
        path = str(tmp_path / name)
        make(path)
        arguments = (path, "training") if use is documents else ("training", path)
        with pytest.raises(ValueError, match=re.escape(f"{kind}: {path!r} is no file of text")):
            use(*arguments)
    with pytest.raises(ValueError, match=r"instructions: .* is no file of text"):
        corpora.instructions_sha256(str(tmp_path / "a.json"))


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
        ("", "line 1 is not JSON"),
        ("{", "line 1 is not JSON"),
        ('[\n{"instruction": "a", "output": "b"},\n{"instru', "line 3 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON (nested too deeply)"),
        ("3", "it is not a JSON list"),
        ("null", "it is not a JSON list"),
        ("[]", "it has no pairs for evaluation"),
        ("[3]", "entry 1 is no object"),
        ('[["a"], ["b"]]', "entry 1 is no object"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', 'entry 2 has no text "output"'),
        ('[{"instruction": 1, "output": ""}]', 'entry 1 has no text "instruction": it is of type int'),
        ('[{"instruction": "a", "output": 5}]', 'entry 1 has no text "output": it is of type int'),
        ('[{"instruction": "a", "output": null}]', 'entry 1 has no text "output": it is null'),
        ('[{"instruction": "a", "input": ["x"], "output": "b"}]', 'entry 1 has no text "input": it is of type list'),
        ('[{"instruction": "a", "input": 0, "output": "b"}]', 'entry 1 has no text "input": it is of type int'),
        ('[{"instruction": "a\\ud800", "output": "b"}]', "entry 1 holds half a character"),
    ],
)
def test_malformed_instruction_files(tmp_path, content, named):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
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
