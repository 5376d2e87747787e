"""Features instead of inputs: the device runs the first blocks of a model and sends their states, encrypted; a server runs the rest.

    device   h = blocks_k(embedding(ids))          `Front`: holds no more of the model than this
             z = guard(h)                          noise, fewer dimensions, int8: what is left away never comes back
             seal(z)                               X25519 + HKDF-SHA256 + ChaCha20-Poly1305, safetensors bytes inside
    server   logits = head(norm(blocks(h')))       `Back`; the next token goes back the same way

**What encryption does and does not.** Whoever listens without the key sees lengths, counters and noise. The server has the key
and the weights of `Front`, and the states are made to say what the tokens were: at k = 0 they are the rows of the embedding, so the inputs
themselves in another spelling, and a residual stream carries them far up. So no raw input leaves the device, and an honest but curious
server reads the inputs all the same unless the guard costs it more than it costs the answer. `curve` measures both:

    nearest    the known token whose state behind the beginning token is nearest: needs the weights of `Front`, and no data
    ridge      least squares from states to embeddings on text that the attacker ran through `Front`, then the nearest embedding
    probe      softmax regression on the same pairs

each position alone; the best of them counts, which is a lower bound of what can be reconstructed (a language model over the candidates, as
in arXiv 2310.06816, gets more). A secret rotation would be no guard: the server undoes it to compute. Noise here carries no proof either:
states are not bounded, and noise that would give a useful epsilon per token leaves no answer.

**The channel.** The device knows the server's public key S. It sends a fresh key E, gets a fresh key F back, and both derive
HKDF(DH(E, S) || DH(E, F); info: E, S, F), a key per direction: only the owner of S can follow, a recorded session can't be played
again (F is new), and a stolen S does not open old sessions. It is the key exchange of Noise NK (noiseprotocol.org, section 7.5) without
payloads; the device stays anonymous. Nonces are counters under keys that live for one session, so none comes twice. The header
(version, session, counter, names and shapes) travels in clear as associated data: changing it is noticed. Lengths tell how long a
prompt is: the device pads it to a multiple of `pad` tokens. How many tokens are answered, and when, shows.

Measured and not audited: no side channels are closed here beyond what `cryptography` closes.
"""

import copy
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as bytes_of
from torch import Tensor, nn
from transformers import DynamicCache

from edgelab import html_table
from edgelab.evaluate import Document, draws, spread
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.report import Report, Row, machine

VERSION = 1
_MAGIC = b"ELF1"
_KEY = 32
_MOST_HEADER = 1 << 16


# ---------------------------------------------------------------------------------------------------------- two halves


class Front(nn.Module):
    """States [rows, T, hidden] behind the first `k` blocks of token ids [rows, T]; k = 0: the embedding."""

    def __init__(self, inner: nn.Module, k: int) -> None:
        super().__init__()
        self.inner, self.k = inner, k

    @torch.no_grad()
    def forward(self, ids: Tensor, cache=None) -> Tensor:
        return self.inner(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state


class Back(nn.Module):
    """Logits [rows, T, vocabulary] of states [rows, T, hidden] behind block `k`: the rest of the model."""

    def __init__(self, inner: nn.Module, head: nn.Module, k: int) -> None:
        super().__init__()
        self.inner, self.head, self.k = inner, head, k

    @torch.no_grad()
    def forward(self, h: Tensor, cache=None) -> Tensor:
        return self.head(self.inner(inputs_embeds=h, past_key_values=cache, use_cache=cache is not None).last_hidden_state)


def split(model: nn.Module, k: int) -> tuple[Front, Back]:
    """(front, back) of `model` in eval mode: together they give its logits. Weights are shared with it, not copied.

    Raises ValueError for a model without `model.layers`, with an early exit, or with fewer than `k` blocks.
    """
    inner, head = getattr(model, "model", None), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(inner, "norm") or head is None:
        raise ValueError(f"{type(model).__name__} is no decoder with model.layers, model.norm and an output head: it can't be split")
    if hasattr(model, "early_exit"):
        raise ValueError("the model has an early exit, which looks at states that one side alone would have; split it without")
    if not 0 <= k <= len(layers):
        raise ValueError(f"k={k} must be in 0 .. {len(layers)}: the model has {len(layers)} blocks")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    halves = []
    for part in (slice(0, k), slice(k, len(layers))):
        twin = copy.deepcopy(inner, dict(shared)).eval()
        twin.layers = nn.ModuleList(list(twin.layers)[part])
        twin.config = copy.deepcopy(inner.config)
        if getattr(twin.config, "layer_types", None):
            twin.config.layer_types = list(inner.config.layer_types)[part]
        twin.config.num_hidden_layers = len(twin.layers)
        for i, layer in enumerate(twin.layers):  # a cache counts the blocks it is given
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i
        halves.append(twin)
    halves[0].norm = nn.Identity()
    halves[1].embed_tokens = None
    return Front(halves[0], k), Back(halves[1], copy.deepcopy(head, dict(shared)).eval(), k)


# --------------------------------------------------------------------------------------------------------------- guard


@dataclass(frozen=True, eq=False)
class Guard:
    """What the device does to states [..., hidden] before they leave. The default sends them in float16.

    `basis` [m, hidden] with orthonormal rows (and `centre` [hidden]): only these m coordinates leave. `noise`: Gaussian, of so many times
    the root mean square of each token's coordinates. `bits` 32, 16, or 8: codes with a scale per token.
    """

    noise: float = 0.0
    basis: Tensor | None = None
    centre: Tensor | None = None
    bits: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ValueError(f"noise={self.noise} must be 0 or more")
        if self.bits not in (8, 16, 32):
            raise ValueError(f"bits={self.bits} must be 8, 16 or 32")
        if self.basis is not None:
            rows = self.basis @ self.basis.mT
            if self.basis.ndim != 2 or not torch.allclose(rows, torch.eye(len(rows)), atol=1e-4):
                raise ValueError(
                    f"basis {tuple(self.basis.shape)} must be [m, hidden] with orthonormal rows; use random_guard or pca_guard"
                )

    def __str__(self) -> str:
        return self.name or (f"noise {self.noise:g}" if self.noise else f"{self.bits} bits")

    def send(self, h: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The tensors that leave for states `h`."""
        z = h.float()
        if self.basis is not None:
            z = (z if self.centre is None else z - self.centre) @ self.basis.mT
        if self.noise:
            z = z + torch.randn(z.shape, generator=generator) * self.noise * z.pow(2).mean(-1, keepdim=True).sqrt()
        if self.bits == 8:
            scale = (z.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
            return {"codes": (z / scale.float()).round().clamp(-127, 127).to(torch.int8), "scale": scale}
        return {"states": z.half() if self.bits == 16 else z}

    def receive(self, sent: Mapping[str, Tensor]) -> Tensor:
        """What the server makes of them: states float32, as near to `h` as what was sent allows."""
        z = sent["codes"].float() * sent["scale"].float() if self.bits == 8 else sent["states"].float()
        if self.basis is None:
            return z
        h = z @ self.basis
        return h if self.centre is None else h + self.centre


def random_guard(hidden: int, m: int, *, seed: int = 0, **settings) -> Guard:
    """`m` random directions of `hidden`, orthonormal."""
    q = torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(seed)))[0]
    return Guard(basis=q[:m].contiguous(), **{"name": f"{m} random directions"} | settings)


def pca_guard(states: Tensor, m: int, **settings) -> Guard:
    """The `m` directions in which `states` [n, hidden], of text that is no secret, vary most."""
    centre = states.float().mean(0)
    _, _, rows = torch.linalg.svd(states.float() - centre, full_matrices=False)
    return Guard(basis=rows[:m].contiguous(), centre=centre, **{"name": f"{m} main directions"} | settings)


# ------------------------------------------------------------------------------------------------------------- channel


class SealError(ValueError):
    """A message that is not what a session can open: changed, of another session, come again, or no message at all."""


def _cryptography():
    try:
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise ImportError("encryption needs the package `cryptography`: pip install 'edgelab[privacy]'") from error
    return x25519, ChaCha20Poly1305


@dataclass(eq=False)
class Session:
    """Keys of one direction each, and counters: what `seal` and `open_` need. Shows no key."""

    id: str
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)
    sent: int = 0
    received: int = 0


class Identity:
    """A server's long-lived key. `public` is what devices must know beforehand, from a place that they trust."""

    def __init__(self) -> None:
        x25519, _ = _cryptography()
        self._key = x25519.X25519PrivateKey.generate()
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def fresh(self):
        """A key for one session, or published ahead for many senders of one message each (a round of `federated`)."""
        x25519, _ = _cryptography()
        return x25519.X25519PrivateKey.generate()

    def accept(self, hello: bytes, fresh=None) -> tuple[Session, bytes]:
        """(the server's session, the reply to send). Raises `SealError` for what is no public key.

        With a `fresh` key that serves many, the reply is known beforehand, and a recorded session opens again as long as the key is
        in use: who takes the messages must then see to it that none counts twice.
        """
        fresh = fresh or self.fresh()
        reply = fresh.public_key().public_bytes_raw()
        device, server, id_ = _keys(_exchange(self._key, hello) + _exchange(fresh, hello), hello, self.public, reply)
        return Session(id_, send_key=server, receive_key=device), reply


class Caller:
    """A device that calls the server of `server_public`: `hello` goes out, `finish` takes the reply. One session."""

    def __init__(self, server_public: bytes) -> None:
        x25519, _ = _cryptography()
        self._key, self._server = x25519.X25519PrivateKey.generate(), bytes(server_public)
        self.hello: bytes = self._key.public_key().public_bytes_raw()

    def finish(self, reply: bytes) -> Session:
        secret = _exchange(self._key, self._server) + _exchange(self._key, reply)
        device, server, id_ = _keys(secret, self.hello, self._server, reply)
        return Session(id_, send_key=device, receive_key=server)


def connect(identity: Identity) -> tuple[Session, Session]:
    """(the device's session, the server's) after a handshake in this process."""
    caller = Caller(identity.public)
    server, reply = identity.accept(caller.hello)
    return caller.finish(reply), server


def _exchange(key, public: bytes) -> bytes:
    x25519, _ = _cryptography()
    try:
        return key.exchange(x25519.X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # of another length, or of low order
        raise SealError(f"{len(public)} bytes are no public key that a secret can be agreed with; a X25519 key has {_KEY}") from error


def _keys(secret: bytes, hello: bytes, server: bytes, reply: bytes) -> tuple[bytes, bytes, str]:
    """(key device to server, key server to device, session id)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    transcript = b"edgelab features 1" + hello + server + reply
    both = HKDF(algorithm=hashes.SHA256(), length=2 * _KEY, salt=None, info=transcript).derive(secret)
    return both[:_KEY], both[_KEY:], hashlib.sha256(transcript).hexdigest()[:16]


@dataclass(frozen=True)
class Envelope:
    """A sealed message. `header` is readable by anyone and protected from change; `ciphertext` ends with the tag of 16 bytes."""

    header: bytes
    ciphertext: bytes

    @property
    def about(self) -> dict:
        """What the header says. Believe it after `open_`."""
        try:
            d = json.loads(self.header)
        except (ValueError, RecursionError) as error:  # the second: brackets within brackets
            raise SealError("the header of the message is no JSON: it is damaged, or no message of this format") from error
        if not isinstance(d, dict) or d.get("version") != VERSION:
            version = d.get("version") if isinstance(d, dict) else None
            raise SealError(f"the message is of version {version!r}, this is version {VERSION}: both sides need the same edgelab")
        return d

    def to_bytes(self) -> bytes:
        return _MAGIC + struct.pack("<I", len(self.header)) + self.header + self.ciphertext

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Envelope":
        if len(raw) < 8 or raw[:4] != _MAGIC:
            raise SealError(f"{len(raw)} bytes that begin with {raw[:4]!r} are no sealed message")
        (n,) = struct.unpack("<I", raw[4:8])
        if n > _MOST_HEADER or len(raw) < 8 + n + 16:
            raise SealError(f"the message has {len(raw)} bytes and is cut short, or its header of {n} is not one")
        return cls(raw[8 : 8 + n], raw[8 + n :])

    def __repr__(self) -> str:
        return f"Envelope({self.header.decode(errors='replace')}, {len(self.ciphertext):,} sealed bytes: {self.ciphertext[:8].hex()}...)"


def seal(session: Session, tensors: Mapping[str, Tensor], **facts) -> Envelope:
    """`tensors` as safetensors bytes, encrypted for the other side. `facts` (plain JSON values) stand readable in the header."""
    _, aead = _cryptography()
    shapes = {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in sorted(tensors.items())}
    about = {"version": VERSION, "session": session.id, "n": session.sent, "tensors": shapes} | facts
    header = json.dumps(about, separators=(",", ":")).encode()
    if len(header) > _MOST_HEADER or not set(facts).isdisjoint({"version", "session", "n", "tensors"}):
        raise ValueError(f"facts {sorted(facts)} make a header of {len(header)} bytes, or take a name of its own")
    plain = bytes_of({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    ciphertext = aead(session.send_key).encrypt(_nonce(session.sent), plain, header)
    session.sent += 1  # before it leaves: a nonce is never used twice, even if sending fails
    return Envelope(header, ciphertext)


def tensors_of(raw: bytes) -> dict[str, Tensor]:
    """The tensors of safetensors bytes. Raises `SealError` for other bytes, whoever sent them."""
    try:
        return _load(raw)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a type that torch lacks
        raise SealError(f"{len(raw)} bytes are no tensors in the format of safetensors: {error}") from error


def open_(session: Session, envelope: Envelope | bytes) -> dict[str, Tensor]:
    """The tensors of a message of the other side. Raises `SealError`; the session then stays as it was.

    A message may be lost (the counter jumps), none is taken twice or out of order.
    """
    from cryptography.exceptions import InvalidTag

    _, aead = _cryptography()
    envelope = envelope if isinstance(envelope, Envelope) else Envelope.from_bytes(envelope)
    about = envelope.about
    if about.get("session") != session.id:
        raise SealError(f"the message was sealed in session {about.get('session')!r}, this is {session.id!r}: another key")
    n = about.get("n")
    if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**64:
        raise SealError(f"n={n!r} is no counter")
    if n < session.received:
        raise SealError(f"message {n} was taken already, or comes too late: the next is {session.received} (a replay?)")
    try:
        plain = aead(session.receive_key).decrypt(_nonce(n), envelope.ciphertext, envelope.header)
    except InvalidTag as error:
        raise SealError("the message does not open: it was changed on the way, or sealed with another key") from error
    found = tensors_of(plain)
    session.received = n + 1
    return found


def _nonce(n: int) -> bytes:
    return n.to_bytes(12, "big")


# ------------------------------------------------------------------------------------------------------ device, server


@dataclass(eq=False)
class Wire:
    """All that went over the air, as bytes: (from the device?, message)."""

    messages: list[tuple[bool, bytes]] = field(default_factory=list)

    def carry(self, up: bool, message: bytes) -> bytes:
        self.messages.append((up, message))
        return message

    @property
    def bytes_up(self) -> int:
        return sum(len(m) for up, m in self.messages if up)


class Server:
    """Runs `back` for devices that speak to its `identity`. Sees states, and never asks for more."""

    def __init__(self, back: Back, guard: Guard, identity: Identity | None = None) -> None:
        self.back, self.guard, self.identity = back, guard, identity or Identity()
        self._session: Session | None = None
        self._cache = None

    def hello(self, hello: bytes) -> bytes:
        self._session, reply = self.identity.accept(hello)
        self._cache = DynamicCache(config=self.back.inner.config)
        return reply

    def next_token(self, message: bytes) -> bytes:
        """The sealed likeliest next token behind the states of `message`."""
        if self._session is None:
            raise SealError("no session: a device must say hello first")
        sent = open_(self._session, message)
        n = int(sent.pop("length"))
        h = self.guard.receive(sent)[:, :n]
        token = self.back(h, self._cache)[:, -1].argmax(-1)
        return seal(self._session, {"token": token.to(torch.int32)}).to_bytes()


@torch.inference_mode()
def ask(
    front: Front, guard: Guard, server: Server, ids: Sequence[int] | Tensor, *, max_new_tokens: int = 64, eos: int | None = None,
    wire: Wire | None = None, pad: int = 32, server_public: bytes | None = None,
) -> list[int]:  # fmt: skip
    """What the server answers to the prompt `ids`, greedily, up to and with `eos`. Only sealed states leave; `wire` keeps what did.

    `server_public`: the key that the device trusts; None takes the server's word for it, which is for trying out.
    """
    wire, caller = wire if wire is not None else Wire(), Caller(server_public or server.identity.public)
    session = caller.finish(wire.carry(False, server.hello(wire.carry(True, caller.hello))))
    cache, text, written = DynamicCache(config=front.inner.config), torch.as_tensor(ids).reshape(1, -1), []
    while len(written) < max_new_tokens and (not written or written[-1] != eos):
        h = front(text, cache)
        sent = guard.send(h)
        room = -text.shape[1] % pad if not written else 0
        sent = {name: torch.cat([t, t.new_zeros(1, room, t.shape[-1])], 1) for name, t in sent.items()}
        sent["length"] = torch.tensor(text.shape[1], dtype=torch.int32)
        message = wire.carry(True, seal(session, sent).to_bytes())
        answer = open_(session, wire.carry(False, server.next_token(message)))
        written.append(int(answer["token"]))
        text = torch.tensor([[written[-1]]])
    return written


def raw_inputs(wire: Wire, ids: Sequence[int] | Tensor, text: str, *, run: int = 3) -> int:
    """How many pieces of the input stand in what left the device: `run` token ids in a row, as integers of 16, 32 or 64 bits in either
    order of bytes, or as many words of the text. 0 is what is promised; it says nothing of what states give away."""
    sent = [m for up, m in wire.messages if up]
    ids, words = [int(i) for i in torch.as_tensor(ids).reshape(-1)], text.split()
    kinds = ("<i2", ">i2", "<i4", ">i4", "<i8", ">i8")
    pieces = {np.array(ids[i : i + run]).astype(kind).tobytes() for i in range(len(ids) - run + 1) for kind in kinds}
    pieces |= {" ".join(words[i : i + run]).encode() for i in range(max(1, len(words) - run + 1))}
    pieces.discard(b"")
    return sum(message.count(piece) for message in sent for piece in pieces)


@dataclass(frozen=True)
class Sent:
    """What `answers` measured: `raw_inputs` over all prompts, `same` the share of answers that the whole model writes too, bytes per
    prompt."""

    prompts: int
    raw_inputs: int
    same: float
    exact: float
    bytes_up: float
    bytes_plain: float


@torch.inference_mode()
def answers(model: nn.Module, tokenizer, docs: Sequence[Document], k: int = 1, guard: Guard | None = None) -> Sent:
    """A `Sent` of the prompts of `docs` (`evaluate.documents`), each answered in a session of its own, k blocks on the device.

    `bytes_plain` is what the token ids would take, 4 bytes each: features are no way to save bytes.
    """
    docs, guard = [d for d in docs if d.answer], guard or Guard()
    if not docs:
        raise ValueError("no document has an answer: give rows with prompt and answer, such as those of the assistant")
    front, back = split(model, k)
    whole, all_back = split(model, 0)
    server, local = Server(back, guard), Server(all_back, Guard(bits=32))
    found, same, right, up, plain = 0, 0, 0, 0, 0
    for d in docs:
        prompt, wanted, wire = d.ids[: d.first], d.targets.tolist(), Wire()
        settings = {"max_new_tokens": len(wanted) + 16, "eos": int(d.ids[-1])}
        got = ask(front, guard, server, prompt, wire=wire, **settings)
        found += raw_inputs(wire, prompt, tokenizer.decode(prompt.tolist()))
        same += got == ask(whole, Guard(bits=32), local, prompt, **settings)
        right, up, plain = right + (got == wanted), up + wire.bytes_up, plain + 4 * len(prompt)
    n = len(docs)
    return Sent(n, found, same / n, right / n, up / n, plain / n)


# ------------------------------------------------------------------------------------------------------------ attacker


@dataclass(frozen=True)
class Leak:
    """What one guard behind block `k` gives away and leaves. `recovered`: share of the input's tokens that the best attack names (95 %
    interval over documents), `unigram` that of always naming the likeliest. `kld` nats per token and `same_top` against the whole
    model, `exact` share of answers right (NaN without answers), `bytes` per token before sealing."""

    k: int
    guard: str
    attack: str
    recovered: float
    low: float | None
    high: float | None
    unigram: float
    kld: float
    same_top: float
    exact: float
    bytes: float
    n: int


@dataclass(frozen=True)
class Curve:
    """`Leak`s, as a table."""

    leaks: tuple[Leak, ...]

    def report(self, model: str = "") -> Report:
        """Rows for `studies`: the slice names k and the guard."""
        rows = []
        for x in self.leaks:
            common = {"slice": f"k={x.k}, {x.guard}", "n": x.n, "machine": machine()}
            rows.append(Row(model, "tokens recovered", x.recovered, "share", low=x.low, high=x.high, note=x.attack, **common))
            plain = {"unigram": ("share", x.unigram), "kld": ("nats/tok", x.kld), "same_top": ("share", x.same_top)}
            plain |= {"exact_match": ("share", x.exact), "bytes per token": ("B", x.bytes)}
            rows += [Row(model, name, value, unit, **common) for name, (unit, value) in plain.items()]
        return Report(tuple(rows))

    @property
    def told(self) -> str:
        worst = max(self.leaks, key=lambda x: x.recovered)
        useful = [x for x in self.leaks if x.same_top >= 0.9]
        best = min(useful, key=lambda x: x.recovered, default=None)
        tail = (
            f"; of those that keep 90 % of the next tokens, {best.recovered:.0%} at the least ({best.guard}, k = {best.k})" if best else ""
        )
        return (
            f"The server reads {worst.recovered:.0%} of the inputs from the states of k = {worst.k} ({worst.guard}){tail}. "
            f"Naming the likeliest token gets {worst.unigram:.0%}. Encryption hides states from others, not from the one who computes."
        )

    def _lines(self) -> list[dict[str, str]]:
        return [
            {
                "k": str(x.k), "guard": x.guard, "recovered": Row("", "", x.recovered, low=x.low, high=x.high).text(),
                "best attack": x.attack, "likeliest token": f"{x.unigram:.3f}", "kld": f"{x.kld:.3f}", "same top": f"{x.same_top:.3f}",
                "exact match": "" if math.isnan(x.exact) else f"{x.exact:.3f}", "B/token": f"{x.bytes:.0f}",
            }
            for x in self.leaks
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.told)}</p>" + html_table.lines(self._lines(), "What states give away")

    def __repr__(self) -> str:
        lines = self._lines()
        table = [list(lines[0]), *(list(line.values()) for line in lines)]
        wide = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join([*("  ".join(v.ljust(n) for v, n in zip(row, wide, strict=True)).rstrip() for row in table), self.told])


def curve(
    model: nn.Module, known: Sequence[Document], secret: Sequence[Document], settings: Iterable[tuple[int, Guard]] | None = None, *,
    attacks: Sequence[str] = ("nearest", "ridge"), begin: int | None = None, seed: int = 0, resamples: int = 1000,
) -> Curve:  # fmt: skip
    """The `Curve` of `settings` (k, guard): attackers learn on `known` documents (`evaluate.documents`), and are measured on `secret` ones.

    Attacked are inputs: the prompt where there is an answer, else the whole text; the beginning token is no secret. Default
    settings: every k with states in float16. `begin` is the id of the beginning token, by default that of the first document.
    """
    unknown = set(attacks) - set(_ATTACKS)
    if unknown or not attacks:
        raise ValueError(f"attacks={tuple(attacks)} must be among {', '.join(_ATTACKS)}")
    if not known or not secret:
        raise ValueError(f"{len(known)} known and {len(secret)} secret documents: an attack is learnt on some and measured on others")
    begin = int(secret[0].ids[0]) if begin is None else begin
    settings = list(settings) if settings is not None else [(k, Guard()) for k in range(len(model.model.layers) + 1)]
    table = model.get_input_embeddings()
    embedding = table(torch.arange(table.num_embeddings)).detach().float()
    taught, hidden = _batches(known), _batches(secret)
    counts = torch.bincount(torch.cat([b.tokens for b in taught]), minlength=len(embedding))
    whole = {i: model(input_ids=b.ids, use_cache=False).logits.float().log_softmax(-1) for i, b in enumerate(hidden)}
    leaks, halves = [], {}
    for k, guard in settings:
        front, back = halves.setdefault(k, split(model, k))
        generator = torch.Generator().manual_seed(seed)
        x, y = [], []
        for b in taught:
            x.append(guard.receive(guard.send(front(b.ids), generator))[b.attacked])
            y.append(b.tokens)
        x, y = torch.cat(x), torch.cat(y)
        guesses = [_ATTACKS[a](x, y, front, embedding, begin, seed) for a in attacks]
        hits, owner = [[] for _ in attacks], []
        sums = {"kld": 0.0, "same": 0.0, "tokens": 0, "right": 0, "asked": 0, "bytes": 0}
        for i, b in enumerate(hidden):
            sent = guard.send(front(b.ids), generator)
            h = guard.receive(sent)
            for j, guess in enumerate(guesses):
                hits[j].append(guess(h[b.attacked]) == b.tokens)
            owner.append(b.owner)
            got = back(h).float().log_softmax(-1)
            same = got.argmax(-1) == whole[i].argmax(-1)
            sums["kld"] += float(token_kl(whole[i][b.real], got[b.real]).sum())
            sums["same"] += float(same[b.real].sum())
            sums["tokens"] += int(b.real.sum())
            sums["bytes"] += sum(t[0, 0].nbytes for t in sent.values()) * int(b.real.sum())
            right = ((got[:, :-1].argmax(-1) == b.ids[:, 1:]) | ~b.answer[:, 1:]).all(1)
            sums["right"], sums["asked"] = sums["right"] + int(right[b.asks].sum()), sums["asked"] + int(b.asks.sum())
        owner = torch.cat(owner).numpy()
        by_attack = [np.bincount(owner, torch.cat(h).numpy(), len(secret)) for h in hits]
        best = int(np.argmax([v.sum() for v in by_attack]))
        lengths = np.bincount(owner, minlength=len(secret))
        drawn = draws(len(secret), resamples, seed)
        low, high = spread((drawn @ by_attack[best]) / (drawn @ lengths), len(secret))
        unigram = float((torch.cat([b.tokens for b in hidden]) == counts.argmax()).float().mean())
        n, exact = sums["tokens"], sums["right"] / sums["asked"] if sums["asked"] else math.nan
        found = float(by_attack[best].sum() / lengths.sum())
        utility = sums["kld"] / n, sums["same"] / n, exact, sums["bytes"] / n
        leaks.append(Leak(k, str(guard), attacks[best], found, low, high, unigram, *utility, len(secret)))
    return Curve(tuple(leaks))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Documents padded on the right: `attacked`, `real`, `answer` bool [rows, T]; `tokens`, `owner` of the attacked positions."""

    ids: Tensor
    attacked: Tensor
    real: Tensor
    answer: Tensor
    asks: Tensor
    tokens: Tensor
    owner: Tensor


def _batches(docs: Sequence[Document], tokens: int = 4096) -> list[_Batch]:
    order, found = sorted(range(len(docs)), key=lambda i: -len(docs[i].ids)), []
    while order:
        width = len(docs[order[0]].ids)
        part, order = order[: max(1, tokens // width)], order[max(1, tokens // width) :]
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        attacked, real, answer = (torch.zeros(len(part), width, dtype=torch.bool) for _ in range(3))
        for row, i in enumerate(part):
            d = docs[i]
            ids[row, : len(d.ids)] = torch.from_numpy(d.ids)
            attacked[row, 1 : d.first if d.answer else len(d.ids) - 1] = True
            real[row, : len(d.ids)] = True
            answer[row, d.first : len(d.ids)] = d.answer
        owner = torch.tensor(part)[:, None].expand(-1, width)[attacked]
        found.append(_Batch(ids, attacked, real, answer, torch.tensor([docs[i].answer for i in part]), ids[attacked], owner))
    return found


def _nearest(x, y, front: Front, embedding: Tensor, begin: int, seed: int):
    pairs = torch.stack([torch.full((len(embedding),), begin), torch.arange(len(embedding))], 1)
    return _to_nearest(torch.cat([front(p)[:, 1] for p in pairs.split(1024)]).float(), lambda h: h)


def _ridge(x: Tensor, y: Tensor, front: Front, embedding: Tensor, begin: int, seed: int):
    centre, target = x.mean(0), embedding.mean(0)
    x = (x - centre).double()
    gram = x.mT @ x
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    w = torch.linalg.solve(gram, x.mT @ (embedding[y] - target).double()).float()
    return _to_nearest(embedding, lambda h: (h - centre) @ w + target)


def _to_nearest(points: Tensor, move):
    half = points.pow(2).sum(1) / 2
    return lambda h: (move(h) @ points.mT - half).argmax(1)  # the least distance


def _probe(x: Tensor, y: Tensor, front: Front, embedding: Tensor, begin: int, seed: int, steps: int = 200, batch: int = 1024):
    generator = torch.Generator().manual_seed(seed)
    centre, scale = x.mean(0), x.std() + 1e-6
    w = torch.zeros(x.shape[1], len(embedding), requires_grad=True)
    bias = torch.zeros(len(embedding), requires_grad=True)
    optimizer = torch.optim.Adam([w, bias], lr=0.02)
    for step in range(steps):
        at = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy((x[at] - centre) / scale @ w + bias, y[at])
            w.grad, bias.grad = torch.autograd.grad(loss, [w, bias])
        optimizer.step()
    w, bias = w.detach(), bias.detach()
    return lambda h: ((h - centre) / scale @ w + bias).argmax(1)


_ATTACKS = {"nearest": _nearest, "ridge": _ridge, "probe": _probe}


def eavesdropped(
    known: Sequence[Tensor], secret: Sequence[Tensor], tokens: tuple[Tensor, Tensor], embedding: Tensor, guard: Guard
) -> float:
    """Share of tokens that `ridge` names from sealed bytes alone: states [T, hidden] of each text are sealed in one session, and
    `hidden` bytes of ciphertext per token stand for its state. `tokens` (known, secret) [sum of T]. What is left is the unigram."""
    device, _ = connect(Identity())

    def bytes_per_token(states: Sequence[Tensor]) -> Tensor:
        rows = []
        for h in states:
            raw = np.frombuffer(seal(device, guard.send(h[None])).ciphertext, np.uint8)
            rows.append(torch.from_numpy(raw[: h.numel()].reshape(h.shape).astype(np.float32)))
        return torch.cat(rows)

    guess = _ridge(bytes_per_token(known), tokens[0], None, embedding, 0, 0)
    return float((guess(bytes_per_token(secret)) == tokens[1]).float().mean())
