"""The command `study`: run notebooks, decide claims, list, show, export, verify and clear results, plan memory."""

import argparse
import atexit
import contextlib
import functools
import gc
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studylib.config import Arm
    from studylib.evidence import Claim, Finding
    from studylib.study import Record, Store

atexit.register(gc.freeze)  # else the collector walks through all libraries at the exit, for two seconds

SEARCH, RATES = "search", "rates.json"  # in the place of a file of rates; where the search writes them
PHASES = ("load", "data", "quantize", "train", "evaluate", "decode")  # of an arm, as records time them
SEEDS = 3  # that `study decide` takes from: verdicts allow for so many looks
LONGEST = 200  # characters of a family's names in the name of its folder
TOLD = 5  # files that cannot be read are named one by one up to so many
PARTS = ("models", "data", "checkpoints", "adapters")  # that `study clean` removes
FORMATS = ("gguf", "compressed-tensors", "bnb", "peft", "safetensors")  # of `study export`
OWN_FILES = (".txt", ".jsonl", ".json")  # as names of corpora and instruction pairs of one's own end
MODEL = "smollm2-135m"  # where none is named
OPTIONS = {name: f"--{name}" for name in ("model", "profile", "seeds", "jobs", "scheduler", "results")} | {
    "models": "--model, once for each",
    "compute": "--anew, or leave it out",
    "output": "--output, or --results, in which each run has its folder",
    "own": "--pairs, --text, --training-text, --tasks, --windows, --items or --scored-pairs",
}  # notebook parameters that `study run` sets from its own options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study", description=__doc__.split(":", 1)[1].strip().capitalize())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run notebooks through papermill and write the report")
    run.add_argument(
        "--notebooks", nargs="+", action="extend", default=[], metavar="NN", help="numbers or names (default: all)"
    )
    run.add_argument(
        "--target-claims",
        nargs="+",
        action="extend",
        default=[],
        metavar="ID",
        help="only arms that these claims read, further seeds only where they may decide one, e.g. C1 A3",
    )
    run.add_argument("--dry-run", action="store_true", help="only tell which arms are missing and how long they take")
    run.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="default: the profile's own")
    run.add_argument(
        "--model",
        action="append",
        dest="models",
        default=[],
        metavar="NAME",
        help="a known name, a local folder or a hub id; again for each further size of a family, which A5 compares "
        f"(default: {MODEL})",
    )
    _computing(run)
    decide = commands.add_parser("decide", help="spend time on the claims that are named, and tell their verdicts")
    decide.add_argument("claims", nargs="+", metavar="CLAIM", help="as the ledger names them, e.g. C1 A3")
    decide.add_argument("--model", default=MODEL, help="a known name, a local folder or a hub id")
    decide.add_argument(
        "--seeds", type=int, nargs="+", default=[], metavar="N", help=f"to take from (default: 0 to {SEEDS - 1})"
    )
    _computing(decide)
    rates = commands.add_parser("rates", help="search the learning rates of a model and write them to a file")
    rates.add_argument(
        "--notebooks", nargs="+", action="extend", default=[], metavar="NN", help="whose arms (default: all)"
    )
    rates.add_argument("--profile", default="quick", help="budget: smoke, quick, full or paper (default: quick)")
    rates.add_argument("--model", default=MODEL, help="a known name, a local folder or a hub id")
    _own_data(rates)
    rates.add_argument("--cases", nargs="+", default=[], metavar="TEXT", help="those with it in their name: 'l4q 3-16'")
    rates.add_argument("--output", type=_path, required=True, metavar="FILE", help="for `study run --rates FILE`")
    _jobs(rates)
    _scheduler(rates)
    _results(rates)
    listing = commands.add_parser("list", help="list the records of a results folder")
    listing.add_argument("--csv", type=_path, metavar="FILE", help="write them with all their metrics to a file")
    listing.add_argument("--times", action="store_true", help="with seconds by phase, and what no claim reads")
    _results(listing)
    clean = commands.add_parser(
        "clean", help="remove what records do not need: kept models, text, checkpoints, adapters"
    )
    clean.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)} (all)"
    )
    _results(clean)
    show = commands.add_parser("show", help="show one record")
    show.add_argument("record", metavar="RECORD", help="its key or the beginning of it")
    _results(show)
    export = commands.add_parser("export", help="write the model of a record in a format that transformers loads")
    export.add_argument("record", metavar="RECORD", help="its key or the beginning of it")
    export.add_argument("--output", type=_path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument("--scored", action="store_true", help="score what was written, as `study run-check` does later")
    export.add_argument("--format", choices=FORMATS, help="default: the one that holds what was scored")
    export.add_argument(
        "--base-id",
        metavar="ID",
        help="the public name of the model it was made of, e.g. owner/name (default: its own)",
    )
    _results(export)
    check = commands.add_parser("run-check", help="run an exported model in every engine that is installed")
    check.add_argument("folder", type=_path, metavar="FOLDER", help="what `study export` wrote")
    check.add_argument(
        "--base", metavar="MODEL", help="of an adapter: its base, as --model names it (default: by its id)"
    )
    report = commands.add_parser("report", help="write the report of a finished run again, or print it as Markdown")
    report.add_argument(
        "--output", type=_path, default=Path("results/runs/quick-smollm2-135m"), help="the run's folder"
    )
    report.add_argument("--format", choices=("html", "md"), default="html", help="default: html")
    _budget(report)
    verify = commands.add_parser("verify", help="run arms of the reference results again and compare")
    verify.add_argument("--reference", type=_path, metavar="FOLDER", help="default: the results in the repository")
    verify.add_argument(
        "--arms", nargs="+", default=[], metavar="TEXT", help="those with it in their title, as in `study list`"
    )
    verify.add_argument("--minutes", type=float, default=15, help="else what took so long there (default: 15)")
    _jobs(verify)
    _scheduler(verify)
    _results(verify)
    plan = commands.add_parser("plan", help="the memory that a fine-tuning would take, without any weights")
    plan.add_argument(
        "--model",
        required=True,
        metavar="CONFIG",
        help="llama-7b, -13b, -33b, -65b, llama-2-7b, open-llama-3b, a config.json, a folder or a hub id",
    )
    plan.add_argument("--method", default="qlora", help="lora, qlora, qa-lora, qat-lora, l4q or qat (default: qlora)")
    plan.add_argument("--bits", type=int, default=4, help="of the weights (default: 4)")
    plan.add_argument("--group", type=int, default=64, help="weights that share a scale (default: 64)")
    plan.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    plan.add_argument("--batch", type=int, default=1, help="sequences in one step (default: 1)")
    plan.add_argument("--sequence", type=int, default=512, metavar="TOKENS", help="their length (default: 512)")
    plan.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    return parser


def _computing(parser: argparse.ArgumentParser) -> None:
    """The options of the commands that carry out arms and write the page."""
    parser.add_argument("--anew", action="store_true", help="compute arms that are in the reference results as well")
    parser.add_argument("--profile", default="quick", help="budget: smoke, quick, full or paper (default: quick)")
    parser.add_argument(
        "--rates",
        default="",
        metavar="FILE",
        help=f"learning rates that `study rates` chose, or `{SEARCH}` to choose them first (default: the committed)",
    )
    _jobs(parser)
    _scheduler(parser)
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="begin no further arm after so long, and write the page of what is there",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="further notebook parameters, values in YAML, e.g. settings='[8-8-8, 4-8-4]'",
    )
    parser.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="tell each training's curve, loss and rate to tensorboard, mlflow or wandb, in the folder trackers of "
        "--results",
    )
    _own_data(parser)
    _budget(parser)
    parser.add_argument("--output", type=_path, metavar="FOLDER", help="of the page (default: in --results)")
    _results(parser)


def _own_data(parser: argparse.ArgumentParser) -> None:
    """Data of one's own, in the place of the profile's; what each is, studylib.config.OWN_DATA says."""
    own = parser.add_argument_group("data of your own, in the place of the profile's")
    own.add_argument("--pairs", metavar="FILE", help="instruction pairs, .json or .jsonl, learned and scored")
    own.add_argument("--text", nargs="+", metavar="FILE", help="text that perplexities are of, .txt or .jsonl")
    own.add_argument("--training-text", metavar="FILE", help="in the place of the text that the model writes itself")
    own.add_argument("--tasks", nargs="+", metavar="NAME", help="benchmarks, e.g. arc_easy piqa")
    own.add_argument("--windows", type=int, metavar="N", help="windows of each text that are scored")
    own.add_argument("--items", type=int, metavar="N", help="items of each task that are scored")
    own.add_argument("--scored-pairs", type=int, metavar="N", help="held-out pairs that are scored")


def _own(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of data of one's own, as notebooks take it. ValueError for what cannot be."""
    from studylib.config import OWN_DATA, located

    given = {name: getattr(options, name) for name in OWN_DATA}
    return located({name: value for name, value in given.items() if value is not None})


def _path(text: str) -> Path:
    """An empty one, of a variable that is not set, would be the working directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def _scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="of a dask cluster that computes in the place of this machine, tcp://HOST:PORT, or its scheduler file "
        "(docs/scaling.md)",
    )


def _jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="arms computed at a time (default: 1)")


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget-mb",
        type=float,
        metavar="MB",
        help="what the recommended recipe may take (default: the smallest within 5%% of 16 bits)",
    )


def _results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=_path, default=Path("results/runs"), help="default: results/runs")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 if a notebook failed, 2 for input that cannot be used, 130 after
    Ctrl-C, 143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _COMMANDS[options.command](options, arguments)
    except ValueError as error:
        _say(error)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = error.filename2 or error.filename  # what was to be replaced, if something was
        _say(f"{where}: {error.strerror}" if where else error)
        return 2
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would meet what libraries do at the exit
        _say("interrupted; the same command goes on from here")
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _deadline(minutes: float | None) -> float:
    """When so many minutes from now are over; ValueError for a number that is not above 0."""
    if minutes is None:
        return math.inf
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes: {minutes:g} is not allowed; use a number above 0")
    return time.time() + 60 * minutes


def _interrupt(number: int, frame: Any) -> None:
    """Stop as Ctrl-C does, so that workers and kernels are stopped as well."""
    raise KeyboardInterrupt(number)


def _say(what: object) -> None:
    """One line to people, of whatever length an error has."""
    print("study:", *str(what).splitlines(), file=sys.stderr)


@dataclass
class _Study:
    """What `study run` and `study decide` were asked for of one model, or of a family, checked.

    name: of what is studied, as it was given; models: the same, from any folder. parameters: all that are set;
    assigned: which of them each notebook has.
    """

    options: argparse.Namespace
    command: str
    until: float
    name: str
    models: list[str]
    output: Path
    notebooks: list[Path]
    parameters: dict[str, Any]
    assigned: dict[Path, dict[str, Any]]
    waits: bool = False  # arms do, for want of time

    @property
    def over(self) -> bool:
        """Whether no time is left for more."""
        return self.waits or time.time() > self.until

    @functools.cached_property
    def store(self) -> "Store":
        """Made when it is first asked for: what is refused before leaves no folder."""
        from studylib.study import REFERENCE, Store

        return Store(self.options.results.resolve(), None if self.options.anew else REFERENCE)

    @property
    def shared(self) -> list[Path]:
        """The notebooks whose arms are computed together, before any is executed."""
        return [notebook for notebook in self.notebooks if "jobs" in self.assigned[notebook]]

    @property
    def elsewhere(self) -> bool:
        """Whether other machines compute, whose hardware is another."""
        return bool(self.options.scheduler)

    def show(self, records: "list[Record]") -> None:
        """Write the page while arms are carried out."""
        from studylib.report import page

        page.write_report(self.output, records, [], self.command, self.options.budget_mb, live=True)

    def left(self, what: str) -> None:
        _say(f"after {self.options.minutes:g} minutes {what}; the same command goes on from here")


def _further(options: argparse.Namespace, notebooks: Sequence[Path]) -> dict[str, Any]:
    """The notebook parameters of --set. ValueError for what is none of any notebook, and for the other options that
    are wrong whatever the model is."""
    from studylib.config import REPORT_TO, check_jobs, check_scheduler, profile, wanted_trackers
    from studylib.report import recipes
    from studylib.study import notebooks as batch

    recipes.check_budget(options.budget_mb)
    profile(options.profile).with_own(_own(options))
    check_jobs(options.jobs)
    check_scheduler(options.scheduler)
    if options.report_to and options.scheduler:
        raise ValueError(
            f"--report-to: the workers of {options.scheduler} train; set {REPORT_TO} where they are started"
        )
    if options.report_to:
        os.environ[REPORT_TO] = ",".join(options.report_to)  # which kernels and workers inherit
    wanted_trackers()
    found = {}
    for text in options.set:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set: {text!r} is not NAME=VALUE")
        if name in OPTIONS:
            raise ValueError(f"--set: {name!r} is not allowed; use {OPTIONS[name]}")
        found[name] = _value(text, value)
    batch.check_names(notebooks, found)
    return found


def _study(
    options: argparse.Namespace,
    arguments: list[str],
    named: Sequence[str],
    notebooks: list[Path],
    output: Path,
    until: float,
    seeds: Sequence[int],
    further: Mapping[str, Any],
) -> _Study:
    """What is asked for by notebooks of one model, or of several by those that take a family, checked.

    named: the models as they were given. further: parameters of these or of other notebooks.
    """
    from studylib.config import find_rates, profile
    from studylib.data import models
    from studylib.study import ALL, MISSING, check_own_data
    from studylib.study import notebooks as batch

    names = [models.absolute_name(model) for model in named]
    taken = {name for notebook in notebooks for name in batch.default_parameters(notebook)}
    parameters: dict[str, Any] = {"models": names} if "models" in taken else {"model": names[0]}
    own = _own(options)
    own_budget = profile(options.profile).with_own(own)
    parameters |= {"profile": options.profile, "results": str(options.results.resolve())}
    parameters |= {"output": str(output.resolve())} | {name: further[name] for name in further if name in taken}
    if seeds or "seeds" in taken:
        parameters["seeds"] = list(seeds or profile(options.profile).seeds)
    if "compute" in taken:
        parameters["compute"] = ALL if options.anew else MISSING
    if own:
        parameters["own"] = own
    if "jobs" in taken:
        parameters |= {"jobs": options.jobs, "scheduler": _placed(options.scheduler)}
    if "rates" in taken and options.rates not in ("", SEARCH):
        own_budget.with_rates(find_rates(names[0], options.profile, options.rates))  # before any work
        parameters["rates"] = str(Path(options.rates).resolve())
    assigned = batch.assign_parameters(notebooks, parameters)
    for model in named:
        models.load_config(model)
        if own:
            check_own_data(own_budget, model)
    command, name = shlex.join(["study", *arguments]), ", ".join(named)
    return _Study(options, command, until, name, names, output.resolve(), notebooks, parameters, assigned)


def _with_rates(study: _Study) -> bool:
    """Search the rates of each model where that was asked for; False where the minutes were over then."""
    from studylib.config import find_rates, listed
    from studylib.study import notebooks as batch

    options, notebooks, results = study.options, study.notebooks, study.store.folder
    taken = any(batch.default_parameters(notebook).keys() & {"rates", "rate_files"} for notebook in notebooks)
    searches = taken and options.rates == SEARCH
    usual = taken and not searches and not all(find_rates(m, options.profile, options.rates) for m in study.models)
    trained = [arm for arm in _arms(notebooks, study.assigned) if arm.budget] if searches or usual else []
    several = len(study.models) > 1
    folders = [_folder(options, [model], several) for model in study.models] if several else [study.output]
    files = [folder / RATES for folder in folders]
    if searches and trained:
        for model, file in zip(study.models, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            own = [arm for arm in trained if arm.model == model]
            if not _search(own, model, options, results, file, until=study.until):
                study.left("learning rates are still searched")
                return False
    elif searches:
        print(f"no arm of {listed([n.stem for n in notebooks])} is trained: no rates to search", file=sys.stderr)
    elif trained:
        print(f"learning rates are each method's usual ones; --rates {SEARCH} chooses them first", file=sys.stderr)
    if searches and all(file.exists() for file in files):
        found = [str(file.resolve()) for file in files]
        rates = {"rate_files": found} if several else {"rates": found[0]}
        study.assigned = batch.assign_parameters(notebooks, study.parameters | rates)
    return True


def _arms(notebooks: Sequence[Path], assigned: dict[Path, dict[str, Any]]) -> "list[Arm]":
    """Those of all notebooks that can say what they are: the others say what is wrong when they are executed."""
    from studylib.study import notebooks as batch

    found: list[Arm] = []
    for notebook in notebooks:
        with contextlib.suppress(Exception):
            found += batch.wanted_arms(notebook, assigned[notebook])
    return found


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.report import deciding
    from studylib.study import notebooks as batch

    models, until = options.models or [MODEL], _deadline(options.minutes)
    several, targets = len(models) > 1, deciding.named(options.target_claims)
    if options.dry_run and options.rates == SEARCH:
        raise ValueError(f"dry-run: --rates {SEARCH} would search first; leave it out")
    notebooks = _notebooks(options, family=several)
    own, of_family = ([n for n in notebooks if batch.takes_family(n) == wanted] for wanted in (False, True))
    if of_family and not several:
        raise ValueError(f"notebooks: {of_family[0].stem} takes {batch.FAMILY}")
    further = _further(options, notebooks)
    print(f"{', '.join(models)} at {options.profile}: reading what {len(notebooks)} notebooks ask for", file=sys.stderr)
    if several:
        from studylib.data import check_family  # with torch and transformers, which take seconds

        check_family(models)
        if options.rates not in ("", SEARCH):
            raise ValueError(f"rates: {options.rates!r} is of one model; with several use {SEARCH}, or leave it out")
        if targets:
            of_family = of_family if any(claim.sizes for claim in targets) else []
            targets = [claim for claim in targets if not claim.sizes]
            own = own if targets else []
    asked = [([model], [*own]) for model in models if own] + [(models, of_family)] * bool(of_family)
    if not asked:
        raise ValueError(f"notebooks: {batch.SIZES} reads no arm of {' '.join(options.target_claims)}; name others too")
    studies = [
        _study(options, arguments, named, chosen, _folder(options, named, several), until, options.seeds, further)
        for named, chosen in asked
    ]
    if options.dry_run:
        for study in studies:
            _tell_missing(study, targets)
        return 0
    if not all(map(_with_rates, studies)):
        return 0
    if not (several or options.notebooks):
        print(f"{batch.SIZES} is left out: it takes {batch.FAMILY}", file=sys.stderr)
    if options.training_text and not options.notebooks:
        print(f"{batch.TEXTS} is left out: it compares texts that methods are trained on", file=sys.stderr)
    for at, study in enumerate(studies):
        if any(other.over for other in studies[:at]):
            study.left(f"{study.name} {'wait' if len(study.models) > 1 else 'waits'}")
            return 0
        status = _run_family(study) if len(study.models) > 1 else _run_model(study, targets)
        if status:
            return status
    return 0


def _notebooks(options: argparse.Namespace, family: bool = False) -> list[Path]:
    """Those of --notebooks, or all; with --training-text not the one that compares texts, which may not be named."""
    from studylib.study import notebooks as batch

    named = options.notebooks if "notebooks" in options else []
    found = batch.find_notebooks(named, family=family)
    compared = [notebook for notebook in found if options.training_text and batch.compares_texts(notebook)]
    if compared and named:
        raise ValueError(f"training-text: {compared[0].stem} compares texts; use --set corpora=[FILE] there")
    return [notebook for notebook in found if notebook not in compared]


def _folder(options: argparse.Namespace, named: Sequence[str], several: bool) -> Path:
    """Of the page of one model, or of a family: in --results, or the folder of --output, in which each of `several`
    pages has its own."""
    from studylib.data import models
    from studylib.study import digest

    name = f"{options.profile}-{'+'.join(_folder_name(models.absolute_name(model)) for model in named)}"
    if own := _own(options):
        name += f"-own-{digest(json.dumps(own, sort_keys=True))[:6]}"
    if len(named) > 1 and len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{digest(name)[:6]}"
    if options.output is None:
        return Path(options.results / name)
    return Path(options.output / name if several else options.output)


def _run_family(study: _Study) -> int:
    """Compute the arms of notebooks that take a family, execute them and write its page."""
    from studylib.config import MEANINGLESS, is_smoke
    from studylib.report import page, tables
    from studylib.study import ClusterError, schedule
    from studylib.study import notebooks as batch

    folder, executed = study.store.folder, []
    for notebook in study.notebooks:
        arms = batch.wanted_arms(notebook, study.assigned[notebook])
        schedule.missing_arms(arms, study.store, study.elsewhere)
        try:
            found, _ = _compute(study, arms, [], alone=False)
        except ClusterError:
            raise
        except Exception as error:
            _say(f"{error}; the notebook that needs this arm computes it again")
        else:
            if len({record.arm for record in found}) < len(set(arms)):
                study.left(f"{notebook.stem} waits")
                return 0
        print(f"{notebook.stem}  ({study.name}, {study.options.profile})", file=sys.stderr)
        if (done := _executed(study, notebook)) is None:
            return 1
        executed.append(done)
    records = batch.used_records(study.output, executed, folder / "records")
    judged = batch.judged_records(study.output, executed, folder / "records")
    written = page.write_family_report(study.output, records, judged, executed, study.command)
    if is_smoke(record.arm.evaluation for record in records):
        print(MEANINGLESS)
    print(tables.as_text(tables.readable(tables.family_scoreboard(records), tasks=False)))
    print(f"\n{page.family_summary(judged)}\n\nReport: {written}")
    return 0


def _executed(study: _Study, notebook: Path) -> Path | None:
    """The notebook's executed copy; None where it did not come to its end, which is told."""
    from studylib.study import notebooks as batch

    try:
        return batch.execute(notebook, study.output, study.assigned[notebook])
    except batch.NotebookError as error:
        _say(error)
        _say(f"everything up to there is in {study.output / notebook.name}")
        return None


def _run_model(study: _Study, targets: "Sequence[Claim]") -> int:
    """Compute the arms of notebooks of one model, execute them and write its page. targets: see `_compute_together`."""
    from studylib.config import MEANINGLESS, is_smoke
    from studylib.report import ledger, page, recipes, tables
    from studylib.study import notebooks as batch

    options = study.options
    notebooks, shared = study.notebooks, study.shared
    lacking: list[Path] = []
    if len(shared) > 1 or options.minutes or targets or study.elsewhere:
        failing, lacking, records = _compute_together(study, targets)
        notebooks.sort(key=lambda notebook: notebook != failing)
    if targets or study.over:  # those that compute by themselves wait as well
        lacking += [notebook for notebook in notebooks if notebook not in shared and not batch.sums_up(notebook)]
    executed = []
    for notebook in (notebook for notebook in notebooks if notebook not in lacking):
        print(f"{notebook.stem}  ({study.name}, {options.profile})", file=sys.stderr)
        if (done := _executed(study, notebook)) is None:
            return 1
        executed.append(done)
    folder = study.store.folder
    if not lacking:
        records = batch.used_records(study.output, executed, folder / "records")
    if not records:
        raise ValueError(f"results: {folder} holds no records of {study.name} at the {options.profile} budget")
    written = page.write_report(study.output, records, executed, study.command, options.budget_mb)
    if is_smoke(record.arm.evaluation for record in records):
        print(MEANINGLESS)
    print(tables.as_text(tables.readable(tables.scoreboard(records), tasks=False)))
    print(f"\n{recipes.as_text(records, options.budget_mb)}\n\nReport: {written}")
    print(ledger.unread(records), file=sys.stderr)
    names = ", ".join(notebook.stem for notebook in lacking)
    if lacking and targets:
        _say(f"{names} wait: they read arms that {' '.join(claim.id for claim in targets)} do not")
    elif lacking:
        study.left(f"{names} wait")
    return 0


def _tell_missing(study: _Study, targets: "Sequence[Claim]") -> None:
    """What `study run` would compute, and how long that takes as far as records tell."""
    from studylib.methods import title
    from studylib.study import Pace, arm_key, schedule, time_text

    arms = list(dict.fromkeys(_of_claims(_arms(study.notebooks, study.assigned), targets)))
    missing, pace = schedule.missing_arms(arms, study.store, study.elsewhere), Pace()
    for record in filter(None, (study.store.load(arm_key(arm)) for arm in set(arms).difference(missing))):
        pace.learn(record)
    own = sum(study.store.find(arm_key(arm)) is not None for arm in arms)
    there = len(arms) - len(missing)
    print(f"{len(arms)} arms: {own} in {study.store.folder}, {there - own} in the reference, {len(missing)} missing.")
    seconds = {arm: sum(pace.of(arm).values()) for arm in missing}
    for arm in missing:
        print(f"{time_text(seconds[arm]):14}  {title(arm)}  seed {arm.seed}")
    if missing:
        jobs = study.options.jobs
        print(f"All together: {time_text(sum(seconds.values()) / jobs)} with --jobs {jobs}.")


def _of_claims(arms: "list[Arm]", claims: "Sequence[Claim]") -> "list[Arm]":
    """Those that the claims read; all where there are no claims."""
    from studylib.methods import Setting

    read = {setting for claim in claims for setting in (*claim.needs, *claim.optional)}
    return [arm for arm in arms if Setting.of(arm) in read] if claims else arms


def _decide(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.config import listed
    from studylib.evidence import NOT_TESTED
    from studylib.report import deciding, page

    claims = deciding.named(options.claims)
    notebooks, until, named = _notebooks(options), _deadline(options.minutes), [options.model]
    seeds, further = options.seeds or list(range(SEEDS)), _further(options, notebooks)
    study = _study(options, arguments, named, notebooks, _folder(options, named, False), until, seeds, further)
    if not _with_rates(study):
        return 0
    arms = _arms(study.notebooks, study.assigned)
    reasons = {claim.id: deciding.why_not(claim, arms) for claim in claims}
    for name in (name for name, why in reasons.items() if why):
        print(f"{name} cannot be tested here: {reasons[name]}")
    open_claims = [claim for claim in claims if not reasons[claim.id]]
    if not open_claims:
        return 2
    if all(not claim.needs for claim in open_claims):
        arms = []
    records, findings = _compute(study, arms, open_claims, alone=True, outlook=True)
    print()
    for claim in open_claims:
        finding = findings.get(claim.id)
        word, text = (finding.word, finding.found) if finding else (NOT_TESTED, "not all of its arms were run yet.")
        print(f"{claim.id} · {claim.statement}: {word}. {text}")
    if records:
        print(f"\nReport: {page.write_report(study.output, records, [], study.command, options.budget_mb)}")
    if study.over:
        study.left(f"{listed([claim.id for claim in open_claims])} are as they are")
    return 0


def _rates(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.config import check_jobs, check_scheduler, profile
    from studylib.data import models
    from studylib.study import check_own_data
    from studylib.study import notebooks as batch

    profile(options.profile)
    check_jobs(options.jobs)
    check_scheduler(options.scheduler)
    model = models.absolute_name(options.model)
    given: dict[str, Any] = {
        "model": model,
        "profile": options.profile,
        "results": str(options.results.resolve()),
        "rates": "",
    }
    if own := _own(options):
        given["own"] = own
        check_own_data(profile(options.profile).with_own(own), model)
    arms = []
    for notebook in _notebooks(options):
        own = {name: value for name, value in given.items() if name in batch.default_parameters(notebook)}
        arms += batch.wanted_arms(notebook, own)
    _search(arms, model, options, options.results, options.output, options.cases)
    return 0


def _search(
    arms: "list[Arm]",
    model: str,
    options: argparse.Namespace,
    results: Path,
    output: Path,
    cases: Sequence[str] = (),
    until: float = math.inf,
) -> bool:
    """Search the rates of the settings of `arms` with one of `cases` in their name, and write them beside those that
    the file `output` holds; False where that was not done `until` then. ValueError for a file of another model or
    profile, and where there is no such setting."""
    from studylib.config import Rate, find_rates, listed, profile, rates_text, write_whole
    from studylib.report import figures
    from studylib.study import rates

    name, scheduler = options.profile, _placed(options.scheduler)
    chosen_on = profile(name).with_own(_own(options)).own_contents
    known: dict[str, Rate] = {}
    if output.exists():
        known = find_rates(model, name, str(output))
        known.check(chosen_on)
    wanted = rates.cases(arms)
    chosen = {case: arm for case, arm in wanted.items() if not cases or any(text in case for text in cases)}
    if not chosen:
        raise ValueError(f"cases: {' '.join(cases)!r} is in none of {listed(list(wanted))}")
    share = rates.cost(list(chosen.values()), arms, results)
    print(f"{len(chosen)} settings; searching takes about {share:.0%} of the time of all their arms", file=sys.stderr)

    def told(case: str, rate: Rate) -> None:
        known[case] = rate
        write_whole(output, rates_text(model, name, known, chosen_on))
        print(f"{case}: {rate.text}")

    done, tried = rates.search(list(chosen.values()), results, options.jobs, told, until, scheduler)
    if tried:
        figures.searched_rates(tried).savefig(picture := output.with_suffix(".svg"))
        print(f"Figure: {picture}")
    return done.keys() >= chosen.keys()


def _value(text: str, value: str) -> Any:
    """What stands behind NAME= in `text`, in YAML, with numbers as people write them: 7e-1 is one, 010 is refused.

    Paths of corpora and of instruction pairs count from here, as that of the model does.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """For YAML 1.1, in which 7e-1 is a text, 010 is eight, 1:30 is ninety and 2001-01-01 is a date."""

    def whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
            raise ValueError(f"--set: {node.value!r} in {text!r} is not a whole number as people write it, e.g. 10")
        return int(node.value)

    number = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    Loader.add_constructor("tag:yaml.org,2002:timestamp", Loader.construct_yaml_str)
    try:
        # References could stand for more than there is memory for, and tags for what is no parameter.
        if any(isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) for event in yaml.parse(value)):
            raise ValueError(f"--set: the value of {text!r} has YAML references or tags; write it out")
        return _from_here(Loader(value).get_single_data())
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--set: the value of {text!r} is not YAML") from error


def _placed(scheduler: str) -> str:
    """The same from any folder: the path of a scheduler file counts from here."""
    return scheduler if "://" in scheduler or not scheduler else os.path.abspath(scheduler)


def _from_here(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and value.endswith(OWN_FILES) else value


def _folder_name(model: str) -> str:
    """The model's part of a run's folder: two that share the last part of their names do not share a folder."""
    from studylib.study import digest

    path = Path(model)
    if path.is_absolute():
        return f"{path.name}-{digest(model)[:6]}"
    return model.replace("/", "--")


def _compute_together(study: _Study, targets: "Sequence[Claim]") -> "tuple[Path | None, list[Path], list[Record]]":
    """Compute the arms of all notebooks before the first is executed, claim by claim, and tell each verdict at once.

    targets: only what these claims read, and further seeds only where they may decide one. Returns the first notebook
    that cannot say what its arms are, and then nothing is computed; else the notebooks that lack arms, and the records
    that there are.
    """
    from studylib.report import CLAIMS, deciding
    from studylib.study import ClusterError, schedule
    from studylib.study import notebooks as batch

    wanted = {}
    for notebook in study.shared:
        try:
            wanted[notebook] = batch.wanted_arms(notebook, study.assigned[notebook])
            schedule.missing_arms(wanted[notebook], study.store, study.elsewhere)
        except Exception:  # whatever it is, executed it shows that at its place
            return notebook, [], []
    arms = [arm for own in wanted.values() for arm in own]
    for line in deciding.without_measure(arms):
        print(line, file=sys.stderr)
    if targets:
        for claim in targets:
            if why := deciding.why_not(claim, arms):
                print(f"{claim.id} cannot be tested here: {why}", file=sys.stderr)
        arms = _of_claims(arms, targets)
    print(f"{len(dict.fromkeys(arms))} arms of {', '.join(notebook.stem for notebook in wanted)}", file=sys.stderr)
    try:
        records, _ = _compute(study, arms, targets or list(CLAIMS.values()), alone=bool(targets))
    except ClusterError:  # of all notebooks alike
        raise
    except Exception as error:
        _say(f"{error}; the notebook that needs this arm computes it again")
        return None, [], []
    there = {record.arm for record in records}
    return None, [notebook for notebook, own in wanted.items() if not there.issuperset(own)], records


def _compute(
    study: _Study, arms: "list[Arm]", claims: "Sequence[Claim]", alone: bool, outlook: bool = False
) -> "tuple[list[Record], dict[str, Finding]]":
    """Carry out arms, claim by claim (see evidence.claims_first), and tell each verdict at once; the records of all
    that are there then, and what they say of each claim.

    outlook: what each claim takes is told before.
    """
    from tqdm import tqdm

    from studylib.evidence import Plan, claims_first
    from studylib.report import deciding, ledger
    from studylib.study import Pace, arm_key, schedule, time_text

    store, options, pace = study.store, study.options, Pace()
    arms = list(dict.fromkeys(arms))
    told = ledger.Growing(
        arms, lambda arm: store.load(arm_key(arm)), lambda line: tqdm.write(line, file=sys.stderr), study.show, claims
    )

    def seconds(arm: "Arm") -> float:
        return sum(pace.of(arm).values())

    def next_arms(waiting: "list[Arm]") -> "list[Arm]":
        told()
        for record in told.records:
            pace.learn(record)
        left = set(told.waiting)
        waiting = [arm for arm in waiting if arm in left]
        return claims_first(waiting, claims, seconds, told.records, told.findings, alone)

    planned = next_arms(arms)
    plan = Plan(told.waiting, claims, seconds, told.records, told.findings)
    prospects = {claim.id: plan.prospect(claim) for claim in claims} if outlook or options.minutes else {}
    for claim in claims if outlook else ():
        finding = told.findings.get(claim.id)
        print(deciding.outlook(claim, plan, finding, prospects[claim.id], options.jobs), flush=True)
    seeds = {plan.arms[at] for at in plan.first_seeds()}
    first = [[arm for arm in own.arms if arm in seeds] or own.arms for own in prospects.values()]
    least = min((sum(map(seconds, own)) for own in first if own), default=0) / options.jobs
    if planned and time.time() + least > study.until:
        _say(
            f"minutes: {options.minutes:g} are less than the next claim takes, {time_text(least)}; "
            "the page will have what is there then, and the same command goes on"
        )
    keep_checkpoints = any(own.get("keep_checkpoints", False) for own in study.assigned.values())
    if planned:
        # Beside others, what is timed would be slower than it is.
        jobs = 1 if any(arm.timed for arm in planned) else options.jobs
        missing = schedule.missing_arms(told.waiting, store, study.elsewhere)
        scheduler = _placed(options.scheduler)
        study.waits |= not schedule.compute_arms(
            missing, store.folder, keep_checkpoints, jobs, next_arms, study.until, pace, scheduler
        )
    told()  # what workers finished last
    return told.records, told.findings


def _report(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.report import page
    from studylib.study import notebooks as batch

    notebooks = sorted(path.parent.with_suffix(".ipynb") for path in options.output.glob("*/published.json"))
    if not notebooks:
        raise ValueError(f"output: {options.output} holds no notebook's results; `study run` makes some")
    skipped: list[Exception] = []
    folder = options.output.resolve().parent / "records"
    records = batch.used_records(options.output, notebooks, folder, skipped.append)
    of_family = all(map(batch.takes_family, notebooks))
    judged = batch.judged_records(options.output, notebooks, folder, skipped.append) if of_family else []
    _tell(skipped)
    if not records:
        raise ValueError(f"output: the notebooks in {options.output} name no records that {folder} holds")
    command = shlex.join(["study", *arguments])
    if of_family and options.format == "md":
        print(page.family_summary(judged))
    elif of_family:
        print(page.write_family_report(options.output, records, judged, notebooks, command))
    elif options.format == "md":
        print(page.summary(records, options.budget_mb))
    else:
        print(page.write_report(options.output, records, notebooks, command, options.budget_mb))
    return 0


def _verify(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.config import listed
    from studylib.study import REFERENCE, TOGETHER, environment, read_records, verify_records

    reference = options.reference or REFERENCE
    records = list(read_records(reference / "records"))
    if not records:
        raise ValueError(f"reference: {reference} holds no records")
    here = environment()["compute_dtype"]
    there = listed(sorted({record.provenance["compute_dtype"] for record in records}))
    if there != here and not options.scheduler:  # what its workers compute in is not known here
        print(f"Computed in {there} there and in {here} here: what differs by rounding, as another seed would, passes.")
    results, scheduler = options.results.resolve(), _placed(options.scheduler)
    found = verify_records(records, options.arms, options.minutes, results, options.jobs, scheduler)
    for difference in found:
        print(difference.text())
    failed = sum(not difference.passed for difference in found)
    arms = len({difference.arm for difference in found} - {TOGETHER})
    exact = sum(difference.exact for difference in found)
    print(f"{len(found) - failed} of {len(found)} numbers of {arms} arms are as published, {exact} to the last bit.")
    return 1 if failed else 0


def _plan(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.evaluate import plan_text

    print(
        plan_text(
            options.model,
            options.method,
            bits=options.bits,
            batch=options.batch,
            length=options.sequence,
            rank=options.rank,
            group=options.group,
            checkpointing=options.checkpointing,
        )
    )
    return 0


def _list(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.config import is_smoke
    from studylib.methods import file_title, order, own_files, title
    from studylib.study import REFERENCE, model_file, read_records

    skipped: list[Exception] = []
    records = list(read_records(options.results / "records", skipped.append))
    _tell(skipped)
    if not records and options.results.exists() and not options.results.is_dir():
        raise ValueError(f"results folder {options.results} holds no records; it is no folder")
    if not records:
        _say(f"results folder {options.results} holds no records; these are the reference results, in {REFERENCE}")
        records = list(read_records(REFERENCE / "records"))
    records.sort(key=lambda own: (own.arm.model, order(own.arm)[:-1], title(own.arm), own.arm.seed))
    if options.csv:
        from studylib.report import tables

        tables.frame(records).to_csv(options.csv, index=False)
        print(options.csv)
        return 0
    kept = 0
    for record in records:
        perplexities = "  ".join(
            f"{file_title(name.partition('/')[2])} {value:.4g}"
            for name, value in record.metrics.items()
            if name.startswith("perplexity/") and value is not None
        )
        model, note = model_file(options.results, record.key), ""
        if model.exists():
            kept += model.stat().st_size
            note = f"  model kept, {_size(model.stat().st_size)}"
        if is_smoke([record.arm.evaluation]):
            note += "  smoke: means nothing"
        if own := own_files(record.arm):
            note += f"  own data: {' '.join(own)}"
        times = f"{_phases(record.cost['seconds'])}  " if options.times else ""
        print(
            f"{record.key}  {times}{record.arm.model}  {title(record.arm)}  seed {record.arm.seed}  {record.status}  "
            f"{perplexities}{note}"
        )
    if options.times:
        from studylib.report import ledger

        spent: Counter[str] = Counter()
        for record in records:
            spent.update(record.cost["seconds"])
        print(f"{'all together':16}  {_phases(spent)}")
        print(ledger.unread(records))
    if kept:
        _say(f"kept models take {_size(kept)}; `study clean` frees it")
    return 0


def _phases(seconds: Mapping[str, float]) -> str:
    """Seconds of each phase in columns, the same for all records."""
    return "  ".join(
        f"{phase} {seconds[phase]:8,.1f}" if phase in seconds else " " * len(f"{phase} {0:8.1f}") for phase in PHASES
    )


def _tell(skipped: Sequence[Exception]) -> None:
    told = list(dict.fromkeys(map(str, skipped)))
    for line in told[:TOLD]:
        _say(line)
    if len(told) > TOLD:
        _say(f"{len(told) - TOLD} more files there cannot be read either")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _clean(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.study import clean

    freed = clean(options.results, options.parts)
    for part, (files, size, busy) in freed.items():
        print(f"{part}: {files} files, {_size(size)}" + (f"; {busy} in use are left" if busy else ""))
    print(f"{_size(sum(size for _, size, _ in freed.values()))} freed in {options.results}; all records are left.")
    return 0


def _show(options: argparse.Namespace, arguments: list[str]) -> int:
    record = json.loads(_find(options).to_json())
    record["scores"] = {name: f"{len(values)} items" for name, values in record["scores"].items()}
    record["training"] = f"{len(record['training'])} steps"
    print(json.dumps(record, indent=1))
    return 0


def _export(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.methods import OPTIONS as CONTAINERS_BY_OPTION
    from studylib.study import Store, export_model, summary

    record, store = _find(options), Store(options.results.resolve())
    wanted = next((container for container, option in CONTAINERS_BY_OPTION.items() if option == options.format), None)
    folder = options.output.resolve()
    print(summary(record, export_model(record, store, folder, wanted, options.base_id, options.scored)))
    return 0


def _run_check(options: argparse.Namespace, arguments: list[str]) -> int:
    from studylib.study import run_check

    print(run_check(options.folder.resolve(), options.base))
    return 0


def _find(options: argparse.Namespace) -> "Record":
    """The record that the user means, by the beginning of its key or of its file's name, of the results folder or else
    of the reference."""
    from studylib.study import REFERENCE, read_record, record_files, short_key

    found: list[Path] = []
    for folder in (options.results, REFERENCE):
        files = sorted(record_files(folder / "records"))
        wanted = options.record
        found = [path for path in files if short_key(path).startswith(wanted[:12]) or path.stem.startswith(wanted)]
        if found:
            break
    if len(found) != 1:
        several = f"{len(found)} records in {folder} begin"
        which = several if found else f"no record in {options.results} or in the reference begins"
        raise ValueError(f"record: {which} with {options.record!r}; `study list` shows them all")
    return read_record(found[0])


_COMMANDS = {
    "run": _run,
    "decide": _decide,
    "rates": _rates,
    "list": _list,
    "show": _show,
    "export": _export,
    "run-check": _run_check,
    "report": _report,
    "verify": _verify,
    "clean": _clean,
    "plan": _plan,
}
