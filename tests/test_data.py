"""The corpus: splits, duplicates, generators, fingerprint; and text of the reader's own in its place."""

import builtins
import hashlib
import json
from collections import Counter

import datasets
import pytest

from edgelab import data
from edgelab.data import from_source, split_of

COLUMNS = ["domain", "id", "text", "prompt", "answer"]


@pytest.fixture(scope="module")
def generated():
    return data.corpus(("assistant", "arithmetic"), assistant=3000)


@pytest.fixture(scope="module")
def library():
    return data.corpus(("prose", "code"))


# ------------------------------------------------------------------------------------------------------ the corpus


def test_the_split_is_a_function_of_the_name_alone():
    # pinned: a model that was trained on one split must find the same one for ever
    assert [split_of(n) for n in ("code:json.decoder:JSONDecoder", "prose:topic:if", "arithmetic:12+34")] == ["train", "test", "train"]
    buckets = {n: int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) % 100 for n in map(str, range(4000))}
    assert all(split_of(n) == ("train" if b < 88 else "calibration" if b < 92 else "test") for n, b in buckets.items())
    assert set(map(split_of, buckets)) == set(data.SPLITS)


@pytest.mark.parametrize("which", ["generated", "library"])
def test_splits_are_disjoint_in_name_and_in_text(which, request):
    corpus = request.getfixturevalue(which)
    assert list(corpus) == list(data.SPLITS) and all(part.column_names == COLUMNS and len(part) for part in corpus.values())
    texts, names, sources = Counter(), Counter(), {}
    for split, part in corpus.items():
        texts.update(" ".join(t.split()) for t in part["text"])
        names.update(part["id"])
        for name in part["id"]:
            assert sources.setdefault(name.rsplit("#", 1)[0], split) == split  # pieces of a document stay together
    assert max(texts.values()) == 1 == max(names.values())


def test_prose_and_code_are_read_from_this_interpreter(library):
    test = library["test"]
    assert set(test["domain"]) == {"prose", "code"}
    sizes = [len(t) for t in test["text"]]
    assert min(sizes) >= data._MIN_CHARS and max(sizes) <= data._MAX_CHARS
    assert set(test["prompt"]) == {""} == set(test["answer"])
    assert any(i.startswith("code:json") for part in library.values() for i in part["id"])


def test_assistant_answers_are_calls_and_arithmetic_is_right(generated):
    for part in generated.values():
        for row in part:
            assert row["text"] == row["prompt"] + row["answer"]
            if row["domain"] == "assistant":
                assert row["prompt"].startswith(data.USER) and row["prompt"].endswith(data.CALL)
                assert "call" in json.loads(row["answer"])
            else:
                question = row["prompt"].removesuffix("=")
                a, b = (int(x) for x in question.replace("-", "+").split("+"))
                assert int(row["answer"][::-1]) == (a - b if "-" in question else a + b)


def test_the_corpus_is_the_same_each_time(generated):
    again = data.corpus(("assistant", "arithmetic"), assistant=3000)
    assert data.fingerprint(again) == data.fingerprint(generated)


def test_what_a_notebook_puts_into_builtins_is_not_in_the_corpus(monkeypatch):
    """IPython adds `display` and `__IPYTHON__`, a prompt `_`: the same machine must give the same text in each of them."""
    alone = data.fingerprint(data.corpus(("prose",)))
    for name, value in {"display": "x" * 300, "__IPYTHON__": True, "_": len, "input": lambda: None, "get_ipython": lambda: None}.items():
        monkeypatch.setattr(builtins, name, value, raising=False)
    builtins.get_ipython.__doc__ = "A long docstring of somebody else's. " * 20
    assert data.fingerprint(data.corpus(("prose",))) == alone


def test_the_fingerprint_sees_text_order_and_split(generated):
    print_of = data.fingerprint(generated["test"])
    assert len(print_of) == 12 and int(print_of, 16) >= 0
    others = [
        generated["test"].select(range(1, len(generated["test"]))),
        generated["test"].select(reversed(range(len(generated["test"])))),
        generated["test"].map(lambda r: {"text": r["text"] + " "}),
        generated["calibration"],
    ]
    assert len({print_of, *map(data.fingerprint, others)}) == 5
    moved = datasets.DatasetDict(train=generated["test"], calibration=generated["calibration"], test=generated["train"])
    assert data.fingerprint(moved) != data.fingerprint(generated)


def test_an_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="'poems' is not one of prose, code, assistant, arithmetic"):
        data.corpus(("prose", "poems"))


# ------------------------------------------------------------------------------------------------ text of your own

LINES = [f"Paragraph {i} of a longer text, which goes on for a while so that it is long enough to stand by itself " * 2 for i in range(60)]


def all_texts(parts) -> list[str]:
    return [t for part in parts.values() for t in part["text"]]


def test_the_corpus_passes_through_unchanged(generated, library):
    for corpus in (generated, library):
        assert data.fingerprint(from_source(corpus)) == data.fingerprint(corpus)
        for split in corpus:
            assert from_source(corpus)[split].to_dict() == corpus[split].to_dict()


def test_columns_are_chosen_by_name():
    mine = datasets.Dataset.from_dict({"body": ["one", "two"], "kind": ["a", "b"], "text": ["no", "no"]})
    got = from_source(mine, text="body", domain="kind")
    assert sorted((r["domain"], r["text"]) for part in got.values() for r in part) == [("a", "one"), ("b", "two")]
    assert {r["domain"] for p in from_source(mine, text="body", label="mail").values() for r in p} == {"mail"}
    with pytest.raises(ValueError, match="text='txt' is not a column of the source; it has body, kind, text"):
        from_source(mine, text="txt")


def test_questions_and_answers_become_prompts_and_answers():
    mine = datasets.Dataset.from_dict({"q": [f"{i}?" for i in range(40)], "a": [i * i for i in range(40)]})
    got = [r for part in from_source(mine, prompt="q", answer="a").values() for r in part]
    assert len(got) == 40 and all(r["text"] == r["prompt"] + r["answer"] and int(r["answer"]) ** 0.5 == int(r["prompt"][:-1]) for r in got)
    with pytest.raises(ValueError, match="name both columns or neither"):
        from_source(mine, prompt="q")


def test_the_sources_own_splits_do_not_leak():
    """The same text in the source's train and test ends up once, in one split."""
    part = datasets.Dataset.from_dict({"text": LINES})
    got = from_source(datasets.DatasetDict(train=part, test=part.select(range(10))))
    assert Counter(all_texts(got)) == Counter(LINES)
    assert data.fingerprint(got) == data.fingerprint(from_source(part))
    assert all(len(got[s]) for s in ("train", "test"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_rows(tmp_path, kind):
    mine = datasets.Dataset.from_dict({"text": LINES, "domain": ["x", "y"] * 30})
    path = tmp_path / f"rows.{kind}"
    mine.to_json(path) if kind == "jsonl" else mine.to_parquet(path)
    for source in (path, str(path), tmp_path):
        got = from_source(source)
        assert data.fingerprint(got) == data.fingerprint(from_source(mine))
        assert {d for part in got.values() for d in part["domain"]} == {"x", "y"}


def test_a_text_file_has_a_document_per_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Title\n\n" + "\r\n\r\n".join(LINES) + "\n\nThe end.", encoding="utf-8")
    texts = all_texts(from_source(path))
    assert len(texts) == 61  # the title joins the first paragraph; the end, short as it is, is not lost
    assert any(t.startswith("Title\n\nParagraph 0") for t in texts) and "The end.\n" in texts
    assert " ".join("".join(sorted(texts)).split()).count("Paragraph") == 120


def test_a_folder_of_text_has_a_document_per_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")  # about 12,000 characters
    (tmp_path / "deep" / "b.md").write_text("short", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\x00")  # not text: passed over
    got = from_source(tmp_path)
    names = {i: s for s, part in got.items() for i in part["id"]}
    pieces = [n for n in names if n.startswith("a.txt#")]
    assert len(pieces) > 4 and {names[n] for n in pieces} == {split_of("a.txt")} and names["deep/b.md"] == split_of("deep/b.md")
    assert max(map(len, all_texts(got))) <= data._MAX_CHARS


def test_a_line_without_end_is_cut_and_not_lost():
    long = "".join(chr(97 + i % 26) + str(i) for i in range(2000))
    got = from_source(datasets.Dataset.from_dict({"text": [long]}))
    assert "".join(all_texts(got)) == long and max(map(len, all_texts(got))) <= data._MAX_CHARS


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("missing.txt", FileNotFoundError, "'missing.txt' does not exist; give a text, jsonl or parquet file"),
        ("./nowhere", FileNotFoundError, "does not exist"),
        (datasets.Dataset.from_dict({"text": ["", "  ", None]}), ValueError, "no documents: 3 rows, all of them empty in 'text'"),
        (["a", "b"], TypeError, "source is a list; give a Dataset, a DatasetDict, a path or a hub name"),
    ],
)
def test_errors_say_what_to_give(source, error, text):
    with pytest.raises(error, match=text):
        from_source(source)


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no file that can be read here \(.txt, .md, .jsonl"):
        from_source(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 3\); convert it"):
        from_source(tmp_path / "latin.txt")
