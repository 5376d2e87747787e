# %% [markdown]
# # 01 · Compress, evaluate, export
#
# **Claim: stored in 4 bits, a mixture-of-experts model takes less than a third of its bytes, answers nearly as before, and
# runs in another runtime with the very same codes; in 2 bits most of its commands go wrong.**
#
# After this notebook you can
#
# 1. walk a model's weights and find the ones that other tools overlook,
# 2. write a recipe, apply it, and read the coverage audit that follows,
# 3. say with an interval what 8, 4 and 2 bits cost, in KL divergence and in right answers,
# 4. save a bundle that plain `transformers` loads,
# 5. export to ONNX and *prove* that the file holds the same model,
# 6. recognise a "4-bit" model that is nothing of the kind.
#
# *Before you start*: [00, start here](00_start_here.ipynb). *Takes* about a minute on two cores and 2 GB of memory. Every
# cell may be run again.

# %%
import shutil
from pathlib import Path

import torch
from IPython.display import HTML, Markdown, display
from transformers import AutoModelForCausalLM

import edgelab.hf  # noqa: F401 (teaches transformers to load our bundles)
from edgelab import Quantize, QuantScheme, Recipe, data, plots, words
from edgelab.bundle import coverage_of, save_bundle, verify_bundle
from edgelab.compress import audit, compress
from edgelab.evaluate import evaluate
from edgelab.export.onnx import export
from edgelab.model import load, load_tokenizer, weights
from edgelab.paths import data_dir
from edgelab.widgets import BitsControl, measurer

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a Hugging Face causal language model
documents = {"prose": 8, "code": 8, "assistant": 40, "arithmetic": 60}  # of the test split
seed = 0
out = "../runs/01"  # what this notebook writes

# %%
out = Path(out)
shutil.rmtree(out, ignore_errors=True)  # so that a second run starts like the first
out.mkdir(parents=True)
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
test = data.corpus()["test"]
print(f"{type(model).__name__}, {audit(model).parameters:,} parameters; {len(test):,} test documents, test split {data.fingerprint(test)}")

# %% [markdown]
# ## 1. Walk the weights
#
# **Predict.** How many of the weights below are `nn.Linear` modules, and how many are expert stacks? Which hold more
# parameters?

# %%
listed = weights(model)
stacks = [w for w in listed if w.kind == "experts"]
print(f"{len(listed)} weights, {len(stacks)} of them expert stacks with {sum(w.tensor.numel() for w in stacks):,} parameters")
for w in listed[:4] + stacks[:2] + listed[-1:]:
    print(w)

# %% [markdown]
# **Explain.** An expert stack is one parameter [experts, out, in]. It is no `nn.Linear`, so a tool that looks for those
# never meets it. Each weight has a *role*, the same for every architecture: recipes are written in roles and travel.

# %% [markdown]
# ## 2. A recipe is data
#
# Symmetric round-to-nearest stores a code *q* of *b* bits and stands for scale × (q − 2^(b−1)), with one float16 scale
# per row (`int8-row`) or per 32 consecutive weights (`int4-g32`).
#
# **Predict.** `int4-g32` needs 4 bits for the code and 16 for a scale that 32 weights share. How many bits per weight?

# %%
recipes = {
    "int8": Recipe.uniform("int8-row"),
    "int4": Recipe.uniform("int4-g32"),
    "int2": Recipe.uniform("int2-g32"),
}
print("int4-g32:", QuantScheme.parse("int4-g32").bits_per_weight((256, 256)), "bits per weight")
print(recipes["int4"].to_json())

# %% [markdown]
# ## 3. Compress, and audit
#
# **Predict.** The audit counts everything that is stored: scales, norms, router. How far above 4.5 bits does the whole
# model end?

# %%
compressed = {name: compress(model, recipe, progress=False) for name, recipe in recipes.items()}
compressed["int4"].coverage

# %%
coverage = compressed["int4"].coverage
sentence = plots.say_layer_bytes(coverage)
plots.show(plots.layer_bytes(coverage, title="Bytes per layer in int4-g32; diamonds: in bfloat16"), sentence)
display(Markdown(sentence))

# %% [markdown]
# **The control that must fail.** A recipe that overlooks the experts, as many tools do. It still calls itself 4-bit; the
# audit does not.

# %%
scheme = QuantScheme.parse("int4-g32")
careless = Recipe((Quantize((("@experts", None), ("@router", None), ("*", scheme))),))
try:
    compress(model, careless, progress=False)
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("the audit accepted a model whose experts were skipped")

# %%
lenient = Recipe((Quantize((("@experts", None), ("@router", None), ("*", scheme)), min_expert_share=0.0),))
skipped = compress(model, lenient, progress=False).coverage
print(f"experts skipped: {skipped.bits_per_weight:.1f} bits per weight;   experts included: {coverage.bits_per_weight:.1f}")
assert skipped.bits_per_weight > 2 * coverage.bits_per_weight
assert coverage.expert_share == 1.0

# %% [markdown]
# ## 4. Evaluate
#
# **Predict.** Put the three in order for KL divergence, and guess the exact match of the assistant commands in 4 and in
# 2 bits. Guess also whether perplexity alone would have told you.

# %%
models = {"fp": model} | {name: c.model for name, c in compressed.items()}
sizes = {"fp": sum(f.stat().st_size for f in Path(model_dir).glob("*.safetensors"))}  # the bfloat16 file, not its float32 copy here
sizes |= {name: c.coverage.predicted_bytes for name, c in compressed.items()}
report = evaluate(models, tokenizer, test, max_docs=documents, seed=seed, bootstrap=1000, sizes=sizes, progress=False)
wanted = ["weight_bytes", "bits_per_weight", "bits_per_byte", "kld", "kld_p99", "same_top", "exact_match", "flips", "router_overlap"]
display(Markdown(words.markdown(words.table(report, wanted)) + f"\n\n{words.ORIGINAL_SIZE}"))

# %%
sentence = words.say_by_domain(report, "kld")
plots.show(plots.by_domain(report, "kld"), sentence)
display(Markdown(sentence))

# %%
sentence = words.say_size(report)
plots.show(plots.size_against(report), sentence)
display(Markdown(sentence))

# %% [markdown]
# **Look.** Every number has its interval: a paired bootstrap over documents (the pieces of a long one drawn
# together). *fp* is the baseline, its divergence to itself is 0.
#
# **The second control that must fail: 2 bits.** Two bits leave four values per weight. If our measurements could not tell
# that model from a good one, they would be worthless.

# %%
for domain in data.DOMAINS:
    kld = {name: report.get(model=name, metric="kld", slice=domain).value for name in recipes}
    print(f"{domain:10}  int8 {kld['int8']:.4f}   int4 {kld['int4']:.4f}   int2 {kld['int2']:.4f} nats per token")
    assert kld["int8"] < kld["int4"] < kld["int2"], f"no staircase on {domain}"
exact = {name: report.get(model=name, metric="exact_match", slice="assistant") for name in models}
print("right commands:", ", ".join(f"{name} {words.shown(row)}" for name, row in exact.items()))
assert exact["int2"].high < exact["int4"].low, "two bits should break the commands"
assert report.get(model="int2", metric="kld", slice="prose").low > report.get(model="int4", metric="kld", slice="prose").high

# %% [markdown]
# **Explain.** Each bit less doubles the step between neighbouring values, and the squared error grows fourfold. KL
# divergence asks about *every* token's whole distribution and so sees damage long before the answers change; exact
# match says when it matters: in 4 bits hardly a command or a sum changed, though all distributions have moved;
# *flips* counts answers that changed either way, which a plain average hides. *Router overlap* is
# particular to MoE: a token that is sent to other experts meets other weights altogether.

# %% [markdown]
# ## 5. A bundle
#
# **Predict.** The audit predicted the bytes from shapes and schemes alone. By how much will the files on disk differ?

# %%
int4 = compressed["int4"]
bundle = save_bundle(int4.model, tokenizer, out / "int4", recipe=int4.recipe, coverage=int4.coverage, report=report)
verify_bundle(bundle)
print(coverage_of(bundle))
assert abs(coverage_of(bundle).file_error) < 0.01
assert coverage_of(bundle).file_bytes < 0.32 * sizes["fp"]
for file in sorted(bundle.iterdir()):
    print(f"{file.stat().st_size:>10,}  {file.name}")

# %%
again = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
ids = tokenizer(test[0]["text"], return_tensors="pt").input_ids[:, :64]
with torch.no_grad():
    difference = (again(ids).logits - int4.model(ids).logits).abs().max().item()
print(f"plain transformers loaded it; its logits differ by at most {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# **Explain.** `import edgelab.hf` registered our format; from there on it is `from_pretrained` as for any other model.
# Floating-point weights never existed on the way.

# %% [markdown]
# ## 6. Another runtime
#
# ONNX Runtime has a node, `MatMulNBits`, whose arithmetic is exactly that of `int4-g32`. So the codes go out as they are:
# nothing is quantized a second time.
#
# **Predict.** Same codes, other kernels: how many digits of the logits agree?

# %%
exported = export(again, out / "int4.onnx")
exported

# %%
assert exported.parity["cosine"] >= 0.9999
assert exported.expert_share == 1.0
print(f"{exported.weights_quantized:,} weights in low bits, counted in the file; verified by {exported.verified_by}")

# %% [markdown]
# **Explain.** The export compared every code in the file with the model's, ran the file, and compared the logits. Had one
# weight gone out unquantized or changed, there would be an error and no file.

# %% [markdown]
# ## 7. Try it yourself
#
# **Predict.** Which costs more on prose: going from groups of 32 to groups of 128, or from 4 bits to 3?
#
# Every choice is compressed and measured anew, then kept. A group size that does not divide a weight's
# inputs is refused: try 48.

# %%
control = BitsControl(
    measurer(model, tokenizer, test, max_docs={"prose": 4, "code": 0, "assistant": 12, "arithmetic": 0}, seed=seed), "int4-g32"
)
control

# %%
for choice in ("int4-g128", "int3-g32"):
    control.choose(choice)
    assert control.error is None, control.error
plots.show(control.static(), control.told)
display(HTML(control.html))

# %% [markdown]
# **Look.** The table holds the same numbers as the plot. The slice is small, so the intervals are wide: widen it
# (`max_docs`) before you believe a small difference.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import start_lab

# %% [markdown] tags=["exercise"] exercise="experts-skipped" difficulty=1 importance=3 minutes=3
# 80 % of a model's weights are experts. A tool stores all others in `int4-g32` and overlooks the experts: they stay in 16 bits. How many
# bits per weight has this "4-bit model"?

# %% tags=["stub"]
bits = None

# %% tags=["check"]
start_lab.check_skipped(bits)

# %% [markdown] tags=["hint"]
# `int4-g32` takes 4.5 bits, scales and all. A mean, in which each kind counts with its share.

# %% [markdown] tags=["expected"]
# More than 13: most of the model is as large as before.

# %% tags=["solution"]
bits = 0.8 * 16 + 0.2 * 4.5

# %% [markdown] tags=["why"]
# That is what the audit of section 3 counts, and why it refuses such a model unless it is told to take it.

# %% tags=["mutant"]
# believes the name
bits = 4.5

# %% tags=["mutant"]
# forgets the scales
bits = 0.8 * 16 + 0.2 * 4

# %% tags=["mutant"]
# the wrong ones in 4 bits
bits = 0.2 * 16 + 0.8 * 4.5

# %% tags=["mutant"]
# a mean of two kinds, as if they were equally many
bits = (16 + 4.5) / 2

# %% [markdown] tags=["exercise"] exercise="kl-by-hand" difficulty=2 importance=3 minutes=5
# Three words can come next. The original gives them the probabilities 0.7, 0.2 and 0.1, the compressed model 0.6, 0.3 and 0.1. What is
# the KL divergence of the compressed model from the original, KL(original || compressed), in nats?

# %% tags=["stub"]
nats = None

# %% tags=["check"]
start_lab.check_kl(nats)

# %% [markdown] tags=["hint"]
# Σ p ln(p / q), with p of the original. One of the three terms is zero, and one is negative.

# %% [markdown] tags=["expected"]
# A few hundredths of a nat, though the likeliest word is the same.

# %% tags=["solution"]
nats = 0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.2 / 0.3)

# %% tags=["mutant"]
# the other way round
nats = 0.6 * np.log(0.6 / 0.7) + 0.3 * np.log(0.3 / 0.2)

# %% tags=["mutant"]
# bits
nats = 0.7 * np.log2(0.7 / 0.6) + 0.2 * np.log2(0.2 / 0.3)

# %% tags=["mutant"]
# terms are not weighed
nats = np.log(0.7 / 0.6) + np.log(0.2 / 0.3)

# %% tags=["mutant"]
# a distance: terms are made positive
nats = 0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.3 / 0.2)

# %% tags=["mutant"]
# the sum of differences
nats = 0.1 + 0.1

# %% [markdown] tags=["exercise"] exercise="dequantize" difficulty=2 importance=3 minutes=8
# Write what a runtime does with the bundle of section 5: turn stored codes into weights, weight = scale · (code − 2^(b−1)). `codes` is a
# uint8 array [out, in], `scales` a float array [out, groups]: a row's first `in / groups` weights share its first scale, and so on.


# %% tags=["stub"]
def dequantize(codes, scales, bits):
    """The weights, a float array of the shape of `codes`."""
    ...


# %% tags=["check"]
start_lab.check_dequantize(dequantize)

# %% [markdown] tags=["hint"]
# What is 3 − 8 in uint8? `np.repeat(scales, n, axis=1)` writes each scale n times.

# %% [markdown] tags=["expected"]
# The codes 9 15 8 12 with the scale 0.5 at 4 bits are the weights 0.5 3.5 0 2.


# %% tags=["solution"]
def dequantize(codes, scales, bits):
    levels = codes.astype(np.float32) - 2 ** (bits - 1)
    return levels * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


# %% tags=["mutant"]
# subtracts in uint8, where 3 - 8 is 251
def dequantize(codes, scales, bits):
    levels = codes - np.uint8(2 ** (bits - 1))
    return levels * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


# %% tags=["mutant"]
# no zero point
def dequantize(codes, scales, bits):
    return codes.astype(float) * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


# %% tags=["mutant"]
# one scale for a row
def dequantize(codes, scales, bits):
    return (codes.astype(float) - 2 ** (bits - 1)) * scales[:, :1]


# %% tags=["mutant"]
# scales take turns: the first for input 0, the second for input 1
def dequantize(codes, scales, bits):
    return (codes.astype(float) - 2 ** (bits - 1)) * np.tile(scales, codes.shape[1] // scales.shape[1])


# %% tags=["mutant"]
# the middle of 0 .. 15 as 7.5
def dequantize(codes, scales, bits):
    levels = codes.astype(float) - (2**bits - 1) / 2
    return levels * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


# %% [markdown]
# ## What would change on your model
#
# One name. The walk, the recipe, the audit, the evaluation and the export are the same:
#
# ```python
# name = "Qwen/Qwen3-0.6B"                      # or "allenai/OLMoE-1B-7B-0924", or a folder
# model, tokenizer = load(name), load_tokenizer(name)
# result = compress(model, Recipe.uniform("int4-g32"), inplace=True)    # inplace: the floating-point weights are freed
# save_bundle(result.model, tokenizer, "runs/mine", recipe=result.recipe, coverage=result.coverage)
# model = AutoModelForCausalLM.from_pretrained("runs/mine")
# ```
#
# or, in a terminal, `edgelab compress Qwen/Qwen3-0.6B --scheme int4-g32 --out runs/mine`.
#
# Larger models have outliers that ours lacks, and round-to-nearest is the simplest method there is: what better ones
# gain is another matter.
