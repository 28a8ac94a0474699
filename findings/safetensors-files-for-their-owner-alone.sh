#!/usr/bin/env bash
# safetensors' save_file writes files that only their owner can read, and a killed one leaves a hidden file behind.
#
# One would expect: a file with the rights that the umask gives, as of open() or torch.save, written under its own name.
# Guess written down before the run: mode 644 under umask 022, and after a kill a short file of the given name.
# Seen with safetensors 0.8.0: mode 600 whatever the umask; after a kill a file .tmpXXXXXX beside the old one, as large as
# what was written by then, which nothing removes. A file that was there gets another inode: locks and links are lost.
# Where it comes from: save_file writes to a file of the crate tempfile in the same folder and renames it; such files are
# made with mode 600, which stays.
# Whom it hurts: people who share a cache or results ("Permission denied" for the second user), and disks of machines
# where jobs are preempted while they write checkpoints of gigabytes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
umask 022
"$folder/venv/bin/python" - <<'PYTHON'
import os
import signal
import sys
import time

import numpy as np
from safetensors.numpy import save_file

save_file({"a": np.zeros(4)}, "theirs")
open("plain", "w").close()
modes = {name: oct(os.stat(name).st_mode & 0o777) for name in ("plain", "theirs")}
print(f"umask 022: {modes['plain']} of open(), {modes['theirs']} of save_file")
large, left = {str(i): np.zeros(2**23) for i in range(16)}, []
for wait in (0.02, 0.05, 0.1, 0.2):
    child = os.fork()
    if child == 0:
        save_file(large, "large")
        os._exit(0)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [name for name in os.listdir() if name.startswith(".tmp")]
    if left:
        break
print(f"after a kill: {', '.join(left) or 'nothing, it was too early or too late'}")
if modes["theirs"] == modes["plain"]:
    sys.exit("changed: save_file leaves the rights that the umask gives")
PYTHON
