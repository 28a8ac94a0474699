"""The ledger's rows, numbers and pictures, and its figure."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg

from studylib.evidence.statistics import RATIO, Interval
from studylib.evidence.verdicts import (
    ACCURACY,
    COST,
    NOT_TESTED,
    PERPLEXITY,
    TIMES,
    UNDECIDED,
    Effect,
    PaperNumber,
    judge,
)
from studylib.report.ledger import (
    CLAIMS,
    LIMIT,
    WIDTH,
    Entry,
    Growing,
    ledger,
    ledger_frame,
    ledger_table,
    overview,
    picture,
    sentences,
    unread,
)


@pytest.fixture
def entries(ablations, tuned):
    return ledger(ablations + tuned)


def test_every_claim_has_its_row(entries):
    assert [entry.claim.id for entry in entries] == list(CLAIMS)
    rows = ledger_table(entries).splitlines()
    assert len(rows) == 2 + len(CLAIMS) and rows[0].count("|") == 6
    assert rows[2].startswith("| A1 | LLM-QAT recovers") and rows[2].endswith("| 78% of the loss of accuracy |")


def test_a_claim_has_one_word_and_what_stands_beside_has_none(ablations):
    entry = Entry(CLAIMS["A1"], tuple(judge(CLAIMS["A1"], ablations)))
    assert entry.verdict == "reproduced" and entry.main.measure == "perplexity on Wikipedia and C4"
    measures = ["perplexity on Wikipedia", "perplexity on C4", "mean accuracy on 2 zero-shot tasks"]
    assert [finding.measure for finding in entry.beside] == measures
    text = sentences(entry.findings)
    assert text.startswith("**A1** · Perplexity on Wikipedia and C4: ") and text.count("eproduced.") == 1
    assert text.count("\n\nBeside it: ") == 3


def test_missing_records_are_named_claim_by_claim(picture):
    nothing = {entry.claim.id: entry for entry in ledger([])}
    assert nothing["A4"].main.sentence == "Not tested here: full precision and RTN at 8-8-8 were not run."
    assert nothing["C2"].verdict == NOT_TESTED and nothing["B6"].verdict == "reproduced"  # memory needs no record
    assert "QLoRA at 4-16-16 were not run." in ledger_table(ledger(picture))


def test_the_frame_holds_plain_numbers(entries):
    frame = ledger_frame(entries)
    assert len(frame) == sum(len(entry.findings) for entry in entries)
    explodes = frame[(frame["claim"] == "A6") & (frame["measure"] == "perplexity on C4")].iloc[0]
    assert explodes["effect"] == pytest.approx(math.exp(1.2)) and explodes["paper"] == pytest.approx(151.4 / 10.4)
    assert (explodes["above"], explodes["below"]) == (2.0, math.inf)
    decided = frame[frame["verdict"] == UNDECIDED]
    assert (decided["surely_low"] <= decided["low"]).all() and (decided["detectable"] > 0).all()
    assert frame.loc[frame["claim"] == "A5", "effect"].isna().all()


def test_a_growing_ledger_tells_each_verdict_once_it_is_there(ablations, make_record):
    found, told, pages = {}, [], []
    arms = [record.arm for record in ablations]
    growing = Growing(arms, found.get, told.append, lambda records: pages.append([*records]))
    growing()
    planned = {"B6", "B7", "C3"}
    assert {line.split(" ")[0] for line in told} == planned and not pages
    for trained, seed in ((False, 0), (True, 0), (True, 1), (True, 2)):
        found |= {
            record.arm: record
            for record in ablations
            if (record.arm.budget is not None, record.arm.seed) == (trained, seed)
        }
        growing()
        if not trained:
            assert {line.split(" ")[0] for line in told} <= planned | {"A2", "A4", "A6", "O2"}  # untrained
    assert {line.split(" ")[0]: line.split(": ")[1].split(".")[0] for line in told} == {
        entry.claim.id: entry.verdict for entry in ledger(ablations) if entry.verdict != NOT_TESTED
    }
    assert len(told) == len({line.split(" ")[0] for line in told})
    assert len(pages) == 1  # the others came within a minute


def positions(svg):
    circle = float(re.search(r'circle .*?cx="([\d.]+)"', svg)[1])
    diamond = re.search(r'class="(paper|recalled)" d="M([\d.]+) ', svg)
    return circle, diamond and (diamond[1], float(diamond[2]))


def test_a_picture_is_to_scale():
    error = 1 / scipy.stats.norm.ppf(0.975)
    effect = Effect(Interval(3.0, (error, error)), ACCURACY, "lost", above=0)
    svg = picture(effect, PaperNumber(6.0, ACCURACY))
    circle, diamond = positions(svg)
    assert circle == WIDTH / 2 and diamond == ("paper", WIDTH - 8)
    assert 'aria-label="3.0 [2.0, 4.0] points lost; the claim holds above 0.0 points; the paper: 6.0 points"' in svg
    assert 'class="holds" x="8.0" y="6" width="232.0"' in svg  # from zero to the right end
    assert positions(picture(effect, PaperNumber(6.0, ACCURACY, recalled=True)))[1][0] == "recalled"
    assert positions(picture(effect, PaperNumber(6.0, COST)))[1] is None


def test_ratios_have_a_log_scale_and_infinity_no_picture():
    effect = Effect(Interval(math.log(4.0), (0.1, 0.1), scale=RATIO), TIMES, "as many", above=1)
    assert positions(picture(effect, PaperNumber(16.0, TIMES)))[0] == WIDTH / 2
    assert picture(Effect(Interval(math.inf), PERPLEXITY, "lost", above=0), None) == ""


def test_words_are_escaped_and_texts_stay_inside():
    effect = Effect(Interval(3.0), ACCURACY, '<b> & "quoted"', below=5)
    svg = picture(effect, None)
    assert "&lt;b&gt; &amp; &quot;quoted&quot;" in svg and "<b>" not in svg
    assert f'<text x="{WIDTH}" y="39" text-anchor="end">' in svg


def test_the_overview_shows_every_claim_and_nothing_overlaps(entries, tmp_path):
    figure = overview(entries)
    figure.savefig(tmp_path / "x.png", dpi=50)
    (ax,) = figure.axes
    assert figure.get_suptitle().startswith("Of 36 claims of three papers and later work: ")
    assert figure.get_suptitle().endswith("not tested here") and ax.get_xlabel() and ax.get_ylabel() and figure.legends
    labels = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert labels == [f"{entry.claim.id}  {entry.claim.statement}" for entry in entries]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for texts in (ax.texts, ax.get_yticklabels()):
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
        for a, b in itertools.combinations(boxes, 2):
            assert min(a.y1, b.y1) - max(a.y0, b.y0) <= 1
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_an_interval_lies_right_of_the_bound_if_and_only_if_the_claim_is_reproduced(ablations, tuned, make_record):
    noisy = make_record("rtn", "8-8-8", loss=3.05, spread=0.5)
    for corpus in ("wikipedia", "c4"):
        noisy.scores[f"loss/{corpus}"].reverse()
    others = [record for record in ablations + tuned if (record.arm.method, record.arm.bits) != ("rtn", "8-8-8")]
    (ax,) = overview(ledger([*others, noisy])).axes
    drawn = {line.get_color() for line in ax.lines}
    assert {"#0B5C2E", "#8A6500"} <= drawn
    for line in ax.lines:
        ends = np.asarray(line.get_xdata())
        if len(ends) == 2 and line.get_color() == "#0B5C2E":
            assert (ends > 0).all() and (ends <= LIMIT).all()
        if len(ends) == 2 and line.get_color() == "#8A6500":
            assert ends.min() <= 0 <= ends.max()  # a range with two ends may be seen from its upper one


def test_what_no_claim_reads_is_named_with_its_seconds(make_record):
    def timed(*arm, seconds):
        record = make_record(*arm)
        return dataclasses.replace(record, cost=record.cost | {"seconds": {"evaluate": seconds}})

    read = timed("full-precision", "16-16-16", seconds=1000.0)
    assert unread([read]) == "A claim reads every setting."
    records = [read, timed("rtn", "7-7-7", seconds=2.0), timed("rtn", "6-7-7", seconds=3.0)]
    assert unread(records) == "No claim reads 2 of 3 settings, 5 of 1,005 s: RTN at 6-7-7 and RTN at 7-7-7."
    many = [read, *(timed("rtn", f"{w}-{a}-7", seconds=1.0) for w in (5, 6, 7) for a in (5, 6, 7))]
    assert unread(many).endswith(" and 3 more.") and unread(many).count("RTN at") == 6
