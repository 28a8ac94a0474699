"""CPU seconds that commands need which compute nothing, on the committed records, beside importing what computes."""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from studylib.study.machine import environment

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
ROUNDS = 5
RECORDS_OF_A_NOTEBOOK = """
import tempfile
import studylib
with tempfile.TemporaryDirectory() as results:
    studylib.run([record.arm for record in studylib.read_records("results/reference/records")], results)
"""


def cpu_seconds(*command: str) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    with tempfile.TemporaryDirectory() as folder:  # the page is written anew there
        measure(shutil.copytree(REFERENCE, Path(folder) / REFERENCE.name))


def measure(reference: Path):
    where = ("--results", str(reference))
    first = min((reference / "records").glob("*.json")).stem.rpartition("_")[2]
    commands = {
        "import torch and transformers": ("-c", "import torch, transformers.modeling_utils"),
        "study list": ("-m", "studylib", "list", *where),
        "study show": ("-m", "studylib", "show", first, *where),
        "records, as a notebook takes them": ("-c", RECORDS_OF_A_NOTEBOOK),
        "study report": ("-m", "studylib", "report", "--output", str(reference / "quick-smollm2-135m")),
    }
    seconds = {name: [] for name in commands}
    for _ in range(ROUNDS):  # in turns: what else the machine does then slows all alike
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(*command))
    result = {"what": __doc__, "seconds": {name: round(statistics.median(s), 2) for name, s in seconds.items()}}
    for name, value in result["seconds"].items():
        print(f"{name:34} {value:6.2f} s of CPU", flush=True)
    result["environment"] = environment()
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
