"""Archives through the real pip, from a folder of packages made here; and everything that can go wrong on the way."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from studylib.data import sources
from studylib.data.sources import Archive, SourceError, fetch

NAME = "demo_archive-1.0-py3-none-any.whl"


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        info = "demo_archive-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-archive\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, as pip sees it."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder / NAME, {"demo/a.txt": "first", "demo/sub/b.txt": "second", "demo/code.py": "raise SystemExit"})
    archive = Archive(
        "demo-archive==1.0", NAME, hashlib.sha256((folder / NAME).read_bytes()).hexdigest(), ("demo/*.txt",)
    )
    monkeypatch.setitem(sources.ARCHIVES, "demo", archive)
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def change(monkeypatch, **fields):
    fields = vars(sources.ARCHIVES["demo"]) | fields
    monkeypatch.setitem(sources.ARCHIVES, "demo", Archive(**fields))


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_wanted_members_are_fetched_once(index, tmp_path, monkeypatch):
    folder = fetch("demo")
    assert {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()} == {
        "demo/a.txt": "first",
        "demo/sub/b.txt": "second",
    }
    shutil.rmtree(index)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("called pip again"))
    assert fetch("demo") == folder


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
    with pytest.raises(SourceError, match=r"demo-archive==1.0: cannot write to .*No space left.*free some space"):
        fetch("demo")
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(sources.shutil, "copyfileobj", original)
    assert (fetch("demo") / "demo" / "a.txt").read_text() == "first"


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match=r"cannot write to .*set STUDY_CACHE"):
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
    archive = Archive("demo==1.0", "demo-1.0.tar.gz", "", ("*/a.txt", "*/c.txt"))
    with pytest.raises(SourceError, match=r"demo-1.0.tar.gz"):
        sources._extract(archive, tmp_path / "demo-1.0.tar.gz", tmp_path / "out")


def test_two_processes_fetch_once(index, tmp_path):
    script = (
        "import os; from studylib.data import sources; from studylib.data.sources import Archive\n"
        f"sources.ARCHIVES['demo'] = Archive(**{vars(sources.ARCHIVES['demo'])!r})\n"
        "print(sources.fetch('demo'))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0] and sum("Successfully downloaded" in errors for _, errors in told) == 1


def test_an_unknown_archive_is_refused():
    with pytest.raises(SourceError, match="'nothing' is not known; use one of smollm2-135m"):
        fetch("nothing")
