"""GGUF: our own codes in llama.cpp's blocks, executed and compared in llama.cpp.

Nothing is quantized again. A row of a GGUF tensor is a sequence of blocks, scale and codes together (ggml-common.h):

    Q4_0    32 weights: float16 d, 16 bytes; byte j holds code j in its low, code 16 + j in its high nibble; d * (q - 8)
    Q4_1    32 weights: float16 d, float16 m, 16 bytes alike;                                                d * q + m
    Q8_0    32 weights: float16 d, 32 int8;                                                                  d * q
    Q2_0    64 weights: float16 d, 16 bytes, code 4j in the low bits of byte j;                              d * (q - 1)
    MXFP4   32 weights: exponent + 127 in one byte, 16 bytes as in Q4_0;                                     OCP MX's E2M1

So int4-g32 is Q4_0, uint4-g32 is Q4_1 and mxfp4-g32 is MXFP4, bit for bit, in another order. A group that is a multiple
of the block, or a whole row, becomes several blocks that repeat its scale; fewer bits go out as four, the same values
(q - 4 + 8 for three). Two bits in groups of 64 are Q2_0 with the sign turned: s * (q - 2) = -s * ((3 - q) - 1); files
with it need a llama.cpp that knows that type, and `portable=True` writes Q4_0 instead. All experts of a stack share a type.

llama.cpp reads the tensors of an architecture by name, so a family is a table of names (`_NAMES`) and what else differs:
the llama architecture rotates neighbouring pairs where transformers rotates halves, so the rows of q and k are permuted
(codes move with their rows); fused gate_up stacks are cut in two. Multi-head latent attention can be written

    "whole"    kv_b_proj as it is, all of it codes. llama.cpp then caches expanded keys and values, per token and layer
               heads * (key + value) numbers: the layout of DeepSeek files before April 2025, which it still reads
    "latent"   kv_b_proj cut into attn_k_b, transposed, and attn_v_b. llama.cpp caches the latent, kv_lora_rank + rope
               numbers. The groups of the transposed half run across ours: it goes out as floats

What is no codes is float16 where that changes no value, float32 otherwise; vectors and routers are always float32.

One difference is llama.cpp's own: its CPU code rounds the *inputs* of every quantized product to int8, 32 at a time (Q8_0),
and no option of it does otherwise. The weights are right all the same, so `verify` runs both and tells both: the file's
weights as float32 in llama.cpp, whose logits must be torch's, and the file as a phone runs it, beside torch with its inputs
rounded alike. The embedded models in int4-g32, 4,096 tokens of held-out text against torch's float32 inputs:

    edge-dense   as float32 1 - cosine 1e-13   as it runs 2.2e-5, same top token 99.0 %   torch with int8 inputs 2.2e-5, 99.2 %
    edge-moe     as float32 1 - cosine 1e-13   as it runs 3.6e-4, same top token 98.4 %   torch with int8 inputs 3.3e-4, 98.2 %

A mixture loses more: now and then the rounding turns a router's choice.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import ExportError, ExportResult, NoRuntimeError
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, place, refuse_other_arithmetic, require, whole_or_nothing
from edgelab.export.gguf_file import F16, F32, Q2_0, QUANTIZED, TYPES, StoredTensor, read, unblock, value_bytes, write
from edgelab.export.gguf_metadata import PRE_TOKENIZERS, TEXTS, metadata_of, refuse_config, vocabulary_of
from edgelab.export.gguf_tensors import ARCHITECTURES, Out, tensors_of
from edgelab.fold import activations
from edgelab.layers import QExperts, QLinear, Quantized
from edgelab.qtensor import QTensor

MLA = ("whole", "latent")
_RUNTIME_NOTE = "in llama.cpp: "  # what `verify` adds to the notes begins so, and is replaced when it runs again

# --------------------------------------------------------------------------------------------------------- the doors


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    tokenizer=None,
    check: bool = True,
    mla: str | None = None,
    portable: bool = False,
    halve: bool = False,
    pre: str | None = None,
) -> ExportResult:
    """The verified GGUF file of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model, whose tokenizer then goes into the file too. `out`: the file
    to write, or a folder (then `model.gguf` in it). `tokenizer`: a fast tokenizer of transformers; False leaves out the one of
    the directory: the file then takes and gives ids. `check=False` leaves out `verify`, and needs no llama.cpp. `mla`: "whole"
    or "latent" (see the module) for DeepSeek models; None: "whole" when kv_b_proj is quantized, so that it stays so, else
    "latent". `portable` writes no Q2_0, which older llama.cpp can't read. `halve` rounds matrices that are no codes to
    float16, as most GGUF files have them. `pre`: llama.cpp's pre-tokenizer, a name of `PRE_TOKENIZERS`; None: the one that
    agrees with the tokenizer on most of `TEXTS`.

    Raises ExportError when the model has no place in llama.cpp's architecture, when llama-cpp-python is missing, and when
    the written file does not pass `verify`; nothing is left under `out` then.
    """
    began = time.perf_counter()
    if tokenizer is None and not isinstance(model, nn.Module) and (not Path(model).is_dir() or (Path(model) / "tokenizer.json").is_file()):
        from edgelab.model import load_tokenizer

        tokenizer = load_tokenizer(model)
    model, out = causal_lm(model), Path(out)
    path = place(out, "model.gguf")
    if mla not in (None, *MLA):
        raise ExportError(f"mla={mla!r} is not one of {', '.join(MLA)}")
    if check:
        _runtime()  # before the work
    config = model.config.get_text_config()
    refuse_config(config)
    if other := sorted(set(activations(model).values()) - {"silu"}):
        raise ExportError(f"{', '.join(other)}: llama.cpp's {ARCHITECTURES[config.model_type].name} computes with silu only")
    refuse_other_arithmetic(model, symmetric_only=False)  # GGUF has homes for more: see `gguf_tensors._type_of`
    if mla is None:
        mla = "whole" if any(n.endswith("kv_b_proj") and isinstance(m, Quantized) for n, m in model.named_modules()) else "latent"
    tensors = tensors_of(model, mla, portable, halve)
    metadata = metadata_of(model, tensors, mla) | vocabulary_of(tokenizer, config.vocab_size, pre)
    metadata |= {"general.name": type(model).__name__, "edgelab.version": _version(), "edgelab.options": json.dumps([mla, portable, halve])}
    with whole_or_nothing(path) as files:
        write(files[0], metadata, [(t.name, t.kind, t.shape, t.data()) for t in tensors])
        result = replace(_count(model, tensors, metadata, files), notes=_notes(config, tensors, mla, metadata))
        if check:
            result = verify(result, model, tokenizer=tokenizer)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _version() -> str:
    import edgelab

    return edgelab.__version__


def _coded(t: Out) -> bool:
    return t.kind in QUANTIZED


def _count(model: nn.Module, tensors: list[Out], metadata: Mapping[str, object], files: tuple[Path, ...]) -> ExportResult:
    """What the model asks for and how large the file is; `verify` replaces the quantized counts by the file's own. The prediction
    is that of the weights and of the tokenizer's words."""
    words = sum(len(value_bytes(v)) for v in metadata.values() if isinstance(v, list))
    coded = [t for t in tensors if _coded(t)]
    in_experts = [t for t in tensors if t.role == "experts"]
    total = sum(prod(t.shape) for t in tensors if t.name != "rope_freqs.weight" and not t.name.endswith("exp_probs_b.bias"))
    return ExportResult(
        "gguf",
        files,
        sum(f.stat().st_size for f in files),
        sum(t.nbytes for t in tensors) + words,
        total,
        sum(prod(t.shape) for t in coded),
        sum(prod(t.shape) for t in in_experts),
        sum(prod(t.shape) for t in in_experts if _coded(t)),
    )


def _notes(config, tensors: list[Out], mla: str, metadata: dict[str, object]) -> tuple[str, ...]:
    notes = []
    by_kind = {kind: sum(prod(t.shape) for t in tensors if t.kind is kind) for kind in TYPES.values()}
    notes.append("stored as " + ", ".join(f"{kind.name}: {n:,}" for kind, n in by_kind.items() if n))
    pieces = [(p.source, t.kind, p.shape) for t in tensors for p in t.pieces if isinstance(p.source, QTensor)]
    more = sum(prod(shape[:-1]) * kind.row_bytes(shape[-1]) - round(q.nbytes * shape[0] / q.shape[0]) for q, kind, shape in pieces)
    if more > 0:
        notes.append(f"fewer bits and larger groups are written as blocks of the next type, the same values: {more:,} bytes more")
    if any(t.kind is Q2_0 for t in tensors):
        notes.append("has tensors of type Q2_0, which older llama.cpp can't read; portable=True writes Q4_0 instead")
    if config.model_type.startswith("deepseek"):
        heads, key, value = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        whole, latent = heads * (key + value), config.kv_lora_rank + config.qk_rope_head_dim
        kept = whole if mla == "whole" else latent
        notes.append(f"attention written {mla}: llama.cpp caches {kept} numbers per token and layer (whole {whole}, latent {latent})")
        floats = [t for t in tensors if t.name.endswith("attn_k_b.weight") and any(o.origin == t.origin and _coded(o) for o in tensors)]
        if floats:
            n = sum(prod(t.shape) for t in floats)
            notes.append(f"{n:,} weights of kv_b_proj are transposed and left their codes: {floats[0].kind.name}, the same values")
    rounded = [t for t in tensors for p in t.pieces if t.kind is F16 and not isinstance(p.source, QTensor) and not _is_half(p.source)]
    if rounded:
        notes.append(f"{sum(prod(t.shape) for t in rounded):,} weights were rounded to float16")
    if "tokenizer.ggml.pre" not in metadata:
        notes.append("no tokenizer in the file: ids in, ids out")
    return tuple(notes)


def _is_half(value: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return value.dtype == np.float16 or np.array_equal(value.astype(np.float16).astype(np.float32), value)


def verify(
    result: ExportResult,
    model: nn.Module,
    *,
    tokenizer=None,
    lengths: tuple[int, ...] = LENGTHS,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
) -> ExportResult:
    """`result` with the parity that llama.cpp reached and the counts found in the file.

    Opens the file again. First its tensors: every code, scale and float must be bit for bit the model's (rows put back in
    order), and nothing quantized may be missing. Then llama.cpp, on one thread of the CPU with a float32 cache, on random
    tokens of each of `lengths` against `model`: the file's weights as float32 (`parity`), and the file as it runs, with int8
    inputs (`parity` again, under as_run_..., and in the notes beside what that rounding does to torch). Above `TWIN_BYTES` of
    float32 the latter alone. The notes also tell how many tokens are the same that follow greedily, one by one through the
    cache, and with a `tokenizer` for how many of `TEXTS` the ids are.

    Raises ExportError for a changed value, a missing weight, a size off the prediction, a cosine below `min_cosine`, or
    one below `MIN_AS_RUN` of the file as it runs.
    """
    path = result.files[0]
    metadata, stored = read(path)
    mla, portable, halve = json.loads(str(metadata.get("edgelab.options", '["whole", false, false]')))
    tensors = tensors_of(model, mla, portable, halve)
    expected = _count(model, tensors, metadata, result.files)
    quantized, experts = _check_tensors(path, stored, tensors)
    if quantized != expected.weights_quantized or experts != expected.experts_quantized:
        raise ExportError(
            f"{path.name} holds {quantized:,} quantized weights, {experts:,} of them experts'; "
            f"the model has {expected.weights_quantized:,} and {expected.experts_quantized:,}"
        )
    # on top: some 160 bytes a tensor for its name, shape and alignment, and the keys
    allowed = expected.predicted_bytes // 100 + 160 * len(stored) + 2**13
    if not 0 <= expected.bytes - expected.predicted_bytes <= allowed:
        raise ExportError(
            f"{path.name} has {expected.bytes:,} bytes; weights and words take {expected.predicted_bytes:,}, the rest at most {allowed:,}"
        )
    runtime = _runtime()
    notes = [n for n in result.notes if not n.startswith(_RUNTIME_NOTE)]
    length = max(*lengths, GREEDY_PROMPT + GREEDY_TOKENS)
    with _llama(runtime, path, length) as llama:
        as_run = agreement(lambda ids: _logits(llama, ids), model, lengths, seed)
        same, asked = _greedy(llama, model, seed)
        notes.append(f"{_RUNTIME_NOTE}{same} of {asked} tokens the same, chosen greedily one by one through the cache")
        if tokenizer and metadata.get("tokenizer.ggml.model") == "gpt2":
            differ = [t for t in TEXTS if llama.tokenize(t.encode(), add_bos=True, special=True) != tokenizer(t).input_ids]
            pre, equal = metadata["tokenizer.ggml.pre"], len(TEXTS) - len(differ)
            others = f"; not {', '.join(map(repr, differ))}" if differ else ""
            notes.append(f"{_RUNTIME_NOTE}{equal} of {len(TEXTS)} texts become the same ids (pre-tokenizer {pre}){others}")
            if equal < MIN_TEXTS * len(TEXTS):
                raise ExportError(f"{path.name}: {notes[-1]}. Try another of pre={', '.join(PRE_TOKENIZERS)}, or tokenizer=False")
    parity, form = dict(as_run), ""
    if quantized:
        notes.append(f"{_RUNTIME_NOTE}as the file runs, with inputs rounded to int8: {_told(as_run)}")
        with _rounded_inputs(model) as rounded:
            notes[-1] += f"; torch with its inputs rounded so: {_told(agreement(rounded, model, lengths, seed))}"
        if 4 * sum(prod(t.shape) for t in stored.values()) <= TWIN_BYTES:
            form = "the file's weights as float32, "
            with tempfile.TemporaryDirectory() as folder:
                twin = Path(folder) / f"{path.stem}-float32.gguf"
                floats = [(t.name, F32, t.shape, iter([t.values()])) for t in stored.values()]
                write(twin, {k: v for k, v in metadata.items() if not k.startswith("edgelab.")}, floats)
                with _llama(runtime, twin, length) as llama:
                    parity = agreement(lambda ids: _logits(llama, ids), model, lengths, seed)
        parity |= {f"as_run_{k}": v for k, v in as_run.items()}
    require(parity, f"{path.name} in llama.cpp ({form or 'as it runs, '}{_told(parity)})", min_cosine)
    if not as_run["cosine"] >= MIN_AS_RUN:
        raise ExportError(f"{path.name}: {notes[-1]}. A cosine below {MIN_AS_RUN} is no rounding any more")
    by = f"llama.cpp (llama-cpp-python {runtime.__version__}) CPU, {form}{' + '.join(map(str, lengths))} tokens"
    return replace(expected, seconds=result.seconds, parity=parity, verified_by=by, notes=tuple(notes))


TWIN_BYTES = 2**30
MIN_AS_RUN = 0.98  # a mixture of 4 layers was at 0.9993; a wrong scale or order of codes is at 0.9 and below
MIN_TEXTS = 0.75  # share of `TEXTS`
GREEDY_PROMPT, GREEDY_TOKENS = 8, 24


def _check_tensors(path: Path, stored: dict[str, StoredTensor], tensors: list[Out]) -> tuple[int, int]:
    """(weights, expert weights) that the file really holds as codes, each compared with the model's."""
    missing, extra = {t.name for t in tensors} - set(stored), set(stored) - {t.name for t in tensors}
    if missing or extra:
        raise ExportError(f"{path.name} {'lacks' if missing else 'has besides the model'} {', '.join(sorted(missing or extra)[:4])}")
    for t in tensors:
        held = stored[t.name]
        if held.kind is not t.kind or held.shape != t.shape:
            raise ExportError(f"{path.name}: {t.name} is {held.kind.name} {held.shape}; {t.origin} is {t.kind.name} {t.shape}")
        rows = prod(t.pieces[0].shape[:-1])
        for i, piece in enumerate(t.pieces):
            raw = held.data[i * rows : (i + 1) * rows]
            where = f"{path.name}: {t.name}" + (f"[{i}]" if t.stacked else "")
            if not _coded(t):
                if raw.tobytes() != piece.bytes(t.kind).tobytes():
                    raise ExportError(f"{where}: the values in the file are not those of {t.origin}")
                continue
            for what, ours, theirs in zip(("codes", "scales", "offsets"), piece.coded(t.kind), unblock(t.kind, raw), strict=True):
                if (ours is None) != (theirs is None) or (ours is not None and ours.tobytes() != theirs.tobytes()):
                    raise ExportError(f"{where}: the {what} in the file are not those of {t.origin} ({piece.source.scheme})")
    coded = [t for t in stored.values() if t.kind in QUANTIZED]
    return sum(prod(t.shape) for t in coded), sum(prod(t.shape) for t in coded if t.name.endswith("_exps.weight"))


# ------------------------------------------------------------------------------------------------------- llama.cpp


def _runtime():
    """llama-cpp-python, imported here so that the rest works without it."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as e:  # a wheel built for another processor fails with the latter two
        raise NoRuntimeError(
            f'llama-cpp-python is not installed or does not load ({e}); verification needs the extra `gguf`: pip install "edgelab[gguf]" '
            "(it builds llama.cpp, some 20 minutes). check=False (--no-verify) writes the file without it"
        ) from e
    return llama_cpp


@contextmanager
def _llama(runtime, path: Path, length: int):
    """The file in llama.cpp: CPU, one thread, all logits, a float32 cache (its default, float16, alone costs 2e-4)."""
    size, said = -(-length // 32) * 32, []
    listen = runtime.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace").strip()) if level == 4 else None)
    runtime.llama_log_set(listen, None)
    try:
        llama = runtime.Llama(
            str(path), n_gpu_layers=0, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=runtime.GGML_TYPE_F32, type_v=runtime.GGML_TYPE_F32, flash_attn=False, verbose=False,
            yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,  # as the file says; the package has numbers of its own
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as e:
        reason = said[0] if said else str(e).strip() or type(e).__name__
        raise ExportError(f"llama.cpp refuses {path.name}: {reason}") from e
    finally:
        from llama_cpp._logger import llama_log_callback

        runtime.llama_log_set(llama_log_callback, None)  # as it was
    try:
        yield llama
    finally:
        llama.close()


def _told(parity: Mapping[str, float]) -> str:
    return f"1 - cosine {1 - parity['cosine']:.1e}, same top token {parity['top1_agreement']:.2%}, KL {parity['kld']:.1e}"


@contextmanager
def _rounded_inputs(model: nn.Module):
    """A run of `model` in which every quantized layer rounds its input as llama.cpp does, to int8 per 32 with a float16 scale;
    outside a run `model` is as it was."""
    layers = [m for m in model.modules() if isinstance(m, QLinear | QExperts)]

    def rounded(_: str, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (-1, 32))
        top = parts.abs().amax(-1, keepdim=True)
        codes = torch.round(parts * torch.where(top == 0, 0.0, 127 / top))
        return (codes * (top / 127).half().float()).flatten(-2).to(x.dtype)

    def run(ids: np.ndarray) -> np.ndarray:
        swiglu = [(m, m._is_swiglu) for m in layers if isinstance(m, QExperts)]
        try:
            for m in layers:
                m._rounded = rounded
            for m, _ in swiglu:
                m._is_swiglu = False  # the fused kernel has no place for it
            return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double().numpy()
        finally:
            for m in layers:
                del m._rounded
            for m, was in swiglu:
                m._is_swiglu = was

    yield run


def _logits(llama, ids: np.ndarray) -> np.ndarray:
    llama.reset()
    llama.eval([int(i) for i in ids])
    return llama.scores[: len(ids)].copy()


@torch.no_grad()
def _greedy(llama, model: nn.Module, seed: int) -> tuple[int, int]:
    """(tokens that are the same until the first that differs, tokens asked for) of both going on from random ids."""
    ids = np.random.default_rng(seed).integers(0, model.config.get_text_config().vocab_size, GREEDY_PROMPT).tolist()
    llama.reset()
    llama.eval(ids)
    for n in range(GREEDY_TOKENS):
        ours = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if ours != int(llama.scores[len(ids) - 1].argmax()):
            return n, GREEDY_TOKENS
        ids.append(ours)
        llama.eval([ours])
    return GREEDY_TOKENS, GREEDY_TOKENS
