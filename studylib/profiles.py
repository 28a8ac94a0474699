"""Named budgets to build arms from: how much data, training and evaluation a method may spend."""

import dataclasses
from dataclasses import dataclass

from studylib import merging
from studylib.adapters import GPTQ_LORA, L4Q, LORA, QA_LORA, QAT, QAT_LORA, QLORA, Adapter
from studylib.arms import CALIBRATED, EXECUTED, FULL_PRECISION, LLM_QAT, RTN, TRAINED, TUNED, Arm
from studylib.distill import Training
from studylib.evaluation import ZERO_SHOT, Evaluation
from studylib.execution import Decoding
from studylib.finetuning import Instructions, Tuning
from studylib.formats import Format
from studylib.layers import Scheme
from studylib.sampling import Sampling
from studylib.training_data import RealText

HEADLINE = {  # the settings of the papers' main tables, which few-shot tasks are run at as well: MMLU if fine-tuned
    FULL_PRECISION: ("16-16-16",),
    RTN: ("4-8-4",),
    LLM_QAT: ("4-8-4",),
    LORA: ("16-16-16",),
    QLORA: ("4-16-16",),
    L4Q: ("4-16-16",),
}
RATES = {
    L4Q: 0.3,
    QAT_LORA: 0.3,
    QA_LORA: 0.2,
    QAT: 0.05,
}  # of the adapters' learning rate, where scales or weights train
DECODING = Decoding(shapes=("llama-7b",))  # L4Q's own model beside the study's


@dataclass(frozen=True)
class Profile:
    """A budget: the data and training a method may spend, what every arm is scored on, and the seeds that make the
    interval over runs. few_shot: tasks that the headline settings are scored on as well. block: weights that share a
    scale where a method needs such blocks."""

    sampling: Sampling
    training: Training
    instructions: Instructions
    tuning: Tuning
    evaluation: Evaluation
    seeds: tuple[int, ...]
    few_shot: tuple[str, ...] = ()
    block: int = 64
    decoding: Decoding = DECODING

    def extended(self, steps: int) -> "Profile":
        """This budget with `steps` more for every training, which goes on from where it ended."""
        if steps == 0:
            return self
        if steps < 0:
            raise ValueError(f"extend: {steps} is not allowed; use 0 or more")
        longer = {
            name: dataclasses.replace(own, steps=own.steps + steps, extended_from=(*own.extended_from, own.steps))
            for name, own in (("training", self.training), ("tuning", self.tuning))
        }
        return dataclasses.replace(self, **longer)

    def arm(
        self,
        model: str,
        method: str,
        bits: str = "16-16-16",
        seed: int = 0,
        *,
        corpus: str | None = None,
        sampling: dict[str, object] | None = None,
        training: dict[str, object] | None = None,
        scheme: Scheme = Scheme(),
        format: Format | None = None,
        adapter: Adapter | None = None,
        tuning: dict[str, object] | None = None,
        merge: str = merging.ADAPTER,
    ) -> Arm:
        """The arm of this budget; adapter: by default Adapter(), for methods that have one.

        corpus: real text in place of generated; sampling, training, tuning: fields to change.
        """
        data = trained = instructions = tuned = None
        if method in (*TRAINED, *CALIBRATED, GPTQ_LORA):
            data = dataclasses.replace(self.sampling, **({"seed": seed} | (sampling or {})))
            if corpus is not None:
                data = RealText(corpus, data.count, data.length, data.seed)
        if method in TRAINED:
            trained = dataclasses.replace(self.training, **(training or {}))
        if method in TUNED:
            instructions = dataclasses.replace(self.instructions, seed=seed)
            rate = self.tuning.learning_rate * RATES.get(method, 1.0)
            tuned = dataclasses.replace(self.tuning, **({"learning_rate": rate} | (tuning or {})))
            adapter = adapter or (None if method == QAT else Adapter())
        chosen = {"format": format, "adapter": adapter, "instructions": instructions, "tuning": tuned, "merge": merge}
        chosen["decoding"] = self.decoding if method == EXECUTED else None
        arm = Arm(model, method, bits, self.evaluation, scheme, data, trained, **chosen)
        if bits in HEADLINE.get(method, ()) and not arm.variant:
            few_shot = tuple(task for task in self.few_shot if task == "mmlu" or method not in TUNED)
            evaluation = dataclasses.replace(self.evaluation, tasks=self.evaluation.tasks + few_shot)
            return dataclasses.replace(arm, evaluation=evaluation)
        return arm


PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3),
        Instructions(length=128),
        Tuning(steps=4, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("openbookqa",), items=4, pairs=2),
        seeds=(0,),
        block=32,
        decoding=Decoding(context=4, tokens=2, rounds=4),
    ),
    "quick": Profile(
        Sampling(count=32, length=256, batch=64),
        Training(steps=32, batch=1, learning_rate=3e-4),
        Instructions(length=256),
        Tuning(steps=24, batch=2, learning_rate=1e-3, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=16, length=256, tasks=("arc_easy",), items=40, pairs=16),
        seeds=(0,),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4),
        Instructions(length=512),
        Tuning(steps=195, batch=32, learning_rate=5e-4, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=ZERO_SHOT, items=1000, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Instructions(length=2048),
        Tuning(steps=195, batch=128, learning_rate=2e-4, weight_decay=0.01, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=32, length=2048, tasks=ZERO_SHOT, items=None, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
}


def profile(name: str) -> Profile:
    """The named budget; ValueError with the names there are."""
    if name not in PROFILES:
        raise ValueError(f"profile: {name!r} is not known; use one of {', '.join(PROFILES)}")
    return PROFILES[name]
