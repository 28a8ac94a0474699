"""In which order arms are carried out, so that claims are answered early, and what further seeds would do for each."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from studylib.config import Arm
from studylib.evidence.measures import kind_of, lacks, training_times
from studylib.evidence.spread import ENOUGH, degrees
from studylib.evidence.verdicts import UNDECIDED, Claim, Finding
from studylib.methods import Setting
from studylib.study import Record

WORTH = 0.05  # decided claims that further seeds must promise, to come before arms that no claim reads

Work = Callable[[Arm], float]


def claims_first(
    arms: Iterable[Arm],
    claims: Iterable[Claim],
    work: Work,
    records: Sequence[Record] = (),
    findings: Mapping[str, Finding] | None = None,
    alone: bool = False,
) -> list[Arm]:
    """The arms, each once, in five parts:

    1. What may decide claims, by the decisions to be expected for the work (see `Plan.decisive`).
    2. One seed of every other arm that a claim reads, claim by claim, the cheapest first.
    3. Further seeds of claims of whose errors nothing is known, seed by seed, the cheapest first.
    4. One seed of the arms that no claim reads, those that take longest first.
    5. The further seeds that are left: first of arms that a claim reads.

    records: those that there are; findings: what the primary measure of each claim says of them, by its id. A claim
    that has its word gets no further seed before part 5, nor one that further seeds can hardly decide.
    A claim whose arms are neither there nor among these is left out. alone: parts 1 to 3 only.
    """
    plan = Plan(arms, claims, work, records, findings or {})
    for bundle in iter(plan.decisive, []):
        plan.add(bundle)
    plan.add_first_seeds()
    plan.add_unknown()
    return [plan.arms[at] for at in (plan.chosen if alone else [*plan.chosen, *plan.rest()])]


def lacking_measures(claims: Iterable[Claim], arms: Iterable[Arm]) -> dict[str, list[str]]:
    """Of the claims whose arms are all among these, those that what the arms are scored on cannot give its measure:
    what is missing, and the claims' ids."""
    evaluations = {Setting.of(arm): arm.evaluation for arm in arms}
    found: dict[str, list[str]] = defaultdict(list)
    for claim in claims:
        if not claim.needs or not evaluations.keys() >= set(claim.needs):
            continue
        evaluation = evaluations[claim.needs[0]]
        what = lacks(claim.primary, evaluation)
        if not what and len(evaluation.corpora) < 2 and any("data.corpus" in dict(own.changes) for own in claim.needs):
            what = "no corpus but the one that is trained on"
        if what:
            found[what].append(claim.id)
    return dict(found)


@dataclass(frozen=True)
class Prospect:
    """What it takes to answer a claim: arms, the seconds (or other work) that they take, and the chance that it is
    decided then; None where nothing is known of its errors yet."""

    arms: tuple[Arm, ...]
    work: float
    chance: float | None


class Plan:
    """Arms that are to be carried out, those that were chosen so far, and what is known of the claims.

    Arms and settings are told by their places in `arms` and `settings`.
    """

    def __init__(
        self,
        arms: Iterable[Arm],
        claims: Iterable[Claim],
        work: Work,
        records: Sequence[Record],
        findings: Mapping[str, Finding],
    ):
        self.arms = list(dict.fromkeys(arms))
        self.work = [work(arm) for arm in self.arms]
        self.findings = findings
        settings: dict[Setting, int] = {}
        self.kinds: list[str] = []
        self.there: dict[int, set[int]] = defaultdict(set)  # the seeds of finished records

        def place(arm: Arm) -> int:
            own = Setting.of(arm)
            if own not in settings:
                settings[own] = len(settings)
                self.kinds.append(kind_of(arm))
            return settings[own]

        self.own = [place(arm) for arm in self.arms]
        self.tried: set[int] = set()
        for record in records:
            self.tried.add(at := place(record.arm))
            if record.finished:
                self.there[at].add(record.arm.seed)
        self.claims = [claim for claim in claims if claim.needs and settings.keys() >= set(claim.needs)]
        self.needs = {claim.id: {settings[own] for own in claim.needs} for claim in self.claims}
        self.read = {
            claim.id: {settings[own] for own in (*claim.needs, *claim.optional) if own in settings}
            for claim in self.claims
        }
        self.chosen: dict[int, None] = {}

    def add(self, places: Iterable[int]) -> None:
        self.chosen |= dict.fromkeys(places)

    def first_seeds(self) -> list[int]:
        """One arm, of the least seed, of each setting that has no record."""
        first: dict[int, int] = {}
        for at, own in enumerate(self.own):
            if own not in self.tried and (own not in first or self.arms[at].seed < self.arms[first[own]].seed):
                first[own] = at
        return list(first.values())

    def add_first_seeds(self) -> None:
        self._add_cheapest_first(self.claims, self.first_seeds())

    def add_unknown(self) -> None:
        """Further seeds of the claims that are not judged, or of whose errors nothing is known."""
        claims = [claim for claim in self.claims if self._is_new(claim) or self._has_no_errors(claim)]
        for seed in sorted({arm.seed for arm in self.arms}):
            self._add_cheapest_first(claims, [at for at, arm in enumerate(self.arms) if arm.seed == seed])

    def decisive(self) -> list[int]:
        """The arms of which most decisions are to be expected for their work, of what is not chosen yet; none where
        less than WORTH is to be expected of any.

        They are one seed of each arm of a claim, or one to all further seeds of the trained ones; where too few runs
        say how far runs lie apart, those of other arms of the kind as well, which give the missing degrees of freedom
        soonest. What is to be expected is the sum over all claims that have no word, for they share arms and degrees:
        the chance of each (see Outcome.chance), and 1 for one that is not judged yet, once each of its arms has a run.
        """
        before = self._chances(self.claims, ())
        open_claims = [claim for claim in self.claims if before[claim.id] is not None]
        turns = self._turns(open_claims)
        best: list[int] = []
        most = 0.0
        for bundle in {tuple(bundle) for claim in open_claims for bundle in self._bundles(claim, turns)}:
            chances = self._chances(open_claims, bundle)
            gain = sum((chances[claim.id] or 0.0) - (before[claim.id] or 0.0) for claim in open_claims)
            rate = gain / max(1e-9, sum(self.work[at] for at in bundle))
            if gain >= WORTH and (rate, sorted(best)) > (most, sorted(bundle)):
                best, most = list(bundle), rate
        return best

    def prospect(self, claim: Claim) -> Prospect:
        """What it takes to answer one claim, as `decisive` has it for it alone: the bundle with the best chance for its
        work; where nothing is known yet, all that it reads and what its degrees of freedom lack; nothing for one whose
        arms are neither there nor among these."""
        if claim.id not in self.read:
            return Prospect((), 0.0, 0.0)
        turns = self._turns([claim])
        if self._is_new(claim) or self._has_no_errors(claim):
            waiting = self._waiting(claim)
            kinds = sorted({self.kinds[own] for own in self.read[claim.id]} - {""})
            return self._prospect([*waiting, *(at for kind in kinds for at in self._fill(kind, waiting, turns))], None)
        offers = [
            self._prospect(bundle, self._chances([claim], bundle)[claim.id]) for bundle in self._bundles(claim, turns)
        ]
        return max(offers, key=lambda own: (own.chance or 0.0) / max(1e-9, own.work), default=Prospect((), 0.0, 0.0))

    def degrees(self, extra: Collection[int] = ()) -> dict[str, float]:
        """The degrees of freedom of each kind of cell, with what is chosen and these arms."""
        seeds: dict[str, list[set[int]]] = {kind: [] for kind in self.kinds if kind}
        for own, runs in self._seeds(extra).items():
            if self.kinds[own] and len(runs) > 1:
                seeds[self.kinds[own]].append(runs)
        return {kind: degrees(runs) for kind, runs in seeds.items()}

    def lacking(self, claim: Claim) -> int:
        """How many of the arms that a claim needs have no record."""
        return len(self.needs[claim.id] - self.tried)

    def rest(self) -> list[int]:
        """All that is not chosen: first one seed of each arm."""
        read: set[int] = set().union(*self.read.values())
        least: dict[int, int] = {}
        for at, own in enumerate(self.own):
            least[own] = min(self.arms[at].seed, least.get(own, self.arms[at].seed))

        def part(at: int) -> tuple[bool, bool, int, float]:
            own, seed = self.own[at], self.arms[at].seed
            further = own in self.tried or seed > least[own]
            return further, own not in read, seed if further else 0, -self.work[at]

        return sorted((at for at in range(len(self.arms)) if at not in self.chosen), key=part)

    def _is_new(self, claim: Claim) -> bool:
        """Whether not all of its arms have a record, so that nothing is known of it."""
        judged = claim.id in self.findings and not self.lacking(claim)
        return not judged and claim.primary is not training_times  # which few machines can tell

    def _has_no_errors(self, claim: Claim) -> bool:
        finding = self.findings.get(claim.id)
        if finding is None or finding.verdict != UNDECIDED or finding.outcome is None:
            return False
        return self._chances([claim], ())[claim.id] is None

    def _waiting(self, claim: Claim) -> list[int]:
        read = self.read[claim.id]
        return [at for at, own in enumerate(self.own) if own in read and at not in self.chosen]

    def _add_cheapest_first(self, claims: Iterable[Claim], places: Iterable[int]) -> None:
        allowed, left = set(places), list(claims)
        while left:
            lacks = [[at for at in self._waiting(claim) if at in allowed] for claim in left]
            cheapest = min(range(len(left)), key=lambda own: sum(self.work[at] for at in lacks[own]))
            self.add(lacks[cheapest])
            del left[cheapest]

    def _seeds(self, extra: Collection[int]) -> dict[int, set[int]]:
        """The seeds of each setting, with what is chosen and these."""
        found = {own: set(seeds) for own, seeds in self.there.items()}
        for at in (*self.chosen, *extra):
            found.setdefault(self.own[at], set()).add(self.arms[at].seed)
        return found

    def _chances(self, claims: Iterable[Claim], extra: Collection[int]) -> dict[str, float | None]:
        """That each claim is decided with what is chosen and these; None where it has its word, or no errors."""
        seeds, free = self._seeds(extra), self.degrees(extra)
        found: dict[str, float | None] = {}
        for claim in claims:
            finding, read = self.findings.get(claim.id), self.read[claim.id]
            found[claim.id] = None
            if self._is_new(claim):
                kinds = {self.kinds[own] for own in read} - {""}
                runs = seeds.keys() >= self.needs[claim.id] and all(free[kind] >= ENOUGH for kind in kinds)
                found[claim.id] = float(runs)
            elif finding and finding.verdict == UNDECIDED and finding.outcome:
                own = [each for each in read if self.kinds[each] and self.there.get(each)]
                then, now = (sum(1 / len(runs[each]) for each in own) for runs in (seeds, self.there))
                found[claim.id] = finding.outcome.chance(then / now if own else 1.0, free)
        return found

    def _bundles(self, claim: Claim, turns: Mapping[str, Sequence[int]]) -> list[list[int]]:
        """What may decide a claim, each with what brings the degrees of freedom that lack, without those that cannot:
        one seed of its arms, or one to all further seeds of the trained ones as well."""
        waiting = self._waiting(claim)
        first = {at for at in self.first_seeds() if at in waiting} if self.lacking(claim) else set()
        trained = [at for at in waiting if self.kinds[self.own[at]] and at not in first]
        finding = self.findings.get(claim.id)
        outcome = finding.outcome if finding else None
        kinds = outcome.measured if outcome else {self.kinds[own] for own in self.read[claim.id]} - {""}
        found = []
        for last in [None, *sorted({self.arms[at].seed for at in trained})]:
            bundle = [at for at in waiting if at in first]
            bundle += [at for at in trained if last is not None and self.arms[at].seed <= last]
            for kind in sorted(kinds):
                bundle += self._fill(kind, bundle, turns)
            free = self.degrees(bundle)
            if bundle and all(free.get(kind, 0) >= ENOUGH for kind in kinds):
                found.append(bundle)
        return found

    def _turns(self, open_claims: Sequence[Claim]) -> dict[str, list[int]]:
        """The arms of each kind, in the order in which they bring degrees of freedom: further seeds of arms that are
        there, then arms with all their seeds; first those that open claims read, the cheapest before others."""
        read: set[int] = set().union(*(self.read[claim.id] for claim in open_claims))
        seeds = self._seeds(())
        whole: dict[int, float] = defaultdict(float)
        left = [at for at in range(len(self.arms)) if self.kinds[self.own[at]] and at not in self.chosen]
        for at in left:
            whole[self.own[at]] += self.work[at]

        def turn(at: int) -> tuple[bool, bool, float, int, int]:
            own, seed = self.own[at], self.arms[at].seed
            if own in seeds:
                return False, own not in read, self.work[at], seed, own
            return True, own not in read, whole[own], own, seed

        found: dict[str, list[int]] = defaultdict(list)
        for at in sorted(left, key=turn):
            found[self.kinds[self.own[at]]].append(at)
        return found

    def _fill(self, kind: str, bundle: Sequence[int], turns: Mapping[str, Sequence[int]]) -> list[int]:
        """The arms that, with a bundle, bring a kind to ENOUGH degrees of freedom soonest, as far as there are any."""
        seeds = {own: runs for own, runs in self._seeds(bundle).items() if self.kinds[own] == kind}
        taken, found = set(bundle), []
        for at in turns.get(kind, ()):
            if degrees(list(seeds.values())) >= ENOUGH:
                break
            if at not in taken:
                seeds.setdefault(self.own[at], set()).add(self.arms[at].seed)
                found.append(at)
        return found

    def _prospect(self, places: Iterable[int], chance: float | None) -> Prospect:
        own = list(places)
        return Prospect(tuple(self.arms[at] for at in own), sum(self.work[at] for at in own), chance)
