"""Tables that are run again: cells, tolerances, verdicts, receipts; what was edited, forged, stale or failed is found."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edgelab import cli_reproduce, paper_tables, receipts, reproduce
from edgelab.page import external_loads
from edgelab.paper_tables import TABLES, Cell, Made
from edgelab.receipts import Receipt
from edgelab.reproduce import AGREES, DIFFERS, NO_VALUE, NOT_JUDGED, OTHER_TEXT, TOO_FEW, Stored, judge, tolerance

SETTINGS = {"only": 3}
FORMS = [(name, form) for name, table in TABLES.items() for form in ("full", "quick") if getattr(table, form) is not None]
# tables that have no stored values yet: whoever stores them takes them out of here, which the test below insists on
STILL_TO_STORE = {(name, "full") for name in ("learning", "claims")}


def stored(*, runs=None, variants=None, text: str = "T") -> Stored:
    runs = {0: {"int4 | KLD": 0.04}, 1: {"int4 | KLD": 0.05}, 2: {"int4 | KLD": 0.045}} if runs is None else runs
    return Stored(SETTINGS, text, runs, variants or {})


# -------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"value": 1.0, "kind": "guessed"}, "not one of measured"),
        ({"value": "yes"}, "text is 'said'"),
        ({"value": 1.0, "kind": "said"}, "text is 'said'"),
        ({"value": float("nan")}, "NaN"),
        ({"value": 1.0, "kind": "bounded"}, "limit"),
        ({"value": 1.0, "limit": 2.0}, "limit"),
    ],
)
def test_a_cell_says_what_it_is(given, says):
    with pytest.raises(ValueError, match=says):
        Cell("row", "column", **given)


def test_a_table_comes_back_from_its_file_and_has_one_cell_a_place():
    made = Made("quality", "t", (Cell("a", "b", 1.5, low=1.0, high=2.0), Cell("a", "c", "yes", "said"), Cell("a", "d", 3, "counted")))
    assert Made.from_json(made.to_json()) == made
    assert "<td align=right>1.500 [1, 2]</td>" in made._repr_html_()
    with pytest.raises(ValueError, match=r"two cells are called 'a \| b'"):
        Made("quality", "t", (Cell("a", "b", 1.5), Cell("a", "b", 2.5)))
    with pytest.raises(ValueError, match="no cell"):
        Made("quality", "t", ())
    with pytest.raises(ValueError, match="damaged"):
        Made.from_json('{"name": "x"}')


def test_documents_are_drawn_by_the_seed_and_sources_stay_together():
    import datasets

    ids = [f"prose:{i // 3}#{i % 3}" for i in range(30)] + [f"sum:{i}" for i in range(20)]
    test = datasets.Dataset.from_dict({"domain": ["prose"] * 30 + ["sum"] * 20, "id": ids, "text": ids})
    one, same, other = (paper_tables.drawn(test, {"prose": 6, "sum": 5}, seed)["id"] for seed in (0, 0, 1))
    assert one == same != other and len(one) == 11
    assert len({i.split("#")[0] for i in one if i.startswith("prose")}) == 2, "six pieces of two sources"
    with pytest.raises(ValueError, match="40 of 'sum' were asked for, the split has 20"):
        paper_tables.drawn(test, {"sum": 40}, 0)


def test_every_table_runs_with_settings_that_it_knows():
    import inspect

    for name, table in TABLES.items():
        known = set(inspect.signature(table.make).parameters) - {"seed"}
        for settings in (table.full, table.quick or {}):
            assert set(settings) <= known, name
            assert json.loads(json.dumps(reproduce._plain(settings))) == reproduce._plain(settings)
        assert table.make.__doc__ and table.title
    assert sum(t.quick is not None for t in TABLES.values()) >= 4


# ----------------------------------------------------------------------------------------------- tolerance and verdict


def test_tolerance_of_the_same_seed_is_three_times_what_other_additions_change_in_the_worst_row():
    runs = {0: {"int4 | KLD": 0.04, "int3 | KLD": 0.1, "int3 | bits": 3.5}}
    variants = {"two threads": {"int4 | KLD": 0.0401, "int3 | KLD": 0.098}, "older": {"int4 | KLD": 0.04, "int3 | bits": 4.0}}
    s = stored(runs=runs, variants=variants)
    assert s.noise("KLD") == pytest.approx(0.02) and s.noise("bits") == pytest.approx(1 / 7)
    assert tolerance(s, Cell("int4", "KLD", 0.0), 0) == pytest.approx((0.04, 3 * 0.02 * 0.04))
    assert tolerance(s, Cell("int4", "KLD", 0.0, step=0.01), 0)[1] == pytest.approx(0.015), "one answer may turn"
    quiet = stored(runs=runs)
    assert tolerance(quiet, Cell("int4", "KLD", 0.0), 0)[1] == pytest.approx(4e-6), "and never nothing at all"


def test_tolerance_of_another_seed_is_what_one_more_draw_may_be():
    value, within = tolerance(stored(), Cell("int4", "KLD", 0.0), 9)
    assert value == pytest.approx(0.045)
    assert within == pytest.approx(4.302653 * 0.005 * (4 / 3) ** 0.5 + 4.5e-6, rel=1e-6)  # Student's t, 2 degrees of freedom
    assert tolerance(stored(runs={0: {"int4 | KLD": 0.04}}), Cell("int4", "KLD", 0.0), 9) is None, "one run has no spread"
    assert tolerance(stored(), Cell("int5", "KLD", 0.0), 0) is None


@pytest.mark.parametrize(
    ("cell", "seed", "text", "verdict"),
    [
        (Cell("int4", "KLD", 0.04), 0, "T", AGREES),
        (Cell("int4", "KLD", 0.041), 0, "T", DIFFERS),
        (Cell("int4", "KLD", 0.041), 0, "other", OTHER_TEXT),
        (Cell("int4", "KLD", 0.041), 9, "T", TOO_FEW),
        (Cell("int4", "KLD", 0.041), 9, "other", OTHER_TEXT),
        (Cell("int4", "bits", 4.03), 9, "T", AGREES),
        (Cell("int4", "bits", 4.5), 9, "T", DIFFERS),
        (Cell("int4", "exact", 2.5, step=2.5), 9, "T", AGREES),
        (Cell("int5", "KLD", 0.04), 0, "T", NO_VALUE),
        (Cell("int4", "s", 99.0, "time"), 0, "T", NOT_JUDGED),
        (Cell("int4", "1 - cosine", 1e-13, "bounded", limit=1e-4), 0, "T", AGREES),
        (Cell("int4", "1 - cosine", 1e-3, "bounded", limit=1e-4), 0, "other", DIFFERS),
        (Cell("int4", "bytes", 7, "counted"), 0, "other", AGREES),
        (Cell("int4", "bytes", 8, "counted"), 0, "T", DIFFERS),
        (Cell("int4", "bytes", 7, "counted"), 9, "T", AGREES),
        (Cell("int4", "per seed", 1, "counted"), 0, "T", AGREES),
        (Cell("int4", "per seed", 1, "counted"), 9, "T", TOO_FEW),
        (Cell("int4", "verdict", "holds", "said"), 0, "T", AGREES),
        (Cell("int4", "verdict", "fails", "said"), 0, "T", DIFFERS),
        (Cell("int4", "verdict", "fails", "said"), 0, "other", OTHER_TEXT),
    ],
)
def test_verdicts(cell, seed, text, verdict):
    runs = {
        i: {
            "int4 | KLD": k,
            "int4 | bits": 4 + k,
            "int4 | exact": 0.0,
            "int4 | bytes": 7,
            "int4 | per seed": i + 1,
            "int4 | verdict": "holds",
        }
        for i, k in enumerate((0.04, 0.05, 0.045))
    }
    found = judge(cell, seed, stored(runs=runs), text)
    assert found.verdict == verdict
    assert found.why and (verdict != DIFFERS or cell.text.split(" [")[0] in found.why)


def test_without_stored_values_only_bounds_are_judged():
    assert judge(Cell("a", "b", 1.0), 0, None, "").verdict == NO_VALUE
    assert judge(Cell("a", "b", 2.0, "bounded", limit=1.0), 0, None, "").verdict == DIFFERS


@pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{n}-{f}" for n, f in FORMS])
def test_every_table_and_form_has_stored_values(name, form):
    table = TABLES[name]
    found = reproduce.stored_of(name, getattr(table, form))
    if (name, form) in STILL_TO_STORE:
        assert found is None, f"{name} ({form}) is stored now: take it out of STILL_TO_STORE"
        pytest.xfail(f"nothing is stored of {name} ({form}) yet")
    assert found is not None, f"data/tables has no values of {name} ({form}): python -m edgelab.reproduce {name}"
    assert list(found.runs) == (list(range(3)) if form == "full" and table.seeded else [0])
    assert len({frozenset(values) for values in found.runs.values()}) == 1, "the same cells for each seed"


def test_what_the_repository_stores_can_be_read_and_has_the_settings_that_are_asked_for():
    for path in sorted((reproduce.data_dir() / "tables").glob("*.json")):
        table = TABLES[path.stem]
        d = json.loads(path.read_text(encoding="utf-8"))
        known = [reproduce._plain(s) for s in (table.full, table.quick) if s is not None]
        for s in d["sets"]:
            assert s["settings"] in known, f"{path.name}: stored for settings that nobody asks for; python -m edgelab.reproduce {path.stem}"
            found = reproduce.stored_of(path.stem, s["settings"])
            assert found.runs and found.made["machine"] and found.made["code_sha256"]
            for column in {k.rpartition(" | ")[2] for k in found.runs[0]}:
                assert found.noise(column) < 0.5, f"{path.name}, {column}: what other additions change is no small thing"


# ----------------------------------------------------------------------------------------------------------- receipts


def some_run(folder: Path, seed: int = 0, value: float = 0.04, name: str = "studies") -> Receipt:
    """A finished run, without a kernel."""
    folder.mkdir(parents=True)
    made = Made(name, "A title", (Cell("int4", "KLD", value), Cell("int4", "bytes", 7, "counted"), Cell("int4", "s", 1.0 + seed, "time")))
    (folder / "notebook.ipynb").write_text("{}", encoding="utf-8")
    return paper_tables.keep(made, folder, seed, SETTINGS, 1, 1.5)


def test_a_receipt_says_what_ran_and_comes_back(tmp_path):
    told = some_run(tmp_path / "seed-0")
    assert Receipt.read(tmp_path / "seed-0") == told
    assert {"reproduce.py", "paper_tables.py", "receipts.py"} <= set(told.code) and set(told.data) == set(TABLES["studies"].data)
    assert told.packages["torch"] and told.machine and told.outputs.keys() == {"cells.json"}
    assert told.stale() == [] and told.edited(tmp_path / "seed-0") == []
    assert told.code_sha256[:12] in told.facts()["code"]
    assert reproduce.fits(tmp_path / "seed-0", "studies", 0, SETTINGS, 1) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"code": {"reproduce.py": "0" * 64}}, "other code: reproduce.py changed since"),
        ({"data": {"claims.csv": "0" * 64}}, "other data: claims.csv changed since"),
        ({"data": {"gone.csv": "0" * 64}}, "other data: gone.csv"),
        ({"packages": {"torch": "1.0"}}, "other library: torch is 2"),
        ({"packages": {"no-such-package": "1.0"}}, "no-such-package is not installed"),
    ],
)
def test_a_receipt_of_other_code_data_or_libraries_is_stale(tmp_path, change, says):
    told = replace(some_run(tmp_path / "seed-0"), **change)
    assert says in "; ".join(told.stale())


def test_a_receipt_of_another_text_is_stale(tmp_path, monkeypatch):
    told = replace(some_run(tmp_path / "seed-0"), text="0123456789ab")
    monkeypatch.setattr(receipts, "text_fingerprint", lambda: "ba9876543210")
    assert "other text: the test split is ba9876543210 here and was 0123456789ab" in "; ".join(told.stale())
    monkeypatch.setattr(receipts, "text_fingerprint", lambda: "0123456789ab")
    assert told.stale() == []


def test_an_edited_receipt_is_no_receipt(tmp_path):
    some_run(tmp_path / "seed-0")
    path = tmp_path / "seed-0" / "receipt.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    with pytest.raises(ValueError, match="was edited"):
        Receipt.read(tmp_path / "seed-0")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        Receipt.read(tmp_path / "seed-0")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        Receipt.read(tmp_path / "seed-0")


@pytest.mark.parametrize("other", [{"name": "claims"}, {"seed": 1}, {"settings": {"only": 4}}, {"threads": 2}])
def test_a_run_of_something_else_does_not_fit(tmp_path, other):
    some_run(tmp_path / "seed-0")
    asked = {"name": "studies", "seed": 0, "settings": SETTINGS, "threads": 1} | other
    assert reproduce.fits(tmp_path / "seed-0", **asked) != []


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def written(tmp_path):
    """A folder of tables with one in it, of three seeds; the stored values that it is judged by are none."""
    for seed, value in enumerate((0.04, 0.05, 0.045)):
        some_run(tmp_path / "studies" / f"seed-{seed}", seed, value)
    (tmp_path / reproduce.MARKER).write_text("{}", encoding="utf-8")
    reproduce.write_table(tmp_path / "studies")
    return tmp_path


def test_a_table_is_written_four_times_and_verifies(written):
    folder = written / "studies"
    rows = list(csv.DictReader(io.StringIO((folder / "studies.csv").read_text(encoding="utf-8"))))
    assert [float(r["value"]) for r in rows] == pytest.approx([0.045, 7, 2.0]) and float(rows[0]["sd"]) == pytest.approx(0.005)
    assert rows[0]["values"] == "0.04 0.05 0.045" and rows[0]["verdict"] == NO_VALUE and rows[2]["verdict"] == NOT_JUDGED
    page = (folder / "studies.html").read_text(encoding="utf-8")
    assert external_loads(page) == [] and "Receipt" in page and "0.0450 ± 0.0050" in page
    latex = (folder / "studies.tex").read_text(encoding="utf-8")
    assert r"0.0450 $\pm$ 0.0050" in latex and latex.count(r"\\") == 2 and "±" not in latex.split("\n", 1)[1]
    d = json.loads((folder / "studies.json").read_text(encoding="utf-8"))
    assert d["seeds"] == [0, 1, 2] and d["verdicts"] == {NO_VALUE: 6, NOT_JUDGED: 3}
    (outcome,) = reproduce.verify(written)
    assert outcome.remarks == () and not outcome.well
    assert "6 cells could not be judged: no value is stored" in outcome.line()["remark"]
    (outcome,) = reproduce.verify(written, new=True)
    assert outcome.remarks == () and outcome.well and outcome.line()["remark"] == ""


def rehash(folder):
    """The receipt of a forger, who lists the files as they now are."""
    told = Receipt.read(folder)
    receipts.write(folder, told, told.outputs)


def forged(name, old, new):
    def spoil(folder):
        path = folder / name
        assert old in path.read_text(encoding="utf-8")
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        rehash(folder)

    return spoil


def forget(folder):
    """A forger who also takes the stored values out of the receipt, so that verdicts could not be held against them."""
    told = Receipt.read(folder)
    receipts.write(folder, replace(told, data={k: v for k, v in told.data.items() if not k.startswith("tables/")}), told.outputs)


def spoil_csv(folder):
    path = folder / "studies.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("0.045", "0.015"), encoding="utf-8")


def forge(folder):
    spoil_csv(folder)
    rehash(folder)


def spoil_cells(folder):
    path = folder / "seed-1" / "cells.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.05", "0.01"), encoding="utf-8")


def exchange(folder):
    (folder / "seed-1" / "receipt.json").write_bytes((folder / "seed-2" / "receipt.json").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_csv, "studies.csv was edited"),
        (forge, "studies.csv does not follow from its cells"),
        (forged("studies.csv", NO_VALUE, AGREES), "studies.csv does not follow from its cells (line 2)"),
        (forged("studies.tex", "0.0450", "0.0150"), "studies.tex does not follow from its cells"),
        (forged("studies.html", "nothing stored", "agrees"), "studies.html does not follow from its cells"),
        (forged("studies.json", NO_VALUE, AGREES), "studies.json does not follow from its cells"),
        (forget, "values are stored that its receipt does not name"),
        (spoil_cells, "seed-1/cells.json was edited"),
        (exchange, "seed-1/receipt.json was edited"),
        (lambda f: (f / "studies.tex").unlink(), "studies.tex is gone"),
        (lambda f: (f / "receipt.json").unlink(), "receipt.json is not there"),
        (lambda f: (f / "seed-1" / "receipt.json").unlink(), "not there"),
        (lambda f: (f / "seed-0.failed.txt").write_text("x"), "seed-0 failed"),
    ],
)
def test_whoever_changes_a_table_is_found_out(written, spoil, says):
    spoil(written / "studies")
    (outcome,) = reproduce.verify(written, new=True)
    assert says in "; ".join(outcome.remarks) and not outcome.well


def test_a_cell_that_differs_is_shown_with_its_reason(written, monkeypatch):
    values = {i: {"int4 | KLD": v, "int4 | bytes": 7} for i, v in enumerate((0.04, 0.02, 0.045))}
    monkeypatch.setattr(reproduce, "stored_of", lambda name, settings: stored(runs=values, text=""))
    (outcome,) = reproduce.verify(written)
    (differing,) = outcome.table.differing()
    assert differing.seed == 1 and "0.0500, stored is 0.0200" in differing.why and not outcome.well
    assert outcome.table.counts() == {AGREES: 5, DIFFERS: 1, NOT_JUDGED: 3}
    assert "<b>differs</b>" in outcome.table._repr_html_()
    assert "What differs" in outcome.table.to_html({})


def test_runs_of_two_settings_make_no_table(written):
    paper_tables.keep(Made("studies", "t", (Cell("a", "b", 1.0),)), written / "studies" / "seed-1", 1, {"only": 4}, 1, 1.0)
    with pytest.raises(ValueError, match="several tables or settings"):
        reproduce.gather(written / "studies")


# ----------------------------------------------------------------------------------------------------------- the door


@pytest.fixture
def kernels(monkeypatch):
    """Runs without kernels: what `run_one` was asked for. The table "methods" fails, as one whose measurement breaks."""
    asked = []

    def run_one(name, seed, settings, folder, *, threads=1, variant="", **environment):
        asked.append((name, seed))
        if name == "methods":
            raise RuntimeError("a long traceback\nValueError: the model is not there")
        folder.mkdir(parents=True)
        (folder / "notebook.ipynb").write_text("{}", encoding="utf-8")
        made = Made(name, "t", (Cell("int4", "KLD", 0.04 + seed / 100),))
        return paper_tables.keep(made, folder, seed, reproduce._plain(settings), threads, 1.0, variant)

    monkeypatch.setattr(reproduce, "run_one", run_one)
    monkeypatch.setattr(receipts, "text_fingerprint", lambda: "T")
    return asked


def test_what_is_there_and_fits_is_not_run_again_and_one_failure_stops_nobody(tmp_path, kernels):
    out = tmp_path / "tables"
    found = {o.name: o for o in reproduce.reproduce(["methods", "pruning", "studies"], seeds=2, out=out, progress=False)}
    assert kernels == [("methods", 0), ("methods", 1), ("pruning", 0), ("pruning", 1), ("studies", 0)], "no seed changes the studies"
    assert found["methods"].table is None and "seed 1 failed: ValueError: the model is not there" in found["methods"].remarks[1]
    assert "long traceback" in (out / "methods" / "seed-0.failed.txt").read_text(encoding="utf-8")
    assert found["pruning"].ran == (0, 1) and found["studies"].ran == (0,)
    kernels.clear()
    found = {o.name: o for o in reproduce.reproduce(["pruning", "studies"], seeds=3, out=out, progress=False)}
    assert kernels == [("pruning", 2)] and found["pruning"].kept == (0, 1) and list(found["pruning"].table.runs) == [0, 1, 2]
    kernels.clear()
    spoil_cells(out / "pruning")
    (out / "pruning" / "seed-2" / "receipt.json").unlink()
    reproduce.reproduce(["pruning"], seeds=3, out=out, progress=False)
    assert kernels == [("pruning", 1), ("pruning", 2)], "what was edited, and what was not finished"
    kernels.clear()
    reproduce.reproduce(["pruning"], seeds=1, out=out, again=True, progress=False)
    assert kernels == [("pruning", 0)]


def test_a_run_that_no_longer_fits_leaves_nothing_behind_when_its_successor_fails(tmp_path, kernels):
    out = tmp_path / "tables"
    settings = TABLES["methods"].full
    folder = out / "methods" / "seed-0"
    folder.mkdir(parents=True)
    paper_tables.keep(Made("methods", "t", (Cell("a", "b", 1.0),)), folder, 0, reproduce._plain(settings), 2, 1.0)  # of two threads
    (out / reproduce.MARKER).write_text("{}", encoding="utf-8")
    (outcome,) = reproduce.reproduce(["methods"], seeds=1, out=out, progress=False)
    assert outcome.table is None and not folder.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"names": ["qualty"]}, "there are quality, methods"),
        ({"names": ["methods"], "quick": True}, "no quick form; there is one of quality"),
        ({"seeds": 0}, "at least one"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"threads": 0}, "at least one"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, given, says):
    with pytest.raises(ValueError, match=says):
        reproduce.reproduce(**({"out": tmp_path / "tables"} | given))
    assert not (tmp_path / "tables").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="choose another place"):
        reproduce.reproduce(["studies"], out=tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tables"):
        reproduce.verify(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_values_are_stored_with_their_variants_and_then_agree(tmp_path, kernels, monkeypatch):
    monkeypatch.setattr(reproduce, "stored_file", lambda name: tmp_path / "data" / f"{name}.json")
    path = reproduce.store("pruning", seeds=2, work=tmp_path / "work")
    d = json.loads(path.read_text(encoding="utf-8"))
    (entry,) = d["sets"]
    assert entry["runs"] == {"0": {"int4 | KLD": 0.04}, "1": {"int4 | KLD": 0.05}} and "two threads" in entry["variants"]
    assert entry["made"]["code_sha256"] and entry["made"]["data"]
    (outcome,) = reproduce.reproduce(["pruning"], seeds=3, out=tmp_path / "tables", progress=False)
    assert outcome.table.counts() == {AGREES: 2, TOO_FEW: 1} and outcome.well, "the third seed is not stored, and two tell too little of it"


# ------------------------------------------------------------------------------------------------------ with a kernel


@pytest.mark.slow
def test_a_table_runs_in_a_kernel_of_its_own_and_its_notebook_has_what_it_was_given(tmp_path):
    import nbformat

    (outcome,) = reproduce.reproduce(["studies"], seeds=1, quick=True, out=tmp_path / "tables", progress=False)
    assert outcome.ran == (0,) and outcome.remarks == ()
    inner = tmp_path / "tables" / "studies" / "seed-0"
    assert sorted(p.name for p in inner.iterdir()) == ["cells.json", "notebook.ipynb", "receipt.json"]
    notebook = nbformat.read(inner / "notebook.ipynb", as_version=4)
    assert [c.metadata.get("tags") for c in notebook.cells].count(["injected-parameters"]) == 1
    assert notebook.metadata.papermill.parameters["table"] == "studies"
    told = Receipt.read(inner)
    assert "studies.py" in told.code and "workshop.py" not in told.code, "what the kernel loaded, and not what lies about"
    assert reproduce.verify(tmp_path / "tables")[0].remarks == ()


@pytest.mark.slow
def test_a_cell_that_raises_is_reported_with_its_own_words(tmp_path):
    with pytest.raises(Exception, match="docs: 900000 of 'prose' were asked for"):
        reproduce.run_one("methods", 0, {"docs": {"prose": 900_000}, "names": ["rtn"], "bits": [4]}, tmp_path / "methods" / "seed-0")
    assert list((tmp_path / "methods").iterdir()) == []


@pytest.mark.slow
def test_the_same_seed_gives_the_same_cells_and_another_seed_does_not():
    settings = {"docs": {"prose": 1, "assistant": 4}, "names": ["rtn", "gptq"], "bits": [3], "tokens": 512}
    one, same, other = (paper_tables.run("methods", seed, settings) for seed in (0, 0, 1))
    values = [{c.key: c.value for c in made.cells if c.kind != "time"} for made in (one, same, other)]
    assert values[0] == values[1] and values[0].keys() == values[2].keys()
    klds = [k for k in values[0] if "KLD" in k]
    assert klds and all(values[0][k] != values[2][k] for k in klds)
    base = Stored(settings, "T", {0: values[0]}, {})
    worse = paper_tables.run("methods", 0, settings | {"tokens": 256})  # half of the calibration: another number, and it must be seen
    verdicts = {c.key: judge(c, 0, base, "T").verdict for c in worse.cells}
    assert verdicts["gptq int3-g32 | KLD, nats/token"] == DIFFERS and verdicts["rtn int3-g32 | KLD, nats/token"] == AGREES


def test_the_commands_tell_and_fail_as_they_should(written, tmp_path, kernels):
    app = typer.Typer()
    app.registered_commands += cli_reproduce.app.registered_commands
    run = CliRunner().invoke(app, ["verify-tables", str(written)])
    assert run.exit_code == 1 and "without a stored value" in run.output
    run = CliRunner().invoke(app, ["verify-tables", "--new", str(written)])
    assert run.exit_code == 0 and "studies" in run.output
    spoil_csv(written / "studies")
    run = CliRunner().invoke(app, ["verify-tables", str(written)])
    assert run.exit_code == 1 and "was edited" in run.output
    run = CliRunner().invoke(app, ["reproduce", "methods", "experts", "--seeds", "1", "--out", str(tmp_path / "new")])
    assert run.exit_code == 1 and "the model is not there" in run.output and "ran seeds 0" in run.output
    assert CliRunner().invoke(app, ["reproduce", "nothing"]).exit_code == 2
    assert CliRunner().invoke(app, ["verify-tables", str(tmp_path / "nowhere")]).exit_code == 2
