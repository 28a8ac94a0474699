"""The commands of docs/usage.md, run as they stand there, on the smallest model."""

import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from studylib.cli import main
from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Format
from studylib.data.models import load_config, load_tokenizer
from studylib.methods.arms import build_arm
from studylib.study import gguf, schedule
from studylib.study.cards import read_note

PAGE = Path(__file__).parents[2] / "docs" / "usage.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.S)


def commands(beginning):
    """The lines of the page that begin so, as lists of words."""
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(beginning)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """What stands for RECORD and FOLDER, after the page's own export."""
    folder = tmp_path_factory.mktemp("usage")
    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=32))
    arm = build_arm(budget, "tiny-random", "encoded", "4-16-16", format=Format("int", 4, 32))
    (record,) = schedule.run([arm], folder / "results")
    (folder / "text").write_text("one two three four five " * 400)
    words = {
        "RECORD": record.key[:8],
        "FOLDER": str(folder / "model"),
        "TASK": "own",
        "TEXT": str(folder / "text"),
    }
    (export,) = commands("study export")
    assert main([*filled(export, words)[1:], "--results", str(folder / "results")]) == 0
    return words


def filled(parts, words):
    return [re.sub("|".join(words), lambda found: words[found[0]], part) for part in parts]


def test_the_page_s_export_is_checked_in_every_engine(words, capsys):
    (check,) = commands("study run-check")
    assert main(filled(check, words)[1:]) == 0
    assert f"| record {words['RECORD']} |" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["transformers", "llama_cpp"])
def test_the_page_s_python_runs(words, package, capsys):
    (code,) = (text for kind, text in BLOCKS if kind == "python" and f"from {package} " in text)
    if package == "llama_cpp":
        pytest.importorskip(package)
    names = {}
    exec(code.replace("FOLDER", words["FOLDER"]), names)  # as a reader would
    assert names["model"] is not None


@pytest.mark.parametrize("program", ["llama-perplexity", "llama-completion", "llama-bench"])
def test_llama_cpp_s_programs_take_the_file(words, program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on PATH")
    (command,) = commands(f"llama.cpp/bin/{program}")
    done = subprocess.run([program, *filled(command[1:], words)], capture_output=True, timeout=300)
    said = {"llama-perplexity": r"\[1\]\d+\.\d+,", "llama-completion": "capital of", "llama-bench": r"Q4_0 .* tg128 "}
    assert done.returncode == 0 and re.search(said[program], done.stdout.decode(errors="replace"))


def test_lm_eval_loads_what_the_page_says(words):
    """Its command first reads 10,000 files of tasks; what it does with --model_args is this."""
    (command,) = commands("lm_eval")
    assert command[1:3] == ["--model", "hf"] and command[3] == "--model_args"
    (arguments,) = filled(command[4:5], words)
    loaded = get_model(command[2]).create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
    note, _ = read_note(Path(words["FOLDER"]))
    assert f"gguf_file={note['file']}" in arguments
    (answer,) = loaded.loglikelihood([Instance("loglikelihood", {}, ("one two", " three"), 0)], disable_tqdm=True)
    tokenizer, model = load_tokenizer("tiny-random"), gguf.read(Path(words["FOLDER"]), load_config("tiny-random"))
    context, end = (tokenizer(text).input_ids for text in ("one two", " three"))
    logits = model(torch.tensor([context + end])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    assert answer[0] == pytest.approx(logits.gather(1, torch.tensor(end)[:, None]).sum().item(), rel=2e-2)
