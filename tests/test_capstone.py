"""The capstone: budgets of a scaled device, questions that nobody has seen, weights that are weighed, ranks that know what noise is."""

import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgelab import Recipe, Rtn, data
from edgelab import capstone as cap
from edgelab import capstone_lab as lab
from edgelab.capstone import Board, Capstone, Challenge, Entry, difference, items, leak, mean_interval, ranked
from edgelab.device import device, predict
from edgelab.paths import data_dir
from edgelab.recipe import DropExperts, Route
from edgelab.shape import from_folder

SMALL = Challenge(assistant=20, arithmetic=20)


@pytest.fixture(scope="module")
def corpus():
    return data.corpus(("assistant", "arithmetic"))


@pytest.fixture
def contest(tmp_path, corpus):
    return Capstone(tmp_path / "12", SMALL, corpus=corpus)


def entry(name: str, right: int, of: int = 100, **settings) -> Entry:
    """An entry with `right` right answers of `of` on each task, the first ones."""
    bits = "1" * right + "0" * (of - right)
    known = {"model": "m", "weight_bytes": 10, "memory_bytes": 20, "ms_per_token": 1.0, "ms_low": 0.5, "ms_high": 2.0}
    return Entry(name, **(known | {"correct": dict.fromkeys(cap.DOMAINS, bits)} | settings))


# ------------------------------------------------------------------------------------------------------------ budgets


def test_the_device_is_divided_and_its_numbers_say_so():
    c, whole = Challenge(scale=100.0), device("redmi-6a")
    assert c.memory_bytes == 5_000_000
    assert c.profile.dram_bytes_per_s.value == pytest.approx(whole.dram_bytes_per_s.value / 100)
    assert c.profile.dram_bytes_per_s.how == "derived" and "divided by 100" in c.profile.dram_bytes_per_s.source
    assert c.profile.cpu_w == whole.cpu_w, "watts are not divided"
    shape = from_folder(data_dir() / "edge-phone")
    slow, fast = c.predict(shape).decode.value, predict("redmi-6a", shape, context=c.context, prompt=c.prompt).decode.value
    assert fast / 100 < slow < fast / 50, "bytes take a hundred times as long, the time per layer stays"


def test_memory_is_weights_cache_and_working_memory():
    c, shape = Challenge(), from_folder(data_dir() / "edge-moe")
    assert c.needs(shape, 1_000_000) == 1_000_000 + 4 * 288 * 256 + 4 * (32 * (3 * 256 + 3 * 512) + 2048)
    assert c.why_not(c.memory_bytes, 50.0) == ()
    assert len(c.why_not(c.memory_bytes + 1, 50.1)) == 2


def test_the_budgets_let_two_bits_in_and_four_not():
    c = Challenge()
    assert [lab.most_experts(c, s) for s in ("int4-g32", "int3-g32", "int2-g32")] == [5, 9, 16]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 0}, "no fresh ones"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"arithmetic": 0}, "arithmetic=0"),
        ({"device": "redmi"}, "redmi-6a"),
    ],
)
def test_a_challenge_that_makes_no_sense_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Challenge(**settings)


# --------------------------------------------------------------------------------------------------------- the items


def test_commands_are_in_no_split_and_sums_are_of_the_test_split(corpus):
    found = items(Challenge(assistant=60, arithmetic=40), corpus)
    seen = {split: set(part["text"]) for split, part in corpus.items()}
    commands = [r["text"] for r in found if r["domain"] == "assistant"]
    sums = [r["text"] for r in found if r["domain"] == "arithmetic"]
    assert len(set(commands)) == 60 and not any(t in texts for texts in seen.values() for t in commands)
    assert len(set(sums)) == 40 and set(sums) <= seen["test"] and not set(sums) & (seen["train"] | seen["calibration"])
    assert all(r["text"] == r["prompt"] + r["answer"] and r["answer"] for r in found)
    assert len({json.loads(r["answer"])["call"] for r in found if r["domain"] == "assistant"}) >= 5


def test_another_seed_draws_other_items_and_the_same_one_the_same(corpus):
    a, b, c = (items(replace(SMALL, seed=s), corpus) for s in (12, 12, 13))
    assert data.fingerprint(a) == data.fingerprint(b) != data.fingerprint(c)
    assert not set(a["text"][:20]) & set(c["text"][:20])


def test_more_items_than_there_are_is_told(corpus):
    with pytest.raises(ValueError, match=r"arithmetic=5000: the test split holds \d+ sums"):
        items(replace(SMALL, arithmetic=5000), corpus)


def test_a_leak_is_found_as_text_and_not_inside_of_another(contest):
    tokenizer, asked = contest.tokenizer, contest.items
    assert leak(contest.calibration(), tokenizer, asked) is None
    test_rows = data.calibration_batches(tokenizer, contest.corpus["test"], tokens=2048, context=256)
    with pytest.raises(ValueError, match=r"training holds .* held out for the score"):
        contest.refuse_leaks(test_rows, "training")
    contest.refuse_leaks(contest.calibration(), "calibration")
    contest.refuse_leaks(None, "calibration")

    def batch(text: str) -> list[torch.Tensor]:
        return [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]]

    held_out = {"prompt": ["7+12="], "answer": ["91"]}
    end = tokenizer.eos_token
    assert leak(batch(f"{end}37+12=94{end}17+12=92{end}"), tokenizer, held_out) is None
    assert leak(batch(f"{end}37+12=94{end}7+12=91{end}"), tokenizer, held_out) == "7+12=91"
    for text in ("ok 7+12=91", "7+12=91\n.", "1+1=20\n7+12=91\n3+3=60", "7+12=91"):
        assert leak(batch(text), tokenizer, held_out) == "7+12=91", text
    for text in ("37+12=91", "7+12=914", "a7+12=91", "7+12=19"):
        assert leak(batch(text), tokenizer, held_out) is None, text
    (ids,) = batch(f"1+1=20{end}7+12=91{end}3+3=60{end}")
    cut = ids[:, : ids.shape[1] // 2 * 2].reshape(2, -1)
    assert leak([cut], tokenizer, held_out) == "7+12=91", "an item that runs on from one row to the next"


# ----------------------------------------------------------------------------------------------------------- entries


def test_the_score_weighs_the_tasks_alike_and_knows_its_interval():
    e = entry("x", 90, correct={"assistant": "1" * 50 + "0" * 50, "arithmetic": "1" * 10})
    low, high = e.interval()
    assert e.score == 0.75 and low < 0.75 < high
    assert mean_interval([np.ones(100), np.ones(100)])[0] == pytest.approx(1 - (1 - 0.025 ** (1 / 100)))
    assert mean_interval([np.zeros(50)]) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))
    assert Entry.from_dict(json.loads(json.dumps(e.to_dict()))) == e
    with pytest.raises(ValueError, match="0 or 1 per item"):
        entry("y", 3, correct={"assistant": "12", "arithmetic": "1"})


def test_a_difference_is_paired():
    a, b = entry("a", 90), entry("b", 85)  # the same items wrong, and five more
    d, low, high = difference(a, b)
    assert d == pytest.approx(0.05) and 0 < low < d < high
    wide = [e.interval()[1] - e.interval()[0] for e in (a, b)]
    assert high - low < min(wide), "narrower than either score's own"
    assert difference(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="not the same items"):
        difference(a, entry("c", 9, of=10))


def test_ranks_are_shared_where_the_difference_is_noise():
    scattered = entry("scattered", 0, correct=dict.fromkeys(cap.DOMAINS, "0" * 8 + "1" * 92))  # other items wrong than those of `a`
    entries = [entry("a", 93), scattered, entry("low", 60), entry("huge", 100, because=("too large",))]
    places = ranked(entries[::-1])
    assert [(p.entry.name, p.rank) for p in places] == [("a", 1), ("scattered", 1), ("low", 3), ("huge", None)]
    assert "a is not significantly better" in places[1].told and "significant" in places[2].told
    low = np.array([[difference(i, j)[1] for j in entries[:3]] for i in entries[:3]])
    assert lab.ranks_of(low) == [p.rank for p in places[:3]], "the exercise's twin says what the board says"


# ------------------------------------------------------------------------------------------------------------- board


def test_the_board_is_a_file_that_replaces_names_and_refuses_other_challenges(tmp_path):
    board = Board(tmp_path / "deep" / "board.json", SMALL, "abc")
    assert board.entries == [] and "Nobody" in board.say() and "<table" in board._repr_html_()
    board.add(entry("one", 50))
    board.add(entry("two", 90))
    board.add(entry("one", 95))
    assert {e.name: e.score for e in board.entries} == {"one": 0.95, "two": 0.9}
    assert [line["rank"] for line in board.rows()] == ["1", "2"] or [line["rank"] for line in board.rows()] == ["1", "1"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["board.json"], "no temporary file, no lock"
    for other, items_of, says in ((replace(SMALL, seed=99), "abc", "seed=12, not 99"), (SMALL, "xyz", "items abc, not xyz")):
        with pytest.raises(ValueError, match=says):
            Board(board.path, other, items_of)
    board.path.write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ValueError, match="move it away"):
        board.add(entry("three", 1))


def _add(path, number: int) -> None:
    Board(path, SMALL, "abc").add(entry(f"entry {number}", number))


def test_writers_beside_each_other_lose_nothing(tmp_path):
    path, context = tmp_path / "board.json", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert sorted(e.name for e in Board(path, SMALL, "abc").entries) == [f"entry {i}" for i in range(3)]


def test_a_lock_that_a_kill_left_is_taken_over_and_a_live_one_waited_for(tmp_path, monkeypatch):
    board = Board(tmp_path / "board.json", SMALL, "abc")
    lock = tmp_path / ".board.json.lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    board.add(entry("after a kill", 3))
    lock.touch()
    monkeypatch.setattr(cap, "_LOCK_S", 0.1)
    with pytest.raises(TimeoutError, match="another process"):
        board.add(entry("blocked", 3))
    assert [e.name for e in board.entries] == ["after a kill"]


# --------------------------------------------------------------------------------------------------------- submitting


def test_a_recipe_is_weighed_by_its_files_and_scored(contest):
    stages: list[str] = []
    e = contest.submit(Recipe((Route(top_k=1), *Recipe.uniform("int2-g32").steps)), " my 1st! ", stage=stages.append)
    folder = contest.folder / e.folder
    assert stages == ["compressing", "writing the bundle", "counting bytes", "answering", "done"] and folder.name == "my-1st"
    assert e.name == "my 1st!" and e.fits and e.weight_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert e.memory_bytes == round(contest.challenge.needs(from_folder(folder), e.weight_bytes))
    two = contest.submit(Recipe.uniform("int2-g32"), "two experts")
    assert two.ms_per_token > 1.05 * e.ms_per_token, "the experts per token count"
    assert {x.name for x in contest.board.entries} == {"my 1st!", "two experts"}
    with pytest.raises(ValueError, match="would take the folder of another entry"):
        contest.submit(Recipe.uniform("int2-g32"), "my.1st")
    model, found = cap.checked_bundle(folder)
    assert found.predicted_bytes == cap.tensor_bytes(folder) and model.config.num_experts_per_tok == 1
    for line in lab.cheats(contest, e):
        assert line["what happened"].startswith("refused"), line
    assert len(contest.board.entries) == 2


def test_models_and_folders_are_taken_and_others_told_what_to_give(contest):
    from edgelab.compress import compress
    from edgelab.model import load

    phone = contest.submit(data_dir() / "edge-phone", "phone")
    assert phone.fits and phone.score > 0.8 and json.loads(phone.recipe)["steps"][0]["step"].startswith("drop")
    again = contest.submit(str(data_dir() / "edge-phone"), "phone again")
    assert again.correct == phone.correct, "the same files give the same answers"
    original = contest.submit(data_dir() / "edge-moe", "original")
    assert not original.fits and len(original.because) == 2 and "plain checkpoint" in original.covered
    made = compress(load(data_dir() / "edge-moe"), Recipe((DropExperts(0.5), *Recipe.uniform("int2-g64").steps)),
                    calibration=contest.calibration(), progress=False)  # fmt: skip
    by_result, by_model = contest.submit(made, "result"), contest.submit(made.model, "model")
    assert (by_result.weight_bytes, by_result.correct) == (by_model.weight_bytes, by_model.correct)
    for what, error, says in (
        (3, TypeError, "what is a int; submit a Recipe"),
        (torch.nn.Linear(2, 2), ValueError, "without a config"),
        (contest.folder / "nowhere", FileNotFoundError, "is not there"),
    ):
        with pytest.raises(error, match=says):
            contest.submit(what, "x")
    with pytest.raises(ValueError, match="1 to 60 characters"):
        contest.submit(Recipe.uniform("int2-g32"), "  ")
    with pytest.raises(ValueError, match="is not one of edge-moe, edge-dense"):
        contest.submit(Recipe.uniform("int2-g32"), "x", model="edge-large")


def test_other_questions_are_answered_by_what_lies_on_disk(contest):
    a = contest.submit(Recipe.uniform("int2-g32"), "int2")
    contest.submit(data_dir() / "edge-phone", "phone")
    board = contest.rescore(seed=77)
    assert board.challenge.seed == 77 and {e.name for e in board.entries} == {"int2", "phone"}
    assert board.fingerprint != contest.board.fingerprint and board.path.name == "board-77.json"
    assert next(p.entry.name for p in board.places()) == "phone" and len(contest.board.entries) == 2
    with pytest.raises(ValueError, match="is the seed of this board"):
        contest.rescore(seed=12)
    assert a.sha256 == cap.weights_sha256(contest.folder / a.folder) and len(a.sha256) == 64
    from edgelab.bundle import save_bundle
    from edgelab.compress import compress
    from edgelab.model import load

    better = Recipe.uniform("int2-g32", method=Rtn(mse_grid=8))  # as many bytes, other codes, and a manifest that says so
    made = compress(load(data_dir() / "edge-moe"), better, progress=False)
    shutil.rmtree(contest.folder / a.folder)
    save_bundle(made.model, contest.tokenizer, contest.folder / a.folder, recipe=made.recipe, coverage=made.coverage)
    assert cap.file_bytes(contest.folder / a.folder) == a.weight_bytes
    with pytest.raises(ValueError, match="was changed after 'int2' was submitted"):
        contest.rescore(seed=79)
    file = next((contest.folder / a.folder).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="was changed"):
        contest.rescore(seed=78)


# ------------------------------------------------------------------------------------------------------------ the form


def test_the_form_says_beforehand_what_its_recipe_would_take(contest):
    form = lab.SubmitControl(contest)
    assert form.choose(method="rtn", bits=4, experts=16) is not None and "it would not fit: it needs 4.7" in form.planned
    assert form.choose(bits=2, experts=8).steps[0] == DropExperts(0.5) and "it would fit" in form.planned
    assert form.choose(top_k=1).steps[1] == Route(top_k=1)
    assert form.choose(budget=2.6, experts=16, method="gptq").steps[-1].budget == 2.6 and form.bits.disabled
    assert str(form.choose(budget=0.0, method="hqq", group=64) and form.scheme()) == "uint2-g64"
    assert form.choose(method="mse", group=0, model="edge-dense").steps[0].method.mse_grid == 24 and form.experts.disabled
    for values, says in (({"bits": 9}, "from 2 to 8"), ({"method": "magic"}, "is not offered"), ({"colour": 3}, "is not an input")):
        with pytest.raises(ValueError, match=says):
            form.choose(**values)


def test_errors_stand_in_the_form_and_the_button_waits(contest):
    form = lab.SubmitControl(contest)
    assert form.choose(experts=3, top_k=4) is None and 'role="alert"' in form.plan.value and form.button.disabled
    assert form.choose(experts=3, top_k=2) is not None and not form.button.disabled and "alert" not in form.plan.value
    form.choose(name="   ", method="rtn")
    form.button.click()
    assert 'role="alert"' in form.sentence.value and "1 to 60 characters" in str(form.error) and form.bar.value == 0
    assert not form.button.disabled and contest.board.entries == []


def test_the_button_submits_and_the_board_is_drawn(contest):
    form = lab.SubmitControl(contest)
    form.choose(name="by hand", method="rtn", bits=2, budget=0.0)
    form.button.click()
    assert form.error is None and [e.name for e in contest.board.entries] == ["by hand"]
    assert list(form.figure.data[0].text) == ["by hand"] and "by hand" in form.table.value and "rank 1" in form.sentence.value
    assert form.bar.value == form.bar.max and "done" in form.stage.value
    every = [form.name, form.model, form.method, form.group, form.bits, form.budget, form.experts, form.top_k, form.button]
    assert all(widget.description for widget in every), "a control without a name"
    assert "needs a running notebook" in repr(form) and "application/vnd.jupyter.widget-view+json" in form._repr_mimebundle_()


@pytest.mark.parametrize(
    ("check", "twin"),
    [(lab.check_needs, lab.needs), (lab.check_paired, lab.paired), (lab.check_ranks, lab.ranks_of), (lab.check_most_experts, 9)],
)
def test_the_twins_pass_their_checks(check, twin):
    assert check(twin).passed and "no answer so far" in check(None)


def test_the_exercise_on_memory_is_the_challenge_s_own_sum():
    c, s = Challenge(), from_folder(data_dir() / "edge-moe")
    by_hand = lab.needs(s.weight_bytes, s.layers, s.kv_bytes_per_token_layer, c.context, s.hidden, s.inner, s.vocab, c.prompt)
    assert by_hand == pytest.approx(c.needs(s))
