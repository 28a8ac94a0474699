"""Numbers and lists in words, the same everywhere."""

import math
from collections.abc import Callable, Sequence

EMPTY = "–"  # what is not there


def number(value: float) -> str:
    """Three significant digits, thousands apart, a true minus: 26.7, 11,900, −0.31, 2.5e+07."""
    if not math.isfinite(value):
        return "∞" if value > 0 else EMPTY
    if value and not 1e-3 <= abs(value) < 1e7:
        text = f"{value:.1e}"
    else:
        rounded = float(f"{value:.3g}")
        digits = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(abs(rounded))))
        text = f"{rounded:,.{digits}f}"
    return text.replace("-", "−") if value < 0 else text


def points(value: float) -> str:
    """One decimal, a true minus, no minus before zero: percent and points of accuracy."""
    return f"{round(value, 1) + 0.0:,.1f}".replace("-", "−")


def nats(value: float) -> str:
    """Three decimals, a true minus, no minus before zero."""
    return f"{round(value, 3) + 0.0:,.3f}".replace("-", "−")


def signed(value: float, form: Callable[[float], str] = number) -> str:
    """The value by `form`, with a plus where it is above zero."""
    return ("+" if value > 0 else "") + form(value)


def percent(share: float) -> str:
    """A share as text: 0.0375 is 3.8%, 0.628 is 63%, 2.06 is 206%, 258 is 25,800%."""
    if abs(share) >= 100:
        return f"{number(100 * share)}%"
    return f"{points(100 * share) if abs(share) < 0.0995 else f'{100 * share:,.0f}'.replace('-', '−')}%"


def markdown(text: str) -> str:
    """The text in Markdown, also in a table: no name of a file is taken for a tag or a column."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def capital(text: str) -> str:
    """With its first letter large, the rest as it is."""
    return text[:1].upper() + text[1:]


def listed(texts: Sequence[str], most: int | None = None) -> str:
    """In a sentence: "a", "a and b", "a, b and c"; of more than `most`, "a, b and 5 more"."""
    if most is not None and len(texts) > most:
        texts = [*texts[:most], f"{len(texts) - most} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
