"""Records: one JSON file for each arm that was run, found again by what determines its result."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studylib.config import (
    ALPACA,
    CORPORA,
    MODELS,
    SEAL,
    Arm,
    RealText,
    kept_name,
    remove,
    remove_leftovers,
    tell,
    versions,
    write_whole,
)
from studylib.methods import METHODS, Method, Setting, find

if TYPE_CHECKING:
    from filelock import FileLock

FORMAT = 3  # of the files; 2 had no digest of the record, and no lengths of the responses
FINISHED, DIVERGED = "finished", "diverged"
DAMAGED = ".damaged"  # how a file ends that is no longer the record that was written
SHORT = 12  # digits of the key in a file's name
# What can be removed without losing a record, and how the locks begin under which it is made.
CLEANED = {"models": "", "data": "data-", "checkpoints": "", "adapters": "adapter-"}
_INSTALLED, _CHECKOUT = Path(__file__).parents[1] / "shipped", Path(__file__).parents[2]
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT  # where notebooks and reference results lie (see setup.py)
REFERENCE = SHIPPED / "results" / "reference"  # that the repository commits: nothing writes there
# Where records go by default: a checkout's own, or where one works with what was installed without one.
RUNS = Path("results", "runs") if SHIPPED == _INSTALLED else _CHECKOUT / "results" / "runs"
# What is computed of the arms that a notebook asks for: those of another model or budget than the reference's; what the
# reference lacks as well; everything, as if there were no reference.
NEW, MISSING, ALL = COMPUTE = ("new", "missing", "all")
CLOCK_TICK = 10**9  # nanoseconds in which a folder may change twice without showing it


class RecordError(ValueError):
    """A record or a results folder that cannot be used."""


def digest(*parts: str) -> str:
    """16 hexadecimal digits that stand for the given texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def contents(arm: Arm) -> dict[str, str]:
    """What the arm names by a path or a hub id, and a SHA-256 (or commit) of what is there now.

    The model with its configuration, tokenizer and template, corpora, instruction pairs. What has a name of its own is
    pinned, and changes with a numerics version alone. Raises ValueError where there is nothing of that name.
    """
    from studylib import data  # of which torch is imported only for what has no name of its own

    version = None if arm.model in MODELS else data.models.contents(arm.model)
    found = {} if version is None else {arm.model: version}
    names = [corpus for corpus in arm.evaluation.corpora if corpus not in CORPORA]
    if isinstance(arm.data, RealText) and arm.data.corpus not in CORPORA:
        names.append(arm.data.corpus)
    found |= {name: data.corpora.sha256(name) for name in names}
    sources = [arm.evaluation.instructions] + ([arm.instructions.source] if arm.instructions else [])
    return found | {name: data.corpora.instructions_sha256(name) for name in sources if name != ALPACA}


def numerics(arm: Arm) -> dict[str, int]:
    """The versions of the components that the arm passes through (see config.numerics), and of its method."""
    method = find(arm.method)
    return versions(arm, method.numerics) | {f"method {method.name}": method.version}


def is_installed(method: Method) -> bool:
    """Whether other processes have it: a method that was registered in a notebook or script is in this one only."""
    return type(method).__module__.partition(".")[0] == __name__.partition(".")[0]


def arm_key(arm: Arm) -> str:
    """What a record is found by: the arm, with contents in the place of the paths that it names, and its numerics.

    So a moved file or folder is the same, a changed one is another; and what code looks like does not matter.
    """
    found = contents(arm)
    return digest(
        json.dumps(_by_content(json.loads(arm.canonical()), found), sort_keys=True), json.dumps(numerics(arm))
    )


def _by_content(value: Any, found: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _by_content(own, found) for name, own in value.items()}
    if isinstance(value, list):
        return [_by_content(own, found) for own in value]
    return f"sha256:{found[value]}" if isinstance(value, str) and value in found else value


@dataclass(frozen=True)
class Record:
    """The result of one arm.

    metrics: numbers by name; None where not finite. scores: per-item numbers by name, in the same item order for all
    arms, but for what items have several of: choices, "choice_...". training: the log of a training, one entry a step;
    curve: its held-out loss at {"step", "tokens", "loss"} and, of validation pairs, "pairs", of each its "loss" and
    "tokens".
    data: {"statistics", "samples"} of the text that the method was trained or calibrated on. cost: seconds and tokens
    by phase, peak_bytes. provenance: code, versions, hardware, hashes: where it comes from, and no part of the key but
    for "numerics" and "contents".
    """

    key: str
    arm: Arm
    status: str
    metrics: dict[str, float | None]
    scores: dict[str, list[float | None]]
    training: list[dict[str, float | None]]
    curve: list[dict[str, Any]]
    data: dict[str, Any]
    cost: dict[str, Any]
    provenance: dict[str, Any]

    def __hash__(self) -> int:
        """Those of one key are compared in whole."""
        return hash(self.key)

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def file_name(self) -> str:
        """Method, bits, variant, seed and the beginning of the key, for people: what is looked for is the key."""
        variant = re.sub(r"[^A-Za-z0-9.]+", "-", Setting.of(self.arm).variant).strip("-")[:60]
        method = re.sub(r"[^A-Za-z0-9+.]+", "-", self.arm.method)
        parts = [method, self.arm.bits, variant, f"seed{self.arm.seed}", self.key[:SHORT]]
        return "_".join(part for part in parts if part) + ".json"

    def to_json(self) -> str:
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        return json.dumps(fields | {"sha256": _digest_of(fields)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """ValueError, in one line, for what is no record of this format or was changed after it was written."""
        fields = json.loads(text)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or not {"key", "arm"} <= fields.keys():
            raise ValueError("it is no record")
        found, written = fields.get("format", 1), fields.pop("sha256", None)
        if found != FORMAT:
            older = isinstance(found, int) and found < FORMAT
            how = (
                f"an older format, {found!r}, which results/rekey.py turns into"
                if older
                else f"another format, {found!r}, than"
            )
            raise ValueError(f"it has {how} {FORMAT}")
        if written != _digest_of(fields):
            raise ValueError("its content is not what its sha256 says: it was changed after it was written")
        del fields["format"]
        for name in fields.keys() ^ set(names):
            raise ValueError(f"unknown field {name!r}" if name in fields else f"the field {name!r} is missing")
        return cls(**fields | {"arm": Arm.from_dict(fields["arm"])})


def _digest_of(fields: dict[str, Any]) -> str:
    """SHA-256 of a record's fields, whatever their order and the spaces between them."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Store:
    """The folder results/runs: records, and beside them locks, generated data, checkpoints, adapters, kept models.

    reference: a folder whose records are found as well, and never written.
    """

    PARTS = ("records", "locks", "data", "checkpoints", "adapters", "models")

    def __init__(self, folder: str | Path, reference: Path | None = None):
        self.folder = Path(folder)
        self.reference = reference
        self._listed: dict[str, Path] = {}
        self._seen: int | None = None
        try:
            for name in self.PARTS:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder / name)
            probe = self.folder / "locks" / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RecordError(
                f"results folder {self.folder} is not writable ({error.strerror}); give another one with --results"
            ) from error

    def find(self, key: str) -> Path | None:
        """The file of the record of `key` in the folder itself, None if there is none."""
        path = self._listed.get(key[:SHORT])
        if path is not None and path.exists():
            return path
        folder = self.folder / "records"
        changed = folder.stat().st_mtime_ns
        if (
            changed != self._seen
        ):  # else there is nothing new: a listing for each arm would be slow where there are many
            self._listed = {short_key(path): path for path in record_files(folder)}
            # What came in the same moment may be missing from the list, and would not show as a change.
            self._seen = changed if changed < time.time_ns() - CLOCK_TICK else None
        return self._listed.get(key[:SHORT])

    def data_folder(self, key: str) -> Path:
        return self.folder / "data" / key

    def checkpoint_folder(self, key: str) -> Path:
        return self.folder / "checkpoints" / key

    @property
    def trackers(self) -> Path:
        """What trackers (see config.trackers) keep of trainings."""
        return self.folder / "trackers"

    def adapter_file(self, key: str) -> Path:
        return self.folder / "adapters" / f"{key}.safetensors"

    def model_file(self, key: str) -> Path:
        """Where the deployed model of a trained arm is kept."""
        return model_file(self.folder, key)

    def lock(self, name: str) -> "FileLock":
        """Held by the process that computes `name`; another one waits for it and then finds its result."""
        from filelock import FileLock

        return FileLock(self.folder / "locks" / f"{name}.lock")

    def is_held(self, name: str) -> bool:
        """Whether some process holds the lock of `name` just now."""
        from filelock import Timeout

        try:
            with self.lock(name).acquire(blocking=False):
                return False
        except Timeout:
            return True

    def load(self, key: str) -> Record | None:
        """The record of `key`, the folder's own or else the reference's; None if there is none.

        A file that is not the record that was written is moved aside, and one line says so: its arm is computed again.
        Raises RecordError for one that may not be read.
        """
        path = self.find(key)
        if path is None:
            return self._of_reference(key)
        try:
            record = read_record(path)
            if record.key == key:
                return record
            damage = f"{path} holds the record {record.key} under the name of {key}"
        except RecordError as error:
            if isinstance(error.__cause__, OSError) and not path.is_dir():
                raise
            damage = str(error)
        aside = path.with_suffix(DAMAGED)
        os.replace(path, aside)
        tell(f"{damage}; it is kept as {aside.name}, and the arm is computed again")
        return None

    def _of_reference(self, key: str) -> Record | None:
        path = self._referred.get(key[:SHORT])
        record = None if path is None else read_record(path)
        return record if record is not None and record.key == key else None

    @functools.cached_property
    def _referred(self) -> dict[str, Path]:
        folder = self.reference
        return {} if folder is None else {short_key(path): path for path in record_files(folder / "records")}

    def save(self, record: Record) -> Path:
        """Keep the record, whole."""
        path = self.folder / "records" / record.file_name
        write_whole(path, record.to_json())
        self._listed[record.key[:SHORT]] = path
        return path


def clean(results: Path, parts: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Remove these of CLEANED from a results folder; records stay. For each: files removed, bytes, and how many entries
    some process uses and are left.

    All of it can be made again: text is written anew, a training is run anew for an export. Raises ValueError for a
    folder that holds no results.
    """
    from filelock import FileLock, Timeout

    if not (results / "records").is_dir():
        raise ValueError(f"results: {results} holds no records; give a folder that `study run` has filled")
    freed = {}
    for part in parts:
        files = size = busy = 0
        for entry in sorted((results / part).glob("*")):
            if entry.name.endswith(SEAL) and entry.with_name(kept_name(entry)).exists():
                continue  # goes with what it seals
            lock = FileLock(results / "locks" / f"{CLEANED[part]}{kept_name(entry).partition('.')[0]}.lock")
            try:
                with lock.acquire(blocking=False):
                    found = [path for path in [entry, *entry.rglob("*")] if path.is_file()]
                    size += sum(path.stat().st_size for path in found)
                    files += len(found)
                    remove(entry)
            except Timeout:
                busy += 1
        freed[part] = (files, size, busy)
    return freed


def short_key(path: Path) -> str:
    """The beginning of the key of a record, from its file's name."""
    return path.stem.rpartition("_")[2]


def record_files(folder: Path) -> Iterator[Path]:
    """The records in a folder, without what another process is writing just now."""
    return folder.glob("[!.]*.json")


def model_file(results: Path, key: str) -> Path:
    """Where a results folder keeps the deployed model of a record."""
    return results / "models" / f"{key}.safetensors"


def find_records(folder: Path, keys: Iterable[str]) -> dict[str, Path]:
    """By key, the file of its record in a folder of record files, or else in the reference, or where it would be."""
    there = {short_key(path): path for own in (REFERENCE / "records", folder) for path in record_files(own)}
    return {key: there.get(key[:SHORT], folder / f"{key[:SHORT]}.json") for key in keys}


def read_record(path: Path) -> Record:
    """The record in the file `path`; RecordError naming the file where it is not one or there is none."""
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"there is no record {path}; run the notebooks that show it again") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read as a record ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_records(folder: str | Path, skipped: Callable[[RecordError], None] | None = None) -> Iterator[Record]:
    """All records in a folder of record files, in the order of their names.

    skipped: told of each file that is no record, which is then left out; without it, that is a RecordError.
    """
    yield from read_files(sorted(record_files(Path(folder))), skipped)


def read_files(paths: Iterable[Path], skipped: Callable[[RecordError], None] | None = None) -> Iterator[Record]:
    """The records in these files; skipped as of `read_records`."""
    for path in paths:
        try:
            yield read_record(path)
        except RecordError as error:
            if skipped is None:
                raise
            skipped(error)


def records_digest(keys: Iterable[str]) -> str:
    """16 hexadecimal digits that stand for these records of the reference, with all that they hold."""
    found = find_records(REFERENCE / "records", sorted(set(keys)))
    return digest(*(path.read_text(encoding="utf-8") for path in found.values()))


def known_records(
    results: str | Path, compute: str = MISSING, skipped: Callable[[RecordError], None] | None = None
) -> list[Record]:
    """All records of a results folder, and those of the reference that it has not (unless compute is ALL)."""
    found = {record.key: record for record in read_records(Path(results) / "records", skipped)}
    if compute != ALL:
        found = {record.key: record for record in read_records(REFERENCE / "records")} | found
    return list(found.values())


def _as_trained(arm: Arm) -> Arm:
    return METHODS[arm.method].as_trained(arm) if arm.method in METHODS else arm


def _as_rounded(arm: Arm) -> Any:
    """What GPTQ's codes are those of; an arm without them shares them with none."""
    by_gptq = arm.method in METHODS and METHODS[arm.method].by_gptq
    return (arm.model, arm.data, arm.scheme.rotated, arm.widths.weights, arm.format) if by_gptq else arm


# What several arms of a model share, by the phase in which the first of them makes it.
SHARED: dict[str, Callable[[Arm], Any]] = {
    "data": attrgetter("model", "data"),
    "full precision": attrgetter("model", "evaluation.corpora", "evaluation.windows", "evaluation.length"),
    "quantize": _as_rounded,
    "train": functools.lru_cache(maxsize=4096)(_as_trained),
}


def seconds_alone(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By key, seconds of each phase of a record's arm, had it been run alone: what others of these share with it, it
    makes itself."""
    longest: dict[tuple[str, Any], float] = {}
    for record in records:
        for phase, shared in SHARED.items():
            made = phase, shared(record.arm)
            longest[made] = max(longest.get(made, 0.0), record.cost["seconds"].get(phase, 0.0))
    return {
        record.key: {
            phase: longest[phase, SHARED[phase](record.arm)] if phase in SHARED else seconds
            for phase, seconds in record.cost["seconds"].items()
        }
        for record in records
    }


def shares(phase: str, record: Record, other: Record) -> bool:
    """Whether one record's arm makes in `phase` what the other's needs as well: text, or a training that is deployed
    in several ways."""
    shared = SHARED[phase]
    return shared(record.arm) == shared(other.arm)
