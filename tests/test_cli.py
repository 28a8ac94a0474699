"""The command as a user calls it: all notebooks at smoke size, then what is left of them."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from studylib.cli import main
from studylib.methods.arms import order, title
from studylib.report import ledger, tables
from studylib.study import notebooks as batch
from studylib.study import schedule
from studylib.study.records import REFERENCE, Store, arm_key, read_record, read_records

STUDY = str(Path(sys.executable).with_name("study"))
SMOKE = ("--profile", "smoke", "--model", "tiny-random")


def study(*arguments):
    return subprocess.run([STUDY, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results folder, and what the command printed while it filled it."""
    results = tmp_path_factory.mktemp("results")
    done = study("run", *SMOKE, "--results", results, "--set", "length=64")  # 07 measures steps of so many tokens
    assert done.returncode == 0, done.stderr
    return results, done


@pytest.fixture
def output(finished):
    return finished[0] / "smoke-tiny-random"


def test_the_run_ends_with_the_table_and_the_reports_path(finished, output):
    *table, blank, last = finished[1].stdout.rstrip().splitlines()
    assert last == f"Report: {output / 'report.html'}" and blank == ""
    assert any(line.startswith("LLM-QAT") and "4-8-4" in line for line in table)
    recipe = table[table.index("Which recipe for this model") :]
    assert any(line.startswith("Served as it is: ") for line in recipe)
    assert any(line.startswith("Fine-tuned and deployed: ") for line in recipe)
    assert (output / "report.html").stat().st_size > 100_000
    page = (output / "report.html").read_text()
    assert "study run --profile smoke --model tiny-random" in page
    assert "<title>Meaningless numbers: " in page and "<strong>These numbers mean nothing: " in page
    assert 'class="verdict ' not in page and not re.search(r"(Reproduced|Not reproduced|Undecided)( \(|[.:])", page)


def test_progress_was_shown_with_the_time_left(finished):
    assert "RTN 4-8-4" in finished[1].stderr and "100%" in finished[1].stderr and " left" in finished[1].stderr
    assert "Warning" not in finished[1].stderr and "WARNING" not in finished[1].stderr


def test_the_arms_of_all_notebooks_are_computed_before_the_first_is_executed(finished, output):
    shared = batch.find_notebooks(["01", "02", "03", "04", "05", "06", "09", "11", "12"])
    assigned = batch.assign_parameters(
        shared, {"model": "tiny-random", "profile": "smoke", "results": str(finished[0]), "output": str(output)}
    )
    wanted = {path: {arm_key(arm) for arm in batch.wanted_arms(path, assigned[path])} for path in shared}
    assert wanted == {path: set(batch.read_published(output, path.stem)["records"]) for path in shared}
    before, _, after = finished[1].stderr.partition("01_sampling_strategy  (tiny-random, smoke)")
    assert f"{len(set().union(*wanted.values()))} arms of 01_sampling_strategy, 02_dist" in before
    assert "100%" in before and " left" not in after.partition("08_low_bit_execution  (")[0]


def test_verdicts_are_told_while_arms_are_computed(finished):
    told = finished[1].stderr.partition("01_sampling_strategy  (tiny-random, smoke)")[0]
    first = [told.find(f"\n{name} \N{MIDDLE DOT} ") for name in ("B6", "A4", "A1")]  # what costs least first
    assert 0 < first[0] < first[1] < first[2]


def test_a_run_that_stops_leaves_a_page_and_the_next_goes_on(tmp_path, capfd, monkeypatch):
    """Stopped after two arms, as if the minutes were over then."""
    command, output = ["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "06"], tmp_path / "smoke-tiny-random"
    compute, until = schedule.compute_arms, []

    def two(missing, results, keep, jobs, next_arms, end, *rest):
        until.append(end - time.time())
        compute(missing[:2], results, keep, jobs, next_arms, end, *rest)

    monkeypatch.setattr(schedule, "compute_arms", two)
    assert main([*command, "--minutes", "3"]) == 0
    told = capfd.readouterr()
    assert "after 3 minutes 06_number_formats wait; the same command goes on from here" in told.err
    assert 170 < until[0] <= 180 and f"Report: {output / 'report.html'}" in told.out
    assert "http-equiv" not in (output / "report.html").read_text() and not (output / "06_number_formats").exists()
    assert len(list((tmp_path / "records").iterdir())) == 2
    monkeypatch.undo()
    assert main([*command, "--minutes", "3"]) == 0
    assert (output / "06_number_formats" / "published.json").exists() and "wait;" not in capfd.readouterr().err


def test_notebooks_that_compute_by_themselves_wait_when_the_minutes_are_over(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(batch, "execute", lambda *rest: pytest.fail("started"))
    command = ["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "07", "08", "--minutes", "1e-9"]
    assert main(command) == 2 and "holds no records of tiny-random" in capfd.readouterr().err


def test_a_claim_is_decided_alone(tmp_path, text_of, capfd):
    """What it takes is told before, its word at the end; the next time nothing is computed."""
    command = ["decide", "A6", "A5", "B6", *SMOKE, "--results", str(tmp_path), "--minutes", "9"]
    assert main(command) == 0
    told = capfd.readouterr()
    lines, statement = told.out.splitlines(), "Post-training quantization's perplexity explodes at 4-8-4"
    assert "A5 cannot be tested here: it takes two sizes of one family; the package index has one" in lines
    assert f"A6 · {statement}: not tested here. 2 of 2 arms were not run. " in told.out
    assert "Planned: 2 arms, " in told.out and "B6 · 65B fits" in told.out
    assert "It has its word; nothing is computed for it." in told.out
    page = tmp_path / "smoke-tiny-random" / "report.html"
    assert lines[-1] == f"Report: {page}" and statement in text_of(page).replace("&#39;", "'")
    assert any(line.startswith(f"A6 · {statement}: not judged at smoke. Perplexity on") for line in lines[3:])
    assert {record.arm.method for record in read_records(tmp_path / "records")} == {"full-precision", "rtn"}
    assert main([*command, "--output", str(tmp_path / "elsewhere")]) == 0
    told = capfd.readouterr()
    assert told.out.count("It has its word; nothing is computed for it.") == 2 and " left" not in told.err
    assert (tmp_path / "elsewhere" / "report.html").exists()


def test_minutes_that_are_too_few_are_told(tmp_path, capfd):
    assert main(["decide", "A6", *SMOKE, "--results", str(tmp_path), "--minutes", "1e-6"]) == 0
    told = capfd.readouterr()
    assert "study: minutes: 1e-06 are less than the next claim takes, under a minute; the page" in told.err
    assert "A6 are as they are; the same command goes on" in told.err and not list((tmp_path / "records").iterdir())
    assert "not tested here. not all of its arms were run yet." in told.out and "Report" not in told.out


@pytest.mark.parametrize("command", [["decide"], ["run", "--target-claims"]])
def test_a_claim_that_is_not_known_is_named(tmp_path, capsys, command):
    assert main([*command, "A6", "Z1", *SMOKE, "--results", str(tmp_path / "results")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("study: claim: 'Z1' is not known; use one of A1, A2, ") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_claim_that_cannot_be_tested_says_why(tmp_path, capsys):
    assert main(["decide", "A5", "B8", "C4", *SMOKE, "--results", str(tmp_path)]) == 2
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" cannot be tested here: ")[0] for line in told] == ["A5", "B8", "C4"]
    assert "paging needs a CUDA device" in told[1] and "records of an accelerator do" in told[2]


def test_only_what_target_claims_read_is_computed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(batch, "execute", lambda *rest: pytest.fail("started"))
    command = ["run", *SMOKE, "--results", str(tmp_path), "--target-claims", "A6", "A4", "--notebooks", "02", "04"]
    assert main(command) == 0
    told = capfd.readouterr()
    assert "A6 · " in told.err and "B6" not in told.err
    assert "02_distillation_loss, 04_ptq_vs_qat wait: they read arms that A6 A4 do not" in told.err
    titles = {title(record.arm) for record in read_records(tmp_path / "records")}
    assert titles == {"full precision", "RTN 4-8-4", "RTN 8-8-8"}


def test_a_search_for_rates_stops_when_the_minutes_are_over(tmp_path, capfd):
    command = ["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "02", "--rates", "search", "--minutes", "1e-6"]
    assert main(command) == 0
    told = capfd.readouterr()
    assert "after 1e-06 minutes learning rates are still searched; the same command goes on from here" in told.err
    assert not list((tmp_path / "records").iterdir())


def test_sizes_of_a_family_are_judged_in_one_folder(make_folder, tmp_path, text_of, capfd, monkeypatch):
    """Two models, each with its own page, and one of both; `study report` makes that again."""
    for name, layers, width in (("small", 2, 96), ("large", 3, 160)):
        make_folder(name=name, num_hidden_layers=layers, intermediate_size=width, tie_word_embeddings=True)
    monkeypatch.chdir(tmp_path)
    own = ("--set", "settings=[8-8-8]", "--set", "trained=[]")
    command = ["run", "--profile", "smoke", "--model", "small", "--model", "./large", "--results", "results", *own]
    assert main([*command, "--notebooks", "10", "--rates", "file.json"]) == 2
    assert "study: rates: 'file.json' is of one model; with several use search" in capfd.readouterr().err
    assert not Path("results").exists()
    assert main([*command, "--notebooks", "10", "--minutes", "1e-9"]) == 0
    assert "10_model_sizes waits; the same command goes on from here" in capfd.readouterr().err
    assert main([*command, "--notebooks", "10"]) == 0
    told = capfd.readouterr()
    (page,) = Path("results").glob("smoke-small-*+large-*/report.html")
    assert told.out.rstrip().endswith(f"Report: {page.resolve()}") and "(small, ./large, smoke)" in told.err
    found = r"full precision of small \(\S+ MB\) is \w+ than RTN at 8-8-8 of large \(\S+ MB\) by"
    assert re.search(found, told.out) and "for 4 bits by LLM-QAT beside 8 there are no arms of two sizes" in told.out
    assert len(list(Path("results/records").iterdir())) == 4
    text = text_of(page)
    assert "small, large: a larger model at fewer bits" in text and "These numbers mean nothing" in text
    assert '<span class="verdict' not in text  # as at smoke
    page.unlink()
    assert main(["report", "--output", str(page.parent)]) == 0
    assert re.search(found, text_of(page)) and "<pre>study report --output" in page.read_text()


@pytest.mark.parametrize("rates", [[], ["--rates", "search"]])
def test_where_nothing_is_trained_no_rates_are_spoken_of_but_where_they_were_asked_for(tmp_path, capfd, rates):
    assert main(["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "00", "--minutes", "1", *rates]) == 2
    told = capfd.readouterr().err
    assert "usual ones" not in told and "cases" not in told and "holds no records of tiny-random" in told
    assert ("no arm of 00_claims is trained: no rates to search" in told) == bool(rates)


def test_executed_notebooks_hold_their_results(output):
    for notebook in batch.find_notebooks([]):
        cells = nbformat.read(output / notebook.name, as_version=4).cells
        outputs = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs]
        assert not [out for out in outputs if out.output_type == "error"]
        published = batch.read_published(output, notebook.stem)["figures"]
        assert sum("image/png" in out.get("data", {}) for out in outputs) == len(published) >= 1
        shown = [out.get("data", {}).get("text/markdown", "") for out in outputs]
        assert any(re.match(r"\*\*[ABC]\d+\*\* · ", text) for text in shown)
        assert (
            len([out for out in outputs if out.output_type == "stream"]) <= 4
        )  # one is smoke's; none for each state of the bar
        assert (output / notebook.stem / "table.csv").exists()
        assert "<html" in (output / notebook.with_suffix(".html").name).read_text()


def test_records_are_shared_between_notebooks(finished, output):
    keys = [set(batch.read_published(output, path.stem)["records"]) for path in batch.find_notebooks([])]
    found = {record.key: record for record in read_records(finished[0] / "records")}
    assert set.union(*keys) == set(found)
    distilled, everywhere = (
        {title(found[key].arm) for key in set.intersection(*chosen)} for chosen in (keys[:4], keys)
    )
    assert distilled == {"full precision", "RTN 4-8-4", "LLM-QAT 4-8-4"} and everywhere == {"full precision"}
    # All generated data but the chat's and those of four strategies are one set; each real corpus is another.
    assert len(list((finished[0] / "data").iterdir())) == 6 + 1 + 2 + 2  # full precision's predictions


def test_list_and_show(finished, capsys):
    assert main(["list", "--results", str(finished[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((finished[0] / "records").glob("*.json")))
    (line,) = [line for line in lines if "  LLM-QAT 4-8-4  " in line]
    assert "seed 0  finished" in line and "wikipedia" in line and "model kept, " in line
    assert not any("model kept" in line for line in lines if "  RTN " in line)
    assert main(["show", line.split()[0][:8], "--results", str(finished[0])]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["arm"]["bits"] == "4-8-4" and record["metrics"]["perplexity/c4"] > 1
    assert record["provenance"]["libraries"]["torch"] and record["cost"]["seconds"]["train"] > 0


def test_export(finished, tmp_path, capsys):
    assert main(["list", "--results", str(finished[0])]) == 0
    keys = {line.split("  ")[2]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    where = ["--results", str(finished[0]), "--output", str(tmp_path / "model")]
    assert main(["export", keys["LLM-QAT 4-8-4"], *where]) == 0
    told = capsys.readouterr().out
    assert told.startswith("LLM-QAT 4-8-4, compressed-tensors: 0.1 MB") and "| perplexity on C4 | " in told
    assert "Key/value cache: 4 bits here as in the record." in told
    assert told in (tmp_path / "model" / "README.md").read_text() and "as transformers loads it" not in told
    scored = ["--results", str(finished[0]), "--output", str(tmp_path / "scored"), "--scored"]
    assert main(["export", keys["LLM-QAT 4-8-4"], *scored]) == 0
    assert "| | as transformers loads it, in fp32 | the record |" in capsys.readouterr().out
    for key, message in (
        (keys["RTN 4-8-4"], "give a new folder"),
        (keys["full precision"], "the model as it was loaded"),
    ):
        assert main(["export", key, *where]) == 2
        told = capsys.readouterr().err
        assert told.startswith("study: ") and message in told and told.count("\n") == 1


def test_a_second_run_computes_nothing(finished, capfd):
    stamps = {path: path.stat().st_mtime_ns for path in (finished[0] / "records").iterdir()}
    assert main(["run", "--notebooks", "04", *SMOKE, "--results", str(finished[0]), "--seeds", "0"]) == 0
    assert " left" not in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (finished[0] / "records").iterdir()} == stamps


def test_a_reader_that_stops_early(finished):
    listing = subprocess.Popen(
        [STUDY, "list", "--results", str(finished[0])], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert (listing.communicate()[1], listing.returncode) == (b"", 0)


def test_a_summary_of_nothing_says_so(tmp_path, capsys, monkeypatch):
    def execute(notebook, output, parameters):
        batch.publish(output, notebook.stem, [], {}, tables.scoreboard([]))
        return output / notebook.name

    monkeypatch.setattr(batch, "execute", execute)
    assert main(["run", *SMOKE, "--results", str(tmp_path), "--notebooks", "00"]) == 2
    assert "holds no records of tiny-random at the smoke budget" in capsys.readouterr().err


def test_records_that_are_not_there(tmp_path, finished, capsys):
    assert main(["show", "zzz", "--results", str(finished[0])]) == 2
    assert "no record in" in capsys.readouterr().err
    assert main(["show", "", "--results", str(finished[0])]) == 2
    assert "records in" in capsys.readouterr().err
    published = read_record(next((REFERENCE / "records").glob("*.json")))
    for name in (published.key, published.key[:8], published.file_name.removesuffix(".json")):
        assert main(["show", name, "--results", str(finished[0])]) == 0
        assert json.loads(capsys.readouterr().out)["key"] == published.key


def test_a_listing_of_nothing_is_of_the_reference_sorted_and_as_a_table(tmp_path, capsys):
    assert main(["list", "--results", str(tmp_path / "none")]) == 0
    told = capsys.readouterr()
    assert "none holds no records; these are the reference results" in told.err
    titles = [line.split("smollm2-135m  ")[1].split("  ")[0] for line in told.out.splitlines()]
    assert titles[0] == "full precision" and titles == list(map(title, sorted_arms()))
    assert main(["list", "--results", str(tmp_path / "none"), "--csv", str(tmp_path / "all.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "all.csv")) == len(titles)


def sorted_arms():
    arms = [read_record(path).arm for path in (REFERENCE / "records").glob("*.json")]
    return sorted(arms, key=lambda arm: (order(arm)[:-1], title(arm), arm.seed))


def test_a_dry_run_tells_what_is_missing_and_computes_nothing(tmp_path, capsys):
    asked = ["--results", str(tmp_path), "--notebooks", "08", "--set", "llama_cpp=never", "--dry-run"]
    command = ["run", *SMOKE, *asked]
    assert main(command) == 0
    first, *arms, last = capsys.readouterr().out.splitlines()
    assert first == f"3 arms: 0 in {tmp_path}, 0 in the reference, 3 missing." and len(arms) == 3
    assert last.startswith("All together: ") and not list((tmp_path / "records").iterdir())
    assert main(["run", *asked]) == 0
    assert capsys.readouterr().out == f"3 arms: 0 in {tmp_path}, 3 in the reference, 0 missing.\n"
    assert main([*command, "--rates", "search"]) == 2


def test_plan(capsys):
    assert main(["plan", "--model", "llama-7b", "--method", "qlora", "--checkpointing"]) == 0
    shown = capsys.readouterr().out
    assert "llama-7b, qlora, NF4 + DQ, rank 16, batch 1 x 512 tokens, with gradient checkpointing" in shown
    assert re.search(r"^total +\d+\.\d\d GB$", shown, re.M) and "that fits cards of 8 GB" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt9"], "model: 'gpt9' is not known"),
        (["--model", "llama-7b", "--method", "lora+"], "method: 'lora+' is not known; use one of lora, qlora"),
        (["--model", "llama-7b", "--bits", "5"], "bits: 5 is not allowed for 'nf'; use 2 or 3 or 4"),
        (["--model", "llama-7b", "--group", "48"], "group: 48 does not divide the row length 4096"),
        (["--model", "llama-7b", "--rank", "0"], "rank: 0 is not allowed; use a whole number from 1 to 1024"),
        (
            ["--model", "llama-7b", "--sequence", "4096"],
            "length: 4096 tokens is longer than the model's context of 2048",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_one_clear_line(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("study: ") and message in told and told.count("\n") == 1


def test_two_runs_at_once(tmp_path):
    small = ("settings=[4-8-4]", "methods=[rtn]", "searched=[]", "grouped=[]", "smoothed=[]")
    command = [STUDY, "run", *SMOKE, "--notebooks", "04", "--set", *small, "--results"]
    running = [
        subprocess.Popen([*command, tmp_path / name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for name, process in zip(("a", "b"), running, strict=True):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert f"Report: {tmp_path / name / 'smoke-tiny-random' / 'report.html'}" in out
    first, second = (
        {record.key: record.scores for record in read_records(tmp_path / name / "records")} for name in ("a", "b")
    )
    assert first == second and len(first) == 5


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path, heeding):
    command = [STUDY, "run", *SMOKE, "--notebooks", "04", "--results", tmp_path / "results"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    maps = Path(f"/proc/{started.pid}/maps")
    while started.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    told = started.communicate(timeout=60)
    assert (started.returncode, told[0]) == (130, "")
    assert told[1].splitlines()[-1] == "study: interrupted; the same command goes on from here"
    assert told[1].count("\n") <= 2  # one of them is what a run begins with


def test_help_names_every_command():
    done = study("--help")
    assert done.returncode == 0
    assert all(
        re.search(rf"^    {name}\s", done.stdout, re.MULTILINE)
        for name in ("run", "decide", "list", "show", "export", "run-check", "report", "verify", "clean", "plan")
    )


def test_the_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "studylib", "show", "llm-qat_4-8-4_seed0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and json.loads(done.stdout)["arm"]["method"] == "llm-qat", done.stderr


def test_foreign_files_do_not_stop_a_listing(tmp_path, capsys, picture):
    for record in picture:
        Store(tmp_path).save(record)
    folder = tmp_path / "records"
    (folder / "old.json").write_text(json.dumps({"key": "ab", "arm": {}}))
    (folder / "cut.json").write_text(next(folder.glob("rtn*.json")).read_text()[:500])
    assert main(["list", "--results", str(tmp_path)]) == 0
    shown, told = capsys.readouterr()
    assert len(shown.splitlines()) == len(picture)
    lines = told.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"study: {folder}") for line in lines)
    assert "an older format, 1" in lines[1] and "cannot be read as a record" in lines[0]
    for number in range(9):
        (folder / f"more{number}.json").touch()
    assert main(["list", "--results", str(tmp_path)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6 and told[-1] == "study: 6 more files there cannot be read either"


def test_a_listing_tells_the_seconds_of_phases_and_what_no_claim_reads(tmp_path, capsys, picture):
    for record in picture:
        Store(tmp_path).save(record)
    assert main(["list", "--times", "--results", str(tmp_path)]) == 0
    *lines, total, unread = capsys.readouterr().out.splitlines()
    for record in picture:
        (line,) = [line for line in lines if line.startswith(record.key)]
        seconds = record.cost["seconds"]
        told = re.findall(
            r"\b(load|data|quantize|train|evaluate|decode) +([0-9.,]+)", line.partition(record.arm.model)[0]
        )
        assert {phase: float(text.replace(",", "")) for phase, text in told} == {
            phase: round(own, 1) for phase, own in seconds.items()
        }
    assert total.startswith("all together ") and unread == ledger.unread(picture)


def test_records_are_listed_shown_and_reported_on_wherever_cache_and_inputs_are(tmp_path, capsys, monkeypatch, picture):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "file" / "cache"))  # where nothing is, and nothing can be made
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("called pip"))

    def moved(record):
        evaluation = dataclasses.replace(record.arm.evaluation, corpora=("/gone/own.txt", "c4"))
        arm = dataclasses.replace(record.arm, model="/gone/model", evaluation=evaluation)
        named = {
            part: {name.replace("wikipedia", "/gone/own.txt"): values for name, values in getattr(record, part).items()}
            for part in ("metrics", "scores")
        }
        provenance = record.provenance | {"corpora": dict.fromkeys(evaluation.corpora, "cd" * 32)}
        return dataclasses.replace(record, arm=arm, provenance=provenance, **named)

    records, store = [moved(record) for record in picture], Store(tmp_path)
    for record in records:
        store.save(record)
    output = tmp_path / "smoke-model"
    batch.publish(output, "04_ptq_vs_qat", records, {}, tables.scoreboard(records))
    monkeypatch.chdir(tmp_path)  # no repository, whose commit would be asked for
    assert main(["list", "--results", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(records)
    assert main(["show", "--results", str(tmp_path), records[0].key]) == 0
    assert json.loads(capsys.readouterr().out)["arm"]["model"] == "/gone/model"
    assert main(["report", "--output", str(output)]) == 0 and (output / "report.html").is_file()
