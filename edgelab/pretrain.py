"""Train the embedded models from nothing: `python -m edgelab.pretrain moe` (or `dense`).

    moe    DeepSeek-V3 architecture: multi-head latent attention, 16 routed experts of which 2 are active, a shared expert
    dense  Qwen3 architecture

Corpus and tokenizer are built on the spot (`edgelab.data`), so the whole model comes from the reader's interpreter.

Load balance (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): no auxiliary loss; after each step the selection bias of
expert i moves by gamma * sign(mean load - load_i). The bias serves selection only, never the gate's weight.

Schedule: linear warm-up, a constant rate, then a linear decay to zero over the last 30 % of the tokens (WSD,
arXiv 2405.18392). The constant part lets an interrupted run go on with more tokens than it was started with.

Loss: mean cross entropy per token. The commands and sums in front of an answer are noise that the generator drew, so
they weigh `PROMPT_WEIGHT`; prose, code and commands' answers weigh 1. A sum's answer is 3 of 9 tokens and short of
gradient beside the rest: it weighs `ARITHMETIC_WEIGHT`.

A run writes a checkpoint every few minutes (model and optimizer as safetensors, whole or not at all) and resumes
from the last one by itself.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from edgelab import data
from edgelab.train import autocast

PROMPT_WEIGHT = 0.1
ARITHMETIC_WEIGHT = 4.0


@dataclass(frozen=True)
class Settings:
    """One training run. `tokens` counts positions trained on, `mix` is the share of each domain's sequences."""

    tokens: int
    peak_lr: float
    batch: int = 8
    length: int = 512
    warmup_steps: int = 200
    decay_share: float = 0.3
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    bias_gamma: float = 1e-3
    vocab: int = 2048
    seed: int = 0
    mix: tuple[float, ...] = (0.33, 0.27, 0.20, 0.20)  # prose, code, assistant, arithmetic

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


def moe_config(vocab: int):
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=vocab, hidden_size=256, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=512,
        n_routed_experts=16, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=128,
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=128,
        # equal query and value widths let torch take its fused attention: 1.17x the training speed of 64 + 32 / 64
        qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
        max_position_embeddings=1024, tie_word_embeddings=False, num_nextn_predict_layers=0,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip


def dense_config(vocab: int):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab, hidden_size=256, num_hidden_layers=4, intermediate_size=640, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip


MODELS = {
    "moe": (moe_config, Settings(tokens=25_000_000, peak_lr=2e-3)),
    "dense": (dense_config, Settings(tokens=12_000_000, peak_lr=2e-3)),
}


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts, vocab: int):
    """A byte-level BPE tokenizer of `vocab` entries: single digits, `data.END` first, every byte representable."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        # a word with its leading space, a run of punctuation, or a run of blanks (Python's indentation)
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tok.decoder = decoders.ByteLevel()
    special = [data.END, "<|pad|>", data.USER, data.CALL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    # every document was read after an END: plain `generate` must start there too
    tok.post_processor = processors.TemplateProcessing(
        single=f"{data.END} $A", pair=f"{data.END} $A $B", special_tokens=[(data.END, tok.token_to_id(data.END))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=data.END, eos_token=data.END, pad_token="<|pad|>",
        additional_special_tokens=[data.USER, data.CALL], clean_up_tokenization_spaces=False, model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|call|>') + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|call|>{% endif %}"
    )
    return fast


# ------------------------------------------------------------------------------------------------------ batches


class Streams:
    """Endless batches: each sequence is one domain's documents in a random order, joined by END.

    `batch(step)` depends on the seed and the step alone, so that a resumed run sees what it would have seen.
    """

    def __init__(self, train, tokenizer, settings: Settings):
        self.s = settings
        self.docs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        end = tokenizer.convert_tokens_to_ids(data.END)
        for domain in data.DOMAINS:
            rows = train.select(np.flatnonzero(np.array(train["domain"]) == domain))
            rest = [t[len(p) :] for t, p in zip(rows["text"], rows["prompt"], strict=True)]
            prompts = tokenizer(list(rows["prompt"]), add_special_tokens=False)["input_ids"]
            answers = tokenizer(rest, add_special_tokens=False)["input_ids"]
            weight = ARITHMETIC_WEIGHT if domain == "arithmetic" else 1.0
            self.docs[domain] = [
                (
                    np.array([*p, *a, end], np.int32),
                    np.array([PROMPT_WEIGHT] * len(p) + [weight] * (len(a) + 1), np.float32),
                )
                for p, a in zip(prompts, answers, strict=True)
            ]
        self.end = end

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [batch, length + 1] int64, weights [batch, length] float32) of this step."""
        s, rng = self.s, np.random.default_rng((self.s.seed, step))
        tokens = np.zeros((s.batch, s.length + 1), np.int64)
        weights = np.zeros((s.batch, s.length + 1), np.float32)
        for row in range(s.batch):
            docs = self.docs[rng.choice(data.DOMAINS, p=s.mix)]
            tokens[row, 0] = self.end
            at = 1
            while at <= s.length:
                ids, w = docs[rng.integers(len(docs))]
                if at == 1 and len(ids) > s.length // 2 and rng.random() < 0.5:  # else no tail of a long one is seen
                    cut = rng.integers(len(ids) - s.length // 2)
                    ids, w = ids[cut:], w[cut:]
                n = min(len(ids), s.length + 1 - at)
                tokens[row, at : at + n], weights[row, at : at + n] = ids[:n], w[:n]
                at += n
        return torch.from_numpy(tokens), torch.from_numpy(weights[:, 1:])


# ---------------------------------------------------------------------------------------------------- the run


def learning_rate(step: int, s: Settings) -> float:
    """Warm-up, constant, linear decay to zero (WSD)."""
    decay_from = s.steps * (1 - s.decay_share)
    if step < s.warmup_steps:
        return s.peak_lr * (step + 1) / s.warmup_steps
    return s.peak_lr * min(1.0, (s.steps - step) / (s.steps - decay_from))


def watch_load(model) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Count each router's choices into a buffer: [(router, counts [experts])], empty for a dense model."""
    pairs = []
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            counts = torch.zeros(module.num_experts, device=module.weight.device)

            def hook(_module, _inputs, output, counts=counts):
                with torch.no_grad():
                    counts.add_(F.one_hot(output[2], counts.numel()).sum((0, 1)).to(counts.dtype))

            module.register_forward_hook(hook)
            pairs.append((module, counts))
    return pairs


@torch.no_grad()
def rebalance(pairs, gamma: float) -> float:
    """Move each selection bias against its load; returns the worst max/mean load ratio of the step."""
    worst = 1.0
    for router, counts in pairs:
        worst = max(worst, float(counts.max() / counts.mean()))
        router.e_score_correction_bias.add_(gamma * torch.sign(counts.mean() - counts))
        counts.zero_()
    return worst


def _save_checkpoint(folder: Path, model, optimizer, step: int, settings: Settings) -> None:
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v.reshape(-1) if v.ndim == 0 else v for k, v in entry.items()}
    whole = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
    save_file(whole, folder / "checkpoint.tmp", {"step": str(step), "settings": json.dumps(asdict(settings))})
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.safetensors")


def _load_checkpoint(path: Path, model, optimizer, settings: Settings) -> int:
    """The step that the checkpoint at `path` was written after; fills `model` and `optimizer`."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        found = f.metadata()
    step, began = int(found["step"]), json.loads(found["settings"])
    wanted = json.loads(json.dumps(asdict(settings)))
    differ = [k for k in wanted if k != "tokens" and wanted[k] != began.get(k)]
    if differ:
        told = ", ".join(f"{k} {began.get(k)} -> {wanted[k]}" for k in differ)
        raise ValueError(f"{path} is of another run ({told}); delete it to start anew, or give the settings it began with")
    if step > settings.steps:
        raise ValueError(f"{path} has {step} steps behind it, tokens={settings.tokens} asks for {settings.steps}; ask for more")
    state = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    whole = optimizer.state_dict()
    for k, v in state.items():
        if k.startswith("optimizer."):
            _, i, name = k.split(".")
            whole["state"].setdefault(int(i), {})[name] = v.reshape(()) if name == "step" else v
    optimizer.load_state_dict(whole)
    return step


def pretrain(
    kind: str,
    out: Path,
    work: Path,
    *,
    settings: Settings | None = None,
    config=None,
    corpus=None,
    compile: bool = True,
    save_every_s: float = 240,
    stop_after: int | None = None,
) -> Path | None:
    """Train `kind` ("moe" or "dense") and write the model folder `out`; checkpoints and the loss curve go to `work`.

    Runs on CUDA where there is one. Resumes from `work/checkpoint.safetensors`. `settings`, `config` (vocabulary size ->
    transformers config) and `corpus` take the place of the defaults. `stop_after` ends the run early, checkpointed, after
    that many steps and returns None. Raises ValueError for an unknown kind.
    """
    from transformers import AutoModelForCausalLM

    if kind not in MODELS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(MODELS)}")
    make_config, s = config or MODELS[kind][0], settings or MODELS[kind][1]
    work.mkdir(parents=True, exist_ok=True)
    corpus = data.corpus() if corpus is None else corpus
    train = corpus["train"]
    # one tokenizer for both models: a student must read its teacher's tokens
    tokenizer = train_tokenizer(train["text"], s.vocab)
    streams = Streams(train, tokenizer, s)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(s.seed)
    model = AutoModelForCausalLM.from_config(make_config(len(tokenizer)), dtype=torch.float32).to(device).train()
    if kind == "moe":
        model.set_experts_implementation("grouped_mm")  # 3x the speed of the default loop on CPU
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=s.peak_lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    first = 0
    if (work / "checkpoint.safetensors").exists():
        first = _load_checkpoint(work / "checkpoint.safetensors", model, optimizer, s)
    routers = watch_load(model)

    def loss_of(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        each = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()

    loss_fn = torch.compile(loss_of) if compile else loss_of
    saved = began = time.monotonic()
    last = s.steps if stop_after is None else min(s.steps, first + stop_after)
    losses = []
    for step in tqdm(range(first, last), initial=first, total=s.steps, desc=f"pretrain {kind}", unit="step", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        tokens_, weights = (t.to(device) for t in streams.batch(step))
        loss = loss_fn(tokens_, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        imbalance = rebalance(routers, s.bias_gamma)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower peak_lr={s.peak_lr} and start again")
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) * s.batch * s.length / (time.monotonic() - began)
            row = {"step": step + 1, "tokens": (step + 1) * s.batch * s.length, "loss": round(float(np.mean(losses)), 4)}
            row |= {"max_load_over_mean": round(imbalance, 2), "tokens_per_s": round(rate)}
            with (work / "curve.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            losses = []
        if time.monotonic() - saved > save_every_s or step + 1 == last:
            _save_checkpoint(work, model, optimizer, step + 1, s)
            saved = time.monotonic()
    if last < s.steps:
        return None
    export(model, tokenizer, out, {"settings": asdict(s), "corpus": data.fingerprint(corpus), "steps": s.steps}, work / "curve.jsonl")
    return out


def export(model, tokenizer, out: Path, facts: dict, curve: Path | None = None) -> None:
    """Write `model` in bf16, its tokenizer, `training.json` and the loss curve to the folder `out`, whole or not at all."""
    import copy
    import shutil

    half = copy.deepcopy(model).to(torch.bfloat16).cpu()
    for name, buffer in model.named_buffers():  # the selection bias decides by differences of 1e-3: keep it exact
        if name.endswith("e_score_correction_bias"):
            half.get_buffer(name).data = buffer.detach().cpu().float()
    tmp = out.with_name(out.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    half.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    (tmp / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    if curve is not None and curve.exists():  # a resumed run logs the steps after its checkpoint a second time: keep the last
        rows = {json.loads(line)["step"]: line for line in curve.read_text().splitlines()}
        (tmp / "curve.jsonl").write_text("".join(f"{rows[k]}\n" for k in sorted(rows)))
    for file in tmp.iterdir():  # safetensors writes for the owner alone; a wheel or an archive would carry that along
        file.chmod(0o644)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    import argparse

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("kind", choices=list(MODELS))
    p.add_argument("--out", type=Path, help="model folder (default data/edge-KIND)")
    p.add_argument("--work", type=Path, help="checkpoints and curve (default .pretrain/KIND)")
    p.add_argument("--tokens", type=int)
    p.add_argument("--threads", type=int)
    p.add_argument("--no-compile", action="store_true")
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    settings = MODELS[a.kind][1]
    if a.tokens:
        settings = replace(settings, tokens=a.tokens)
    pretrain(
        a.kind,
        a.out or Path(f"data/edge-{a.kind}"),
        a.work or Path(f".pretrain/{a.kind}"),
        settings=settings,
        compile=not a.no_compile,
    )


if __name__ == "__main__":
    main()
