"""Files that are written whole or not at all, and known to be as they were written."""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

SUMS = "SHA256SUMS"  # in a sealed folder: the digests of its files, as `sha256sum --check` reads them
SEAL = ".sha256"  # a sealed file has its digest beside it, in a file of its name with this ending


@contextlib.contextmanager
def written_whole(path: str | Path, *, sealed: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, inside; at the end it takes the place of `path`, or is removed after an error.

    What was there stays until then, and a reader sees the old file or the new one. File and folder are on the disk
    before and after that, so that a crash leaves one of the two. sealed: with its digest beside it, see `usable`.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if sealed:  # first: a crash in between leaves a file that is not what the digest says, and is made again
            write_whole(_seal(path), f"{file_sha256(partial)}  {path.name}\n")
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, *, sealed: bool = False) -> None:
    """Write the text to the file, UTF-8, or leave what was there."""
    with written_whole(path, sealed=sealed) as partial:
        partial.write_text(text, encoding="utf-8")


def seal_folder(folder: Path) -> None:
    """Note the digests of all files in the folder, after which it is `usable`; everything is on the disk then."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    lines = (f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    write_whole(folder / SUMS, "".join(lines))


def usable(path: Path) -> bool:
    """Whether a sealed file or folder is there, as it was written.

    What is damaged is removed, and one line says so: whoever asks makes it again. A crash leaves things without a seal.
    """
    if not path.exists():
        return False
    damage = _damage(path)
    if damage:
        print(f"study: {damage}; it is made again", file=sys.stderr)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        _seal(path).unlink(missing_ok=True)
    return not damage


def _damage(path: Path) -> str | None:
    """What is wrong with a sealed file or folder that is there."""
    notes, root = (path / SUMS, path) if path.is_dir() else (_seal(path), path.parent)
    try:
        lines = notes.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"{path} was not finished: it has no digest"
    for line in lines:
        digest, _, name = line.partition("  ")
        file = root / name
        if not name or not file.is_file() or file_sha256(file) != digest:
            return f"{file} is not as it was written"
    return None if lines else f"{path} was not finished: its digest is empty"


def _seal(path: Path) -> Path:
    return path.with_name(path.name + SEAL)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; one that is as it was when it was read last is not read again."""
    found = path.stat()
    return _file_sha256(path, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
