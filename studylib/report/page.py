"""The report: one HTML page without outside resources, every sentence and number of it computed from records."""

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from studylib.config import (
    ALPACA,
    CORPORA,
    MEANINGLESS,
    Arm,
    Evaluation,
    RealText,
    capital,
    is_smoke,
    listed,
    markdown,
    number,
    write_whole,
)
from studylib.evidence import (
    CONTEXT,
    FAMILY,
    FULL,
    LOOKS,
    NOT_TESTED,
    POWER,
    RATE,
    VERDICTS,
    Cell,
    Cells,
    accuracies,
    gather,
    gather_family,
    judge_sizes,
    model_names,
)
from studylib.methods import (
    L4Q_PAPER,
    LLM_QAT_PAPER,
    METHODS,
    PAPERS,
    QLORA_PAPER,
    Setting,
    corpus_title,
    data_title,
    method_title,
    pairs_title,
)
from studylib.report import explorer, recipes
from studylib.report.ledger import (
    BY_PAPER,
    CLAIMS,
    LATER,
    SYMBOLS,
    Entry,
    counted,
    effect_text,
    ledger,
    ledger_table,
    picture,
)
from studylib.report.tables import as_html, as_markdown, family_scoreboard, readable, scoreboard
from studylib.study import Record, RecordError, read_published, webp

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Section:
    """Of a paper on the page. notebooks: the numbers of those whose figures it shows."""

    paper: str
    source: str
    what: str
    notebooks: tuple[str, ...]


SECTIONS = (
    Section(
        LLM_QAT_PAPER,
        "arXiv 2305.17888",
        "quantization-aware training towards the full-precision model, without data",
        ("04", "03", "12", "02", "01"),
    ),
    Section(QLORA_PAPER, "arXiv 2305.14314", "adapters trained on a frozen 4-bit base", ("06", "07")),
    Section(L4Q_PAPER, "arXiv 2402.04902", "adapter and quantization trained as one", ("05", "11", "08")),
    Section(LATER, "QuaRot, SpinQuant, NVFP4", "what the three papers leave open", ("09",)),
)
NO_TEXT = re.compile(r"(<(?:script|style|title|svg|pre)\b.*?</(?:script|style|title|svg|pre)>|<[^>]*>)", re.DOTALL)
WHOLE = re.compile(r"(?<![\w-])(?:\d{1,2}-\d{1,2}-\d{1,2}|W-A-KV|LLM-QAT|QAT?-LoRA)(?![\w-])")
SUMMARY = ("00",)  # the notebook whose figure stands below the ledger
FAMILY_NOTEBOOKS = ("10",)  # whose figures stand on the page of a family
(SIZES_CLAIM,) = (claim for claim in CLAIMS.values() if claim.sizes)


def write_report(
    output: str | Path,
    records: Sequence[Record],
    notebooks: Sequence[Path],
    command: str,
    budget: float | None = None,
    live: bool = False,
) -> Path:
    """Write output/report.html from what the executed `notebooks` published there; returns its path.

    records: all that they used, of one model and one evaluation. command: what makes this report again.
    budget: MB that the recommended recipe may take. live: of a run that is under way, which writes it again.
    """
    output, name = Path(output), records[0].provenance["model"]["name"]
    entries, board = ledger(records), scoreboard(records)
    page = _rendered(
        "report.html.j2",
        model=Path(name).name if Path(name).is_absolute() else name,
        note=records[0].provenance["model"]["note"],
        text={"beginning": "", "date": ""} | records[0].provenance.get("text", {}),
        own=_own_data(records),
        pairs=_pairs(records),
        trained_on=" and ".join({data_title(record.arm): None for record in records if record.arm.training}),
        scored=_scored(records),
        corpora=[corpus_title(corpus) for corpus in _scored(records).corpora],
        trained=_plainest([record.arm for record in records if record.arm.training]),
        tuned=_plainest([record.arm for record in records if record.arm.tuning]),
        seeds=sorted({record.arm.seed for record in records if record.arm.training or record.arm.tuning}),
        counted=counted(entries),
        papers=[section for section in SECTIONS if section.paper != LATER],
        sections=[
            (
                section,
                _claims(section.paper, entries),
                _arms(records, board, section.paper),
                _figures(output, notebooks, section.notebooks),
            )
            for section in SECTIONS
        ],
        further=_arms(records, board),
        overview=_figures(output, notebooks, SUMMARY),
        recipes=[_recipe(found) for found in recipes.recommendations(records, budget)],
        explorer="" if live else explorer.part(records),
        recipes_title=recipes.TITLE,
        sizes=recipes.SIZES,
        rates=_rates(records),
        verdict_class={verdict: f"v{at}" for at, verdict in enumerate(VERDICTS)},
        symbols=SYMBOLS,
        effect_text=effect_text,
        picture=picture,
        power=f"{POWER:.0%}",
        **_made(records, gather(records)),
        notebooks=[path.name for path in notebooks if path.with_suffix(".html").is_file()],
        items=sum(sum(measure.sizes) for measure in accuracies(records)),
        command=command,
        live=live,
        smoke=is_smoke(record.arm.evaluation for record in records),
        meaningless=MEANINGLESS,
        family=FAMILY,
        looks=LOOKS,
        odds=f"{1 / RATE:,.0f}",
    )
    return _written(output, page)


def write_family_report(
    output: str | Path, records: Sequence[Record], judged: Sequence[Record], notebooks: Sequence[Path], command: str
) -> Path:
    """Write output/report.html on several models of one family: the claim about sizes, its figure and all arms.

    records: those of its arms. judged: what the verdict rests on, these and others of the models that tell how far runs
    lie apart. notebooks: those that were executed. command: what makes this report again. Returns its path.
    """
    output, entry = Path(output), Entry(SIZES_CLAIM, tuple(judge_sizes(SIZES_CLAIM, judged)))
    notes = {record.provenance["model"]["note"]: model for model, record in _by_model(records).items()}
    page = _rendered(
        "family.html.j2",
        model=" and ".join(_by_model(records)),
        smoke=is_smoke(record.arm.evaluation for record in records),
        meaningless=MEANINGLESS,
        live=False,
        names=list(_by_model(records)),
        notes=[f"{model} is {note}" for note, model in notes.items() if note],
        entry=entry,
        verdict_class={verdict: f"v{at}" for at, verdict in enumerate(VERDICTS)},
        symbols=SYMBOLS,
        odds=f"{1 / RATE:,.0f}",
        figures=_figures(output, notebooks, FAMILY_NOTEBOOKS),
        table=as_html(readable(family_scoreboard(records), tasks=False)),
        scored=_scored(records),
        context=CONTEXT,
        **_made(records, gather_family(records)),
        notebooks=[path.name for path in notebooks if path.with_suffix(".html").is_file()],
        command=command,
    )
    return _written(output, page)


def _by_model(records: Sequence[Record]) -> dict[str, Record]:
    """A record of each model, by its name beside the others, the smallest first."""
    names = model_names({record.arm.model: None for record in records})
    found = {names[record.arm.model]: record for record in records}
    return {own.model: found[own.model] for own in gather_family(records)}


def _made(records: Sequence[Record], cells: Cells) -> dict[str, Any]:
    """What the arms of a page cost, and where they come from."""
    return {
        "cost": [_cost(cell) for cell in cells.values()],
        "total_minutes": number(sum(sum(record.cost["seconds"].values()) for record in records) / 60),
        "peak": number(max(record.cost["peak_bytes"] for record in records) / 2**30),
        "sources": _sources(records),
        "machine": _machine(records),
    }


def _rendered(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("studylib", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def unbroken(page: str) -> str:
    """The page with bits such as 4-8-4, and names such as LLM-QAT, in its text kept on one line, by style alone: they
    are found and copied as they were."""
    parts = NO_TEXT.split(page)  # text, what is none, text, ...
    parts[::2] = [WHOLE.sub(r'<span class="bits">\g<0></span>', text) for text in parts[::2]]
    return "".join(parts)


def _written(output: Path, page: str) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.html"
    write_whole(path, unbroken(page))
    return path


def _scored(records: Sequence[Record]) -> Evaluation:
    """Of what the arms are scored on, the most that one of them is."""
    wanted = [record.arm.evaluation for record in records]
    return max(wanted, key=lambda own: sum(map(bool, (own.corpora, own.tasks, own.pairs))))


def _plainest(arms: Sequence[Arm]) -> Arm | None:
    """The first of those that differ in the least from what their method does by default."""
    return min(arms, key=lambda arm: len(Setting.of(arm).changes), default=None)


def _pairs(records: Sequence[Record]) -> str:
    """What the instruction pairs are called that arms learn from or are scored on."""
    learned = [record.arm.instructions.source for record in records if record.arm.instructions]
    return pairs_title((learned or [_scored(records).instructions])[0])


def _own_data(records: Sequence[Record]) -> str:
    """Which files of one's own the arms read, and what these are for; empty where they read none."""
    arms = [record.arm for record in records]
    texts = [corpus_title(corpus) for corpus in _scored(records).corpora if corpus not in CORPORA]
    learned = sorted(
        {corpus_title(arm.data.corpus) for arm in arms if isinstance(arm.data, RealText) and arm.data.usual}
    )
    parts = [f"perplexity is of {listed(texts)}"] if texts else []
    parts += [f"instruction pairs are those of {_pairs(records)}"] if _pairs(records) != pairs_title(ALPACA) else []
    parts += [f"methods are calibrated and trained on {listed(learned)}"] if learned else []
    return capital("; ".join(parts))


def _claims(paper: str, entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.claim in BY_PAPER[paper]]


def _arms(records: Sequence[Record], board: "pd.DataFrame", paper: str | None = None) -> str:
    """The table of the methods of a paper, or of those that are of none, beside full precision; empty where none of
    them was run. board: the scoreboard of all records."""
    methods = [setting.method for setting in gather(records)]  # of its rows
    own = [paper in _papers(name) if paper else not _papers(name) for name in methods]
    if not any(own):
        return ""
    shown = board[[mine or name == FULL.method for mine, name in zip(own, methods, strict=True)]]
    return as_html(readable(shown.reset_index(drop=True), tasks=False))


def _papers(method: str) -> set[str]:
    """Those of PAPERS that the method belongs to."""
    return set(METHODS[method].papers).intersection(PAPERS) if method in METHODS else set()


def summary(records: Sequence[Record], budget: float | None = None) -> str:
    """The ledger, the recipe for `budget` MB, every finding and the table in Markdown, for a repository page."""
    entries, board = ledger(records), scoreboard(records)
    found = [f"**{MEANINGLESS}**\n"] * is_smoke(record.arm.evaluation for record in records) + [
        ledger_table(entries),
        "",
    ]
    found += [f"## {recipes.TITLE}\n", recipes.as_markdown_section(records, budget), ""]
    for section in SECTIONS:
        found.append(f"## {section.paper} ({section.source})\n")
        for entry in _claims(section.paper, entries):
            if entry.verdict != NOT_TESTED:
                found += [f"- **{entry.claim.id}, {entry.claim.statement}.** Rule: {markdown(entry.claim.rule)}."]
                found += [f"  - {markdown(finding.sentence)}" for finding in entry.findings]
        found.append("")
    return "\n".join([*found, "## All arms\n", as_markdown(readable(board, tasks=False))])


def family_summary(judged: Sequence[Record]) -> str:
    """What records of several models say of the claim about sizes, in Markdown, with its rule."""
    found = [finding.sentence for finding in judge_sizes(SIZES_CLAIM, judged)]
    lines = [f"**{SIZES_CLAIM.id}, {SIZES_CLAIM.statement}.** Rule: {SIZES_CLAIM.rule}.", *found]
    return "\n".join(f"{'  ' * bool(at)}- {markdown(line)}" for at, line in enumerate(lines))


def _recipe(found: recipes.Recommendation) -> dict[str, str]:
    from studylib.report.recipes import frontier_figure  # matplotlib, which the page's text needs not

    table = recipes.frontier_table(found)
    return {
        "title": found.family.title,
        "headline": found.headline,
        "details": found.details,
        "image": base64.b64encode(webp(frontier_figure(found))).decode(),
        "alt": f"{found.headline} The best of their size: {', '.join(table['Recipe'])}.",
        "table": as_html(table),
    }


def _rates(records: Sequence[Record]) -> str:
    """The learning rate of each method that was fine-tuned."""
    rates = {method_title(r.arm.method): r.arm.tuning.learning_rate for r in records if r.arm.tuning}
    return ", ".join(f"{rate:g} ({title})" for title, rate in rates.items())


def _figures(output: Path, notebooks: Sequence[Path], numbers: Sequence[str]) -> list[dict[str, str]]:
    """What the notebooks of these numbers published, in the order of the numbers."""
    stems = sorted(path.stem for path in notebooks)
    return [
        {
            "title": title,
            "notebook": stem,
            "image": _webp(output / stem / f"{name}.webp", stem),
            "file": f"{stem}/{name}.webp",
        }
        for prefix in numbers
        for stem in stems
        if stem.startswith(f"{prefix}_")
        for name, title in read_published(output, stem)["figures"].items()
    ]


def _webp(path: Path, notebook: str) -> str:
    """A picture as it was published, in base64; RecordError for a file that is none, or not a whole one."""
    try:
        data = path.read_bytes()
        if (data[:4], data[8:12]) != (b"RIFF", b"WEBP"):
            raise ValueError("it does not begin as a WebP does")
        if (size := int.from_bytes(data[4:8], "little") + 8) != len(data):
            raise ValueError(f"it has {len(data):,} of {size:,} bytes")
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is no picture ({error}); run {notebook} again") from error
    return base64.b64encode(data).decode()


def _cost(cell: Cell) -> dict[str, str]:
    runs = (*cell.records, *cell.diverged)
    seconds: Counter[str] = Counter()
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


def _sources(records: Sequence[Record]) -> dict[str, str]:
    """The weights and corpora, by their hashes."""
    corpora, on_text = _scored(records).corpora, [record for record in records if record.arm.evaluation.corpora]
    further = {
        path: found
        for record in records
        for path, found in record.provenance.get("contents", {}).items()
        if path != record.arm.model
    }
    return {
        "Weights": _all_values(records, "model", "name"),
        "Weights, SHA-256": _all_values(records, "model", "sha256"),
        **{f"{corpus_title(corpus)}, SHA-256": _all_values(on_text, "corpora", corpus) for corpus in corpora},
        **{f"{PurePath(path).name}, SHA-256": found for path, found in sorted(further.items()) if path not in corpora},
    }


def _machine(records: Sequence[Record]) -> dict[str, str]:
    """Hardware, versions and times."""
    finished = [record.provenance["finished"] for record in records]
    processor, cores = (_all_values(records, "hardware", name) for name in ("processor", "cores"))
    return {
        "Processor": f"{processor}, {cores} threads",
        "Accelerator": _all_values(records, "hardware", "accelerator").replace("null", "none"),
        "Products computed in": _all_values(records, "compute_dtype"),
        "Commit": f"{_all_values(records, 'commit')}{_uncommitted(records)}",
        "Python": _all_values(records, "python"),
        **{name: _all_values(records, "libraries", name) for name in ("torch", "transformers", "lm-eval")},
        "Finished": f"{min(finished)} to {max(finished)}",
    }


def _uncommitted(records: Sequence[Record]) -> str:
    count = sum(bool(record.provenance["dirty"]) for record in records)
    return f"; {count} of {len(records)} records are of changes that were not committed" if count else ""


def _all_values(records: Sequence[Record], *path: str) -> str:
    """A part of the provenance: all values that occur."""
    found = []
    for record in records:
        value: Any = record.provenance
        for name in path:
            value = value[name]
        found.append(value if isinstance(value, str) else json.dumps(value))
    return ", ".join(dict.fromkeys(found))
