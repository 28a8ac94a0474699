"""What is written whole, sealed, found damaged, and what killed processes leave."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from studylib.config import files
from studylib.config.files import (
    DAY,
    SEAL,
    SUMS,
    kept_if_possible,
    kept_name,
    make_folder,
    remove_leftovers,
    seal_folder,
    usable,
    write_whole,
    written_whole,
)


def test_a_file_is_as_it_was_written_until_it_is_changed(tmp_path, capsys):
    path = tmp_path / "a.txt"
    write_whole(path, "good\n", sealed=True)
    assert usable(path) and not usable(tmp_path / "b.txt")
    assert subprocess.run(["sha256sum", "--check", "--quiet", f"a.txt{SEAL}"], cwd=tmp_path).returncode == 0
    stamp = path.stat()
    path.write_text("evil\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as large and as old as it was
    assert not usable(path) and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"study: {path} is not as it was written; it is made again\n"
    assert not usable(path) and not capsys.readouterr().err


def test_a_seal_is_of_its_own_file_only(tmp_path):
    for name in "ab":
        write_whole(tmp_path / name, name, sealed=True)
    (tmp_path / f"a{SEAL}").write_text((tmp_path / f"b{SEAL}").read_text())
    assert not usable(tmp_path / "a") and usable(tmp_path / "b")


def sealed(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "deep" / "b").write_text("b")
    seal_folder(folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "deep" / "b").write_text("c"), "deep/b is not as it was written"),
        (lambda folder: (folder / "a").unlink(), "a is not as it was written"),
        (lambda folder: (folder / SUMS).unlink(), "was not finished: it has no digest"),
        (lambda folder: (folder / SUMS).write_bytes(b"\xff"), "was not finished: it has no digest"),
        (lambda folder: (folder / SUMS).write_text(""), "was not finished: not all of it has a digest"),
        (
            lambda folder: (folder / SUMS).write_text((folder / SUMS).read_text().splitlines()[0] + "\n"),
            "was not finished: not all of it has a digest",
        ),
        (lambda folder: (folder / "c").write_text(""), "was not finished: not all of it has a digest"),
    ],
)
def test_a_folder_is_whole_or_removed(tmp_path, capsys, damage, told):
    folder = sealed(tmp_path / "folder")
    (folder / ".nfs").write_text("a file system's own")
    assert usable(folder)
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=folder).returncode == 0
    damage(folder)
    assert not usable(folder) and not folder.exists()
    assert told in capsys.readouterr().err


def test_a_folder_is_written_whole(tmp_path):
    with written_whole(tmp_path / "made") as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "a").read_text() == "a" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="not empty"), written_whole(tmp_path / "made") as partial:
        partial.mkdir()
    assert (tmp_path / "made" / "a").read_text() == "a" and len(list(tmp_path.iterdir())) == 1


def test_others_may_read_what_safetensors_wrote(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs")
    with written_whole(tmp_path / "ours") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    (tmp_path / "plain").write_text("")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["ours"] == modes["plain"] and modes["theirs"] == 0o600


def fill(path, writer):
    """Write 400,000 bytes."""
    with written_whole(path, sealed=True, size=400_000) as partial:
        if writer == "safetensors":
            save_file({"a": torch.zeros(100_000)}, partial)
        elif writer == "numpy":
            with partial.open("wb") as file:
                np.savez(file, a=np.zeros(50_000))  # through the file: np.save is not, and its errors have no number
        else:
            partial.write_bytes(b"\0" * 400_000)


@pytest.fixture
def full_disk(tmp_path):
    """A file system with room for 100 kB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("writer", ["safetensors", "numpy", "bytes"])
def test_a_full_disk_is_an_error_with_the_path_and_the_bytes(full_disk, writer, capsys):
    with pytest.raises(OSError, match="it takes 400,000 bytes") as caught:
        fill(full_disk / "x", writer)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(full_disk / "x"))
    assert not list(full_disk.iterdir())
    with kept_if_possible("the model"):
        fill(full_disk / "x", writer)
    assert capsys.readouterr().err == "study: the model is not kept (No space left on device; it takes 400,000 bytes)\n"


@pytest.mark.parametrize("writer", ["safetensors", "numpy", "bytes"])
def test_a_file_that_may_not_grow_so_large_is_an_error_with_the_path(tmp_path, writer):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="it takes 400,000 bytes") as caught:
            fill(tmp_path / "x", writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError) as caught, written_whole(tmp_path / "x"):
        (tmp_path / "elsewhere" / "y").read_text()
    assert caught.value.filename == str(tmp_path / "elsewhere" / "y")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "x"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


WRITER = """
import sys, time
from studylib.config.files import written_whole
with written_whole(sys.argv[1]) as partial:
    partial.write_text("half")
    print(flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    """When the folder is looked through, and when something is written beside it."""
    (tmp_path / "deep").mkdir()
    killed, living, other = (
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "deep" / name], stdout=subprocess.PIPE)
        for name in ("killed", "living", "other")
    )
    try:
        for process in (killed, living, other):
            process.stdout.readline()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = sorted(map(kept_name, (tmp_path / "deep").iterdir()))
        remove_leftovers(tmp_path)
        assert (left, sorted(map(kept_name, (tmp_path / "deep").iterdir()))) == (
            ["killed", "living", "other"],
            ["living", "other"],
        )
        other.send_signal(signal.SIGKILL)
        other.wait()
        write_whole(tmp_path / "deep" / "new", "")
        assert sorted(map(kept_name, (tmp_path / "deep").iterdir())) == ["living", "new"]
    finally:
        for process in (killed, living, other):
            process.kill()
            process.communicate()


def test_what_another_machine_writes_is_left_for_a_day(tmp_path, monkeypatch):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    number = int(gone.stdout)
    young, old = (tmp_path / f".partial-{machine}-{number}-x" for machine in ("0" * 8, "1" * 8))
    before = tmp_path / f".partial-{number}-batch-00000.npz"  # of the version before, which had no folders
    young.mkdir()
    old.mkdir()
    before.write_text("")
    os.utime(old, (time.time() - DAY - 60,) * 2)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]
    monkeypatch.setattr(files.platform, "node", lambda: "another")
    with written_whole(tmp_path / "y"):
        mine = next(path for path in tmp_path.iterdir() if path != young)
        monkeypatch.undo()
        remove_leftovers(tmp_path)
        assert mine.exists()
        (mine / "y").write_text("")


def test_a_file_in_the_place_of_a_folder(tmp_path, capsys):
    there = tmp_path / "data"
    there.write_text("x")
    make_folder(there)
    assert there.is_dir() and f"{there} is no folder; it is made again" in capsys.readouterr().err
    make_folder(there)
    (tmp_path / "link").symlink_to(there)
    make_folder(tmp_path / "link")  # a folder elsewhere is one
    assert (tmp_path / "link").is_symlink() and not capsys.readouterr().err
