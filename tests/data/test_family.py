"""Models of one family: several, different, and with tokenizers that make the same tokens."""

import json
import shutil

import pytest

from studylib.data.family import check_family


@pytest.fixture
def small(make_folder):
    return str(make_folder(name="small"))


def test_sizes_that_share_a_tokenizer_pass_whatever_its_files_look_like(small, make_folder, byte_tokenizer):
    large = make_folder(byte_tokenizer(chat_template=None), name="large", num_hidden_layers=3, vocab_size=384)
    check_family([small, str(large)])
    tokenizer = large / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7))
    check_family([str(large), small])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}, "vocabularies (260 and 259 tokens)"),
        ({"special": ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<s>")}, "vocabularies; use"),
        ({"added": ("<more>",)}, "added tokens; use"),
        ({"around": "<s> $A"}, "first tokens; use"),
        ({"eos": "<|endoftext|>"}, "end-of-text tokens; use"),
    ],
)
def test_tokenizers_that_differ_are_named_with_what_differs(small, make_folder, byte_tokenizer, changes, part):
    large = str(make_folder(byte_tokenizer(**changes), name="large"))
    with pytest.raises(ValueError, match=r"^models: the tokenizers of") as caught:
        check_family([small, large])
    told = str(caught.value)
    assert repr(small) in told and repr(large) in told and f"differ in their {part}" in told and "\n" not in told
    assert told.endswith("use two or more models of one family, which share a tokenizer, for example "
                         "--model SMALL --model LARGE")  # fmt: skip


def test_merges_are_compared(small, make_folder):
    large = make_folder(name="large")
    described = json.loads((large / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    for folder, merges in ((small, [["a", "b"], ["b", "c"]]), (large, [["b", "c"], ["a", "b"]])):
        described["model"] |= {"vocab": vocabulary | {"ab": 260, "bc": 261}, "merges": merges}
        with open(f"{folder}/tokenizer.json", "w") as file:
            json.dump(described, file)
    with pytest.raises(ValueError, match="differ in their merges; use two or more"):
        check_family([small, str(large)])


def test_fewer_than_two_models_are_no_family(small, tmp_path):
    copied = str(shutil.copytree(small, tmp_path / "copied"))
    for names, told in (
        ([small], f"models: {small!r} is no family; use two or more"),
        ([], "models: none is no family; use two or more"),
        ([small, small], f"models: {small!r} is there twice; use two or more"),
        ([small, copied], f"models: {copied!r} is the same model as {small!r}; use two or more"),
        (["tiny-random", "tiny-random"], "models: 'tiny-random' is there twice"),
        ([small, "gpt9"], "model: 'gpt9' is not known; use smollm2-135m"),
    ):
        with pytest.raises(ValueError) as caught:
            check_family(names)
        assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
