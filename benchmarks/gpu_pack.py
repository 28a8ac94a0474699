"""The packages that benchmarks/gpu_pack.sh takes along: what studylib needs, but for what the GPU machine has.

Printed as pip takes them, in the versions that are installed here, which are those of constraints.txt.
"""

import argparse
import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# An image made for models has these, and what they need themselves. torch is that of its driver.
IMAGE = ("torch", "triton", "transformers", "accelerate", "peft", "pandas", "numpy", "lazy-loader")

TESTS = ("pytest",)  # of tests/test_devices.py


def needed(root: str, python: str, there: set[str]) -> set[str]:
    """The names of all packages that `root` needs on a Python of this version, without those that are there and what
    only these need."""
    found, waiting = {*TESTS}, [root, *TESTS]
    while waiting:
        for line in metadata.requires(waiting.pop()) or ():
            wanted = Requirement(line)
            name = canonicalize_name(wanted.name)
            for_it = wanted.marker is None or wanted.marker.evaluate({"extra": "", "python_version": python})
            if for_it and name not in there | found:
                found.add(name)
                waiting.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the GPU machine (default: 3.12)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="what it has, as `pip list` shows it")
    options = parser.parse_args()
    named = re.findall(r"^[\w.-]+", options.image.read_text(), re.M) if options.image else IMAGE
    for name in sorted(needed("studylib", options.python, set(map(canonicalize_name, named)))):
        print(f"{name}=={metadata.version(name)}")


if __name__ == "__main__":
    main()
