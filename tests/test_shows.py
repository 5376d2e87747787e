"""Objects show themselves: a short plain `repr`, and in a notebook a table that says the same numbers and escapes what it is given."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from small_models import deepseek, qwen3, tiny

from edgelab import QTensor, QuantScheme, Recipe, Report, Row, compress, html_table
from edgelab.blocks import calibrate
from edgelab.recipe import DropExperts, Gptq, Prune, Quantize
from edgelab.summary import summary


class Cells(HTMLParser):
    """The text of a page's tables: captions, and rows of cells. A tag that is not closed, or closed twice, fails."""

    VOID = ("br", "meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.rows, self.captions = [], [], []
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "caption":
            self.captions.append("")
        if tag == "th":
            assert dict(attrs).get("scope") in ("col", "row"), "a header that does not say of what"

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text
        elif self.open and self.open[-1] == "caption":
            self.captions[-1] += text


def shown(thing) -> Cells:
    assert "\n" not in repr(thing) and len(repr(thing)) < 320, "a repr is one line"
    return Cells(thing._repr_html_())


def test_a_table_escapes_and_takes_any_columns():
    cells = Cells(html_table.lines([{"a": "<b>", "c": 1}, {"a": "x", "d": "&"}], "<i>"))
    assert cells.captions == ["<i>"]
    assert cells.rows == [["a", "c", "d"], ["<b>", "1", ""], ["x", "", "&"]]
    assert Cells(html_table.lines([], "nothing")).rows == []
    assert Cells(html_table.facts({"<a>": "<script>"})).rows == [["<a>", "<script>"]]


@pytest.mark.parametrize("scheme", ["int4-g32", "uint3-g32", "mxfp4-g32", "int8-row"])
def test_a_qtensor_says_what_it_stores(scheme):
    scheme = QuantScheme.parse(scheme)
    shape = (4, 64)
    scales = np.ones(scheme.scales_shape(shape), scheme.scale_dtype)
    offsets = np.zeros_like(scales) if scheme.asymmetric else None
    q = QTensor.from_codes(np.zeros(shape, np.uint8), scales, scheme, offsets)
    cells = shown(q)
    head, *parts, whole = cells.rows
    assert head[0] == "part" and [p[0] for p in parts] == ["codes", "scales"] + ["offsets"] * scheme.asymmetric
    size, bits = head.index("bytes"), head.index("bits per weight")
    assert sum(int(p[size].replace(",", "")) for p in parts) == int(whole[size].replace(",", "")) == q.nbytes
    assert float(whole[bits]) == pytest.approx(q.bits_per_weight, abs=5e-4)
    assert str(scheme) in whole and str(scheme) in repr(q)


def test_a_recipe_says_its_steps_in_order_and_what_they_need():
    first = Quantize((("@router", None), ("*", QuantScheme(4))), method=Gptq(rounds=0))
    recipe = Recipe((DropExperts(0.25), Prune(0.5), first))
    cells = shown(recipe)
    assert recipe.digest in cells.captions[0] and "3 steps" in cells.captions[0]
    assert [row[:2] for row in cells.rows[1:]] == [["1", "DropExperts"], ["2", "Prune"], ["3", "Quantize"]]
    assert "share 0.25" in cells.rows[1][2] and "sparsity 0.5" in cells.rows[2][2]
    assert "@router: kept" in cells.rows[3][2] and "method gptq rounds 0" in cells.rows[3][2]
    assert cells.rows[3][3] == "calibration text"
    assert Cells(Recipe.uniform("int4-g32")._repr_html_()).rows[1][3] == "nothing"
    assert Cells(Recipe.phone()._repr_html_()).rows[2][3] == "training text"
    assert "no steps" in shown(Recipe()).captions[0]


def test_a_step_with_other_settings_is_told_apart():
    def told(step):
        return Recipe((step,)).table()[0]["settings"]

    one = Quantize((("*", QuantScheme(4)),), method="gptq")
    assert told(one) != told(Quantize((("*", QuantScheme(4)),), method=Gptq(damping=0.5)))
    assert told(one) == told(Quantize((("*", QuantScheme(4)),), method=Gptq())), "the defaults need no words"


def test_a_report_is_a_table_of_models():
    report = Report((Row("fp", "kld", 0.0), Row("<int4>", "kld", 0.5, low=0.4, high=0.6)))
    cells = Cells(report._repr_html_())
    assert cells.rows[0] == ["metric", "on", "unit", "fp", "<int4>"]
    assert cells.rows[1][-1] == "0.500 [0.400, 0.600]"
    assert Cells(Report()._repr_html_()).rows == []


def test_coverage_and_what_compress_returns():
    made = compress(tiny(deepseek(), None), Recipe.uniform("int4-g32"), progress=False)
    cells = shown(made.coverage)
    assert cells.captions == [repr(made.coverage)]
    assert cells.rows[-1][0] == "all" and cells.rows[-1][3] == f"{made.coverage.predicted_bytes:,}"
    both = Cells(made._repr_html_())
    assert made.recipe.digest in both.captions[0] and both.captions[1] == repr(made.coverage)


def test_a_summary_counts_what_a_token_meets():
    model = tiny(deepseek(), None)
    told = summary(model)
    config, experts = model.config, sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert told.parameters == sum(p.numel() for p in model.parameters())
    assert told.active == told.parameters - experts + experts * config.num_experts_per_tok // config.n_routed_experts
    facts = dict(row for row in shown(told).rows if len(row) == 2)
    assert facts["experts"] == f"{config.n_routed_experts} in a layer, {config.num_experts_per_tok} for a token"
    assert facts["parameters"] == f"{told.parameters:,}"
    dense = summary(tiny(qwen3(), None))
    assert (dense.experts, dense.active) == (0, dense.parameters) and dict(map(dict.values, dense.table()))["experts"] == "none"
    small = summary(compress(model, Recipe.uniform("int4-g32"), progress=False).model)
    assert small.parameters == told.parameters and small.coverage.predicted_bytes < told.coverage.predicted_bytes / 2


def test_calibration_statistics_of_a_mixture_and_of_a_dense_model():
    ids = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    stats = calibrate(tiny(deepseek(), None), [ids], progress=False)
    cells = shown(stats)
    assert cells.captions == [repr(stats)] and len(cells.rows) == 1 + len(stats.routers)
    head, row = cells.rows[:2]
    assert row[head.index("tokens")] == "32" and int(row[head.index("most")]) >= int(row[head.index("median")])
    dense = calibrate(tiny(qwen3(), None), [ids], progress=False)
    assert [row[0] for row in shown(dense).rows[1:]] == list(dense)
