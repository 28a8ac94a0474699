"""Memory and seconds of exporting a kept model, in a process of its own, beside the size of the model in 16 bits.

The model was trained for a step, which changes nothing of its size. Memory is the most that the process has resident
beyond what its imports take, pages of mapped files included. "exports" has a part for each type that products are
computed in, of the machine that was measured last: what is scored in fp32 takes twice the memory of its weights.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from studylib.config.budgets import Evaluation, Instructions, profile
from studylib.config.settings import Format
from studylib.methods.arms import build_arm
from studylib.methods.base import OPTIONS
from studylib.study.machine import environment

MODEL = "smollm2-135m"
FORMATS = ("gguf", "compressed-tensors", "safetensors")
KILO = 1024  # bytes in which Linux tells of memory


def arm():
    budget = profile("quick")
    budget = dataclasses.replace(
        budget,
        instructions=Instructions(length=64),
        tuning=dataclasses.replace(budget.tuning, steps=1, batch=1),
        evaluation=Evaluation(("wikipedia",), windows=4, length=256),
    )
    return build_arm(budget, MODEL, "l4q", "4-16-16", format=Format("affine", 4, 64))


def most_resident() -> int:
    """Bytes that this process had at most (ru_maxrss would begin with what its parent had)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * KILO


def be_measured(results: str, format: str, scored: bool) -> None:
    """One export, and what it took, as JSON."""
    from studylib.study import schedule  # noqa: F401
    from studylib.study.export import export_model
    from studylib.study.records import Store, arm_key

    store = Store(results)
    record = store.load(arm_key(arm()))
    kind = next(kind for kind, option in OPTIONS.items() if option == format)
    before, begun = most_resident(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        export_model(record, store, Path(folder, "model"), kind, None, scored)
    seconds = round(time.perf_counter() - begun, 1)
    print(json.dumps({"bytes": most_resident() - before, "seconds": seconds}))


def main() -> None:
    from studylib.data.models import parameter_count
    from studylib.study import schedule

    if len(sys.argv) > 1:
        be_measured(sys.argv[1], sys.argv[2], sys.argv[3] == "scored")
        return
    sixteen, found = 2 * parameter_count(MODEL), {}
    with tempfile.TemporaryDirectory() as results:
        schedule.run([arm()], results)
        for format in FORMATS:
            for how in ("unscored", "scored"):
                command = [sys.executable, __file__, results, format, how]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                own = json.loads(done.stdout.splitlines()[-1])
                found[f"{format}, {how}"] = own | {"times_16_bits": round(own["bytes"] / sixteen, 2)}
                print(f"{format:20} {how:9} {own['bytes'] / 1e6:6.0f} MB, {own['bytes'] / sixteen:.2f} times 16 bits, "
                      f"{own['seconds']:5.1f} s", flush=True)  # fmt: skip
    path, own = Path(__file__).with_suffix(".json"), environment()
    exports = json.loads(path.read_text())["exports"] if path.exists() else {}
    exports[own["compute_dtype"]] = found | {"environment": own}
    result = {"what": __doc__, "bytes_in_16_bits": sixteen, "exports": exports}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
