"""The order of arms, and workers of this machine: they end with the process that started them, however that ends."""

import contextlib
import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import psutil
import pytest

from studylib.config.budgets import Evaluation, profile
from studylib.config.files import remove_leftovers
from studylib.config.settings import Format
from studylib.methods.arms import build_arm
from studylib.study import schedule
from studylib.study.pace import Clock, Pace, tokens, waited_for
from studylib.study.records import Store, arm_key

SCRIPT = """
import dataclasses, sys
from studylib import cli
from studylib.config.budgets import Evaluation, profile
from studylib.methods.arms import build_arm
from studylib.study import schedule

budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
short = build_arm(budget, "tiny-random", "rtn", "4-8-4")
long = [build_arm(budget, "tiny-random", "llm-qat", "4-8-4", seed, training={"steps": 10**5}) for seed in (0, 1)]


def both(options, arguments):
    schedule.run([short], sys.argv[1])
    schedule.run(long, sys.argv[1], jobs=2)


cli._COMMANDS["list"] = both
sys.exit(cli.main(["list"]))
"""


def workers_of(process):
    """The processes that the process which loads libraries for them was forked into."""
    with contextlib.suppress(psutil.NoSuchProcess):  # or one that has ended
        return [own for child in psutil.Process(process.pid).children() for own in child.children()]
    return []


def gone(processes, seconds=5):
    """Whether all have ended then; the system may take longer to bury those that lost their parent."""
    end = time.monotonic() + seconds
    while left := [own for own in processes if own.is_running() and own.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > end:
            return False
        psutil.wait_procs(left, 0.1)
    return True


@pytest.fixture
def running(tmp_path, heeding):
    """A process that has finished one record and has started workers for two arms that take for ever."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heeding)
    family = []
    try:
        while len(workers_of(process)) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process, family
    finally:
        for own in (process, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                own.kill()
        process.communicate()


def test_workers_end_when_their_parent_is_killed(running, tmp_path):
    process, family = running
    while len(list((tmp_path / "data").iterdir())) < 2:  # each has begun an arm
        assert process.poll() is None
        time.sleep(0.05)
    workers = workers_of(process)
    process.kill()
    assert len(workers) == 2 and gone(workers)
    assert gone(family, 60)  # what had loaded libraries for them takes its time to let go of these
    assert len(list(Store(tmp_path).folder.glob("records/*.json"))) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob(".partial-*"))  # who was writing is gone


def test_an_interrupt_while_workers_start_is_told_in_one_line(running, tmp_path):
    process, family = running
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.splitlines()[-1] == "study: interrupted; the same command goes on from here"
    assert gone(family, 60)
    assert len(list(tmp_path.glob("records/*.json"))) == 1


@pytest.fixture
def two_arms():
    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=2, length=16))
    return [build_arm(budget, "tiny-random", "rtn", bits) for bits in ("4-8-4", "8-8-8")]


def test_arms_are_carried_out_in_the_order_that_is_given_and_each_is_told(two_arms, tmp_path):
    store, there = Store(tmp_path), []

    def told(waiting):
        there.append([bool(store.find(arm_key(arm))) for arm in two_arms])
        return waiting

    schedule.compute_arms(two_arms, tmp_path, next_arms=told)
    assert there == [[False, False], [True, False], [True, True]]


def test_what_comes_next_is_decided_after_each_arm(two_arms, tmp_path):
    arms = [*two_arms, dataclasses.replace(two_arms[0], bits="4-8-8"), dataclasses.replace(two_arms[0], bits="8-8-4")]
    asked = []

    def last_alone(waiting):
        asked.append(list(waiting))
        return waiting[-1:] if len(waiting) > 2 else []

    schedule.compute_arms(arms, tmp_path, next_arms=last_alone)
    assert asked == [arms, arms[:3], arms[:2]]
    assert schedule.missing_arms(arms, Store(tmp_path)) == arms[:2]


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_arm_is_begun_after_the_time_is_over(two_arms, tmp_path, jobs):
    schedule.compute_arms(two_arms, tmp_path, jobs=jobs, until=time.time())
    assert not list((tmp_path / "records").iterdir())
    assert schedule.missing_arms(two_arms, Store(tmp_path)) == two_arms


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_takes_longer_than_there_is_time_waits_and_each_call_gets_further(two_arms, tmp_path, jobs):
    pace = Pace()
    for arm in two_arms:
        pace.add(arm, "evaluate", 1e7, tokens(arm)["evaluate"])
    wanted = [*two_arms, dataclasses.replace(two_arms[0], bits="4-8-8")]
    for left in (2, 1):
        assert not schedule.compute_arms(wanted, tmp_path, jobs=jobs, until=time.time() + 120, pace=copy.deepcopy(pace))
        wanted = schedule.missing_arms(wanted, Store(tmp_path))
        assert len(wanted) == left
    assert schedule.compute_arms(wanted, tmp_path, jobs=jobs, until=time.time() + 120, pace=copy.deepcopy(pace))
    assert not schedule.missing_arms(wanted, Store(tmp_path))


def test_records_of_the_reference_are_found_and_never_written(two_arms, tmp_path, monkeypatch, capsys):
    reference, own = tmp_path / "reference", tmp_path / "own"
    made = schedule.run(two_arms, reference)
    monkeypatch.setattr(schedule, "REFERENCE", reference)
    files = sorted(reference.rglob("*.json"))
    assert schedule.run(two_arms, own, compute="new") == made and not list((own / "records").iterdir())
    assert capsys.readouterr().out == "The reference results hold the records of 2 of 2 arms; nothing is computed.\n"
    lacking = dataclasses.replace(two_arms[0], method="rtn", bits="3-16-16")
    other = dataclasses.replace(lacking, evaluation=dataclasses.replace(lacking.evaluation, windows=3))
    (_, _, computed) = schedule.run([*two_arms, lacking, other], own, compute="new")  # of another budget: is computed
    said = capsys.readouterr().out
    assert computed.arm == other and "1 arms are not in the reference results and are left out: RTN 3-16-16. " in said
    assert len(schedule.run([*two_arms, lacking], own)) == 3 and len(list((own / "records").iterdir())) == 2
    assert schedule.run(two_arms[:1], own, compute="all")[0].provenance["finished"]
    assert len(list((own / "records").iterdir())) == 3 and sorted(reference.rglob("*.json")) == files
    with pytest.raises(ValueError, match=r"^compute: 'some' is not allowed; use new, missing, all$"):
        schedule.run(two_arms, own, compute="some")


def test_what_would_wait_for_another_arm_comes_after_what_would_not(tmp_path):
    tiny, small = partial(build_arm, profile("smoke"), "tiny-random"), Format("int-full", 4, 16)
    maker = tiny("gptq", "4-8-4")
    alike = tiny("gptq", "4-4-4")  # the same integers
    taught = tiny("llm-qat", "4-8-4", corpus="c4")  # on other text
    rounded = tiny("rtn", "4-8-4")
    tuned = tiny("qlora", "4-16-16", format=small)
    merged = tiny("qlora", "4-16-16", format=small, merge="merged-16")  # the same adapter
    for begun, asked, wanted in (
        ([maker], [alike, taught, rounded], [taught, rounded, alike]),
        ([maker, tuned], [alike, merged, rounded], [rounded, alike, merged]),
        ([rounded], [alike, maker, merged], [alike, maker, merged]),
    ):
        with Clock(Pace(), hidden=True) as clock:
            crew = SimpleNamespace(begun=dict.fromkeys(begun, 0.0), given_up={}, store=Store(tmp_path))
            shares = schedule._Shares([*begun, *asked], crew, 2, False, math.inf, list, clock)
            shares.turn = asked
            assert list(shares._apart()) == wanted
            clock.pace.made |= {made for arm in begun for made in waited_for(arm)}
            assert list(shares._apart()) == asked
