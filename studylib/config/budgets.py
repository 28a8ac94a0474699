"""What a method may spend and what it is scored on: text, training, fine-tuning, evaluation, and named budgets.

Frozen values: files and models that they name are not looked at here (see study.run.check).
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from studylib.config.data import ALPACA, CORPORA, ZERO_SHOT, check_corpus, check_instructions, check_tasks, located
from studylib.config.learning_rates import Rate, Rates, contents_of
from studylib.config.settings import DEFAULT_GROUP, INTEGER_FORMATS, Adapter, Format, check_group
from studylib.config.values import (
    MAX_BATCH,
    MAX_LENGTH,
    MAX_SEED,
    check_flag,
    check_known,
    check_number,
    check_parts,
    check_positive,
    check_several,
    check_share,
    check_text,
    check_whole,
    shown,
)

GREEDY, CHAT = "greedy", "chat"
GREEDY_TOKENS = {"sampled": (0,), "hybrid-3": (3,), "hybrid-4": (4,), "hybrid-5": (5,), "hybrid": (3, 4, 5), CHAT: (0,)}
STRATEGIES = (GREEDY, *GREEDY_TOKENS)
SMOLLM2, TINY = MODELS = ("smollm2-135m", "tiny-random")  # that have a name of ours (see data.models)
LABELS, KL, REVERSE_KL, SYMMETRIC_KL = LOGIT_LOSSES = ("labels", "kl", "reverse-kl", "symmetric-kl")
ATTENTION, HIDDEN, RAW_HIDDEN = FEATURE_LOSSES = ("attention", "hidden", "raw-hidden")
SCALES, MASTERS = ("token", "batchmean"), ("fp32", "bf16")
COSINE, CONSTANT = SCHEDULES = ("cosine", "constant")
CURVE_PARTS = 4  # the held-out loss is measured before training and after each quarter of it
ARCHIVE, HUB = TASK_SOURCES = ("archive", "hub")
IN_16_BITS, IN_4_BITS, ADAPTED_4_BITS = EXECUTIONS = ("16 bits", "4 bits", "4 bits and an adapter")  # timed
TORCH_16, KERNEL_4, KERNEL_ADAPTED, LLAMA_16, LLAMA_4, LLAMA_ADAPTED = ENGINES = (
    "PyTorch, 16 bits",
    "4-bit kernel",
    "4-bit kernel, an adapter",
    "llama.cpp, 16 bits",
    "llama.cpp, 4 bits",
    "llama.cpp, 4 bits, an adapter",
)  # timed side by side
PREFILL, DECODE = PASSES = ("prefill", "decoding")
OWN = "own"  # the study's model, among what is timed
TIMED_LAYERS = 2  # of a shape that is timed, which stands for all of its equal layers
SHAPES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-2-7b", "open-llama-3b")  # see evaluate.memory


TEMPERATURES = (0.01, 100.0)  # the lowest and highest: beyond them the likeliest token is taken, or any


def check_seed(seed: Any) -> None:
    """Raise ValueError unless `seed` is a whole number that all generators take."""
    check_whole("seed", seed, 0, MAX_SEED)


@dataclass(frozen=True)
class Sampling:
    """How training windows are generated.

    count windows of exactly `length` tokens: sequences of up to `length` tokens, each ended by the end-of-text token
    (which is kept) or by its length, are joined in their order and cut, as the official code does before training.
    strategy: "greedy" or "sampled" throughout; "hybrid-j", greedy until the text has j tokens in all and sampled after
    that; "hybrid" (LLM-QAT's), j drawn from 3, 4, 5 for each sequence. Every sequence of these starts from a vocabulary
    id of its own, without BOS. "chat": an instruct model writes both sides of a conversation, the user's message and
    the assistant's answer, sampled throughout; it ends at its second end token.
    top_k 50 is the default that the official code inherits from transformers; 0 samples from the whole vocabulary.
    batch: sequences decoded together.
    """

    count: int
    length: int
    strategy: str = "hybrid"
    top_k: int = 50
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        check_known("strategy", self.strategy, STRATEGIES)
        check_whole("count", self.count, 1)
        check_whole("length", self.length, 2, MAX_LENGTH)
        check_whole("top_k", self.top_k, 0)
        check_number("temperature", self.temperature, *TEMPERATURES)
        check_seed(self.seed)
        check_whole("batch", self.batch, 1, MAX_BATCH)
        if self.strategy == GREEDY:
            for name in ("top_k", "temperature"):
                if getattr(self, name) != getattr(Sampling, name):
                    raise ValueError(f"{name}: {getattr(self, name)!r} has no effect on {GREEDY!r}; leave it out")


@dataclass(frozen=True)
class RealText:
    """Training windows of real text: `count` windows of `length` tokens of a corpus's training split, in random order.

    Where the split has fewer, they come again, in another order. usual: it stands in the place of generated text
    throughout a budget (see Profile.training_text), and is not one of several kinds of text that are compared.
    """

    corpus: str
    count: int
    length: int
    seed: int = 0
    usual: bool = False

    def __post_init__(self) -> None:
        check_flag("usual", self.usual)
        check_corpus(self.corpus)
        check_whole("count", self.count, 1)
        check_whole("length", self.length, 2, MAX_LENGTH)
        check_seed(self.seed)


@dataclass(frozen=True)
class Budget:
    """Steps and optimizer of one training: AdamW, linear warm-up, cosine decay to zero or a constant rate.

    steps optimizer steps of `batch` examples each, at most `learning_rate`. grid_rate: that of learned scales and
    offsets, as a share of the layer's first scales (their root mean square) a step, without weight decay; None:
    learning_rate for all, as L4Q's paper has it. schedule: of SCHEDULES. warmup: the share of a part's steps in
    which the rate rises. extended_from: the step counts that this training stopped at before it was extended; at each
    of them the schedule starts again (warm restart: Loshchilov & Hutter 2017). stop: the step after which it is broken
    off, on its way along the whole schedule, as a search for rates does; None: it is trained to its end. limit: the
    held-out loss in nats above which it is given up already at the first quarter of its steps.
    """

    steps: int
    batch: int
    learning_rate: float
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    warmup: float = 0.0
    extended_from: tuple[int, ...] = ()
    grid_rate: float | None = None
    schedule: str = COSINE
    stop: int | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1)
        check_whole("batch", self.batch, 1, MAX_BATCH)
        check_positive("learning_rate", self.learning_rate)
        if self.grid_rate is not None:
            check_share("grid_rate", self.grid_rate)
        check_known("schedule", self.schedule, SCHEDULES)
        check_positive("max_grad_norm", self.max_grad_norm)
        check_number("weight_decay", self.weight_decay, 0, 1000)
        check_share("warmup", self.warmup)
        counts = self.extended_from if type(self.extended_from) is tuple else (None,)
        if any(type(count) is not int for count in counts) or any(end <= begin for begin, end in self.parts):
            raise ValueError(
                f"extended_from: {shown(self.extended_from)} is not allowed; use a tuple of rising counts below steps "
                f"{self.steps}"
            )

        if self.stop is not None:
            check_whole("stop", self.stop, 1, self.steps - 1)
        if self.limit is not None:
            check_positive("limit", self.limit)

    @property
    def last(self) -> int:
        """The step that is the last to be taken."""
        return self.steps if self.stop is None else self.stop

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First and last step of each part that has a schedule of its own."""
        return list(itertools.pairwise((0, *self.extended_from, self.steps)))

    def rate(self, step: int) -> float:
        """The share of learning_rate at optimizer step `step` (from 0)."""
        begin, end = next((b, e) for b, e in self.parts if step < e or e == self.steps)
        warm = round(self.warmup * (end - begin))
        if step - begin < warm:
            return (step - begin + 1) / (warm + 1)
        if self.schedule == CONSTANT:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - begin - warm) / (end - begin - warm))))

    def given_up(self, step: int, loss: float) -> bool:
        """Whether a training is given up with this held-out loss after `step` steps."""
        begin, end = self.parts[0]
        return self.limit is not None and step == round((end - begin) / CURVE_PARTS) and not loss <= self.limit

    def measured_at(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step` steps: at the quarters of each of its parts, and where
        it is broken off."""
        return step == self.stop or any(
            step == begin + round((end - begin) * part / CURVE_PARTS)
            for begin, end in self.parts
            for part in range(1, CURVE_PARTS + 1)
        )


def split_loss(loss: str) -> tuple[str | None, tuple[str, ...]]:
    """The logit loss (or None) and the feature losses of "kl", "kl+attention", "attention+hidden", ...

    Raises ValueError for an unknown part, one that occurs twice, or two logit losses.
    """
    check_text("loss", loss)
    parts = loss.split("+")
    for part in parts:
        if part not in LOGIT_LOSSES + FEATURE_LOSSES:
            allowed = ", ".join(LOGIT_LOSSES + FEATURE_LOSSES)
            raise ValueError(f"loss: {part!r} in {loss!r} is not known; join parts of {allowed} by '+'")
    logits = [part for part in parts if part in LOGIT_LOSSES]
    features = tuple(part for part in FEATURE_LOSSES if part in parts)
    if len(logits) > 1 or len(parts) > len(set(parts)):
        raise ValueError(
            f"loss: {loss!r} is not allowed; name one of {', '.join(LOGIT_LOSSES)} at most, and nothing twice"
        )
    return (logits[0] if logits else None), features


def check_loss(loss: Any) -> None:
    """Raise ValueError unless `loss` is made of parts that go together, in the one order that gives it one key."""
    logits, features = split_loss(loss)
    ordered = "+".join([*([logits] if logits else []), *features])
    if loss != ordered:
        raise ValueError(f"loss: {loss!r} is not allowed; write {ordered!r}")


@dataclass(frozen=True)
class Training(Budget):
    """Budget and loss of one distillation, by default LLM-QAT's (section 3.1): no warm-up, no weight decay.

    learning_rate 2e-5 is the paper's (on about 12,000 steps).
    loss: parts joined by "+". On logits: "labels" (cross-entropy with the text's next tokens), "kl" (KL(teacher ||
    student), LLM-QAT's), "reverse-kl" or "symmetric-kl" (the mean of both), at `temperature`. On features, averaged
    over layers: "attention" (KL of the attention maps), "hidden" (squared error of each token's hidden state, relative
    to the teacher's), "raw-hidden" (mean squared error of hidden states as they are).
    scale: "token" averages over tokens, "batchmean" is the official code's, `length` times that.
    mask: the official gradient mask |x| >= 2, or None for the plain straight-through estimator.
    masters: the type that parameters are kept and updated in, "fp32" or, as in the official code, "bf16".
    """

    loss: str = KL
    temperature: float = 1.0
    scale: str = "token"
    mask: float | None = None
    masters: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, *TEMPERATURES)
        for name, allowed in (("scale", SCALES), ("masters", MASTERS)):
            check_known(name, getattr(self, name), allowed)
        if self.mask is not None:
            check_positive("mask", self.mask)
        check_loss(self.loss)
        logits, _ = split_loss(self.loss)
        if self.temperature != 1 and logits not in LOGIT_LOSSES[1:]:
            raise ValueError(
                f"temperature: {self.temperature} has no meaning for the loss {self.loss!r}; use it with a KL"
            )

    @property
    def needs_teacher_states(self) -> bool:
        """Whether the loss reads the teacher's last hidden states."""
        return split_loss(self.loss)[0] in LOGIT_LOSSES[1:]

    @property
    def features(self) -> tuple[str, ...]:
        """The parts of the loss that read the teacher's inside."""
        return split_loss(self.loss)[1]


@dataclass(frozen=True)
class Instructions:
    """What is learned: the training pairs of `source` (see corpora.instruction_pairs) in a random order, each cut after
    `length` tokens."""

    source: str = ALPACA
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_instructions(self.source)
        check_whole("length", self.length, 2, MAX_LENGTH)
        check_seed(self.seed)


@dataclass(frozen=True)
class Tuning(Budget):
    """Budget of one fine-tuning; the loss is the cross-entropy of the responses' tokens.

    checkpointing: recompute each decoder layer in the backward pass (Chen et al. 2016). paged: keep the optimizer's
    states in memory that CUDA may page out to the host (QLoRA, section 3).
    """

    checkpointing: bool = False
    paged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("checkpointing", self.checkpointing)
        check_flag("paged", self.paged)


@dataclass(frozen=True)
class Evaluation:
    """What a model is scored on: `windows` windows of `length` tokens of each corpus, `items` of each task (None: all),
    and the responses of `pairs` held-out pairs of `instructions` (see corpora.instruction_pairs).

    source "archive" reads the pinned benchmark files, "hub" lm-eval's own data sets.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    tasks: tuple[str, ...] = ()
    items: int | None = None
    pairs: int = 0
    source: str = ARCHIVE
    instructions: str = ALPACA

    def __post_init__(self) -> None:
        check_several("corpora", self.corpora, check_corpus)
        names = Counter(PurePath(corpus).stem for corpus in self.corpora)  # which tables and figures call them by
        for name in (name for name, count in names.items() if count > 1):
            raise ValueError(f"corpora: two of them are called {name!r}; give one of the files another name")
        check_several("tasks", self.tasks, lambda task: check_tasks([task]))
        check_whole("windows", self.windows, 1)
        check_whole("length", self.length, 2, MAX_LENGTH)
        if self.items is not None:
            check_whole("items", self.items, 1)
        check_whole("pairs", self.pairs, 0)
        check_known("source", self.source, TASK_SOURCES)
        check_instructions(self.instructions)
        if self.instructions != ALPACA and not self.pairs:
            raise ValueError(f"instructions: {self.instructions!r} has no effect where no pairs are scored")

    @property
    def of_text(self) -> "Evaluation":
        """Without the pairs."""
        return dataclasses.replace(self, pairs=0, instructions=ALPACA)

    @property
    def of_pairs(self) -> "Evaluation":
        """The pairs alone."""
        return dataclasses.replace(NOTHING, pairs=self.pairs, instructions=self.instructions)


@dataclass(frozen=True)
class Decoding:
    """How decoding is timed: `tokens` tokens, one at a time, after `context` others, in `rounds` rounds.

    shapes: of SHAPES, those whose layers are timed beside the study's model, with random weights.
    """

    context: int = 64
    tokens: int = 16
    rounds: int = 16
    shapes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("context", "tokens", "rounds"):
            check_whole(name, getattr(self, name), 1, MAX_LENGTH)
        check_several("shapes", self.shapes, lambda shape: check_known("shape", shape, SHAPES))


@dataclass(frozen=True)
class Engines:
    """How engines are timed side by side: a pass over `context` tokens (prefill) and `tokens` passes of one token each
    after it (decoding), of each of `batches` sequences at a time, in `rounds` rounds."""

    context: int = 64
    tokens: int = 16
    rounds: int = 10
    batches: tuple[int, ...] = (1, 8)

    def __post_init__(self) -> None:
        for name in ("context", "tokens", "rounds"):
            check_whole(name, getattr(self, name), 1, MAX_LENGTH)
        check_several("batches", self.batches, lambda batch: check_whole("batch", batch, 1, MAX_BATCH))

    def tokens_of(self, stage: str, batch: int) -> int:
        """Of a pass of PREFILL or DECODE."""
        return batch * (self.context if stage == PREFILL else 1)


NOTHING = Evaluation((), windows=1, length=2)  # to score an arm on


@dataclass(frozen=True)
class Log:
    """What a training leaves: steps, one {"step", "loss", "learning_rate", "grad_norm"} each; curve, {"step", "tokens",
    "loss"} before training and at each quarter, on held-out text, of a fine-tuning with {"pairs": {"loss", "tokens"}},
    a number for each validation pair; moved, for learned grids, the median share by which
    their scales are others than at the start."""

    steps: list[dict[str, float]]
    curve: list[dict[str, Any]]
    moved: float | None = None


DECODING = Decoding(shapes=("llama-7b",))  # L4Q's own model beside the study's


@dataclass(frozen=True)
class Terms:
    """How a paper fine-tunes `methods` in one of its comparisons: budget and adapter, as it has them for each of them.

    integers: the comparison is one of bases in integers; else of bases in 16 bits, NormalFloat and floats.
    """

    methods: tuple[str, ...]
    integers: bool
    tuning: Tuning
    adapter: Adapter

    def __post_init__(self) -> None:
        check_parts(self)
        check_several("methods", self.methods, lambda method: check_text("method", method))
        check_flag("integers", self.integers)

    def covers(self, method: str, format: Format | None) -> bool:
        """Whether a method on a base in `format` (None: in 16 bits) is one of the comparison."""
        return method in self.methods and self.integers == (format is not None and format.kind in INTEGER_FORMATS)

    def has_made(self, tuning: "Training | Tuning | None") -> bool:
        """Whether a training is on these terms: of any number of steps, with memory saved or not."""
        own = self.tuning
        free: dict[str, Any] = {
            "steps": own.steps,
            "extended_from": own.extended_from,
            "stop": None,
            "limit": None,
            "checkpointing": False,
            "paged": False,
        }
        return isinstance(tuning, Tuning) and dataclasses.replace(tuning, **free) == own


def _check_terms(terms: Any) -> None:
    if not isinstance(terms, Terms):
        raise ValueError(f"terms: {shown(terms)} is not allowed; use Terms")


@dataclass(frozen=True)
class Profile:
    """A budget: the data and training a method may spend, what every arm is scored on, and the seeds that make the
    interval over runs. merging: the distillation of a model that is merged after its fine-tuning, of half as many
    steps. few_shot: tasks that the headline settings are scored on as well. group: weights that share a scale where a
    method needs such groups. terms: those of the papers, where they are to be each method's own; what they do not cover
    is fine-tuned with `tuning`, at the method's share of its rate. rates: those that were chosen for settings (see
    methods.rate_case), in the place of all others. apart: whether what is fine-tuned is scored on its responses alone
    and the rest on text and tasks alone, full precision on both: no more than claims are judged by. training_text: a
    corpus that stands in the place of the text that the model writes; "": it writes it."""

    sampling: Sampling
    training: Training
    instructions: Instructions
    tuning: Tuning
    merging: Tuning
    evaluation: Evaluation
    seeds: tuple[int, ...]
    few_shot: tuple[str, ...] = ()
    group: int = DEFAULT_GROUP
    decoding: Decoding = DECODING
    engines: Engines = Engines()
    rates: tuple[tuple[str, Rate], ...] = ()
    terms: tuple[Terms, ...] = ()
    apart: bool = False
    training_text: str = ""

    def __post_init__(self) -> None:
        check_parts(self)
        check_flag("apart", self.apart)
        if self.training_text != "":
            check_corpus(self.training_text)
        check_several("seeds", self.seeds, check_seed)
        if not self.seeds:
            raise ValueError("seeds: () is not allowed; use one or more")
        check_several("terms", self.terms, _check_terms)
        check_several("few_shot", self.few_shot, lambda task: check_tasks([task]))
        check_group(self.group)

    def terms_of(self, method: str, format: Format | None) -> Terms | None:
        """Those that cover a method on a base in `format`, if any do."""
        return next((terms for terms in self.terms if terms.covers(method, format)), None)

    def extended(self, steps: int) -> "Profile":
        """This budget with `steps` more for every training, which goes on from where it ended."""
        check_whole("extend", steps, 0)
        if steps == 0:
            return self

        def longer(own: Any) -> Any:
            return dataclasses.replace(own, steps=own.steps + steps, extended_from=(*own.extended_from, own.steps))

        terms = tuple(dataclasses.replace(own, tuning=longer(own.tuning)) for own in self.terms)
        return dataclasses.replace(self, training=longer(self.training), tuning=longer(self.tuning), terms=terms)

    def with_rates(self, rates: Mapping[str, Rate]) -> "Profile":
        """This budget with the learning rates of a search (see find_rates). ValueError for those of a file that were
        chosen on other data than this budget trains on."""
        if isinstance(rates, Rates) and rates:
            rates.check(self.own_contents)
        return dataclasses.replace(self, rates=tuple(sorted(rates.items())))

    @property
    def own_contents(self) -> dict[str, str]:
        """What is trained on besides the profile's data: the SHA-256 of each such file by its name in OWN_DATA,
        of a known corpus its name."""
        files = {"pairs": self.instructions.source} if self.instructions.source != ALPACA else {}
        text = {"training_text": self.training_text} if self.training_text else {}
        return contents_of(files) | text if self.training_text in CORPORA else contents_of(files | text)

    def with_own(self, own: Mapping[str, Any]) -> "Profile":
        """This budget on data of one's own, by the names of OWN_DATA; {}: as it is. ValueError as of check_own."""
        given, evaluation = located(own), self.evaluation
        changes: dict[str, Any] = {name: given[name] for name in ("windows", "items") if name in given}
        changes |= {name: tuple(given[own]) for name, own in (("corpora", "text"), ("tasks", "tasks")) if own in given}
        pairs = given.get("scored_pairs", evaluation.pairs)
        source = given.get("pairs", self.instructions.source)
        changes |= {"pairs": pairs, "instructions": source if pairs else ALPACA}
        return dataclasses.replace(
            self,
            evaluation=dataclasses.replace(evaluation, **changes),
            instructions=dataclasses.replace(self.instructions, source=source),
            training_text=given.get("training_text", self.training_text),
        )


# L4Q, sections 4.1 and E, on Alpaca: AdamW of weight decay 0.01, cosine decay, batches of 128; rates of LLaMA-2 7B.
_L4Q_LONG = Tuning(steps=390, batch=128, learning_rate=2e-5, weight_decay=0.01, warmup=0.1)  # 50,000 samples
_L4Q_SHORT = dataclasses.replace(_L4Q_LONG, steps=195, learning_rate=2e-4)  # 25,000 samples
# QLoRA's code with its defaults for LLaMA-7B on Alpaca.
_QLORA = Tuning(10_000, 16, 2e-4, max_grad_norm=0.3, warmup=0.03, schedule=CONSTANT)

PROFILES = {
    "smoke": Profile(
        Sampling(count=8, length=32, batch=4),
        Training(steps=4, batch=2, learning_rate=1e-3, grid_rate=0.01),
        Instructions(length=128),
        Tuning(steps=4, batch=2, learning_rate=1e-3, grid_rate=0.003, weight_decay=0.01, warmup=0.1),
        Tuning(steps=2, batch=2, learning_rate=1e-4, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=4, length=64, tasks=("openbookqa",), items=4, pairs=2),
        seeds=(0,),
        group=32,
        decoding=Decoding(context=4, tokens=2, rounds=4),
        engines=Engines(context=4, tokens=2, rounds=2, batches=(1, 2)),
    ),
    "quick": Profile(
        Sampling(count=32, length=256, batch=64),
        Training(steps=32, batch=1, learning_rate=3e-4, grid_rate=0.01),
        Instructions(length=256),
        Tuning(steps=24, batch=2, learning_rate=1e-3, grid_rate=0.003, weight_decay=0.01, warmup=0.1),
        Tuning(steps=12, batch=2, learning_rate=1e-5, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=16, length=256, tasks=("arc_easy",), items=40, pairs=16),
        seeds=(0,),
    ),
    "full": Profile(
        Sampling(count=4096, length=512, batch=128),
        Training(steps=512, batch=8, learning_rate=1e-4, grid_rate=0.01),
        Instructions(length=512),
        Tuning(steps=195, batch=32, learning_rate=5e-4, grid_rate=0.003, weight_decay=0.01, warmup=0.1),
        Tuning(steps=98, batch=32, learning_rate=1e-5, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=128, length=512, tasks=ZERO_SHOT, items=1000, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
    ),
    "paper": Profile(
        Sampling(count=96_000, length=2048, batch=256),
        Training(steps=12_000, batch=8, learning_rate=2e-5),
        Instructions(length=2048),
        _L4Q_SHORT,
        Tuning(steps=98, batch=128, learning_rate=1e-5, warmup=0.1),
        Evaluation(("wikipedia", "c4"), windows=32, length=2048, tasks=ZERO_SHOT, items=None, pairs=480),
        seeds=(0, 1, 2),
        few_shot=("mmlu", "triviaqa"),
        terms=(
            Terms(("lora", "qlora"), False, _QLORA, Adapter(64, 16.0, dropout=0.1)),
            Terms(("qlora", "gptq+lora"), True, _L4Q_LONG, Adapter(4, 4.0)),
            Terms(("qa-lora", "gptq+qa-lora"), True, _L4Q_LONG, Adapter(8, 8.0)),
            Terms(("qat-lora", "l4q"), True, _L4Q_SHORT, Adapter(4, 4.0)),
        ),
    ),
}


MEANINGLESS = "These numbers mean nothing: the profile smoke shows that everything runs, and judges no claim."


def is_smoke(evaluations: Iterable[Evaluation]) -> bool:
    """Whether any of them is of the profile that shows only that everything runs, on its data or on one's own: no other
    has windows as short."""
    length = PROFILES["smoke"].evaluation.length
    return any(wanted.corpora and wanted.length == length for wanted in evaluations)


def profile(name: str) -> Profile:
    """The named budget; ValueError with the names there are."""
    check_known("profile", name, PROFILES)
    return PROFILES[name]
