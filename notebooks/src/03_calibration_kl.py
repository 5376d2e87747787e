# %% [markdown]
# # 03 · Calibration: where to cut
#
# **Claim: no one rule on a histogram finds the best range of all activations. KL divergence, the classic of
# 8-bit inference, keeps the shape of the distribution and cuts off the few huge values in which a language model keeps
# meaning; on this model, as it is, it does more harm than all other rules. What helps is to measure.**
#
# After this notebook you can
#
# 1. work out TensorRT's entropy calibration by hand,
# 2. say what *max*, *percentile*, *squared error* and *KL* each keep and give up,
# 3. read from a threshold its step, what it clips, and what it does to the model's next word,
# 4. find out whose values are clipped, and whose clipping does the harm,
# 5. let the measured effect choose a rule for each tensor, and judge static 8-bit models with it,
# 6. say what smoothing changes about all this.
#
# *Before you start*: [00, start here](00_start_here.ipynb), and what int8 activations are, from
# [02](02_quantized_matmul.ipynb). *Takes* about a minute on two cores and 2 GB of memory. Every cell may be run again. Figures
# belong to the model and to the text of your Python installation; they move a little with it.

# %%
import copy

import numpy as np
from IPython.display import HTML, Markdown, display

from edgelab import Recipe, clip_lab, compress, corpus, data, plots, words
from edgelab.blocks import calibrate
from edgelab.evaluate import measure, summarise
from edgelab.kernels.histogram import add, empty, kl_threshold
from edgelab.methods.clip import RULES, threshold
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.ranges import STATIC, apply_activations, model_klds, static_ranges
from edgelab.scheme import ActScheme
from edgelab.transforms import plant_outliers, rotate, smooth

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a Hugging Face causal language model
tensor_name = "model.layers.0.mlp.down_proj"  # the weight whose inputs are looked at
calibration_tokens = 8192
effect_tokens = 1024  # on which effects are measured
documents = {"prose": 6, "code": 6, "assistant": 40, "arithmetic": 60}  # of the test split
seed = 0

# %%
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = corpus()
batches = data.calibration_batches(tokenizer, text["calibration"], tokens=calibration_tokens, context=256, batch=8, seed=seed)
tensor = clip_lab.Tensor(model, tensor_name, batches[0], batches[1][:4])  # a row of each domain
print(f"{sum(b.numel() for b in batches):,} tokens of calibration text; {tensor.values.size:,} values of {tensor_name}")

# %% [markdown]
# ## 1. A histogram of what a layer multiplies
#
# *Static* quantization rounds a layer's inputs to int8 with one step that was fixed beforehand: step = threshold / 127. What
# lies beyond the threshold is clipped to it. To choose a threshold we need to know what the inputs are like, so we run some
# text through the model and count them in 2,048 bins.
#
# **Predict.** Values of a normal distribution rarely exceed four times their root mean square. The largest of these: 4, 10
# or 40 times?

# %%
display(Markdown(words.markdown(tensor.shape_rows())))
sentence = clip_lab.say_thresholds(tensor)
plots.show(clip_lab.histogram_figure(tensor), sentence)
display(Markdown(sentence))

# %% [markdown]
# **Answer.** 36 times.
#
# **Explain.** The layer multiplies act(gate) × up, and a product of two roughly normal numbers has a heavy tail. If the
# largest value sets the step, half of all values lie below a third of one step: to int8 they are zero. If we cut the tail, the
# step is finer and the largest values are wrong. Four rules weigh the two, and the marks show that they do not agree.

# %% [markdown]
# ## 2. TensorRT's rule, by hand
#
# "Entropy calibration" asks how much *information* about the distribution is lost. For each candidate, i bins kept:
#
# - **P**: the first i bins, with all outliers added to the last of them (clipping puts them there);
# - **Q**: the first i bins *without* the outliers, merged into as many levels as there are codes, each level's count spread
#   evenly over its nonzero bins (codes can tell no more);
# - the loss is KL(P || Q) = Σ P ln(P / Q). The least wins; the threshold is (i + ½) bin widths.
#
# Eight bins, four levels.
#
# **Predict.** The bins are 20 8 6 4 0 2 3 1. Will the rule keep all eight?

# %%
counts = np.array([20, 8, 6, 4, 0, 2, 3, 1])
display(Markdown(words.markdown(clip_lab.hand_rows(counts, levels=4))))
found = kl_threshold(counts, width=1.0, levels=4, zero_bin="keep")
print(f"the kernel says: threshold {found.threshold}, divergences {np.round(found.curve, 4).tolist()}")

# %% [markdown]
# **Look.** Five bins are out of the question: the fifth is empty, so outliers would lie in P where Q has nothing, and KL is
# infinite. Take the line with 6 bins kept: 3 + 1 = 4 outliers make the last bin of P 2 + 4 = 6. Four levels over six bins
# hold 2, 1, 2 and 1 of them: 20 + 8 become 14 + 14; 4 + 0 stay 4 and 0, since an empty bin gets nothing.
#
# **Answer.** No: the least divergence is that of four bins, where every level is one bin and nothing but the outliers is lost.
#
# **Explain.** Two forces: fewer bins make finer levels, more bins make fewer outliers. Note what does *not* count: how far
# away an outlier lies. In P it moves to the last bin, whether it was one bin further or a thousand. For a picture's
# edges that is wise; for a language model we shall see.

# %% [markdown]
# **The first control that must fail: too few bins.** With as many bins as levels there is one candidate, the maximum, and
# nothing is searched. Some tools do this by default and still call the result entropy calibration.

# %%
coarse = add(empty(bins=128, top=2 * tensor.maximum), tensor.values)
try:
    threshold(coarse, "kl")
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("128 bins and 128 levels leave nothing to search")

# %% [markdown]
# ## 3. Four rules on one tensor
#
# **Predict.** Which of the two curves has its least further left, KL or the squared error?

# %%
plots.show(clip_lab.curves_figure(tensor), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(tensor.rule_rows())))

# %% [markdown]
# **Look.** Every row of the table rounds the inputs of this one layer and leaves the rest of the model alone. The last column
# is the truth that matters: how far the distribution of the next word moved.
#
# **Answer.** KL, by far.
#
# **Explain.** The column of the histogram's KL is least for "kl", that of the squared error for "mse": each rule is best by its own
# measure. The model's own divergence agrees with KL least of all. A clipped value loses its distance to the threshold,
# and the squared error counts that; KL counts heads.

# %% [markdown]
# ## 4. Try it yourself
#
# **Predict.** From the maximum downwards the model first gets better (a finer step), then worse. Where does it turn?
#
# Each threshold is computed and measured anew, in well under a second.

# %%
control = clip_lab.ThresholdControl(tensor, start=tensor.ranges["mse"].threshold)
control

# %%
for share in (1.0, 0.85, 0.7, 0.6, 0.5, 0.35, 0.25, 0.15):
    control.choose(share * tensor.maximum)
    assert control.error is None, control.error
sentence = "KL of the model at each threshold tried: the numbers are in the table below."
plots.show(control.static(), sentence)
display(HTML(control.told), HTML(control.html))
best = min(tensor.costs.values(), key=lambda c: c.kld)
print(f"least: {best.kld:.3g} nats at {best.threshold:.3g}, {best.threshold / tensor.maximum:.0%} of the maximum")
assert best.kld < tensor.at(tensor.ranges["kl"].threshold).kld / 3

# %% [markdown]
# **Answer.** It turns where hardly anything is clipped, at about four fifths of the maximum and one value in 17,000. KL's threshold
# lies far to the left, on the steep side.

# %% [markdown]
# ## 5. Where KL ruins a language model
#
# KL's threshold clips one value in 400. **Predict.** Whose: those of the first position, to which all others attend
# when they look for nothing (an *attention sink*), those of a few kinds of tokens, or everybody's? And whose clipping hurts?

# %%
cut = tensor.ranges["kl"].threshold
print(f"the tokens with most values beyond {cut:.4g}, in the calibration text:")
display(Markdown(words.markdown(tensor.clipped_tokens(tokenizer, cut))))
print("and the model's divergence when only some positions are clipped (and nothing is rounded):")
display(Markdown(words.markdown(tensor.blame(tokenizer, cut))))

# %% [markdown]
# **Answer.** Nearly everybody's. The first position does harm far beyond its share, and the most is done by all others together.
#
# **Explain.** The first position has the largest values of all in this layer: a *massive activation*, as found in large models
# (Sun et al. 2024, arXiv 2402.17762). There it is the main suspect; here it is convicted of a small part only, and we would not
# have known without clipping each group alone. The rest is the nature of the layer: act(gate) × up is near zero unless
# a neuron has something to say, and then it is large. Each such value is rare, and nearly every token has one, at another
# neuron: every "1" and every "+" does. In the table of section 3 the clipped values are a quarter of a per cent of all and hold
# a sixth of the squared size. Rare, large and meaningful: that is what a count of values cannot tell.
#
# Now all tensors, each rounded alone: the effect is the squared error of its decoder block's output over the output's squared size,
# averaged over tokens.
#
# **Predict.** In how many of the tensors has KL the least effect of all four rules?

# %%
stats = calibrate(model, batches, want=("histogram",), progress=False)
ranges = static_ranges(model, stats, batches, tokens=effect_tokens, progress=False)
sentence = clip_lab.say_effects(ranges)
plots.show(clip_lab.effects_figure(ranges), sentence)
display(Markdown(sentence))
print("threshold (effect) by each rule; the tensors that lose most:")
display(Markdown(words.markdown(clip_lab.effect_rows(ranges))))
print(ranges)

# %% [markdown]
# **Look.** The last line is the second test: all tensors rounded at once, each by its own best rule or all by the same,
# and the divergence of the whole model. Whichever is least is taken: on this text no single rule is better than the choice.
#
# **Explain.** For most tensors the rules hardly differ, and KL is as good as any. It is the few others that decide, above all
# what `down_proj` and the compressed keys and values (`kv_b_proj`) read.
#
# **Predict.** Weights in 8 bits with one scale per row, all inputs of the decoder in static 8 bits: which rule keeps the
# sums of two numbers (*arithmetic*) right?

# %%
weights8 = compress(model, Recipe.body("int8-row"), progress=False).model
models = {"fp": model, "weights only": weights8, "per token": copy.deepcopy(weights8)}
apply_activations(models["per token"], ActScheme.parse("a8-token"), names=list(ranges))  # a scale for each token, at run time
for name, scales in {"best": ranges, **{rule: ranges.throughout(rule) for rule in RULES}}.items():
    models[name] = copy.deepcopy(weights8)
    apply_activations(models[name], STATIC, scales)
measured = measure(models, tokenizer, text["test"], max_docs=documents, progress=False)
report = summarise(measured, resamples=500, seed=seed)
display(Markdown(words.markdown(words.table(report, ["kld", "ln_ppl_ratio", "exact_match"]))))
right = {name: report.get(model=name, metric="exact_match", slice="arithmetic").value for name in models}
assert right["kl"] < right["best"], "KL did no harm: is this another model?"

# %% [markdown]
# **Answer.** All but KL, which loses about one sum in four. The tokens of a sum, digits, "+" and "=", were among those most clipped.
#
# **Explain.** Between fp and "weights only" lies what int8 weights cost, next to nothing. "Per token" takes the step from each
# token's own largest value, which a static scheme cannot: the outlier of one token no longer coarsens the others. That is
# the price of static ranges, and better thresholds cannot pay it; the next section can, in part.

# %% [markdown]
# ## 6. What smoothing changes
#
# If some *channels* are larger than others, divide them by their size and multiply the weights that read them (SmoothQuant). The
# function stays the same and the histogram gets shorter. `pairs=True` does so between `up` and `down` too. A rotation of the
# residual stream spreads what is large over all channels. And `plant_outliers` does the opposite, for
# this small model lacks what models of billions of parameters have: channels 64 times as large as the others.
#
# **Predict.** Will the KL rule be harmless on the smoothed model?

# %%
variants = {"as it is": model}
for name in ("smoothed", "rotated and smoothed", "outliers planted"):
    variants[name] = changed = copy.deepcopy(model)
    if name == "outliers planted":
        plant_outliers(changed)
        continue
    if name.startswith("rotated"):
        rotate(changed, seed)
    smooth(changed, calibrate(changed, batches, want=(), progress=False), alpha=0.9, pairs=True)
klds = {}
for name, changed in variants.items():
    its = static_ranges(changed, calibrate(changed, batches, want=("histogram",), progress=False), batches, "max", progress=False)
    klds[name] = model_klds(changed, {rule: its.throughout(rule) for rule in RULES}, [batches[-1][:4]])
display(Markdown(words.markdown(clip_lab.variant_rows(klds))))
assert min(klds["smoothed"].values()) < min(klds["as it is"].values()) < min(klds["outliers planted"].values()) / 5

# %% [markdown]
# **Look.** Nats per token, activations rounded, weights in floating point; the floating-point models of all four lines give the
# same answers.
#
# **Answer.** No. The other rules come close to one another, since there is little left to clip, and lose several times
# less than before; KL still clips.
#
# **Explain.** Smoothing takes away differences between channels, not between tokens: what a neuron says is still rare and still
# large.
#
# The last line turns the tables: with outliers planted, KL is the *best* of the four. The planted channels are so large that
# a range which holds them rounds all others to nothing; giving a few channels up is the lesser evil. All four ruin the model
# all the same. What helps there is no threshold but smoothing, which takes the outliers back.
#
# So when does KL help? Where what is clipped can be spared: when a few channels drown all others, and where values are many and
# none of them matters alone. In many of the tensors above it is as good as any, and it was made for pictures (convolutional
# networks). It must not clip where a rare value is a message. The histogram does not show the difference, and to measure it
# takes a minute.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import clip_lab

# %% [markdown] tags=["exercise"] exercise="bins-kept" difficulty=1 importance=3 minutes=5
# By hand: the bins 4 2 1 3 and two levels. How many bins does the rule of section 2 keep?

# %% tags=["stub"]
bins_kept = None

# %% tags=["check"]
clip_lab.check_bins_kept(bins_kept)

# %% [markdown] tags=["hint"]
# There are three candidates; section 2 has the recipe. Shares before KL: P and Q are divided by their sums.

# %% [markdown] tags=["expected"]
# One of 2, 3 and 4.

# %% tags=["solution"]
bins_kept = 4

# %% [markdown] tags=["why"]
# KL is 0.148 with two bins, 0.232 with three, 0.086 with four.

# %% tags=["mutant"]
# as many as levels: nothing is merged
bins_kept = 2

# %% tags=["mutant"]
# one less than all, as in the slides' loop
bins_kept = 3

# %% tags=["mutant"]
# fewer bins than levels
bins_kept = 1

# %% tags=["mutant"]
# counts the bins that are cut off
bins_kept = 0

# %% tags=["mutant"]
# the divergence, not the number of bins
bins_kept = 0.086

# %% [markdown] tags=["exercise"] exercise="int8-step" difficulty=1 importance=2 minutes=1
# The threshold is 6.35. How large is the step of int8?

# %% tags=["stub"]
step = None

# %% tags=["check"]
clip_lab.check_step(step)

# %% [markdown] tags=["hint"]
# The codes run from −127 to 127.

# %% [markdown] tags=["expected"]
# The threshold is a whole number of steps away from zero.

# %% tags=["solution"]
step = 6.35 / 127

# %% tags=["mutant"]
# 128 codes below zero are not used here
step = 6.35 / 128

# %% tags=["mutant"]
# 255 steps, one too many
step = 12.7 / 255

# %% tags=["mutant"]
# the whole range has the threshold twice
step = 6.35 / 255

# %% tags=["mutant"]
# a number of bits is no number of steps
step = 6.35 / 8

# %% tags=["mutant"]
# upside down: codes per unit
step = 127 / 6.35

# %% [markdown] tags=["exercise"] exercise="clip-or-keep" difficulty=3 importance=3 minutes=10
# 100,000 values, all within ±4 but one, which is 60. What is the mean squared error from *clipping* it at 4, and that of the rounding if
# the threshold is 60?

# %% tags=["stub"]
error_of_clipping, error_of_keeping = None, None

# %% tags=["check"]
clip_lab.check_costs(error_of_clipping, error_of_keeping)

# %% [markdown] tags=["hint"]
# A rounding error is spread evenly over a step; its mean square is step² / 12.

# %% [markdown] tags=["expected"]
# The second is smaller, but not by much.

# %% tags=["solution"]
error_of_clipping, error_of_keeping = 56**2 / 100_000, (60 / 127) ** 2 / 12

# %% [markdown] tags=["why"]
# 0.031 and 0.019: the squared error keeps the outlier. KL would cut it, since it is one value in 100,000.

# %% tags=["mutant"]
# loses all of the outlier
error_of_clipping, error_of_keeping = 60**2 / 100_000, (60 / 127) ** 2 / 12

# %% tags=["mutant"]
# a step of 60 / 128: the code -128 is not used
error_of_clipping, error_of_keeping = 56**2 / 100_000, (60 / 128) ** 2 / 12

# %% tags=["mutant"]
# every value is off by a whole step
error_of_clipping, error_of_keeping = 56**2 / 100_000, (60 / 127) ** 2

# %% tags=["mutant"]
# 255 steps from -60 to 60, one too many
error_of_clipping, error_of_keeping = 56**2 / 100_000, (120 / 255) ** 2 / 12

# %% tags=["mutant"]
# one for the other
error_of_clipping, error_of_keeping = (60 / 127) ** 2 / 12, 56**2 / 100_000

# %% [markdown] tags=["exercise"] exercise="kl-of-a-candidate" difficulty=3 importance=2 minutes=20
# Write the rule of section 2 for one candidate: KL(P || Q) in nats when `kept` of the bins in `counts` (whole numbers) are kept and
# merged into `levels` levels. Bin j goes to level `j * levels // kept`. Where Q is zero and P is not, KL is infinite.


# %% tags=["stub"]
def divergence(counts, kept, levels):
    """KL(P || Q) in nats, a number; `counts` is an array of whole numbers, `kept` of which are kept."""
    ...


# %% tags=["check"]
clip_lab.check_divergence(divergence)

# %% [markdown] tags=["hint"]
# P: a copy of the first bins as floats, the rest of the counts added to the last. Q: for each level the sum of its bins *without*
# outliers, shared by those of its bins that are not empty. Divide both by their sums, and leave out the bins where P is zero.

# %% [markdown] tags=["expected"]
# For 4 2 1 3 and two levels: 0.148 with two bins kept, 0.232 with three, 0.086 with four.


# %% tags=["solution"]
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    for k in range(levels):
        filled = (level == k) & (counts[:kept] > 0)
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    if (q[there] == 0).any():
        return np.inf
    return np.sum(p[there] * np.log(p[there] / q[there]))


# %% tags=["mutant"]
# outliers go into Q, too
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    counts = p
    for k in range(levels):
        filled = (level == k) & (counts[:kept] > 0)
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    if (q[there] == 0).any():
        return np.inf
    return np.sum(p[there] * np.log(p[there] / q[there]))


# %% tags=["mutant"]
# a bin counts as filled when P has something there, outliers included
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    for k in range(levels):
        filled = (level == k) & (p > 0)
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    if (q[there] == 0).any():
        return np.inf
    return np.sum(p[there] * np.log(p[there] / q[there]))


# %% tags=["mutant"]
# empty bins get their share of a level
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    for k in range(levels):
        filled = level == k
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    if (q[there] == 0).any():
        return np.inf
    return np.sum(p[there] * np.log(p[there] / q[there]))


# %% tags=["mutant"]
# KL(Q || P)
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    for k in range(levels):
        filled = (level == k) & (counts[:kept] > 0)
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = (q > 0) & (p > 0)
    return np.sum(q[there] * np.log(q[there] / p[there]))


# %% tags=["mutant"]
# leaves out what would be infinite
def divergence(counts, kept, levels):
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    q = np.zeros(kept)
    for k in range(levels):
        filled = (level == k) & (counts[:kept] > 0)
        if filled.any():
            q[filled] = counts[:kept][level == k].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    there = (p > 0) & (q > 0)
    return np.sum(p[there] * np.log(p[there] / q[there]))


# %% [markdown]
# ## What would change on your model
#
# Everything and nothing: other tensors, other outliers, the same procedure. A recipe does it in one line, with the effect measured
# per tensor (`ranges="best"`), or with one rule throughout:
#
# ```python
# recipe = Recipe.body("int8-row", activations="a8-static", ranges="best")
# small = compress(model, recipe, calibration=batches)      # batches of your own text
# ```
#
# Larger models have larger outliers: look at `down_proj`, and at the first position. If the best static model loses too much,
# smooth before (`Smooth`), or let each token have its own scale (`activations="a8-token"`), which costs a pass over the
# inputs at run time and needs no calibration at all.
