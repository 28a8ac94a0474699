"""Text, instruction pairs and tasks by name: those that come with the study, and data of one's own in their place."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from studylib.config.values import check_known, check_several, check_text, check_whole, shown

CORPORA = ("wikipedia", "c4")
ALPACA = "alpaca"
ZERO_SHOT = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TASKS = (*ZERO_SHOT, "mmlu", "triviaqa")
LEAST = 2  # windows, items, pairs: the interval of a single one would say nothing
# By what stands for each in a notebook's parameter `own`, what it is.
OWN_DATA = {
    "pairs": "a .json or .jsonl file of instruction pairs: half are learned, of the others some are scored",
    "text": "one or more .txt or .jsonl files that perplexities are of",
    "training_text": "a .txt or .jsonl file in the place of the text that the model writes itself",
    "tasks": f"benchmarks, of {', '.join(TASKS)}",
    "windows": "how many windows of each text are scored",
    "items": "how many items of each task are scored",
    "scored_pairs": "how many held-out pairs are scored",
}
LISTS, COUNTS = ("text", "tasks"), ("windows", "items", "scored_pairs")


def check_corpus(corpus: str) -> None:
    """Raise ValueError unless `corpus` is a known name or names a .txt (a document a line) or .jsonl ("text") file."""
    check_text("corpus", corpus)
    if corpus not in CORPORA and not corpus.endswith((".txt", ".jsonl")):
        raise ValueError(
            f"corpus: {corpus!r} is not known; use one of {', '.join(CORPORA)}, or the path of a .txt (one "
            'document a line) or .jsonl (field "text") file'
        )


def check_instructions(source: str) -> None:
    """Raise ValueError unless `source` is "alpaca" or names a .json (a list) or .jsonl (a line each) file of pairs."""
    check_text("instructions", source)
    if source != ALPACA and not source.endswith((".json", ".jsonl")):
        raise ValueError(
            f"instructions: {source!r} is not known; use {ALPACA}, or the path of a .json (a list) or .jsonl (a line "
            'each) file of objects with "instruction", "output" and, if any, "input"'
        )


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ValueError for a task that is not known."""
    for task in tasks:
        check_known("task", task, TASKS)


def check_own(own: Any) -> None:
    """Raise ValueError unless `own` is a dictionary of OWN_DATA with values that may be; files are not looked at."""
    if not isinstance(own, Mapping):
        raise ValueError(f"own: {shown(own)} is not allowed; use a dictionary of {', '.join(OWN_DATA)}")
    for name, value in own.items():
        check_known("own", name, OWN_DATA)
        if name in COUNTS:
            check_whole(name, value, 0 if name == "scored_pairs" and value == 0 else LEAST)
        elif name in LISTS:
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name}: {shown(value)} is not allowed; use a list of {OWN_DATA[name]}")
            check_several(name, tuple(value), check_corpus if name == "text" else lambda task: check_tasks([task]))
        else:
            (check_instructions if name == "pairs" else check_corpus)(value)
    if "text" in own and not own["text"]:
        raise ValueError(f"text: {shown(own['text'])} is not allowed; use {OWN_DATA['text']}")
    if own.get("scored_pairs") == 0 and "pairs" in own:
        raise ValueError("scored_pairs: 0 is not allowed with pairs of one's own: no claim could be about them")


def located(own: Mapping[str, Any]) -> dict[str, Any]:
    """The same with paths that hold in every working directory: relative ones count from this one."""
    check_own(own)
    found = dict(own)
    for name in own.keys() & {"pairs", "training_text"}:
        found[name] = _located(own[name])
    if "text" in own:
        found["text"] = [_located(corpus) for corpus in own["text"]]
    return found


def _located(name: str) -> str:
    return name if name in (*CORPORA, ALPACA) else os.path.abspath(name)
