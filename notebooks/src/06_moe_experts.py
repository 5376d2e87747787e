# %% [markdown]
# # 06 · Experts: who is needed, and what fewer cost
#
# **Claim: experts specialise by domain, so what is dropped by frequency is a task, not a share of quality. What an expert does *when*
# it is used tells more. Nothing is free, though: half of the experts cost a task whichever way they are chosen, and learning has
# to bring it back.**
#
# After this notebook you can
#
# 1. read who routes where, and name a specialist,
# 2. drop and merge experts, and say why REAP takes a mean over the tokens that an expert *got*,
# 3. spend bytes on the bits of each expert, and hold the result against uniform bits at equal bytes,
# 4. point at any expert of the atlas and measure what happens without it,
# 5. change the number of experts per token at run time, and judge articles about it,
# 6. say how many bytes per token come from the disk when not all experts fit into RAM, and what bounds that.
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb) for recipes, KL divergence ("KLD") and exact match. *Takes* about a minute
# on two cores and 2 GB of memory. Every cell may be run again. Few documents are read, so that it is quick: intervals are wide.

# %%
import copy
from functools import partial

import torch
from IPython.display import HTML, Markdown, display

from edgelab import Recipe, Rtn, compress, corpus, data, expert_cache, plots, words
from edgelab import experts_lab as lab
from edgelab.atlas import Atlas, AtlasControl
from edgelab.expert_stats import by_domain, expert_stats
from edgelab.expert_steps import split_experts
from edgelab.model import load, load_tokenizer
from edgelab.offload import mapped, offload
from edgelab.paths import data_dir
from edgelab.recipe import Quantize, Route
from edgelab.scheme import QuantScheme
from edgelab.surgery import keep_experts

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a mixture of experts of a known family
domain_tokens = 2048  # of calibration text, per domain
documents = {"prose": 3, "code": 3, "assistant": 12, "arithmetic": 24}  # of the test split
capacities = (2, 4, 8, 12, 16)  # experts in RAM, section 7
seed = 0

# %%
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = corpus()
calibration = data.calibration_batches(tokenizer, text["calibration"], tokens=4 * domain_tokens, context=256, seed=seed)
stats = by_domain(model, tokenizer, text["calibration"], tokens=domain_tokens, progress=False)
measure = partial(lab.measured, original=model, tokenizer=tokenizer, test=text["test"], max_docs=documents, seed=seed)

routers = list(next(iter(stats.values())))
first = model.get_submodule(routers[0])
print(
    f"{len(routers)} mixtures of {len(first.weight)} experts, {first.top_k} per token, in {', '.join(r.split('.mlp')[0] for r in routers)}"
)
print(f"{sum(b.numel() for b in calibration):,} tokens of calibration text of {len(stats)} domains")

# %% [markdown]
# The first block of this model is dense, so mixture 0 sits in block 1. A shared expert serves every token; it is not counted here.
#
# ## 1. Who routes where
#
# A router scores all experts for each token, and the best two compute. Training kept the *total* load even, over all text.
#
# **Predict.** There are 16 experts, so even use is 6 % each. On one domain alone: how large will the largest share of a mixture
# be, and are there experts that a domain never uses?

# %%
sentence = lab.say_usage(stats)
plots.show(lab.usage_figure(stats, layer=0), sentence)
display(Markdown(sentence))
display(HTML(lab.usage_html(stats)))
special = lab.specialist(stats)
assert special.share > 2 / len(first.weight), "no expert has a domain of its own"

# %% [markdown]
# **Look.** Each line of the table is one mixture on one domain; the darker, the more choices.
#
# **Answer.** The largest shares are four and more times the even one, and there are zeros.
#
# **Explain.** Even load over *all* text does not mean even load on each: every domain has a team of its own. That is an opportunity (a
# phone that only does one task needs few experts) and a trap: whoever picks calibration text picks which experts look needed.
#
# Who is chosen together with whom?

# %%
plots.show_rows(lab.pair_rows(lab.merged(stats)))

# %% [markdown]
# **Explain.** Pairs of one domain's team are chosen together several times as often as chance would have it. Dropping one of a pair
# hurts less if the other does the same work, and more if they complete each other; counting cannot tell which. Measuring can (section 5).
#
# ## 2. Dropping
#
# To drop an expert is to cut its weights and its row of the router. Two ways to choose:
#
# - **frequency**: the one with the fewest tokens goes;
# - **REAP** (arXiv 2510.13999): the one with the least *mean, over the tokens that were routed to it,* of gate × norm of its output.
#
# A sum over all tokens would multiply that mean by the frequency again. Below are the experts on which the two disagree, when a quarter
# of each mixture goes.
#
# **Predict.** Calibration text has as many tokens of each domain. Look at the last two columns: on which domain are experts
# missed that frequency drops, and whose *answers* will suffer? (The statistics of section 1 serve every choice below; in a recipe
# it is `DropExperts(0.25, method="reap")`, which reads them by itself.)

# %%
plots.show_rows(lab.rank_rows(stats, share=0.25))

# %%
fewer, every = {}, lab.merged(stats)
for share in (0.25, 0.5):
    for method in ("reap", "frequency", "random"):
        fewer[f"{method} {share:.0%}"] = lab.dropped(model, every, share, method, seed)
dropped = measure(fewer)
sentence = words.say_by_domain(dropped, "kld")
plots.show(plots.by_domain(dropped, "kld"), sentence)
plots.show_rows(lab.outcome_rows(dropped))
lost = {name: 1 - lab.exact(dropped, name, "arithmetic") for name in fewer}
print("arithmetic lost: " + ", ".join(f"{name} {x:.0%}" for name, x in lost.items()))
assert lost["frequency 25%"] > lost["reap 25%"], "frequency did not cost more of arithmetic than REAP"

# %% [markdown]
# **Look.** KLD is drawn on a logarithmic axis, per domain. The table has the answers: exact match.
#
# **Answer.** At 25 % REAP leaves both tasks nearly whole, and frequency loses a third of either or more, with as many
# tokens of each to count. On code frequency is even the better one, and prose suffers alike.
#
# Is it really that? **The counter-test**: frequency's choice once more, but one expert is exchanged, the one whose REAP score stands
# out most among those that it dropped.
#
# **Predict.** One of twelve dropped experts comes back, another goes for it. How much of arithmetic comes back?

# %%
swap = lab.exchange(stats, share=0.25)
print(f"mixture {swap.layer}: expert {swap.back} comes back, expert {swap.gone} goes")
both = {"frequency 25%": copy.deepcopy(model), "one exchanged": copy.deepcopy(model)}
keep_experts(both["frequency 25%"], swap.by_frequency)
keep_experts(both["one exchanged"], swap.exchanged)
exchanged = measure(both)
plots.show_rows(lab.outcome_rows(exchanged))
assert lab.exact(exchanged, "one exchanged", "arithmetic") > lab.exact(exchanged, "frequency 25%", "arithmetic")

# %% [markdown]
# **Answer.** All of it, and nothing else changes.
#
# **Explain.** An answer to a sum is short: few tokens *decide*, the others follow a pattern. This expert gets one choice in twenty, and
# what it says then is large: a specialist. Frequency takes it for a loafer, and so does any sum over all tokens. At
# 50 % there are more specialists than places: REAP saves arithmetic and loses the assistant. A mean over domains would have hidden
# that: ask for each task by itself. And look at random: it is lucky on prose and has lost the assistant at 25 %.
#
# **The control that must fail: REAP upside down.** The quarter with the *largest* scores goes.
#
# **Predict.** A score that means anything makes that a ruin. Of everything?

# %%
ruined = copy.deepcopy(model)
keep_experts(ruined, lab.without_largest(stats, share=0.25))
ruin = measure({"largest REAP dropped": ruined})
plots.show_rows(lab.outcome_rows(ruin))
assert lab.exact(ruin, "largest REAP dropped", "assistant") < lab.exact(dropped, "reap 25%", "assistant") - 0.3

# %% [markdown]
# **Answer.** Of the tasks, yes. Of prose and code, *no*: there the upside-down choice is the best of all cuts of a quarter. The largest
# scores belong to the specialists of the two tasks, which plain text hardly needs; what serves it are the many experts of middling score.
# REAP pays for the tasks with prose and code. Which is right depends on what the model is for, and no mean of the two says it.
#
# More documents, more seeds, all methods:

# %%
told, rows = lab.built("experts")
display(Markdown(told))
if rows:
    plots.show_rows(rows)

# %% [markdown]
# **Look.** In the long measurement REAP and NAEE (which tries subsets and keeps what rebuilds the mixture's output best) lose least at
# 25 %. At 50 % NAEE is ahead of REAP, and frequency keeps more of the assistant than REAP does, at the price of arithmetic. The three
# random choices differ more among each other than methods do: one seed is no evidence.
#
# ## 3. Merging
#
# Rather than throw experts away, average them. HC-SMoE ("outputs") clusters experts whose mean outputs are alike; M-SMoE ("router")
# gathers them around the most used ones whose router scores they share. The inner neurons of two experts have no common
# order, so they are matched before they are averaged.
#
# **Predict.** Twice as many experts contribute as with dropping half. Is the merged model better?

# %%
together = {"REAP 50%": fewer["reap 50%"]}
outputs = expert_stats(model, calibration, progress=False)  # of every expert on every token; MergeExperts reads them by itself
for method in ("outputs", "router"):
    together[f"merged by {method} 50%"], told = lab.merged_experts(model, outputs, method)
    together[f"{method} 50%, all rows kept"], _ = lab.merged_experts(model, outputs, method, all_rows=True)
    print(told[:140], "...")
merging = measure(together)
plots.show_rows(lab.outcome_rows(merging))

# %% [markdown]
# **Answer.** No: arithmetic, which REAP had saved whole, is lost by more than half. On the assistant, which REAP lost, merging looks a
# little better here; but these are twelve documents, and in the long measurement above (150 of them) it is behind there, too.
#
# **Explain.** Two losses are mixed up here. `MergeExperts` leaves an ordinary, smaller mixture: the router loses the rows of all
# members but one. The papers keep every row, and all of a cluster's rows lead to its expert; the lines "all rows kept" measure that,
# and it loses clearly less: much of what merging costs is the router's. (No ordinary checkpoint can say that rows share an expert;
# here such an expert is stored once per row.) The rest is the average itself: it is neither of the two functions. REAP's authors say
# why: a router that could tell two experts apart token by token now sends both kinds of token to one mean. Look at the clusters: by
# outputs, one of them swallows half of a mixture. Merging suits models whose experts are near copies of each other (those that were
# "upcycled" from one dense model); here they specialised from random weights.
#
# ## 4. Bits for each expert
#
# Between keeping and dropping lie bits. How much an expert's rounding costs is estimated by the Fisher information (how far the
# loss moves per squared change of a weight), and a knapsack spends the bytes: `Quantize(..., budget=, per_expert=True)`.
#
# **Predict.** Budget: the bytes of uniform `int2-g32`, 2.5 bits. Will the bits differ more between experts of one mixture, or between
# mixtures? How much KLD will it save?

# %%
uniform = QuantScheme.parse("int2-g32")
rules, nearest = (("@experts", uniform),), Rtn(mse_grid=12)
under = {"method": nearest, "budget": 2.5, "choices": ("int2-g64", "int2-g32", "int3-g64", "int4-g32")}
plans = {
    "uniform": Quantize(rules, method=nearest),
    "per stack": Quantize(rules, **under),
    "per expert": Quantize(rules, per_expert=True, **under),
}
bits = {name: compress(model, Recipe((step,)), calibration=calibration[:2], progress=False) for name, step in plans.items()}
spent = {name: lab.expert_bytes(made) for name, made in bits.items()}
print("; ".join(f"{name}: {n:,} bytes of experts" for name, n in spent.items()))
assert max(spent.values()) == spent["uniform"]
plots.show_rows(lab.bit_rows(bits["per expert"]))
by_bits = measure({name: made.model for name, made in bits.items()})
plots.show_rows(lab.outcome_rows(by_bits, size=False))
klds = {name: sum(r.value for r in by_bits.where(model=name, metric="kld")) for name in bits}
assert klds["per expert"] < klds["uniform"]

# %% [markdown]
# **Look.** The upper table counts how many of a stack's 16 experts got which scheme; the lower one compares at equal bytes.
#
# **Answer.** Mixtures differ more than their experts: the first gets the fewest bits, the last the most. On prose a quarter to a third
# of the KLD is saved, most of it already with one scheme per stack; on arithmetic nothing.
#
# **Explain.** Bits go where rounding moves the loss, *on calibration text* and as estimated: an expert whose domain is not in there
# gets the fewest. At three bits and more there is little to win (with `budget=3.5` against `int3-g32` the same comparison gives
# no gain on this model): every expert is then good enough. Published gains (MC-MoE) are at 1.5 to 2.5 bits, too.
#
# And hold it against section 2: all experts in 2.5 bits lose far less than a quarter of them dropped does, at a fifth of the bytes.
#
# ## 5. The atlas
#
# Every expert on one page. Click one (or use the boxes), choose what happens to it, and the divergence of *all edits together* is
# measured on held-out text: the model is edited, run, and put back to the bit.
#
# **Predict.** The specialist of section 1: what will its loss cost, against an expert of the same mixture that hardly anyone chooses?

# %%
held_out = data.calibration_batches(tokenizer, text["test"], tokens=1024, context=128, seed=seed)
atlas = Atlas(model, stats, held_out)
control = AtlasControl(atlas)
control

# %%
idle = int(atlas.map("tokens")[special.layer].argmin())
control.back.click()
found = {}
for expert, action in ((special.expert, "drop"), (idle, "drop"), (special.expert, "2 bits")):
    control.choose(special.layer, expert)
    found[expert, action] = control.apply(action)
    assert control.error is None, control.error
    control.apply("keep")
control.choose(special.layer, special.expert)
control.apply("2 bits")
display(HTML(f"<p>{control.told}</p>"), HTML(control.html))
assert found[special.expert, "drop"] > 3 * max(found[idle, "drop"], found[special.expert, "2 bits"])

# %% [markdown]
# **Answer.** Dropping the specialist costs ten times and more what dropping the idle one does, which is not nothing either. Rounding
# the specialist to two bits costs the least of the three.
#
# **Explain.** Two bits keep most of what a specialist knows, at a sixth of its bytes: for experts that one task needs, few
# bits are better than none. Try pairs: drop two experts of section 1's second table, each alone and then both.
#
# ## 6. Fewer experts per token
#
# `Route` leaves all weights where they are and changes how many are used: another top-k, the fewest whose gates reach a share (`top_p`),
# or leaving out those whose gate is far below the first one's (`skip`).
#
# Three articles: "16 experts with 2-4 active: 62 % fewer FLOPs", "2.3 times faster", "1.2 % accuracy lost".
#
# **Predict.** Fewer than *what*? Trained with two per token: what does one do, what do four or all 16? Is more always better?

# %%
steps = {
    "top-1": Route(top_k=1), "top-2 (as trained)": None, "top-3": Route(top_k=3), "top-4": Route(top_k=4), "all 16": Route(top_k=16),
    "top-p 0.7": Route(top_p=0.7), "skip 0.5": Route(skip=0.5),
}  # fmt: skip
ways = lab.routings(model, steps, calibration[:1])
routed = measure({w.name: w.model for w in ways})
plots.show_rows(lab.routing_rows(ways, routed, against="all 16"))
plots.show_rows(lab.claim_rows(ways, routed, "top-2 (as trained)", "all 16", calibration[0][:1, :24]))

# %% [markdown]
# **Answer.** The model is best with what it was trained with. With all 16 it is *worse*, as far off as with one alone: no gate was ever
# trained to weigh 16 outputs. `top_p` and `skip` leave out more than a third of the second choices for a small KLD: tokens that are sure
# of their first expert do with it.
#
# **Explain.** "62 % fewer FLOPs" is right against *all experts active*, which nobody would run: it describes the design, and is no saving.
# FLOPs of attention, shared expert and head stay whatever the router does. "2.3 times faster" is what FLOPs give at most, and what was
# measured is less: decoding waits for bytes and, in a model this small, for Python. (`tests/bench/bench_routing.py` has a wide model,
# where it holds.) And the accuracy "lost" against all 16 is negative here. Ask what a figure is compared with.
#
# The DeepSeek-R1 article: 128 experts, 4 active, 92 % of the accuracy. Ours has 16; `split_experts` cuts each into eight finer ones,
# 16 of 128 active: the same function. Then fewer of them, `active=`, the most important parts first.
#
# **Predict.** Splitting alone: how far do the logits move? With 4 of the 16 parts: how much of the accuracy is left?

# %%
fine = copy.deepcopy(model)
print(split_experts(fine, 8, calibration[:2])[0])
with torch.no_grad():
    moved = (fine(calibration[0][:2]).logits - model(calibration[0][:2]).logits).abs().max().item()
print(f"no logit moved by more than {moved:.1e}")
assert moved < 1e-3
fine_ways = lab.routings(fine, {"16 of 128": None}, calibration[:1])
for active in (8, 4):
    fewer = copy.deepcopy(model)
    split_experts(fewer, 8, calibration[:2], active=active)
    fine_ways += lab.routings(fewer, {f"{active} of 128": None}, calibration[:1])
finer = measure({w.name: w.model for w in fine_ways})
plots.show_rows(lab.routing_rows(fine_ways, finer, against="16 of 128"))

# %% [markdown]
# **Answer.** Splitting is the same function to rounding. Eight parts are one whole expert: the line "top-1" above. Four are half of
# one: the KL divergence doubles and a part of the assistant's answers goes, while sums stay.
#
# **Explain.** All parts of an expert share one score, so four of 16 are the most important half of a token's first expert, and count as
# half of it. FLOPs fall by a sixth only, for the rest of the model is not routed. A model that was *trained* with 128 fine experts learns
# which four to combine; this one was cut afterwards, without a step of learning, and keeps some nine tenths of its exact match: the
# article's 92 % is plausible for a model that was trained so; afterwards it can't be bought.
#
# ## 7. Experts on disk
#
# Where not all experts fit into RAM, each mixture keeps some (`capacity`) and reads the others when a token wants them. Each miss
# costs one expert's bytes. *lru* drops the one whose last use is longest ago, *lfu* the least used; *belady* knows the future:
# no policy misses less often. Cache-conditional selection (arXiv 2412.00099) lets the router prefer experts in RAM, which changes
# what the model says.
#
# **Predict.** With half of the experts in RAM, chosen blindly, half of the wanted ones would be there. How many are, with lru?

# %%
on_disk = offload(model_dir, capacity=capacities[1])
size = float(next(iter(mapped(on_disk).values())).expert_bytes)
rows = expert_cache.table(model, [calibration[0][:2]], capacities=capacities, strengths=(0.1, 0.3), expert_bytes=size)
sentence = lab.say_cache(rows, 8)
plots.show(lab.cache_figure(rows), sentence)
display(Markdown(sentence))
plots.show_rows(lab.cache_rows(rows))

# %% [markdown]
# **Answer.** Three quarters and more: neighbouring tokens want the same experts.
#
# **Explain.** The distance from lru to Belady is all that a cleverer policy could win. Going further takes another *choice of
# experts*: a small preference brings the hit rate up to that bound and may pass it, for a KLD that belongs beside it in every
# table. (With 16 in RAM only the first use of each misses.) The figures are of short mixed texts; one long text of one domain hits more.
#
# It runs, too: `offload` maps the file, and says what it read.

# %%
ids = calibration[0][:1, :48]
with torch.no_grad():
    difference = (on_disk(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max().item()
hits, misses = (sum(getattr(m, what) for m in mapped(on_disk).values()) for what in ("hits", "misses"))
read = sum(m.bytes_read for m in mapped(on_disk).values())
print(
    f"largest difference of a logit: {difference:.1e}; {read / 1e6:.2f} MB read in {misses} misses, {hits} hits, at one call for 48 tokens"
)
assert difference < 1e-3 and read == misses * size

# %% [markdown]
# A prompt is read at once, so that each expert is fetched at most once per call; the table above is about decoding, token by token.
#
# ## 8. After dropping: learning it back
#
# Half of the experts gone cost a task. The rest can learn from the original's distributions (`Distill`), or from the text alone
# (`FineTune`): minutes, so they were measured at build.
#
# **Predict.** Which brings back more, and does exact match return?

# %%
told, rows = lab.built("recovery")
display(Markdown(told))
if rows:
    plots.show_rows(rows)

# %% [markdown]
# **Answer.** Both bring back most of it. Learning from the original wins on KLD, by far, and on sums; on the assistant's exact match
# the text alone does as well: its answers are in the text.
#
# **Explain.** The original's distribution says more per token than the one word that followed. In one recipe:
# `Recipe((DropExperts(0.5), Distill(steps=800)))`; on a command line `edgelab compress MODEL --recipe phone --out OUT` does that and
# quantizes.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import torch

from edgelab import experts_lab as lab
from edgelab import plots

plots.show_rows(lab.toy_rows())  # of the first exercise

# %% [markdown] tags=["exercise"] exercise="reap-by-hand" difficulty=1 importance=3 minutes=5
# Three experts with the tokens of the table above. The REAP scores of A, B and C, by hand, and the name of the one that goes first:
# a pair such as `([1, 2, 3], "A")`.

# %% tags=["stub"]
answer = None  # ([score of A, of B, of C], name)

# %% tags=["check"]
lab.check_reap(answer)

# %% [markdown] tags=["hint"]
# A product for each token, then the mean over the tokens *of this expert*.

# %% [markdown] tags=["expected"]
# Three scores between 0.4 and 4, and a letter. By frequency another expert would go.

# %% tags=["solution"]
answer = ([(0.6 * 2.0 + 0.5 * 2.0 + 0.4 * 1.0 + 0.5 * 1.2) / 4, 0.9 * 4.0, (0.5 * 1.0 + 0.3 * 2.0 + 0.4 * 1.0) / 3], "C")

# %% [markdown] tags=["why"]
# 0.8, 3.6 and 0.5: C goes. B has a single token and does most with it; by frequency it would have gone.

# %% tags=["mutant"]
# a sum over tokens instead of their mean: the frequency comes back in by the window
answer = ([3.2, 3.6, 1.5], "C")

# %% tags=["mutant"]
# the mean over all tokens, not over the expert's own
answer = ([0.4, 0.45, 0.1875], "C")

# %% tags=["mutant"]
# right scores, but the rarest is dropped
answer = ([0.8, 3.6, 0.5], "B")

# %% tags=["mutant"]
# the gates are left out
answer = ([1.55, 4.0, 4 / 3], "C")

# %% [markdown] tags=["exercise"] exercise="reap" difficulty=2 importance=3 minutes=10
# The same as a function: `reap(gates, norms, chosen, experts)`. All three are tensors [tokens, k]: the gate of each choice, the norm of
# the output of the chosen expert, and its number. Returned are the scores of all `experts`; one that nobody chose has 0.


# %% tags=["stub"]
def reap(gates, norms, chosen, experts):
    """REAP scores [experts]: for each expert the mean, over the tokens that chose it, of gate times norm."""
    ...


# %% tags=["check"]
lab.check_reap_function(reap)

# %% [markdown] tags=["hint"]
# For each expert: `mine = chosen == e` is a mask of the choices that went to it. The mean of nothing is NaN: take care of that.

# %% [markdown] tags=["expected"]
# `reap(torch.tensor([[0.5], [0.25], [1.0]]), torch.tensor([[2.0], [4.0], [3.0]]), torch.tensor([[0], [0], [1]]), 2)` is `[1, 3]`.


# %% tags=["solution"]
def reap(gates, norms, chosen, experts):
    """REAP scores [experts]: for each expert the mean, over the tokens that chose it, of gate times norm."""
    done = gates * norms
    masks = [chosen == e for e in range(experts)]
    return torch.stack([done[mine].mean() if mine.any() else torch.tensor(0.0) for mine in masks])


# %% tags=["mutant"]
# divides by all tokens: a score that is small for whoever is rare
def reap(gates, norms, chosen, experts):
    return torch.stack([(gates * norms * (chosen == e)).sum() / len(chosen) for e in range(experts)])


# %% tags=["mutant"]
# the product of the means instead of the mean of the products
def reap(gates, norms, chosen, experts):
    masks = [chosen == e for e in range(experts)]
    return torch.stack([gates[m].mean() * norms[m].mean() if m.any() else torch.tensor(0.0) for m in masks])


# %% tags=["mutant"]
# forgets experts that nobody chose: the mean of nothing is NaN
def reap(gates, norms, chosen, experts):
    return torch.stack([(gates * norms)[chosen == e].mean() for e in range(experts)])


# %% tags=["mutant"]
# looks at each token's first choice only
def reap(gates, norms, chosen, experts):
    masks = [chosen[:, 0] == e for e in range(experts)]
    return torch.stack([(gates * norms)[:, 0][m].mean() if m.any() else torch.tensor(0.0) for m in masks])


# %% [markdown] tags=["exercise"] exercise="bytes-of-experts" difficulty=1 importance=2 minutes=5
# A mixture has 16 experts of 98,304 weights. Four get `int4-g32`, the others `int2-g32`. How many bytes do they take together?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_bytes(answer)

# %% [markdown] tags=["hint"]
# A float16 scale for each 32 weights.

# %% [markdown] tags=["expected"]
# Something above half a million bytes: 3 bits per weight on average.

# %% tags=["solution"]
answer = 98_304 * (4 * 4.5 + 12 * 2.5) / 8

# %% tags=["mutant"]
# the scales are forgotten
answer = 98_304 * (4 * 4 + 12 * 2) / 8

# %% tags=["mutant"]
# bits, not bytes
answer = 98_304 * (4 * 4.5 + 12 * 2.5)

# %% tags=["mutant"]
# the mean of the two schemes, as if half of the experts had each
answer = 98_304 * 16 * (4.5 + 2.5) / 2 / 8

# %% [markdown] tags=["exercise"] exercise="lru-hits" difficulty=2 importance=2 minutes=10
# RAM has room for `capacity` experts of a mixture and is empty at first. Token after token wants one expert; what is not there is
# read, and takes the place of the one whose last use is longest ago. Write `lru_hits(wanted, capacity)`: the number of hits.


# %% tags=["stub"]
def lru_hits(wanted, capacity):
    """How many of the `wanted` experts (a list of numbers, in order) were in RAM when they were wanted."""
    ...


# %% tags=["check"]
lab.check_lru(lru_hits)

# %% [markdown] tags=["hint"]
# Keep a list of what is in RAM, the oldest use first. A hit is a use, too: the expert moves to the end.

# %% [markdown] tags=["expected"]
# `lru_hits([1, 2, 3, 1, 4, 2, 1, 2], 3)` is 3. First in, first out would hit twice, and who knew the future 4 times.


# %% tags=["solution"]
def lru_hits(wanted, capacity):
    """How many of the `wanted` experts (a list of numbers, in order) were in RAM when they were wanted."""
    ram, hits = [], 0
    for expert in wanted:
        hits += expert in ram
        ram = ([e for e in ram if e != expert] + [expert])[-capacity:]
    return hits


# %% [markdown] tags=["why"]
# 1, 2, 3 miss. 1 hits: 2 3 1. 4 misses and takes the place of 2: 3 1 4. 2 misses and takes that of 3: 1 4 2. 1 and 2 hit: 3 of 8.


# %% tags=["mutant"]
# first in, first out: a hit does not make an expert the newest
def lru_hits(wanted, capacity):
    ram, hits = [], 0
    for expert in wanted:
        hits += expert in ram
        ram = ram if expert in ram else [*ram, expert][-capacity:]
    return hits


# %% tags=["mutant"]
# counts misses
def lru_hits(wanted, capacity):
    ram, misses = [], 0
    for expert in wanted:
        misses += expert not in ram
        ram = ([e for e in ram if e != expert] + [expert])[-capacity:]
    return misses


# %% tags=["mutant"]
# an expert is found as long as it was wanted at any time before: RAM without an end
def lru_hits(wanted, capacity):
    return sum(expert in wanted[:t] for t, expert in enumerate(wanted))


# %% tags=["mutant"]
# looks at the last `capacity` tokens instead of the last `capacity` different experts
def lru_hits(wanted, capacity):
    return sum(expert in wanted[max(0, t - capacity) : t] for t, expert in enumerate(wanted))


# %% tags=["mutant"]
# the hit rate instead of the hits
def lru_hits(wanted, capacity):
    ram, hits = [], 0
    for expert in wanted:
        hits += expert in ram
        ram = ([e for e in ram if e != expert] + [expert])[-capacity:]
    return hits / max(1, len(wanted))


# %% [markdown]
# ## What would change on your model
#
# The name and the text. Families are those of `edgelab.model.FAMILIES` (Mixtral, Qwen-MoE, OLMoE, GPT-OSS, DeepSeek-V3 and more). Take
# calibration text of *every* task that must survive, and measure each by itself: the mean over domains hides the one that is lost. On a
# large model REAP needs some hundred thousand tokens; an atlas needs as much memory as the model and patience for each edit.
