"""The ledger: every claim, its verdict and the number that it rests on, at a glance."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

import numpy as np

from studylib.config import EMPTY, capital, listed, markdown
from studylib.evidence import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    VERDICTS,
    Claim,
    Effect,
    Finding,
    PaperNumber,
    judge,
    l4q,
    llm_qat,
    qlora,
)
from studylib.methods import L4Q_PAPER, LLM_QAT_PAPER, QLORA_PAPER
from studylib.study import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BY_PAPER = {LLM_QAT_PAPER: llm_qat.CLAIMS, QLORA_PAPER: qlora.CLAIMS, L4Q_PAPER: l4q.CLAIMS}
CLAIMS = {claim.id: claim for claims in BY_PAPER.values() for claim in claims}  # all, in the order of the papers
SYMBOLS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", INCONCLUSIVE: "?", NOT_TESTED: EMPTY}
WIDTH, HEIGHT, EDGE = 240, 42, 8  # of a picture, and what stays free at its ends
MIXED = "differing by measure"
LIMIT = 6  # half-widths from the bound; what lies beyond stands at the edge with an arrow head
WRAPPED = TextWrapper(70, break_on_hyphens=False)
LOOKS = {REPRODUCED: ("o", "#0B5C2E"), NOT_REPRODUCED: ("X", "#9C1C0C"), INCONCLUSIVE: ("D", "#8A6500")}


@dataclass(frozen=True)
class Entry:
    """A claim and what the records say of it, a finding a measure."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def telling(self) -> Finding:
        """The finding that says most: the first with a verdict."""
        decided = (finding for finding in self.findings if finding.verdict not in (INCONCLUSIVE, NOT_TESTED))
        return next(decided, self.findings[0])

    @property
    def others(self) -> list[Finding]:
        return [finding for finding in self.findings if finding is not self.telling]

    @property
    def verdicts(self) -> dict[str, str]:
        """Each verdict in words, with how many measures say so where they do not agree."""
        counts = Counter(finding.verdict for finding in self.findings)
        found = [verdict for verdict in VERDICTS if counts[verdict]]
        if len(found) == 1:
            return {found[0]: found[0]}
        first, *others = (f"{verdict} by {counts[verdict]}" for verdict in found)
        return dict(zip(found, (f"{first} of {len(self.findings)} measures", *others), strict=True))

    @property
    def overall(self) -> str:
        return ", ".join(self.verdicts.values())

    @property
    def paper(self) -> str:
        """The paper's own effect."""
        return self.claim.effect.text if self.claim.effect else EMPTY


def ledger(records: Sequence[Record]) -> list[Entry]:
    """All claims in their order."""
    return [Entry(claim, tuple(judge(claim, records))) for claim in CLAIMS.values()]


def ledger_table(entries: Sequence[Entry]) -> str:
    """The ledger as a Markdown table: each claim, its verdict, and the finding that says most of it."""
    rows = ["| | Claim | Verdict | Found | The paper |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        found, could = entry.telling.found, entry.telling.could
        found += f" Could have shown {could}." if could else ""
        cells = (entry.claim.id, entry.claim.statement, entry.overall, found, entry.paper)
        rows.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join(rows)


def sentences(findings: Iterable[Finding]) -> str:
    """Each finding with its claim in Markdown, a paragraph each."""
    return "\n\n".join(f"**{finding.claim}** · {markdown(finding.sentence)}" for finding in findings)


def ledger_frame(entries: Sequence[Entry]) -> "pd.DataFrame":
    """One row for each finding, as plain numbers in the effect's own unit (shares as such), NaN where there is none.

    Columns: claim, statement, measure, verdict; effect, low, high (95%), surely_low, surely_high (the interval that the
    verdict rests on), of (what it is, in words); above, below (where the claim holds); smallest (see verdicts.Effect);
    paper (its own effect, where it can be compared), paper_text.
    """
    import pandas as pd

    return pd.DataFrame([_row(entry, finding) for entry in entries for finding in entry.findings])


def _row(entry: Entry, finding: Finding) -> dict[str, Any]:
    row = {"claim": entry.claim.id, "statement": entry.claim.statement}
    row |= {"measure": finding.measure, "verdict": finding.verdict}
    names = ("effect", "low", "high", "surely_low", "surely_high", "of", "above", "below", "smallest", "paper")
    row |= dict.fromkeys(names, math.nan)
    if effect := finding.effect:
        interval, mark = effect.interval, effect.mark(entry.claim.effect)
        values = (interval.estimate, interval.low, interval.high, *interval.bounds, effect.what)
        values += (effect.above, effect.below, effect.smallest, mark and mark.value)
        row |= dict(zip(names, values, strict=True))
    return row | {"paper_text": entry.paper}


def effect_text(effect: Effect) -> str:
    """The number with its interval, where it has one."""
    low, high = effect.interval.bounds
    return effect.text if low < high else effect.unit.text(effect.interval.estimate)


def picture(effect: Effect, paper: PaperNumber | None) -> str:
    """An effect as inline SVG: its 95% interval and the wider one that the verdict rests on, where the claim holds, and
    the paper's number as a diamond, hollow if recalled, where it can stand beside. Empty where a number is infinite.

    Ratios have a log scale. The interval has the colour of the text around it.
    """
    found, mark = effect.interval, effect.mark(paper)
    shown = [found.low, found.high, *found.bounds, *filter(math.isfinite, (effect.above, effect.below))]
    shown += [mark.value] if mark else []
    if not all(map(math.isfinite, shown)):
        return ""
    scale = math.log if effect.unit.ratio and min(shown) > 0 else float
    least, most = scale(min(shown)), scale(max(shown))

    def x(value: float) -> float:
        if math.isinf(value):
            return 0 if value < 0 else WIDTH
        return round(EDGE + (WIDTH - 2 * EDGE) * ((scale(value) - least) / (most - least or 1)), 1)

    left, right = x(effect.above), x(effect.below)
    at, anchor = _beneath((left + right) / 2 if left > 0 and right < WIDTH else x(effect.bound))
    parts = [f'<rect class="holds" x="{left}" y="6" width="{round(right - left, 1)}" height="20"/>']
    parts += [f'<path class="bound" d="M{end} 6v20"/>' for end in (left, right) if 0 < end < WIDTH]
    for (low, high), width in ((found.bounds, 1.5), ((found.low, found.high), 5)):
        parts.append(f'<path stroke="currentColor" stroke-width="{width}" d="M{x(low)} 18H{x(high)}"/>')
    parts.append(f'<circle fill="currentColor" cx="{x(found.estimate)}" cy="18" r="5"/>')
    if mark:
        kind = "recalled" if mark.recalled else "paper"
        parts.append(f'<path class="{kind}" d="M{x(mark.value)} 1l5 5l-5 5l-5 -5z"/>')
    parts.append(f'<text x="{at}" y="39" text-anchor="{anchor}">holds {escape(effect.holds)}</text>')
    label = f"{effect_text(effect)} {effect.what}; the claim holds {effect.holds}"
    label += f"; the paper: {mark.text}" if mark else ""
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}">{"".join(parts)}</svg>'
    )


def _beneath(at: float) -> tuple[float, str]:
    """Where a text at a position begins, ends or is centred, so that it stays inside the picture."""
    if at < WIDTH / 4:
        return 0, "start"
    return (WIDTH, "end") if at > 3 * WIDTH / 4 else (at, "middle")


def overview(entries: Sequence[Entry]) -> "Figure":
    """A row for each claim, in it a line for each measure: how far its effect lies on the claim's side of the bound.

    In half-widths of the interval that the verdict rests on, so that every interval is two long; planned numbers have
    none and stand at the edge.
    """
    import matplotlib as mpl  # what only reads the ledger draws nothing
    from matplotlib.lines import Line2D

    from studylib.report.style import STYLE, name_rows, new_panels, set_title

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


def _draw(ax: "Axes", entry: Entry, finding: Finding, row: float) -> None:
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
