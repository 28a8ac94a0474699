"""What a page costs as records grow: seconds of `study report` and of `study run --notebooks 00` at one and ten times
the reference records, by this build and by an earlier one, which take turns.

Further records are those of the reference with scores moved at random: half of them of further settings (a group
of weights or a scale of the adapter that nobody ran), half of further seeds where the arm has one. Each is keyed as its
arm is. Ratios are medians over the turns.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from studylib.study import arm_key, read_records
from studylib.study.machine import environment

ROOT = Path(__file__).parents[1]
RUN = "quick-smollm2-135m"
TIMES = 10
FIRST_GROUP = 100  # weights that share a scale, of settings that nobody ran
NOISE = 0.02  # nats, or whatever unit a score has, by which those of a further record differ


def further(arm, number):
    """The arm with another seed, or at another setting; itself where it has neither."""
    seed, at = number % 2, number // 2
    changes = {}
    if not any((arm.data, arm.instructions)):
        seed, at = 0, number
    if seed:
        parts = {name: getattr(arm, name) for name in ("data", "instructions") if getattr(arm, name)}
        changes |= {name: replace(part, seed=part.seed + 10) for name, part in parts.items()}
    if at and arm.adapter:
        changes["adapter"] = replace(arm.adapter, alpha=arm.adapter.alpha * (1 + at / 100))
    elif at and arm.format:
        changes["format"] = replace(arm.format, group=(arm.format.group or 0) + FIRST_GROUP + at)
    elif at and arm.bits != "16-16-16":
        changes["scheme"] = replace(arm.scheme, group=(arm.scheme.group or 0) + FIRST_GROUP + at)
    return replace(arm, **changes)


def grown(records, times):
    """So many times the records, by key of the first the further ones; where an arm has no more settings, fewer."""
    random, found = np.random.default_rng(0), {}
    for record in records:
        own = {}
        for number in range(times):
            arm = further(record.arm, number)
            if arm in own:
                continue
            scores = record.scores
            if number:
                scores = {
                    name: [value if isinstance(value, int) else value + NOISE * random.normal() for value in values]
                    if name.startswith("loss/")
                    else values
                    for name, values in scores.items()
                }
            own[arm] = replace(record, arm=arm, key=record.key if not number else arm_key(arm), scores=scores)
        found[record.key] = list(own.values())
    return found


def lay(folder, source, records, times):
    """A results folder with a run whose notebooks show all these records, their figures those of the `source`."""
    shutil.copytree(source / "results" / "reference" / RUN, folder / RUN)
    (folder / "records").mkdir()
    made = grown(records, times)
    for record in (record for own in made.values() for record in own):
        (folder / "records" / record.file_name).write_text(record.to_json())
    for path in folder.glob(f"{RUN}/*/published.json"):
        published = json.loads(path.read_text())
        published["records"] = [own.key for key in published["records"] for own in made[key]]
        path.write_text(json.dumps(published))
    return sum(map(len, made.values()))


def took(source, arguments):
    """CPU and wall seconds of the command by the code in `source`."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "studylib", *arguments]
    variables = os.environ | {"PYTHONPATH": str(source)}
    subprocess.run(command, check=True, env=variables, cwd=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return {"cpu": cpu, "wall": time.monotonic() - begun}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="77f7730", help="commit of the earlier build")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=("report", "run"), default=("report", "run"))
    args = parser.parse_args()
    records = list(read_records(ROOT / "results" / "reference" / "records"))
    with tempfile.TemporaryDirectory() as temporary:
        earlier = Path(temporary, "earlier")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", earlier, args.before], check=True)
        try:
            found = measured({"before": earlier, "now": ROOT}, Path(temporary), records, args)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", earlier], check=True)
    result = {"what": __doc__, "before": args.before, "repeats": args.repeats} | found | {"environment": environment()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def measured(builds, temporary, records, args):
    """How many records, sizes of pages, medians of seconds, and the ratios to the earlier build at one times."""
    counts, commands, seconds, sizes = {}, {}, {}, {}
    for build, source in builds.items():
        for times in (1, TIMES):
            counts[times] = lay(folder := temporary / f"{build} {times}", source, records, times)
            commands["report", build, times] = ["report", "--output", str(folder / RUN)]
            commands["run", build, times] = ["run", "--notebooks", "00", "--results", str(folder)]
    for _ in range(args.repeats):
        for (command, build, times), arguments in commands.items():
            if command not in args.commands:
                continue
            case = f"{command}, {times} times, {build}"
            seconds.setdefault(case, []).append(took(builds[build], arguments))
            page = temporary / f"{build} {times}" / RUN / "report.html"
            sizes[case] = round(page.stat().st_size / 1e6, 2)
            print(case, seconds[case][-1], flush=True)
    medians = {
        case: {kind: round(statistics.median(run[kind] for run in runs), 2) for kind in ("cpu", "wall")}
        for case, runs in seconds.items()
    }
    ratios = {}
    for case in medians:
        once = f"{case.partition(',')[0]}, 1 times, before"
        runs = seconds[case], seconds[once]
        ratios[case] = {
            kind: round(statistics.median(a[kind] / b[kind] for a, b in zip(*runs, strict=True)), 2)
            for kind in ("cpu", "wall")
        }
    return {"records": counts, "MB": sizes, "seconds": medians, "times the earlier build at 1 times": ratios}


if __name__ == "__main__":
    main()
