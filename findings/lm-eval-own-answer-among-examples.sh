#!/usr/bin/env bash
# lm-eval leaves the scored item out of its own few-shot examples only where the scored split is called the test split.
#
# One would expect: a task whose examples come from the split that is scored never shows an item its own answer, whether that
# split is named as validation_split or as test_split: the harness draws one example more and removes the item.
# Seen with lm-eval 0.4.13, 5 examples from 40 items: with validation_split and fewshot_split both "validation", eight prompts of
# 40 hold their own question and answer (the number depends on the seed). With test_split in place of validation_split, none
# does; nor does one where fewshot_split is left out and the harness falls back to the validation split by itself. So that to
# name the split that is used anyway lets the answer in.
# Guess written down before the run: none in all three.
# Where it comes from: lm_eval/api/task.py, ConfigurableTask.fewshot_context, which compares the split of the examples with
# test_split alone.
# Whom it hurts: who writes a task on a data set that has but a validation split, or takes the labelled validation split in place
# of a hidden test split (TriviaQA, PIQA, HellaSwag). Scores are too high by up to shots/items of the split, without a warning.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm-eval==0.4.13 datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

from lm_eval.tasks import TaskManager

rows = [{"question": f"What is {i} times 37", "answer": str(37 * i)} for i in range(40)]
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
kinds = {
    "validation_split and fewshot_split": "validation_split: validation\nfewshot_split: validation\n",
    "test_split and fewshot_split": "test_split: validation\nfewshot_split: validation\n",
    "validation_split alone": "validation_split: validation\n",
}
found = {}
for number, (kind, splits) in enumerate(kinds.items()):
    Path(f"task{number}.yaml").write_text(
        f"task: own_{number}\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {Path('rows.jsonl').absolute()}}}}}\n{splits}"
        "output_type: generate_until\nnum_fewshot: 5\n"
        'doc_to_text: "Question: {{question}}?\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
    )
    manager = TaskManager(include_path=str(Path.cwd()), include_defaults=False)
    (task,) = manager.load([f"own_{number}"])["tasks"].values()
    task.set_fewshot_seed(seed=1234)
    prompts = [(row, task.fewshot_context(row, 5)) for row in task.eval_docs]
    assert all(prompt.count("Question: ") == 6 for _, prompt in prompts)
    found[kind] = sum(f"{row['question']}?\nAnswer: {row['answer']}" in prompt for row, prompt in prompts)
    print(f"{kind}: {found[kind]} of {len(prompts)} prompts hold their own answer")
if not found["validation_split and fewshot_split"]:
    sys.exit("changed: the item is left out of its examples now")
if found["test_split and fewshot_split"] or found["validation_split alone"]:
    sys.exit("changed: an item stands among its examples in the other cases, too")
PYTHON
