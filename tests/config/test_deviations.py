"""docs/deviations.md says of each profile what the profile has."""

from pathlib import Path

import pytest

from studylib.config import ZERO_SHOT
from studylib.config.budgets import profile
from studylib.config.settings import Format
from studylib.methods import build_arm

PAGE = Path(__file__).parents[2] / "docs" / "deviations.md"
PROFILES = ("paper", "full", "quick")
NF4, INT4 = Format("nf", double=True), Format("int-full", 4, 128)
ARMS = {  # of the comparisons that a section is about
    "QLoRA": {"LoRA": ("lora", None), "QLoRA": ("qlora", NF4)},
    "L4Q": {
        "QLoRA*": ("qlora", INT4),
        "GPTQ + LoRA": ("gptq+lora", INT4),
        "QA-LoRA": ("qa-lora", INT4),
        "QAT-LoRA": ("qat-lora", INT4),
        "L4Q": ("l4q", INT4),
    },
}


def sampling(words):
    return lambda section, budget: words(budget.sampling)


def training(words):
    return lambda section, budget: words(budget.training)


def tuned(words):
    """Of each arm of the section's comparison; once where all say the same."""

    def said(section, budget):
        found = {}
        for title, (method, format) in ARMS[section].items():
            bits = "16-16-16" if format is None else "4-16-16"
            found.setdefault(words(build_arm(budget, "m", method, bits, format=format)), []).append(title)
        return ", ".join(found) if len(found) == 1 else "; ".join(f"{', '.join(own)} {x}" for x, own in found.items())

    return said


SAID = {
    "windows": sampling(lambda own: f"{own.count:,} of {own.length:,} tokens, {own.strategy}"),
    "steps": training(lambda own: f"{own.steps:,}"),
    "batch": training(lambda own: f"{own.batch}"),
    "rate": training(lambda own: f"{own.learning_rate:g}"),
    "schedule": training(lambda own: f"{own.schedule}, warm-up {own.warmup:g}"),
    "weight decay": training(lambda own: f"{own.weight_decay:g}"),
    "clip": training(lambda own: f"{own.max_grad_norm:g}"),
    "loss scale, mask, masters": training(lambda own: f"{own.scale}, {own.mask}, {own.masters}"),
    "steps of tuning": tuned(lambda arm: f"{arm.tuning.steps:,}"),
    "batch of tuning": tuned(lambda arm: f"{arm.tuning.batch}"),
    "rate of tuning": tuned(lambda arm: f"{arm.tuning.learning_rate:.2g}"),
    "distillation when merged": lambda section, budget: (
        f"{budget.merging.steps} steps of {budget.merging.batch}, rate {budget.merging.learning_rate:g}"
    ),
    "rate of scales": tuned(lambda arm: "as all" if arm.tuning.grid_rate is None else f"{arm.tuning.grid_rate:g}"),
    "schedule of tuning": tuned(lambda arm: f"{arm.tuning.schedule}, warm-up {arm.tuning.warmup:g}"),
    "weight decay of tuning": tuned(lambda arm: f"{arm.tuning.weight_decay:g}"),
    "clip of tuning": tuned(lambda arm: f"{arm.tuning.max_grad_norm:g}"),
    "rank, alpha": tuned(lambda arm: f"{arm.adapter.rank}, {arm.adapter.alpha:g}"),
    "dropout": tuned(lambda arm: f"{arm.adapter.dropout:g}"),
    "instructions": lambda section, budget: f"{budget.instructions.source}, {budget.instructions.length:,} tokens",
    "group": lambda section, budget: f"{budget.group}",
    "seeds": lambda section, budget: f"{len(budget.seeds)}",
    "tasks": lambda section, budget: (
        ("8 zero-shot" if budget.evaluation.tasks == ZERO_SHOT else ", ".join(budget.evaluation.tasks))
        + "".join(f", {task}" for task in budget.few_shot)
    ),
    "items": lambda section, budget: f"{budget.evaluation.items or 'all'}",
    "perplexity": lambda section, budget: f"{budget.evaluation.windows} windows of {budget.evaluation.length:,}",
}


def rows():
    """(section, setting, column, cell) of every table that has the profiles' columns."""
    section, columns = "", []
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section, columns = line.removeprefix("## "), []
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "`paper`" in cells:
            columns = cells
        elif columns and cells and not set(cells[0]) <= {"-"}:
            yield from ((section, cells[0], name, cell) for name, cell in zip(columns, cells, strict=True))


CELLS = [row for row in rows() if row[2].strip("`") in PROFILES]


@pytest.mark.parametrize(("section", "setting", "column", "cell"), CELLS)
def test_a_cell_says_what_the_profile_has(section, setting, column, cell):
    assert cell == SAID[setting](section, profile(column.strip("`")))


def test_all_settings_of_all_three_papers_are_there():
    found = {(section, setting) for section, setting, *_ in CELLS}
    assert {section for section, _ in found} == {"LLM-QAT", "QLoRA", "L4Q", "Evaluation"}
    assert {setting for _, setting in found} == SAID.keys() and len(CELLS) == 3 * len(found)
