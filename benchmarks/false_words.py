"""How often a page has a false verdict: pages drawn anew from the reference records, with truths that are known.

Windows and pairs are drawn with replacement from those of the records, and runs by wild residuals: each differs from
its arm's mean as a run of the records did, with a random sign (Mammen 1993), one that was run once as a run of another
arm of its kind, scaled to its own spread. For each claim that perplexities decide, true means are moved to where a
false word is likeliest: each part to just within its bound, just beyond it, or, for a difference, just beyond the
tolerance. A page is counted where any of its claims gets a false word. --skewed: what an arm loses on a window has the
shape of a lognormal number.
"""

import argparse
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from studylib.evidence import FAMILY, NO_DIFFERENCE, NOT_REPRODUCED, REPRODUCED, UNDECIDED, gather
from studylib.evidence import measures as evidence_measures
from studylib.evidence.measures import with_spreads
from studylib.report.ledger import CLAIMS
from studylib.study import read_records
from studylib.study.machine import environment

ROOT = Path(__file__).parents[1]
NEAR = 1e-4  # of a bound: how far from it a true value is put
LOSSES = ("loss/wikipedia", "loss/c4", "loss/responses")
SIDES = ("within", "beyond", "tolerance")


class World:
    """True scores of every arm, and what its runs add."""

    def __init__(self, records, skewed):
        self.cells = {own: cell for own, cell in gather(records).items() if cell.records}
        self.full = next(cell for cell in self.cells.values() if cell.method == "full-precision")
        self.skewed = skewed
        self.measures = {
            claim: claim.primary(records)[0] for claim in CLAIMS.values() if self._is_judged(claim, records)
        }

    def _is_judged(self, claim, records):
        if claim.test is None or not all(own in self.cells for own in claim.needs):
            return False
        measures = claim.primary(records)
        return bool(measures) and measures[0].is_perplexity and claim.id != "C9"  # whose numbers are no scores

    def truths(self):
        """By setting, the records with the means of all runs as their scores."""
        return {own: self._with(cell, [self._means(cell) for _ in cell.records]) for own, cell in self.cells.items()}

    def draw(self, random):
        """By setting, records of other windows and runs."""
        sizes = {name: len(self._means(cell)[name]) for cell in self.cells.values() for name in self._means(cell)}
        items = {name: random.integers(size, size=size) for name, size in sorted(sizes.items())}
        found = {}
        for own, cell in self.cells.items():
            means = self._means(cell)
            runs = [{name: means[name] + self._residual(random, cell, name) for name in means} for _ in cell.records]
            found[own] = self._with(cell, [{name: run[name][items[name]] for name in run} for run in runs], items)
        return found

    def _with(self, cell, runs, items=None):
        made = []
        for record, losses in zip(cell.records, runs, strict=True):
            scores = record.scores | losses
            if items and "tokens/responses" in scores:
                scores["tokens/responses"] = np.asarray(scores["tokens/responses"])[items["loss/responses"]]
            made.append(replace(record, scores={name: list(values) for name, values in scores.items()}))
        return replace(cell, records=tuple(made))

    def _means(self, cell):
        """The true score of each item."""
        means = {name: cell.scores(name) for name in LOSSES if name in cell.records[0].scores}
        for name in means.keys() & self.full.records[0].scores.keys() if self.skewed and cell is not self.full else ():
            lost = means[name] - self.full.scores(name)
            shape = np.exp((lost - lost.mean()) / (lost.std() or 1))
            means[name] += lost.std() * (shape - shape.mean()) / (shape.std() or 1) - (lost - lost.mean())
        return means

    def _residual(self, random, cell, name):
        """What a run adds to each item."""
        if not cell.kind:
            return 0.0
        cells = [other for other in self.cells.values() if other.kind == cell.kind and len(other.records) > 2]
        alike = [other for other in cells if name in other.records[0].scores]
        source = cell if cell in alike else alike[random.integers(len(alike))]
        runs = np.array([record.scores[name] for record in source.records])
        scale = np.sqrt(len(runs) / (len(runs) - 1)) * (self._lost(cell, name) / self._lost(source, name))
        return scale * random.choice([-1, 1]) * (runs - runs.mean(0))[random.integers(len(runs))]

    def _lost(self, cell, name):
        """How far runs lie apart grows with that."""
        full = self.full.records[0].scores
        return max(0.1, cell.scores(name).mean() - np.mean(full[name])) if name in full else 1.0


def outcome(claim, measure, cells, shifts):
    """The claim by its measure, with the mean losses of some cells moved."""
    used = []
    for own in (*claim.needs, *claim.optional):
        cell, shift = cells.get(own), shifts.get(own, 0.0)
        if cell and shift:
            moved = [
                replace(r, scores={n: np.asarray(v) + shift if n in LOSSES else v for n, v in r.scores.items()})
                for r in cell.records
            ]
            cell = replace(cell, records=tuple(moved))
        used.append(cell)
    return claim.test(measure, *used)


def truth(claim, measure, cells, side):
    """Shifts that put each part of the claim near its bound, and the true value of each part."""
    shifts = {}
    for part in outcome(claim, measure, cells, {}).parts:
        if part.of is None:
            continue
        inward = 1 if part.above == part.bound else -1
        goal = part.bound + inward * NEAR * (1 if side == "within" else -1)
        if side == "tolerance" and part.bound == 0:
            goal = part.tolerance + NEAR

        def missed(shift, own=part.of, what=part.what, goal=goal):
            return values_of(outcome(claim, measure, cells, shifts | {own: shift}))[what] - goal

        shifts[part.of] = brentq(missed, -6, 6, xtol=NEAR / 100)
    return shifts, values_of(outcome(claim, measure, cells, shifts))


def values_of(found):
    return {part.what: part.interval.estimate for part in found.parts}


def is_false(found, values):
    """Whether the verdict contradicts the true values of the claim's parts."""
    inside = [part.above < values[part.what] < part.below for part in found.parts]
    if found.verdict == REPRODUCED:
        return not all(inside)
    if found.verdict == NOT_REPRODUCED:
        return all(inside)
    if found.verdict == NO_DIFFERENCE:
        said = [part for part, word in zip(found.parts, found.verdicts, strict=True) if word == NO_DIFFERENCE]
        return not all(abs(values[part.what]) < part.tolerance for part in said)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=400, help="how many pages")
    parser.add_argument("--skewed", action="store_true")
    args = parser.parse_args()
    world = World(list(read_records(ROOT / "results" / "reference" / "records")), args.skewed)
    cells = world.truths()
    evidence_measures.RESAMPLED = 0  # the fewest draws for each interval: they are many here
    truths = {
        (claim, side): truth(claim, measure, cells, side)
        for (claim, measure), side in itertools.product(world.measures.items(), SIDES)
    }
    random, pages, words = np.random.default_rng(1), 0, Counter()
    for page in range(args.sample):
        drawn, wrong = world.draw(random), []
        records = [record for cell in drawn.values() for record in cell.records]
        known = {measure.name: with_spreads(measure, records) for measure in world.measures.values()}
        for claim, measure in world.measures.items():
            shifts, values = truths[claim, SIDES[random.integers(len(SIDES))]]
            found = outcome(claim, known[measure.name], drawn, shifts)
            words[found.verdict] += 1
            if is_false(found, values):
                wrong.append(claim.id)
        pages += bool(wrong)
        print(f"page {page + 1}: {', '.join(wrong) or 'no false word'}; {pages} with one so far", flush=True)
    shown = {word: words[word] for word in (REPRODUCED, NOT_REPRODUCED, NO_DIFFERENCE, UNDECIDED)}
    result = {"what": __doc__, "pages": args.sample, "with a false word": pages, "claims": len(world.measures)}
    result |= {"words": shown, "claims that can err": FAMILY, "skewed": args.skewed, "environment": environment()}
    name = "false_words_skewed" if args.skewed else "false_words"
    if args.sample >= 400:
        Path(__file__).with_name(f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
