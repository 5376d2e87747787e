"""Reports: no cell holds two numbers, and what is written is JSON."""

import json
import math

import pytest

from edgelab import Report, Row


def test_provenances_do_not_share_a_cell():
    table = Report((Row("a", "kld", 1.0), Row("a", "kld", 2.0, provenance="modelled"))).table()
    assert [(line["metric"], line["a"]) for line in table] == [("kld (measured here)", "1.000"), ("kld (modelled)", "2.000")]
    assert Report((Row("a", "kld", 1.0),)).table()[0]["metric"] == "kld"


def test_duplicates_raise():
    with pytest.raises(ValueError, match="two rows say what kld of 'a' is"):
        Report((Row("a", "kld", 1.0), Row("a", "kld", 2.0))).table()


def test_half_an_interval_is_refused():
    with pytest.raises(ValueError, match="both ends"):
        Row("a", "kld", 1.0, low=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_lacks_become_null(value):
    written = Report((Row("a", "kld", value, low=0.0, high=math.inf),)).to_json()
    assert json.loads(written, parse_constant=pytest.fail)["rows"][0]["value"] is None
    row = Report.from_json(written).rows[0]
    assert math.isnan(row.value) and row.low is None and row.high is None


@pytest.mark.parametrize("broken", ["[]", "{}", '{"format": 1}', '{"format": 1, "rows": [{}]}', '{"format": 1, "rows": [3]}'])
def test_broken_json_is_a_value_error(broken):
    with pytest.raises(ValueError):
        Report.from_json(broken)
