"""The kernel that a notebook is executed in: of this interpreter, with its files in a private folder, on no port."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config

from studylib.config import AS_TEXT

CONNECTION, LOG, ENDED = "kernel.json", "log", "ended"  # in the private folder
SOCKET = "kernel-ipc-5"  # the longest name there; jupyter_client puts sockets beside the connection file
RANDOM = "study-12345678"  # as long as the folder's own name


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new temporary folder for all files of one kernel, removed in the end. No other user can enter it.

    The system's temporary folder, or /tmp where that has too long a path for a socket. Raises ValueError where both
    cannot be used.
    """
    parents = [tempfile.gettempdir(), "/tmp"]
    longest = zmq.IPC_PATH_MAX_LEN
    fitting = [
        parent
        for parent in parents
        if len(os.fsencode(os.path.join(parent, RANDOM, SOCKET))) <= longest and os.access(parent, os.W_OK)
    ]
    if not fitting:
        raise ValueError(
            f"TMPDIR: {parents[0]} is too long a path for a kernel's sockets, which have {longest} bytes; "
            "use a shorter one"
        )
    with tempfile.TemporaryDirectory(prefix=RANDOM[:6], dir=fitting[0], ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def configuration(folder: Path) -> Config:
    """Of a `Manager` whose kernel has its files in `folder`."""
    return Config(KernelManager={"transport": "ipc", "connection_file": str(folder / CONNECTION)})


class Manager(AsyncKernelManager):
    """Starts this interpreter, whatever kernelspecs are installed, without the user's own IPython profile."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", __name__, "-f", "{connection_file}"], language="python")

    @property
    def _folder(self) -> Path:
        return Path(self.connection_file).parent

    async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
        options["env"] = os.environ | {"IPYTHONDIR": str(self._folder / "ipython")} | AS_TEXT
        with (self._folder / LOG).open("wb") as log:
            await super().start_kernel(**options, stdout=log, stderr=log)

    async def cleanup_resources(self, restart: bool = False) -> None:  # type: ignore[override]
        status = await self.provisioner.poll() if self.provisioner else None
        if status is not None:
            (self._folder / ENDED).write_text(str(status))
        await super().cleanup_resources(restart)


def why_it_ended(folder: Path) -> str:
    """In words, what became of the kernel that had its files in `folder`."""
    try:
        status = int((folder / ENDED).read_text())
    except OSError:
        return "was lost"
    if status == -signal.SIGKILL:
        return "was killed, most often for want of memory: use a smaller model or profile, or fewer jobs"
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def last_words(folder: Path) -> str:
    """The last line that the kernel wrote by itself, outside of the notebook; empty if there is none."""
    log = folder / LOG
    return "".join(log.read_text(errors="replace").rstrip().splitlines()[-1:]) if log.exists() else ""


def main() -> None:
    """Be the kernel."""
    from ipykernel import iostream, kernelapp

    class WithoutPipe(iostream.IOPubThread):
        """With it, ipykernel listens on a port of 127.0.0.1 for what forked processes print, whatever the transport."""

        def __init__(self, socket: Any, pipe: bool, session: Any):
            super().__init__(socket, session=session)

    atexit.register(gc.freeze)  # as in cli
    kernelapp.IOPubThread = WithoutPipe  # type: ignore[misc, assignment]
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
