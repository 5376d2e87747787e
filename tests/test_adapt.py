"""The new domain: as many examples as asked for, nothing of the test in training, the form that the rest of the house reads."""

import json

import pytest

from edgelab import adapt, data


def test_splits_are_apart_and_of_the_size_asked_for():
    found = adapt.commands(200, tests=50, seed=1)
    assert {s: len(found[s]) for s in found} == {"train": 200, "calibration": 50, "test": 50}
    said = [set(found[s]["prompt"]) for s in found]
    assert len(set().union(*said)) == sum(map(len, said)) == 300
    for split in found:
        for row in found[split]:
            assert row["text"] == row["prompt"] + row["answer"] and data.split_of(row["id"]) == split
            assert json.loads(row["answer"])["call"] in {"move", "turn", "grasp", "bring", "drive", "look"}
    assert adapt.commands(200, tests=50, seed=1)["train"]["text"] == found["train"]["text"]
    assert adapt.commands(200, tests=50, seed=2)["train"]["text"] != found["train"]["text"]


def test_the_old_domains_know_none_of_its_calls():
    old = {json.loads(a)["call"] for a in data.corpus(["assistant"], assistant=3000)["train"]["answer"]}
    new = {json.loads(a)["call"] for a in adapt.commands(500)["train"]["answer"]}
    assert not old & new


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="can't be drawn, only"):
        adapt.commands(10, tests=100_000)
