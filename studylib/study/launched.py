"""One of the processes that a launcher has started for a training (see launch)."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from studylib.config import Arm
from studylib.study.launch import TOLD
from studylib.study.records import Store


def main() -> None:
    """Be one of the processes: describe them, or train an arm with the others."""
    first = os.environ.get("RANK", "0") == "0"

    def tell(found: dict[str, Any]) -> None:
        if first or "error" in found:
            print(TOLD + json.dumps(found), flush=True)  # fails, and ends this process, where nobody listens any more

    asked = json.loads(sys.argv[1])
    if not asked:
        sharded, version = os.environ.get("ACCELERATE_USE_FSDP") == "true", os.environ.get("FSDP_VERSION")
        tell({"processes": int(os.environ.get("WORLD_SIZE", 1)), "sharded": sharded, "version": version})
        return
    try:
        _train(Arm.from_dict(asked["arm"]), Store(asked["results"]), tell)
    except Exception as error:
        traceback.print_exc()
        tell({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


def _train(arm: Arm, store: Store, tell: Callable[[dict[str, Any]], None]) -> None:
    # Each process makes the whole model, whose layers are not those of a checkpoint that transformers could share out.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the study says what is computed in which type
    import torch

    from studylib.data import device
    from studylib.study.run import train_only
    from studylib.train import Launched

    if device().type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with contextlib.suppress(Launched):
        train_only(arm, store, lambda phase, tokens: tell({"phase": phase, "tokens": tokens}))


if __name__ == "__main__":
    main()
