# %% [markdown]
# # 11 · Evaluate honestly, and reproduce the tables
#
# **Claim: most of what makes a comparison unfair can be seen in a few cells, on a small model, in a minute; of fifty figures that five
# articles give for language models on small devices, nearly every one can be computed, or modelled with a band, by a function that
# anybody may run; and a table is worth what its receipt is worth.**
#
# After this notebook you can
#
# 1. name eight ways in which a comparison of compressed models goes wrong, and show each,
# 2. ask of a saving what it is compared with, and of a size how many bits are behind it,
# 3. read an interval as a verdict does: not whether the mean is good enough, but whether its worst end is,
# 4. look up any of fifty claims, see what was run for it and by which rule it was judged, and run it again,
# 5. tell what was measured here, what at build, what was modelled and what simulated,
# 6. reproduce a table from a clean state, read its receipt, and find out that somebody edited it.
#
# *Before you start*: [04](04_quantize_a_model.ipynb), [05](05_pruning.ipynb) and [06](06_moe_experts.ipynb), where most of the methods
# come from. *Takes* a minute and a half on two cores and 2 GB of memory: what takes longer was **measured at build** by the same functions
# (`python -m edgelab.claims.index`), is read from a file, and says so; its verdict is computed here.
#
# | verdict | when |
# |---|---|
# | holds | the whole 95 % interval is on the right side of the claim |
# | holds in part | our value is, its interval is not; or the effect is there beyond doubt, and at least half as large as claimed |
# | doesn't hold here | neither: an effect of less than half of the size claimed is this, too |
# | can't be tested without the hardware | it takes a phone or board: it is modelled, the claim inside or outside of the band, or neither |
# | can't be tested without its model and data | something else was measured, and is shown |
#
# "Here" is two models of a few million weights, and a random one of 85 million for speed. What fails here may hold on a larger one, and
# the other way round. Each claim's rule, target and tolerance are columns of `data/claims.csv`.

# %%
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from IPython.display import display

from edgelab import Recipe, compress, honest_lab, plots, studies
from edgelab.claims import autoglm, cherry, deepseek, devices, guide, policies, qingzhou, service
from edgelab.claims.bench import Bench
from edgelab.claims.index import entry
from edgelab.data import calibration_batches
from edgelab.evaluate import measure
from edgelab.ledger import Entry, Ledger, judge, share_figure
from edgelab.paper_tables import drawn
from edgelab.receipts import Receipt
from edgelab.reproduce import reproduce, verify

# %% tags=["parameters"]
again = False  # True: measure also what was measured at build (most of an hour)
turns = 3  # of each timing
documents = {"prose": 4, "code": 4, "assistant": 40, "arithmetic": 40}  # of the test split, for the first part
calibration_tokens = 2048
out = "../runs/11"  # where ledger and tables are written

# %%
torch.set_num_threads(1)  # timings are of one thread anyway, and two of them wait for each other on a busy machine
bench = Bench(turns=turns)
book = Ledger()
take = partial(entry, bench=bench, again=again)
print(book)

# %% [markdown]
# ## 1. Evaluate honestly
#
# **Compared with what?** A file of so many bytes is many times smaller, or few times, by what stands beside it.
#
# **Predict.** int4-g32 in three lines: against float32, bfloat16, int8. Which of them would an advertisement print?

# %%
int4 = compress(bench.moe, Recipe.uniform("int4-g32"), progress=False)
plots.show_rows(honest_lab.against(int4.coverage.predicted_bytes, int4.coverage.parameters))

# %% [markdown]
# **How many bits?** Two methods "with 4 bits" need not take the same. Compare at equal *effective* bits, or you compare sizes.

# %%
plots.show_rows(honest_lab.effective(["int4-row", "int4-g128", "int4-g32", "uint4-g32", "nf4-g32", "mxfp4-g32"]))

# %% [markdown]
# **Calibrated on what?** GPTQ twice on the same weights: with text of the calibration split, and with the very documents that it is then
# tested on.
#
# **Predict.** Who has the lower KL divergence on these documents, and how much of it is real?

# %%
test = drawn(bench.corpus["test"], documents, seed=0)
fair, unfair = (
    calibration_batches(bench.tokenizer, split, tokens=calibration_tokens, context=256) for split in (bench.corpus["calibration"], test)
)
models = {"original": bench.dense}
models["to nearest"] = compress(bench.dense, Recipe.body("int3-g32"), progress=False).model
models["GPTQ"] = compress(bench.dense, Recipe.body("int3-g32", method="gptq"), calibration=fair, progress=False).model
models["GPTQ, saw the test"] = compress(bench.dense, Recipe.body("int3-g32", method="gptq"), calibration=unfair, progress=False).model
measured = measure(models, bench.tokenizer, test, max_docs=None, context=256, progress=False)
plots.show_rows(honest_lab.divergences(measured))

# %% [markdown]
# **Side by side, or paired?** Each model's own interval says how much *documents* differ. Both models read the same ones, so what differs
# between documents falls out of their difference.

# %%
plots.show_rows(honest_lab.two_ways(measured, "to nearest", "GPTQ"))

# %% [markdown]
# **What does perplexity hide?** It can stay where it is while answers change places: some go wrong, others come right, and the mean does
# not notice. *Flips* count them; McNemar's test says whether more went wrong than came right.

# %%
plots.show_rows(honest_lab.hidden(measured, ["to nearest", "GPTQ"]))

# %% [markdown]
# **How many did you try?** The best of many is good partly by luck. Here each "method" changes nothing: the sign of every document's
# difference is thrown, so the truth is zero.
#
# **Predict.** One is called better, wrongly, 2.5 times in a hundred. The best of twenty?

# %%
plots.show_rows(honest_lab.luck(honest_lab.differences(measured, "to nearest", "GPTQ", "arithmetic")))

# %% [markdown]
# **How many seeds?** A quarter of the experts dropped at random, three times (measured at build). An interval over documents knows nothing
# of seeds.

# %%
plots.show_rows(honest_lab.seeds_apart(studies.read("experts").report, {f"seed {s}": f"random {s} 25%" for s in range(3)}))

# %% [markdown]
# **Explain.** The advertisement prints the first line, of a format that nobody ships. A scale per 32 weights is half a bit, and an offset
# another half: at "4 bits" one method may have an eighth more to spend. What saw the test looks better on the test: by how much is in the
# table, and none of it would be there on your text. Side by side the intervals always overlap; paired, some domains are settled and others
# stay open, which is an answer, too. A model may lose no point and no perplexity while one answer in twenty is another one. The best of
# twenty "methods" looks better in two of five tries. And no interval of one seed holds the other two.

# %% [markdown]
# ## 2. DeepSeek-R1 on a phone
#
# **Predict.** 4-bit codes shrink 16-bit weights how many times at most? The article says 4.06. And ten minutes of running cost 1 % of the
# battery: how many watts is that?

# %% [markdown]
# **A1.** 4-bit symmetric quantization shrinks the model: 4.06 x smaller (13 GB to 3.2 GB) (INT4 symmetric).

# %%
book.enter(take(deepseek.a1))

# %% [markdown]
# **A2.** Accuracy kept after that compression: 70 % of original (INT4 symmetric).

# %%
book.enter(take(deepseek.a2))

# %% [markdown]
# **A3.** 128 experts with 4 active; accuracy close to the full model: 92 % task accuracy (top-4 of 128).

# %%
book.enter(take(deepseek.a3))

# %% [markdown]
# **A4.** FP32 to INT4 inference time on Snapdragon 8 Gen 2: 3.24 x faster (12.3 s to 3.8 s) (FP32 vs INT4).

# %%
book.enter(take(deepseek.a4))

# %% [markdown]
# **A5.** Memory use falls: 75 % less (FP32 vs INT4).

# %%
book.enter(take(deepseek.a5))

# %% [markdown]
# **A6.** Quantization error with dynamic-range quantization: 2 % at most (INT8 weights).

# %%
book.enter(take(deepseek.a6))

# %% [markdown]
# **A7.** Weights loaded on demand in chunks: 256 MB per chunk (chunked loading).

# %%
book.enter(take(deepseek.a7))

# %% [markdown]
# **A8.** Cold-start load time on Xiaomi 13 Pro: 12.3 s (INT4).

# %%
book.enter(take(devices.a8))

# %% [markdown]
# **A9.** Steady latency per inference on Xiaomi 13 Pro: 1.8 s (INT4).

# %%
book.enter(take(devices.a9))

# %% [markdown]
# **A10.** Peak memory on Xiaomi 13 Pro: 2.8 GB (INT4).

# %%
book.enter(take(devices.a10))

# %% [markdown]
# **A11.** Battery used in continuous running: 1 % per 10 min (INT4).

# %%
book.enter(take(devices.a11))

# %% [markdown]
# **A12.** Compute removed by weight pruning (planned): 40 % less (pruning).

# %%
book.enter(take(deepseek.a12))

# %% [markdown]
# **A13.** NPU speed-up over CPU (planned): 2-3 x faster (NPU).

# %%
book.enter(take(devices.a13))

# %% [markdown]
# **A14.** Below 20 % battery switch to a low-power mode: 20 % battery (policy).

# %%
book.enter(take(policies.a14))

# %% [markdown]
# **A15.** When hot: fall back to 2 threads and leave 500 ms between inferences: 2 threads (policy).

# %%
book.enter(take(policies.a15))

# %% [markdown]
# **Explain.** 16 / 4 is 4.00 before the first scale is stored, so 4.06 cannot come from 16 bits. And 1 % of an 18.65 Wh battery in ten
# minutes is 1.12 W for all of it. What A8 to A11 say of one phone does not fit together with the rest: a file of 3.2 GB that peaks at
# 2.8 GB, a watt for a processor that runs all the time, and a cold start ten times as long as the flash needs. The accuracy that 4 bits
# keep is far *above* the 70 % that the article settles for. Speed (A4) is our runtime against itself in float32; the line with torch in it
# shows how much less of it arrives where each layer is called from Python.

# %% [markdown]
# ## 3. Cherry Studio and DeepSeek-R1-0528
#
# **Predict.** KL calibration is the classic rule for static 8-bit activations. Does it lose less than 1.2 points on a language model? And
# what does "dynamic" channel pruning do to the size of a file?

# %% [markdown]
# **B1.** Dynamic channel pruning shrinks the model: 4.29 x smaller (12 GB to 2.8 GB) (channel pruning).

# %%
book.enter(take(cherry.b1))

# %% [markdown]
# **B2.** The same pruning speeds up inference: 3.2 x faster (channel pruning).

# %%
book.enter(take(cherry.b2))

# %% [markdown]
# **B3.** 16 experts with 2-4 active cut FLOPs per inference: 62 % less (top-2..4 of 16).

# %%
book.enter(take(cherry.b3))

# %% [markdown]
# **B4.** Local 32x32 window plus 16x16 global sparse attention on long text: 40 % more efficient (sparse attention).

# %%
book.enter(take(cherry.b4))

# %% [markdown]
# **B5.** Per-channel INT8 weight accuracy loss: 0.8 % at most (INT8 per channel).

# %%
book.enter(take(cherry.b5))

# %% [markdown]
# **B6.** KL-calibrated INT8 vs FP16 accuracy difference: 1.2 % at most (W8A8 KL).

# %%
book.enter(take(cherry.b6))

# %% [markdown]
# **B7.** Input resolution adapts from 224 to 896; small-object accuracy rises: 72 to 89 % (dynamic resolution).

# %%
book.enter(take(cherry.b7))

# %% [markdown]
# **B8.** Memory engine lowers peak memory: 45 % less (memory planning).

# %%
book.enter(take(service.b8))

# %% [markdown]
# **B9.** Latency below TensorRT Lite on AGX Orin: 18 % lower (runtime).

# %%
book.enter(take(devices.b9))

# %% [markdown]
# **B10.** Pooling + dynamic batching (2 to 8) + Conv-BN-ReLU fusion on Xavier NX: 12 to 28 FPS (all three).

# %%
book.enter(take(service.b10))

# %% [markdown]
# **B11.** Unsupported operators are swapped (GELU for SiLU): 1 swap (operator fallback).

# %%
book.enter(take(cherry.b11))

# %% [markdown]
# **B12.** Overall cost against a cloud solution: 68 % lower (economics).

# %%
book.enter(take(devices.b12))

# %% [markdown]
# **Explain.** The first answer is no: compare B5 and B6. With 8-bit weights nearly nothing is lost, and with KL ranges for activations a
# lot, while other rules on the same histograms lose little: the threshold that fits a histogram best clips the few values that a language
# model hangs on ([03](03_calibration_kl.ipynb)). The second: "dynamic" pruning does nothing to a file, for every weight stays (1.00 x in
# B1). In B8 look at what it is compared with: "every buffer its own" frees nothing, and transformers frees what it is done with. In B9
# there is no value at all, for nothing here tells two runtimes on one board apart. Whether boards are cheaper than a cloud is decided by
# the number of requests, which the claim leaves out.

# %% [markdown]
# ## 4. Open-AutoGLM
#
# **Predict.** An early exit leaves the deeper blocks out for easy tokens. Must it be faster? And power fell from 210 to 145 mW where
# latency fell from 89 to 62 ms: what do you get for 210 · 62 / 89?

# %% [markdown]
# **C1.** INT8 relative inference speed: 2.5 x FP32 (INT8).

# %%
book.enter(take(autoglm.c1))

# %% [markdown]
# **C2.** INT8 memory use: 25 % of FP32 (INT8).

# %%
book.enter(take(autoglm.c2))

# %% [markdown]
# **C3.** Dynamic branch inference latency: 89 to 62 ms (shallow/deep branch).

# %%
book.enter(take(autoglm.c3))

# %% [markdown]
# **C4.** Dynamic branch inference power: 210 to 145 mW (shallow/deep branch).

# %%
book.enter(take(devices.c4))

# %% [markdown]
# **C5.** Average GLUE accuracy of the compressed model against BERT-base and RoBERTa-large: 89.2 vs 85.4 and 87.9 % (KD + dynamic
# pruning).

# %%
book.enter(take(autoglm.c5))

# %% [markdown]
# **C6.** Latency on a low-end phone CPU after pruning + INT8: 860 to 310 ms (Cortex-A53 2 GB).

# %%
book.enter(take(devices.c6))

# %% [markdown]
# **C7.** Default INT8 optimisation shrinks the file: 75 % smaller (INT8 dynamic range).

# %%
book.enter(take(autoglm.c7))

# %% [markdown]
# **C8.** DVFS + sleep against a fixed high frequency: 650 to 320 mW (2.1 to 4.7 ms latency) (DVFS).

# %%
book.enter(take(policies.c8))

# %% [markdown]
# **C9.** Depthwise separable convolution cost ratio: 1/K^2 + 1/N of a standard convolution (convolution).

# %%
book.enter(take(autoglm.c9))

# %% [markdown]
# **C10.** Only encrypted features leave the device: 0 raw inputs sent (local features).

# %%
book.enter(take(service.c10))

# %% [markdown]
# **Explain.** An exit need not be faster: each token that stays pays for the exit's own product with the head, which costs the same in a
# model of four blocks and of forty, and what it saves at equal accuracy is less than what it saves when answers may go wrong (both stand
# in C3). And 210 · 62 / 89 is 146: the article's power is its latency, scaled, so it says nothing beyond C3. GLUE cannot be run on models
# that never saw its words: what is measured has the same form and is no substitute.

# %% [markdown]
# ## 5. Qingzhou
#
# **Predict.** "2.3 times faster, 1.2 % lost, by two of 16 experts." Against what?

# %% [markdown]
# **D1.** MoE speeds inference: 2.3 x faster (top-2 gate).

# %%
book.enter(take(qingzhou.d1))

# %% [markdown]
# **D2.** Accuracy lost by that routing: 1.2 % drop (top-2 gate).

# %%
book.enter(take(qingzhou.d2))

# %% [markdown]
# **D3.** Energy per inference against the cloud model: 72 % less (MoE + dynamic compute).

# %%
book.enter(take(devices.d3))

# %% [markdown]
# **D4.** Below 20 % battery: latency added: 15 % more (policy).

# %%
book.enter(take(policies.d4))

# %% [markdown]
# **D5.** Below 20 % battery: endurance gained: 40 % longer (policy).

# %%
book.enter(take(policies.d5))

# %% [markdown]
# **D6.** INT8 QAT accuracy relative to FP32: 98.7 % of FP32 (QAT INT8).

# %%
book.enter(take(qingzhou.d6))

# %% [markdown]
# **D7.** Model size after it: 0.25 of FP32 (QAT INT8).

# %%
book.enter(take(qingzhou.d7))

# %% [markdown]
# **D8.** Labelled examples enough to adapt to a new domain: 1000 examples (LoRA/fine-tune of the compressed model).

# %%
book.enter(take(qingzhou.d8))

# %% [markdown]
# **D9.** First token of a big model on a phone without compression: 2 s and more (FP16).

# %%
book.enter(take(devices.d9))

# %% [markdown]
# **Explain.** Against what? The article does not say. Against all 16 active, which no one runs, the speed can be measured, and it hangs on
# what else there is: D1 is judged by the setting in which it is least. The accuracy cannot: all 16 make a model *worse* that was trained
# with two, so it "loses" less than nothing, and the comparison that would count, a dense twin of the same text and size, is not here.
# D4 and D5 are one policy, and a claim of two figures has to hold at once: the line says in how many draws it does. Of "1,000 examples
# are enough" half is true: the new task is learnt, and how much of it depends on what may be forgotten.

# %% [markdown]
# ## 6. The guide to models on phones
#
# **Predict.** Half of the weights are zero. Does a sparse format take fewer bytes than the dense one? Than dense 4-bit codes?

# %% [markdown]
# **E1.** Pruned weights stored as sparse matrices use less memory (sparse).

# %%
book.enter(take(guide.e1))

# %% [markdown]
# **E2.** Fine-tuning after compression recovers task accuracy (fine-tune).

# %%
book.enter(take(guide.e2))

# %% [markdown]
# **E3.** Differential privacy for data used to adapt the model (DP-SGD).

# %%
book.enter(take(service.e3))

# %% [markdown]
# **E4.** Deployed model is monitored in real time (monitor).

# %%
book.enter(take(service.e4))

# %% [markdown]
# **Explain.** Fewer than the dense one in 16 bits, yes; fewer than dense 4-bit codes, no, which keep every weight. Name what a size is
# compared with. The other three say that something *exists*: that accuracy recovers, that an epsilon is reported, that figures are shown.
# An epsilon alone is easily had, with a model that learnt nothing, so E3 asks for a useful model as well; its threshold, and that of E2,
# are ours.

# %% [markdown]
# ## 7. The ledger
#
# The whole table, and the same as a page, for LaTeX, as CSV and JSON. (`edgelab ledger --out FOLDER` does that at the shell.)

# %%
for path in book.write(out):
    print(path)
display(book)
print(book)
assert book.missing() == []

# %% [markdown]
# **Predict.** Of the claims that name an effect, how many reach all of it, how many half, and how many lie within a tenth of their figure?

# %%
plots.show(share_figure(book), book.reached())
print(book.reached())

# %% [markdown]
# **Explain.** The sentence counts. Above the line are claims that hold with room to spare, and below the dotted one
# those whose effect is less than half of what was said. Those close to the line are the ones whose verdict the next measurement may turn.

# %% [markdown]
# **The control that must fail.** A ledger that says "holds" to everything is worth nothing. Three things have to go wrong: a claim without
# a value must get no verdict; an entry must not be judged by another claim; and a value that is worse than the claim by a little must not
# hold, however it is called.

# %%
refused = []
for claim, found in (("A1", None), ("A2", book.entries["A1"])):
    try:
        judge(book.claims[claim], found)
    except (LookupError, ValueError) as error:
        refused.append(str(error))
print("\n".join(refused))
assert len(refused) == 2

worse = Entry("B5", "the same answers, with 0.8 points more lost", 0.9, 0.85, 0.95, "points lost", 1000, "a control")
print(judge(book.claims["B5"], worse))
assert judge(book.claims["B5"], worse).word == "doesn't hold here"

# %% [markdown]
# **Predict.** How many verdicts change if a claim has to hold within 20 % of its figure only?

# %%
lenient = [(c, judge(replace(c, tolerance=0.2), book.entries[c.id])) for c in book.claims.values()]
changed = [
    {"claim": c.id, "wanted": c.wanted, "ours": book.entries[c.id].text, "as it is": str(book.verdict(c.id)), "within 20 %": str(v)}
    for c, v in lenient
    if str(v) != str(book.verdict(c.id))
]
plots.show_rows(changed)
print(f"{len(changed)} of {len(lenient)} verdicts hang on the tolerance")

# %%
rows = []
for t in (0.05, 0.1, 0.2, 0.4):
    verdicts = {c.id: str(judge(replace(c, tolerance=max(t, c.tolerance)), book.entries[c.id])) for c in book.claims.values()}
    other = [c for c, v in verdicts.items() if v != str(book.verdict(c))]
    rows.append({"within": f"{t:.0%}", "verdicts that change": str(len(other)), "which": ", ".join(other)})
plots.show_rows(rows)

# %% [markdown]
# **Explain.** The line above the table answers the question. A verdict that is there at 20 % and not without hangs on a choice of ours, not
# on a measurement: these are the ones to measure again with more answers, or on your model. One that stays at 40 % does not.

# %% [markdown]
# ## 8. Reproduce a table, and read its receipt
#
# `edgelab reproduce` runs each table of this project through papermill: a fresh kernel in a fresh folder, three seeds, and for every cell a
# verdict against stored values. All of them take half an hour and more; here is the shortest. It measures nothing again: it judges the
# stored results of the long studies by the rules as they are now, which shows the machinery, not that the figures come out again.
#
# **Predict.** Which of its cells can differ between two machines?

# %%
tables = Path(out) / "tables"
shutil.rmtree(tables, ignore_errors=True)
(outcome,) = reproduce(["studies"], seeds=1, quick=True, out=tables, progress=False)
display(outcome.table)
plots.show_rows([outcome.line()])
assert outcome.table.counts().get("differs", 0) == 0

# %% [markdown]
# **The receipt** says what a reader needs to get the same: settings, seed, the code that was loaded, the data, the versions.

# %%
receipt = Receipt.read(tables / "studies")
facts = receipt.facts()
plots.show_rows([{"what": k, "value": facts[k]} for k in ("what", "settings", "code", "data", "versions")])
print(*sorted(path.name for path in (tables / "studies").iterdir() if path.is_file()), sep="\n")

# %% [markdown]
# A second time nothing runs: the receipt still fits. And `edgelab verify-tables` says from the files alone what they are worth.

# %%
(again_there,) = reproduce(["studies"], seeds=1, quick=True, out=tables, progress=False)
assert again_there.ran == () and again_there.kept == (0,)
(verified,) = verify(tables)
plots.show_rows([verified.line()])
assert verified.remarks == ()

# %% [markdown]
# **The control that must fail.** One digit of the table is edited. Then, cleverer, the receipt too, with the right hash of the edited file.

# %%
table = tables / "studies" / "studies.csv"
honest = table.read_text()
table.write_text(honest.replace("0.18", "0.08", 1))
(caught,) = verify(tables)
print(*caught.remarks, sep="\n")
assert any("was edited" in remark for remark in caught.remarks)

# %%
from edgelab import receipts

receipts.write(tables / "studies", receipt, receipt.outputs)
(caught,) = verify(tables)
print(*caught.remarks, sep="\n")
assert caught.remarks and not any("was edited" in remark for remark in caught.remarks)

# %%
table.write_text(honest)
receipts.write(tables / "studies", receipt, receipt.outputs)
assert verify(tables)[0].remarks == ()

# %% [markdown]
# **Explain.** None of this table's cells can differ, for they are read and judged; of others the measured ones can, in their last digits:
# another order of additions turns a rounding now and then. How much is measured when values are stored (two threads, an older
# processor), and three times that is what a cell may be off. Times are printed and never judged. A forged receipt fits the file, and
# the file no longer follows from its cells; who forges these as well has to be found by running, which is what `edgelab reproduce` is for.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
from edgelab.claims import exercises as lab

before, after = lab.BEFORE, lab.AFTER  # ten answers of a model and of its compressed form; 1 is right
value, two_threads, older_processor = lab.VALUE, *lab.AGAIN

# %% [markdown] tags=["exercise"] exercise="flips" difficulty=1 importance=3 minutes=4
# Ten answers before compression, `1111110000`, and after it, `0111101100` (1: right). How many points of accuracy are lost, and what per
# cent of the answers are *flips*?

# %% tags=["stub"]
points_and_flips = None  # (points, per cent)

# %% tags=["check"]
lab.check_flips(points_and_flips)

# %% [markdown] tags=["hint"]
# Accuracy counts ones. Flips compare place by place.

# %% [markdown] tags=["expected"]
# Two numbers, of which one is as small as it can be.

# %% tags=["solution"]
points_and_flips = (0, 40)

# %% [markdown] tags=["why"]
# Six of ten are right before and after. Two went wrong and two came right: four of ten answers are other ones.

# %% tags=["mutant"]
# equal accuracy means equal answers
points_and_flips = (0, 0)

# %% tags=["mutant"]
# only what went wrong counts
points_and_flips = (0, 20)

# %% tags=["mutant"]
# what went wrong is lost, whatever came right
points_and_flips = (20, 40)

# %% tags=["mutant"]
# flips as a count, not in per cent
points_and_flips = (0, 4)

# %% [markdown] tags=["exercise"] exercise="luck-of-twenty" difficulty=2 importance=3 minutes=5
# Twenty methods change nothing. Each is called better if its 95 % interval lies wholly on the good side. What is the chance that at least
# one is? Take them as independent.

# %% tags=["stub"]
chance = None

# %% tags=["check"]
lab.check_luck(chance)

# %% [markdown] tags=["hint"]
# A 95 % interval misses zero in 5 of 100 cases, and in half of them on the good side. What is the chance that none of twenty does?

# %% [markdown] tags=["expected"]
# Between a third and a half.

# %% tags=["solution"]
chance = 1 - 0.975**20

# %% tags=["mutant"]
# chances add up
chance = 20 * 0.025

# %% tags=["mutant"]
# both sides of the interval count as better
chance = 1 - 0.95**20

# %% tags=["mutant"]
# the chance that none is
chance = 0.975**20

# %% tags=["mutant"]
# trying more changes nothing
chance = 0.025

# %% [markdown] tags=["exercise"] exercise="verdict" difficulty=1 importance=3 minutes=3
# "At most 0.8 % lost". You measured a loss of 0.5 points with the interval [−0.1, 1.1]. The verdict, by this ledger's rule?

# %% tags=["stub"]
answer = None  # a text

# %% tags=["check"]
lab.check_verdict(answer)

# %% [markdown] tags=["hint"]
# Look at the worst end of the interval, then at the value.

# %% [markdown] tags=["expected"]
# One of the verdicts of the table at the beginning.

# %% tags=["solution"]
answer = "holds in part"

# %% tags=["mutant"]
# the mean is good enough
answer = "holds"

# %% tags=["mutant"]
# an interval that reaches over the limit refutes
answer = "doesn't hold here"

# %% tags=["mutant"]
# an uncertain value is an untested one
answer = "can't be tested without the hardware"

# %% [markdown] tags=["exercise"] exercise="bits-behind-a-size" difficulty=1 importance=2 minutes=3
# 13 GB of 16-bit weights became 3.2 GB: how many bits per weight, scales and all?

# %% tags=["stub"]
bits = None

# %% tags=["check"]
lab.check_bits(bits)

# %% [markdown] tags=["hint"]
# The share of bytes that is left is the share of bits that is left.

# %% [markdown] tags=["expected"]
# A little less than 4, which codes alone would take.

# %% tags=["solution"]
bits = 16 * 3.2 / 13

# %% tags=["mutant"]
# what the article says it did
bits = 4.0

# %% tags=["mutant"]
# how many times smaller it is
bits = 13 / 3.2

# %% tags=["mutant"]
# the original taken for 32 bits
bits = 32 * 3.2 / 13

# %% [markdown] tags=["exercise"] exercise="break-even" difficulty=2 importance=1 minutes=8
# A board costs 249 USD, is used for four years, takes 15 W day and night at 0.30 USD per kWh. An answer from
# the cloud costs 0.0005 USD. From how many answers a day is the board cheaper?

# %% tags=["stub"]
answers_a_day = None

# %% tags=["check"]
lab.check_break_even(answers_a_day)

# %% [markdown] tags=["hint"]
# A year has 8,766 hours: 1 W takes 8.766 kWh in it.

# %% [markdown] tags=["expected"]
# Some hundreds a day.

# %% tags=["solution"]
a_year = 249 / 4 + 15 * 8.766 * 0.30
answers_a_day = a_year / 0.0005 / 365.25

# %% tags=["mutant"]
# the power is forgotten
answers_a_day = 249 / 4 / 0.0005 / 365.25

# %% tags=["mutant"]
# the whole price in the first year
answers_a_day = (249 + 15 * 8.766 * 0.30) / 0.0005 / 365.25

# %% tags=["mutant"]
# answers a year
answers_a_day = (249 / 4 + 15 * 8.766 * 0.30) / 0.0005

# %% tags=["mutant"]
# watt-hours taken for kilowatt-hours
answers_a_day = (249 / 4 + 15 * 8766 * 0.30) / 0.0005 / 365.25

# %% [markdown] tags=["exercise"] exercise="tolerance" difficulty=2 importance=2 minutes=5
# A KL divergence of 0.0400 is stored. When it was stored the same seed ran again with two threads, 0.0403, and on an older processor,
# 0.0396. How far from 0.0400 may your run of that seed be and still agree, by the rule of `edgelab reproduce`?

# %% tags=["stub"]
within = None  # in nats per token

# %% tags=["check"]
lab.check_tolerance(within)

# %% [markdown] tags=["hint"]
# The largest change counts, and the next machine is another one still.

# %% [markdown] tags=["expected"]
# Three per cent of the value.

# %% tags=["solution"]
within = 3 * abs(older_processor - value)

# %% tags=["mutant"]
# what two runs show is all that can happen
within = abs(older_processor - value)

# %% tags=["mutant"]
# the smaller change
within = 3 * abs(two_threads - value)

# %% tags=["mutant"]
# the changes add up
within = 3 * (abs(two_threads - value) + abs(older_processor - value))

# %% tags=["mutant"]
# relative instead of in nats
within = 3 * abs(older_processor - value) / value

# %% [markdown]
# ## What would change on your model
#
# Sizes and counts change with its shape and not with its training: run the A1, A5, C7 and E1 functions on it first. Accuracy on larger
# models suffers less from 4 bits and from zeros, and your task may be another than commands and sums: give the answers that you care
# about, and more of them than you think, for a loss of under one point takes a thousand answers to be sure of. Speeds are of one thread of
# this processor. And the modelled lines are where a measurement is worth most: a phone and an hour. For a table of your own model,
# `edgelab compare MODEL --out FOLDER` keeps the first part's rules: equal effective bits, calibration apart from the test, paired
# intervals.
#
# ```python
# from transformers import AutoModelForCausalLM
#
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")  # needs a network once; then as above
# ```
