"""How text is put before a model: what every text begins with, instructions and their responses, chats."""

import contextlib
import ctypes
import datetime
import threading
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from studylib.config import CHAT
from studylib.data.corpora import INPUT, Pair, beginning, plain_ids

TODAY = datetime.datetime(2024, 7, 26)  # for chat templates that write the date; Llama 3's own where it knows none
MARKS = "\N{OBJECT REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"  # where texts of user and assistant would be
SECONDS = 10  # that a chat template may take for two messages


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes today's date, which is always TODAY here."""
    template = str(tokenizer.chat_template or "")
    return "strftime_now" in template or "date_string" in template


def _render(tokenizer: PreTrainedTokenizerBase, *texts: str) -> str:
    """The chat template with these texts of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, strftime_now=TODAY.strftime, date_string=TODAY.strftime("%d %b %Y")
    )


def conversation(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], int]:
    """The token ids of a pair, and how many of them come before the response, which ends with what closes it.

    In the tokenizer's chat template, or in Alpaca's prompt where it has none.
    """
    if tokenizer.chat_template:
        before, _, after = _render(tokenizer, pair.instruction, MARKS[1]).rpartition(MARKS[1])
        return _joined(tokenizer, before, pair.response + after.rstrip())
    given = ", paired with an input that provides further context" if INPUT in pair.instruction else ""
    before = (
        f"Below is an instruction that describes a task{given}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{pair.instruction}\n\n### Response:"
    )
    tokens, start = _joined(tokenizer, before, pair.response + (tokenizer.eos_token or ""))
    return beginning(tokenizer) + tokens, len(beginning(tokenizer)) + start


def _joined(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> tuple[list[int], int]:
    """The token ids of both texts, and at which of them the second begins.

    As the tokenizer writes them in one where a token begins at the border, or at the spaces before it, which some
    tokenizers join with the word that follows; else of each text by itself.
    """
    whole = plain_ids(tokenizer, before + after)
    for text in (before, before.rstrip(" ")):
        prompt = plain_ids(tokenizer, text)
        if whole[: len(prompt)] == prompt:
            return whole, len(prompt)
    prompt = plain_ids(tokenizer, before)
    return prompt + plain_ids(tokenizer, after), len(prompt)


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the chat template up to where the user's first message would begin: the opening of a chat.

    Raises ValueError for a tokenizer without a chat template, or with one that writes nothing there.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"strategy: {CHAT!r} needs a chat template, and this model's tokenizer has none")
    opening = plain_ids(tokenizer, _render(tokenizer, MARKS[0]).partition(MARKS[0])[0])
    if not opening:
        raise ValueError(f"strategy: {CHAT!r} needs a chat template that writes something before the first message")
    return opening


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """ValueError where the chat template of the model `name` cannot be used: it fails, takes longer than SECONDS,
    writes something else each time, or leaves a message out, repeats or changes it."""
    if not tokenizer.chat_template:
        return
    texts = "What is 2 + 2?", "It is Four."
    what = f"model: the chat template of {name!r}"
    try:
        with _time_limit(SECONDS):
            marked, again, alone = (_render(tokenizer, *given) for given in (MARKS, MARKS, MARKS[:1]))
            real = _render(tokenizer, *texts)
    except TimeoutError as error:
        raise ValueError(f"{what} takes longer than {SECONDS} seconds for two messages") from error
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{what} fails ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if again != marked:
        raise ValueError(f"{what} writes something else each time")
    if any(marked.count(mark) != 1 for mark in MARKS) or alone.count(MARKS[0]) != 1:
        raise ValueError(f"{what} does not write each message once")
    if marked.replace(MARKS[0], texts[0]).replace(MARKS[1], texts[1]) != real:
        raise ValueError(f"{what} changes the messages")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds of Python, in whichever thread this is."""
    thread = ctypes.c_ulong(threading.get_ident())
    stop = ctypes.py_object(TimeoutError)
    timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, stop))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
