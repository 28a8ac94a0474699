"""When a quick study from an empty results folder tells its verdicts: minutes from the command to each claim's word.

Weights, corpora and compiled code are in the cache, as on a second model. Claims are told in the order in which they
are answered; the page is written after them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from studylib.evidence import VERDICTS
from studylib.study import record_files
from studylib.study.machine import environment

LINE = re.compile(rf"^(\w\d+) · (.*?): ({'|'.join(VERDICTS)})\. ")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "studylib", "run", "--anew", "--results", folder]
        command += ["--minutes", str(args.minutes), "--jobs", str(args.jobs)]
        begun, told, first = time.monotonic(), {}, None
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1)
        for line in process.stderr:  # a bar redraws itself behind a carriage return, which counts as the end of a line
            minutes = (time.monotonic() - begun) / 60
            first = minutes if first is None else first
            if found := LINE.match(line.strip()):
                told[found[1]] = {"minutes": round(minutes, 2), "verdict": found[3]}
                print(f"{minutes:6.2f} min  {found[1]}: {found[3]}", flush=True)
        status = process.wait()
        took = (time.monotonic() - begun) / 60
        assert list(Path(folder).glob("*/report.html"))
        records = len(list(record_files(Path(folder) / "records")))
    result = {"what": __doc__, "minutes asked for": args.minutes, "jobs": args.jobs, "status": status}
    result |= {"first line, minutes": round(first, 3), "page, minutes": round(took, 2), "records": records}
    result |= {"told": told, "environment": environment()}
    print(f"{len(told)} claims, {records} records, page after {took:.1f} minutes")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
