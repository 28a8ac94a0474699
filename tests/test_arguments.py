"""The command and what it refuses: arguments, own data, folders, notebooks that fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from studylib.cli import _folder_name, _value, main
from studylib.methods.arms import title
from studylib.report import tables
from studylib.study import notebooks as batch
from studylib.study import run
from studylib.study.records import Store, read_records

STUDY = str(Path(sys.executable).with_name("study"))
SMOKE = ("--profile", "smoke", "--model", "tiny-random")


def study(*arguments):
    return subprocess.run([STUDY, *map(str, arguments)], capture_output=True, text=True, timeout=600)


def test_a_notebook_that_fails_says_why(tmp_path, capfd):
    missing = str(tmp_path / "missing.txt")
    assert main(["run", "--notebooks", "01", *SMOKE, "--results", str(tmp_path), "--set", f"corpora=[{missing}]"]) == 1
    told = capfd.readouterr().err
    assert f"01_sampling_strategy.ipynb failed: ValueError: corpus: there is no file '{missing}'" in told
    assert "Traceback" not in told


def test_a_notebook_that_cannot_start_fails_before_any_arm_is_computed(tmp_path, capfd):
    missing = str(tmp_path / "missing.txt")
    arguments = ("--notebooks", "01", "04", *SMOKE, "--results", str(tmp_path), "--set", f"corpora=[{missing}]")
    assert main(["run", *arguments]) == 1
    assert "01_sampling_strategy.ipynb failed: ValueError: corpus: there is no file" in capfd.readouterr().err
    assert not list((tmp_path / "records").iterdir())


def test_an_arm_that_fails_is_left_to_the_notebook_that_needs_it(tmp_path, capfd, monkeypatch):
    executed = []

    def fail(arm, *rest):
        raise RuntimeError(f"{title(arm)} found no memory")

    def stop(notebook, *rest):
        executed.append(notebook.stem)
        raise batch.NotebookError(f"{notebook.name} failed: RuntimeError: found no memory again")

    monkeypatch.setattr(run, "carry_out", fail)
    monkeypatch.setattr(batch, "execute", stop)
    assert main(["run", "--notebooks", "02", "03", *SMOKE, "--results", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert executed == ["02_distillation_loss"] and "02_distillation_loss.ipynb failed: RuntimeError" in told
    assert "full precision found no memory; the notebook that needs this arm computes it again" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt9"], "model: 'gpt9' is not known; use smollm2-135m, tiny-random, a local folder"),
        (["--profile", "huge"], "profile: 'huge' is not known; use one of smoke, quick, full, paper"),
        (["--notebooks", "77"], "notebook: '77' is not known; use one of 01_sampling"),
        (["--set", "sedes=[1]"], "parameter: 'sedes' is not one of 01_sampling_strategy.ipynb, 02_dist"),
        (["--set", "settings=4-8-4"], "settings: '4-8-4' is not allowed; use a list of bit widths"),
        (["--set", "settings"], "--set: 'settings' is not NAME=VALUE"),
        (["--set", "settings=[4-8-4"], "--set: the value of 'settings=[4-8-4' is not YAML"),
        (
            ["--set", "output=here"],
            "--set: 'output' is not allowed; use --output, or --results, in which each run has its folder",
        ),
        (["--set", "hard=4-4-16", "--set", "seeds=[1]"], "--set: 'seeds' is not allowed; use --seeds"),
        (["--notebooks", "01", "--notebooks", "78"], "notebook: '78' is not known"),
        (["--jobs", "0"], "jobs: 0 is not allowed; use a whole number from 1 to 1024"),
        (["--scheduler", "host:8786"], "scheduler: 'host:8786' is not allowed; use an address, for example tcp://10."),
        (["--minutes", "0"], "minutes: 0 is not allowed; use a number above 0"),
        (["--minutes", "nan"], "minutes: nan is not allowed; use a number above 0"),
        (["--budget-mb", "0"], "budget: 0 MB is not allowed; use a number above 0"),
        (["--budget-mb", "nan"], "budget: nan MB is not allowed; use a number above 0"),
        (["--set", "extend=010"], "--set: '010' in 'extend=010' is not a whole number as people write it, e.g. 10"),
        (["--set", "extend=1:30"], "--set: '1:30' in 'extend=1:30' is not a whole number"),
        (["--set", "settings=[&a 1, *a]"], "--set: the value of 'settings=[&a 1, *a]' has YAML references or tags"),
        (["--set", "settings=" + 5000 * "["], "is not YAML"),
        (["--set", "=1"], "parameter: '' is not one of 01_sampling_strategy.ipynb"),
        (["--model", ""], "model: the folder '' has no config.json"),
        (["--model", "/dev/null"], "model: '/dev/null' is not known"),
        (["--model", "tiny-random", "--model", "gpt9"], "model: 'gpt9' is not known; use smollm2-135m, tiny-random,"),
        (["--model", "tiny-random", "--model", "tiny-random"], "models: 'tiny-random' is there twice; use two or more"),
        (["--model", "tiny-random", "--notebooks", "10"], "notebooks: 10_model_sizes takes two or more models of one"),
        (["--set", "models=[a, b]"], "--set: 'models' is not allowed; use --model, once for each"),
        (["--set", "own={}"], "--set: 'own' is not allowed; use --pairs, --text, --training-text, --tasks"),
        (["--pairs", "pairs.txt"], "instructions: 'pairs.txt' is not known; use alpaca, or the path of a .json"),
        (["--pairs", "/no/pairs.json", "--model", "tiny-random"], "instructions: there is no file '/no/pairs.json'"),
        (["--text", "/no/a.txt", "--model", "tiny-random"], "corpus: there is no file '/no/a.txt'"),
        (["--training-text", "/no/a.txt", "--model", "tiny-random"], "corpus: there is no file '/no/a.txt'"),
        (
            ["--training-text", "c4", "--notebooks", "01"],
            "training-text: 01_sampling_strategy compares texts; use --set",
        ),
        (["--tasks", "arc"], "task: 'arc' is not known; use one of boolq, piqa"),
        (["--windows", "1"], "windows: 1 is not allowed; use a whole number from 2"),
        (["--windows", "9999", "--model", "tiny-random"], "windows: 9999 of 256 tokens are more than the"),
        (["--items", "0"], "items: 0 is not allowed; use a whole number from 2"),
        (["--scored-pairs", "900", "--model", "tiny-random"], "pairs: 900 are more than the 493 of 'alpaca'"),
        (["--model", 300 * "x"], "File name too long"),
        (["--results", "/proc/nowhere", "--model", "tiny-random"], "results folder /proc/nowhere is not writable"),
        (["--results", "/dev/null", "--model", "tiny-random"], "results folder /dev/null is not writable"),
        (["--results", 300 * "x", "--model", "tiny-random"], "is not writable (File name too long)"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("started"))
    if "--results" not in arguments:
        arguments = [*arguments, "--results", str(tmp_path / "results")]
    assert main(["run", *arguments]) == 2
    *begun, told = capsys.readouterr().err.splitlines()
    assert told.startswith("study: ") and message in told
    assert all(re.fullmatch(r".* at quick: reading what 1[123] notebooks ask for", line) for line in begun)
    assert len(begun) < 2 and not list(tmp_path.iterdir())  # what is refused leaves nothing behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "--results", "/dev/null"], "results folder /dev/null holds no records"),
        (["list", "--results", "/etc/passwd"], "results folder /etc/passwd holds no records"),
        (["list", "--results", 300 * "x"], "File name too long"),
        (["show", "*", "--results", "/dev/null"], "record: no record in /dev/null or in the reference begins with '*'"),
        (["show", "../../x"], "no record in results/runs or in the reference begins with '../../x'"),
        (["export", "zz", "--output", "/nowhere/x"], "begins with 'zz'"),
        (["clean", "--results", "/dev/null"], "results: /dev/null holds no records"),
        (["report", "--output", "/dev/null"], "output: /dev/null holds no notebook's results"),
        (["report", "--output", "/nowhere"], "output: /nowhere holds no notebook's results"),
        (["report", "--output", 300 * "x"], "File name too long"),
        (["verify", "--reference", "/dev/null"], "reference: /dev/null holds no records"),
        (["verify", "--minutes", "nan"], "minutes: nan is not allowed; use a number above 0"),
    ],
)
def test_odd_paths_are_one_clear_line(capsys, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("study: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--results", ""],
        ["report", "--output", ""],
        ["run", "--jobs", "two"],
        ["run", "--seeds", "1.5"],
        ["plan"],
        ["nope"],
        [],
    ],
)
def test_what_is_no_command_line_is_said_with_its_usage(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: study") and "error: " in last


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("7e-1", 0.7),
        ("1e3", 1000.0),
        ("-2.5E+2", -250.0),
        ("[.5e1, 0.7]", [5.0, 0.7]),
        ("10", 10),
        ("[0, -3]", [0, -3]),
        ("4-8-4", "4-8-4"),
        ("2001-01-01", "2001-01-01"),
        ("false", False),
        ("''", ""),
    ],
)
def test_values_are_read_as_people_write_them(value, found):
    given = _value(f"x={value}", value)
    assert given == found and type(given) is type(found)


def test_paths_of_files_count_from_where_the_command_is_given(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def execute(notebook, output, parameters):
        raise Reached(parameters)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "execute", execute)
    files = "corpora=[mine.txt, wikipedia, sub/../other.jsonl]"
    with pytest.raises(Reached) as reached:
        main(["run", *SMOKE, "--notebooks", "01", "--results", "results", "--set", files])
    (given,) = reached.value.args
    assert given["corpora"] == [str(tmp_path / "mine.txt"), "wikipedia", str(tmp_path / "other.jsonl")]
    assert given["results"] == str(tmp_path / "results")


def test_a_run_and_its_report_name_the_recipe_within_a_budget(tmp_path, capsys, monkeypatch, picture):
    def execute(notebook, output, parameters):
        batch.publish(output, notebook.stem, picture, {}, tables.scoreboard(picture))
        return output / notebook.name

    store = Store(tmp_path)
    for record in picture:
        store.save(record)
    monkeypatch.setattr(batch, "execute", execute)
    assert main(["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "04", "--budget-mb", "5"]) == 0
    best = "The best within 5 MB: LLM-QAT at 4-8-8, "
    assert f"\nWhich recipe for this model\n\nServed as it is: {best}" in capsys.readouterr().out
    output = tmp_path / "smoke-tiny-random"
    best = re.sub("4-8-8|LLM-QAT", r'<span class="bits">\g<0></span>', best)
    assert best in (output / "report.html").read_text() and "--budget-mb 5" in (output / "report.html").read_text()
    assert main(["report", "--output", str(output), "--budget-mb", "9"]) == 0
    assert 'The best within 9 MB: RTN at <span class="bits">8-8-8</span>' in (output / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", "--output", str(output), "--format", "md"]) == 0
    assert "The smallest within 5.0% of full precision: RTN at 8-8-8" in capsys.readouterr().out
    assert main(["report", "--output", str(output), "--budget-mb", "-1"]) == 2
    assert "budget: -1 MB is not allowed" in capsys.readouterr().err


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Files as a user has them, in the working directory."""
    texts = [f"Note {at}: the small machine keeps its weights in {at} bits and reads on." * 8 for at in range(24)]
    (tmp_path / "notes.txt").write_text("\n".join(texts[:12]))
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[12:]))
    pairs = [{"instruction": f"How many bits has weight {at}?", "output": f"It has {at} bits."} for at in range(40)]
    (tmp_path / "faq.json").write_text(json.dumps(pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN = ["--pairs", "faq.json", "--text", "notes.txt", "--training-text", "more.jsonl", "--tasks", "piqa"]
OWN += ["--windows", "6", "--items", "5", "--scored-pairs", "3"]


def test_a_claim_is_decided_on_data_of_ones_own(own_data, capfd):
    """From any folder, and apart from the profile's own records, which the next command computes anew."""
    command = ["decide", "A4", *SMOKE, "--results", "runs"]
    assert main([*command, *OWN]) == 0
    told = capfd.readouterr()
    assert "Perplexity on notes" in told.out and "Report: " in told.out
    (folder,) = (own_data / "runs").glob("smoke-tiny-random-own-*")
    page = (folder / "report.html").read_text()
    assert "Perplexity is of notes; instruction pairs are those of faq" in page and "These numbers mean nothing" in page
    records = list(read_records(own_data / "runs" / "records"))
    assert all(own.arm.evaluation.corpora == (str(own_data / "notes.txt"),) for own in records)
    assert len(records[0].scores["loss/responses"]) == 3 and len(records[0].scores["accuracy/piqa"]) == 5
    assert main(["list", "--results", "runs"]) == 0
    assert "own data: faq.json notes.txt" in capfd.readouterr().out
    assert main(["run", *SMOKE, "--results", "runs", "--notebooks", "08", "03", "--dry-run"]) == 0
    assert " 0 in " in capfd.readouterr().out


def test_training_text_that_is_scored_is_refused(own_data, capsys):
    documents = (own_data / "notes.txt").read_text().split("\n")
    (own_data / "copy.txt").write_text("\n".join(documents[1:]))  # so that what was scored is trained on
    arguments = ["--text", "notes.txt", "--windows", "6", "--training-text", "copy.txt", "--results", "runs"]
    assert main(["run", *SMOKE, *arguments]) == 2
    _, told = capsys.readouterr().err.splitlines()  # behind the line that a run begins with
    assert told.startswith("study: training_text: 5 documents of")
    assert not (own_data / "runs").exists()


def test_models_of_the_same_name_do_not_share_a_folder(tmp_path):
    names = [_folder_name(str(tmp_path / owner / "model")) for owner in ("a", "b")]
    names += [_folder_name(f"{owner}/model") for owner in ("a", "b")] + [_folder_name("smollm2-135m")]
    assert names[2:] == ["a--model", "b--model", "smollm2-135m"]
    assert len(set(names)) == 5 and all(re.fullmatch("model-[0-9a-f]{6}", name) for name in names[:2])


def test_results_that_were_damaged_are_named(tmp_path, capsys, picture):
    output = tmp_path / "smoke-tiny-random"
    batch.publish(output, "04_ptq_vs_qat", picture, {}, tables.scoreboard(picture))
    assert main(["report", "--output", str(output)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert f"there is no record {tmp_path / 'records'}" in told[0] and "4 more files" in told[5]
    assert told[6] == f"study: output: the notebooks in {output} name no records that {tmp_path / 'records'} holds"
    for record in picture:
        path = Store(tmp_path).save(record)
    path.write_text("{}")  # of the last: the others are reported on
    assert main(["report", "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert told.err == f"study: {path} cannot be read as a record (it is no record)\n"
    assert picture[0].key in Path(told.out.strip()).read_text()
    (output / "04_ptq_vs_qat" / "published.json").write_text('{"records": ')
    assert main(["report", "--output", str(output)]) == 2
    assert "04_ptq_vs_qat/published.json is not what a notebook published" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys, picture):
    output = tmp_path / "smoke-tiny-random"
    for record in picture:
        Store(tmp_path).save(record)
    batch.publish(output, "04_ptq_vs_qat", picture, {}, tables.scoreboard(picture))
    (output / "report.html").mkdir()
    assert main(["report", "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"study: {output / 'report.html'}: Is a directory\n"
