"""Random parameters of all notebooks, given as to papermill's -y: what is accepted, and how the rest is refused."""

import contextlib
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import yaml

from studylib.data import models
from studylib.report.figures import memory
from studylib.study import Store, environment, schedule
from studylib.study import notebooks as batch

CASES, SECONDS = 500, 20
TINY = {"model": "tiny-random", "profile": "smoke"}
TEXTS = (
    r"""true|false|null|yes|'false'|'True'|''|' '|x|"a\0b"|"a\nb"|0|1|2|3|4|7|8|16|17|32|33|64|256|1024|"""
    r"""65536|65537|-1|-32|1.0|2.5|.5|7e-1|1e-9|1e9|.nan|.inf|-.inf|010|0x10|1_000|1:30|2026-01-01|"""
    r"""4294967295|4294967296|99999999999999999999|4-8-4|8-8-8|2-2-2|16-16-16|16-16-4|4-16-16|16-8-16|4-8|"""
    r"""4-8-4-4|04-8-4|1-8-4|4-9-4|'４-８-４'|'٤-8-4'|'4-8-4 '|-4-8-4|4.0-8-4|greedy|sampled|hybrid-3|hybrid-6|"""
    r"""chat|beam|kl|labels|kl+hidden|hidden+kl|kl+kl|kl+|attention|rtn|gptq|awq|smoothquant|llm-qat|"""
    r"""full-precision|lora|qlora|l4q|qat|qa-lora|gptq+lora|RTN|symmetric|lsq|statsq|nf4|all|q_proj|"""
    r"""q_proj+q_proj|q_proj+v_proj|lm_head|up_proj+|dora|pissa|loftq|vera|lsq+|zeros|adapter|requantized|"""
    r"""merged-quantized|glued|wikipedia|c4|pile|/etc/passwd|../own.txt|{}|{a: 1}|!!binary aGk=|quick|Smoke"""
)
VALUES = TEXTS.split("|")
FREE = ("model", "profile", "results", "output")  # one value in twenty is of these


def drawn(chance: random.Random, default: object) -> str:
    """A value as YAML, more often than not of its default's kind."""
    usual = default if isinstance(default, list) else [default]
    alike = [text for text in VALUES if _kind(text) is type(usual[0] if usual else 1)]
    pool = chance.choices(([json.dumps(item) for item in usual] + alike[:4], alike, VALUES), (6, 3, 1))[0]
    if isinstance(default, list) != (chance.random() < 0.05):
        return f"[{', '.join(chance.choice(pool) for _ in range(chance.choice((0, 1, 1, 2, 2, 3))))}]"
    return chance.choice(pool)


def _kind(text: str) -> type:
    with contextlib.suppress(yaml.YAMLError, ValueError):
        return type(yaml.safe_load(text))
    return object


def case(number: int) -> tuple[Path, dict[str, str]]:
    chance = random.Random(number)
    *others, summary = batch.find_notebooks([])
    notebook = chance.choice(others) if chance.random() < 0.97 else summary
    defaults = batch.default_parameters(notebook) | TINY
    names = [name for name in defaults if name not in FREE]
    if not names or chance.random() < 0.05:
        names = list(FREE)
    chosen = chance.sample(names, min(len(names), chance.choice((1, 1, 1, 2, 3))))
    return notebook, {name: drawn(chance, defaults[name]) for name in chosen}


class TooLong(BaseException):
    """More than SECONDS."""


class Planned(BaseException):
    """All is planned that would be measured next."""


def _planned(*args: object, **given: object) -> None:
    raise Planned


def tried(notebook: Path, texts: dict[str, str], results: str) -> tuple[str, str]:
    """What becomes of it, and what is said: its arms are planned and checked, and none is computed."""

    def stop(*args: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS * 6)  # of the clock; a busy machine gives a part of it
    begun = time.process_time()
    try:
        try:
            values = {name: yaml.safe_load(text) for name, text in texts.items()}
        except (yaml.YAMLError, ValueError) as error:
            return "no YAML", type(error).__name__
        given = TINY | {"results": results, "output": results} | values
        defaults = batch.default_parameters(notebook)
        assigned = batch.assign_parameters([notebook], {n: v for n, v in given.items() if n in defaults})[notebook]
        arms = batch.wanted_arms(notebook, assigned)
        models.load_config(given["model"])  # as `study run` does
        schedule.missing_arms(arms, Store(results))
        if notebook.stem.startswith("07"):  # its own values make no arms
            own = ("model", "methods", "bits", "rank", "batch", "length")
            full = batch.default_parameters(notebook) | assigned
            memory.measure = _planned  # which comes after all plans
            with contextlib.suppress(Planned):
                memory.measured_beside_planned(group=full["group"] or 32, **{name: full[name] for name in own})
        what, said = "accepted", f"{len(arms)} arms"
    except ValueError as error:
        what, said = "refused", str(error)
    except TooLong:
        return "too long", ""
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what, said = "traceback", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    if time.process_time() - begun > SECONDS:
        return "too long", said
    return ("traceback", said) if "\n" in said else (what, said)


def main() -> None:
    first, count = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (0, CASES)
    found = []
    with tempfile.TemporaryDirectory() as results:
        for number in range(first, first + count):
            notebook, texts = case(number)
            what, said = tried(notebook, texts, results)
            found.append((what, notebook.stem, texts, said))
            if what != "refused":
                print(number, what, notebook.stem, texts, said, flush=True)
    counts = Counter(what for what, *_ in found)
    print(dict(counts))
    result = {
        "what": __doc__,
        "cases": count,
        "counts": dict(counts),
        **{
            what: [f"{notebook}: {texts} {said}" for kind, notebook, texts, said in found if kind == what]
            for what in ("accepted", "traceback", "too long")
        },
        "environment": environment(),
    }
    if count == CASES:
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    else:
        for what, notebook, texts, said in found:
            if what == "refused":
                print(notebook, texts, "->", said)


if __name__ == "__main__":
    main()
