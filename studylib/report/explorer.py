"""The recommendations to be explored: one part of HTML, without outside resources, of the page and of notebooks.

The rule of recipes.choose is in explorer.js as well, so that sliders change what is recommended where no Python runs.
What it rests on is computed here: whether a recipe is as good as the best depends on how many are compared at once, so
that each pair has the number of comparisons from which on their difference is not sure.
"""

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from studylib.evidence import CONTEXT, SHARE
from studylib.methods import METHODS, Look, method_title
from studylib.report import recipes
from studylib.report.recipes import Candidate, Family
from studylib.study import Record

if TYPE_CHECKING:
    from IPython.display import HTML

MOST = 0.2  # the largest tolerance that can be set
HEIGHT = 900  # pixels in a notebook, until the part says how high it is


def part(records: Sequence[Record]) -> str:
    """The part as HTML; "" where no arm finished. Raises ValueError for records that gather cannot compare."""
    import jinja2

    families = [data(family) for family in recipes.families(records)]
    if not families:
        return ""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("studylib", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("explorer.html.j2").render(
        script=script(), data=as_json(families), most=100 * MOST, usual=100 * SHARE
    )


def explore(records: Sequence[Record]) -> "HTML":
    """In Jupyter: a figure, sliders for bytes and tolerance, and a table to sort and filter, of what records say.

    It stands in a frame of its own, so that the notebook's styles and this one's do not meet, and works in an exported
    HTML page without a kernel. Raises ValueError for records that cannot be compared, and where no arm finished.
    """
    from html import escape

    from IPython.display import HTML

    inside = part(records)
    if not inside:
        raise ValueError("records: no arm finished; there is nothing to explore")
    grow = "new ResizeObserver(() => { frameElement.style.height = document.body.scrollHeight + 40 + 'px'; })"
    page = f"<!doctype html><meta charset=utf-8><body>{inside}<script>{grow}.observe(document.body);</script>"
    frame = f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'
    return HTML(f"<div>{frame}</div>")


def script() -> str:
    """The rule, and what draws it."""
    return resources.files("studylib.report").joinpath("explorer.js").read_text(encoding="utf-8")


def as_json(families: Sequence[dict[str, Any]]) -> str:
    """For a script element, which "</" would end."""
    return json.dumps(families, allow_nan=False).replace("<", "\\u003c")


def data(family: Family) -> dict[str, Any]:
    """What explorer.js knows of a family; candidates by size."""
    ordered, front = recipes.by_size(family), set(family.frontier())
    same = _same(family, ordered)
    return {
        "title": family.title,
        "measure": family.measure.title,
        "reference": ordered.index(family.reference),
        "saving": recipes.SAVING,
        "more": recipes.MORE,
        "limit": recipes.LIMIT,
        "context": f"{CONTEXT:,}",
        "candidates": [_candidate(family, own, own in front) | {"same": same.get(own, {})} for own in ordered],
    }


def _candidate(family: Family, own: Candidate, on_front: bool) -> dict[str, Any]:
    record, look = own.cell.records[0], METHODS[own.arm.method].look if own.arm.method in METHODS else Look()
    far = family.above(own, family.reference)
    trained, effort = own.effort
    return {
        "title": own.title,
        "method": method_title(own.arm.method),
        "size": own.size,
        "loss": family.loss(own),
        "above": [value if math.isfinite(value) else None for value in (far.estimate, far.low, far.high)],
        "trained": trained,
        "minutes": sum(own.minutes.values()),
        "effort": effort,
        "front": on_front,
        "colour": look.colour,
        "hollow": look.hollow,
        "keys": [each.key for each in own.cell.records],
        "arm": json.loads(own.arm.canonical()),
        "metrics": {name: value for name, value in record.metrics.items() if value is not None},
        "phases": {recipes.PHASES[name]: round(value, 2) for name, value in own.minutes.items() if value},
        "peak": round(own.peak, 2),
    }


def _same(family: Family, ordered: Sequence[Candidate]) -> dict[Candidate, dict[int, int]]:
    """For each that is the best of some budget: the others that fit then and are not surely worse, by their place, with
    how many comparisons that takes."""
    found: dict[Candidate, dict[int, int]] = {}
    front = sorted(family.frontier(), key=ordered.index)
    for best, following in zip(front, [*front[1:], None], strict=True):
        end = ordered.index(following) if following else len(ordered)
        own = found.setdefault(best, {})
        for place, other in enumerate(ordered[:end]):
            if other is not best and family.loss(other) <= (1 + MOST) * family.loss(best):
                gap = family.above(other, best)
                counts = range(1, len(ordered) + 1)
                enough = next((n for n in counts if gap.bounds(recipes.comparisons_rate(n))[0] <= 0), None)
                if enough is not None:
                    own[place] = enough
    return found
