"""Split inference: the halves are the whole, nothing but sealed states leaves, seals hold, and attacks find what they must."""

import hashlib
import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import deepseek, one_layer_deepseek, qwen3, qwen3_moe, tiny

from edgelab import adapt
from edgelab.evaluate import Document, documents
from edgelab.features import (
    Caller,
    Curve,
    Envelope,
    Guard,
    Identity,
    SealError,
    Server,
    Wire,
    answers,
    ask,
    connect,
    curve,
    eavesdropped,
    open_,
    pca_guard,
    random_guard,
    raw_inputs,
    seal,
    split,
)
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir

pytest.importorskip("cryptography", reason="the extra `privacy` is not installed")
SECRET = {"states": torch.arange(12, dtype=torch.float32).reshape(3, 4)}


def some_ids(n=9, rows=1, seed=0):
    return torch.randint(3, 96, (rows, n), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- two halves


@pytest.mark.parametrize(
    ("config", "scheme"),
    [(deepseek(2), None), (deepseek(2), "int4-g32"), (qwen3(num_hidden_layers=2), None), (qwen3_moe(), "int8-row")],
    ids=["deepseek", "deepseek int4", "qwen3", "qwen3_moe int8"],
)
def test_the_halves_give_what_the_whole_gives(config, scheme):
    model = tiny(config, scheme).requires_grad_(False)
    ids = some_ids(rows=3)
    want = model(input_ids=ids, use_cache=False).logits
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for k in range(len(model.model.layers) + 1):
        front, back = split(model, k)
        h = front(ids)
        if k < len(model.model.layers):  # the last of transformers' states is behind the norm
            torch.testing.assert_close(h, states[k])
        torch.testing.assert_close(back(h), want)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want)  # the model itself is as before


def test_a_half_holds_its_blocks_alone_and_shares_them():
    model = tiny(deepseek(2), None)
    front, back = split(model, 1)
    whole = {p.data_ptr() for p in model.parameters()}
    ours, theirs = ({p.data_ptr() for p in half.parameters()} for half in (front, back))
    assert ours | theirs == whole and not ours & theirs
    assert model.model.embed_tokens.weight.data_ptr() in ours and model.lm_head.weight.data_ptr() in theirs
    assert {p.data_ptr() for p in model.model.layers[1].parameters()} <= theirs


def test_what_can_not_be_split():
    model = tiny(qwen3(), None)
    for k in (-1, 2):
        with pytest.raises(ValueError, match=rf"k={k} must be in 0 .. 1: the model has 1 blocks"):
            split(model, k)
    with pytest.raises(ValueError, match="Linear is no decoder"):
        split(torch.nn.Linear(2, 2), 0)
    model.early_exit = torch.nn.Identity()
    with pytest.raises(ValueError, match="early exit"):
        split(model, 0)


@pytest.mark.parametrize("config", [deepseek(2), qwen3(num_hidden_layers=2)], ids=["deepseek", "qwen3"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_server_answers_as_the_whole_model_would_and_no_input_leaves(config, k):
    model = tiny(config, None).requires_grad_(False)
    ids, guard = some_ids(11), Guard(bits=32)
    want = ids.clone()
    for _ in range(6):
        want = torch.cat([want, model(input_ids=want, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
    front, back = split(model, k)
    wire = Wire()
    got = ask(front, guard, Server(back, guard), ids, max_new_tokens=6, wire=wire)
    assert got == want[0, 11:].tolist()
    assert raw_inputs(wire, ids, "is there a cup on the table") == 0
    assert len(wire.messages) == 2 + 2 * 6 and wire.bytes_up > 32 * 64 * 4
    stop = got[2]
    assert ask(front, guard, Server(back, guard), ids, max_new_tokens=6, eos=stop) == got[: got.index(stop) + 1]


def test_raw_inputs_are_seen_where_there_are_any():
    ids, text = 1111 * torch.arange(1, 12)[None], "move the left wheel by forty two"
    for order in ("<i2", ">i4", "<i8"):
        wire = Wire([(True, b"xx" + np.array(ids[0, 2:7].tolist()).astype(order).tobytes())])
        assert raw_inputs(wire, ids, text) == 3
    assert raw_inputs(Wire([(True, b"..left wheel by..")]), ids, text) == 1
    assert raw_inputs(Wire([(False, text.encode())]), ids, text) == 0  # came down, did not leave
    model = tiny(qwen3(), None)
    ids = some_ids(11)
    plain = split(model, 0)[0](ids)
    assert raw_inputs(Wire([(True, plain.numpy().tobytes())]), ids, text) == 0  # not raw, and yet fully readable: see the attacks


def test_the_length_of_a_message_does_not_tell_the_length_of_the_prompt():
    model, sizes = tiny(qwen3(), None), {}
    front, back = split(model, 1)
    for n in (1, 20, 32, 33):
        wire = Wire()
        ask(front, Guard(), Server(back, Guard()), some_ids(n), max_new_tokens=1, wire=wire)
        sizes[n] = len(wire.messages[2][1])
    assert sizes[1] == sizes[20] == sizes[32] < sizes[33]


def test_no_raw_input_of_the_embedded_model_leaves_and_its_answers_stay():
    tokenizer = load_tokenizer(data_dir() / "edge-moe")
    docs = documents(adapt.commands(5, tests=3)["test"], tokenizer)
    sent = answers(load(data_dir() / "edge-moe"), tokenizer, docs, k=1)
    assert (sent.prompts, sent.raw_inputs, sent.same) == (3, 0, 1.0) and sent.bytes_up > 100 * sent.bytes_plain > 0
    with pytest.raises(ValueError, match="no document has an answer"):
        answers(tiny(qwen3(), None), tokenizer, texts(2, 0))


# ------------------------------------------------------------------------------------------------------------- channel


def test_keys_are_those_of_the_written_exchange():
    """From the docstring alone, with the primitives: HKDF-SHA256 over DH(E, S) || DH(E, F), info with all three keys."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from safetensors.torch import load

    mine, identity = X25519PrivateKey.generate(), Identity()
    hello = mine.public_key().public_bytes_raw()
    session, reply = identity.accept(hello)
    secret = b"".join(mine.exchange(X25519PublicKey.from_public_bytes(p)) for p in (identity.public, reply))
    info = b"edgelab features 1" + hello + identity.public + reply
    keys = HKDF(algorithm=hashes.SHA256(), length=64, salt=None, info=info).derive(secret)
    assert (session.receive_key, session.send_key) == (keys[:32], keys[32:]) and session.id == hashlib.sha256(info).hexdigest()[:16]
    envelope = seal(session, SECRET)
    plain = ChaCha20Poly1305(keys[32:]).decrypt((0).to_bytes(12, "big"), envelope.ciphertext, envelope.header)
    assert torch.equal(load(plain)["states"], SECRET["states"])  # safetensors, not pickle
    assert keys[32:].hex() not in repr(session) and str(keys[32:]) not in repr(session)


def test_messages_arrive_and_look_like_noise():
    device, server = connect(Identity())
    for n in range(3):
        envelope = seal(device, SECRET, kind="features")
        raw = envelope.to_bytes()
        about = Envelope.from_bytes(raw).about
        assert (about["n"], about["kind"], about["tensors"]) == (n, "features", {"states": ["float32", 3, 4]})
        assert SECRET["states"].numpy().tobytes()[16:] not in raw
        assert torch.equal(open_(server, raw)["states"], SECRET["states"])
    back = seal(server, {"token": torch.tensor([5])})
    assert int(open_(device, back)["token"]) == 5
    one, two = (seal(device, SECRET).ciphertext for _ in range(2))
    assert one != two  # the same states, another nonce
    long = seal(device, {"zeros": torch.zeros(4096)}).ciphertext
    counts = np.bincount(np.frombuffer(long, np.uint8), minlength=256)
    assert ((counts - len(long) / 256) ** 2 / (len(long) / 256)).sum() < 400  # chi-square of 255 degrees: 400 has p of 1e-8


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_noticed(at, flip):
    device, server = connect(Identity())
    raw = bytearray(seal(device, SECRET).to_bytes())
    raw[at % len(raw)] ^= flip
    with pytest.raises(SealError):
        open_(server, bytes(raw))
    assert server.received == 0  # and the session goes on
    assert torch.equal(open_(server, seal(device, SECRET))["states"], SECRET["states"])


def changed(envelope: Envelope, **facts) -> Envelope:
    return Envelope(json.dumps(envelope.about | facts, separators=(",", ":")).encode(), envelope.ciphertext)


def test_errors_of_messages_say_why():
    identity = Identity()
    device, server = connect(identity)
    other, _ = connect(identity)
    first, second = seal(device, SECRET), seal(device, SECRET)
    for message, says in (
        (seal(other, SECRET), "was sealed in session .* another key"),
        (changed(seal(other, SECRET), session=device.id), "changed on the way, or sealed with another key"),
        (changed(first, n=1), "changed on the way"),
        (changed(first, tensors={"states": ["float32", 4, 3]}), "changed on the way"),
        (changed(first, n=-1), "n=-1 is no counter"),
        (changed(first, version=2), "is of version 2, this is version 1"),
        (Envelope(b"{", first.ciphertext), "no JSON"),
        (Envelope(b"[" * 60_000, first.ciphertext), "no JSON"),
        (b"PK" + bytes(40), "no sealed message"),
        (first.to_bytes()[:30], "cut short"),
        (b"ELF1" + struct.pack("<I", 2**31) + bytes(64), "its header of 2147483648 is not one"),
        (seal(server, SECRET), "changed on the way"),  # its own message thrown back: another key per direction
    ):
        with pytest.raises(SealError, match=says):
            open_(server, message)
    open_(server, second)  # the first was lost
    for late in (first, second):
        with pytest.raises(SealError, match=r"taken already, or comes too late: the next is 2 \(a replay\?\)"):
            open_(server, late)
    with pytest.raises(ValueError, match=r"facts \['n'\]"):
        seal(device, SECRET, n=3)


def test_a_recorded_session_can_not_be_played_again():
    model = tiny(qwen3(), None)
    front, back = split(model, 0)
    server, wire = Server(back, Guard()), Wire()
    ask(front, Guard(), server, some_ids(), max_new_tokens=1, wire=wire)
    up = [m for from_device, m in wire.messages if from_device]
    with pytest.raises(SealError, match="taken already"):
        server.next_token(up[1])
    server.hello(up[0])  # the same hello: the reply holds a new key
    with pytest.raises(SealError, match="another key"):
        server.next_token(up[1])


def test_an_impostor_understands_nothing():
    front, back = split(tiny(qwen3(), None), 0)
    trusted, impostor = Identity(), Server(back, Guard())
    with pytest.raises(SealError, match="another key"):
        ask(front, Guard(), impostor, some_ids(), max_new_tokens=1, server_public=trusted.public)
    with pytest.raises(SealError, match="no session"):
        Server(back, Guard()).next_token(b"")


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short"])  # of low order: the secret would be 0
def test_weak_keys_are_refused(public):
    with pytest.raises(SealError, match="no public key that a secret can be agreed with"):
        Identity().accept(public)
    with pytest.raises(SealError, match="no public key"):
        Caller(Identity().public).finish(public)


# --------------------------------------------------------------------------------------------------------------- guard


@given(st.integers(0, 1000), st.sampled_from([8, 16, 32]))
@settings(max_examples=25, deadline=None)
def test_rounding_costs_no_more_than_half_a_step(seed, bits):
    h = 3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))
    guard = Guard(bits=bits)
    off = (guard.receive(guard.send(h)) - h).abs()
    top = h.abs().amax(-1, keepdim=True)
    assert (off <= {8: 0.51 / 127, 16: 2.0**-11, 32: 0.0}[bits] * top + 1e-7).all()


def test_directions_and_noise():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(400, 64, generator=g) @ torch.randn(64, 64, generator=g)
    for guard in (random_guard(64, 16, bits=32), pca_guard(h, 16, bits=32)):
        sent = guard.send(h)
        assert sent["states"].shape == (400, 16)
        again = guard.receive(sent)
        torch.testing.assert_close(guard.receive(guard.send(again)), again, rtol=1e-3, atol=1e-3)  # a projection
        assert 0.01 < ((again - h) ** 2).sum() / ((h - h.mean(0)) ** 2).sum() < 0.9
    main = pca_guard(h, 16, bits=32)
    assert ((main.receive(main.send(h)) - h) ** 2).sum() < ((random_guard(64, 16).receive(random_guard(64, 16).send(h)) - h) ** 2).sum()
    noisy = Guard(noise=0.5, bits=32)
    off = noisy.receive(noisy.send(h, g)) - h
    assert float((off / h.pow(2).mean(-1, keepdim=True).sqrt()).std()) == pytest.approx(0.5, rel=0.02)
    for call, says in (
        (lambda: Guard(noise=-1), "noise=-1 must be 0 or more"),
        (lambda: Guard(bits=4), "bits=4 must be 8, 16 or 32"),
        (lambda: Guard(basis=torch.ones(2, 4)), r"basis \(2, 4\) must be .* orthonormal rows"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


# -------------------------------------------------------------------------------------------------------------- attack


def texts(n, seed, answer=False):
    """Documents over 90 tokens, some more frequent than others."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, 91)
    return [
        Document("d", np.array([1, *(6 + rng.choice(90, 14, p=p / p.sum())), 2]), 8 if answer else 1, 0, answer, str(i)) for i in range(n)
    ]


def test_states_without_a_guard_are_the_inputs_and_noise_hides_them_with_the_answer():
    model = tiny(deepseek(2), None).requires_grad_(False)
    known, secret = texts(60, 0), texts(20, 1)
    plain = curve(model, known, secret)
    assert [x.k for x in plain.leaks] == [0, 1, 2] and plain.leaks[0].recovered == 1.0 == plain.leaks[0].same_top
    assert all(x.kld < 1e-3 and x.same_top > 0.95 and math.isnan(x.exact) for x in plain.leaks)
    tokens = np.concatenate([d.ids[1:-1] for d in secret])
    top = np.bincount(np.concatenate([d.ids[1:-1] for d in known])).argmax()
    assert all(x.unigram == pytest.approx((tokens == top).mean()) and x.n == 20 for x in plain.leaks)
    noisy = curve(model, known, secret, [(0, Guard(noise=v)) for v in (2.0, 4.0, 30.0)], attacks=("nearest",)).leaks
    found = [x.recovered for x in noisy]
    assert 1.0 > found[0] > found[1] > found[2] and noisy[2].same_top < plain.leaks[0].same_top and noisy[2].kld > 0
    assert all(x.low <= x.recovered <= x.high for x in noisy)
    narrow = curve(model, known, secret, [(0, random_guard(64, 8)), (0, Guard(bits=8))]).leaks
    assert narrow[0].recovered < 1 and narrow[1].recovered == 1.0 and (narrow[0].bytes, narrow[1].bytes) == (16, 66)


def test_each_attack_reads_embeddings():
    model = tiny(one_layer_deepseek(), None).requires_grad_(False)
    known, secret = texts(120, 0), texts(15, 1)
    for attack in ("nearest", "ridge", "probe"):
        leak = curve(model, known, secret, [(0, Guard())], attacks=(attack,)).leaks[0]
        assert leak.attack == attack and leak.recovered > {"nearest": 0.999, "ridge": 0.95, "probe": 0.9}[attack] > 3 * leak.unigram


def test_answers_are_scored_and_no_target_of_the_attack():
    model = tiny(qwen3(), None).requires_grad_(False)
    docs = texts(10, 0, answer=True)
    for d in docs[:4]:  # what the model itself would say
        for t in range(d.first, len(d.ids)):
            d.ids[t] = int(model(input_ids=torch.from_numpy(d.ids[None, :t]), use_cache=False).logits[0, -1].argmax())
    leak = curve(model, docs, docs, [(1, Guard(bits=32))]).leaks[0]
    assert leak.exact == 0.4
    hits = curve(model, docs, docs, [(0, Guard())], attacks=("nearest",))
    assert hits.leaks[0].recovered == 1.0 and "reads 100% of the inputs" in hits.told
    assert "<caption>" in hits._repr_html_() and "nearest" in repr(hits)
    rows = hits.report("m")
    assert rows.get(metric="tokens recovered").slice == "k=0, 16 bits" and rows.get(metric="exact_match").value == 0.4
    assert isinstance(hits, Curve)
    for call, says in (
        (lambda: curve(model, docs, docs, attacks=("guess",)), r"attacks=\('guess',\) must be among nearest, ridge, probe"),
        (lambda: curve(model, [], docs), "0 known and 10 secret documents"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_who_has_no_key_learns_nothing():
    model = tiny(one_layer_deepseek(), None).requires_grad_(False)
    front, _ = split(model, 0)
    known, secret = texts(120, 0), texts(30, 1)
    states = [[front(torch.from_numpy(d.ids[None, 1:-1]))[0] for d in docs] for docs in (known, secret)]
    tokens = tuple(torch.cat([torch.from_numpy(d.ids[1:-1]) for d in docs]) for docs in (known, secret))
    embedding = model.model.embed_tokens.weight.detach()
    unigram = float((tokens[1] == torch.bincount(tokens[0]).argmax()).float().mean())
    # 420 tokens: three standard deviations of the unigram's share
    assert eavesdropped(*states, tokens, embedding, Guard(bits=32)) < unigram + 3 * math.sqrt(unigram * (1 - unigram) / len(tokens[1]))


def test_the_figure_shows_every_setting():
    pytest.importorskip("plotly")
    from edgelab.privacy_plots import leak_figure

    model = tiny(qwen3(), None).requires_grad_(False)
    found = curve(model, texts(30, 0), texts(8, 1), [(0, Guard()), (1, Guard()), (0, Guard(noise=3.0))])
    fig = leak_figure(found)
    assert [t.name for t in fig.data] == ["16 bits", "noise 3"] and list(fig.data[0].text) == ["k=0", "k=1"]
    assert fig.data[0].y[0] == 100 and fig.data[1].y[0] == pytest.approx(100 * found.leaks[2].recovered, abs=0.01)
    assert fig.data[1].error_y.arrayminus[0] == pytest.approx(100 * (found.leaks[2].recovered - found.leaks[2].low))
