"""`edgelab run`: what a person types, and what comes back."""

import shlex
import subprocess
import sys
import urllib.request

import pytest
from test_cli import bundle, edgelab, model, runner  # noqa: F401 (fixtures)

from edgelab import cli, cli_run
from edgelab.model import load_tokenizer
from edgelab.paths import data_dir

PHONE = str(data_dir() / "edge-phone")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_the_phone_model_answers_a_command_as_transformers_does():
    import torch

    from edgelab import load

    tokenizer, torchs = load_tokenizer(PHONE), load(PHONE)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "play the blues"}], add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    with torch.inference_mode():
        theirs = torchs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    result = edgelab("run", PHONE, "play the blues", "--exact", "--max-new", "32")
    assert result.exit_code == 0
    assert result.output.strip() == tokenizer.decode(theirs, skip_special_tokens=True).strip() and '"call"' in result.output


def test_raw_goes_on_where_the_prompt_ends_and_stats_are_shown(bundle):  # noqa: F811
    result = edgelab("run", bundle, "import os", "--raw", "--max-new", "5", "--stats", "--experts", "1", "--threads", "1")
    assert result.exit_code == 0
    for said in ("tokens written", "time to first token", "confidence, mean", "of which 1 are used", "activations, planned"):
        assert said in " ".join(result.output.split())


def test_a_conversation_line_by_line_governed(bundle):  # noqa: F811
    result = runner.invoke(cli.app, ["run", str(bundle), "--max-new", "3", "--govern"], input="one\n\n" + "long " * 2000 + "\ntwo\n")
    assert "tokens do not fit" in " ".join(result.output.split())  # of one line; the others are answered
    assert result.exit_code == 0 and result.output.count("threads") >= 2  # what was decided, after each answer


def test_a_conversation_is_remembered_or_not(monkeypatch):
    seen = []
    from edgelab.runtime import Runtime

    stream = Runtime.stream
    monkeypatch.setattr(Runtime, "stream", lambda self, ids, *a, **k: seen.append(list(ids)) or stream(self, ids, *a, **k))
    for how in ("--remember", "--forget"):
        assert runner.invoke(cli.app, ["run", PHONE, how, "--max-new", "20"], input="play the blues\nstop it\n").exit_code == 0
    tokenizer = load_tokenizer(PHONE)
    texts = [tokenizer.decode(ids) for ids in seen]
    assert texts[0] == texts[2] and "play the blues" in texts[1] and '"call"' in texts[1] and texts[1].endswith("stop it<|call|>")
    assert "play" not in texts[3]


def test_clear_forgets_and_bye_ends(monkeypatch):
    seen = []
    from edgelab.runtime import Runtime

    stream = Runtime.stream
    monkeypatch.setattr(Runtime, "stream", lambda self, ids, *a, **k: seen.append(list(ids)) or stream(self, ids, *a, **k))
    typed = "play the blues\n/clear\nplay the blues\n/bye\nnever read\n"
    assert runner.invoke(cli.app, ["run", PHONE, "--max-new", "4"], input=typed).exit_code == 0
    assert len(seen) == 2 and seen[0] == seen[1]


def test_an_answer_that_the_context_cuts_says_so():
    result = edgelab("run", PHONE, "x y", "--context", "8", "--raw")
    assert "the answer was cut" in " ".join(result.output.split())


def test_a_long_conversation_forgets_its_beginning():
    tokenizer = load_tokenizer(PHONE)
    said = [{"role": r, "content": f"{r} {i} " + "word " * 20} for i in range(10) for r in ("user", "assistant")]
    ids = cli_run._ids(tokenizer, said, "now", False, 200, 64)
    text = tokenizer.decode(ids)
    assert len(ids) + 50 <= 200 and "user 9" in text and "user 0" not in text and text.endswith("now<|call|>")


def test_bytes_that_are_no_text_and_a_closed_input(bundle):  # noqa: F811
    code = "from edgelab.cli import app; app()"
    arguments = [sys.executable, "-c", code, "run", str(bundle), "--max-new", "2"]
    done = subprocess.run(arguments, input=b"caf\xe9\n", capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    closed = subprocess.run(f"exec {shlex.join(arguments)} 0<&-", shell=True, capture_output=True)
    assert closed.returncode == 0 and b"Traceback" not in closed.stderr


def test_the_same_seed_draws_the_same(bundle):  # noqa: F811
    drawn = [edgelab("run", bundle, "x", "--temperature", "1", "--seed", s, "--max-new", "12").output for s in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "x"), "is no folder; give a bundle"),
        ((PHONE, ""), "the prompt is empty"),
        ((PHONE, "x", "--top-p", "2"), "top_p=2"),
        ((PHONE, "x", "--experts", "9"), "top_k=9; the model uses 2"),
        ((PHONE, "x", "--context", "5000"), "max_position_embeddings=1024"),
        ((PHONE, "x " * 900, "--context", "32"), "tokens do not fit"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, says):
    result = edgelab("run", *arguments, "--raw", code=2)
    assert says in " ".join(result.output.split())


def test_pieces_are_whole_characters_and_add_up():
    tokenizer = load_tokenizer(PHONE)
    text = "naïve — 'привет' \n" * 30
    ids = tokenizer(text)["input_ids"]
    found = list(cli_run.pieces(tokenizer, ids))
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)


def test_a_space_behind_a_line_break_is_kept():
    """A tokenizer that drops the first space of whatever it decodes, as those of Llama and Mistral do."""

    class Dropping:
        def decode(self, ids, skip_special_tokens=True):
            return "".join(("\n", " a", " b", "c")[i] for i in ids).removeprefix(" ")

    ids = [1, 0, 1, 2, 3, 0, 2, 1] * 5
    assert "".join(cli_run.pieces(Dropping(), ids)) == Dropping().decode(ids)


def test_metrics_are_served_while_it_runs(bundle, monkeypatch):  # noqa: F811
    pytest.importorskip("prometheus_client")
    seen = []
    from edgelab.monitor import Monitor

    serve = Monitor.serve

    def noted(self, port=0, **settings):
        seen.append(serve(self, port, **settings))
        return seen[0]

    texts = []
    inner = cli_run.pieces

    def asking(tokenizer, tokens):
        yield from inner(tokenizer, tokens)
        texts.append(urllib.request.urlopen(seen[0].url, timeout=5).read().decode())

    monkeypatch.setattr(Monitor, "serve", noted)
    monkeypatch.setattr(cli_run, "pieces", asking)
    assert edgelab("run", bundle, "x", "--metrics", "0", "--max-new", "4").exit_code == 0
    assert "edgelab_requests_total 1.0" in texts[0]
