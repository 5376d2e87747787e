"""A chat with a model that runs here: tokens as they come, Stop, and what each answer took. `Chat(runtime, tokenizer)` shows itself.

**The cache holds the conversation.** The keys and values of what was read and written stay in a slot of the runtime, so a new message
is read *behind* them: its own tokens alone, not the whole conversation once more. That is right only as long as what the template
makes of the longer conversation begins with what is in the cache. Where it does not (a template that drops the thoughts of earlier
answers), where another caller used the slot, and where the context is full, the conversation is read again, and the answer says so. A
full context forgets the oldest exchanges, never the system's message.

Tokens are taken with `admit` and `step`, the way of `Runtime.stream`, which itself begins anew each time. A thread of its own writes the
answer, one at a time, so that the kernel stays free and Stop is heard: between two tokens, and between two chunks of a prompt.

`Conversation` is the chat without widgets.
"""

import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from weakref import WeakKeyDictionary

import ipywidgets as w

from edgelab.frame import frame
from edgelab.monitor import Monitor
from edgelab.sampling import Sampler, confidence

SHOWN_EVERY_S = 0.05  # the answer being written is drawn so often: more would flood the browser, not the reader
ENTER_S = 0.25  # the browser says "Enter" before it sends what was typed; if nothing was, this long after


@dataclass(frozen=True)
class Answer:
    """One answer. `read_tokens` were read for it, `kept_tokens` were in the cache already; `seconds` and `confidences` of each token.

    `finish`: "stop" (the model's end), "length", "context" (full), "stopped" (by the reader). `note`: why the conversation was read
    again, "" where it was not.
    """

    text: str
    tokens: tuple[int, ...]
    read_tokens: int
    kept_tokens: int
    seconds: tuple[float, ...]
    confidences: tuple[float, ...]
    finish: str
    note: str = ""

    @property
    def first_s(self) -> float:
        """Seconds until the first token, the reading with it; NaN for none."""
        return self.seconds[0] if self.seconds else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first; NaN for fewer than two."""
        n, rest = len(self.seconds) - 1, sum(self.seconds[1:])
        return n / rest if n > 0 and rest else math.nan

    @property
    def confidence(self) -> float:
        """Mean probability that the model gave to the tokens it chose; NaN for none."""
        return sum(self.confidences) / len(self.confidences) if self.confidences else math.nan

    @property
    def told(self) -> str:
        """What it took, in a sentence."""
        ends = {"length": "ended by the limit of tokens", "context": "ended by the full context", "stopped": "stopped"}
        parts = [f"{len(self.tokens)} tokens"]
        parts += [] if math.isnan(self.tokens_per_s) else [f"{self.tokens_per_s:,.0f} tokens/s"]
        parts += [] if math.isnan(self.first_s) else [f"the first after {1000 * self.first_s:,.1f} ms"]
        parts += [] if math.isnan(self.confidence) else [f"confidence {self.confidence:.2f}"]
        parts.append(f"{self.read_tokens} tokens read, {self.kept_tokens} were in the cache")
        return ", ".join([*parts, *([ends[self.finish]] if self.finish in ends else [])]) + "." + f" {self.note}" * bool(self.note)


class _Use:
    """Who writes with a runtime now (`lock`), and who wrote last into each slot."""

    def __init__(self) -> None:
        self.lock, self.writers = threading.Lock(), {}


_USES: WeakKeyDictionary = WeakKeyDictionary()


class Conversation:
    """Messages and what the runtime's slot holds of them. `reply` goes on; `forget` begins anew.

    `slot`: None takes the runtime's last, which `generate` and `stream` leave alone where there is more than one. Other conversations in
    the same slot are noticed always, other callers by the length that they leave there: give a conversation a slot of its own.
    """

    def __init__(self, runtime, tokenizer, system: str | None = None, slot: int | None = None) -> None:
        slot = runtime.slots - 1 if slot is None else slot
        if not 0 <= slot < runtime.slots:
            raise ValueError(f"slot={slot}; this runtime has 0 .. {runtime.slots - 1}")
        self.runtime, self.tokenizer, self.system, self.slot = runtime, tokenizer, system, slot
        self._use, self._me = _USES.setdefault(runtime, _Use()), object()
        self.forget()

    def forget(self) -> None:
        """Begins anew: no messages, and what is in the slot is not read on."""
        self.messages: list[dict[str, str]] = []  # what the model sees; the system's message is put before them
        self._held, self._so_far, self._pending = 0, "", []  # tokens in the slot, their text, what was chosen and not yet read

    def reply(
        self,
        text: str,
        *,
        max_new: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
        taken: Callable[[list[int]], None] = lambda tokens: None,
    ) -> Answer:
        """The answer to `text`. `taken` is called with the tokens so far after each, `stopped` is asked between any two.

        Raises RuntimeError while another conversation writes with the same runtime, ValueError for a message that the context does
        not hold. After an error nothing of the message is kept.
        """
        if max_new < 1:
            raise ValueError(f"max_new={max_new} must be 1 or more")
        sampler = Sampler(temperature, top_p, seed)
        if not self._use.lock.acquire(blocking=False):
            raise RuntimeError("another conversation is writing with this runtime: wait for it, or open a runtime for each")
        try:
            return self._reply(text, max_new, sampler, stopped, taken)
        except BaseException:
            self._held = 0  # whatever is in the slot now, the next message reads anew
            raise
        finally:
            self._use.lock.release()

    def _reply(self, text: str, max_new: int, sampler: Sampler, stopped, taken) -> Answer:
        rt, slot = self.runtime, self.slot
        messages, full, ids, note = self._plan(text, max_new)
        kept = self._held
        if not kept:
            rt.release(slot)
        self._use.writers[slot] = self._me
        self._held, tokens, seconds, sure, finish = 0, [], [], [], "stopped"
        began, logits = time.perf_counter(), None
        for i in range(0, len(ids), rt.chunk):
            if stopped():
                return Answer("", (), i, kept, (), (), finish, note)  # half read: the next message reads anew
            logits = rt.admit(slot, ids[i : i + rt.chunk])
        while True:
            token = sampler(logits)
            sure.append(confidence(logits, token))
            seconds.append(time.perf_counter() - began)
            if token in rt.eos:
                finish = "stop"
                break
            tokens.append(token)
            taken(tokens)
            if stopped():
                break
            if rt.lengths[slot] >= rt.context or len(tokens) == max_new:
                finish = "length" if len(tokens) == max_new else "context"
                break
            began = time.perf_counter()
            logits = rt.step((slot,), (token,))[0]
        answer = self.text_of(tokens)
        self.messages = [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._held, self._so_far = rt.lengths[slot], full + answer
        self._pending = tokens[-1:] if finish != "stop" else []
        return Answer(answer, tuple(tokens), len(ids), kept, tuple(seconds), tuple(sure), finish, note)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _plan(self, text: str, max_new: int) -> tuple[list[dict[str, str]], str, list[int], str]:
        """(messages that stay, the text that the model then has, tokens to be read, why all is read again). Sets `_held` to 0 for that."""
        rt, note, messages = self.runtime, "", self.messages
        room = min(max_new, max(1, rt.context // 4))  # an answer should have so much
        full = self._rendered(messages, text)
        if self._held:
            more = self._pending + self._ids(full[len(self._so_far) :], first=False)
            if self._use.writers.get(self.slot) is not self._me or rt.lengths[self.slot] != self._held:
                note = "Another caller used the slot: the conversation was read again."
            elif not full.startswith(self._so_far) or not more:
                note = "The template changes what was said before: the conversation was read again."
            elif self._held + len(more) + room <= rt.context:
                return messages, full, more, ""
        self._held = 0
        ids = self._ids(full, first=True)
        while len(ids) + room > rt.context:
            if not messages:
                raise ValueError(
                    f"the message takes {len(ids)} tokens with what belongs to it; of the context of {rt.context} {room} are left for the "
                    "answer: shorten the message, ask for fewer tokens, or open the runtime with a longer context"
                )
            messages = messages[2:]
            full = self._rendered(messages, text)
            ids = self._ids(full, first=True)
        if gone := (len(self.messages) - len(messages)) // 2:
            exchanges = f"the first {gone} exchanges are" if gone > 1 else "the first exchange is"
            note = f"The context of {rt.context:,} tokens is full: {exchanges} forgotten, the rest was read again."
        return messages, full, ids, note

    def _rendered(self, messages: Sequence[dict[str, str]], text: str) -> str:
        """What the model reads: the tokenizer's chat template, or a line per message where it has none."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        every = [*before, *messages, {"role": "user", "content": text}]
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(every, tokenize=False, add_generation_prompt=True)
        return "".join(m["content"] + "\n" for m in every)

    def _ids(self, text: str, first: bool) -> list[int]:
        """Tokens of `text`; a template brings the token that begins a document itself."""
        special = first and not getattr(self.tokenizer, "chat_template", None)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


class Chat:
    """The conversation as a widget: a transcript, a message to type (Enter sends), Send, Stop, New; temperature, top-p and most tokens.

    `monitor`: a `Monitor` that counts the answers; None makes one. `remember` False answers each message by itself: for models that were
    trained on single exchanges, as the embedded ones were. `ask` does from code what Enter does by hand and waits. What goes wrong
    is shown in place and kept in `error`.
    """

    def __init__(
        self,
        runtime,
        tokenizer,
        system: str | None = None,
        monitor: Monitor | None = None,
        *,
        slot: int | None = None,
        seed: int | None = None,
        remember: bool = True,
    ) -> None:
        self.conversation = Conversation(runtime, tokenizer, system, slot)
        self.monitor = Monitor("chat") if monitor is None else monitor
        self.turns: list[tuple[str, Answer]] = []
        self.error: Exception | None = None
        self._seed, self._thread, self._stop = seed, None, threading.Event()
        self._lock, self._entered, self._shown_at = threading.RLock(), None, 0.0
        wide = {"description_width": "7em"}
        self.text = w.Text(
            description="message", placeholder="type, then Enter", continuous_update=False, style=wide, layout={"width": "min(40em, 100%)"}
        )
        self.send_button = w.Button(description="Send", tooltip="send the message (Enter)", layout={"width": "6em"})
        self.stop_button = w.Button(description="Stop", tooltip="stop the answer", disabled=True, layout={"width": "6em"})
        self.new_button = w.Button(description="New", tooltip="forget the conversation", layout={"width": "6em"})
        self.right_button = w.Button(description="Right", tooltip="the last answer is right", disabled=True, layout={"width": "6em"})
        self.wrong_button = w.Button(description="Wrong", tooltip="the last answer is wrong", disabled=True, layout={"width": "6em"})
        narrow = {"width": "14em"}
        self.temperature = w.BoundedFloatText(0.0, min=0.0, max=2.0, step=0.1, description="temperature", style=wide, layout=narrow)
        self.top_p = w.BoundedFloatText(1.0, min=0.01, max=1.0, step=0.05, description="top-p", style=wide, layout=narrow)
        self.most = w.BoundedIntText(
            min(64, runtime.context), min=1, max=runtime.context, description="most tokens", style=wide, layout=narrow
        )
        self.remember = w.Checkbox(remember, description="remember what was said", indent=False, layout={"width": "16em"})
        self.transcript, self.writing, self.status = w.HTML(), w.HTML(), w.HTML()
        self.numbers = w.HTML(layout={"display": "none", "max_width": "100%", "overflow": "auto"})
        self.count_button = w.ToggleButton(False, description="What the monitor counted", layout={"width": "16em"})
        self._draw()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # no other event of this box tells Enter from a click elsewhere
            self.text.on_submit(lambda _: self._enter())
        self.text.observe(lambda _: self._typed(), "value")
        self.send_button.on_click(lambda _: self.send())
        self.stop_button.on_click(lambda _: self.stop())
        self.new_button.on_click(lambda _: self.new())
        self.right_button.on_click(lambda _: self._judge(True))
        self.wrong_button.on_click(lambda _: self._judge(False))
        self.count_button.observe(lambda change: setattr(self.numbers.layout, "display", None if change.new else "none"), "value")

    # ----------------------------------------------------------------------------------------------------------- by hand

    def _enter(self) -> None:
        """Enter was pressed. What was typed since comes in a message after this one; if nothing was, the box holds it already."""
        self._entered = threading.Timer(ENTER_S, self._typed)
        self._entered.daemon = True
        self._entered.start()

    def _typed(self) -> None:
        with self._lock:
            entered, self._entered = self._entered, None
        if entered is not None:
            entered.cancel()
            self.send()

    def send(self, text: str | None = None) -> bool:
        """Begins to answer `text` (None: what the box holds) and returns at once; False where there is nothing, or an answer is running."""
        message = self.text.value if text is None else text
        if not message.strip():
            return False
        with self._lock:
            if self.busy:
                self._say("The last answer is still being written: wait for it, or press Stop.")
                return False
            self._stop.clear()
            self.error = None
            self.send_button.disabled, self.stop_button.disabled = True, False
            self.right_button.disabled = self.wrong_button.disabled = True
            if text is None:
                self.text.value = ""
            self._say("Answering ...")
            self.writing.value = _message("You", message)
            if not self.remember.value:
                self.conversation.forget()
            settings = {"max_new": self.most.value, "temperature": self.temperature.value, "top_p": self.top_p.value, "seed": self._seed}
            self._thread = threading.Thread(target=self._work, args=(message, settings), name="edgelab-chat", daemon=True)
            self._thread.start()
        return True

    def stop(self) -> None:
        """Asks the running answer to end, which it does before its next token. Nothing where none is running."""
        self._stop.set()

    def new(self) -> bool:
        """Forgets the conversation; False while an answer is running."""
        if self.busy:
            self._say("An answer is being written: press Stop first.")
            return False
        self.conversation.forget()
        self.turns.clear()
        self.error = None
        self.writing.value = ""
        self.right_button.disabled = self.wrong_button.disabled = True
        self._draw()
        self._say("A new conversation.")
        return True

    def _judge(self, right: bool) -> None:
        self.monitor.feedback(right)
        self.right_button.disabled = self.wrong_button.disabled = True
        self._draw()
        self._say(f"Noted: {'right' if right else 'wrong'}.")

    # --------------------------------------------------------------------------------------------------------- from code

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> Answer | None:
        """The answer that is being written, or the last one; None after an error. Raises TimeoutError where it takes longer."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"after {timeout:g} s the answer is still being written; stop() ends it")
        return self.turns[-1][1] if self.turns and self.error is None else None

    def ask(self, text: str, timeout: float | None = None) -> Answer | None:
        """The answer to `text`, waited for; None where it can't be given (then `error` says why).

        Raises ValueError for an empty text, RuntimeError while an answer is being written.
        """
        if not text.strip():
            raise ValueError("text is empty: give a message")
        if not self.send(text):
            raise RuntimeError("an answer is being written: wait() for it, or stop() it")
        return self.wait(timeout)

    # -------------------------------------------------------------------------------------------------------- the thread

    def _work(self, message: str, settings: dict) -> None:
        try:
            answer = self.conversation.reply(
                message, stopped=self._stop.is_set, taken=lambda tokens: self._show(message, tokens), **settings
            )
            fell = False
            if answer.seconds:
                fell = self.monitor.observe(
                    answer.seconds, answer.confidences, prompt_tokens=answer.read_tokens, new_tokens=len(answer.tokens)
                )
            self.turns.append((message, answer))
            self.writing.value = ""
            self._draw()
            self._say(answer.told + " Confidence has fallen: look at the monitor." * fell)
            self.right_button.disabled = self.wrong_button.disabled = not answer.tokens
        except Exception as error:  # whatever it is, the reader sees it: a thread's traceback would vanish in a log
            self.error = error
            self.monitor.failed(error)
            self.writing.value = ""
            self._draw()
            self.status.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'
            if not self.text.value:
                self.text.value = message  # to be mended and sent again
        finally:
            self.send_button.disabled, self.stop_button.disabled = False, True

    def _show(self, message: str, tokens: list[int]) -> None:
        now = time.monotonic()
        if now - self._shown_at >= SHOWN_EVERY_S:
            self._shown_at = now
            text = self.conversation.text_of(tokens).rstrip("\ufffd")  # half a letter
            self.writing.value = _message("You", message) + _message("Model", text, " ...")

    # ------------------------------------------------------------------------------------------------------------- shown

    def _say(self, text: str) -> None:
        self.status.value = f'<p aria-live="polite">{escape(text)}</p>'

    def _draw(self) -> None:
        lines = "".join(_message("You", asked) + _message("Model", a.text, small=a.told) for asked, a in self.turns)
        self.transcript.value = f'<div role="log" aria-live="polite" aria-label="conversation">{lines}</div>'
        self.numbers.value = self.monitor._repr_html_()

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The transcript and the inputs; where no widget can be shown, the transcript as text."""
        # a column laid out from its end keeps its end in sight while it grows; what is inside is in the order of reading
        inside = w.VBox([self.transcript, self.writing], layout={"flex": "0 0 auto", "overflow": "visible"})  # it must not shrink
        scrolled = w.Box(
            [inside], layout={"flex_flow": "column-reverse", "max_height": "26em", "overflow": "auto", "border": "1px solid #8a94a3"}
        )
        rows = [w.HBox([self.text, self.send_button, self.stop_button, self.new_button], layout={"flex_flow": "row wrap"})]
        rows.append(w.HBox([self.temperature, self.top_p, self.most, self.remember], layout={"flex_flow": "row wrap"}))
        judged = w.HBox([w.Label("the last answer is"), self.right_button, self.wrong_button])
        box = frame(scrolled, *rows, self.status, judged, self.count_button, self.numbers)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        if not self.turns:
            return "A chat, which needs a running notebook; nothing was said yet."
        return "\n".join(f"You: {asked}\nModel: {a.text}\n    ({a.told})" for asked, a in self.turns)


def _message(who: str, text: str, more: str = "", small: str = "") -> str:
    """One message as HTML, with all that has a meaning there escaped.

    >>> _message("You", "<b>")
    '<p style="white-space:pre-wrap;margin:0.3em 0.6em"><b>You:</b> &lt;b&gt;</p>'
    """
    note = f"<br><small>{escape(small)}</small>" if small else ""
    return f'<p style="white-space:pre-wrap;margin:0.3em 0.6em"><b>{escape(who)}:</b> {escape(text)}{more}{note}</p>'
