"""CPU seconds that commands need which compute nothing, on the committed records, beside importing what computes."""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from studylib.study.machine import environment

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
ROUNDS = 5
FIRST_PICTURE = """
import sys
from PIL import Image
Image.open = lambda *args: sys.exit()
from studylib.cli import main
main()
"""


def cpu_seconds(*command: str) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    where = ("--results", str(REFERENCE))
    first = min((REFERENCE / "records").glob("*.json")).stem.rpartition("_")[2]
    report = ("report", "--output", str(REFERENCE / "quick-smollm2-135m"))
    commands = {
        "import torch and transformers": ("-c", "import torch, transformers.modeling_utils"),
        "study list": ("-m", "studylib", "list", *where),
        "study show": ("-m", "studylib", "show", first, *where),
        "study report, to its first picture": ("-c", FIRST_PICTURE, *report),  # the claims are judged before
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
