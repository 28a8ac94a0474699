"""The CUDA path on one GPU: checked against the committed records, measured, and used for what only it computes.

benchmarks/gpu.sh prepares it. Each step is a process of its own, which is ended when its time is over; what it has
found until then stays, as do all records. In the output folder: summary.json, summary.txt and records.tar.gz.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import studylib
from studylib.config import NOTHING, Adapter, Arm, Format, Profile, write_whole
from studylib.config.budgets import EXECUTIONS, OWN
from studylib.data import corpora, models
from studylib.evaluate.decoding import decoding_seconds
from studylib.evidence import claims_first
from studylib.evidence.qlora import WIDE
from studylib.methods import METHODS, Setting, build_arm, title
from studylib.report import CLAIMS
from studylib.study import ALL, REFERENCE, Pace, Record, Store, arm_key, environment, notebooks, read_records, schedule
from studylib.study.verify import choose, compare
from studylib.train.finetuning import check_paging

MINUTES, RESERVE = 9, 15  # in all, and the seconds of it that are left for packing what was found
ROOT = Path(__file__).resolve().parents[1]
LATE = "its time was over"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything. profile: of the headline, with that of `generated` data; reference: whose records are
    checked, those of `minutes` on its processors; jobs: arms at a time, where none is timed; steps: of what is
    measured; tuned: of the trainings that B8 and C4 compare, with seeds; items: of each task that is scored."""

    model: str
    profile: str
    generated: str
    reference: Path
    minutes: float
    jobs: int
    steps: int
    tuned: int
    seeds: tuple[int, ...]
    items: dict[str, int]


GPU = Size("smollm2-135m", "full", "quick", REFERENCE, 30, 4, 32, 48, (0, 1), {"piqa": 40, "arc_easy": 40, "mmlu": 6})
SMALL = Size("tiny-random", "smoke", "smoke", ROOT / "tests" / "reference", 0.7, 2, 5, 2, (0,), {"piqa": 2, "mmlu": 1})

Told = Callable[[dict[str, Any]], None]  # keeps what a step has found so far; "lines" are for people


def _carried_out(work: tuple[Arm, Path, float]) -> tuple[Arm, str]:
    """In a worker: the arm, and why it has no record; "" where it has one."""
    arm, results, until = work
    if time.time() > until:
        return arm, LATE
    try:
        schedule.run([arm], results, compute=ALL)
    except Exception as error:  # of one arm, on a device that nobody has tried it on: the others go on
        traceback.print_exc()
        return arm, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return arm, ""


def computed(
    arms: Sequence[Arm], results: Path, until: float, jobs: int, before: Sequence[Arm] = ()
) -> Iterator[tuple[Record | None, str]]:
    """The record of each arm as it is ready, or why there is none; nothing of those that are not done `until` then.

    before: arms that each process warms up with, where there is one.
    """
    store = Store(results)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # which it ends, whatever they do
        pool.map(_carried_out, [(arm, results / "warm", until) for arm in before])
        done = pool.imap_unordered(_carried_out, [(arm, results, until) for arm in arms])
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in arms:
                arm, why = done.next(max(0.0, until - time.time()))
                if why != LATE:
                    yield store.load(arm_key(arm)), f"{title(arm)}: {why}"


def tests(size: Size, results: Path, until: float, tell: Told) -> None:
    """tests/test_devices.py: each part by itself, beside values of other means."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", str(ROOT / "tests" / "test_devices.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    tell(
        {
            "lines": [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            + [done.stdout.splitlines()[-1]]
        }
    )
    done.check_returncode()


def check(size: Size, results: Path, until: float, tell: Told) -> None:
    """Arms of the reference, computed here, beside what it has: within the noise of its items and seeds."""
    known = [record for record in read_records(size.reference / "records") if not record.arm.timed]
    chosen = {record.key: record for record in choose(known, [], size.minutes)}
    pairs, failed = [], []
    for record, why in computed([record.arm for record in chosen.values()], results, until, size.jobs):
        pairs += [(chosen[record.key], record)] if record else []
        failed += [] if record else [why]
        numbers = compare(pairs, known) if pairs else []
        wrong = [number.text() for number in numbers if not number.passed]
        lines = [f"{len(pairs)} of {len(chosen)} arms: {len(numbers) - len(wrong)} of {len(numbers)} numbers pass"]
        tell({"lines": lines + wrong + failed, "numbers": [number.text() for number in numbers]})


def claims(size: Size, results: Path, until: float, tell: Told) -> None:
    """What B8 and C4 compare, trained one after the other, each once for a few steps before."""
    budget = studylib.profile(size.profile)
    few = dataclasses.replace(budget.evaluation.of_pairs, pairs=2)
    budget = dataclasses.replace(budget, evaluation=few, tuning=dataclasses.replace(budget.tuning, steps=size.tuned))
    first = dataclasses.replace(budget, tuning=dataclasses.replace(budget.tuning, steps=2))
    records: list[Record] = []
    failed: list[str] = []
    arms = [arm for seed in size.seeds for arm in timed_arms(budget, size.model, seed)]
    for record, why in computed(arms, results, until, 1, timed_arms(first, size.model, 0)):
        records += [record] if record else []
        failed += [] if record else [why]
        seconds = {f"{title(r.arm)}, seed {r.arm.seed}": r.cost["seconds"]["train"] for r in records}
        lines = [f"{finding.claim} {finding.word}: {finding.text}" for finding in judged(("B8", "C4"), records)]
        tell({"lines": lines + failed, "seconds": seconds})


def timed_arms(budget: Profile, model: str, seed: int) -> list[Arm]:
    """What B8 and C4 read, of one seed."""
    usual, uniform = METHODS["qlora"].usual_format(4, budget.group), Format("int-full", 4, budget.group)
    wide = Adapter(WIDE["adapter.rank"], WIDE["adapter.rank"])
    asked: list[tuple[str, Format, dict[str, Any]]] = [
        ("qlora", usual, {"adapter": wide}),
        ("qlora", usual, {"adapter": wide, "tuning": {"paged": True}}),
        ("qlora", uniform, {}),
        ("l4q", uniform, {}),
    ]
    return [build_arm(budget, model, name, "4-16-16", seed, format=own, **changed) for name, own, changed in asked]


def judged(names: Sequence[str], records: Sequence[Record]) -> list[Any]:
    """The main finding of each of these claims whose arms all have records."""
    there = {Setting.of(record.arm) for record in records}
    ready = [claim for claim in map(CLAIMS.get, names) if claim.needs and there.issuperset(claim.needs)]
    return [studylib.judge(claim, records)[0] for claim in ready]


def headline(size: Size, results: Path, until: float, tell: Told) -> None:
    """Arms of all notebooks, what decides claims first; none whose seconds on processors are its result."""
    budget = studylib.profile(size.profile)
    given = {"model": size.model, "profile": size.profile, "results": str(results), "seeds": list(budget.seeds)}
    asked: list[Arm] = []
    for notebook in notebooks.find_notebooks([]):
        own = notebooks.default_parameters(notebook)
        asked += notebooks.wanted_arms(notebook, {name: value for name, value in given.items() if name in own})
    arms, pace = [arm for arm in asked if not arm.timed and arm.evaluation != NOTHING], Pace()
    ordered = claims_first(arms, CLAIMS.values(), lambda arm: sum(pace.of(arm).values()), alone=True)
    records: list[Record] = []
    failed: list[str] = []
    for record, why in computed(ordered, results, until, size.jobs):
        records += [record] if record else []
        failed += [] if record else [why]
        lines = [f"{len(records)} arms of profile {size.profile}, of {len(ordered)} that claims read"]
        told = [f"{finding.claim} {finding.word}: {finding.text}" for finding in judged([*CLAIMS], records)]
        tell({"lines": lines + told + failed, "arms": [title(r.arm) for r in records]})


def training(size: Size, results: Path, until: float, tell: Told) -> None:
    """benchmarks/training_step.py: LLM-QAT beside training on labels, with compiled layers."""
    import training_step

    found = training_step.measured(size.model, size.steps)
    tell({"lines": [f"{name}: {times} times plain" for name, times in found["times_plain"].items()]} | found)


def l4q(size: Size, results: Path, until: float, tell: Told) -> None:
    """benchmarks/l4q_step.py: a step of L4Q beside LoRA's."""
    import l4q_step

    found = l4q_step.measured(size.model, studylib.profile(size.profile).group)
    tell({"lines": [f"L4Q, {mode}: {own['times_lora']} times LoRA's" for mode, own in found.items()]} | found)


def generating(size: Size, results: Path, until: float, tell: Told) -> None:
    """benchmarks/generation.py: this study's generation beside transformers'."""
    import generation

    found = generation.measured(size.model, size.generated)
    told = found["times_generate_at_the_same_batch"].items()
    tell({"lines": [f"batch {batch}: {times} times generate" for batch, times in told]} | found)


def scoring(size: Size, results: Path, until: float, tell: Told) -> None:
    """benchmarks/zero_shot.py: packed rows beside lm-eval's own model."""
    import zero_shot  # lm-eval takes seconds

    found = zero_shot.measured(size.model, size.items)
    every = {name: own["all"] for name, own in found.items()}
    tell({"lines": [f"{name}: {own['times_lm_eval']} times {zero_shot.BASE}" for name, own in every.items()]} | found)


def decoding(size: Size, results: Path, until: float, tell: Told) -> None:
    """4-bit integers at work, by the kernel for processors, on those of this machine."""
    budget = studylib.profile(size.profile)
    settings = dataclasses.replace(budget.decoding, shapes=())
    seconds = decoding_seconds(size.model, Format("affine", 4, budget.group), settings)
    medians = {kind: statistics.median(seconds[f"seconds/{OWN}/{kind}"]) for kind in EXECUTIONS}
    tell({"lines": [f"{kind}: {1000 * own:.2f} ms a token" for kind, own in medians.items()], "seconds": medians})


def paging(size: Size, results: Path, until: float, tell: Told) -> None:
    """AdamW of bitsandbytes with its states paged to the CPU, beside PyTorch's: seconds of a step of all parameters."""
    check_paging()
    import l4q_step
    from bitsandbytes.optim import PagedAdamW32bit

    tokens = corpora.windows("c4", models.load_tokenizer(size.model), 256, 4, "training")
    made = {
        "fused AdamW": lambda own: torch.optim.AdamW(own, lr=1e-5, weight_decay=0.0, fused=True),
        "paged AdamW": lambda own: PagedAdamW32bit(own, lr=1e-5, weight_decay=0.0),
    }
    seconds, ends = {}, {}
    for name, make in made.items():
        model = models.load_model(size.model).train()
        optimizer = make(list(model.parameters()))
        times = [l4q_step.step(model, tokens.to(model.device), optimizer) for _ in range(size.steps)]
        seconds[name] = statistics.median(times[l4q_step.WARM :])
        ends[name] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    start = torch.cat([parameter.detach().flatten() for parameter in models.load_model(size.model).parameters()])
    usual, paged = (end - start for end in ends.values())
    apart = ((paged - usual).norm() / usual.norm()).item()
    times = seconds["paged AdamW"] / seconds["fused AdamW"]
    lines = [f"a step takes {times:.2f} times as long; the changes of the weights differ by {apart:.2%}"]
    tell({"lines": lines, "seconds": seconds, "apart": apart})


STEPS: dict[str, tuple[Callable[[Size, Path, float, Told], None], float]] = {  # and its share of the time, at most
    "tests": (tests, 0.12),
    "check": (check, 0.25),
    "claims": (claims, 0.25),
    "training": (training, 0.15),
    "l4q": (l4q, 0.12),
    "paging": (paging, 0.08),
    "generation": (generating, 0.1),
    "scoring": (scoring, 0.12),
    "decoding": (decoding, 0.08),
    "headline": (headline, 1.0),
}


def run_step(name: str, options: argparse.Namespace, until: float) -> dict[str, Any]:
    """What a step found until then, how it ended, and after how many seconds."""
    found, begun = options.work / f"{name}.json", time.time()
    command = [sys.executable, __file__, str(options.output), "--work", str(options.work), "--step", name]
    command += ["--until", str(until), *(["--cpu"] if options.cpu else [])]
    process = subprocess.Popen(command, start_new_session=True)  # a group, which ends together
    try:
        process.wait(max(1.0, until + RESERVE / 3 - begun))
        end = "finished" if process.returncode == 0 else f"failed with status {process.returncode}"
    except subprocess.TimeoutExpired:
        end = LATE
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"end": end, "took": round(time.time() - begun, 1)} | (
        json.loads(found.read_text()) if found.exists() else {"lines": []}
    )


def write(output: Path, results: Path, summary: dict[str, Any]) -> None:
    """The summary so far, and all records."""
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"{summary['accelerator']}, torch {summary['environment']['libraries']['torch']}"]
    for name, found in summary["steps"].items():
        lines += [f"{name}: {found['end']} after {found['took']} s", *(f"  {line}" for line in found["lines"])]
    (output / "summary.txt").write_text("\n".join(lines) + "\n")
    with tarfile.open(output / "records.tar.gz", "w:gz") as tar:
        if (results / "records").exists():
            tar.add(results / "records", "records")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", help="a folder for what is found")
    parser.add_argument("--cpu", action="store_true", help="everything in small, on processors, to try it")
    parser.add_argument("--until", type=float, help=f"seconds since 1970 (default: in {MINUTES} minutes)")
    parser.add_argument("--work", type=Path, help="a folder for results (default: one that is removed)")
    parser.add_argument("--step", choices=STEPS, help="this one alone, in this process")
    options = parser.parse_args()
    until, size = options.until or time.time() + 60 * MINUTES, SMALL if options.cpu else GPU
    if options.output is None or not (options.cpu or torch.cuda.is_available()):
        print("No folder is named, or CUDA is not here, so that nothing is measured: see benchmarks/gpu.sh, and --cpu")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # steps end with it
    os.environ |= {"STUDY_DEVICE": "cpu"} if options.cpu else {}
    if options.step:
        work, _ = STEPS[options.step]
        file = options.work / f"{options.step}.json"

        def tell(found: dict[str, Any]) -> None:
            write_whole(file, json.dumps(found))  # this process may be ended at any time

        try:
            work(size, options.work / "results", until, tell)
        except Exception as error:  # the summary has why
            known = json.loads(file.read_text()) if file.exists() else {"lines": []}
            tell(known | {"lines": [*known["lines"], f"{type(error).__name__}: {error}"]})
            raise
        return
    options.output.mkdir(parents=True, exist_ok=True)
    options.work, kept = options.work or Path(tempfile.mkdtemp()), options.work
    here = environment()
    summary = {"accelerator": here["hardware"]["accelerator"] or "processors", "environment": here, "steps": {}}
    begun, total = time.time(), until - RESERVE - time.time()
    try:
        models.load_model(size.model)  # once, before all: it may have to be unpacked
        for name, (_, share) in STEPS.items():
            left = until - RESERVE - time.time()
            summary["steps"][name] = run_step(name, options, time.time() + min(left, share * total))
            write(options.output, options.work / "results", summary | {"seconds": round(time.time() - begun)})
    finally:
        if kept is None:
            shutil.rmtree(options.work, ignore_errors=True)
    print((options.output / "summary.txt").read_text())


if __name__ == "__main__":
    main()
