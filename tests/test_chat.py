"""The chat: the conversation stays in the cache, Stop stops, errors are shown in place, and nothing typed becomes HTML."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ipywidgets")

from edgelab.chat import Chat, Conversation
from edgelab.model import load_tokenizer
from edgelab.monitor import Monitor
from edgelab.paths import data_dir
from edgelab.runtime import Runtime


class Letters:
    """A tokenizer of letters: 1 begins a document, 2 and 3 begin a message of the user and of the model, 0 ends."""

    chat_template = "yes"

    def __init__(self, thoughts: bool = False) -> None:
        self.thoughts = thoughts  # a template that keeps no answer's first letter once there is a later message

    def __call__(self, text, add_special_tokens=True):
        marks = {"^": 1, "?": 2, "!": 3}
        return {"input_ids": [1] * add_special_tokens + [marks.get(c, ord(c)) for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i > 3)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        cut = [m["content"][1:] if self.thoughts and m["role"] == "assistant" else m["content"] for m in messages]
        marks = {"user": "?", "assistant": "!", "system": "%"}
        return "^" + "".join(marks[m["role"]] + text for m, text in zip(messages, cut, strict=True)) + "!"


class Engine:
    """What a runtime promises, with an answer that is known: the letters a, b, c ... and the end after `length` of them.

    `seen` is what the slot holds. `gate` holds up each step; `broken` fails the next one.
    """

    slots, chunk, eos, vocabulary = 1, 4, (0,), 256

    def __init__(self, context=40, length=3):
        self.context, self.length = context, length
        self.lengths, self.seen, self.read = [0], [], []
        self.gate, self.broken = None, None
        self._said = 0

    def _logits(self):
        logits = np.zeros(self.vocabulary, np.float32)
        logits[0 if self._said >= self.length else ord("a") + self._said] = 4.0
        return logits

    def release(self, slot):
        self.lengths[slot], self.seen = 0, []

    def admit(self, slot, ids):
        self._take(ids)
        self.read.append(list(ids))
        self._said = 0
        return self._logits()

    def step(self, slots, tokens):
        if self.gate is not None:
            self.gate.acquire(timeout=5)
        if self.broken is not None:
            raise self.broken
        self._take(tokens)
        self._said += 1
        return self._logits()[None]

    def _take(self, ids):
        assert len(self.seen) == self.lengths[0] and len(self.seen) + len(ids) <= self.context
        self.seen += list(ids)
        self.lengths[0] = len(self.seen)


def text(ids):
    return "".join({0: "#", 1: "^", 2: "?", 3: "!"}.get(i, chr(i)) for i in ids)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_second_message_is_read_behind_the_first():
    engine = Engine()
    talk = Conversation(engine, Letters(), system="S")
    first = talk.reply("hi")
    assert (first.text, first.finish, first.read_tokens, first.kept_tokens, first.note) == ("abc", "stop", 7, 0, "")
    assert text(engine.seen) == "^%S?hi!abc"
    second = talk.reply("yo")
    assert (second.read_tokens, second.kept_tokens, second.note) == (4, 10, "")
    assert text(engine.seen) == "^%S?hi!abc?yo!abc"


def test_an_answer_that_was_cut_goes_on_whole():
    """Its last token was chosen and not yet read: the next message brings it along."""
    engine = Engine()
    talk = Conversation(engine, Letters())
    assert talk.reply("hi", max_new=2).finish == "length"
    assert text(engine.seen) == "^?hi!a"
    assert talk.reply("yo").read_tokens == 5
    assert text(engine.seen) == "^?hi!ab?yo!abc"


def test_a_template_that_changes_the_past_is_read_again_and_says_so():
    engine = Engine()
    talk = Conversation(engine, Letters(thoughts=True))
    talk.reply("hi")
    answer = talk.reply("yo")
    assert answer.kept_tokens == 0 and "template changes" in answer.note and "template changes" in answer.told
    assert text(engine.seen) == "^?hi!bc?yo!abc"


def test_a_full_context_forgets_the_oldest_and_keeps_the_system_message():
    engine = Engine(context=24)
    talk = Conversation(engine, Letters(), system="S")
    notes = [talk.reply(f"m{i}", max_new=4).note for i in range(4)]
    assert notes[:2] == ["", ""] and "the first exchange is forgotten" in notes[2]
    assert text(engine.seen).startswith("^%S?m") and "m0" not in text(engine.seen) and len(engine.seen) <= 24
    assert talk.messages[0]["content"] != "m0" and len(talk.messages) % 2 == 0
    with pytest.raises(ValueError, match=r"the message takes 45 tokens .* context of 24 4 are left for the answer: shorten"):
        talk.reply("x" * 40, max_new=4)
    assert talk.reply("m9", max_new=4).text == "abc"  # it goes on after the error
    assert talk.messages[-2]["content"] == "m9"


def test_whoever_else_used_the_slot_is_noticed():
    engine = Engine()
    one, other = Conversation(engine, Letters()), Conversation(engine, Letters())
    one.reply("hi")
    other.reply("ho")  # leaves as many tokens as `one` did
    assert "Another caller" in one.reply("yo").note and text(engine.seen) == "^?hi!abc?yo!abc"
    engine.release(0)
    assert "Another caller" in one.reply("yo").note


def test_a_broken_step_leaves_nothing_behind():
    engine = Engine()
    talk = Conversation(engine, Letters())
    talk.reply("hi")
    engine.broken = OSError("the file is gone")
    with pytest.raises(OSError, match="gone"):
        talk.reply("yo")
    engine.broken = None
    assert [m["content"] for m in talk.messages] == ["hi", "abc"]
    assert talk.reply("again").kept_tokens == 0 and text(engine.seen) == "^?hi!abc?again!abc"


def test_one_writes_at_a_time_with_a_runtime():
    engine = Engine()
    one, other = Conversation(engine, Letters()), Conversation(engine, Letters())
    refused = []

    def meanwhile(tokens):
        if not refused:
            with pytest.raises(RuntimeError, match="another conversation is writing") as error:
                other.reply("ho")
            refused.append(error)

    one.reply("hi", taken=meanwhile)
    assert refused and other.reply("ho").text == "abc"


def test_a_prompt_is_stopped_between_two_chunks():
    engine = Engine()
    talk = Conversation(engine, Letters())
    answer = talk.reply("a long message", stopped=lambda: len(engine.read) == 2)
    assert (answer.finish, answer.tokens, answer.read_tokens) == ("stopped", (), 8) and len(engine.read) == 2
    assert talk.messages == [] and "nan" not in answer.told
    assert talk.reply("hi").kept_tokens == 0 and text(engine.seen) == "^?hi!abc"


def test_without_a_template_each_message_is_a_line():
    tokenizer = Letters()
    tokenizer.chat_template = None
    engine = Engine()
    talk = Conversation(engine, tokenizer)
    talk.reply("hi")
    assert text(engine.seen) == "^hi\nabc"
    assert talk.reply("yo").kept_tokens == 7 and text(engine.seen) == "^hi\nabc\nyo\nabc"
    with pytest.raises(ValueError, match=r"slot=1; this runtime has 0 .. 0"):
        Conversation(engine, tokenizer, slot=1)
    with pytest.raises(ValueError, match="max_new=0 must be 1 or more"):
        talk.reply("x", max_new=0)


def test_what_an_answer_took_by_hand():
    engine = Engine()
    p = np.exp(4) / (np.exp(4) + 255)  # one logit of 4 among 255 zeros
    answer = Conversation(engine, Letters()).reply("hi")
    assert answer.confidences == pytest.approx([p] * 4) and answer.confidence == pytest.approx(p)  # the token that stopped, too
    assert len(answer.seconds) == 4 and answer.tokens_per_s == pytest.approx(3 / sum(answer.seconds[1:]))
    assert f"confidence {p:.2f}" in answer.told and "3 tokens," in answer.told


# ----------------------------------------------------------------------------------------------------------- the widget


def submit(chat, typed=None, before=False):
    """Enter, as the browser says it: the event first, then what was typed (`before`: that was sent earlier)."""
    if before:
        chat.text.value = typed
    chat.text._handle_string_msg(chat.text, {"event": "submit"}, [])
    if not before:
        chat.text.value = typed


def test_enter_sends_what_was_typed_and_leaving_the_box_does_not():
    chat = Chat(Engine(), Letters())
    chat.text.value = "draft"  # the box lost the focus
    assert chat._thread is None and chat.text.value == "draft"
    submit(chat, "hi")
    assert chat.wait(5).text == "abc" and chat.turns[0][0] == "hi" and chat.text.value == ""
    submit(chat, "unchanged", before=True)  # nothing more comes from the browser
    deadline = time.monotonic() + 5
    while len(chat.turns) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [t for t, _ in chat.turns] == ["hi", "unchanged"]
    chat.wait(5)
    submit(chat, "   ")
    assert len(chat.turns) == 2 and not chat.busy


def test_nothing_typed_or_written_becomes_html():
    engine = Engine(context=100)
    engine._logits = lambda: np.eye(256, dtype=np.float32)[ord("<") if engine._said < 3 else 0]
    chat = Chat(engine, Letters())
    chat.ask("<img src=x onerror=alert(1)>")
    assert "&lt;&lt;&lt;" in chat.transcript.value and "&lt;img src=x" in chat.transcript.value
    assert "<img" not in chat.transcript.value + chat.writing.value + chat.status.value
    engine.broken = ValueError("<b>bad</b>")
    assert chat.ask("hi") is None and "&lt;b&gt;bad&lt;/b&gt;" in chat.status.value and "<b>bad" not in chat.status.value


def test_stop_ends_the_answer_between_two_tokens():
    engine = Engine(context=200, length=100)
    engine.gate = threading.Semaphore(0)
    chat = Chat(engine, Letters())
    chat.text.value = "hi"
    chat.send_button.click()
    assert chat.busy and chat.send_button.disabled and not chat.stop_button.disabled and chat.text.value == ""
    for _ in range(3):
        engine.gate.release()
    chat.text.value = "more"
    assert not chat.send() and "press Stop" in chat.status.value and chat.text.value == "more" and not chat.new()
    with pytest.raises(TimeoutError, match="still being written"):
        chat.wait(0.05)
    chat.stop_button.click()
    engine.gate.release(100)
    answer = chat.wait(5)
    assert answer.finish == "stopped" and 3 <= len(answer.tokens) <= 6 and "stopped" in chat.transcript.value
    assert not chat.send_button.disabled and chat.stop_button.disabled
    engine.gate = None
    chat.most.value = 2
    assert chat.ask("yo").kept_tokens > 0 and "!abc" in text(engine.seen), "what was written before Stop belongs to the conversation"


def test_tokens_are_shown_while_they_come(monkeypatch):
    monkeypatch.setattr("edgelab.chat.SHOWN_EVERY_S", 0.0)
    chat, shown = Chat(Engine(), Letters()), []
    chat.writing.observe(lambda change: shown.append(change.new), "value")
    chat.ask("hi")
    assert [s.count("...") for s in shown] == [0, 1, 1, 1, 0] and "</b> ab ...</p>" in shown[2] and shown[-1] == ""
    assert 'role="log"' in chat.transcript.value and "abc" in chat.transcript.value


def test_an_error_is_shown_in_place_counted_and_goes_away():
    engine, monitor = Engine(context=12), Monitor("chat")
    chat = Chat(engine, Letters(), monitor=monitor)
    chat.text.value = "a message that is too long"
    chat.send_button.click()
    assert chat.wait(5) is None and isinstance(chat.error, ValueError) and 'role="alert"' in chat.status.value
    assert chat.text.value == "a message that is too long" and chat.writing.value == "" and not chat.turns
    assert "1 ValueError" in repr(monitor) and "1 ValueError" in chat.numbers.value
    assert chat.ask("hi").text == "abc" and chat.error is None and "alert" not in chat.status.value
    with pytest.raises(ValueError, match="text is empty"):
        chat.ask(" ")


def test_the_monitor_counts_and_answers_are_judged():
    monitor = Monitor("chat")
    chat = Chat(Engine(), Letters(), monitor=monitor)
    assert chat.right_button.disabled
    answer = chat.ask("hi")
    told = {r["what"]: r["value"] for r in monitor.summary()}
    assert (told["requests"], told["tokens written"], told["tokens read"]) == ("1", "3", "5")
    assert told["confidence, mean"] == f"{answer.confidence:.3f}" and f"{answer.confidence:.2f}" in chat.status.value
    chat.wrong_button.click()
    assert chat.wrong_button.disabled and monitor.accuracy()[0] == 0.0 and "right, of those judged" in chat.numbers.value
    assert chat.new() and chat.turns == [] and "abc" not in chat.transcript.value and chat.ask("ho").kept_tokens == 0


def test_without_memory_each_message_stands_alone():
    engine = Engine()
    chat = Chat(engine, Letters(), remember=False)
    chat.ask("hi")
    assert chat.ask("yo").kept_tokens == 0 and text(engine.seen) == "^?yo!abc"
    chat.remember.value = True
    assert chat.ask("go").kept_tokens == 8 and text(engine.seen) == "^?yo!abc?go!abc"


def test_inputs_have_names_and_bounds_and_the_page_a_text():
    chat = Chat(Engine(), Letters())
    inputs = (chat.text, chat.temperature, chat.top_p, chat.most, chat.remember, chat.send_button, chat.stop_button)
    assert all(i.description for i in inputs)
    chat.temperature.value, chat.top_p.value, chat.most.value = -1, 7, 10**6
    assert (chat.temperature.value, chat.top_p.value, chat.most.value) == (0, 1, 40)
    assert "nothing was said yet" in repr(chat)
    chat.ask("hi")
    bundle = chat._repr_mimebundle_()
    assert "You: hi\nModel: abc" in bundle["text/plain"] and "application/vnd.jupyter.widget-view+json" in bundle


# ---------------------------------------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def phone():
    folder = data_dir() / "edge-phone"
    return Runtime.open(folder, tiles=None, context=128, slots=2), load_tokenizer(folder)


def test_the_embedded_model_answers_as_the_runtime_does(phone):
    runtime, tokenizer = phone
    chat = Chat(runtime, tokenizer, remember=False)
    asked = "heat the kitchen to twenty one degrees"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
    alone = runtime.generate(tokenizer(prompt, add_special_tokens=False)["input_ids"], 64)
    answer = chat.ask(asked, timeout=60)
    assert list(answer.tokens) == alone.tokens and answer.text == '{"call": "heat", "room": "kitchen", "degrees": 21}'
    assert answer.confidences[:-1] == pytest.approx(alone.confidences) and answer.tokens_per_s > 0
    chat.temperature.value, chat.conversation.system = 1.5, None
    assert len({chat.ask(asked, timeout=60).text for _ in range(6)}) > 1, "temperature changes nothing"


def test_what_stays_in_the_cache_is_what_reading_again_would_give(phone):
    runtime, tokenizer = phone
    talk = Conversation(runtime, tokenizer)
    said = ["heat the kitchen to twenty one degrees", "wake me at seven", "dim the lamp in the bedroom"]
    kept = [talk.reply(t, max_new=12) for t in said]
    runtime.generate([1, 2, 3], 4)  # slot 0: the conversation lives in another
    assert [a.kept_tokens > 0 for a in kept] == [False, True, True] and [a.note for a in kept] == ["", "", ""]
    ids = runtime.lengths[talk.slot]
    again = Conversation(runtime, tokenizer)
    again.messages = talk.messages[:4]
    fresh = again.reply(said[2], max_new=12)
    assert fresh.tokens == kept[2].tokens and runtime.lengths[talk.slot] == ids
    assert fresh.confidences == pytest.approx(kept[2].confidences, abs=0.02)  # float16 keys, and sums in another order


# ------------------------------------------------------------------------------------------------------- a real JupyterLab


SLOW_CHAT = """
import time
from edgelab.chat import Chat
from edgelab.model import load_tokenizer
from edgelab.paths import data_dir
from edgelab.runtime import Runtime

class Slow(Runtime):
    def step(self, slots, tokens):
        time.sleep(0.1)
        return super().step(slots, tokens)

folder = data_dir() / "edge-phone"
chat = Chat(Slow.open(folder, tiles=None), load_tokenizer(folder))
chat.conversation.runtime.eos = ()
chat
"""


@pytest.fixture
def lab(tmp_path):
    """Opens a notebook of one cell in JupyterLab in Chromium and runs it: (the tab, requests that left this machine)."""
    import nbformat

    sync = pytest.importorskip("playwright.sync_api", reason="the driver (pip install 'edgelab[test]') is not installed")
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None or importlib.util.find_spec("jupyterlab") is None:
        pytest.skip("no Chromium or Chrome on the PATH, or no JupyterLab")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(SLOW_CHAT)]), tmp_path / "chat.ipynb")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    places = {f"JUPYTER_{what}_DIR": str(tmp_path / what.lower()) for what in ("CONFIG", "RUNTIME")} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places | {"PYTHONPATH": path}, cwd=tmp_path)
    try:
        with sync.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--no-proxy-server"])
            tab, left = browser.new_page(viewport={"width": 1300, "height": 1000}), []
            here = (f"http://127.0.0.1:{port}/", "data:", "blob:")
            tab.on("request", lambda request: None if request.url.startswith(here) else left.append(request.url))
            for _ in range(120):
                with contextlib.suppress(sync.Error):
                    tab.goto(f"http://127.0.0.1:{port}/lab/tree/chat.ipynb")
                    break
                time.sleep(0.5)
            ready = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
            tab.wait_for_function(ready, timeout=90_000)
            tab.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
            tab.locator("input[placeholder='type, then Enter']").first.wait_for(state="visible", timeout=90_000)
            yield tab, left
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_enter_sends_tokens_come_and_stop_stops(lab):
    tab, left = lab
    box, log = tab.locator("input[placeholder='type, then Enter']").first, tab.locator("div[role=log]").first
    stop, send = (tab.locator(f"button:has-text('{name}')").first for name in ("Stop", "Send"))
    running = tab.locator("p:has-text('Model:')").last
    box.click()
    box.type("<img src=x onerror='window.bad=1'> heat the kitchen")
    box.press("Enter")
    tab.wait_for_function("[...document.querySelectorAll('p')].some(p => p.innerText.startsWith('Model:') && p.innerText.length > 20)")
    first = running.inner_text()
    tab.wait_for_timeout(600)
    assert len(running.inner_text()) > len(first), "the answer does not grow while it is written"
    assert send.is_disabled() and box.input_value() == ""
    stop.click()
    log.locator("text=stopped").first.wait_for(timeout=5000)
    assert send.is_enabled() and stop.is_disabled()
    assert tab.evaluate("window.bad") is None and log.locator("img").count() == 0 and "<img src=x" in log.inner_text()
    box.click()
    box.type("draft")
    tab.locator("label:has-text('temperature')").first.click()  # the box loses the focus, and nothing is sent
    tab.wait_for_timeout(800)
    assert box.input_value() == "draft" and log.inner_text().count("You:") == 1
    for i in (2, 3, 4):
        box.click()
        box.fill(f"message {i}")
        box.press("Enter")
        tab.wait_for_timeout(700)
        stop.click()
        tab.wait_for_function("n => document.querySelector('div[role=log]').innerText.split('You:').length === n + 1", arg=i, timeout=5000)
    assert "were in the cache" in log.inner_text()
    last = log.locator("p").last.bounding_box()
    shown = tab.evaluate(
        "(() => { let e = document.querySelector('div[role=log]');"
        " while (getComputedStyle(e).flexDirection !== 'column-reverse') e = e.parentElement;"
        " const r = e.getBoundingClientRect(); return [r.top, r.bottom, e.scrollHeight > e.clientHeight]; })()"
    )
    assert shown[2] and shown[0] < last["y"] < shown[1], "the newest answer is out of sight"
    assert left == []
