"""What workers of dask cost: two of them beside the process pool that they replaced, ten thousand arms whose records
are there, and workers killed at random moments.

The pool is that of commit 22c5a89, checked out with `git worktree add FOLDER 22c5a89` and named by --old. Both compute
the same arms in turn, twice, in the order old, new, new, old. Throughput is counted in two ways: arms a minute from the
call to its end, which has the imports of the workers in it, and from the first record to the last. The pool's first
record comes from the process that has its imports already, so that its second count has those of the other one in it.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("throughput", "cached", "kills")
JOBS, ARMS, STEPS = 2, 6, 100
CACHED = 10_000
KILLED_ARMS, KILLED_STEPS = 6, 40


def some(count, steps):
    """So many arms of the smallest model, alike but for their seed."""
    from studylib.config import Evaluation, profile
    from studylib.methods import build_arm

    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
    training = {"steps": steps}
    return [build_arm(budget, "tiny-random", "llm-qat", "4-8-4", seed, training=training) for seed in range(count)]


def compute(folder):
    """In a process of its own: compute all arms with two jobs, and print what that took."""
    from studylib.study import record_files, schedule

    arms = some(ARMS, STEPS)
    schedule.missing_arms(arms, schedule.Store(folder))  # their check is no part of what is compared
    begun = time.time()
    schedule.compute_arms(arms, folder, jobs=JOBS)
    took = time.time() - begun
    ends = sorted(path.stat().st_mtime for path in record_files(folder / "records"))
    print(json.dumps({"seconds": took, "arms": len(ends), "between": ends[-1] - ends[0]}))


def throughput(old):
    found = {"old": [], "new": []}
    for name, source in (("old", old), ("new", ROOT), ("new", ROOT), ("old", old)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--compute", folder]
            environment = os.environ | {"PYTHONPATH": str(source)}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found[name].append(json.loads(done.stdout.splitlines()[-1]) | {"load": os.getloadavg()[0]})
        print(name, found[name][-1], flush=True)

    def rate(name, what, less):
        return sum(own["arms"] - less for own in found[name]) / sum(own[what] for own in found[name])

    found["of the old pool's throughput"] = {
        "from the call to its end": round(rate("new", "seconds", 0) / rate("old", "seconds", 0), 3),
        "from the first record to the last": round(rate("new", "between", 1) / rate("old", "between", 1), 3),
    }
    return found


def cached():
    """In this process: arms whose records are there, all of which are asked for with two jobs."""
    from studylib.study import Store, arm_key, read_record, record_files, schedule

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        store, (first,) = Store(folder), some(1, 4)
        (made,) = schedule.run([first], folder, compute="all")
        arms = [dataclasses.replace(first, data=dataclasses.replace(first.data, seed=seed)) for seed in range(CACHED)]
        for arm in arms:
            (
                store.folder / "records" / (made := dataclasses.replace(made, arm=arm, key=arm_key(arm))).file_name
            ).write_text(made.to_json())
        size = sum(path.stat().st_size for path in record_files(store.folder / "records")) / CACHED
        ready = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun, processor = time.perf_counter(), time.process_time()
        schedule.compute_arms(arms, folder, jobs=JOBS)  # as if they had been missing when the run began
        given = time.perf_counter() - begun
        begun = time.perf_counter()
        found = schedule.run(arms, folder, jobs=JOBS, compute="all")
        looked = time.perf_counter() - begun
        assert len(found) == CACHED and read_record(store.find(arm_key(arms[-1]))).arm == arms[-1]
    return {
        "arms": CACHED,
        "bytes of a record": round(size),
        "seconds of computing them": round(given, 1),
        "seconds of asking for their records": round(looked, 1),
        "seconds of processor": round(time.process_time() - processor, 1),
        "peak MB of all": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak MB before": round(ready / 1024),
        "MB of imports": round(before / 1024),
    }


def kills(count, seed=0):
    """One worker killed at a random moment of each run, again and again."""
    import psutil

    from studylib.study import record_files, schedule

    drawn, found = (
        random.Random(seed),
        {"kills": 0, "runs": 0, "other records": 0, "twice": 0, "in the midst of an arm": 0},
    )
    arms = some(KILLED_ARMS, KILLED_STEPS)

    def numbers(records):
        return [dataclasses.replace(record, cost={}, provenance={}) for record in records]

    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        undisturbed = numbers(schedule.run(arms, folder, jobs=JOBS, compute="all"))
        lasts = time.monotonic() - begun
    while found["kills"] < count:
        with tempfile.TemporaryDirectory() as folder:
            over, moment = threading.Event(), drawn.uniform(0, lasts)

            def kill(folder=Path(folder), over=over, moment=moment):
                if over.wait(moment):
                    return
                workers = [own for child in psutil.Process().children() for own in child.children()]
                if workers:
                    drawn.choice(workers).kill()
                    found["kills"] += 1
                    found["in the midst of an arm"] += any((folder / "checkpoints").iterdir())

            killer = threading.Thread(target=kill)
            killer.start()
            begun = time.monotonic()
            records = numbers(schedule.run(arms, folder, jobs=JOBS, compute="all"))
            over.set()
            killer.join()
            lasts = min(lasts, time.monotonic() - begun)
            found["runs"] += 1
            found["other records"] += records != undisturbed
            found["twice"] += len(list(record_files(Path(folder) / "records"))) != len(arms)
        print(found, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--old", type=Path, help="a checkout of commit 22c5a89, for throughput")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--compute", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        compute(options.compute)
        return
    from studylib.study import environment

    output = Path(__file__).with_suffix(".json")
    result = json.loads(output.read_text()) if output.exists() else {}
    result["what"] = __doc__
    for part in options.parts or [part for part in PARTS if part != "throughput" or options.old]:
        parts = {"throughput": lambda: throughput(options.old), "cached": cached, "kills": lambda: kills(options.kills)}
        result[part] = parts[part]() | {"load of other work": round(os.getloadavg()[0], 1)}
        print(part, json.dumps(result[part], indent=1), flush=True)
        result[part]["environment"] = environment()  # parts may be of several machines
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
