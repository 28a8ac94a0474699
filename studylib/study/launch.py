"""One arm's training in several processes, by a launcher such as accelerate's or torchrun.

STUDY_LAUNCH holds the launcher's command, without what it launches: that is `-m studylib.study.launched`. Each of its
processes makes the arm's model as ever and trains on its share of each batch (Trainer and accelerate choose
data parallelism or FSDP by what the launcher was given). They leave the end of the training as a checkpoint, from which
the process that launched them goes on: it deploys, scores and writes the record.
"""

import dataclasses
import functools
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from studylib import data
from studylib.config import Arm
from studylib.methods import find, title
from studylib.study.records import Store, is_installed

LAUNCH = "STUDY_LAUNCH"
MODULE = "studylib.study.launched"
TOLD = "studylib: "  # begins a line of the first process that is for the one that launched it


def wanted(arm: Arm) -> bool:
    """Whether the arm's training is launched; methods of one's own notebook are known in its process alone."""
    return bool(os.environ.get(LAUNCH)) and arm.budget is not None and is_installed(find(arm.method))


def check(arm: Arm) -> None:
    """ValueError, in one line, for a launcher that does not work or whose processes cannot share the arm's batches."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{LAUNCH}: put the launcher there and start study alone, not once in each of its processes")
    if not wanted(arm):
        return
    assert arm.budget is not None
    found = _described(os.environ[LAUNCH])
    if found["processes"] < 2:
        raise ValueError(f"{LAUNCH}: it starts one process, which is what there is without it; ask it for more")
    if found["sharded"] and found["version"] != "2":
        raise ValueError(f"{LAUNCH}: FSDP of version 1 cannot be used; add --fsdp_version 2")
    if found["sharded"] and data.device().type == "cpu":
        raise ValueError(f"{LAUNCH}: accelerate shards nothing on a processor; leave FSDP out")
    if arm.budget.batch % found["processes"]:
        raise ValueError(
            f"{LAUNCH}: its {found['processes']} processes cannot share the batch of {arm.budget.batch} of "
            f"{title(arm)}; use a number that divides it"
        )


@functools.cache
def _described(command: str) -> dict[str, Any]:
    """What the launcher makes: how many processes, and whether they shard the model, by which version of FSDP."""
    return next(_lines(command, {}))


def train(arm: Arm, store: Store, progress: Callable[[str, int], None]) -> int:
    """Train the arm in processes of its own, to a checkpoint of its end in the store; how many there were.

    progress: told of finished work, by phase, in tokens. Raises ValueError with what one of the processes failed with.
    """
    asked = {"arm": dataclasses.asdict(arm), "results": str(store.folder.absolute())}
    for told in _lines(os.environ[LAUNCH], asked):
        progress(told["phase"], told["tokens"])
    return _described(os.environ[LAUNCH])["processes"]


def _lines(command: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the launcher's first process tells, as it tells it. Whoever stops listening stops them."""
    import torch

    if data.device().type == "cuda":
        torch.cuda.empty_cache()  # it is theirs meanwhile
    words = shlex.split(command)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                [*words, "-m", MODULE, json.dumps(asked)], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        except OSError as error:
            raise ValueError(f"{LAUNCH}: {words[0]!r} cannot be started ({error.strerror})") from error
        assert process.stdout is not None
        told = 0
        try:
            for line in process.stdout:
                if line.startswith(TOLD):
                    found = json.loads(line.removeprefix(TOLD))
                    if "error" in found:
                        raise ValueError(f"{LAUNCH}: {found['error']}")
                    told += 1
                    yield found
        finally:
            process.terminate()
            status = process.wait()
        if status or not told:
            errors.seek(0)
            last = "".join(errors.read().rstrip().splitlines()[-1:])
            raise ValueError(f"{LAUNCH}: {command!r} ended with status {status} ({last})")
