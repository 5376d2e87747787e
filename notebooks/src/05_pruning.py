# %% [markdown]
# # 05 · Pruning: zeros, channels, heads, blocks
#
# **Claim: a zero is cheap to make and hard to sell. Half of the weights can go and the model still works, but in 16 bits the half that is
# left takes twice the bytes of all of them in int4, which loses less; and a dense product multiplies by zeros as fast as by anything
# else. What makes a model faster is a smaller shape, and that costs more.**
#
# After this notebook you can
#
# 1. say by what magnitude, Wanda and SparseGPT choose, and what SparseGPT does besides,
# 2. compare them on a whole model, at free and at 2:4 patterns,
# 3. compute from which share of zeros a sparse form is smaller than int4, and tell a kernel that gains from one that does not,
# 4. cut channels, heads and blocks, with repair, and hold arithmetic against the clock,
# 5. say what dynamic channel pruning can save at most,
# 6. judge an article that promises "40 % less compute by pruning".
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb) for recipes and KL divergence; [04](04_quantize_a_model.ipynb), section 1,
# for the error that inputs see. *Takes* a minute and a half on two cores and 2 GB of memory. Every cell may be run again. Few documents are
# read, so that it is quick: intervals are wide.

# %%
from functools import partial

import torch
from IPython.display import HTML, Markdown, display

from edgelab import Recipe, compress, corpus, data, plots, words
from edgelab import prune_lab as lab
from edgelab.blocks import calibrate
from edgelab.model import load, load_tokenizer, weights
from edgelab.paths import data_dir
from edgelab.recipe import DropLayers, FineTune, Prune, PruneChannels, PruneHeads, SkipChannels
from edgelab.sparsify import storage_table
from edgelab.structure import block_influence, shrink

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-dense")  # any folder with a Hugging Face causal language model
weight_name = "model.layers.2.mlp.up_proj"  # the matrix of section 1
calibration_tokens = 4096
documents = {"prose": 3, "code": 3, "assistant": 12, "arithmetic": 12}  # of the test split
rounds = 7  # of each timing
l1_steps = 20  # of section 6
seed = 0

# %%
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = corpus()
calibration = data.calibration_batches(tokenizer, text["calibration"], tokens=calibration_tokens, context=256, seed=seed)
measured = {"tokenizer": tokenizer, "test": text["test"], "max_docs": documents, "seed": seed}  # the same for every section
weight = next(w for w in weights(model) if w.name == weight_name).tensor.detach()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {sum(b.numel() for b in calibration):,} tokens of calibration text")

# %% [markdown]
# ## 1. One matrix, three ways to choose zeros
#
# - **magnitude**: the smallest |w| of the matrix go.
# - **Wanda**: the smallest |w| · |x| of each output row, where |x| is the norm of the weight's input over calibration tokens.
# - **SparseGPT**: what costs least once the other weights have answered, and these *are changed*, to make good what was lost.
#
# *2:4* means that of every four neighbours two stay: a pattern that some GPUs multiply faster.
#
# **Predict.** All take half of the weights. Which has the least error if all weights count alike, and which the least that inputs
# see? Is 2:4 as good as a free choice?

# %%
stats = calibrate(model, calibration, want=("xx",), progress=False)
xx = stats[weight_name].xx
found = [lab.zeroed(weight, xx, method, pattern) for pattern in ("unstructured", "2:4") for method in lab.METHODS]
sentence = lab.say_masks(found)
plots.show(lab.mask_figure(found), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([z.row for z in found])))
free = {z.method: z for z in found[:3]}
assert free["sparsegpt"].seen < free["wanda"].seen and free["magnitude"].equal < free["sparsegpt"].equal

# %% [markdown]
# **Look.** Each band is the same corner of the matrix; a square is a weight that stays. The masks look alike, and mostly are.
#
# **Answer.** Magnitude errs least where all weights count alike, by construction; SparseGPT least as the inputs see it. At 2:4 every
# method is worse: of three large neighbours one has to go.
#
# **Explain.** SparseGPT's gain is not a better choice, but the answer of those that stay. Its mask without that answer (the second line
# of the next table) errs about as much as Wanda's.
#
# **The first control that must fail: other inputs.** SparseGPT is given an H whose inputs were shuffled. Were it as good with
# that, calibration would be a ritual.

# %%
shuffled = torch.randperm(len(xx), generator=torch.Generator().manual_seed(seed))
wrong = lab.zeroed(weight, xx[shuffled][:, shuffled], "sparsegpt")
wrong = lab.Zeroed("sparsegpt, inputs shuffled", "unstructured", wrong.values, *lab.matrix_errors(weight, wrong.values, xx))
alone = torch.where(free["sparsegpt"].values == 0, 0.0, weight)
alone = lab.Zeroed("sparsegpt's mask, weights as they were", "unstructured", alone, *lab.matrix_errors(weight, alone, xx))
display(Markdown(words.markdown([z.row for z in (free["sparsegpt"], alone, wrong)])))
assert wrong.seen > free["sparsegpt"].seen, "SparseGPT gains from an H that is not this matrix's"

# %% [markdown]
# ## 2. The whole model
#
# `Prune` sets the weights of the decoder blocks to zero; embedding, head and norms stay. Wanda and SparseGPT go block by block, each
# calibrated on what the pruned blocks before it put out.
#
# **Predict.** From 50 % to 75 % zeros: does the KL divergence double, or grow tenfold? How large is the gain of SparseGPT over
# magnitude, compared with that step?

# %%
settings = {"25%": (0.25, "unstructured"), "50%": (0.5, "unstructured"), "75%": (0.75, "unstructured"), "2:4": (0.5, "2:4")}
made = {
    f"{method} {setting}": compress(model, Recipe((Prune(share, method=method, pattern=pattern),)), calibration=calibration, progress=False)
    for setting, (share, pattern) in settings.items()
    for method in lab.METHODS
}
zeros = lab.results(model, made, **measured)
sentence = lab.say_zeros(zeros, list(settings))
plots.show(lab.zeros_figure(zeros.points), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(zeros.rows(against="magnitude 50%"))))
assert zeros.ratio("sparsegpt 50%", "magnitude 50%")[0] < 1

# %% [markdown]
# **Look.** The paired column draws the same documents for both models: that is why it can tell methods whose intervals overlap.
#
# **Answer.** About tenfold: the axis is logarithmic. The best method takes off a fifth to a quarter of the loss here; the last quarter of
# zeros adds far more than any method takes off.
#
# **Explain.** The first half of the zeros falls on weights that say little; what the last quarter takes are weights that the others can't
# replace, whichever they are chosen by.
#
# Those are few documents, and few calibration tokens. The same with eight times as many tokens to calibrate on, on ten times the
# documents, and for the mixture of experts. Wanda and SparseGPT gain by it, most of all at 2:4; magnitude sees no data. Read methods, not
# digits, across the two tables.

# %%
sentence, rows = lab.study("zeros")
display(Markdown(sentence))
if rows:
    display(Markdown(words.markdown(rows)))

# %% [markdown]
# ### Try it yourself
#
# **Predict.** Which is the best of those that are no larger than `magnitude 75%`?
#
# Choose; the ring marks your choice. Nothing is computed anew.

# %%
control = lab.ZerosControl(zeros.points)
control

# %%
for choice in ("magnitude 75%", "sparsegpt 75%", "wanda 2:4"):
    control.choose(choice)
    assert control.error is None, control.error
display(HTML(control.told), HTML(control.html))

# %% [markdown]
# ## 3. Does sparsity pay?
#
# A zero that is stored takes as much as any number. To leave it out, one has to say *where* it was: a bit per place (bitmap), an index
# per value (CSR), or two bits per value (2:4).
#
# **Predict.** Half of the weights are zero. In 16 bits, how do the bytes of what is left compare with all of them in int4?

# %%
tables = {name: storage_table(made[name].model) for name in ("sparsegpt 50%", "sparsegpt 2:4", "sparsegpt 75%")}
display(Markdown(words.markdown(lab.storage_rows(tables))))
sentence = lab.say_bytes()
plots.show(lab.bytes_figure(), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(lab.break_even_rows())))

# %% [markdown]
# **Look.** Dashed lines are dense. A cross marks where a sparse form becomes as small as dense int4. (The table above has CSR
# smaller than the line: inputs of up to 256 need one byte as an index.)
#
# **Answer.** Twice the bytes. Beyond 78 % zeros a bitmap of float16 wins, and there this model is ruined. Zeros *and* codes
# combine: at 50 % a bitmap of int4 codes has 3.5 bits per weight. But so does dense int3. Which is better?

# %%
pair = {
    "50 % zeros, the rest int4-g32": Recipe.body("int4-g32", before=(Prune(0.5, method="sparsegpt"),), method="gptq"),
    "no zeros, int3-g32": Recipe.body("int3-g32", method="gptq"),
}
pair = {name: compress(model, recipe, calibration=calibration, progress=False) for name, recipe in pair.items()}
against = lab.results(model, pair, **measured)
first, second = pair
value, low, high = against.ratio(first, second)
bitmap = next(row for row in tables["sparsegpt 50%"] if row.format == "bitmap int4-g32").bits_per_weight
rows = [
    {"model": name, "bits per weight (counted)": f"{b:.2f}", "KLD, nats per token (measured)": f"{against.points[name].kld:.3g}"}
    for name, b in ((first, bitmap), (second, 3.5))
]
display(Markdown(words.markdown(rows)))
print(f"KLD of the first over that of the second, paired: {value:.1f} [{low:.1f}, {high:.1f}]")

# %% [markdown]
# **Answer.** At equal bytes a bit less for every weight is far better than nothing at all for half of them. (A bitmap that holds
# codes that rounded to zero, too, is a little smaller than 3.5 bits; that does not close the gap.)
#
# And time? **Predict.** A dense product of a matrix with 90 % zeros takes how long, compared with one without zeros? Which form is
# faster, and from which share of zeros on?

# %%
times = {f"{share:.0%} zeros": lab.race(lab.products(share), rounds=rounds) for share in (0.5, 0.75, 0.9)}
sentence = lab.say_times(times)
plots.show(lab.times_figure(times), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(lab.time_rows(times))))

# %% [markdown]
# **Look.** One row of inputs, a weight of 2,048 × 2,048, one thread; the median of rounds in which all take turns, against the dense
# float32 product of the same round. On a busy machine quartiles are wide: run the cell again.
#
# **Answer.** *Zeros in place* gain nothing: a dense kernel multiplies by them. The sparse forms are faster than float32 because they
# read less, and so is int4, without a single zero: *that* is what a sparse form has to beat, and where it does not, zeros do not
# pay. The bitmap does all the multiplications; CSR does only those that are left, but fetches an input for each, and comes into
# reach of int4 at some 90 % zeros. (How fast int4 and bitmap are depends on the vector instructions of your processor.)

# %% [markdown]
# ## 4. Smaller shapes
#
# Take whole inner channels out of the feed-forward layers (a row of gate and of up, the column of down), a key-value head with its queries,
# or a whole block. What is left is dense and smaller: any kernel gains.
#
# **Repair**: the columns of down that stay can say part of what the others said, if their weights are solved for anew (least squares on
# calibration text).
#
# **Predict.** With 30 % of the channels gone: how much does repair win back? And what does a cut of 30 % leave of parameters, of
# multiply-adds, of the time?

# %%
cut = {
    "channels 30%, repaired": PruneChannels(0.3),
    "channels 50%, repaired": PruneChannels(0.5),
    "channels 70%, repaired": PruneChannels(0.7),
    "heads 50%": PruneHeads(0.5),
    "one block dropped": DropLayers(1),
}
smaller = {name: compress(model, Recipe((step,)), calibration=calibration, progress=False).model for name, step in cut.items()}
plain = load(model_dir)
shrink(plain, PruneChannels(0.3), calibration, progress=False, repair=False)
smaller["channels 30%, not repaired"] = plain
structured = lab.results(model, smaller, **measured)
timed = {"original": model} | {n: m for n, m in smaller.items() if n != "channels 30%, not repaired"}
tokens = calibration[0][:1]

with torch.inference_mode():
    latency = lab.race({name: partial(m, input_ids=tokens, use_cache=False) for name, m in timed.items()}, rounds=rounds)
sentence = lab.say_structure(model, smaller, latency)
plots.show(lab.structure_figure(model, smaller, latency), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown(lab.structure_rows(model, {"original": model} | smaller, structured, latency))))
value, low, high = structured.ratio("channels 30%, repaired", "channels 30%, not repaired")
print(f"repaired / not repaired, paired: {value:.2f} [{low:.2f}, {high:.2f}]")
assert value < 1, "repair did not help"

# %% [markdown]
# **Look.** The dotted line is where a point would lie if time followed arithmetic. 256 tokens are read at once, one thread.
#
# **Answer.** Repair takes off a fifth of the loss and costs no byte. Thirty per cent of the channels are less than twenty
# of the model: attention, embedding and head stay. Time goes down with arithmetic, roughly, for here shapes are really smaller.
#
# **Explain.** A head out of two is half of the attention: no repair can make that good. In a model with 32 heads it would be another
# matter. Which block can go?

# %%
influence = block_influence(model, calibration[:4], progress=False)
sentence = lab.say_influence(influence)
plots.show(lab.influence_figure(influence), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([{"block": str(i), "influence (measured)": f"{x:.3f}"} for i, x in enumerate(influence)])))

# %% [markdown]
# **Answer.** Of four blocks none is idle; ShortGPT's idle blocks are found among the 32 and more of large models. And influence is an
# estimate by angles alone: it says nothing of what later blocks make of the change.
#
# The same cuts with more calibration tokens, on more documents, by activation, by magnitude and by chance, for both models. Look at
# magnitude: it is *worse than chance*. Small rows meet large activations here, so their size says the wrong thing.

# %%
sentence, rows = lab.study("channels")
display(Markdown(sentence))
if rows:
    display(Markdown(words.markdown(rows)))

# %% [markdown]
# ## 5. Dynamic channel pruning
#
# Or leave the channels in, and skip for each token those that say least to it. `SkipChannels` keeps the largest |h| before
# the down product.
#
# **Predict.** Half of the channels skipped, other ones for each token: is that better or worse than the same 50 % taken out for
# good? How many bytes does it save, and how much time?

# %%
shares = (0.3, 0.5, 0.7, 0.9)
skipping = {f"{share:.0%} skipped": compress(model, Recipe((SkipChannels(share),)), progress=False).model for share in shares}
dynamic = lab.results(model, skipping, **measured)
with torch.inference_mode():
    skip_times = lab.race(
        {name: partial(m, input_ids=tokens, use_cache=False) for name, m in ({"original": model} | skipping).items()}, rounds=rounds
    )
skipped = lab.skipped(skipping, dynamic, skip_times)
sentence = lab.say_skip(skipped)
plots.show(lab.skip_figure(skipped), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([s.row for s in skipped])))
assert dynamic.points["50% skipped"].kld < structured.points["channels 50%, repaired"].kld

# %% [markdown]
# **Answer.** Far better: each token keeps those that matter to *it*. But all weights are still needed, so no byte is saved; gate and
# up have to be computed in full, to know which channels to skip, so at most a third of the feed-forward is; and a dense product
# multiplies by the zeros and pays for finding them. A kernel for one token at a time that reads only the columns of down that are needed
# could save what the second column says.

# %% [markdown]
# ## 6. What articles claim
#
# **Predict.** Three claims, from articles about phones and small boards. Which can hold for this model?
#
# 1. *DeepSeek-R1 on a phone*: weight pruning removes 40 % of the compute.
# 2. *Cherry Studio*: dynamic channel pruning makes the model 4.29 times smaller (12 to 2.8 GB) and 3.2 times faster.
# 3. *Open-AutoGLM*: fine-tune with an L1 penalty, then drop every weight below 0.001.
#
# The third has to be tried. The penalty pulls every weight towards zero by a step of the optimizer at a time.

# %%
training = data.calibration_batches(tokenizer, text["train"], tokens=40_000, context=256, seed=seed)
step = FineTune(steps=l1_steps, lr=1e-3, batch=4, l1=1000.0, seed=seed)
trained = compress(model, Recipe((step,)), training=training, progress=False)
by_threshold = Prune(method="magnitude", threshold=1e-3)
autoglm = {
    "threshold 0.001": compress(model, Recipe((by_threshold,)), progress=False),
    "L1, no threshold": trained,
    "L1, threshold 0.001": compress(trained.model, Recipe((by_threshold,)), progress=False),
}
thresholds = lab.results(model, autoglm, **measured)
display(Markdown(words.markdown(thresholds.rows())))
for name, m in {"as it is": model, f"after {l1_steps} steps with L1": trained.model}.items():
    share, mean = lab.below(m)
    print(f"{name}: {100 * share:.2f} % of the weights lie below 0.001; the mean |w| is {mean:.4f}")

cheap = zeros.points["magnitude 25%"]
print(f"{cheap.name} of section 2, without any training: {100 * cheap.zeros:.0f} % zeros at a KLD of {cheap.kld:.2g}")

# %%
rows = lab.claim_rows(model, smaller, structured, latency, skipped, thresholds)
display(Markdown(words.markdown(rows)))

# %% [markdown]
# **Answer.** 40 % less compute can be had, by channels, at a loss of quality that no article of this kind states; zeros alone
# remove no compute at all from a dense product. 4.29 times smaller cannot come from *dynamic* pruning, which stores every weight, nor
# from channels here: all of them together are not enough. (int4 alone makes 16-bit weights 3.6 times smaller.) A
# threshold of 0.001 finds next to nothing in a trained model: mean weights are fifty times as large. L1 does make small weights, but
# to do so in a few steps takes so much force (and so large a learning rate, which does harm of its own) that choosing by magnitude
# makes more zeros at less loss; and what is left has to be stored somehow (section 3).

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import prune_lab as lab

print("weights:", lab.EXERCISE_ROW, "norms of the inputs:", lab.EXERCISE_NORMS)

# %% [markdown] tags=["exercise"] exercise="wanda-by-hand" difficulty=1 importance=3 minutes=5
# An output row has the four weights above, and their inputs have these norms. Which two does Wanda keep (1: stays, 0: goes)? The inputs
# do not vary together: what squared error does that add to the output?

# %% tags=["stub"]
mask, loss = None, None  # a list of four 0s and 1s; a number

# %% tags=["check"]
lab.check_wanda(mask, loss)

# %% [markdown] tags=["hint"]
# Score |w| · |x|. Losing a weight adds the square of its score.

# %% [markdown] tags=["expected"]
# Not the two largest weights. A loss below one.

# %% tags=["solution"]
mask, loss = [0, 1, 1, 0], 0.4**2 + 0.3**2

# %% [markdown] tags=["why"]
# Scores 0.4, 1, 0.9, 0.3. Magnitude keeps the first and the last and loses 1² + 0.9² = 1.81.

# %% tags=["mutant"]
# magnitude
mask, loss = [1, 0, 0, 1], 1**2 + 0.9**2

# %% tags=["mutant"]
# those that go are marked
mask, loss = [1, 0, 0, 1], 0.25

# %% tags=["mutant"]
# scores are added, not their squares
mask, loss = [0, 1, 1, 0], 0.4 + 0.3

# %% tags=["mutant"]
# the root of the squared error
mask, loss = [0, 1, 1, 0], 0.5

# %% tags=["mutant"]
# the weights alone, without their inputs
mask, loss = [0, 1, 1, 0], 0.8**2 + 0.6**2

# %% [markdown] tags=["exercise"] exercise="break-even" difficulty=2 importance=3 minutes=5
# From which share of zeros is a bitmap of float16 values smaller than dense *int4-g64*?

# %% tags=["stub"]
share_of_zeros = None  # between 0 and 1

# %% tags=["check"]
lab.check_break_even(share_of_zeros)

# %% [markdown] tags=["hint"]
# int4-g64 has a float16 scale for 64 weights. A bitmap has one bit for each place.

# %% [markdown] tags=["expected"]
# Between 0.75 and 0.85.

# %% tags=["solution"]
share_of_zeros = 1 - (4 + 16 / 64 - 1) / 16

# %% [markdown] tags=["why"]
# 1 + 16 (1 − s) = 4 + 16 / 64 = 4.25 gives s = 1 − 3.25 / 16 = 0.797.

# %% tags=["mutant"]
# the share that stays
share_of_zeros = (4 + 16 / 64 - 1) / 16

# %% tags=["mutant"]
# the bitmap itself is free
share_of_zeros = 1 - 4.25 / 16

# %% tags=["mutant"]
# no scales
share_of_zeros = 1 - 3 / 16

# %% tags=["mutant"]
# groups of 32
share_of_zeros = 1 - 3.5 / 16

# %% tags=["mutant"]
# 4 bits against 16
share_of_zeros = 0.75

# %% [markdown] tags=["exercise"] exercise="skipped-channels" difficulty=2 importance=3 minutes=5
# In a large model the gated feed-forward layers take 60 % of the time. 75 % of their channels are skipped, token by token, with a perfect
# kernel. How many times faster does the model become?

# %% tags=["stub"]
times_faster = None

# %% tags=["check"]
lab.check_skip(times_faster)

# %% [markdown] tags=["hint"]
# Which of the three products of a gated layer gets smaller?

# %% [markdown] tags=["expected"]
# Less than 1.5 times.

# %% tags=["solution"]
times_faster = 1 / (1 - 0.6 * 0.75 / 3)

# %% [markdown] tags=["why"]
# Of gate, up and down only down shrinks: 0.6 · 0.75 / 3 = 0.15 of the time goes, and 1 / 0.85 = 1.18. A claim of 3.2 times needs
# something else.

# %% tags=["mutant"]
# all three products shrink
times_faster = 1 / (1 - 0.6 * 0.75)

# %% tags=["mutant"]
# the whole model is feed-forward
times_faster = 1 / (1 - 0.75 / 3)

# %% tags=["mutant"]
# as if time went with the channels
times_faster = 4

# %% tags=["mutant"]
# what is saved
times_faster = 0.6 * 0.75 / 3

# %% tags=["mutant"]
# adds what is saved
times_faster = 1.15

# %% [markdown] tags=["exercise"] exercise="two-of-four" difficulty=2 importance=3 minutes=10
# Write the 2:4 mask: of every four neighbours along a row the two with the highest scores stay (of equal ones the later).


# %% tags=["stub"]
def two_of_four(scores):
    """The mask, 1 where a weight stays and 0 where it goes; `scores` is an array [out, in], in divisible by 4."""
    ...


# %% tags=["check"]
lab.check_two_of_four(two_of_four)

# %% [markdown] tags=["hint"]
# `scores.reshape(len(scores), -1, 4)` has the fours in its last axis; `argsort` twice gives ranks 0 .. 3, with `kind="stable"` also of
# equal ones.

# %% [markdown] tags=["expected"]
# 4 3 2 1 becomes 1 1 0 0, and 5 5 5 5 becomes 0 0 1 1.


# %% tags=["solution"]
def two_of_four(scores):
    fours = scores.reshape(len(scores), -1, 4)
    rank = fours.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return (rank >= 2).reshape(scores.shape)


# %% tags=["mutant"]
# the upper half of each row, wherever it lies
def two_of_four(scores):
    rank = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank >= scores.shape[1] // 2


# %% tags=["mutant"]
# neighbours across rows
def two_of_four(scores):
    fours = scores.T.reshape(-1, 4)
    rank = fours.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return (rank >= 2).reshape(scores.T.shape).T


# %% tags=["mutant"]
# above the median of the four: of equal ones too few stay
def two_of_four(scores):
    fours = scores.reshape(len(scores), -1, 4)
    return (fours > np.median(fours, axis=-1, keepdims=True)).reshape(scores.shape)


# %% tags=["mutant"]
# the two lowest stay
def two_of_four(scores):
    fours = scores.reshape(len(scores), -1, 4)
    rank = fours.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return (rank < 2).reshape(scores.shape)


# %% tags=["mutant"]
# takes the order for the ranks
def two_of_four(scores):
    fours = scores.reshape(len(scores), -1, 4)
    return (fours.argsort(axis=-1, kind="stable") >= 2).reshape(scores.shape)


# %% [markdown]
# ## What would change on your model
#
# Larger models have more to spare: 50 % zeros cost a model of seven billion less than this one, and of 32 blocks some can go. The
# bytes and the break-even points stay as they are. Calibrate on text like that which your model will see, and measure KL
# divergence *and* written text: pruned models pass multiple choice and fail to write.
#
# ```python
# model, tokenizer = load("Qwen/Qwen3-0.6B"), load_tokenizer("Qwen/Qwen3-0.6B")   # needs a network, once
# batches = data.calibration_batches(tokenizer, your_text, tokens=262_144, context=2048)
# small = compress(model, Recipe((PruneChannels(0.2), *Recipe.body("int4-g32", method="gptq").steps)), calibration=batches, inplace=True)
# ```
