"""The training of the embedded models, on a corpus and a model that train in seconds."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgelab import data, pretrain

COLUMNS = ("domain", "id", "text", "prompt", "answer")


@pytest.fixture(scope="module")
def corpus():
    rows = [r for r in data._records(("assistant", "arithmetic"), 400) if r["split"] == "train"][:600]
    for domain in ("prose", "code"):
        for i in range(30):
            text = f"{domain} text number {i} says: " + "words and more words. " * 20
            rows.append({"domain": domain, "id": str(i), "text": text, "prompt": "", "answer": ""})
    return datasets.DatasetDict({"train": datasets.Dataset.from_list([{k: r[k] for k in COLUMNS} for r in rows])})


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return pretrain.train_tokenizer(corpus["train"]["text"], 400)


SMALL = pretrain.Settings(tokens=6 * 2 * 64, peak_lr=1e-3, batch=2, length=64, warmup_steps=2, vocab=400)


SMALL_MOE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "n_routed_experts": 4, "moe_intermediate_size": 16}


def small_moe(vocab):
    config = pretrain.moe_config(vocab)
    for k, v in {**SMALL_MOE, "kv_lora_rank": 16}.items():
        setattr(config, k, v)
    return config


def test_tokenizer_splits_digits_and_loses_nothing(tokenizer):
    text = "def f(x):\n    return x[12] + 345  # naïve ☂\n\n\t<|user|>turn on<|call|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]) for i in tokenizer("90210 7", add_special_tokens=False)["input_ids"]]
    assert all(sum(c.isdigit() for c in p) <= 1 for p in pieces)
    assert tokenizer.convert_tokens_to_ids(data.END) == 0 and len(tokenizer) == 400


def test_learning_rate_warms_up_holds_and_decays():
    s = pretrain.Settings(tokens=1000 * 8 * 512, peak_lr=1.0, warmup_steps=100, decay_share=0.3)
    rates = [pretrain.learning_rate(i, s) for i in range(s.steps)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1.0 and set(rates[100:700]) == {1.0}
    assert rates[850] == pytest.approx(0.5) and 0 < rates[-1] < 0.01


def test_batches_depend_on_seed_and_step_alone_and_weigh_answers(corpus, tokenizer):
    streams = pretrain.Streams(corpus["train"], tokenizer, SMALL)
    tokens, weights = streams.batch(3)
    again, _ = pretrain.Streams(corpus["train"], tokenizer, SMALL).batch(3)
    assert torch.equal(tokens, again) and not torch.equal(tokens, streams.batch(4)[0])
    assert tokens.shape == (2, 65) and weights.shape == (2, 64) and (tokens[:, 0] == 0).all()
    ids, w = streams.docs["arithmetic"][0]
    text = tokenizer.decode(ids[:-1])
    prompt = text.index("=") + 1  # one token per character
    assert np.allclose(w[:prompt], pretrain.PROMPT_WEIGHT) and np.allclose(w[prompt:], pretrain.ARITHMETIC_WEIGHT)
    assert all((w == 1).all() for _, w in streams.docs["prose"])


def test_selection_bias_moves_against_the_load():
    router = torch.nn.Module()
    router.register_buffer("e_score_correction_bias", torch.zeros(4))
    worst = pretrain.rebalance([(router, counts := torch.tensor([8.0, 4.0, 4.0, 0.0]))], gamma=0.1)
    assert torch.allclose(router.e_score_correction_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1])) and worst == 2.0 and counts.sum() == 0


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(kind, corpus, tmp_path):
    config = small_moe if kind == "moe" else None
    common = {"settings": SMALL, "config": config, "corpus": corpus, "compile": False}
    pretrain.pretrain(kind, tmp_path / "a", tmp_path / "wa", **common)
    assert pretrain.pretrain(kind, tmp_path / "b", tmp_path / "wb", stop_after=2, **common) is None
    assert not (tmp_path / "b").exists()
    pretrain.pretrain(kind, tmp_path / "b", tmp_path / "wb", **common)
    a, b = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list(tmp_path.glob("**/*.tmp")) and json.loads((tmp_path / "a" / "training.json").read_text())["steps"] == SMALL.steps
    biases = [v for k, v in a.items() if k.endswith("e_score_correction_bias")]
    assert len(biases) == (1 if kind == "moe" else 0) and all(v.dtype == torch.float32 and v.any() for v in biases)


def test_training_lowers_the_loss(corpus, tmp_path):
    settings = pretrain.Settings(tokens=100 * 2 * 64, peak_lr=3e-3, batch=2, length=64, warmup_steps=2, vocab=400)
    pretrain.pretrain("moe", tmp_path / "m", tmp_path / "w", settings=settings, config=small_moe, corpus=corpus, compile=False)
    (row,) = map(json.loads, (tmp_path / "m" / "curve.jsonl").read_text().splitlines())
    assert row["step"] == 100 and row["loss"] < 0.9 * np.log(400)


def test_unknown_kind_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="kind='tiny' is not one of moe, dense"):
        pretrain.pretrain("tiny", tmp_path / "m", tmp_path / "w")


def test_a_checkpoint_of_another_run_is_refused(corpus, tmp_path):
    common = {"config": small_moe, "corpus": corpus, "compile": False}
    pretrain.pretrain("moe", tmp_path / "m", tmp_path / "w", settings=SMALL, stop_after=3, **common)
    with pytest.raises(ValueError, match=r"is of another run \(peak_lr 0.001 -> 0.002\); delete it to start anew"):
        pretrain.pretrain("moe", tmp_path / "m", tmp_path / "w", settings=replace(SMALL, peak_lr=2e-3), **common)
    with pytest.raises(ValueError, match=r"has 3 steps behind it, tokens=128 asks for 1; ask for more"):
        pretrain.pretrain("moe", tmp_path / "m", tmp_path / "w", settings=replace(SMALL, tokens=128), **common)
