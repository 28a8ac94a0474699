"""The ledger: every claim, its verdict and the number that it rests on, at a glance."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

import numpy as np

from studylib.config import EMPTY, MEANINGLESS, Arm, capital, is_smoke, listed, markdown
from studylib.evidence import (
    NO_DIFFERENCE,
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    UNDECIDED,
    VERDICTS,
    Claim,
    Effect,
    Finding,
    PaperNumber,
    beyond,
    decide,
    judge,
    kind_of,
    l4q,
    llm_qat,
    qlora,
)
from studylib.methods import L4Q_PAPER, LLM_QAT_PAPER, QLORA_PAPER, Setting
from studylib.study import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LATER = "Later work"  # in the place of a paper
BY_PAPER = {
    LLM_QAT_PAPER: llm_qat.CLAIMS,
    QLORA_PAPER: qlora.CLAIMS,
    L4Q_PAPER: l4q.CLAIMS,
    LATER: beyond.CLAIMS,
}
CLAIMS = {claim.id: claim for claims in BY_PAPER.values() for claim in claims}  # all, in the order of the papers
SYMBOLS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", NO_DIFFERENCE: "=", UNDECIDED: "?", NOT_TESTED: EMPTY}
PAUSE = 60  # seconds between two pages of a run that is under way: one takes some ten
WIDTH, HEIGHT, EDGE = 240, 42, 8  # of a picture, and what stays free at its ends
LIMIT = 6  # half-widths from the bound; what lies beyond stands at the edge with an arrow head
UNREAD = 6  # settings that no claim reads, by name
WRAPPED = TextWrapper(70, break_on_hyphens=False)
LOOKS = {
    REPRODUCED: ("o", "#0B5C2E"),
    NOT_REPRODUCED: ("X", "#9C1C0C"),
    NO_DIFFERENCE: ("s", "#1B4F8A"),
    UNDECIDED: ("D", "#8A6500"),
}


@dataclass(frozen=True)
class Entry:
    """A claim and what the records say of it: by its primary measure, with the verdict, and by those beside it."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def main(self) -> Finding:
        return self.findings[0]

    @property
    def beside(self) -> tuple[Finding, ...]:
        return self.findings[1:]

    @property
    def verdict(self) -> str:
        return self.main.verdict

    @property
    def paper(self) -> str:
        """The paper's own effect."""
        return self.claim.effect.text if self.claim.effect else EMPTY


class Growing:
    """The ledger while arms are carried out: called after some, it tells the verdicts that are new.

    claims: those that are judged. told: gets a line for each. show: gets all records, where a verdict was told and the
    last time is PAUSE seconds ago.
    """

    def __init__(
        self,
        arms: Iterable[Arm],
        load: Callable[[Arm], Record | None],
        told: Callable[[str], None],
        show: Callable[[list[Record]], None],
        claims: Iterable[Claim] = tuple(CLAIMS.values()),
    ):
        self.waiting, self.load, self.told, self.show = list(arms), load, told, show
        self.claims = list(claims)
        self.smoke = is_smoke(arm.evaluation for arm in self.waiting)
        self.records: list[Record] = []
        self.findings: dict[str, Finding] = {}  # by claim: what the records say, of those whose arms are there
        self.verdicts: dict[str, str] = {}  # those that were told
        self.shown = -math.inf

    def __call__(self) -> None:
        found = {arm: record for arm in self.waiting if (record := self.load(arm))}
        if not found and self.verdicts:
            return
        self.waiting = [arm for arm in self.waiting if arm not in found]
        self.records += found.values()
        self._judge(found)
        news = [finding for finding in self.findings.values() if self._is_new(finding)]
        for finding in news:
            self.verdicts[finding.claim] = finding.verdict
            word = replace(finding, smoke=self.smoke).word
            self.told(f"{finding.claim} · {CLAIMS[finding.claim].statement}: {word}. {finding.found}")
        if news and self.records and time.monotonic() > self.shown + PAUSE:
            self.show(self.records)
            self.shown = time.monotonic()

    def _judge(self, new: Iterable[Arm]) -> None:
        """Judge the claims of which these arms may say something: that read one, or compare runs of the same kind."""
        kinds = {Setting.of(record.arm): kind_of(record.arm) for record in self.records}
        settings = {Setting.of(arm) for arm in new}
        told = {kinds[own] for own in settings} - {""}
        for claim in self.claims:
            if claim.test is None or not kinds.keys() >= set(claim.needs):
                continue
            read = {*claim.needs, *claim.optional}
            if claim.id not in self.findings or read & settings or told & {kinds.get(own) for own in read}:
                self.findings[claim.id] = decide(claim, self.records)

    def _is_new(self, finding: Finding) -> bool:
        """Undecided is no news while arms are to come: they may tell how far runs lie apart."""
        if finding.verdict in (NOT_TESTED, self.verdicts.get(finding.claim)):
            return False
        return finding.verdict != UNDECIDED or not self.waiting


def ledger(records: Sequence[Record]) -> list[Entry]:
    """All claims in their order."""
    return [Entry(claim, tuple(judge(claim, records))) for claim in CLAIMS.values()]


def unread(records: Sequence[Record]) -> str:
    """In a line, the settings whose records no claim reads, those that took longest first, and their seconds."""
    read = {setting for claim in CLAIMS.values() for setting in (*claim.needs, *claim.optional)}
    seconds: Counter[Setting] = Counter()
    for record in records:
        seconds[Setting.of(record.arm)] += sum(record.cost["seconds"].values())
    rest = [(setting.title, spent) for setting, spent in seconds.most_common() if setting not in read]
    if not rest:
        return "A claim reads every setting."
    named = listed([title for title, _ in rest], UNREAD)
    took, total = sum(spent for _, spent in rest), seconds.total()
    return f"No claim reads {len(rest)} of {len(seconds)} settings, {took:,.0f} of {total:,.0f} s: {named}."


def ledger_table(entries: Sequence[Entry]) -> str:
    """The ledger as a Markdown table: each claim, its verdict, and what it rests on."""
    rows = ["| | Claim | Verdict | Found | The paper |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        found, could = entry.main.found, entry.main.could
        could = f"Minimum detectable effect: {could}." if could else ""
        text = " ".join(filter(None, [found, entry.main.by_part, could]))
        cells = (entry.claim.id, entry.claim.statement, entry.main.word, text, entry.paper)
        rows.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join(rows)


def sentences(findings: Iterable[Finding]) -> str:
    """The verdict of each claim in Markdown, a paragraph each, with what other measures say below it."""
    leads = ((f"**{finding.claim}** · " if finding.verdict else "", finding.sentence) for finding in findings)
    return "\n\n".join(lead + markdown(sentence) for lead, sentence in leads)


def ledger_frame(entries: Sequence[Entry]) -> "pd.DataFrame":
    """One row for each finding, as plain numbers in the effect's own unit (shares as such), NaN where there is none.

    Columns: claim, statement, measure, verdict (of the primary measure; "" for others); effect, low, high (95%),
    surely_low, surely_high (the bounds that the verdict rests on), of (what it is, in words); above, below (where the
    claim holds); detectable (the minimum detectable effect); paper (its own effect, where it can be compared),
    paper_text.
    """
    import pandas as pd

    return pd.DataFrame([_row(entry, finding) for entry in entries for finding in entry.findings])


def _row(entry: Entry, finding: Finding) -> dict[str, Any]:
    row = {"claim": entry.claim.id, "statement": entry.claim.statement}
    row |= {"measure": finding.measure, "verdict": finding.verdict}
    names = ("effect", "low", "high", "surely_low", "surely_high", "of", "above", "below", "detectable", "paper")
    row |= dict.fromkeys(names, math.nan)
    if effect := finding.effect:
        interval, mark = effect.interval, effect.mark(entry.claim.effect)
        values = (interval.estimate, interval.low, interval.high, *effect.bounds, effect.what)
        values += (effect.above, effect.below, effect.smallest, mark and mark.value)
        row |= dict(zip(names, values, strict=True))
    return row | {"paper_text": entry.paper}


def effect_text(effect: Effect) -> str:
    """The number with its interval, where it has one."""
    low, high = effect.bounds
    return effect.text if low < high else effect.unit.text(effect.interval.estimate)


def picture(effect: Effect, paper: PaperNumber | None) -> str:
    """An effect as inline SVG: its 95% interval and the bounds that the verdict rests on, where the claim holds, and
    the paper's number as a diamond, hollow if recalled, where it can stand beside. Empty where a number is infinite.

    Ratios have a log scale. The interval has the colour of the text around it.
    """
    found, mark = effect.interval, effect.mark(paper)
    shown = [found.low, found.high, *effect.bounds, *filter(math.isfinite, (effect.above, effect.below))]
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
    for (low, high), width in ((effect.bounds, 1.5), ((found.low, found.high), 5)):
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
    """A row for each claim: how far the effect of its primary measure lies on the claim's side of the bound.

    In half-widths between the bounds that the verdict rests on, so that these are two apart; planned numbers have none
    and stand at the edge.
    """
    import matplotlib as mpl  # what only reads the ledger draws nothing
    from matplotlib.lines import Line2D

    from studylib.report.style import STYLE, name_rows, new_panels, set_title

    with mpl.rc_context(STYLE):
        figure, (ax,) = new_panels(1, width=12, height=1.8 + 0.38 * len(entries))
        ax.axvspan(0, LIMIT + 0.5, color="#0B5C2E", alpha=0.06, lw=0, zorder=0)
        ax.axvline(0, color="#000000", lw=1, zorder=1)
        for row, entry in enumerate(entries):
            _draw(ax, entry, row)
            main, effect = entry.main, entry.main.effect
            text = f"{capital(main.measure)}: {effect_text(effect)} {effect.what}" if effect else main.sentence
            grey = "#555555" if entry.verdict == NOT_TESTED else "#000000"
            ax.text(1.01, row, "\n".join(WRAPPED.wrap(text)[:3]), transform=ax.get_yaxis_transform(), va="center",
                    fontsize=7, color=grey)  # fmt: skip
            ax.axhline(row + 0.5, color="#DDDDDD", lw=0.7)
        labels = [WRAPPED.fill(f"{entry.claim.id}  {entry.claim.statement}") for entry in entries]
        name_rows(ax, labels, fontsize=7.5)
        ax.set_xlim(-LIMIT - 0.5, LIMIT + 0.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylabel("Claim")
        ax.set_xlabel("Distance from the rule's bound (right: as claimed), in half-widths between the verdict's bounds")
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
        set_title(figure, counted(entries))
    return figure


def _draw(ax: "Axes", entry: Entry, row: int) -> None:
    effect = entry.main.effect
    if effect is None:
        return
    low, x, high, *paper = np.clip(_positions(effect, entry), -LIMIT, LIMIT)
    marker, colour = LOOKS[entry.verdict]
    ax.plot([low, high], [row, row], color=colour, lw=1.2, zorder=2)
    marker = {-LIMIT: "<", LIMIT: ">"}.get(x, marker)
    ax.plot(x, row, marker=marker, ms=6, color=colour, ls="", zorder=3)
    for mark in paper:
        fill = "#FFFFFF" if entry.claim.effect.recalled else "#000000"
        ax.plot(mark, row, marker="d", ms=5, color="#000000", mfc=fill, ls="", zorder=4)


def _positions(effect: Effect, entry: Entry) -> list[float]:
    """Where the interval begins, the estimate, where the interval ends and, where it can be compared, the paper."""
    (low, high), mark = effect.bounds, effect.mark(entry.claim.effect)
    if math.isinf(high - low):  # one seed: its number tells nothing
        return [0.0] * 3
    values = [effect.beyond(v) for v in (low, effect.interval.estimate, high, *([mark.value] if mark else []))]
    if low < high:
        return [value / ((high - low) / 2) for value in values]
    return [np.copysign(np.inf, value) for value in values[:3]]


def counted(entries: Sequence[Entry]) -> str:
    """How many claims have which verdict, as a phrase."""
    if any(entry.main.smoke for entry in entries):
        return MEANINGLESS
    counts = Counter(entry.verdict for entry in entries)
    found = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    return f"Of {len(entries)} claims of three papers and later work: {listed(found)}"
