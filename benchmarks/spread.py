"""What the whole study costs at `full` and `paper` on larger models, and how it is spread over devices.

Operations are counted: two for each parameter and token of a forward pass, as `study run` plans arms in forward passes
(studylib.study.pace). Hours are those at RATE, which is assumed and not measured: a third of what an H100's data sheet
gives for dense products in bf16. Small models reach less. Memory is planned, as by `study plan`.

The spread is simulated: arms in the order of `study run`, each to the first device that is free; how long they take
scatters, one device in ten is slow, devices die and begin their arm anew from its last checkpoint. The simulation is
held against a run of two workers here: `spread.py measured`.
"""

import argparse
import dataclasses
import heapq
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

PEAK, SHARE = 989e12, 1 / 3  # operations a second, in bf16 without sparsity; what a training reaches of it
RATE = PEAK * SHARE
PROFILES, DEVICES = ("full", "paper"), (1, 8, 64)
SHAPES = {  # beside the default model: hidden, intermediate, layers, heads, heads of keys, vocabulary, tied
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 32000, False),
}
BYTES_OF_QAT = 20  # of a parameter: fp32 masters, gradients and AdamW's state, and the teacher in 16 bits
SCATTER = 0.25  # standard deviation of the logarithm of what an arm takes, beside its plan
SLOW, SLOWED = 0.1, 1.5  # one device in ten takes so many times as long
DEATHS, LOST = 0.01, 120.0  # of a device in an hour; seconds since its last checkpoint
BEGINNING = 20.0  # seconds in which a worker imports its libraries
DRAWS = 200
ARMS, STEPS = 10, (200, 1000)  # of the run that is measured
JOBS = 2


def spread(seconds, devices, *, beginning=BEGINNING, scatter=0.0, slow=0.0, deaths=0.0, draw=None):
    """When the last of the arms is done, seconds: each goes to the first device that is free, in their order."""
    draw = draw or np.random.default_rng(0)
    factors = np.where(draw.random(devices) < slow, SLOWED, 1.0)
    free = [(beginning, device) for device in range(min(devices, len(seconds)))]
    end = 0.0
    for own in seconds:
        begun, device = heapq.heappop(free)
        left = own * factors[device] * draw.lognormal(-(scatter**2) / 2, scatter)
        now = begun
        while deaths and (until := draw.exponential(3600 / deaths)) < left:
            now, left = now + until + beginning, left - max(0.0, until - LOST)
        heapq.heappush(free, (now + left, device))
        end = max(end, now + left)
    return end


def arms_of(profile):
    """All that the notebooks ask for, but those of a family of models, the longest first."""
    from studylib.study import notebooks as batch
    from studylib.study.pace import planned_work

    notebooks = [own for own in batch.find_notebooks([]) if not batch.takes_family(own) and not batch.sums_up(own)]
    assigned = batch.assign_parameters(notebooks, {"profile": profile})
    arms = dict.fromkeys(arm for own in notebooks for arm in batch.wanted_arms(own, assigned[own]))
    return sorted(arms, key=planned_work, reverse=True)


def configurations():
    from transformers import LlamaConfig

    from studylib.data import models

    found = {"135M": models.load_config("smollm2-135m")}
    for name, (hidden, intermediate, layers, heads, keys, vocabulary, tied) in SHAPES.items():
        found[name] = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=4096,
        )  # fmt: skip
    return found


def memory(config, budget):
    """Gigabytes of a training: those of fine-tuning a row at a time with checkpointing, by plan; those of LLM-QAT
    without activations."""
    from studylib.config import Adapter
    from studylib.data import models
    from studylib.evaluate import GB, plan
    from studylib.methods import METHODS

    found = {"LLM-QAT": BYTES_OF_QAT * models.parameters_of(config) / GB}
    for title, method, double in (("QLoRA", "qlora", True), ("L4Q", "l4q", False)):
        format = METHODS[method].usual_format(4, budget.group, double)
        planned = plan(
            config, method, format=format, adapter=Adapter(), length=budget.instructions.length, checkpointing=True
        )
        found[title] = planned.total / GB
    return {name: round(value, 1) for name, value in found.items()}


def costs():
    from studylib.config import profile
    from studylib.data import models
    from studylib.study.pace import COSTS, tokens

    found = {}
    sizes = {name: (models.parameters_of(config), config) for name, config in configurations().items()}
    for name in PROFILES:
        arms = arms_of(name)
        forward = [sum(COSTS[phase] * n for phase, n in tokens(arm).items() if phase != "decode") for arm in arms]
        found[name] = {"arms": len(arms), "tokens of forward passes": float(f"{sum(forward):.3g}")}
        for size, (count, config) in sizes.items():
            seconds = [2 * count * own / RATE for own in forward]
            hours = {}
            for devices in DEVICES:
                ends = [
                    spread(
                        seconds, devices, scatter=SCATTER, slow=SLOW, deaths=DEATHS, draw=np.random.default_rng(seed)
                    )
                    for seed in range(DRAWS)
                ]
                hours[devices] = [float(f"{own / 3600:.3g}") for own in np.quantile(ends, (0.05, 0.5, 0.95))]
            found[name][size] = {
                "parameters": count,
                "operations": float(f"{2 * count * sum(forward):.3g}"),
                "longest arm, hours": float(f"{max(seconds) / 3600:.3g}"),
                "hours by devices: 5%, median, 95%": hours,
                "gigabytes of a training": memory(config, profile(name)),
            }
            print(name, size, found[name][size], flush=True)
    return found


def table(costs):
    """As docs/scaling.md has it."""
    titles = ["Profile", "Model", "Operations", "Longest arm", *(f"{n} GPU{'s' * (n > 1)}" for n in DEVICES)]
    titles += ["A training of LLM-QAT", "of QLoRA", "of L4Q"]
    rows = [titles, ["---"] * len(titles)]
    for name, sizes in costs.items():
        for size in ("135M", *SHAPES):
            own = sizes[size]
            times = [own["longest arm, hours"], *(own["hours by devices: 5%, median, 95%"][str(n)][1] for n in DEVICES)]
            needed = [f"{value:,.1f} GB" for value in own["gigabytes of a training"].values()]
            rows.append([name, size, f"{own['operations']:.1e}", *map(duration, times), *needed])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def duration(hours):
    if hours < 1:
        return f"{max(1, 60 * hours):.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def some():
    """Arms of the smallest model that take between one and five times as long."""
    from studylib.config import Evaluation, profile
    from studylib.methods import build_arm

    budget = dataclasses.replace(profile("smoke"), evaluation=Evaluation(("wikipedia",), windows=4, length=32))
    steps = np.random.default_rng(0).integers(*STEPS, ARMS)
    return [
        build_arm(budget, "tiny-random", "llm-qat", "4-8-4", seed, training={"steps": int(own)})
        for seed, own in enumerate(steps)
    ]


def measured():
    """A run with two workers, beside what is simulated of what its records say that its arms took. When workers begin
    is measured by runs of two arms before."""
    from studylib.study import Store, arm_key, schedule

    arms = some()

    def run(asked):
        with tempfile.TemporaryDirectory() as folder:
            schedule.missing_arms(asked, Store(folder))
            begun = time.monotonic()
            schedule.compute_arms(asked, folder, jobs=JOBS)
            took = time.monotonic() - begun
            store = Store(folder)
            return took, [sum(store.load(arm_key(arm)).cost["seconds"].values()) for arm in asked]

    run(arms[:JOBS])  # which imports dask here
    took, each = run(arms[:JOBS])
    beginning = took - max(each)
    took, each = run(arms)
    told = spread(each, JOBS, beginning=beginning)
    return {
        "arms": len(arms),
        "seconds of each": [round(own, 1) for own in each],
        "seconds before the first": round(beginning, 1),
        "seconds measured": round(took, 1),
        "seconds simulated": round(told, 1),
        "simulated of measured": round(told / took, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="costs, measured (default: both)")
    options = parser.parse_args()
    from studylib.study import environment

    output = Path(__file__).with_suffix(".json")
    result = json.loads(output.read_text()) if output.exists() else {}
    result["what"] = __doc__
    for part in options.parts or ("costs", "measured"):
        result[part] = {"costs": costs, "measured": measured}[part]()
        if part == "measured":
            result[part]["load of other work"] = round(os.getloadavg()[0], 1)
        print(part, json.dumps(result[part], indent=1), flush=True)
    result["environment"] = environment()
    output.write_text(json.dumps(result, indent=1) + "\n")
    if "costs" in result:
        print(table(json.loads(output.read_text())["costs"]))


if __name__ == "__main__":
    main()
