"""The control of notebook 01: it measures what it shows, keeps it, and shows what goes wrong."""

import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")

from edgelab.recipe import Recipe
from edgelab.report import Report, Row
from edgelab.scheme import PerChannel, QuantScheme
from edgelab.widgets import BitsControl, measurer


def fake(calls: list):
    """A measurement that records what it was asked for: coarser schemes are smaller and worse; groups of 48 do not fit."""

    def measure(scheme: QuantScheme) -> Report:
        calls.append(str(scheme))
        size, name = 1e6 * scheme.bits_per_weight((64, 256)), str(scheme)
        base = (Row("fp", "weight_bytes", 1.6e7), Row("fp", "bits_per_weight", 16.0))
        rows = [Row(name, "weight_bytes", size), Row(name, "bits_per_weight", size / 1e6)]
        rows += [
            Row(name, "kld", 2.0**-scheme.bits, slice=d, low=0.5 * 2.0**-scheme.bits, high=2 * 2.0**-scheme.bits) for d in ("prose", "code")
        ]
        return Report((*base, *rows))

    return measure


def test_each_choice_is_measured_once_and_drawn():
    calls = []
    control = BitsControl(fake(calls))
    assert calls == ["int4-g32"] and len(control.figure.data) == 2
    control.bits.value = 2
    control.granularity.value = "row"
    assert calls == ["int4-g32", "int2-g32", "int2-row"]
    control.choose("int4-g32")
    assert calls == ["int4-g32", "int2-g32", "int2-row"]  # kept, not measured again
    prose = control.figure.data[0]
    assert sorted(prose.y) == pytest.approx([0.0625, 0.25, 0.25])
    assert "<b>int4-g32</b>" in control.sentence.value and "0.0625 [0.0312, 0.1250]" in control.sentence.value
    assert control.table.value.count('<th scope="row">') == 3
    assert prose.marker.size.count(15) == 1 and prose.text[prose.marker.size.index(15)].startswith("int4-g32")
    assert [t.name for t in control.static().data] == ["prose", "code"]


def test_more_domains_than_colours_are_drawn():
    domains = [f"domain {i}" for i in range(12)]

    def measure(scheme):
        rows = [Row("fp", "weight_bytes", 1.6e7), Row(str(scheme), "weight_bytes", 4e6), Row(str(scheme), "bits_per_weight", 4.5)]
        return Report((*rows, *(Row(str(scheme), "kld", 0.1, slice=d, low=0.05, high=0.2) for d in domains)))

    assert [t.name for t in BitsControl(measure).figure.data] == domains


def test_inputs_stand_for_the_scheme():
    control = BitsControl(fake([]), "int8-row")
    assert control.scheme == QuantScheme(8, PerChannel()) and control.group_size.disabled
    control.granularity.value = "group"
    assert not control.group_size.disabled
    control.group_size.value = 64
    assert str(control.scheme) == "int8-g64"


def test_an_error_is_shown_and_kept_and_goes_away():
    def measure(scheme):
        if str(scheme) == "int4-g48":
            raise ValueError("group_size=48 does not divide in_features=<256>; use 32")
        return fake([])(scheme)

    control = BitsControl(measure)
    control.group_size.value = 48
    assert isinstance(control.error, ValueError) and 'role="alert"' in control.sentence.value
    assert "in_features=&lt;256&gt;" in control.sentence.value
    assert control.choose("int4-g48") is None
    control.group_size.value = 64
    assert control.error is None and "alert" not in control.sentence.value


def test_an_error_in_the_first_choice_is_raised():
    with pytest.raises(ValueError, match="group_size=48"):
        BitsControl(lambda scheme: (_ for _ in ()).throw(ValueError("group_size=48 does not divide")), "int4-g48")


def test_inputs_have_names_for_a_screen_reader():
    control = BitsControl(fake([]))
    assert [c.description for c in (control.bits, control.granularity, control.group_size)] == ["bits", "one scale per", "group size"]


def test_measurer_really_compresses():
    import datasets
    import torch

    from edgelab.compress import compress
    from edgelab.evaluate import evaluate
    from edgelab.model import load_tokenizer
    from edgelab.paths import data_dir
    from edgelab.pretrain import dense_config

    tokenizer = load_tokenizer(data_dir() / "edge-moe")
    config = dense_config(len(tokenizer))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 64, 64
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    data = datasets.Dataset.from_dict({"text": [f"the {i}th document of a few words" for i in range(4)], "domain": ["prose"] * 4})
    measure = measurer(model, tokenizer, data, max_docs=4)
    kld = {s: measure(QuantScheme.parse(s)).get(model=s, metric="kld").value for s in ("int8-row", "int3-row")}
    assert 0 < kld["int8-row"] < kld["int3-row"] / 10
    quantized = compress(model, Recipe.uniform("int3-row"), progress=False).model
    again = evaluate({"fp": model, "int3-row": quantized}, tokenizer, data, max_docs=4, bootstrap=10, speed=False, progress=False)
    assert again.get(model="int3-row", metric="kld").value == pytest.approx(kld["int3-row"], rel=1e-4)
