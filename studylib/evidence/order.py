"""In which order arms are carried out, so that claims are answered early, and what further seeds would do for each."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from studylib.config import Arm
from studylib.evidence.measures import kind_of, lacks
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

    1. One seed of every arm that a claim reads, claim by claim: what is answered with the least further work first.
    2. Further seeds where they may decide a claim, by decisions to be expected for the work (see `Plan.decisive`).
    3. Further seeds of claims of which nothing is known yet, seed by seed, the cheapest first.
    4. One seed of the arms that no claim reads, those that take longest first.
    5. The further seeds that are left: first of arms that a claim reads.

    records: those that there are; findings: what the primary measure of each claim says of them, by its id. A claim
    that has its word gets no further seed before part 5, nor one that further seeds can hardly decide.
    A claim whose arms are neither there nor among these is left out. alone: parts 1 to 3 only.
    """
    plan = Plan(arms, claims, work, records, findings or {})
    plan.add_first_seeds()
    for bundle in iter(plan.decisive, []):
        plan.add(bundle)
    plan.add_unknown()
    return list(plan.chosen) if alone else [*plan.chosen, *plan.rest()]


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
    """Arms that are to be carried out, those that were chosen so far, and what is known of the claims."""

    def __init__(
        self,
        arms: Iterable[Arm],
        claims: Iterable[Claim],
        work: Work,
        records: Sequence[Record],
        findings: Mapping[str, Finding],
    ):
        self.settings = {arm: Setting.of(arm) for arm in dict.fromkeys(arms)}
        self.work = {arm: work(arm) for arm in self.settings}
        self.findings = findings
        self.there: dict[Setting, set[int]] = defaultdict(set)
        self.kinds = {own: kind_of(arm) for arm, own in self.settings.items()}
        for record in records:
            own = Setting.of(record.arm)
            self.kinds[own] = kind_of(record.arm)
            if record.finished:
                self.there[own].add(record.arm.seed)
        self.tried = {Setting.of(record.arm) for record in records}
        self.claims = [claim for claim in claims if claim.needs and self.kinds.keys() >= set(claim.needs)]
        self.chosen: dict[Arm, None] = {}

    def add(self, arms: Iterable[Arm]) -> None:
        self.chosen |= dict.fromkeys(arms)

    def first_seeds(self) -> list[Arm]:
        """One arm, of the least seed, of each setting that has no record."""
        first: dict[Setting, Arm] = {}
        for arm, own in self.settings.items():
            if own not in self.tried and (own not in first or arm.seed < first[own].seed):
                first[own] = arm
        return list(first.values())

    def add_first_seeds(self) -> None:
        self._add_cheapest_first(self.claims, self.first_seeds())

    def add_unknown(self) -> None:
        """Further seeds of the claims that were not judged, or of whose errors nothing is known."""
        claims = [claim for claim in self.claims if self._is_unknown(claim)]
        for seed in sorted({arm.seed for arm in self.settings}):
            self._add_cheapest_first(claims, [arm for arm in self.settings if arm.seed == seed])

    def decisive(self) -> list[Arm]:
        """The further seeds of which most decisions are to be expected for their work, of what is not chosen yet; none
        where less than WORTH is to be expected of any.

        They are one to all further seeds of a claim's trained arms; where too few runs say how far runs lie apart,
        those of other arms of the kind as well, which give the missing degrees of freedom soonest. What is to be
        expected is the sum of the chances of all undecided claims (see Outcome.chance), which share arms and degrees.
        """
        before = self._chances(self.claims, ())
        undecided = [claim for claim in self.claims if before[claim.id] is not None]
        best: list[Arm] = []
        most = 0.0
        for bundle in [bundle for claim in undecided for bundle in self._bundles(claim, undecided)]:
            chances = self._chances(undecided, bundle)
            gain = sum((chances[claim.id] or 0.0) - (before[claim.id] or 0.0) for claim in undecided)
            rate = gain / max(1e-9, sum(self.work[arm] for arm in bundle))
            if gain >= WORTH and rate > most:
                best, most = bundle, rate
        return best

    def prospect(self, claim: Claim) -> Prospect:
        """What it takes to answer one claim, as `decisive` has it for it alone: the bundle with the best chance for its
        work; where nothing is known yet, all that it reads and what its degrees of freedom lack."""
        waiting = self._waiting(claim)
        if self._is_unknown(claim) or any(self.settings[arm] not in self.tried for arm in waiting):
            kinds = {kind for own in (*claim.needs, *claim.optional) if (kind := self.kinds.get(own))}
            filled = [arm for kind in sorted(kinds) for arm in self._fill(kind, waiting, [claim])]
            return self._prospect([*waiting, *filled], None)
        offers = [
            self._prospect(bundle, self._chances([claim], bundle)[claim.id]) for bundle in self._bundles(claim, [claim])
        ]
        return max(offers, key=lambda own: (own.chance or 0.0) / max(1e-9, own.work), default=Prospect((), 0.0, 0.0))

    def degrees(self, extra: Collection[Arm] = ()) -> dict[str, float]:
        """The degrees of freedom of each kind of cell, with what is chosen and these."""
        seeds = self._seeds(extra)
        kinds = dict.fromkeys(kind for kind in self.kinds.values() if kind)
        return {kind: degrees([own for at, own in seeds.items() if self.kinds[at] == kind]) for kind in kinds}

    def rest(self) -> list[Arm]:
        left = [arm for arm in self.settings if arm not in self.chosen]
        read = {own for claim in self.claims for own in (*claim.needs, *claim.optional)}
        least: dict[Setting, int] = {}
        for arm in self.settings:
            own = self.settings[arm]
            least[own] = min(arm.seed, least.get(own, arm.seed))

        def part(arm: Arm) -> tuple[bool, bool, int, float]:
            own = self.settings[arm]
            further = own in self.tried or arm.seed > least[own]
            return further, own not in read, arm.seed if further else 0, -self.work[arm]

        return sorted(left, key=part)

    def _is_unknown(self, claim: Claim) -> bool:
        finding = self.findings.get(claim.id)
        if finding is None or self.tried.isdisjoint(claim.needs) or not self.tried.issuperset(claim.needs):
            return True
        return bool(finding.verdict == UNDECIDED and finding.outcome and self._chances([claim], ())[claim.id] is None)

    def _waiting(self, claim: Claim) -> list[Arm]:
        read = {*claim.needs, *claim.optional}
        return [arm for arm, own in self.settings.items() if own in read and arm not in self.chosen]

    def _add_cheapest_first(self, claims: Iterable[Claim], arms: Collection[Arm]) -> None:
        allowed, left = set(arms), list(claims)
        while left:
            lacks = [[arm for arm in self._waiting(claim) if arm in allowed] for claim in left]
            cheapest = min(range(len(left)), key=lambda at: sum(self.work[arm] for arm in lacks[at]))
            self.add(lacks[cheapest])
            del left[cheapest]

    def _seeds(self, extra: Collection[Arm]) -> dict[Setting, set[int]]:
        found = {own: set(seeds) for own, seeds in self.there.items()}
        for arm in (*self.chosen, *extra):
            found.setdefault(self.settings[arm], set()).add(arm.seed)
        return found

    def _chances(self, claims: Iterable[Claim], extra: Collection[Arm]) -> dict[str, float | None]:
        """That each claim is decided with what is chosen and these; None for one that has its word or is unknown."""
        seeds, free = self._seeds(extra), self.degrees(extra)
        found: dict[str, float | None] = {}
        for claim in claims:
            finding = self.findings.get(claim.id)
            found[claim.id] = None
            if finding is None or finding.verdict != UNDECIDED or finding.outcome is None:
                continue
            own = [each for each in (*claim.needs, *claim.optional) if self.kinds.get(each) and self.there.get(each)]
            then, now = (sum(1 / len(runs[each]) for each in own) for runs in (seeds, self.there))
            found[claim.id] = finding.outcome.chance(then / now if own else 1.0, free)
        return found

    def _bundles(self, claim: Claim, undecided: Sequence[Claim]) -> list[list[Arm]]:
        """One to all further seeds of a claim's trained arms, each with what brings the degrees of freedom that lack;
        without those that cannot."""
        arms = [arm for arm in self._waiting(claim) if self.kinds[self.settings[arm]]]
        outcome = self.findings[claim.id].outcome
        measured = outcome.measured if outcome else frozenset()
        found = []
        for last in [None, *sorted({arm.seed for arm in arms})]:
            bundle = [arm for arm in arms if last is not None and arm.seed <= last]
            for kind in sorted(measured):
                bundle += self._fill(kind, bundle, undecided)
            if bundle and all(self.degrees(bundle).get(kind, 0) >= ENOUGH for kind in measured):
                found.append(bundle)
        return found

    def _fill(self, kind: str, bundle: Sequence[Arm], undecided: Sequence[Claim]) -> list[Arm]:
        """The arms that bring a kind to ENOUGH degrees of freedom soonest: further seeds of arms that are there, those
        that undecided claims read before others, then arms with all their seeds; the cheapest first."""
        read = {own for claim in undecided for own in (*claim.needs, *claim.optional)}
        seeds = self._seeds(bundle)
        taken = {*self.chosen, *bundle}
        left = [arm for arm, own in self.settings.items() if self.kinds[own] == kind and arm not in taken]
        whole: dict[Setting, float] = defaultdict(float)
        for arm in left:
            whole[self.settings[arm]] += self.work[arm]

        def turn(arm: Arm) -> tuple[bool, bool, int, float, str]:
            own = self.settings[arm]
            if own in seeds:
                return False, own not in read, arm.seed, self.work[arm], ""
            return True, own not in read, 0, whole[own], own.title

        alike = {own: runs for own, runs in seeds.items() if self.kinds[own] == kind}
        found: list[Arm] = []
        for arm in sorted(left, key=turn):
            if degrees(list(alike.values())) >= ENOUGH:
                break
            alike.setdefault(self.settings[arm], set()).add(arm.seed)
            found.append(arm)
        return found

    def _prospect(self, arms: Iterable[Arm], chance: float | None) -> Prospect:
        own = tuple(arms)
        return Prospect(own, sum(self.work[arm] for arm in own), chance)
