"""A sample of benchmarks/faults.py: crashes at file operations, damaged files. And disks that take no more."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from studylib.cli import main
from studylib.config.budgets import Evaluation, profile
from studylib.config.settings import Format
from studylib.methods.arms import build_arm
from studylib.study import run, schedule
from studylib.study.records import Store, arm_key

ROOT = Path(__file__).parents[2]
BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
TRAINED = build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4")
ADAPTED = build_arm(BUDGET, "tiny-random", "qlora", "4-16-16", format=Format("nf", 4, 32, double=True))
NO_ROOM = "No space left on device"


@pytest.mark.parametrize(("kind", "sample"), [("crashes", 1), ("damages", 5)])
def test_after_a_fault_the_numbers_are_those_of_an_undisturbed_run(tmp_path, kind, sample):
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", kind, "--sample", str(sample)]
    done = subprocess.run([*command, "--output", tmp_path / "found.json"], capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())[kind]
    tried = sample * 3 if kind == "crashes" else sample  # of QAT, LoRA and an extension
    assert (found["tried"], found["same"], found["otherwise"]) == (tried, tried, []), done.stderr
    assert done.returncode == 0


def numbers(record):
    return dataclasses.replace(record, cost={}, provenance={})


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many kB on a new folder of tmp_path."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"{kilobytes} kB"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_told_with_path_and_bytes_and_costs_no_record(small_disk, tmp_path, capsys):
    """From one with room for nothing to one with room for all: an error of one line, or the record."""
    whole = [numbers(record) for record in schedule.run([ADAPTED, TRAINED], tmp_path / "whole")]
    capsys.readouterr()
    outcomes = set()
    for kilobytes in (40, 100, 160, 600):
        folder = small_disk(kilobytes)
        for arm, expected in zip((ADAPTED, TRAINED), whole, strict=True):
            try:
                (record,) = schedule.run([arm], folder)
            except OSError as error:
                assert error.strerror.startswith(f"{NO_ROOM}; it takes ") and error.filename.startswith(str(folder))
                outcomes.add(Path(error.filename).parent.parent.name)
            else:
                assert numbers(record) == expected
                told = [line for line in capsys.readouterr().err.splitlines() if "is not kept" in line]
                outcomes.add("a record, and all that can be made again" if not told else "a record")
            assert not list(folder.rglob(".partial-*"))
    assert outcomes == {"data", "a record", "a record, and all that can be made again"}


def test_the_kept_model_gives_way_to_its_record(tmp_path, monkeypatch):
    original, tries = Store.save, []

    def full(self, record):
        tries.append(self.model_file(record.key).exists())
        if tries[-1]:
            raise OSError(28, NO_ROOM, "records")
        return original(self, record)

    monkeypatch.setattr(Store, "save", full)
    (record,) = schedule.run([TRAINED], tmp_path)
    assert tries == [True, False] and Store(tmp_path).load(record.key) == record


KILLED = """
import json, os, signal, sys
from pathlib import Path
from studylib.study.export import export_model
from studylib.study.records import Store

results, key, wanted, place = sys.argv[1:]
output = Path(place, "model")


def killed_at(number):
    "Export in a child, which dies before so manieth change of a file there; how many it made, None where it died."
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        with open(reads) as told:
            count = told.read()
        return None if os.waitpid(child, 0)[1] else int(count)
    seen = 0

    def hear(event, args):
        nonlocal seen
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if changes and str(args[0]).startswith(place):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    export_model(Store(results).load(key), Store(results), output, wanted)
    os.write(writes, str(seen).encode())
    os._exit(0)


def files():
    return {path.name: path.stat().st_size for path in output.iterdir()} if output.exists() else None


count, whole = killed_at(0), files()
found = {"count": count, "whole": whole, "after": {}}
for number in sorted({1, count // 2, *range(count - 2, count + 1)}):
    for path in output.iterdir() if output.exists() else ():
        path.unlink()
    output.exists() and output.rmdir()
    assert killed_at(number) is None
    found["after"][number] = files()
print(json.dumps(found))
"""


@pytest.mark.parametrize("wanted", ["GGUF", "compressed-tensors"])
def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path, wanted):
    arm = build_arm(BUDGET, "tiny-random", "encoded", "4-16-16", format=Format("affine", 4, 32))
    (record,) = schedule.run([arm], tmp_path / "results")
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", KILLED, tmp_path / "results", record.key, wanted, tmp_path / "place"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"README.md", "study.json", "tokenizer.json"} < found["whole"].keys() and found["count"] > 5
    after = list(found["after"].values())
    assert after[0] is None and after[1] is None and all(files in (None, found["whole"]) for files in after)


@pytest.fixture
def read_only(tmp_path):
    """Makes a folder read-only, for root as well."""
    bound = []

    def lock(folder):
        for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("no right to mount a file system")
            bound.append(folder)

    yield lock
    for folder in bound[:1]:
        subprocess.run(["umount", folder], check=True)


def test_read_only_results_are_listed_shown_and_reported_on(tmp_path, read_only, capsys):
    results = tmp_path / "results"
    (record,) = schedule.run([TRAINED], results)
    published = results / "smoke-tiny-random" / "04_ptq_vs_qat"
    published.mkdir(parents=True)
    (published / "published.json").write_text(json.dumps({"records": [record.key], "figures": {}}))
    read_only(results)
    with pytest.raises(OSError, match="Read-only"):
        (results / "x").touch()
    capsys.readouterr()
    for command in (
        ["list", "--results"],
        ["show", record.key, "--results"],
        ["report", "--format", "md", "--output"],
    ):
        where = results if command[-1] == "--results" else published.parent
        assert main([*command, str(where)]) == 0, command
        shown = capsys.readouterr()
        assert (record.key if command[0] != "report" else "LLM-QAT") in shown.out
    assert main(["run", "--profile", "smoke", "--model", "tiny-random", "--results", str(results)]) == 2
    told = f"study: results folder {results} is not writable (Read-only file system); give another one with --results\n"
    assert capsys.readouterr().err.splitlines(keepends=True)[1:] == [told]  # behind the line that a run begins with


def test_a_damaged_kept_model_or_adapter_is_made_again(tmp_path, capsys):
    schedule.run([ADAPTED], tmp_path)
    store, key = Store(tmp_path), arm_key(ADAPTED)
    before = store.model_file(key).read_bytes()
    (adapter,) = (tmp_path / "adapters").glob("*.safetensors")
    for path in (adapter, store.model_file(key)):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    capsys.readouterr()
    run.deployed(ADAPTED, store)
    told = [line.partition("study: ")[2] for line in capsys.readouterr().err.splitlines() if "study: " in line]
    paths = (store.model_file(key), adapter)
    assert told == [f"{path} is not as it was written; it is made again" for path in paths]
    assert store.model_file(key).read_bytes() == before
