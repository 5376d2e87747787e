# %% [markdown]
# # 04 · Quantize a model
#
# **Claim: how codes are *found* is worth bits. With calibration data, 3 bits do what rounding to nearest needs a quarter of a
# bit more for; and a model with outliers, which plain 8-bit activations ruin, is cured by a change that leaves its function as it
# was.**
#
# After this notebook you can
#
# 1. say what each method changes: the scale, the offset, the levels, or the codes,
# 2. tell the error of the weights from the error that inputs see, and say which of them GPTQ lowers,
# 3. read a staircase of bits and say how many bits a method saves at equal quality,
# 4. give each weight its own number of bits within a budget,
# 5. recognise outliers in activations and choose between SmoothQuant, rotation and a split,
# 6. make a table of methods that a reviewer believes, with paired intervals.
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb), for recipes and KL divergence; int8 activations from
# [02](02_quantized_matmul.ipynb). *Takes* a minute and a half on two cores and 2 GB of memory. Every cell may be run again. Few documents
# are read, so that it is quick: intervals are wide, and figures move a little with the text of your Python installation.

# %%
import copy
import tempfile
import warnings

import torch
from IPython.display import HTML, Markdown, display

from edgelab import Recipe, Rotate, Rtn, Smooth, compress, corpus, data, plots, words
from edgelab import quantize_lab as lab
from edgelab.blocks import calibrate
from edgelab.compare import compare
from edgelab.methods.gptq import gptq
from edgelab.methods.mixed import allocate
from edgelab.model import load, load_tokenizer, weights
from edgelab.paths import data_dir
from edgelab.scheme import QuantScheme
from edgelab.sensitivity import additivity, mixed_recipe, sensitivity
from edgelab.transforms import plant_outliers

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-dense")  # any folder with a Hugging Face causal language model
weight_name = "model.layers.2.mlp.up_proj"  # the matrix of section 1
calibration_tokens = 4096
documents = {"prose": 3, "code": 3, "assistant": 12, "arithmetic": 12}  # of the test split
seed = 0

# %%
warnings.filterwarnings("ignore", message="the head of this")  # rotating unties a tied head: section 5 says so
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = corpus()
calibration = data.calibration_batches(tokenizer, text["calibration"], tokens=calibration_tokens, context=256, seed=seed)
measured = {"tokenizer": tokenizer, "test": text["test"], "max_docs": documents, "seed": seed}  # the same for every section
by_name = {w.name: w for w in weights(model)}
weight = by_name[weight_name].tensor.detach()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {sum(b.numel() for b in calibration):,} tokens of calibration text")
print(f"the matrix of section 1: {by_name[weight_name]}")

# %% [markdown]
# ## 1. One matrix, many methods
#
# A code of 4 bits names one of 16 *levels*. Methods differ in where the levels lie:
#
# - **int4, max|w| / 7**: evenly spaced, from −7 to 7. One code is wasted.
# - **int4, signed max / −8**: evenly spaced, from −8 to 7, and the scale takes the sign of the largest weight, so that this one
#   becomes level −8. All codes are used (GGUF's Q4_0).
# - **uint4**: a scale and an *offset*, so that the levels run from the smallest weight to the largest.
# - **NF4** (QLoRA): equally probable under a normal distribution, dense near zero. **FP4**, **MXFP4**: those of a tiny floating-point
#   number; MXFP4's scale is a power of two and takes one byte.
#
# **Predict.** Below are 32 weights that share a scale. Which codebook has the most levels where the weights are dense, and
# which wastes levels where there is no weight?

# %%
group = weight[0, :32]
levels = lab.group_levels(group)
sentence = lab.say_levels(levels)
plots.show(lab.levels_figure(group, levels), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([x.row for x in levels])))

# %% [markdown]
# **Look.** The line is the histogram of the 32 weights, the crosses are the weights themselves, and each row of marks below
# them the levels that one codebook offers.
#
# **Explain.** NF4, FP4 and MXFP4 are dense near zero, where most weights are, and pay with wide gaps at the ends. MXFP4's power of
# two may end short of the largest weight, or far beyond it. Which is best differs from group to group; a whole matrix tells more.
#
# Now all of one matrix, and a second way to measure. Not all inputs of a matrix are equally large, and they vary
# together. With H = Σ x xᵀ over calibration tokens, the output's squared error is tr((W − Q) H (W − Q)ᵀ): the error *that inputs see*.
#
# **GPTQ** does not change the levels at all. It rounds one input's weights after another, and lets those still to come make good
# what was lost.
#
# **Predict.** GPTQ and "scale of least squared error" have the same scales, bits and levels. Which of the two errors does GPTQ
# lower, and what happens to the other?

# %%
stats = calibrate(model, calibration, want=("xx",), progress=False)
xx = stats[weight_name].xx
errors = lab.side_by_side(weight, xx)
sentence = lab.say_errors(errors)
plots.show(lab.errors_figure(errors), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([e.row for e in errors])))
by_method = {e.method: e for e in errors}
nearest, published = by_method["RTN, scale of least squared error"], by_method["GPTQ as published"]
assert published.seen < nearest.seen and published.equal > nearest.equal

# %% [markdown]
# **Answer.** It lowers the error that inputs see, by a third, and *raises* the plain error of the weights by as much.
#
# **Explain.** Rounding to nearest is the best that can be done for each weight alone. GPTQ moves weights away from their
# nearest level on purpose, where that cancels an error made elsewhere: inputs that rise and fall together see the sum of their errors.
# "Refined" goes on after the last column: scales and codes are adjusted in turn, as long as the second error falls. A method that is
# judged by the distance of its weights from the original's is judged by the wrong number.
#
# **The first control that must fail: the right numbers in the wrong order.** GPTQ is given an H whose inputs were shuffled. Were its
# gain not due to *this* matrix's inputs, it would not mind.

# %%
shuffled = torch.randperm(len(xx), generator=torch.Generator().manual_seed(seed))
wrong = gptq(weight, xx[shuffled][:, shuffled], QuantScheme.parse("int4-g32"), rounds=0)
control = lab.matrix_error(weight, wrong, xx, "GPTQ, H shuffled")
display(Markdown(words.markdown([e.row for e in (nearest, published, control)])))
assert control.seen > nearest.seen > published.seen, "GPTQ gains from an H that is not this matrix's"

# %% [markdown]
# ## 2. The whole model
#
# A `Recipe` names the scheme and the method; `Recipe.body` rounds the decoder blocks and leaves embedding, head and norms, as
# papers' tables do. All of these have 4.5 effective bits: an offset takes 16 bits more per group, so `uint4` gets groups twice
# as large, and the comparison is fair.
#
# **Predict.** Put them in order: plain rounding, squared error, squared error weighted by E[x²], HQQ, AWQ, GPTQ. Which use data?

# %%
recipes = {
    "rtn": Recipe.body("int4-g32"),
    "mse": Recipe.body("int4-g32", method=Rtn(mse_grid=32)),
    "weighted": Recipe.body("int4-g32", method=Rtn(mse_grid=32, weighted=True)),
    "hqq": Recipe.body("uint4-g64", method="hqq"),
    "nf4": Recipe.body("nf4-g32", method=Rtn(mse_grid=8)),
    "awq": Recipe.body("int4-g32", before=(Smooth("awq"),), method=Rtn(mse_grid=32)),
    "gptq": Recipe.body("int4-g32", method="gptq"),
}
made = {name: compress(model, recipe, calibration=calibration, progress=False) for name, recipe in recipes.items()}
found = lab.results(model, made, **measured)
sentence = lab.say_methods(found, "rtn")
plots.show(lab.methods_figure(found), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(found.rows(against="rtn"))))
print("without calibration data:", ", ".join(name for name, recipe in recipes.items() if recipe.data_free))
assert found.ratio("gptq", "rtn")[2] < 1, "GPTQ is not better than rounding to nearest"

# %% [markdown]
# **Look.** The intervals of the KL divergences overlap, and it would be wrong to conclude that nothing can be told: they say how
# much *documents* differ. The paired column draws the same documents for both methods, and its intervals are narrow.
#
# **Answer.** GPTQ, by far; the next is NF4, whose levels fit weights that look normal, then the squared error. Weighting by E[x²]
# and AWQ, both built on how *large* inputs are, do not add to that: this small model has no inputs that are far larger than
# the others. Section 5 plants some.
#
# **Explain.** Methods change different things, so they combine: AWQ and rotation change the *weights* before rounding (and the
# function stays the same), NF4 the *levels*, GPTQ the *codes*.

# %% [markdown]
# ## 3. The staircase of bits
#
# Each bit less doubles the step, and squared errors grow fourfold. So the KL divergence should climb by the same factor with each
# bit that is taken away: on a logarithmic axis, a straight flight of stairs.
#
# **Predict.** GPTQ lies below rounding to nearest. At equal KL divergence, how many bits per weight does it save: 0.1, 0.5 or 2?
# Is it the same on every stair?

# %%
tried = {
    "rtn": ("int8-g32", "int4-g32", "int3-g32", "int2-g32", "int4-g128", "int3-g128"),
    "gptq": ("int4-g32", "int3-g32", "int2-g32", "int4-g128"),
}
stairs = {f"{method} {scheme}": Recipe.body(scheme, method=method) for method in tried for scheme in tried[method]}
there = {f"{method} int4-g32": made[method] for method in tried}  # from section 2
built = {name: there.get(name) or compress(model, r, calibration=calibration, progress=False) for name, r in stairs.items()}
climbed = lab.results(model, built, **measured)
sentence = lab.say_staircase(climbed.points)
plots.show(lab.staircase_figure(climbed.points), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(climbed.rows())))

# %%
saved = lab.saved_bits(climbed.points)
display(Markdown(words.markdown([s.row for s in saved])))
assert all(s.saved > 0 for s in saved if s.saved is not None)

# %% [markdown]
# **Look.** Each line asks: rounding to nearest, with groups of the same size, needs how many bits for the KL divergence that GPTQ
# reaches with fewer? Between the measured points a straight line is drawn; beyond them nothing is claimed.
#
# **Answer.** A fifth to a third of a bit, on every stair.
#
# **Explain.** Saved bits are the fair unit: "40 % less KL divergence" sounds like more than it is, since a single bit more takes away some
# three quarters. Groups of 128 save 3/8 of a bit of scales, and RTN pays for it with a coarser step: compare the lines.
#
# **The second control that must fail: two bits.** A measurement that cannot tell two bits from four is worth nothing.

# %%
two, four = climbed.points["rtn int2-g32"], climbed.points["rtn int4-g32"]
print(f"rtn, 2 bits: same top token {two.same_top:.1%}, KLD {two.kld:.3g}; 4 bits: {four.same_top:.1%}, {four.kld:.3g}")
assert two.low > 10 * four.high and two.same_top < four.same_top - 0.1

# %% [markdown]
# ### Try it yourself
#
# **Predict.** Which is better, 3 bits in groups of 32 with GPTQ, or 4 bits in groups of 128 rounded to nearest? The first is smaller.
#
# Choose; the ring marks your choice and the dotted line everything of the same KL divergence. Nothing is computed anew. The last box
# says what a model of that many billions of weights would take.

# %%
control = lab.StaircaseControl(climbed.points)
control

# %%
for choice in ("rtn int4-g128", "gptq int4-g128", "gptq int3-g32"):
    control.choose(choice)
    assert control.error is None, control.error
display(HTML(control.told), HTML(control.html))

# %% [markdown]
# **Answer.** The larger one: a bit is worth more than a method. But methods are free at run time: GPTQ at 4 bits in groups of 128
# does what rounding to nearest does in groups of 32, which takes 3/8 of a bit more.

# %% [markdown]
# ## 4. Mixed bits
#
# Why should all weights have the same number of bits? Measure what each one costs: round it alone and see how far the model
# moves. Then spend a budget of bytes where it buys most, a knapsack problem.
#
# **Predict.** With the bytes of uniform 3-bit weights to spend on 2, 3 and 4 bits: how much KL divergence will that save?

# %%
looked_at = [calibration[0][:1]]
costs = sensitivity(model, looked_at, schemes=("int2-g32", "int3-g32", "int4-g32"), progress=False)
budget = sum(options["int3-g32"][1] for options in costs.values())
allocation = allocate(costs, budget)
print(allocation)
print(additivity(model, looked_at, costs, allocation))
display(Markdown(words.markdown(lab.cost_rows(costs, allocation.choice, "int3-g32"))))

# %%
uniform = built["gptq int3-g32"]  # from section 3
ours = Recipe((mixed_recipe(allocation, stairs["gptq int3-g32"].steps[-1]),))
mixed = {"gptq, uniform": uniform, "gptq, mixed": compress(model, ours, calibration=calibration, progress=False)}
mixture = lab.results(model, mixed, **measured)
display(Markdown(words.markdown(mixture.rows(against="gptq, uniform"))))
assert mixture.points["gptq, mixed"].nbytes <= mixture.points["gptq, uniform"].nbytes

# %% [markdown]
# **Look.** The first four lines of the upper table are the weights that lose most per byte, the last four those that lose least.
#
# **Answer.** Some twenty per cent: less than a better method saves, but it comes on top.
#
# **Explain.** Values (`v_proj`) and what writes into the hidden states (`down_proj`) are dear, queries cheap. Single losses nearly
# add up (the line `Additivity`: predicted, and measured with all of them rounded), which is what makes the knapsack honest. The
# losses were measured with rounding to nearest, on calibration text; GPTQ profits as well. `Recipe.body("int3-g32", method="gptq",
# budget=3.5)` does all this in one step, with an estimate in place of the measured losses: far quicker on a large model.

# %% [markdown]
# ## 5. Outliers
#
# From some billions of parameters on, a few channels of the hidden states are twenty times and more as large as the rest
# (LLM.int8(), arXiv 2208.07339). Our model is too small for that, so we plant them: six channels that every norm makes 64 times
# as large, and weights that read them 64 times as small.
#
# **Predict.** How far do the logits move? And int8 activations with one scale per token: what is left of the other channels?

# %%
sick = copy.deepcopy(model)
planted = plant_outliers(sick, channels=6, factor=64.0, seed=seed)
with torch.no_grad():
    difference = (model(calibration[0]).logits - sick(calibration[0]).logits).abs().max().item()
print(f"outliers planted behind {len(planted)} norms; the largest difference of a logit is {difference:.1e}")
assert difference < 1e-3
where = "model.layers.1.mlp.gate_proj"
before, after = (calibrate(m, calibration[:1], want=(), progress=False)[where] for m in (model, sick))
sentence = lab.say_channels(before, after)
plots.show(lab.channels_figure(before, after), sentence)
display(Markdown(sentence))

# %% [markdown]
# **Answer.** Not at all: a factor that is a power of two loses nothing in floating point. But a token's largest value now sets the step of
# int8, and all that is left of most channels is a step or two of 127.
#
# Weights in 8 bits with a scale per row, activations in 8 bits with a scale per token ("W8A8"). Three cures:
#
# - **SmoothQuant**: divide each channel by max|x|^½ / max|w|^½ and multiply the weights that read it. The norm before takes the factor.
# - **Rotation**: turn the hidden states by a random orthogonal matrix made of ±1/√n; every channel becomes a mixture of all.
#   (A head that is tied to the embedding needs weights of its own then: 0.5 M more.)
# - **Split** (LLM.int8()): channels that exceed a threshold, here 6, are not rounded: `a8-token-o6`.
#
# **Predict.** Which of the three win back everything? Does the split do as well as the others, or better: it keeps the outliers in
# floating point.

# %%
cures = {"naive": {}, "SmoothQuant": {"before": (Smooth(),)}, "rotation": {"before": (Rotate(seed),)}, "split at 6": {}}
eight = {"a8-token, no outliers": compress(model, Recipe.body("int8-row", activations="a8-token"), progress=False)}
for cure, settings in cures.items():
    recipe = Recipe.body("int8-row", activations="a8-token-o6" if cure == "split at 6" else "a8-token", **settings)
    eight[f"a8-token, {cure}"] = compress(sick, recipe, calibration=calibration, progress=False)
eight["W8 alone, no outliers"] = compress(model, Recipe.body("int8-row"), progress=False)
eight["W8 alone, outliers"] = compress(sick, Recipe.body("int8-row"), progress=False)
outliers = lab.results(model, eight, **measured)
names = [f"a8-token, {cure}" for cure in cures]
display(Markdown(words.markdown(lab.recovery_rows(outliers, "a8-token, no outliers", names[0], names[1:]))))
display(Markdown(words.markdown(outliers.rows(names=["W8 alone, no outliers", "W8 alone, outliers"]))))
assert outliers.points["a8-token, naive"].low > 10 * outliers.points["a8-token, no outliers"].high, "the outliers did no harm"

# %% [markdown]
# **Look.** 100 % is the KL divergence of the same W8A8 model without outliers; more means better than that.
#
# **Answer.** SmoothQuant and rotation win back everything. The split does nearly: what it leaves is what 8-bit *weights* alone lose on
# this model (the last table).
#
# **Explain.** Planting made some weights 64 times as *small*, and one scale per row rounds those to nothing, whatever the activations
# do. The split only looks at activations; the other two change the weights as well. It pays in speed, too: two products in place of
# one, with columns that differ from input to input.
#
# What is planted is a scale, which suits the methods that choose scales. Real outliers are not so clean.
#
# Now 4-bit weights, floating-point activations. In each group a planted column is tiny, and its neighbours set the scale.
#
# **Predict.** Activations are not rounded here. Does the model suffer at all? Does GPTQ alone help, does AWQ?

# %%
four_bits = {"no outliers": compress(model, Recipe.body("int4-g32"), progress=False)}
for name, settings in {
    "naive": {},
    "weighted": {"method": Rtn(mse_grid=32, weighted=True)},
    "GPTQ": {"method": "gptq"},
    "AWQ": {"before": (Smooth("awq"),)},
    "rotation": {"before": (Rotate(seed),)},
}.items():
    four_bits[name] = compress(sick, Recipe.body("int4-g32", **settings), calibration=calibration, progress=False)
weight_only = lab.results(model, four_bits, **measured)
display(Markdown(words.markdown(lab.recovery_rows(weight_only, "no outliers", "naive", ["weighted", "GPTQ", "AWQ", "rotation"]))))
assert weight_only.points["naive"].kld > 2 * weight_only.points["AWQ"].kld

# %% [markdown]
# **Answer.** It suffers: the small columns that read large channels are rounded to nothing. AWQ and rotation win nearly everything back.
#
# **Explain.** AWQ multiplies the columns of large inputs before rounding, and divides the inputs in the norm: what it was made
# for. GPTQ *knows* that these inputs matter, but with the levels that the group's scale allows it can only let other columns answer, and
# a weighted scale has to serve 31 neighbours too. So transforms and codes are no rivals: transform first, then GPTQ.

# %% [markdown]
# ## 6. The table
#
# `compare` makes such tables for papers: each method runs in a process of its own, is saved, loaded again and measured beside
# the others; lines that are done are kept, so that a comparison that was stopped goes on. It also runs *peers*, other tools on the same
# tokens and weights, where they are installed.
#
# **Predict.** The table has a line for each method; here is one, and the original. Which of its columns would change on another machine?

# %%
with tempfile.TemporaryDirectory() as folder:
    settings = {"max_docs": documents, "context": 256, "bootstrap": 500, "progress": False}
    table = compare(model_dir, tokenizer, text["test"], calibration, methods=("hqq",), bits=(4,), out=folder, **settings)
table

# %%
print(table.to_latex())
print("columns of the DataFrame:", ", ".join(table.to_dataframe().columns))
for key, value in table.facts.items():
    if key not in ("model", "machine"):
        print(f"{key}: {value}")

# %% [markdown]
# **Look.** `bits` are those of the rounded weights, `all bits` those of all parameters, embedding included; the MB are read from the disk.
#
# **Answer.** The seconds, which are those of quantizing alone, and the memory. Bits and bytes are counted, and the rest hardly moves.
#
# **Explain.** Whoever reads such a table asks: same text, same weights, same bits? Was the rest of the model in 16 bits? Are intervals
# paired? Each is a fact that the object carries (`table.facts`, `table.report`). On the command line:
#
# ```
# edgelab compare data/edge-dense --methods rtn,mse,hqq,awq,gptq,best --bits 4,3 --out runs/table
# ```
#
# The README has the table of all methods and peers, on far more text than here.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import quantize_lab as lab

print("the weights of exercises 1 and 3:", lab.EXERCISE_GROUP)

# %% [markdown] tags=["exercise"] exercise="rtn-by-hand" difficulty=1 importance=3 minutes=10
# Round the eight weights above to 3 bits by hand, in the signed-maximum form: one scale for all, and eight stored codes 0 .. 7.

# %% tags=["stub"]
scale, codes = None, None  # a number; a list of eight codes

# %% tags=["check"]
lab.check_rtn(scale, codes)

# %% [markdown] tags=["hint"]
# The weight of largest magnitude becomes level −4, so the scale may be negative. A stored code is the level + 4.

# %% [markdown] tags=["expected"]
# A negative scale. One of the weights is clipped.

# %% tags=["solution"]
scale, codes = -0.4, [3, 6, 1, 4, 3, 0, 7, 2]

# %% [markdown] tags=["why"]
# The largest is 1.6, so the scale is 1.6 / −4 = −0.4. `min(max(round(w / -0.4), -4), 3) + 4` gives the codes: −1.5 / −0.4 = 3.75 would be
# level 4, which there is not.

# %% tags=["mutant"]
# max|w| / 3: one code is never used
scale, codes = 1.6 / 3, [4, 2, 5, 3, 4, 6, 0, 5]

# %% tags=["mutant"]
# the sign: 1.6 would need level +4
scale, codes = 0.4, [5, 2, 7, 4, 5, 7, 0, 6]

# %% tags=["mutant"]
# levels, not stored codes
scale, codes = -0.4, [-1, 2, -3, 0, -1, -4, 3, -2]

# %% tags=["mutant"]
# a code that 3 bits cannot hold
scale, codes = -0.4, [3, 6, 1, 4, 3, 0, 8, 2]

# %% tags=["mutant"]
# cut off instead of rounded
scale, codes = -0.4, [4, 5, 1, 4, 3, 0, 7, 2]

# %% [markdown] tags=["exercise"] exercise="effective-bits" difficulty=1 importance=2 minutes=2
# How many effective bits per weight does `uint3-g64` take?

# %% tags=["stub"]
effective_bits = None

# %% tags=["check"]
lab.check_bits(effective_bits)

# %% [markdown] tags=["hint"]
# Scales and offsets are float16.

# %% [markdown] tags=["expected"]
# More than three, less than four.

# %% tags=["solution"]
effective_bits = 3 + (16 + 16) / 64

# %% [markdown] tags=["why"]
# So says `QuantScheme.parse("uint3-g64").bits_per_weight((64, 128))`. Without the offset it would be 3.25.

# %% tags=["mutant"]
# no offset
effective_bits = 3 + 16 / 64

# %% tags=["mutant"]
# the codes alone
effective_bits = 3

# %% tags=["mutant"]
# float32
effective_bits = 3 + (32 + 32) / 64

# %% tags=["mutant"]
# scale, offset and a zero point
effective_bits = 3 + 3 * 16 / 64

# %% [markdown] tags=["exercise"] exercise="rtn-of-a-group" difficulty=2 importance=3 minutes=10
# Exercise 1 as a function, for any number of bits: the scale in the signed-maximum form and the stored codes of one group of weights. Of
# a group of zeros the scale is 0 and each code that of zero.


# %% tags=["stub"]
def rtn(group, bits):
    """(scale, codes) of `group`, a float array: a number, and an array of whole numbers 0 .. 2**bits - 1."""
    ...


# %% tags=["check"]
lab.check_rtn_function(rtn)

# %% [markdown] tags=["hint"]
# `group[np.abs(group).argmax()]` is the weight of largest magnitude with its sign; divide it by −2^(b−1). Then `np.rint`, `np.clip`, and
# add 2^(b−1).

# %% [markdown] tags=["expected"]
# For the eight weights and 3 bits: −0.4 and 3 6 1 4 3 0 7 2.


# %% tags=["solution"]
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = group[np.abs(group).argmax()] / -half
    if scale == 0:
        return 0.0, np.full(len(group), half)
    return scale, np.clip(np.rint(group / scale), -half, half - 1) + half


# %% tags=["mutant"]
# |w|, whose scale is never negative
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = np.abs(group).max() / half
    if scale == 0:
        return 0.0, np.full(len(group), half)
    return scale, np.clip(np.rint(group / scale), -half, half - 1) + half


# %% tags=["mutant"]
# max|w| / (2^(b-1) - 1): wastes a code
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = np.abs(group).max() / (half - 1)
    if scale == 0:
        return 0.0, np.full(len(group), half)
    return scale, np.clip(np.rint(group / scale), -half, half - 1) + half


# %% tags=["mutant"]
# no clipping
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = group[np.abs(group).argmax()] / -half
    if scale == 0:
        return 0.0, np.full(len(group), half)
    return scale, np.rint(group / scale) + half


# %% tags=["mutant"]
# levels instead of stored codes
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = group[np.abs(group).argmax()] / -half
    if scale == 0:
        return 0.0, np.full(len(group), half)
    return scale, np.clip(np.rint(group / scale), -half, half - 1)


# %% tags=["mutant"]
# zeros are divided by zero
def rtn(group, bits):
    half = 2 ** (bits - 1)
    scale = group[np.abs(group).argmax()] / -half
    return scale, np.clip(np.rint(group / scale), -half, half - 1) + half


# %% [markdown] tags=["exercise"] exercise="gptq-by-hand" difficulty=3 importance=3 minutes=15
# A row of two weights, both 0.6; levels are the whole numbers; the inputs have H = [[4, 1], [1, 2]]. GPTQ rounds the first weight to 1:
# its error is e₀ = 1 − 0.6 = 0.4. To which value does it *update* the second weight before rounding it, and to which level is that
# rounded?

# %% tags=["stub"]
updated, level = None, None

# %% tags=["check"]
lab.check_gptq(updated, level)

# %% [markdown] tags=["hint"]
# With e₀ fixed, which e₁ makes 4 e₀² + 2 e₀ e₁ + 2 e₁² least? The second weight is then rounded as near to 0.6 + e₁ as the levels allow.

# %% [markdown] tags=["expected"]
# The second weight comes down, and is rounded to another level than it would be alone.

# %% tags=["solution"]
updated, level = 0.6 - 0.4 / 2, 0

# %% [markdown] tags=["why"]
# The derivative 2 e₀ + 4 e₁ = 0 gives e₁ = −e₀ / 2 = −0.2, so the target is 0.4, which is rounded to 0. The loss is 4 · 0.16 − 2 · 0.4 ·
# 0.6 + 2 · 0.36 = 0.88. Rounding both to nearest (1 and 1) makes it 1.28. The second weight alone got worse: 0.6 away from its level
# instead of 0.4. That is section 1 in one line.

# %% tags=["mutant"]
# the sign: goes up with the first
updated, level = 0.8, 1

# %% tags=["mutant"]
# divides by H of the first weight
updated, level = 0.5, 0

# %% tags=["mutant"]
# the whole error
updated, level = 0.2, 0

# %% tags=["mutant"]
# no update: rounding to nearest
updated, level = 0.6, 1

# %% tags=["mutant"]
# the update is forgotten when it is rounded
updated, level = 0.4, 1

# %% [markdown] tags=["exercise"] exercise="gptq-one-column" difficulty=3 importance=2 minutes=15
# Now the step as a function, for any number of weights: the first weight of a row became `rounded`. Return the others, updated so that
# the error that inputs see, e H eᵀ, is as small as it can be.


# %% tags=["stub"]
def update(row, h, rounded):
    """The weights row[1:], updated (an array); `row` has n weights, `h` is n x n."""
    ...


# %% tags=["check"]
lab.check_column(update)

# %% [markdown] tags=["hint"]
# Set the derivative of e H eᵀ by the other errors to zero: h[1:, 1:] e = −h[1:, 0] e₀, with e₀ = rounded − row[0]. `np.linalg.solve` does
# the rest.

# %% [markdown] tags=["expected"]
# For exercise 4's numbers one weight, 0.4.


# %% tags=["solution"]
def update(row, h, rounded):
    return row[1:] - np.linalg.solve(h[1:, 1:], h[1:, 0]) * (rounded - row[0])


# %% [markdown] tags=["why"]
# The published form takes row 0 of the inverse of h: `row[1:] + (rounded - row[0]) * inverse[0, 1:] / inverse[0, 0]` is the same.


# %% tags=["mutant"]
# each answers by itself, as if the others were fixed
def update(row, h, rounded):
    return row[1:] - h[1:, 0] / np.diag(h)[1:] * (rounded - row[0])


# %% tags=["mutant"]
# the sign
def update(row, h, rounded):
    return row[1:] + np.linalg.solve(h[1:, 1:], h[1:, 0]) * (rounded - row[0])


# %% tags=["mutant"]
# divides by the rounded weight's own h
def update(row, h, rounded):
    return row[1:] - h[1:, 0] / h[0, 0] * (rounded - row[0])


# %% tags=["mutant"]
# h itself where its inverse belongs
def update(row, h, rounded):
    return row[1:] - (rounded - row[0]) * h[0, 1:] * h[0, 0]


# %% tags=["mutant"]
# no update: rounding to nearest
def update(row, h, rounded):
    return row[1:]


# %% [markdown]
# ## What would change on your model
#
# Names and patience. Calibrate on text like that which your model will see; some 128 rows of 2,048 tokens are usual for models of
# billions of parameters:
#
# ```python
# model, tokenizer = load("Qwen/Qwen3-0.6B"), load_tokenizer("Qwen/Qwen3-0.6B")   # needs a network, once
# batches = data.calibration_batches(tokenizer, your_text, tokens=262_144, context=2048)
# small = compress(model, Recipe.body("int4-g128", method="gptq"), calibration=batches, inplace=True)
# ```
#
# For a mixture of experts look at `small.remarks`: experts that few calibration tokens reached borrow statistics from the others, and
# the remark says which. For activations in 8 bits put `Smooth()` or `Rotate()` first. Learnt rounding (`AutoRound`) takes longer and is
# worth it at 3 bits and below.
