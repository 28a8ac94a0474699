"""Archives through the real pip, from a folder of packages made here; and everything that can go wrong on the way."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from studylib.data import sources
from studylib.data.sources import Archive, SourceError, fetch

NAME = "demo_archive-1.0-py3-none-any.whl"
SOURCE = "demo_archive-1.0.tar.gz"


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        info = "demo_archive-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-archive\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def make_source(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"demo_archive-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, as pip sees it."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder / NAME, {"demo/a.txt": "first", "demo/sub/b.txt": "second", "demo/code.py": "raise SystemExit"})
    digest = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    monkeypatch.setitem(sources.ARCHIVES, "demo", Archive("demo-archive==1.0", NAME, digest, ("demo/*.txt",), 1))
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def change(monkeypatch, **fields):
    fields = vars(sources.ARCHIVES["demo"]) | fields
    monkeypatch.setitem(sources.ARCHIVES, "demo", Archive(**fields))


@pytest.fixture
def source(index, tmp_path, monkeypatch):
    """A source archive on that index, whose code leaves a file where it runs."""
    run = f"open({str(tmp_path / 'ran')!r}, 'w')"
    members = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: demo-archive\nVersion: 1.0\n",
        "pyproject.toml": "[build-system]\nrequires = ['building']\nbuild-backend = 'building.api'\n",
        "setup.py": run,
        "building/__init__.py": run,
        "building/api.py": run,
        "data/a.txt": "first",
    }
    make_source(index / SOURCE, members)
    digest = hashlib.sha256((index / SOURCE).read_bytes()).hexdigest()
    change(monkeypatch, filename=SOURCE, sha256=digest, members=("*/data/*.txt",), backend="building.api")
    return index / SOURCE


def files(folder):
    """What there is beside the digests."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_wanted_members_are_fetched_once(index, tmp_path, monkeypatch):
    folder = fetch("demo")
    assert files(folder) == {"demo/a.txt": "first", "demo/sub/b.txt": "second"}
    assert leftovers(tmp_path) == [folder.name]
    shutil.rmtree(index)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("called pip again"))
    assert fetch("demo") == folder


def test_a_source_archive_is_neither_built_nor_run(source, tmp_path):
    assert files(fetch("demo")) == {"demo_archive-1.0/data/a.txt": "first"}
    assert not (tmp_path / "ran").exists()


def test_a_source_archive_of_another_hash_runs_none_of_its_code(source, tmp_path, monkeypatch):
    # Built in the archive itself, as pip would without knowing better.
    members = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: demo-archive\nVersion: 1.0\n",
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'own'\nbackend-path = ['.']\n",
        "own.py": f"open({str(tmp_path / 'ran')!r}, 'w')",
    }
    make_source(source, members)
    without = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path / "out"), str(source)]
    subprocess.run([*without, "--no-build-isolation"], capture_output=True)
    assert (tmp_path / "ran").exists()  # so the archive would do harm
    (tmp_path / "ran").unlink()
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(SourceError, match=rf"{SOURCE}: its SHA-256 is {found}, not .*clear pip's cache"):
        fetch("demo")
    assert not (tmp_path / "ran").exists() and leftovers(tmp_path) == []


def cut(file):
    file.write_bytes(file.read_bytes()[:2])


def empty(file):
    file.write_bytes(b"")


def replace(file):
    file.write_text("other")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def test_what_was_damaged_is_made_again_with_a_word(index, capsys):
    folder = fetch("demo")
    before = files(folder)
    damages = [(damage, "demo/a.txt") for damage in (cut, empty, replace, flip_a_bit, Path.unlink)]
    for damage, name in [*damages, (Path.unlink, "SHA256SUMS")]:
        damage(folder / name)
        capsys.readouterr()
        assert files(fetch("demo")) == before, damage
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("study: ")]
        assert str(folder) in told and told.endswith("; it is made again")


def test_a_cache_of_which_only_the_folders_are_left_is_filled_again(index):
    folder = fetch("demo")
    before = files(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    assert files(fetch("demo")) == before


def other_process(*lines):
    """What another process does who knows the archive."""
    given = f"sources.ARCHIVES['demo'] = sources.Archive(**{vars(sources.ARCHIVES['demo'])!r})"
    script = "\n".join(("import os", "from studylib.data import sources", given, *lines))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_a_killed_process_left_is_removed(index, tmp_path):
    killed = other_process("sources._extract = lambda *args: os.kill(os.getpid(), 9)", "sources.fetch('demo')")
    killed.communicate(timeout=120)
    (left,) = leftovers(tmp_path)
    assert killed.returncode == -9 and left.startswith(".partial-") and list((tmp_path / "cache" / left).rglob(NAME))
    assert leftovers(tmp_path) == [left]
    folder = fetch("demo")
    assert files(folder) == {"demo/a.txt": "first", "demo/sub/b.txt": "second"}
    assert leftovers(tmp_path) == [folder.name]


def test_others_may_read_what_was_fetched(index, monkeypatch):
    def extract(archive, file, folder):
        original(archive, file, folder)
        (folder / "demo" / "a.txt").chmod(0o600)  # as libraries leave them that write through a temporary file

    original = sources._extract
    monkeypatch.setattr(sources, "_extract", extract)
    umask = os.umask(0o027)
    try:
        folder = fetch("demo")
    finally:
        os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@contextlib.contextmanager
def somebody_else():
    """What the process may do is what another user may do, where it is root: root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="modes and users")
def test_a_cache_that_others_keep_is_read_and_never_written(index, monkeypatch, capsys):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are for one user
        os.chmod(place, 0o755)
        monkeypatch.setenv("STUDY_CACHE", f"{place}/cache")
        folder = fetch("demo")
        for path in (folder.parent, Path(f"{folder}.lock")):
            path.chmod(path.stat().st_mode & 0o555)
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("called pip again"))
        with somebody_else():
            assert files(fetch("demo")) == {"demo/a.txt": "first", "demo/sub/b.txt": "second"}
        folder.parent.chmod(0o755)
        cut(folder / "demo/a.txt")
        for path in (folder, folder / "demo", folder.parent):
            path.chmod(0o555)
        with somebody_else(), pytest.raises(SourceError, match=r"cannot be written \(Permission denied\).*STUDY_CACHE"):
            fetch("demo")
        for path in (folder.parent, folder, folder / "demo"):
            path.chmod(0o755)


def test_a_wrong_hash_is_refused(index, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(SourceError, match=rf"{NAME}: its SHA-256 is \w+, not 0000"):
        fetch("demo")
    assert leftovers(tmp_path) == []


def test_a_missing_member_is_named(index, tmp_path, monkeypatch):
    change(monkeypatch, members=("demo/*.txt", "demo/*.arrow"))
    with pytest.raises(SourceError, match=rf"{NAME} has no member 'demo/\*.arrow'"):
        fetch("demo")
    assert leftovers(tmp_path) == []


def test_no_network_says_what_to_do(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(SourceError, match=r"demo-archive==1.0: pip could not download .*check the network"):
        fetch("demo")
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing_half_written(index, tmp_path, monkeypatch):
    original = shutil.copyfileobj

    def full(source, target, *args):
        target.write(source.read(2))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.shutil, "copyfileobj", full)
    where = rf"{tmp_path}/cache/demo-archive-1.0-\w+"
    with pytest.raises(SourceError, match=rf"^{where}: it cannot be written \(No space left.* 1,000,000 bytes\); free"):
        fetch("demo")
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(sources.shutil, "copyfileobj", original)
    assert (fetch("demo") / "demo" / "a.txt").read_text() == "first"


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"file/cache/demo.*cannot be written .*set STUDY_CACHE"):
        fetch("demo")


def test_members_outside_the_archive_are_refused(index, tmp_path, monkeypatch):
    make_wheel(index / NAME, {"demo/../../evil.txt": "x"})
    change(monkeypatch, sha256=hashlib.sha256((index / NAME).read_bytes()).hexdigest())
    with pytest.raises(SourceError, match="leads outside"):
        fetch("demo")
    assert leftovers(tmp_path) == [] and not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("cut", [20, 200, 700])
def test_a_truncated_archive_is_refused(tmp_path, cut):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for name in "abc":
            content = os.urandom(400)
            info = tarfile.TarInfo(f"demo-1.0/{name}.txt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "demo-1.0.tar.gz").write_bytes(whole.getvalue()[:cut])
    archive = Archive("demo==1.0", "demo-1.0.tar.gz", "", ("*/a.txt", "*/c.txt"), 1)
    with pytest.raises(SourceError, match=r"demo-1.0.tar.gz"):
        sources._extract(archive, tmp_path / "demo-1.0.tar.gz", tmp_path / "out")


def test_two_processes_fetch_once(index, tmp_path):
    both = [other_process("print(sources.fetch('demo'))") for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0] and sum("Successfully downloaded" in errors for _, errors in told) == 1


def test_an_unknown_archive_is_refused():
    with pytest.raises(SourceError, match="'nothing' is not known; use one of smollm2-135m"):
        fetch("nothing")
