"""The figure of the ledger: all claims against the bounds of their rules, on one scale."""

from collections import Counter
from collections.abc import Sequence
from textwrap import TextWrapper

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from studylib.config.words import capital, listed
from studylib.evidence.verdicts import INCONCLUSIVE, NOT_REPRODUCED, NOT_TESTED, REPRODUCED, VERDICTS, Effect, Finding
from studylib.report.ledger import Entry, effect_text
from studylib.report.style import STYLE, name_rows, new_panels, set_title

MIXED = "differing by measure"
LIMIT = 6  # half-widths from the bound; what lies beyond stands at the edge with an arrow head
WRAPPED = TextWrapper(70, break_on_hyphens=False)
LOOKS = {REPRODUCED: ("o", "#0B5C2E"), NOT_REPRODUCED: ("X", "#9C1C0C"), INCONCLUSIVE: ("D", "#8A6500")}


def overview(entries: Sequence[Entry]) -> Figure:
    """A row for each claim, in it a line for each measure: how far its effect lies on the claim's side of the bound.

    In half-widths of the interval that the verdict rests on, so that every interval is two long; planned numbers have
    none and stand at the edge.
    """
    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=12, height=1.8 + 0.38 * len(entries))
        ax.axvspan(0, LIMIT + 0.5, color="#0B5C2E", alpha=0.06, lw=0, zorder=0)
        ax.axvline(0, color="#000000", lw=1, zorder=1)
        for row, entry in enumerate(entries):
            for at, finding in enumerate(entry.findings):
                _draw(ax, entry, finding, row + 0.75 * ((at + 0.5) / len(entry.findings) - 0.5))
            telling = entry.telling
            effect = telling.effect
            text = f"{capital(telling.measure)}: {effect_text(effect)} {effect.what}" if effect else telling.sentence
            grey = "#555555" if telling.verdict == NOT_TESTED else "#000000"
            ax.text(1.01, row, "\n".join(WRAPPED.wrap(text)[:3]), transform=ax.get_yaxis_transform(), va="center",
                    fontsize=7, color=grey)  # fmt: skip
            ax.axhline(row + 0.5, color="#DDDDDD", lw=0.7)
        labels = [WRAPPED.fill(f"{entry.claim.id}  {entry.claim.statement}") for entry in entries]
        name_rows(ax, labels, fontsize=7.5)
        ax.set_xlim(-LIMIT - 0.5, LIMIT + 0.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylabel("Claim")
        ax.set_xlabel(
            "Distance from the rule's bound (right: as claimed), in half-widths of the interval of the verdict;\n"
            "a mark for each measure, the large one for what stands on the right"
        )
        handles = [
            Line2D([], [], color=colour, marker=marker, ls="", label=verdict)
            for verdict, (marker, colour) in LOOKS.items()
        ]
        further = ((">", "#000000", "further, or exact"), ("d", "#000000", "the paper"), ("d", "#FFFFFF", "recalled"))
        handles += [
            Line2D([], [], color="#000000", marker=marker, mfc=fill, ls="", label=label)
            for marker, fill, label in further
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        set_title(figure, _title(entries))
    return figure


def _draw(ax: Axes, entry: Entry, finding: Finding, row: float) -> None:
    effect = finding.effect
    if effect is None:
        return
    low, x, high, *paper = np.clip(_positions(effect, finding, entry), -LIMIT, LIMIT)
    marker, colour = LOOKS[finding.verdict]
    ax.plot([low, high], [row, row], color=colour, lw=1.2, zorder=2)
    marker = {-LIMIT: "<", LIMIT: ">"}.get(x, marker)
    ax.plot(x, row, marker=marker, ms=6 if finding is entry.telling else 4.5, color=colour, ls="", zorder=3)
    for mark in paper:
        fill = "#FFFFFF" if entry.claim.effect.recalled else "#000000"
        ax.plot(mark, row, marker="d", ms=5, color="#000000", mfc=fill, ls="", zorder=4)


def _positions(effect: Effect, finding: Finding, entry: Entry) -> list[float]:
    """Where the interval begins, the estimate, where the interval ends and, where it can be compared, the paper."""
    (low, high), mark = effect.interval.bounds, effect.mark(entry.claim.effect)
    values = [effect.beyond(v) for v in (low, effect.interval.estimate, high, *([mark.value] if mark else []))]
    if low < high:
        return [value / ((high - low) / 2) for value in values]
    if finding.verdict == INCONCLUSIVE:  # one seed: its number tells nothing
        return [0.0] * 3
    return [np.copysign(np.inf, value) for value in values[:3]]


def _title(entries: Sequence[Entry]) -> str:
    agreed = Counter(next(iter(entry.verdicts)) if len(entry.verdicts) == 1 else MIXED for entry in entries)
    found = [f"{agreed[name]} {name}" for name in (*VERDICTS[:3], MIXED, NOT_TESTED) if agreed[name]]
    return f"Of {len(entries)} claims of three papers: {listed(found)}"
