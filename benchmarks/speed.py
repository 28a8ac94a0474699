"""CPU seconds of this build beside those of the tree at commit 4f1b2ab, in turns in one run, with medians of ratios.

Each under the machine's own settings, and under those of AVX2, where fp32 is computed in. A ratio above 1 means that
this build needs less.
"""

import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import studylib

HERE = Path(__file__).parent.parent
BEFORE = "4f1b2ab"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SETTINGS: dict[str, dict[str, str]] = {"avx2": AVX2, "own": {}}
MODEL, LENGTH, WINDOWS, BATCH, WRITTEN, STEPS, ROUNDS = "smollm2-135m", 256, 4, 64, 16, 3, 1
WINGS = ("data", "quant", "train", "methods", "evaluate", "config", "study")


def find(name: str) -> Any:
    """What either tree calls so: modules have moved since."""
    places = [f"{wing}.{module}" for wing in WINGS for module in ("machine", "generation", "scores", "loop", "lora")]
    flat = (
        "models",
        "distill",
        "finetuning",
        "sampling",
        "evaluation",
        "adapters",
        "formats",
        "layers",
        "corpora",
        "training_loop",
    )
    more = ("data.models", "data.corpora", "quant.layers", "train.distillation", "train.finetuning", "config.settings")
    for place in (*more, *places, *flat, "memory", "tuned"):
        if Path(studylib.__file__).parent.joinpath(f"{place.replace('.', '/')}.py").exists():
            module = importlib.import_module(f"studylib.{place}")
            if hasattr(module, name):
                return getattr(module, name)
    raise ImportError(f"neither tree has {name}")


def seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


class Tree:
    """The tasks, by either tree; each answers CPU seconds by name."""

    def __init__(self) -> None:
        self.load, tokens = find("load_model"), find("load_tokenizer")(MODEL)
        self.tokenizer, self.autocast = tokens, find("autocast")
        self.windows = find("windows")("c4", tokens, LENGTH, WINDOWS, "training")
        self.pairs, self.held_out = find("training_pairs")("alpaca")
        self.whole = self.load(MODEL)

    def evaluation(self) -> dict[str, float]:
        """Windows scored by a model that was rounded to 4-8-4."""
        if not hasattr(self, "rounded"):
            self.rounded = find("freeze_weights")(find("quantize_model")(self.load(MODEL), "4-8-4"))
        score = find("window_losses")
        return {"evaluation 4-8-4": seconds(lambda: score(self.rounded, self.windows))}

    def distillation(self) -> dict[str, float]:
        """A step at 4-8-4, teacher states kept, beside one of plain fine-tuning on labels; one window a step."""
        student, head = find("quantize_model")(self.load(MODEL), "4-8-4"), self.whole.lm_head.weight.detach().clone()
        plain, at, labels = self.load(MODEL).train(), [], []
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

        def label_step(tokens: int) -> None:
            at.append(time.process_time())
            tokens = self.windows[:1]
            with self.autocast(plain.device):
                loss = plain(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            labels.append(time.process_time() - at[-1])
            at.append(time.process_time())

        with tempfile.TemporaryDirectory() as folder:
            states = find("keep_teacher_states")(self.whole, self.windows, Path(folder) / "states.npy")
            settings = find("Training")(STEPS, 1, learning_rate=1e-5)
            find("train_llm_qat")(student, states, head, self.windows, settings, folder, progress=label_step)
        steps = [after - before for before, after in itertools.pairwise(at)][1::2]
        return {"distillation step 4-8-4": min(steps[1:]), "label step": min(labels[1:])}

    def fine_tuning(self) -> dict[str, float]:
        """A step of QLoRA 4-16-16, and one measurement of its curve; the second arm of a process."""
        found, counts, fit = {}, [], find("fit")
        module = sys.modules[fit.__module__]

        def watched(*args, held_out_loss, **settings):
            def measured():
                begun = time.process_time()
                loss = held_out_loss()
                points.append(time.process_time() - begun)
                return loss

            return fit(*args, held_out_loss=measured, **settings)

        module.fit = watched
        try:
            for seed in range(2):
                points: list[float] = []
                model = self.load(MODEL)
                find("attach")(model, "qlora", format=find("Format")("nf"), adapter=find("Adapter")(), seed=seed)
                learn, budget = find("Instructions")("alpaca", LENGTH, seed), find("Tuning")(2, 2, 1e-3)
                with tempfile.TemporaryDirectory() as folder:
                    tune = find("fine_tune")
                    given = model, self.tokenizer, self.pairs, learn, budget, folder
                    whole = seconds(lambda: tune(*given, held_out=self.held_out))  # noqa: B023
                counts.append(len(points))
                found = {"fine-tuning step": (whole - sum(points)) / 2, "curve point": statistics.median(points)}
            found["points saved in a second arm"] = float(counts[0] - counts[1])
        finally:
            module.fit = fit
        return found

    def generation(self) -> dict[str, float]:
        """64 texts written together, and by transformers' `generate`: seconds a token."""
        start = torch.arange(100, 100 + BATCH)[:, None]
        tokens = {"ours": 0, "theirs": 0}

        def ours() -> None:
            sampling = find("Sampling")(BATCH, WRITTEN, "sampled")
            _, lengths = find("generate_sequences")(self.whole, start, sampling, seed=0)
            tokens["ours"] = int((lengths - 1).sum())

        @torch.no_grad()
        def theirs() -> None:
            settings = {"do_sample": True, "top_k": 50, "max_length": WRITTEN, "pad_token_id": 0}
            with self.autocast(start.device):
                found = self.whole.generate(start, attention_mask=torch.ones_like(start), **settings)[:, 1:]
            ended = (found == self.whole.generation_config.eos_token_id).cumsum(1)
            tokens["theirs"] = int((ended.cumsum(1) <= 1).sum())

        spent = {"ours": seconds(ours), "theirs": seconds(theirs)}
        return {"generation": spent["ours"] / tokens["ours"], "generate": spent["theirs"] / tokens["theirs"]}

    @torch.no_grad()
    def scoring(self) -> dict[str, float]:
        """Windows scored in full precision, beside a forward pass that gives logits."""

        def forward() -> None:
            for tokens in self.windows.split(4):
                with self.autocast(tokens.device):
                    self.whole(input_ids=tokens, use_cache=False)

        score = find("window_losses")
        return {"scoring": seconds(lambda: score(self.whole, self.windows)), "forward pass": seconds(forward)}


def work(setting: str) -> None:
    """Answer the tasks that are asked for, a line each."""
    torch.set_num_threads(1)
    models = sys.modules[find("load_model").__module__]
    if setting == "avx2":  # its products in bf16 are emulated
        models.compute_dtype = lambda: torch.float32
    find("keep_freed_memory")()
    tree = Tree()
    print(json.dumps({"ready": str(models.compute_dtype())}), flush=True)
    for line in sys.stdin:
        print(json.dumps(getattr(tree, line.strip())()), flush=True)


TASKS = ("evaluation", "distillation", "scoring", "generation", "fine_tuning")


class Worker:
    """A process that computes with one tree."""

    def __init__(self, tree: Path, setting: str):
        own = os.environ | SETTINGS[setting] | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        call = [sys.executable, __file__, setting]
        self.process = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own, cwd=tree
        )

    def answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("a tree ended before it answered")

    def ask(self, task: str) -> dict[str, float]:
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        return self.answer()


def compared(now: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of ratios within rounds."""

    def ratio(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)

    def share(found: dict[str, list[float]], points: float) -> float:
        """Of quick's fine-tuning of 24 steps that goes into so many points of its curve."""
        curve = statistics.median(found["curve point"]) * points
        return round(curve / (curve + 24 * statistics.median(found["fine-tuning step"])), 3)

    timed = [name for name in now if "saved" not in name]
    result: dict[str, Any] = {"times_before": {name: ratio(before[name], now[name]) for name in timed}}
    for tree, found in (("now", now), ("before", before)):
        saved = found.pop("points saved in a second arm")[0]
        result[tree] = {
            "cpu_seconds": {name: round(statistics.median(values), 4) for name, values in found.items()},
            "distillation_step_to_label_step": ratio(found["distillation step 4-8-4"], found["label step"]),
            "generation_times_generate": ratio(found["generate"], found["generation"]),
            "scoring_times_forward_pass": ratio(found["forward pass"], found["scoring"]),
            "curve_share_first_arm": share(found, 5),
            "curve_share_second_arm": share(found, 5 - saved),
        }
    return result


def main() -> None:
    from studylib.study.machine import environment

    result: dict[str, Any] = {"what": __doc__, "before": BEFORE, "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "before"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", old, BEFORE], check=True, capture_output=True)
        try:
            for setting in SETTINGS:
                workers = {"now": Worker(HERE, setting), "before": Worker(old, setting)}
                dtypes = {tree: worker.answer()["ready"] for tree, worker in workers.items()}
                found: dict[str, dict[str, list[float]]] = {tree: {} for tree in workers}
                for turn, task in itertools.product(range(ROUNDS + 1), TASKS):
                    if turn == 0 and task not in ("evaluation", "scoring"):  # others warm up by themselves
                        continue
                    for tree, worker in workers.items():
                        answer = worker.ask(task)
                        print(setting, tree, answer, flush=True)
                        for name, value in answer.items():
                            if turn:
                                found[tree].setdefault(name, []).append(value)
                result[setting] = {"compute_dtype": dtypes["now"]} | compared(found["now"], found["before"])
                for worker in workers.values():
                    worker.process.stdin.close()
                    worker.process.wait()
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", old], check=True)
    result["environment"] = environment() | {
        "capabilities": sorted(name for name, have in torch.cpu.get_capabilities().items() if have is True)
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for setting in SETTINGS:
        print(setting, json.dumps(result[setting], indent=1))


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
