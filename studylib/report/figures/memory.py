"""The memory of fine-tuning: this model measured beside its plan, and the papers' gigabytes beside ours."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studylib.config import EMPTY, Adapter, listed, number, percent
from studylib.data import models
from studylib.evaluate import GB, PURPOSES, TITLES, measure, plan
from studylib.evidence import against_papers
from studylib.methods import attach, find_tuned, method_title
from studylib.report.style import LINES, STYLE, name_rows, new_panels, set_title
from studylib.study import environment

MB = 1e6


def measured_beside_planned(
    model: str, methods: Sequence[str], bits: int, group: int, rank: int, batch: int, length: int
) -> pd.DataFrame:
    """One row for each method without and with checkpointing: bytes by purpose, measured, and the plan's total.

    Columns: method (its name), checkpointing, the purposes of evaluate.memory.TrainingMemory, total, planned (the
    plan's total), in bytes.
    Raises ValueError, before anything is measured, where a plan does, or for a step that the machine has no room for.
    """
    given: dict[str, Any] = {"batch": batch, "length": length}
    memory = environment()["hardware"]["memory_bytes"]
    parts, planned = {}, {}
    for method in methods:
        own = find_tuned(method)
        adapter = Adapter(rank, rank) if "adapter" in own.needs else None
        parts[method] = {"format": own.usual_format(bits, group), "adapter": adapter}
        for checkpointing in (False, True):
            total = plan(
                models.load_config(model),
                method,
                **parts[method] | given,
                checkpointing=checkpointing,
                dtype=models.compute_dtype(),
            ).total
            if total > memory:
                raise ValueError(
                    f"batch: {batch} of {length} tokens take {number(total / GB)} GB with {method!r}, and this machine "
                    f"has {number(memory / GB)}"
                )
            planned[method, checkpointing] = total
    rows = []
    for method in methods:
        prepared = attach(models.load_model(model), method, **parts[method])
        for checkpointing in (False, True):
            found = measure(prepared, **given, checkpointing=checkpointing)
            sizes = {name: getattr(found, name) for name in (*PURPOSES, "total")}
            sizes["planned"] = planned[method, checkpointing]
            rows.append({"method": method, "checkpointing": checkpointing} | sizes)
        del prepared
    return pd.DataFrame(rows)


def readable_memory(frame: pd.DataFrame) -> pd.DataFrame:
    """measured_beside_planned's result as text, in MB of 10^6 bytes."""
    shown = pd.DataFrame({"Method": [method_title(method) for method in frame["method"]]})
    shown["Checkpointing"] = ["yes" if on else "no" for on in frame["checkpointing"]]
    for name in (*PURPOSES, "total"):
        shown[f"{TITLES[name].capitalize()}, MB"] = [number(value / MB) for value in frame[name]]
    shown["Plan / measured"] = [f"{row.planned / row.total:.3f}" for row in frame.itertuples()]
    return shown


def memory_bars(frame: pd.DataFrame) -> Figure:
    """A bar for each method, stacked by purpose; a panel without and one with gradient checkpointing."""
    with mpl.rc_context(STYLE):
        figure, axes = new_panels(2, width=12, height=1.9 + 0.42 * frame["method"].nunique(), sharey=True)
        for ax, on in zip(axes, (False, True), strict=True):
            own = frame[frame["checkpointing"] == on]
            left = np.zeros(len(own))
            for name, colour in zip(PURPOSES, LINES, strict=False):
                values = own[name].to_numpy() / MB
                ax.barh(range(len(own)), values, left=left, height=0.6, color=colour, label=TITLES[name])
                left += values
            for row, total in enumerate(left):
                ax.annotate(
                    number(total), (total, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
                )
            ax.set_xlabel(f"MB in one step, {'with' if on else 'without'} gradient checkpointing")
            ax.margins(x=0.12)
        name_rows(axes[0], [method_title(method) for method in own["method"]])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PURPOSES))
        totals = frame[~frame["checkpointing"]].set_index("method")["total"]
        ranked = totals.sort_values()
        ends = [f"{method_title(name)} {number(ranked[name] / MB)} MB" for name in (ranked.index[0], ranked.index[-1])]
        off = (frame["planned"] / frame["total"] - 1).abs().max()
        measured = f"our plans are within {percent(off)} of what was measured"
        set_title(figure, f"A training step takes from {ends[0]} to {ends[1]}; {measured}")
    return figure


def papers_table() -> pd.DataFrame:
    """gigabytes.against_papers as text."""
    found = against_papers()
    return pd.DataFrame(
        {
            "Claim": found["claim"],
            "Model": found["model"],
            "Method": [method_title(method) for method in found["method"]],
            "Part": [TITLES[part] for part in found["part"]],
            "Step": found["step"],
            "Paper, GB": [EMPTY if np.isnan(value) else number(value) for value in found["paper"].astype(float)],
            "Ours, GB": [number(value) for value in found["ours"]],
            "Ours / paper": [EMPTY if np.isnan(value) else f"{value:.2f}" for value in found["ratio"]],
            "Why they differ": found["reason"],
        }
    )


def papers_figure() -> Figure:
    """Every reported number beside its plan; the band is a tenth either way."""
    found = against_papers()
    found = found[found["paper"].notna()]
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=8, height=6)
        ends = np.array([found[["paper", "ours"]].min().min() / 1.3, found[["paper", "ours"]].max().max() * 1.3])
        ax.fill_between(ends, ends * 0.9, ends * 1.1, color="#000000", alpha=0.08, lw=0)
        ax.plot(ends, ends, color="#888888", lw=1)
        groups = found.groupby(["claim", "method", "part"], sort=False)
        for at, ((claim, method, part), own) in enumerate(groups):
            label = f"{claim} {method_title(method)}, {TITLES[part]}"
            style = {"color": LINES[at % len(LINES)], "marker": "osv^DPX"[at % 7], "ls": ""}
            ax.plot(own["paper"], own["ours"], ms=5.5, label=label, mfc=None if at < len(LINES) else "#FFFFFF", **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("The paper, GB (log scale)")
        ax.set_ylabel("The plan, GB (log scale)")
        figure.legend(loc="outside right center", fontsize=7.5)
        close = (found["ratio"] - 1).abs() <= 0.1
        far = found.loc[(found["ratio"].map(np.log).abs()).idxmax()]
        what = f"{method_title(far['method'])} at {far['model']}, {TITLES[far['part']]}: {far['ratio']:.2f} times"
        set_title(
            figure, f"{close.sum()} of {len(close)} reported numbers are met to a tenth; furthest is {listed([what])}"
        )
    return figure
