"""Write golden values anew, after a version in config/numerics.py was raised.

Usage: python tests/golden/write.py COMPONENT ...
Without a component, those whose version was raised or that have none yet.
"""

import sys

from golden_values import read, write

from studylib.config.numerics import NUMERICS


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NUMERICS]
    if unknown:
        raise SystemExit(f"component: {unknown[0]!r} is not known; use some of {', '.join(NUMERICS)}")
    kept = read()
    raised = [name for name in NUMERICS if kept.get(name, {}).get("version") != NUMERICS[name].number]
    chosen = names or raised
    write(chosen)
    print(f"written: {', '.join(chosen) or 'nothing, all are as their versions'}")


if __name__ == "__main__":
    main(sys.argv[1:])
