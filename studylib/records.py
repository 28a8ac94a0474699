"""Records: one JSON file for each arm that was run, found again by a key of the arm and the code behind it."""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from studylib.adapters import GPTQ_LORA, L4Q, QAT_LORA
from studylib.arms import CALIBRATED, ENCODED, EXECUTED, SMOOTHQUANT_QAT, Arm
from studylib.models import compute_dtype

COMMON_CODE = ("quantizers", "layers", "models", "corpora", "scoring", "evaluation", "memory")
DATA_CODE = ("decoding", "sampling", "text_statistics", "training_data")
FITTING_CODE = ("losses", "training", "training_loop", "distill")
TUNING_CODE = (*FITTING_CODE, "formats", "adapters", "finetuning", "merging", "tuned")
GRID_CODE = ("l4q",)
TRAINING_CODE = (*FITTING_CODE, "methods")
PTQ_CODE = ("ptq", "methods")
LIBRARIES = ("torch", "transformers", "lm-eval", "accelerate", "datasets", "numpy")
ENCODING_CODE = ("formats", "weight_statistics")
EXECUTION_CODE = ("formats", "adapters", "l4q", "execution")
TUNING_LIBRARIES = ("peft", "bitsandbytes")
PTQ_LIBRARIES = ("llmcompressor", "compressed-tensors")

FINISHED, DIVERGED = "finished", "diverged"


class RecordError(RuntimeError):
    """A record or a results folder that cannot be used."""


@functools.cache
def code_hash(module: str) -> str:
    """SHA-256 of a studylib module's syntax tree: comments, docstrings and layout do not count."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


_version = functools.cache(importlib.metadata.version)


def code_versions(modules: Sequence[str], libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Hashes of the named studylib modules and the versions of the libraries that do arithmetic."""
    return {f"studylib.{name}": code_hash(name)[:16] for name in modules} | {name: _version(name) for name in libraries}


def arm_code(arm: Arm) -> dict[str, str]:
    """The versions of the code that an arm runs through."""
    modules, libraries = COMMON_CODE + (DATA_CODE if arm.data else ()), LIBRARIES
    if arm.tuning or arm.method == ENCODED:
        modules += TUNING_CODE if arm.tuning else ENCODING_CODE
        modules += GRID_CODE if arm.method in (L4Q, QAT_LORA) else ()
        libraries += TUNING_LIBRARIES if arm.tuning else ()
    elif arm.method == EXECUTED:
        modules, libraries = modules + EXECUTION_CODE, libraries + TUNING_LIBRARIES
    else:
        modules += TRAINING_CODE if arm.training else PTQ_CODE
    if arm.method in (SMOOTHQUANT_QAT, GPTQ_LORA):
        modules += PTQ_CODE
    if arm.method in (*CALIBRATED, SMOOTHQUANT_QAT, GPTQ_LORA):
        libraries += PTQ_LIBRARIES
    return code_versions(modules, libraries)


# Taken when the process starts, so that editing a module during a long run cannot mislabel its records.
for _module in COMMON_CODE + DATA_CODE + TRAINING_CODE + PTQ_CODE + TUNING_CODE + ENCODING_CODE + EXECUTION_CODE:
    code_hash(_module)


def digest(*parts: str) -> str:
    """16 hexadecimal digits that stand for the given texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def arm_key(arm: Arm) -> str:
    """What a record is found by: the arm's canonical JSON and the versions of its code."""
    return digest(arm.canonical(), json.dumps(arm_code(arm), sort_keys=True))


@dataclass(frozen=True)
class Record:
    """The result of one arm.

    metrics: numbers by name; None where not finite. scores: per-item numbers by name, in the same item order for all
    arms. training: the log of a training, one entry a step; curve: its held-out loss at {"step", "tokens", "loss"}.
    data: {"statistics", "samples"} of the text that the method was trained or calibrated on. cost: seconds and tokens
    by phase, peak_bytes.
    """

    key: str
    arm: Arm
    status: str
    metrics: dict[str, float | None]
    scores: dict[str, list[float]]
    training: list[dict[str, float]]
    curve: list[dict[str, float]]
    data: dict
    cost: dict
    provenance: dict

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        fields = json.loads(text)
        return cls(**fields | {"arm": Arm.from_dict(fields["arm"])})


class Store:
    """The folder results/runs: records/<key>.json, locks, generated data, checkpoints and trained adapters."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            for name in ("records", "locks", "data", "checkpoints", "adapters"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            probe = self.folder / "locks" / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise RecordError(
                f"results folder {self.folder} is not writable ({error.strerror}); give another one with --results"
            ) from error

    def hold(self, model: str, version: str) -> None:
        """Note the weights that this folder's records, data and checkpoints of a model are of, by models.version.

        Raises RecordError where others are noted by that name: their results would be mixed.
        """
        note = self.folder / "models" / f"{digest(model)}.json"
        with self.lock(f"model-{note.stem}"):
            if not note.exists():
                note.parent.mkdir(exist_ok=True)
                write_whole(note, json.dumps({"model": model, "version": version}, indent=1) + "\n")
            elif json.loads(note.read_text())["version"] != version:
                raise RecordError(
                    f"the weights of {model} have changed since {self.folder} was begun; give another folder with "
                    "--results"
                )

    def path(self, key: str) -> Path:
        return self.folder / "records" / f"{key}.json"

    def data_folder(self, key: str) -> Path:
        return self.folder / "data" / key

    def checkpoint_folder(self, key: str) -> Path:
        return self.folder / "checkpoints" / key

    def adapter_file(self, key: str) -> Path:
        return self.folder / "adapters" / f"{key}.safetensors"

    def lock(self, name: str) -> FileLock:
        """Held by the process that computes `name`; another one waits for it and then finds its result."""
        return FileLock(self.folder / "locks" / f"{name}.lock")

    def is_held(self, name: str) -> bool:
        """Whether some process holds the lock of `name` just now."""
        try:
            with self.lock(name).acquire(blocking=False):
                return False
        except Timeout:
            return True

    def load(self, key: str) -> Record | None:
        """The record of `key`, None if there is none; RecordError if its file cannot be read."""
        return read_record(self.path(key)) if self.path(key).exists() else None

    def save(self, record: Record) -> None:
        """Keep the record, whole."""
        write_whole(self.path(record.key), record.to_json())


def write_whole(path: Path, text: str) -> None:
    """Write the text to the file, UTF-8, or leave what was there."""
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path) -> Record:
    """The record in the file `path`; RecordError naming the file where it is not one or there is none."""
    try:
        return Record.from_json(path.read_text())
    except FileNotFoundError as error:
        raise RecordError(f"there is no record {path}; run the notebooks that show it again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not a record ({error}); delete it to run its arm again") from error


def read_records(folder: str | Path) -> Iterator[Record]:
    """All records in a folder of record files, in the order of their names."""
    for path in sorted(Path(folder).glob("*.json")):
        yield read_record(path)


# What several arms of a model share, by the phase in which the first of them makes it.
SHARED = {"data": attrgetter("model", "data"), "train": attrgetter("as_trained")}


def seconds_alone(record: Record, records: Sequence[Record]) -> dict[str, float]:
    """Seconds of each phase of a record's arm, had it been run alone: what arms in `records` share with it, it makes
    itself."""
    own = dict(record.cost["seconds"])
    for phase in SHARED.keys() & own.keys():
        own[phase] = max(other.cost["seconds"].get(phase, 0.0) for other in records if shares(phase, record, other))
    return own


def shares(phase: str, record: Record, other: Record) -> bool:
    """Whether one record's arm makes in `phase` what the other's needs as well: text, or a training that is deployed
    in several ways."""
    shared = SHARED[phase]
    return shared(record.arm) == shared(other.arm)


@functools.cache
def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict:
    """Where and with what a record was made: versions, commit, dirty flag, hardware, the type it multiplies in."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "hardware": {
            "processor": torch.backends.cpu.get_cpu_capability(),
            "cores": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "compute_dtype": str(compute_dtype()).removeprefix("torch."),
    }
