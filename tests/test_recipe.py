"""Recipes: what can't be meant is refused with a name, whether it comes from code or from JSON."""

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab import Quantize, QuantScheme, Recipe
from edgelab.recipe import RANGES, AutoRound, Gptq, Hqq, Rotate, Rtn, Smooth
from edgelab.scheme import ActScheme


def text(*steps) -> str:
    return json.dumps({"format": 1, "steps": list(steps)})


def test_defaults_and_round_trip():
    assert Recipe.from_json(text({"step": "quantize", "rules": [["*", "int4-g32"]]})) == Recipe((Quantize((("*", QuantScheme()),)),))


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (text({"step": "quantize"}), "rules"),
        (text({"step": "quantize", "rules": [["*"]]}), "rules"),
        (text({"step": "quantize", "rules": [], "metod": "gptq"}), "a quantize step has no setting 'metod'; it has rules, method, "),
        (text({"step": "smooth", "alpa": 1}), "a smooth step has no setting 'alpa'; it has method, alpha, "),
        (text({"step": "rotate", "sed": 1}), "a rotate step has no setting 'sed'; it has seed"),
        (text({"step": "quantize", "rules": [], "method": {"name": "gptq", "damping": "0.05"}}), "damping='0.05' of Gptq must be"),
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


quantizing = st.builds(
    Quantize,
    st.lists(st.tuples(st.sampled_from(["*", "@mlp", "*.o_proj"]), st.sampled_from([None, QuantScheme(), QuantScheme(8)])), max_size=3),
    method=st.sampled_from(
        ["rtn", "gptq", Rtn(8, True), Hqq(p=1, iterations=3), Gptq(damping=1), AutoRound(lr=1, scope="model", start="gptq")]
    ),
    min_expert_share=st.sampled_from([0.0, 0.5, 1.0]),
    activations=st.sampled_from([None, ActScheme(), ActScheme(8, "tensor", static=True)]),
    ranges=st.sampled_from(RANGES),
    budget=st.sampled_from([None, 3.5]),
    choices=st.sampled_from([Quantize.choices, ("int2-g32", "int8-row")]),
)
steps = (
    quantizing
    | st.builds(Smooth, st.sampled_from(["smoothquant", "awq"]), alpha=st.sampled_from([0, 0.5, 1]))
    | st.builds(Rotate, st.integers(0, 9))
)


@given(st.lists(steps, max_size=3).map(lambda s: Recipe(tuple(s))))
def test_every_recipe_equals_its_json_round_trip(recipe):
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.digest == recipe.digest


def test_simple_recipes_write_what_they_always_wrote():
    """Stored bundles and results hold digests of this text: a default that is not written stays unwritten."""
    rules = (("*", QuantScheme()),)
    plain = {"step": "quantize", "rules": [["*", "int4-g32"]], "method": "rtn", "min_expert_share": 1.0}
    assert Quantize(rules).to_dict() == plain
    assert Quantize(rules, activations="a8-token").to_dict() == plain | {"activations": "a8-token", "ranges": "best"}
    assert Quantize(rules, budget=3.5).to_dict() == plain | {"budget": 3.5, "choices": list(Quantize.choices)}
    assert Quantize(rules, ranges="kl").to_dict() == plain | {"ranges": "kl"}
    assert Quantize(rules, choices=("int8-row",)).to_dict() == plain | {"choices": ["int8-row"]}
    assert Quantize(rules, method=Gptq(rounds=0)).to_dict() == plain | {"method": {"name": "gptq", "rounds": 0}}


# ------------------------------------------------------------------------------------------------ settings in range


@pytest.mark.parametrize(
    ("make", "wrong", "rule"),
    [
        (Rtn, {"mse_grid": -3}, "a whole number of at least 0"),
        (Rtn, {"mse_grid": "x"}, "a whole number of at least 0"),
        (Rtn, {"mse_grid": True}, "a whole number of at least 0"),
        (Rtn, {"weighted": 1}, "True or False"),
        (Hqq, {"p": 3}, "a number above 0 and at most 1"),
        (Hqq, {"p": 0}, "a number above 0 and at most 1"),
        (Hqq, {"beta": 0.0}, "a number above 0"),
        (Hqq, {"kappa": 0.5}, "a number of at least 1"),
        (Hqq, {"iterations": 0}, "a whole number of at least 1"),
        (Gptq, {"damping": -1}, "a number of at least 0"),
        (Gptq, {"damping": "0.05"}, "a number of at least 0"),
        (Gptq, {"damping": float("nan")}, "a number of at least 0"),
        (Gptq, {"damping": float("inf")}, "a number of at least 0"),
        (Gptq, {"rounds": 2.5}, "a whole number of at least 0"),
        (Gptq, {"act_order": "yes"}, "True or False"),
        (AutoRound, {"steps": 0}, "a whole number of at least 1"),
        (AutoRound, {"batch": 0}, "a whole number of at least 1"),
        (AutoRound, {"lr": 0}, "a number above 0"),
        (AutoRound, {"lr": 10**400}, "a number above 0"),
        (AutoRound, {"lr": True}, "a number above 0"),
        (Smooth, {"grid": 0}, "a whole number of at least 1"),
        (Smooth, {"alpha": 1.5}, "a number of at least 0 and at most 1"),
        (Smooth, {"alpha": None}, "a number of at least 0 and at most 1"),
        (Rotate, {"seed": "a"}, "a whole number of at least 0"),
        (Rotate, {"seed": -1}, "a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, wrong, rule):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError) as error:
        make(**wrong)
    assert str(error.value).startswith(f"{name}={value!r} of {make.__name__} must be {rule}")


@pytest.mark.parametrize("make", [Rtn, Hqq, Gptq, AutoRound, Smooth, Rotate])
def test_no_setting_goes_unchecked(make):
    for f in fields(make):
        with pytest.raises(ValueError, match=f"{f.name}="):
            make(**{f.name: ["no setting"]})


def test_ints_serve_as_floats_and_integers_of_any_kind_as_ints():
    assert Gptq(damping=0, rounds=0, mse_grid=0) == Gptq(damping=0.0, rounds=np.int64(0), mse_grid=np.uint8(0))
    assert type(Gptq(damping=0).damping) is type(Hqq(kappa=np.float32(1.5)).kappa) is float and type(Rotate(np.int64(3)).seed) is int
    ints, floats = (Recipe((Smooth(alpha=one), Quantize((), method=Hqq(p=one)))) for one in (1, 1.0))
    assert ints.to_json() == floats.to_json()
