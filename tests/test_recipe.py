"""Recipes: what can't be meant is refused with a name, whether it comes from code or from JSON."""

import json

import pytest

from edgelab import Quantize, QuantScheme, Recipe


def text(*steps) -> str:
    return json.dumps({"format": 1, "steps": list(steps)})


def test_defaults_and_round_trip():
    assert Recipe.from_json(text({"step": "quantize", "rules": [["*", "int4-g32"]]})) == Recipe((Quantize((("*", QuantScheme()),)),))


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (text({"step": "quantize"}), "rules"),
        (text({"step": "quantize", "rules": [["*"]]}), "rules"),
        (text({"step": ["x"]}), "step"),
        (text(5), "step"),
        ('{"format": 1}', "steps"),
        ("[]", "format None"),
    ],
)
def test_broken_json_is_a_value_error(broken, match):
    with pytest.raises(ValueError, match=match):
        Recipe.from_json(broken)


def test_rules_become_tuples_and_shares_are_shares():
    listed = Quantize([["*", QuantScheme()]])
    assert hash(listed) == hash(Quantize((("*", QuantScheme()),)))
    for share in (7, -0.1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="min_expert_share"):
            Quantize(listed.rules, min_expert_share=share)
