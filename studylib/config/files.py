"""Files and folders that are written whole or not at all, and known to be as they were written."""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from studylib.config.progress import tell

SUMS = "SHA256SUMS"  # in a sealed folder: the digests of its files, as `sha256sum --check` reads them
SEAL = ".sha256"  # a sealed file has its digest beside it, in a file of its name with this ending
# A folder in which something is being written, with a digest of the machine's name, the process and the name of what is
# written. Files of older versions have no machine.
PARTIAL = re.compile(r"\.partial-(?:([0-9a-f]{8})-)?(\d+)-(.+)")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DAY = 24 * 3600  # seconds


@contextlib.contextmanager
def written_whole(path: str | Path, *, sealed: bool = False, size: int | None = None) -> Iterator[Path]:
    """Where to write a file or folder to, inside; at the end it takes the place of `path`, after an error it goes.

    A file that was there stays until then, and a reader sees the old or the new one; a folder must not be there. It is
    on the disk before and after that, so that a crash leaves one of the two. sealed: with a file's digest beside it,
    see `usable`. size: how many bytes it takes, said where there is no room for them.
    Raises OSError with `path` where it cannot be written.
    """
    path = Path(path)
    remove_leftovers(path.parent, deep=False)
    # In a folder of its own: safetensors writes to a file of another name first, which a kill would leave behind.
    holder = path.with_name(f".partial-{_machine()}-{os.getpid()}-{path.name}")
    partial = holder / path.name
    try:
        shutil.rmtree(holder, ignore_errors=True)
        holder.mkdir()
        yield partial
        for file in _files(partial):
            _settle(file, holder)
        if sealed:  # first: a crash in between leaves a file that is not what the digest says, and is made again
            seal = _seal(partial)
            seal.write_text(f"{file_sha256(partial)}  {path.name}\n")
            _settle(seal, holder)
            os.replace(seal, _seal(path))
        os.replace(partial, path)
        _sync(path.parent)
    except Exception as error:
        if told := _told(error, holder, path, size):
            raise told from error
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_whole(path: str | Path, text: str, *, sealed: bool = False) -> None:
    """Write the text to the file, UTF-8, or leave what was there."""
    data = text.encode()
    with written_whole(path, sealed=sealed, size=len(data)) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def kept_if_possible(what: str) -> Iterator[None]:
    """Inside, something is written that can be made again: where that fails, one line says so, and no more happens."""
    try:
        yield
    except OSError as error:
        tell(f"{what} is not kept ({error.strerror or error})")


def make_folder(path: Path) -> None:
    """Have a folder there. A file in its place is removed, and one line says so."""
    if os.path.lexists(path) and not path.is_dir():
        tell(f"{path} is no folder; it is made again")
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)


def seal_folder(folder: Path) -> None:
    """Note the digests of all files in the folder, after which it is `usable`; everything is on the disk then."""
    files = sorted(_files(folder))
    for file in files:
        _settle(file, folder)
    lines = (f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    write_whole(folder / SUMS, "".join(lines))


def usable(path: Path) -> bool:
    """Whether a sealed file or folder is there, as it was written.

    What is damaged is removed, and one line says so: whoever asks makes it again. A crash leaves things without a seal.
    """
    assert path.name  # not the folder that this process is in
    if not path.exists() and not _seal(path).exists():
        return False
    damage = _damage(path)
    if damage:
        tell(f"{damage}; it is made again")
        remove(path)
    return not damage


def _damage(path: Path) -> str | None:
    """What is wrong with a sealed file or folder."""
    notes, root = (path / SUMS, path) if path.is_dir() else (_seal(path), path.parent)
    if not path.exists():
        return f"{path} is missing"
    try:
        lines = notes.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return f"{path} was not finished: it has no digest"
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {file.relative_to(root).as_posix() for file in _files(path)}
    if not digests or found - digests.keys():
        return f"{path} was not finished: not all of it has a digest"
    for name, digest in digests.items():
        if name not in found or file_sha256(root / name) != digest:
            return f"{root / name} is not as it was written"
    return None


def remove(path: Path) -> None:
    """Remove what is there, file or folder, with its seal."""
    for own in (path, _seal(path)):
        if own.is_dir() and not own.is_symlink():
            shutil.rmtree(own)
        else:
            own.unlink(missing_ok=True)


def remove_sealed(folder: Path) -> None:
    """Remove every sealed file in the folder."""
    for seal in folder.glob(f"*{SEAL}"):
        remove(seal.with_name(kept_name(seal)))


def remove_leftovers(folder: Path, deep: bool = True) -> None:
    """Remove what processes that are gone have left half-written in a folder, and in all under it.

    What a process of another machine left, which cannot be asked for, is removed when it is a day old.
    """
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if found := PARTIAL.fullmatch(name):
                with contextlib.suppress(OSError):  # somebody else's, or removed by another process just now
                    if _is_left(Path(parent, name), found[1], int(found[2])):
                        remove(Path(parent, name))
        folders[:] = [name for name in folders if deep and not PARTIAL.fullmatch(name)]


def _is_left(path: Path, machine: str | None, process: int) -> bool:
    import psutil  # os.kill(process, 0) would do more than ask on Windows

    if machine in (None, _machine()):
        return not psutil.pid_exists(process)
    return path.stat().st_mtime < time.time() - DAY


def kept_name(path: Path) -> str:
    """The name of what a file or folder holds, or belongs to, if it is a seal or half-written."""
    found = PARTIAL.fullmatch(path.name)
    return (found[3] if found else path.name).removesuffix(SEAL)


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _told(error: Exception, holder: Path, path: Path, size: int | None) -> OSError | None:
    """An error of the disk under `holder`, as one of `path`: safetensors' have their number in their text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    elsewhere = isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(holder))
    if number is None or elsewhere:
        return None
    text = (isinstance(error, OSError) and error.strerror) or os.strerror(number)
    return OSError(number, f"{text}; it takes {size:,} bytes" if size and number in NO_ROOM else text, str(path))


def _seal(path: Path) -> Path:
    return path.with_name(path.name + SEAL)


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder: neither hidden ones nor its digests."""
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file() and file != path / SUMS)
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _settle(file: Path, folder: Path) -> None:
    """Have a file on the disk, for all who may read the folder: safetensors leaves it to its owner alone."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    mode, wanted = file.stat().st_mode, folder.stat().st_mode & 0o666
    if os.name == "posix" and mode & 0o777 != wanted:
        with contextlib.suppress(OSError):  # somebody else's, linked
            file.chmod(wanted)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can do so."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; one that is as it was when it was read last is not read again."""
    found = path.stat()
    return _file_sha256(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
