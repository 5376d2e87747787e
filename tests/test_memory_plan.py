"""`memory_plan`: buffers that live at the same time never share a byte, and no plan is below the bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.memory_plan import ALIGN, Buffer, MemoryPlan, bound, place

lives = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 12)).map(lambda t: Buffer("b", t[0], t[1], t[1] + t[2])), max_size=40
)


@given(lives)
@settings(deadline=None)
def test_what_lives_at_the_same_time_does_not_overlap(buffers):
    offsets, total = place(buffers)
    for i, a in enumerate(buffers):
        assert offsets[i] % ALIGN == 0 and offsets[i] + a.nbytes <= total
        for j in range(i):
            b = buffers[j]
            if a.first <= b.last and b.first <= a.last and a.nbytes and b.nbytes:
                assert offsets[i] + a.nbytes <= offsets[j] or offsets[j] + b.nbytes <= offsets[i]
    assert bound(buffers) <= total <= sum(-(-b.nbytes // ALIGN) * ALIGN for b in buffers)


def test_bound_counted_by_hand():
    buffers = [Buffer("a", 64, 0, 2), Buffer("b", 100, 1, 1), Buffer("c", 64, 3, 4)]
    assert bound(buffers) == 64 + 128
    assert place(buffers)[1] == 64 + 128


def test_a_chain_of_layers_needs_two_buffers_not_one_each():
    chain = [Buffer(f"layer {i}", 1024, i, i + 1) for i in range(50)]
    assert place(chain)[1] == bound(chain) == 2048


def test_a_life_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="lives from operation 3 to 2"):
        place([Buffer("x", 4, 3, 2)])


def test_shares_and_what_is_shown():
    plan = MemoryPlan(10, 1000, 250, 200, 1000, 4000, 5000, 5000)
    assert plan.saved == 0.75 and plan.saved_with_cache == 1 - 1250 / 2000
    assert "75% of the activations saved, 38% with the cache" in repr(plan)
    assert ">cache of keys and values</th>" in plan._repr_html_()
