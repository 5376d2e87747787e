"""The allocation of bits: against all choices there are, its bound, and what it says of budgets that can't be met."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.methods.mixed import Allocation, allocate

losses = st.floats(-5, 100, width=32) | st.integers(0, 3).map(float)  # with ties
options = st.dictionaries(st.sampled_from("abcd"), st.tuples(losses, st.integers(0, 30)), min_size=1)
problems = st.lists(options, min_size=1, max_size=5).map(lambda o: {f"w{i}": c for i, c in enumerate(o)})


def every_choice(costs: dict):
    """(loss, bytes) of all choices."""
    for picked in product(*(c.values() for c in costs.values())):
        yield sum(loss for loss, _ in picked), sum(size for _, size in picked)


def consistent(a: Allocation, costs: dict) -> bool:
    picked = [costs[name][scheme] for name, scheme in a.choice.items()]
    fits = a.bytes == sum(size for _, size in picked) <= a.budget_bytes
    return fits and a.choice.keys() == costs.keys() and np.isclose(a.loss, sum(loss for loss, _ in picked), rtol=1e-12, atol=1e-12)


@given(problems, st.integers(0, 60))
@settings(deadline=None, max_examples=150)
def test_optimum_equals_brute_force(costs, above):
    budget = sum(min(size for _, size in c.values()) for c in costs.values()) + above
    a = allocate(costs, budget)
    best = min(loss for loss, size in every_choice(costs) if size <= budget)
    assert consistent(a, costs) and a.exact
    assert a.loss == pytest.approx(best, rel=1e-9, abs=1e-9) and a.bound <= best + 1e-9


@given(problems, st.integers(0, 60), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_bound_holds_when_states_are_dropped(costs, above, states):
    """With one to three states most of the search is cut off: the bound must stay below the optimum, the result above."""
    budget = sum(min(size for _, size in c.values()) for c in costs.values()) + above
    a = allocate(costs, budget, states=states)
    best = min(loss for loss, size in every_choice(costs) if size <= budget)
    assert consistent(a, costs)
    assert a.bound <= best + 1e-9 and a.loss >= best - 1e-9 and a.gap >= 0


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 1), st.sampled_from([1, 2, 1 << 15]))
@settings(deadline=None, max_examples=100)
def test_losses_that_fall_with_the_bits(seed, n, share, states):
    """Convex costs, as real ones are: there the greedy solution is often the best, and must not be given away."""
    costs = typical(n, np.random.default_rng(seed))
    least, most = (sum(f(size for _, size in c.values()) for c in costs.values()) for f in (min, max))
    budget = int(least + share * (most - least))
    a = allocate(costs, budget, states=states)
    best = min(loss for loss, size in every_choice(costs) if size <= budget)
    assert consistent(a, costs) and a.bound <= best * (1 + 1e-9) <= a.loss * (1 + 2e-9)
    assert states < 3 or a.loss == pytest.approx(best, rel=1e-9)


def test_the_greedy_solution_is_kept_when_the_search_finds_none_better():
    """Its states have bounds below the greedy's loss, but losses above it."""
    costs = {
        "down": {2: (7.5, 768), 4: (0.84, 1280), 8: (0.0056, 2304)},
        "q": {2: (0.149, 384), 4: (0.0016, 640), 8: (0.00001, 1152)},
    }
    assert allocate(costs, 1920).choice == {"down": 4, "q": 4}


def typical(n: int, rng: np.random.Generator) -> dict:
    """Losses that fall by about four per bit, as quantization's do, over weights of very different sizes and importance."""
    costs = {}
    for i in range(n):
        size, weight = int(rng.integers(1, 50)) * 1000, float(np.exp(rng.normal(0, 2)))
        costs[f"w{i}"] = {b: (weight * 4.0**-b * float(rng.uniform(0.7, 1.4)), int(size * b)) for b in (2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 8)}
    return costs


def test_a_large_model_is_solved_and_the_gap_is_honest():
    """400 weights at 3.5 bits: proven optimal; with 4 states a gap remains, small, and it holds the optimum."""
    costs = typical(400, np.random.default_rng(0))
    budget = int(sum(c[3.5][1] for c in costs.values()))
    whole, cut = allocate(costs, budget), allocate(costs, budget, states=4)
    uniform = sum(c[3.5][0] for c in costs.values())
    assert whole.exact and consistent(whole, costs) and whole.loss < 0.5 * uniform
    assert consistent(cut, costs) and cut.bound <= whole.loss <= cut.loss and 0 < cut.gap < 0.01 * cut.loss


def test_loss_never_grows_with_the_budget():
    costs = typical(30, np.random.default_rng(1))
    least, most = (sum(f(size for _, size in c.values()) for c in costs.values()) for f in (min, max))
    found = [allocate(costs, int(b)).loss for b in np.linspace(least, most, 25)]
    assert all(a >= b for a, b in pairwise(found))
    assert found[-1] == pytest.approx(sum(min(loss for loss, _ in c.values()) for c in costs.values()))


def test_options_above_the_hull_are_used_where_they_fit():
    """b (5 bytes) lies above the line from a to c, so greedy steps over it, but c does not fit."""
    costs = {"w": {"a": (10.0, 1), "b": (6.0, 5), "c": (0.0, 9)}}
    assert allocate(costs, 8).choice == {"w": "b"}
    assert allocate(costs, 9).choice == {"w": "c"}


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ({"a": {"x": (1.0, 10)}, "b": {"x": (1.0, 20), "y": (2.0, 12)}}, 21, "budget_bytes=21 is too small.*2 weights they take 22 bytes"),
        ({}, 5, "costs={} is empty"),
        ({"a": {}}, 5, "a has no scheme to choose from"),
        ({"a": {"x": (float("nan"), 3)}}, 5, "the loss of a at x is nan"),
        ({"a": {"x": (1.0, 3.5)}}, 5, "the bytes of a at x are 3.5; give a whole number"),
        ({"a": {"x": (1.0, 3)}}, 5.5, "budget_bytes=5.5 is no whole number"),
    ],
)
def test_errors_name_the_value_and_the_way_out(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(costs, budget)


def test_states_must_be_positive():
    with pytest.raises(ValueError, match="states=0 must be"):
        allocate({"a": {"x": (1.0, 3)}}, 5, states=0)
