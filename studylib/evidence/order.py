"""In which order arms are carried out, so that claims are answered early."""

from collections.abc import Callable, Iterable

from studylib.config import Arm
from studylib.evidence.verdicts import Claim
from studylib.methods import Setting


def claims_first(arms: Iterable[Arm], claims: Iterable[Claim], work: Callable[[Arm], int]) -> list[Arm]:
    """The arms, each once: claim by claim, what is answered with the least further work first, then arms that no claim
    reads, those that take longest first. All claims come with one seed before any comes with the next.

    A claim whose arms are not all among them is left out.
    """
    waiting = list(dict.fromkeys(arms))
    settings = {arm: Setting.of(arm) for arm in waiting}
    chosen: dict[Arm, None] = {}
    for seed in sorted({arm.seed for arm in waiting}):
        left = [claim for claim in claims if claim.needs and set(claim.needs) <= set(settings.values())]
        while left:
            lacks = [_of_claim(claim, settings, seed, chosen) for claim in left]
            cheapest = min(range(len(left)), key=lambda at: sum(map(work, lacks[at])))
            chosen |= dict.fromkeys(lacks[cheapest])
            del left[cheapest]
    rest = [arm for arm in waiting if arm not in chosen]
    return [*chosen, *sorted(rest, key=work, reverse=True)]


def _of_claim(claim: Claim, settings: dict[Arm, Setting], seed: int, chosen: dict[Arm, None]) -> list[Arm]:
    """The arms with this seed that a claim reads and that are not chosen yet."""
    read = {*claim.needs, *claim.optional}
    return [arm for arm, own in settings.items() if own in read and arm.seed == seed and arm not in chosen]
