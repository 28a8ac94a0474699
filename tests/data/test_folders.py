"""Folders that do not hold what they say: each is refused in one line that names it."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BloomConfig, T5Config, T5ForConditionalGeneration

from studylib.data import models

OTHER_TYPES = ("64", -3, 0, 2**40, 1.5, None, [1], {"a": 1}, True)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors) or tensors, path, {"format": "pt"})


def refused(folder, match, use=models.check):
    with pytest.raises(ValueError, match=match) as caught:
        use(str(folder))
    told = str(caught.value)
    assert str(folder) in told and "\n" not in told and len(told) < 600


def test_each_field_of_a_configuration_with_a_value_of_another_type(make_folder):
    folder = make_folder()
    path, fields = folder / "config.json", json.loads((folder / "config.json").read_text())
    accepted = 0
    for name in fields:
        for value in OTHER_TYPES:
            path.write_text(json.dumps(fields | {name: value}))
            try:
                models.check(str(folder))
            except ValueError as error:
                told = str(error)
                assert str(folder) in told and "\n" not in told and len(told) < 600, (name, value)
            else:
                accepted += 1
                model = models.load_model(str(folder))
                assert model(torch.arange(8)[None]).logits.isfinite().all(), (name, value)
    assert 0 < accepted < 4 * len(fields)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "64"}, "'hidden_size'"),
        ({"hidden_size": -64}, "hidden_size is -64|hidden size .-64"),
        (
            {"hidden_size": 2**40},
            "lm_head.weight is 320x64 in the safetensors .* 320x1099511627776 by its config",
        ),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000, but its safetensors hold 21 tensors"),
        ({"num_hidden_layers": 1}, "hold 9 weights that its config.json does not describe: model.layers.1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 10**10}, "is 320x64 in the safetensors of .*, and 10000000000x64 by its config.json"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000 in its config.json, which has 320 tokens"),
        ({"model_type": "nosuch"}, "nosuch"),
        ({"model_type": 5}, "could not be read"),
        ({"quantization_config": "gptq"}, "has quantization_config 'gptq'"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"rope_parameters": {"rope_type": "nosuch"}}, "nosuch"),
    ],
)
def test_configurations_of_another_model(make_folder, changes, named):
    folder = make_folder()
    edit(folder / "config.json", **changes)
    refused(folder, named)


def loop(path):
    path.unlink()
    os.symlink(path.name, path)


def folder_of(path):
    path.unlink()
    path.mkdir()


def header(data, text):
    return struct.pack("<Q", len(text)) + text + data


DAMAGE = {
    "empty configuration": ("config.json", lambda path: path.write_text("")),
    "list": ("config.json", lambda path: path.write_text("[]")),
    "null": ("config.json", lambda path: path.write_text("null")),
    "not UTF-8": ("config.json", lambda path: path.write_bytes(b"\xff\xfe{")),
    "deep": ("config.json", lambda path: path.write_text("[" * 100_000)),
    "truncated": ("config.json", lambda path: path.write_bytes(path.read_bytes()[:100])),
    "link to itself": ("config.json", loop),
    "folder": ("config.json", folder_of),
    "no header": ("model.safetensors", lambda path: path.write_bytes(b"abc")),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "endless header": ("model.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
    "garbage header": ("model.safetensors", lambda path: path.write_bytes(header(b"", b"x" * 100))),
    "header of another kind": ("model.safetensors", lambda path: path.write_bytes(header(b"", b'{"a":[1,2,3]'))),
    "cut weights": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1000])),
    "pointer": ("model.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
    "folder of weights": ("model.safetensors", folder_of),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(make_folder, name):
    folder = make_folder()
    file, damage = DAMAGE[name]
    damage(folder / file)
    refused(folder, file)


TOKENIZERS = {
    "no tokenizer": ("tokenizer.json", lambda path: [other.unlink() for other in path.parent.glob("tokenizer*")]),
    "empty": ("tokenizer.json", lambda path: path.write_text("")),
    "list": ("tokenizer.json", lambda path: path.write_text("[]")),
    "truncated": ("tokenizer.json", lambda path: path.write_bytes(path.read_bytes()[:500])),
    "settings truncated": ("tokenizer_config.json", lambda path: path.write_text("{")),
    "settings list": ("tokenizer_config.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_damaged_tokenizers(make_folder, name):
    folder = make_folder()
    file, damage = TOKENIZERS[name]
    damage(folder / file)
    refused(folder, "no tokenizer that can be read", models.load_tokenizer)


def test_weights_that_the_configuration_does_not_know(make_folder):
    folder = make_folder(attention_bias=True)
    edit(folder / "config.json", attention_bias=False)
    for use in (models.check, models.load_model):
        refused(
            folder, r"hold 8 weights that its config.json does not describe: model.layers.0.self_attn.k_proj.bias", use
        )


def test_what_older_libraries_left_among_the_weights_is_harmless(make_folder):
    folder = make_folder()
    expected = models.load_model(str(folder))(torch.arange(9)[None]).logits
    edit_weights(folder, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    models.check(str(folder))
    assert torch.equal(models.load_model(str(folder))(torch.arange(9)[None]).logits, expected)


def test_a_head_of_its_own_in_a_tied_model(make_folder):
    folder = make_folder(tie_word_embeddings=True)
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    models.check(str(folder))
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * 2})
    for use in (models.check, models.load_model):
        refused(folder, r"lm_head.weight .* is not model.embed_tokens.weight, .*\(tie_word_embeddings\)", use)


def test_an_adapter_beside_the_weights(make_folder):
    folder = make_folder()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for use in (models.check, models.load_config, models.load_model):
        refused(folder, r"holds an adapter \(adapter_config.json\).*merge it into the weights, or move it away", use)


def test_models_that_are_no_decoders(make_folder, tmp_path, byte_tokenizer):
    shape = {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 4, "vocab_size": 320}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "is no decoder that transformers knows")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(make_folder, value):
    folder = make_folder()

    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    edit_weights(folder, spoil)
    refused(folder, "model.layers.1.mlp.down_proj.weight of .* holds numbers that are not finite", models.load_model)


def test_weights_that_are_integers(make_folder):
    folder = make_folder()
    edit_weights(folder, lambda tensors: {name: (100 * tensor).to(torch.int8) for name, tensor in tensors.items()})
    refused(folder, "stored as I8; use weights in full precision")


def test_shards_must_lie_in_the_folder(make_folder, tmp_path):
    folder = make_folder()
    names = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    (folder / "other.safetensors").write_bytes(b"")
    for named in ("../outside.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
        refused(folder, f"names '{named}', which is no file of this folder")
    index.write_text("{")
    refused(folder, "model.safetensors.index.json' is not JSON that can be read")
    index.unlink()
    refused(folder, "has neither model.safetensors nor model.safetensors.index.json")


def test_code_in_a_folder_is_never_run(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    folder, mark = make_folder(), tmp_path / "ran"
    code = (
        f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Own(LlamaConfig): model_type = 'own'\n"
    )
    (folder / "own.py").write_text(code)
    before = models.load_model(str(folder))(torch.arange(9)[None]).logits
    edit(folder / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert torch.equal(models.load_model(str(folder))(torch.arange(9)[None]).logits, before)  # a type that is known
    models.load_tokenizer(str(folder))
    edit(folder / "config.json", model_type="own")
    for use in (models.check, models.load_config, models.load_model, models.load_tokenizer):
        refused(folder, "needs code of its own for the model_type 'own'", use)
    assert not mark.exists()


def test_ids_and_settings_that_do_no_harm_are_mended(make_folder, tmp_path):
    folder = make_folder()
    edit(folder / "config.json", pad_token_id=320, attn_implementation="flash_attention_2")
    edit(folder / "generation_config.json", temperature=0.6, do_sample=False)
    model = models.load_model(str(folder))
    assert model.config._attn_implementation == "sdpa" and model(torch.arange(9)[None]).logits.isfinite().all()
    model.save_pretrained(tmp_path / "saved")  # an export does
    edit(folder / "generation_config.json", eos_token_id="x")
    refused(folder, "generation_config.json")


@pytest.mark.parametrize("kind", [BertConfig, BloomConfig])
def test_sizes_under_other_names_are_read(make_folder, kind):
    config = models.load_config(str(make_folder(kind=kind)))
    assert config.vocab_size == 320


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model", "vocab.txt"]
)
def test_every_file_that_is_read_counts_as_the_contents(make_folder, name):
    folder = make_folder()
    before, weights = models.contents(str(folder)), models.identity(str(folder))["sha256"]
    for unread in ("notes.md", "training_args.bin", "sub/config.json"):
        (folder / unread).parent.mkdir(exist_ok=True)
        (folder / unread).write_text("not read by anyone")
    assert models.contents(str(folder)) == before
    with (folder / name).open("a") as file:
        file.write("\n")
    assert models.contents(str(folder)) != before and models.identity(str(folder))["sha256"] == weights
    after = models.contents(str(folder))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert models.contents(str(folder)) != after


def test_an_edited_tokenizer_is_seen_at_once(make_folder):
    folder = make_folder()
    assert models.load_tokenizer(str(folder)) is models.load_tokenizer(str(folder))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "### "))
    assert "### " in models.load_tokenizer(str(folder)).chat_template
