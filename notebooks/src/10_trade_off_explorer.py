# %% [markdown]
# # 10 · The trade-off explorer: accuracy, size, latency
#
# **Claim: no configuration is best; a few dozen of a thousand are on the front, and which of these is yours follows from a budget. The
# winner of a large search is partly luck: half of the documents pick it, and on the other half it is worse.**
#
# After this notebook you can
#
# 1. say what is on a front of quality, size and latency, and what is not,
# 2. turn a question ("it has to fit, and to be nearly as good") into budgets, and find its answer,
# 3. ask whether two configurations differ by more than chance, on the same documents,
# 4. say what the winner of a search of a thousand owes to luck,
# 5. tell measured numbers from modelled ones, and repeat one of them on this machine,
# 6. take the recipe of what you chose with you.
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb) for recipes; [09](09_on_the_device.ipynb) for what a modelled latency is
# worth. *Takes* under a minute on two cores and 1.5 GB of memory, most of it one real measurement. Every cell may be run again.

# %%
import numpy as np
from IPython.display import Markdown, display

from edgelab import explorer_lab as lab
from edgelab import plots, tradeoff, words
from edgelab.explorer import Explorer
from edgelab.explorer_measure import agreement
from edgelab.tradeoff import State, Sweep

# %% tags=["parameters"]
sweep_file = None  # data/sweep.parquet; or the Parquet file of a sweep of yours (`edgelab sweep`)
device = "galaxy-s22"  # one of data/devices.toml
metric = "em_assistant"  # exact match on commands; "kld", "bits_per_byte", "em_arithmetic" ...
measure_one = True  # the recipe of section 5, made and measured on this machine
splits = 20  # of the documents, in section 4
seed = 0

# %%
sweep = Sweep.read(sweep_file)
explorer = Explorer(sweep, State(metric=metric, device=device))
sweep

# %% [markdown]
# ## 1. A cloud and its front
#
# A row of the sweep is one way to make one model smaller: method, bits, weights per scale, zeros, experts kept, experts per token, channels
# cut, or another model altogether (`edge-phone`, the student). Quality and bytes were measured when this package was built. Latency was
# not: nobody had your phone there. It is the roofline's answer for a device, and is called *modelled* wherever it stands.
#
# Row a *dominates* row b if it is nowhere worse and somewhere better. The *front* is what nothing dominates.
#
# **Predict.** Of all these rows, how many are on the front of quality, size and latency? Does the original, in 16 bits, stand on it?

# %%
view = explorer.choose(size_limit=None)
for figure in explorer.static():
    plots.show(figure, explorer.told)
display(Markdown(explorer.told))
on, original = int(view.front.sum()), sweep.original("edge-moe")
print(f"{on} of {len(sweep):,} rows are on the front; the original in 16 bits is {'' if view.front[original] else 'not '}on it")
assert on < 0.2 * len(sweep)

# %% [markdown]
# **Look.** Left of the line nothing was found; right of it, everything is beaten by something smaller or better. Size and latency
# order the rows in nearly the same way: both come from bytes.
#
# **Answer.** A few per cent. Whether the original is on the front hangs on chance: some compressed row may be as good on these
# documents, and then the original is merely large.
#
# **Explain.** Each axis lets some rows stay: with one axis the front would be one row, with very many axes nearly all. That is why a front
# of ten metrics tells little.
#
# **The first control that must fail: shuffled qualities.** If the same bits per byte are dealt to the rows at random, any small row may
# look good. Were the front made of such luck, the true one could not beat it.

# %%
figure, beaten, sentence = lab.shuffled(sweep, "bits_per_byte", seed=seed)
plots.show(figure, sentence)
display(Markdown(sentence))
assert beaten > 0.5, "the front of shuffled qualities is as good as the true one"

# %% [markdown]
# ## 2. The explorer
#
# Choose a question or set budgets (each slider has a number box beside it), a device, a metric. Hover to inspect, click to choose a row;
# in *brush* mode drag a box and see the same rows in the other plot. Pin two rows to compare them. All of it works from the keyboard too.
#
# **Predict.** Which is smaller: the smallest row that keeps 95 % of the original's exact match, or the smallest that is nearly lossless (at
# most 0.01 nats per token from the original)? By how much?

# %%
explorer

# %%
rows = lab.preset_rows(sweep, State(device=device))
display(Markdown(words.markdown(rows)))
sizes = {name: sweep["size_bytes"][tradeoff.view(sweep, tradeoff.apply(sweep, name, State())).best] for name in ("keep95", "lossless")}
assert sizes["keep95"] < sizes["lossless"]

# %% [markdown]
# **Look.** The same sweep has five answers, since there are five questions.
#
# **Answer.** Keeping a *task* is far cheaper than keeping the *distribution*: by a factor of two or more.
#
# **Explain.** An answer stays right as long as the first choice stays first. KL divergence counts every shift of every probability, also
# those that change nothing. Which of the two you need depends on whether your users see answers or long text.
#
# ## 3. Is the difference real?
#
# The original against two of its rows: three bits by plain rounding, with one scale per row of weights, and with one per 32. They are named
# by what was done to them, before anybody looks at how they did. All three have their own 95 % intervals, and these overlap. Does that
# mean that the rows can't be told apart?
#
# **Predict.** All were measured on the *same* documents. Does that make the comparison sharper, or does it change nothing?

# %%
whole, coarse, fine = lab.three_bit_rows(sweep)
q = tradeoff.quality_of(sweep, "em_assistant")
for i in (whole, coarse, fine):
    print(f"{sweep['label'][i]}: {q.metric.said(q.value[i])}, alone {q.metric.said(q.low[i])} .. {q.metric.said(q.high[i])}")
one, two = (tradeoff.compare(sweep, whole, i, "em_assistant") for i in (coarse, fine))
display(Markdown(f"One scale per row: {one.said}"))
display(Markdown(f"One scale per 32 weights: {two.said}"))
if sweep_file is None:
    assert q.low[whole] <= q.high[coarse] and one.significant, "overlapping intervals, and yet the paired test tells them apart"
    assert not two.significant, "one answer in eighty is no difference"

# %% [markdown]
# **Answer.** Sharper. Most of what widens an interval is that some documents are hard for everybody.
#
# **Explain.** McNemar's test looks only at the answers on which the two differ: if neither were better, each of those would be a coin's
# toss. For text the bootstrap draws whole sources and takes the *difference* on each draw. KL divergences of different originals are
# refused: a distance from edge-moe and one from edge-dense have nothing in common but the unit.
#
# **The control that must fail: search until it is significant.** The p above is that of one question. Had somebody gone through all
# rows, looked for one that the test calls different, and shown that pair only, the same counts would be worth nothing: among so many
# tests some must come out below 0.05. Bonferroni multiplies p by the number of rows that were looked at.

# %%
searched = tradeoff.compare(sweep, whole, coarse, "em_assistant", picked_from=len(sweep))
display(Markdown(searched.said))
print(f"asked once: p = {one.p:.4f}; picked from {len(sweep):,}: p = {searched.p_search:.4f}")
if sweep_file is None:
    assert one.p < 0.05 <= searched.p_search, "a pair that was found by a search is not significant any more"

# %% [markdown]
# The explorer counts for you: whoever pins the best row, or one on the front, has searched, and the verdict says among how many.
#
# How many rows can't be told from the best one? A measurement with so few documents leaves many.

# %%
rivals = tradeoff.rivals(sweep, view.best, view.rows, metric)
smallest = min(rivals, key=lambda i: sweep["size_bytes"][i], default=view.best)
megabytes = sweep["size_bytes"] / 1e6
print(f"{len(rivals)} of {len(sweep):,} rows can't be told from {sweep['label'][view.best]} ({megabytes[view.best]:.2f} MB)")
print(f"the smallest of them: {sweep['label'][smallest]} ({megabytes[smallest]:.2f} MB)")
assert sweep["size_bytes"][smallest] <= sweep["size_bytes"][view.best]

# %% [markdown]
# ## 4. The winner's curse
#
# The best of a thousand rows was picked *because* it did well on these documents. Here the answers are split in two at random: the winner
# is picked on one half and measured on the other. The rows are those within a tenth of the original's bytes, where models really differ:
# near 100 % there is no room for luck.
#
# **Predict.** How much does the winner lose on documents that did not choose it? More if it was picked from 10 rows, or from all?

# %%
small = sweep["size_bytes"] <= 0.1 * sweep["size_bytes"][original]
task = metric if tradeoff.metric_of(metric).kind == "exact" else "em_assistant"
lines = lab.halves_rows(sweep, task, small, splits=splits)
display(Markdown(words.markdown(lines)))
assert lab.lost_points(lines)[-1] > 0, "the winner of them all lost nothing on the other half"

# %% [markdown]
# **The second control that must fail** was this: a winner that were truly so much better would lose nothing on the other half.
#
# **Answer.** It loses points: fewer if it was picked from ten rows than from a hundred. Beyond that many rows are each other's near twins,
# and add little luck of their own.
#
# **Explain.** Each row's measured quality is its true quality plus an error; the maximum of many picks large errors. Three ways out: choose
# on some documents and report on others, correct the p-value for the number of rows (Bonferroni), or choose by a rule that does not chase
# the last answer, such as the smallest row that can't be told from the best. The explorer says how many rows a pinned winner was picked
# from.
#
# ## 5. Modelled, measured at build, measured here
#
# **Predict.** At four bits instead of sixteen a model reads a quarter of the bytes per token. Is it four times faster on a phone?

# %%
like = tradeoff.select(sweep, {"model": "edge-moe", "bits": 4.0, "sparsity": 0.0, "experts": sweep["experts"][original]})
quantized = np.flatnonzero(like & (sweep["top_k"] == sweep["top_k"][original]))
row = int(quantized[np.argmin(sweep["seconds"][quantized])])
compared_rows = {"16 bits": original, sweep["label"][row]: row}
display(Markdown(words.markdown(lab.device_rows(sweep, compared_rows, (device, "redmi-6a", "raspberry-pi-5")))))
times = tradeoff.latency(sweep, device).value[[original, row]]
assert times[0] / times[1] < 4

# %% [markdown]
# **Answer.** No. So small a model waits for the fixed cost per layer (*overhead*) on a fast phone; on a slow one for bandwidth, and there
# the gain is larger. None of the published measurements behind the model is of so small a network: take its latencies as an order.
#
# **Explain.** Therefore one number should be measured where you are. This makes the row again with the real `compress`, reads the same
# documents, and writes tokens with the real kernels, in a process of its own that *cancel* would end.

# %%
if measure_one:
    explorer.choose(chosen=row)
    here = explorer.measure()
    display(Markdown(agreement(sweep, row, here)))
    assert here.size_bytes == sweep["size_bytes"][row], "the recipe gives other bytes than the sweep has"

# %% [markdown]
# The recipe travels as text: here its beginning, and what the explorer's *recipe* panel copies.

# %%
explorer.panel.value = "recipe"
print(explorer.recipe_panel.text[:300], "...")
print(explorer.recipe_panel.code)

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import explorer_lab as lab

# %% [markdown] tags=["exercise"] exercise="front-by-hand" difficulty=1 importance=3 minutes=4
# Seven rows, (MB, exact match in per cent): a (1, 60), b (2, 60), c (2, 80), d (3, 75), e (4, 90), f (4, 90), g (6, 89). Which are on the
# front?

# %% tags=["stub"]
front = None  # a list of letters

# %% tags=["check"]
lab.check_front(front)

# %% [markdown] tags=["hint"]
# Go from the smallest to the largest, and keep what is better than everything before it. Then look at twins.

# %% [markdown] tags=["expected"]
# Four letters.

# %% tags=["solution"]
front = ["a", "c", "e", "f"]

# %% [markdown] tags=["why"]
# b is as good as a and larger; d is larger and worse than c; g is larger and worse than e. e and f are equal: neither dominates the other.

# %% tags=["mutant"]
# twins: only the first is kept
front = ["a", "c", "e"]

# %% tags=["mutant"]
# equal quality at more bytes is taken for "not dominated"
front = ["a", "b", "c", "e", "f"]

# %% tags=["mutant"]
# only the best quality
front = ["e", "f"]

# %% tags=["mutant"]
# one per size
front = ["a", "c", "d", "e", "f", "g"]

# %% [markdown] tags=["exercise"] exercise="mcnemar-by-hand" difficulty=2 importance=3 minutes=6
# Of 100 answers both models get 80 right and both get 12 wrong. A alone is right on 1, B alone on 7. What is the exact two-sided p of
# McNemar's test?

# %% tags=["stub"]
p = None  # between 0 and 1

# %% tags=["check"]
lab.check_mcnemar(p)

# %% [markdown] tags=["hint"]
# 92 answers say nothing. If neither model were better, the other 8 would be tosses of a coin: how likely is a result at least as one-sided?

# %% [markdown] tags=["expected"]
# Between 0.05 and 0.1.

# %% tags=["solution"]
p = 2 * (1 + 8) / 2**8

# %% [markdown] tags=["why"]
# 0 or 1 of 8 heads: (1 + 8) / 256; the other side is as likely: 18 / 256 = 0.070. Six points of difference, and still no proof.

# %% tags=["mutant"]
# one side only
p = (1 + 8) / 2**8

# %% tags=["mutant"]
# exactly 1 of 8, without what is more extreme
p = 2 * 8 / 2**8

# %% tags=["mutant"]
# the share of the disagreements that A won
p = 1 / 8

# %% tags=["mutant"]
# all 100 answers as independent
p = 0.6

# %% [markdown] tags=["exercise"] exercise="smallest-that-keeps" difficulty=2 importance=3 minutes=10
# Write the rule of the first preset: the number of the row with the fewest bytes whose quality is at least `keep` times that of the row
# `original`. A quality of NaN is unknown.


# %% tags=["stub"]
def smallest(size, quality, original, keep):
    """The number of the row (an int). `size`, `quality`: arrays with a value per row."""
    ...


# %% tags=["check"]
lab.check_smallest(smallest)

# %% [markdown] tags=["hint"]
# First which rows count, then the smallest among them; and mind that `argmin` of a selection counts within the selection.

# %% [markdown] tags=["expected"]
# Three lines. NaN >= anything is False.


# %% tags=["solution"]
def smallest(size, quality, original, keep):
    rows = np.flatnonzero(quality >= keep * quality[original])
    return int(rows[np.argmin(size[rows])])


# %% tags=["mutant"]
# the position within the selection
def smallest(size, quality, original, keep):
    return int(np.argmin(size[quality >= keep * quality[original]]))


# %% tags=["mutant"]
# the best row instead of the original
def smallest(size, quality, original, keep):
    rows = np.flatnonzero(quality >= keep * np.nanmax(quality))
    return int(rows[np.argmin(size[rows])])


# %% tags=["mutant"]
# more than, where at least is asked
def smallest(size, quality, original, keep):
    rows = np.flatnonzero(quality > keep * quality[original])
    return int(rows[np.argmin(size[rows])])


# %% tags=["mutant"]
# NaN passes when the rows that fail are taken out
def smallest(size, quality, original, keep):
    rows = np.flatnonzero(~(quality < keep * quality[original]))
    return int(rows[np.argmin(size[rows])])


# %% tags=["mutant"]
# points instead of a share
def smallest(size, quality, original, keep):
    rows = np.flatnonzero(quality >= quality[original] - (1 - keep))
    return int(rows[np.argmin(size[rows])])


# %% [markdown] tags=["exercise"] exercise="luck-of-a-thousand" difficulty=2 importance=3 minutes=4
# 1,000 rows are all exactly as good as the original. Each is compared with it by a two-sided test at 5 %. How many look *better* by luck,
# on average? And below which p would one of them be worth mentioning, by Bonferroni?

# %% tags=["stub"]
look_better, p_needed = None, None

# %% tags=["check"]
lab.check_luck((look_better, p_needed))

# %% [markdown] tags=["hint"]
# 5 % of the tests say "different". Which way?

# %% [markdown] tags=["expected"]
# A few dozen; and a p far below 0.001.

# %% tags=["solution"]
look_better, p_needed = 1000 * 0.05 / 2, 0.05 / 1000

# %% [markdown] tags=["why"]
# 50 are called different, half of them better. A search of a thousand that reports its winner with p = 0.01 has reported nothing.

# %% tags=["mutant"]
# those that look worse are counted as well
look_better, p_needed = 50, 0.05 / 1000

# %% tags=["mutant"]
# a test at 5 % is never wrong
look_better, p_needed = 0, 0.05 / 1000

# %% tags=["mutant"]
# no correction
look_better, p_needed = 25, 0.05

# %% tags=["mutant"]
# two sides corrected twice
look_better, p_needed = 25, 0.05 / 2000

# %% [markdown]
# ## What would change on your model
#
# The sweep is of small models on small tasks: its fronts are an example, not a table for yours. `edgelab sweep` measures the grid of
# `space()` in `edgelab/sweep_space.py`, on the embedded models: change the grid there for other axes, and open what it writes with
# `Explorer("my-sweep.parquet")`. It takes no other model; for one of yours compress it by recipe and compare it with its original:
#
# ```python
# model = edgelab.load("Qwen/Qwen2.5-0.5B")                   # any Hugging Face causal language model
# small = edgelab.compress(model, recipe, calibration=...)    # the recipe that you copied
# ```
#
# - **Size decides more.** At 7 billion weights bytes fill the phone and bandwidth binds: there size and latency are nearly one axis.
# - **Fewer rows, more documents.** A search of 1,000 on 100 answers finds luck; 30 rows on 3,000 answers find a model.
# - **Latency**: the model was fitted on networks of 0.5 to 9 billion weights. For yours it interpolates, here it extrapolates.
