"""The report: one HTML page without outside resources, every sentence and number of it computed from records."""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2

from studylib.arms import corpus_title
from studylib.batch import read_published
from studylib.claims import CLAIMS, Finding, judge
from studylib.comparison import Cell, gather, measures, number
from studylib.records import Record
from studylib.rules import VERDICTS
from studylib.tables import as_html, as_markdown, readable, scoreboard

QUESTIONS = {
    "A4": "Does post-training quantization suffice at 8 bits?",
    "A6": "Does it break at 4-8-4?",
    "A1": "How much does LLM-QAT win back there?",
    "A2": "Is it the 4-bit cache that breaks it?",
    "A3": "With an 8-bit cache, is there little to gain by training?",
    "A7": "Is text that the model wrote better training data than real text?",
    "A8": "Should it be sampled?",
    "A9": "Are soft logits the best target?",
    "A10": "Is MinMax the best grid?",
    "A11": "Does SmoothQuant help before training?",
    "A12": "Do 4-bit activations stay out of reach?",
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
        seeds=sorted({record.arm.seed for record in records if record.arm.training}),
        questions=[(QUESTIONS[name], CLAIMS[name], judge(CLAIMS[name], records)) for name in QUESTIONS],
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
    )
    path = output / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def summary(records: Sequence[Record]) -> str:
    """The answers and the table in Markdown, for a repository page."""
    lines, board = [], scoreboard(records)
    for name, question in QUESTIONS.items():
        findings = judge(CLAIMS[name], records)
        lines += [f"- **{question}** {name}: {overall(findings)}.", *(f"  - {f.sentence}" for f in findings)]
    return "\n".join([*lines, "", as_markdown(readable(board[board["variant"] == ""], tasks=False))])


def overall(findings: Sequence[Finding]) -> str:
    """One line for a claim: its verdict where all measures agree, else how many say what."""
    counts = Counter(finding.verdict for finding in findings)
    if len(counts) == 1:
        return findings[0].verdict
    return ", ".join(f"{verdict} by {counts[verdict]}" for verdict in VERDICTS if counts[verdict])


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
