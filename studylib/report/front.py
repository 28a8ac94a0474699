"""What the repository's front page and docs/claims.md say of records: written by `make notebooks`, held by a test."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from studylib.config import EMPTY, listed, markdown
from studylib.evidence import NO_DIFFERENCE, NOT_REPRODUCED, NOT_TESTED, REPRODUCED, UNDECIDED, VERDICTS
from studylib.report.ledger import BY_PAPER, Entry, effect_text, ledger_table
from studylib.report.page import SECTIONS
from studylib.study import notebooks as batch

MODEL = "SmolLM2-135M-Instruct"  # of the reference, as people call it
WIDTH = 120  # of a line
SAID = {  # of one claim, of several
    REPRODUCED: ("is reproduced", "are reproduced"),
    NOT_REPRODUCED: ("is not", "are not"),
    NO_DIFFERENCE: ("shows no difference", "show no difference"),
    UNDECIDED: ("is undecided", "are undecided"),
    NOT_TESTED: ("is not tested here", "are not tested here"),
}


def counts(entries: Sequence[Entry]) -> str:
    """The result in a sentence."""
    found = Counter(entry.verdict for entry in entries)
    parts = [f"{found[word]} {SAID[word][found[word] > 1]}" for word in VERDICTS if found[word]]
    return fill(f"**For {MODEL}, of {len(entries)} claims {listed(parts)}.**", WIDTH, break_on_hyphens=False)


def notebook_table(entries: Sequence[Entry], notebooks: Sequence[Path]) -> str:
    """The notebooks in Markdown: the question of each, and the verdicts of its claims."""
    verdicts = {entry.claim.id: entry.verdict for entry in entries}
    rows = ["| Notebook | Question | Its claims |", "| --- | --- | --- |"]
    for notebook in notebooks:
        number, question = batch.question(notebook)
        own = [claim for claim in batch.claims(notebook) if claim in verdicts]
        words = [
            f"{word}: {' '.join(claim for claim in own if verdicts[claim] == word)}"
            for word in VERDICTS
            if word in map(verdicts.get, own)
        ]
        told = f"all {len(entries)}, with [the ledger](docs/claims.md)" if batch.sums_up(notebook) else "; ".join(words)
        rows.append(f"| [{number}](notebooks/{notebook.name}) | {question} | {told} |")
    return "\n".join(rows)


def answer(entries: Sequence[Entry]) -> str:
    """What the reference says of a notebook's claims, in Markdown, for its first screen."""
    told = "reference results, profile `quick`; `Run all` shows them and computes nothing"
    rows = ["| | Claim | Verdict | Found | The paper |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        effect = entry.main.effect
        found = f"{effect_text(effect)} {effect.what}" if effect else EMPTY
        cells = (entry.claim.id, entry.claim.statement, f"**{entry.main.word}**", found, entry.paper)
        rows.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join([f"**The answer for {MODEL}** ({told}):\n", *rows])


def claims_page(entries: Sequence[Entry]) -> str:
    """The ledger as a page in Markdown, paper by paper."""
    parts = ["# Claims", counts(entries)]
    parts.append(
        "`make notebooks` writes this page from the [reference results](../results/reference/README.md). Brackets are "
        "95%\nintervals. [Method](method.md) says how a verdict is made; every rule with all measures stands on the "
        "page of the\nreference results."
    )
    for section in SECTIONS:
        own = [entry for entry in entries if entry.claim in BY_PAPER[section.paper]]
        parts += [f"## {section.paper} ({section.source})", ledger_table(own)]
    return "\n\n".join(parts) + "\n"


def filled(page: str, name: str, content: str) -> str:
    """The page with `content` between its marks <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    return re.sub(f"(?<={begin}).*?(?={end})", lambda _: f"{content}\n", page, flags=re.DOTALL)
