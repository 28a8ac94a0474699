"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, inside; at the end it takes the place of `path`, or is removed after an error.

    What was there stays until then, and a reader sees the old file or the new one. The file is on the disk before it
    takes its place, so that a crash leaves one of the two.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write the text to the file, UTF-8, or leave what was there."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
