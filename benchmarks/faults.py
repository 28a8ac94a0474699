"""Faults that a results folder survives: a crash at each file operation, each kept file damaged, `study run` killed.

After each, the same arms are run again and must give the numbers of an undisturbed run, to the last bit. On a cut-down
smoke budget of tiny-random. Arguments: some of crashes, damages, kills (default: all); --sample N of the points, drawn
by --seed; --output FILE. All points take about an hour.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes  # noqa: F401  here, so that the many children of this process need not import it
import peft  # noqa: F401
import psutil
import safetensors.torch
import torch

from studylib.config.arm import Arm
from studylib.config.budgets import Evaluation, profile
from studylib.config.files import SEAL
from studylib.config.settings import Format
from studylib.methods.arms import build_arm
from studylib.study import schedule
from studylib.study.machine import environment
from studylib.study.records import Store, arm_key
from studylib.study.run import deployed
from studylib.train import loop

SECONDS = 120  # after which a child is taken to hang
SMOKE = profile("smoke")
BUDGET = dataclasses.replace(
    SMOKE,
    sampling=dataclasses.replace(SMOKE.sampling, count=6, length=16, batch=2),
    training=dataclasses.replace(SMOKE.training, steps=3, batch=2),
    tuning=dataclasses.replace(SMOKE.tuning, steps=3, batch=1),
    instructions=dataclasses.replace(SMOKE.instructions, length=128),
    evaluation=Evaluation(("wikipedia",), windows=2, length=16),
)
NF4 = Format("nf", 4, 32, double=True)


def arm(method: str, bits: str, extended: int = 0, **fields: Any) -> Arm:
    return build_arm(BUDGET.extended(extended), "tiny-random", method, bits, **fields)


QAT, LONGER, SAME_TEXT = arm("llm-qat", "4-8-4"), arm("llm-qat", "4-8-4", 2), arm("llm-qat", "4-8-8")
LORA, MERGED = (arm("qlora", "4-16-16", format=NF4, merge=how) for how in ("adapter", "requantized"))


def numbers(arms: list[Arm], folder: Path, keep: bool = False) -> list[dict[str, Any]]:
    """The records of the arms, run in the folder, without what differs between two runs that are alike."""
    found = []
    for record in schedule.run(arms, folder, keep):
        fields = json.loads(record.to_json())
        del fields["cost"], fields["provenance"]["finished"], fields["sha256"]
        found.append(fields)
    return found


def in_child(work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` gives in a process of its own: {"result"}, {"error"} or {"died"}, with what it "told"."""
    with tempfile.TemporaryDirectory() as place:
        result, told = Path(place, "result"), Path(place, "told")
        child = os.fork()
        if child == 0:
            try:
                stream = os.open(told, os.O_CREAT | os.O_WRONLY)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                found = {"result": work()}
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(BaseException):
                result.write_text(json.dumps(found))
            os._exit(0)
        end = time.monotonic() + SECONDS
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"error": f"no end in {SECONDS} s"}
            time.sleep(0.01)
        found = json.loads(result.read_text()) if result.exists() else {"died": True}
        return found | {"told": [line for line in told.read_text().splitlines() if "study: " in line]}


class Crash:
    """Counts the operations that change files under a folder, and ends the process before the one of number `at`.

    torn: the file that was opened last is cut in half first, as if what was written to it had not all arrived.
    Operations are seen through Python's audit events; of those that pass Python by, fsync and the writers of
    safetensors and torch are counted by name.
    """

    def __init__(self, folder: Path, at: int | None, torn: bool):
        self.folder, self.at, self.torn = str(folder.resolve()) + "/", at, torn
        self.seen: list[str] = []
        self.opened: Path | None = None
        sys.addaudithook(self.hear)
        self.watch(os, "fsync")
        self.watch(torch, "save")
        self.watch(safetensors.torch, "serialize_file")

    def watch(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def watched(*args, **kwargs):
            place = args[0] if name == "fsync" else next(arg for arg in args if isinstance(arg, str | Path))
            self.count(name, place)
            result = original(*args, **kwargs)
            if name != "fsync":
                self.opened = Path(place)
                self.count(f"after {name}", place)
            return result

        setattr(module, name, watched)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            place, _, flags = args
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if not isinstance(place, int) and flags & writes:
                self.count(event, place, opens=True)
        elif event in ("os.rename", "os.link"):
            self.count(event, args[1], args[3])
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"):
            self.count(event, args[0], args[-1] if event in ("os.remove", "os.mkdir", "os.rmdir") else -1)

    def count(self, what: str, place: Any, where: int = -1, opens: bool = False) -> None:
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        elif where >= 0:
            place = os.path.join(os.readlink(f"/proc/self/fd/{where}"), os.fsdecode(place))
        path = os.path.abspath(os.fsdecode(place))
        if not path.startswith(self.folder) or path.startswith(self.folder + "locks/"):
            return
        self.seen.append(f"{what} {path.removeprefix(self.folder)}")
        if len(self.seen) == self.at:
            if self.torn and self.opened is not None and self.opened.is_file():
                os.truncate(self.opened, self.opened.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if opens:
            self.opened = Path(path)


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith((".partial", ".tmp"))]


def verdict(again: dict[str, Any], expected: Any, folder: Path) -> str:
    """One word for what came of a fault, or what went wrong."""
    if "error" in again or "died" in again:
        return again.get("error", "died")
    if again["result"] != expected:
        return "another result"
    left = leftovers(folder)
    return f"left {', '.join(left)}" if left else "same"


def some(points: list, sample: int | None, seed: int) -> list:
    """All points, or so many of them drawn by the seed, in their order."""
    if sample is None or sample >= len(points):
        return points
    drawn = random.Random(seed).sample(range(len(points)), sample)
    return [points[i] for i in sorted(drawn)]


def note(found: dict[str, Any], what: str, **where: Any) -> None:
    found["tried"] += 1
    found["same"] += what == "same"
    if what != "same":
        found["otherwise"].append(where | {"what": what})


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['tried']} tried, {found['same']} as undisturbed", flush=True)
    for odd in found["otherwise"]:
        print(f"    {odd}", flush=True)


KINDS = {  # name: (arms that are there before, arms, whether checkpoints are kept)
    "QAT": ([], [QAT], False),
    "LoRA": ([], [LORA, MERGED], False),
    "extension": ([QAT], [LONGER], True),
}


def crashes(place: Path, sample: int | None, seed: int) -> dict[str, Any]:
    """A crash before each operation that changes a file of the results folder, and one with the last file cut."""
    found: dict[str, Any] = {"operations": {}, "tried": 0, "same": 0, "otherwise": []}
    for name, (before, arms, keep) in KINDS.items():
        begun, folder = place / f"{name} begun", place / name
        begun.mkdir()
        in_child(lambda: numbers(before, begun, keep))  # noqa: B023

        def run(at: int | None, torn: bool = False) -> list[str]:
            crash = Crash(folder, at, torn)  # noqa: B023
            numbers(arms, folder, keep)  # noqa: B023
            return crash.seen

        shutil.copytree(begun, folder)
        operations = in_child(lambda: run(None))["result"]
        expected = in_child(lambda: numbers(arms, folder, keep))["result"]  # noqa: B023
        points = [(at, torn) for at in range(1, len(operations) + 1) for torn in (False, True)]
        for at, torn in some(points, sample, seed):
            shutil.rmtree(folder)
            shutil.copytree(begun, folder)
            first = in_child(lambda: run(at, torn))  # noqa: B023
            if "died" not in first:
                what = f"no crash: {first}"
            else:
                what = verdict(in_child(lambda: numbers(arms, folder, keep)), expected, folder)  # noqa: B023
            note(found, what, kind=name, operation=operations[at - 1], torn=torn)
        found["operations"][name] = len(operations)
        show(f"crashes, {name} and before, {len(operations)} operations", found)
    return found


def flip(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def put_sibling(path: Path, drawn: random.Random) -> None:
    """Another file's content of its kind, where there is one, else that of any file."""
    seal = path.name.endswith(SEAL)
    others = [other for other in sorted(path.parents[1].rglob("*")) if other.is_file() and other != path]
    alike = [other for other in others if other.suffix == path.suffix and other.name.endswith(SEAL) == seal]
    path.write_bytes(drawn.choice(alike or others).read_bytes())


def put_folder(path: Path, drawn: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


DAMAGES: dict[str, Callable[[Path, random.Random], Any]] = {
    "truncated": lambda path, drawn: path.write_bytes(path.read_bytes()[: drawn.randrange(path.stat().st_size)]),
    "emptied": lambda path, drawn: path.write_bytes(b""),
    "a bit flipped": flip,
    "zeros": lambda path, drawn: path.write_bytes(bytes(path.stat().st_size)),
    "replaced": put_sibling,
    "a folder": put_folder,
    "deleted": lambda path, drawn: path.unlink(),
}


def model_digest(arm: Arm, folder: Path) -> str:
    """Of the numbers of the arm's model as it is kept: made again first, where it is not."""
    store = Store(folder)
    deployed(arm, store)
    model, _ = deployed(arm, store)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()


def damages(place: Path, sample: int | None, seed: int) -> dict[str, Any]:
    """Each kept file damaged in each way, before what reads it is run."""
    whole, folder = place / "whole", place / "damaged"
    in_child(lambda: numbers([QAT], whole, True) and numbers([LORA], whole))
    kept_models = {arm_key(own): own for own in (QAT, LORA)}

    def read_back(path: Path) -> Callable[[], Any]:
        part = path.relative_to(whole).parts[0]
        if part == "models":
            return lambda: model_digest(kept_models[path.name.partition(".")[0]], folder)
        wanted = {"data": [SAME_TEXT], "adapters": [MERGED], "checkpoints": [LONGER]}[part]
        return lambda: numbers(wanted, folder, True)

    files = [
        path for part in ("data", "adapters", "checkpoints", "models") for path in sorted((whole / part).rglob("*"))
    ]
    points = [(path, name) for path in files if path.is_file() for name in DAMAGES]
    expected: dict[str, Any] = {}
    found: dict[str, Any] = {"files": len({path for path, _ in points}), "tried": 0, "same": 0, "otherwise": []}
    for path, name in some(points, sample, seed):
        own = path.relative_to(whole)
        kind = own.name if own.parts[0] == "models" else own.parts[0]
        for damaged in (False, True) if kind not in expected else (True,):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder, copy_function=shutil.copyfile)
            if damaged:
                DAMAGES[name](folder / own, random.Random(f"{seed} {own} {name}"))
            again = in_child(read_back(path))
            if not damaged:
                expected[kind] = again["result"]
        what = verdict(again, expected[kind], folder)
        unneeded = own.name == "provenance.json" or (own.parts[0] == "checkpoints" and own.parts[1] != arm_key(QAT))
        if what == "same" and not again["told"] and not unneeded:
            what = "not a word"
        note(found, what, file=str(own), damage=name, told=again.get("told"))
    show(f"damages of {found['files']} files", found)
    return found


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def heed() -> None:
    """Ctrl-C, also where this benchmark was itself started in the background, as which it is deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


KILLS = 12
GONE = 30  # seconds in which workers and kernels must be gone, and what loaded libraries for them
STUDY = ("-m", "studylib", "run", "--profile", "smoke", "--notebooks", "04", "--model", "tiny-random", "--jobs", "2")
SETS = ("--set", "settings=[4-8-4]", "methods=[rtn, gptq]", "searched=[]", "smoothed=[4-8-4]")


def kills(place: Path, sample: int | None, seed: int) -> dict[str, Any]:
    """`study run` with two jobs killed at random moments, again and again, and then left to its end.

    KILL, TERM, INT: to the command, INT to its whole group; tree: to all its processes; child: to the first of them.
    """
    drawn = random.Random(seed)
    killed, whole = place / "killed", place / "undisturbed"
    found: dict[str, Any] = {"tried": 0, "same": 0, "otherwise": [], "by kind": collections.Counter()}

    def start(folder: Path, log: Path) -> subprocess.Popen:
        command = [sys.executable, "-u", *STUDY, "--results", str(folder), *SETS]
        with log.open("w") as out:
            return subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed
            )

    begun = time.monotonic()
    complete = start(whole, place / "whole.log").wait()
    seconds = time.monotonic() - begun
    for _ in range(sample or KILLS):
        how = drawn.choice(("KILL", "TERM", "INT", "tree", "child"))
        log = place / "killed.log"
        for path in sorted((killed / "records").glob("*.json"))[:: drawn.randint(2, 9)]:  # some work is left to do
            path.unlink()
        process, begun = start(killed, log), time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(drawn.uniform(0.1, 1) * seconds)
            seconds = min(seconds, time.monotonic() - begun)
        ended = process.poll() is not None or "\nReport: " in log.read_text(errors="replace")  # the last line there is
        family = processes_of(process)
        if how == "INT":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        for victim in {"tree": family, "child": family[1:2], "INT": []}.get(how, family[:1]):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGTERM if how == "TERM" else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60 if how != "child" else None)
        _, alive = psutil.wait_procs(family[1:], GONE)
        status, text = process.poll(), log.read_text(errors="replace")
        wrong = []
        if alive:
            wrong.append(f"alive after {GONE} s: {[' '.join(own.cmdline())[-60:] for own in alive]}")
        if "Traceback" in text and how != "child":
            wrong.append("a traceback")
        expected = {"TERM": 143, "INT": 130}.get(how)
        if not ended and expected and status != expected:
            wrong.append(f"status {status}")
        for own in (process, *alive):
            own.kill()
        found["by kind"][f"{how}, {'too late' if ended else 'in time'}"] += 1
        note(found, "; ".join(wrong) or "same", kind=how, end_of_output=text[-500:])
    last = start(killed, place / "last.log").wait()

    def records(folder: Path) -> dict[str, Any]:
        listed = {path.name: json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}
        for fields in listed.values():
            del fields["cost"], fields["provenance"], fields["sha256"]
        return listed

    if (complete, last) != (0, 0) or leftovers(killed):
        found["otherwise"].append({"what": f"left {leftovers(killed)}", "status": (complete, last)})
    again, undisturbed = records(killed), records(whole)
    if different := [name for name in again.keys() | undisturbed if again.get(name) != undisturbed.get(name)]:
        found["otherwise"].append({"what": "other records afterwards", "files": sorted(different)})
    show("kills", found)
    return found


def main() -> int:
    kinds = {"crashes": crashes, "damages": damages, "kills": kills}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds)}")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = -1
    with tempfile.TemporaryDirectory() as place:
        numbers([QAT, LORA], Path(place))  # what is loaded once is then there for all children
    gc.collect()
    gc.freeze()  # else each child walks through all libraries again and again
    result: dict[str, Any] = {"what": __doc__, "seed": options.seed}
    for name in options.kinds or kinds:
        with tempfile.TemporaryDirectory() as place:
            result[name] = kinds[name](Path(place), options.sample, options.seed)
    result["environment"] = environment()
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(result[name]["otherwise"] for name in options.kinds or kinds))


if __name__ == "__main__":
    sys.exit(main())
