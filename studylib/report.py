"""The report: one HTML page without outside resources, every sentence and number of it computed from records."""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2

from studylib.arms import TITLES, corpus_title
from studylib.batch import read_published
from studylib.claims import CLAIMS
from studylib.comparison import Cell, capital, gather, measures, number
from studylib.judging import FAMILY, Claim, Finding, judge
from studylib.records import Record
from studylib.rules import INCONCLUSIVE, NOT_TESTED, VERDICTS
from studylib.tables import as_html, as_markdown, readable, scoreboard

PAPERS = {
    "A": ("LLM-QAT", "arXiv 2305.17888", "quantization-aware training towards the full-precision model, without data"),
    "B": ("QLoRA", "arXiv 2305.14314", "adapters trained on a frozen 4-bit base"),
    "C": ("L4Q", "arXiv 2402.04902", "adapter and quantization trained as one"),
}


def write_report(output: str | Path, records: Sequence[Record], notebooks: Sequence[Path], command: str) -> Path:
    """Write output/report.html from what the executed `notebooks` published there; returns its path.

    records: all that they used, of one model and one evaluation. command: what makes this report again.
    """
    output, name = Path(output), records[0].provenance["model"]["name"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("studylib", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        model=Path(name).name if Path(name).is_absolute() else name,
        note=records[0].provenance["model"]["note"],
        arm=records[0].arm,
        corpora=[corpus_title(corpus) for corpus in records[0].arm.evaluation.corpora],
        trained=next((r.arm for r in sorted(records, key=lambda r: r.arm.variant) if r.arm.training), None),
        tuned=next((r.arm for r in sorted(records, key=lambda r: r.arm.variant) if r.arm.tuning), None),
        seeds=sorted({record.arm.seed for record in records if record.arm.training or record.arm.tuning}),
        papers=ledger(records),
        rates=_rates(records),
        overall=overall,
        verdict_class={verdict: f"v{at}" for at, verdict in enumerate(VERDICTS)},
        table=as_html(readable(scoreboard(records), tasks=False)),
        figures=[figure for notebook in notebooks for figure in _figures(output, notebook.stem)],
        cost=[_cost(cell) for cell in gather(records).values()],
        total_minutes=number(sum(sum(record.cost["seconds"].values()) for record in records) / 60),
        peak=number(max(record.cost["peak_bytes"] for record in records) / 2**30),
        provenance=_shared_provenance(records),
        notebooks=[path.name for path in notebooks],
        items=sum(measures(records)[-1].sizes) if measures(records) else 0,
        command=command,
        family=FAMILY,
    )
    path = output / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def ledger(records: Sequence[Record]) -> list[tuple[tuple[str, str, str], list[tuple[Claim, list[Finding]]]]]:
    """Every paper with its claims and what the records say of each."""
    return [
        (paper, [(claim, judge(claim, records)) for claim in CLAIMS.values() if claim.id.startswith(letter)])
        for letter, paper in PAPERS.items()
    ]


def ledger_table(records: Sequence[Record]) -> str:
    """The ledger as a Markdown table: each claim, its verdict, and the finding that says most of it."""
    rows = ["| | Claim | Verdict | Found |", "| --- | --- | --- | --- |"]
    for _, judged in ledger(records):
        for claim, findings in judged:
            telling = next((f for f in findings if f.verdict not in (INCONCLUSIVE, NOT_TESTED)), findings[0])
            rows.append(f"| {claim.id} | {claim.statement} | {overall(findings)} | {_found(telling)} |")
    return "\n".join(rows)


def _found(finding: Finding) -> str:
    """The finding's sentence without its verdict, which stands beside it."""
    return finding.sentence.removesuffix(f" {capital(finding.verdict)}.").removeprefix(f"{capital(finding.verdict)}: ")


def summary(records: Sequence[Record]) -> str:
    """The ledger, every finding and the table in Markdown, for a repository page."""
    found, board = [ledger_table(records), ""], scoreboard(records)
    for (name, source, _), judged in ledger(records):
        found.append(f"## {name} ({source})\n")
        for claim, findings in judged:
            if any(finding.verdict != NOT_TESTED for finding in findings):
                found += [f"- **{claim.id}, {claim.statement}.** Rule: {claim.rule}."]
                found += [f"  - {finding.sentence}" for finding in findings]
        found.append("")
    return "\n".join([*found, "## All arms\n", as_markdown(readable(board, tasks=False))])


def overall(findings: Sequence[Finding]) -> str:
    """One line for a claim: its verdict where all measures agree, else how many say what."""
    counts = Counter(finding.verdict for finding in findings)
    if len(counts) == 1:
        return findings[0].verdict
    return ", ".join(f"{verdict} by {counts[verdict]}" for verdict in VERDICTS if counts[verdict])


def _rates(records: Sequence[Record]) -> str:
    """The learning rate of each method that was fine-tuned."""
    rates = {TITLES[r.arm.method]: r.arm.tuning.learning_rate for r in records if r.arm.tuning}
    return ", ".join(f"{rate:g} ({title})" for title, rate in rates.items())


def _figures(output: Path, notebook: str) -> list[dict[str, str]]:
    titles = read_published(output, notebook)["figures"]
    return [
        {
            "title": title,
            "notebook": notebook,
            "image": base64.b64encode((output / notebook / f"{name}.svg").read_bytes()).decode(),
            "png": f"{notebook}/{name}.png",
        }
        for name, title in titles.items()
    ]


def _cost(cell: Cell) -> dict[str, str]:
    runs = (*cell.records, *cell.diverged)
    seconds = Counter()
    for record in runs:
        seconds.update(record.cost["seconds"])
    return {
        "title": cell.title,
        "minutes": number(sum(seconds.values()) / 60),
        "phases": ", ".join(f"{phase} {number(value)} s" for phase, value in seconds.items()),
        "tokens": f"{sum(sum(record.cost['tokens'].values()) for record in runs):,}",
        "peak": number(max(record.cost["peak_bytes"] for record in runs) / 2**30),
        "keys": ", ".join(record.key for record in runs),
    }


def _shared_provenance(records: Sequence[Record]) -> dict[str, str]:
    """Provenance that can differ between records, all values that occur."""

    def values(*path: str) -> str:
        found = []
        for record in records:
            value = record.provenance
            for name in path:
                value = value[name]
            found.append(value if isinstance(value, str) else json.dumps(value))
        return ", ".join(dict.fromkeys(found))

    return {
        "Commit": f"{values('commit')} (changes not committed: {values('dirty')})",
        "Processor": f"{values('hardware', 'processor')}, {values('hardware', 'cores')} threads",
        "Accelerator": values("hardware", "accelerator").replace("null", "none"),
        "Products computed in": values("compute_dtype"),
        "Python": values("python"),
        "torch": values("code", "torch"),
        "transformers": values("code", "transformers"),
        "lm-eval": values("code", "lm-eval"),
        "Weights": values("model", "name"),
        "Weights, SHA-256": values("model", "sha256"),
        **{
            f"{corpus_title(corpus)}, SHA-256": values("corpora", corpus)
            for corpus in records[0].arm.evaluation.corpora
        },
        "Finished": f"{min(r.provenance['finished'] for r in records)} to "
        f"{max(r.provenance['finished'] for r in records)}",
    }
