"""Workers of dask: real ones of this machine, which are killed, and those of a scheduler that was there before."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster

from studylib import cli
from studylib.config.budgets import Evaluation, profile
from studylib.config.numerics import NUMERICS, Version
from studylib.config.settings import Format
from studylib.methods.arms import build_arm
from studylib.study import cluster, run, schedule
from studylib.study import notebooks as batch
from studylib.study.needs import ClusterError, Has, check_needs
from studylib.study.records import Store, read_records
from studylib.study.workers import Asked, versions

BUDGET = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
ARMS = [build_arm(BUDGET, "tiny-random", "rtn", bits) for bits in ("4-8-4", "8-8-8", "4-16-16")]
TRAINED = [build_arm(BUDGET, "tiny-random", "llm-qat", "4-8-4", training={"steps": steps}) for steps in (4, 40)]
DASK = Path(sys.executable).with_name("dask")


def without_cost(record):
    return dataclasses.replace(record, cost={}, provenance={})


def workers_here():
    return [own for child in psutil.Process().children() for own in child.children()]


def test_an_arm_whose_worker_is_killed_is_computed_by_another(tmp_path, capsys):
    alone = schedule.run([*ARMS, *TRAINED], tmp_path / "alone", compute="all")
    drawn, killed, done = random.Random(0), [], threading.Event()

    def kill():
        while len(killed) < 2 and not done.wait(0.02):
            begun = list((tmp_path / "killed" / "checkpoints").glob("*")) if killed else workers_here()
            if begun and (there := workers_here()):
                time.sleep(drawn.uniform(0, 1))
                with contextlib.suppress(psutil.NoSuchProcess):
                    drawn.choice(there).kill()
                    killed.append(time.time())

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        disturbed = schedule.run([*TRAINED, *ARMS], tmp_path / "killed", jobs=2, compute="all")
    finally:
        done.set()
        killer.join()
    assert killed
    assert list(map(without_cost, disturbed)) == list(map(without_cost, [*alone[3:], *alone[:3]]))
    assert len(list((tmp_path / "killed" / "records").iterdir())) == 5
    assert "Traceback" not in capsys.readouterr().err and not workers_here()


def started(*arguments, **environment):
    """A process of the command `dask`, and where its output goes."""
    return subprocess.Popen(
        [DASK, *arguments, "--no-dashboard"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """A scheduler file."""
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    process = started("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file)
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield file
    stop(process)


@contextlib.contextmanager
def worker(scheduler, *arguments, **environment):
    """One worker of the scheduler; inside it is there."""
    given = ("--scheduler-file", scheduler, "--nthreads", "1", "--no-nanny", "--local-directory", scheduler.parent)
    process = started("worker", *map(str, given), *arguments, **environment)
    try:
        client = cluster._connected(str(scheduler))
        while not cluster._identity(client)["workers"]:
            assert process.poll() is None
            time.sleep(0.05)
        client.close()
        yield
    finally:
        stop(process)


@pytest.fixture(scope="module")
def working(scheduler):
    with worker(scheduler):
        yield str(scheduler)


def refused(scheduler, arms, folder):
    with pytest.raises(ClusterError) as error:
        schedule.run(arms, folder, scheduler=str(scheduler))
    assert "\n" not in str(error.value) and not list((folder / "records").iterdir())
    return str(error.value)


def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    told = refused("tcp://127.0.0.1:1", ARMS, tmp_path)
    assert told == "scheduler: tcp://127.0.0.1:1 does not answer within 1 s; give one that does, or leave it out"
    for wrong in ("127.0.0.1:8786", "http://127.0.0.1:80", "tcp://host", str(tmp_path / "none.json")):
        with pytest.raises(ValueError, match=r"^scheduler: .* is not allowed; use an address, for example tcp://10"):
            schedule.run(ARMS, tmp_path, scheduler=wrong)


def test_a_file_that_is_none_of_a_scheduler_is_named(tmp_path):
    (tmp_path / "file").write_text("{}")
    assert "file is no scheduler file, which" in refused(tmp_path / "file", ARMS, tmp_path / "results")


def test_a_scheduler_without_workers_is_named(scheduler, tmp_path):
    assert "has no workers; start one with `dask worker" in refused(scheduler, ARMS, tmp_path)


def test_a_worker_with_another_version_is_named(scheduler, tmp_path):
    (tmp_path / "studylib-9.9.dist-info").mkdir()
    (tmp_path / "studylib-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: studylib\nVersion: 9.9\n"
    )
    with worker(scheduler, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])):
        told = refused(scheduler, ARMS, tmp_path / "results")
    assert told.startswith("scheduler: worker tcp://") and "has studylib 9.9, and not " in told


def test_a_worker_without_a_cache_folder_is_named(scheduler, tmp_path):
    (tmp_path / "file").touch()
    with worker(scheduler, STUDY_CACHE=str(tmp_path / "file" / "cache")):
        told = refused(scheduler, ARMS, tmp_path / "results")
    assert f"cannot use the cache folder {tmp_path}/file/cache (Not a directory); set STUDY_CACHE" in told


def test_a_worker_with_other_numerics_or_without_the_results_folder_is_named(working, tmp_path, monkeypatch):
    with cluster._connected(working) as client:
        asked = Asked(versions(), tmp_path / "elsewhere" / "locks" / "probe", {})
        (told,) = cluster.Crew(client, Store(tmp_path), False, asked=asked).refused.values()
    assert told.endswith(f"does not see the results folder {tmp_path}/elsewhere; share it under the same path")
    monkeypatch.setitem(NUMERICS, "grids", Version(99, "a test"))
    assert "has numerics version 1 of 'grids', not 99; install the same" in refused(working, ARMS, tmp_path)


def test_what_no_worker_has_is_named(working, tmp_path):
    tuned = build_arm(BUDGET, "tiny-random", "lora")
    whole = build_arm(BUDGET, "tiny-random", "qat", "4-16-16", format=Format("int-full", 4, 32))
    paged = dataclasses.replace(whole, tuning=dataclasses.replace(whole.tuning, paged=True))
    assert refused(working, [paged], tmp_path).startswith("GPU: ")
    with pytest.raises(ClusterError, match=r"^memory: LoRA.* takes 0\.0 GB as `study plan` counts, and no worker has"):
        check_needs([tuned], [Has(memory=1e5, gpus=0)])
    check_needs([tuned, *ARMS], [Has(memory=1e9, gpus=0)])


def test_the_command_has_arms_computed_by_the_workers_of_a_scheduler(working, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "execute", lambda notebook, output, parameters: pytest.fail(str(parameters)))
    small = ("widths=[4]", "group=32", "groups=[16]", "fine=false", "micro=false", "calibrated=[]")
    command = ["run", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "06", "--set", *small]
    command += ["--results", str(tmp_path), "--scheduler"]
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    assert cli.main([*command, "tcp://127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("study: scheduler: tcp://127.0.0.1:1 does not answer")
    monkeypatch.setattr(cluster, "PATIENCE", 10)
    monkeypatch.setattr(run, "carry_out", lambda *arguments: pytest.fail("computed here"))
    with pytest.raises(pytest.fail.Exception, match=str(tmp_path)) as reached:
        cli.main([*command, working])
    assert repr(working) in str(reached.value)  # the notebook has the scheduler as well
    found = list(read_records(tmp_path / "records"))
    assert "study: 1 workers of " in capsys.readouterr().err
    monkeypatch.undo()
    alone = schedule.run([record.arm for record in found], tmp_path / "alone", compute="all")
    assert list(map(without_cost, alone)) == list(map(without_cost, found)) and len(found) > 3


def test_the_command_verifies_through_a_scheduler(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reference"
    records = schedule.run(ARMS, folder, compute="all")
    command = ["verify", "--reference", str(folder), "--scheduler"]
    assert cli.main([*command, "tcp://host", "--results", str(tmp_path / "none")]) == 2
    assert "scheduler: 'tcp://host' is not allowed; use an address" in capsys.readouterr().err
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as there:
        monkeypatch.setattr(run, "carry_out", lambda *arguments: pytest.fail("computed here"))
        command.append(there.scheduler_address)
        assert cli.main([*command, "--results", str(tmp_path / "again")]) == 0
        told = capsys.readouterr()
        assert told.out.splitlines()[-1].endswith("numbers of 3 arms are as published, 4 to the last bit.")
        assert f"study: 2 workers of {there.scheduler_address}" in told.err
        wrong = dataclasses.replace(records[0], metrics=records[0].metrics | {"perplexity/wikipedia": 1.0})
        Store(folder).save(wrong)
        assert cli.main([*command, "--results", str(tmp_path / "again")]) == 1
    assert "FAIL  RTN 4-8-4: perplexity/wikipedia" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_another_thread_gets_comes_when_workers_have_started(number):
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    before, started = signal.signal(number, interrupt), []
    end = threading.Event()
    other = threading.Thread(target=end.wait)  # from before, so that nothing is blocked in it
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), cluster._deaf_to_interrupts():
            signal.pthread_kill(other.ident, number)
            time.sleep(0.1)
            started.append(number)
        assert started == [number]
        assert signal.getsignal(number) is interrupt
        with pytest.raises(KeyboardInterrupt), cluster._deaf_to_interrupts():
            for _ in range(2):  # who asks again does not wait
                signal.pthread_kill(other.ident, number)
                time.sleep(0.1)
            started.append(number)
        assert started == [number]
    finally:
        end.set()
        signal.signal(number, before)
