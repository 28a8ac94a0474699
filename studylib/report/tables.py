"""The scoreboard: one row for each method and setting, as numbers (CSV) and as text (terminal, Markdown, HTML)."""

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from studylib.config import EMPTY, ENGINES, ZERO_SHOT, capital, markdown, number, points
from studylib.evidence import (
    TASK_TITLES,
    Cell,
    Measure,
    accuracy_title,
    engine_measures,
    gather,
    gather_family,
    identity,
    model_names,
    response_measures,
    right_answers,
    task_measures,
    tokens_a_second,
    usual_measures,
)
from studylib.methods import Setting, corpus_title, data_title, method_title
from studylib.study import Record

if TYPE_CHECKING:
    import pandas as pd

WORDS = (
    "Model",
    "Method",
    "W-A-KV",
    "Variant",
    "Data",
    "Recipe",
    "Engine",
)  # columns of words; all others hold numbers


def frame(records: Iterable[Record]) -> "pd.DataFrame":
    """One row for each record as it is, in their order; plain numbers, NaN where there is none.

    Columns: key, model, method, bits, variant, seed, status; every metric by its name (see evaluate.scores); seconds of
    all phases together, peak_bytes.
    """
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "key": record.key,
                "model": record.arm.model,
                "method": record.arm.method,
                "bits": record.arm.bits,
                "variant": Setting.of(record.arm).variant,
                "seed": record.arm.seed,
                "status": record.status,
                **{name: np.nan if value is None else value for name, value in record.metrics.items()},
                "seconds": sum(record.cost["seconds"].values()),
                "peak_bytes": record.cost["peak_bytes"],
            }
            for record in records
        ]
    )


def scoreboard(records: Sequence[Record]) -> "pd.DataFrame":
    """One row for each setting, ordered as measures.gather does; plain numbers, NaN where there is none.

    Columns: method, bits, variant, seeds (finished), diverged (seeds), bytes/weights, bytes/cache_per_token; for each
    corpus, for the held-out responses, for "accuracy/mean" (%, over the zero-shot tasks), "bits_per_byte/mean" and
    "probability/mean" (%) of their right answers the estimate, .../low and .../high (95%, items resampled, scores
    averaged over seeds) and, with several seeds, .../lowest_seed and .../highest_seed; accuracy/<task> (%);
    training_minutes (mean over seeds). A cell without a finished seed has no measures, one of an older studylib not
    all.
    """
    import pandas as pd

    cells = gather(records).values()
    several = any(len(cell.records) + len(cell.diverged) > 1 for cell in cells)
    main = usual_measures(records) + right_answers(records) + response_measures(records)
    tasks = task_measures(records)
    return pd.DataFrame([_row(cell, main, tasks, several) for cell in cells])


def family_scoreboard(records: Sequence[Record]) -> "pd.DataFrame":
    """`scoreboard` of each model of a family below each other, the smallest first, with a first column "model"."""
    import pandas as pd

    names = model_names({record.arm.model: None for record in records})
    order = list(dict.fromkeys(own.model for own in gather_family(records)))
    boards = []
    for model in sorted(names, key=lambda model: order.index(names[model])):
        boards.append(scoreboard([record for record in records if record.arm.model == model]))
        boards[-1].insert(0, "model", names[model])
    return pd.concat(boards, ignore_index=True)


def _row(cell: Cell, main: list[Measure], tasks: list[Measure], several: bool) -> dict[str, Any]:
    sizes = {name: np.nan if value is None else value for name, value in _first(cell).metrics.items()}
    row: dict[str, Any] = {
        "method": method_title(cell.method),
        "bits": cell.bits,
        "variant": cell.setting.variant,
        "seeds": len(cell.records),
        "diverged": len(cell.diverged),
        "bytes/weights": sizes["bytes/weights"],
        "bytes/cache_per_token": sizes["bytes/cache_per_token"],
    }
    for measure in main:
        names = [measure.name, f"{measure.name}/low", f"{measure.name}/high"]
        found = measure.interval(identity, cell) if measure.covers(cell) else None
        row |= dict(zip(names, (found.estimate, found.low, found.high) if found else (np.nan,) * 3, strict=True))
        if several:
            names = [f"{measure.name}/lowest_seed", f"{measure.name}/highest_seed"]
            ends = measure.over_seeds(identity, cell) if found else None
            row |= dict(zip(names, ends or (np.nan, np.nan), strict=True))
    for task in tasks:
        row[task.name] = task.value(identity, cell) if task.covers(cell) else np.nan
    minutes = [record.cost["seconds"]["train"] / 60 for record in cell.records if "train" in record.cost["seconds"]]
    return row | {"training_minutes": np.mean(minutes) if minutes else np.nan}


def _first(cell: Cell) -> Record:
    return (*cell.records, *cell.diverged)[0]


def readable(board: "pd.DataFrame", tasks: bool = True) -> "pd.DataFrame":
    """The scoreboard as text, "26.7 [24.9, 28.6]" for estimate and 95% interval; single tasks if `tasks`. The
    probability of right answers, which tells what their bits a byte tell, is left out."""
    import pandas as pd

    shown = pd.DataFrame({"Method": board["method"], "W-A-KV": board["bits"]})
    if "model" in board:
        shown.insert(0, "Model", board["model"])
    if board["variant"].any():
        shown["Variant"] = board["variant"]
    if (board["seeds"] + board["diverged"]).max() > 1:
        shown["Seeds"] = [
            f"{row.seeds}" + (f" ({row.diverged} diverged)" if row.diverged else "") for row in board.itertuples()
        ]
    shown["Weights, MB"] = [
        f"{value / 1e6:.0f}" if value >= 1e7 else number(value / 1e6) for value in board["bytes/weights"]
    ]
    shown["Cache, kB/token"] = [number(value / 1e3) for value in board["bytes/cache_per_token"]]
    asked = [task for task in TASK_TITLES if f"accuracy/{task}" in board]
    titles = {
        "accuracy": f"{capital(accuracy_title([task for task in asked if task in ZERO_SHOT]))}, %",
        "bits_per_byte": "Right answers, bits a byte",
    }
    for name in board:
        kind, _, part = name.partition("/")
        if f"{name}/low" in board:
            what = part if part == "responses" else corpus_title(part)
            title = titles.get(kind, f"Perplexity, {what}")
            form = points if kind == "accuracy" else number
            if kind != "probability":
                shown[title] = [_cell(row, name, form) for _, row in board.iterrows()]
        elif kind == "accuracy" and part in TASK_TITLES and tasks and len(asked) > 1:
            shown[f"{TASK_TITLES[part]}, %"] = [points(value) if np.isfinite(value) else EMPTY for value in board[name]]
    shown["Training, min"] = [number(value) if np.isfinite(value) else EMPTY for value in board["training_minutes"]]
    return shown


def _cell(row: "pd.Series", name: str, form: Callable[[float], str]) -> str:
    if not row["seeds"]:
        return "diverged"
    if np.isnan(row[name]):
        return EMPTY
    text = f"{form(row[name])} [{form(row[f'{name}/low'])}, {form(row[f'{name}/high'])}]"
    lowest = row.get(f"{name}/lowest_seed", np.nan)
    return text if np.isnan(lowest) else f"{text}, seeds {form(lowest)} to {form(row[f'{name}/highest_seed'])}"


def data_statistics(records: Sequence[Record]) -> "pd.DataFrame":
    """One row for each data set that arms were trained on, as text: what it is like under the full-precision model."""
    import pandas as pd

    rows: dict[str, list[dict[str, float]]] = {}
    for cell in gather(records).values():
        for record in cell.records:
            if record.arm.training and record.data:
                name = data_title(record.arm)
                rows.setdefault(name, []).append(record.data["statistics"] | {"tokens": record.cost["tokens"]["data"]})
    shown = []
    for name, found in rows.items():
        mean = {key: np.mean([statistics[key] for statistics in found]) for key in found[0]}
        shown.append(
            {
                "Data": name,
                "Tokens": f"{mean['tokens']:,.0f}",
                "Entropy, nats": number(mean["entropy"]),
                "Loss, nats": number(mean["loss"]),
                "Distinct 2-grams, %": points(100 * mean["distinct_2"]),
                "Distinct 4-grams, %": points(100 * mean["distinct_4"]),
                "Repeated 4-grams in a window, %": points(100 * mean["repetition"]),
                "Vocabulary seen, %": points(100 * mean["vocabulary"]),
            }
        )
    return pd.DataFrame(shown)


def engines(records: Sequence[Record]) -> "pd.DataFrame":
    """One row for each engine that was timed, as text: tokens a second of each pass and batch, with 95% intervals."""
    import pandas as pd

    measures = engine_measures(records)
    cells = [cell for cell in gather(records).values() if measures and measures[0].covers(cell)]
    return pd.DataFrame(
        [
            {"Engine": engine}
            | {f"{capital(own.title)}, tokens/s": tokens_a_second(own, cell, engine).text(number) for own in measures}
            for cell in cells
            for engine in ENGINES
        ],
        columns=["Engine", *(f"{capital(own.title)}, tokens/s" for own in measures)],
    )


def samples(records: Sequence[Record]) -> str:
    """The beginning of each data set's first windows, as Markdown."""
    blocks: dict[str, str] = {}
    for cell in gather(records).values():
        if cell.records and cell.records[0].arm.training:
            name = data_title(cell.arm)
            texts = [f"**{markdown(name)}**", *map(_quoted, cell.records[0].data["samples"])]
            blocks.setdefault(name, "\n\n".join(texts))
    return "\n\n".join(blocks.values())


def _quoted(text: str) -> str:
    ticks = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


def as_markdown(shown: "pd.DataFrame") -> str:
    """A Markdown table of text (readable's result), numbers to the right."""
    lines = [list(shown), [_ruler(name) for name in shown], *shown.values.tolist()]
    return "\n".join("| " + " | ".join(markdown(str(cell)) for cell in line) + " |" for line in lines)


def _ruler(column: str) -> str:
    return "---" if column in WORDS else "---:"


def as_text(shown: "pd.DataFrame") -> str:
    """Columns of text (readable's result) for a terminal."""
    lines = [list(shown), *shown.values.tolist()]
    widths = [max(len(line[column]) for line in lines) for column in range(shown.shape[1])]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in WORDS else cell.rjust(width)
            for name, cell, width in zip(shown, line, widths, strict=True)
        )
        for line in lines
    )


def as_html(shown: "pd.DataFrame") -> str:
    """An HTML table of text (readable's result), every cell escaped; numbers to the right."""

    def cells(line: Iterable[Any], tag: str, scope: str = "") -> str:
        return "".join(
            f"<{tag}{scope}{'' if name in WORDS else ' class=number'}>{escape(str(cell))}</{tag}>"
            for name, cell in zip(shown, line, strict=True)
        )

    body = "".join(f"<tr>{cells(line, 'td')}</tr>\n" for line in shown.values.tolist())
    return f"<table>\n<thead><tr>{cells(shown, 'th', ' scope=col')}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
