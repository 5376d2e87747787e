# %% [markdown]
# # 02 · The quantized product
#
# **Claim: a model that writes one token at a time waits for its weights, not for its arithmetic; so a product with 4-bit
# weights takes about as long as reading them, many times less than unpacking them first, and gives the same answer.**
#
# After this notebook you can
#
# 1. say from two measured numbers how long a product takes at least, and which of them binds it,
# 2. find the number of tokens from which on arithmetic, not memory, is what counts,
# 3. recognise a benchmark that measured the cache,
# 4. read the layout of packed weights, bit by bit,
# 5. choose between one scale per matrix, row and group, with the error and the bytes of each in hand,
# 6. say what quantizing the activations costs on top, and prove that a fast kernel computes what it should.
#
# *Before you start*: [00, start here](00_start_here.ipynb), and "scale × (code − zero point)" from
# [01](01_compress_evaluate_export.ipynb). *Takes* less than a minute on two cores and 2 GB of memory; the very first
# run some seconds more, because kernels are compiled once and kept. Every cell may be run again. Times are medians with
# their quartiles in brackets and belong to the machine that they name: close what else is at work before you believe
# them.

# %%
import numpy as np
import torch
from IPython.display import HTML, Markdown, display

from edgelab import QuantScheme, data, plots, set_threads, words
from edgelab import matmul_lab as lab
from edgelab.kernels.reference import PAIRS
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.report import machine
from edgelab.tile_picture import TilePicture
from edgelab.widgets import MatmulControl

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a Hugging Face causal language model
tokens = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]  # rows of activations to measure
repeat = 8  # how often the weight stands beside itself where time is measured
threads = 1
seed = 0

# %% [markdown]
# The weight of this notebook is the model's output head: it turns a token's hidden state into one number per word of
# the vocabulary. The activations are hidden states that the model computed on text it was not trained on. Where *time*
# is measured, the weight stands beside itself a few times, so that it is as large as a phone model's; errors are those
# of the weight itself.

# %%
set_threads(threads)
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = "\n".join(row["text"] for row in data.corpus()["test"].select(range(24)))
ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids
with torch.no_grad():
    answer = model(ids, output_hidden_states=True)
weight, x = model.lm_head.weight.detach().float(), answer.hidden_states[-1][0].float().numpy()
assert np.allclose(x @ weight.numpy().T, answer.logits[0].numpy(), atol=1e-3), "these are not the head's inputs"
wide_x = np.tile(np.resize(x, (max(tokens), x.shape[1])), (1, repeat))  # as many rows as we need, as wide as the repeated weight
four_bits = lab.repeated(round_to_nearest(weight, QuantScheme.parse("int4-g32")), repeat)
print(machine())
print(f"the head: {tuple(weight.shape)}; activations {x.shape}; for time: {four_bits}")

# %% [markdown]
# ## 1. Two ceilings
#
# A product of *t* rows of activations with an *m* × *n* weight does 2·*t*·*m*·*n* operations (a multiplication and an
# addition each) and reads the weight once, whatever *t* is. So the **operations per byte** grow with *t*. A processor
# has a ceiling for each: bytes per second from memory, operations per second. Whichever takes longer binds: that is the
# **roofline**.
#
# **Predict.** How many operations can one core do in the time in which it reads one byte from memory: 1, 25, or 1,000?

# %%
roof = lab.measure_roofline()
print(roof)
print(f"in the time of one byte: {roof.integer / roof.read:.0f} operations on bytes, {roof.floats / roof.read:.0f} on floats")
for bits in (4.5, 8.5, 32):
    needs = f"{16 / bits:.1f} operations per byte for one token"
    print(f"{bits:4} bits per weight: {needs}; int8 arithmetic binds from {roof.crossover(bits, 'int8'):.1f} tokens on (computed)")

# %% [markdown]
# **Answer.** The line "in the time of one byte" says it: about 25 on the machine of the stored output, neither 1 nor 1,000.
#
# **Explain.** Decoding uses each weight once per token, for two operations; the core could do many more while the bytes
# arrive. It waits. At 4 bits and more, with int8 activations, nothing that saves arithmetic makes decoding faster; what saves
# *bytes* does. (At 2 bits in float32 so few bytes are left that arithmetic binds: section 8's table has it.) A prompt has hundreds of
# tokens that share each weight: there arithmetic binds, and smaller weights help little. The ceiling of float32 products is
# computed, not measured: a vector holds a quarter as many floats as bytes and one instruction multiplies either, so it is
# the byte peak / 4 (3/4 of it on AVX2 without VNNI, where a byte product takes three instructions).

# %% [markdown]
# ## 2. Predicted against measured
#
# Activations stay float32 (weight-only, "W4A16") or are themselves rounded to 8 bits on the way in ("W4A8"), group by group,
# so that the products are those of integers, which the processor does several times as fast.
#
# **Predict.** From 1 token to 8, the work grows eightfold. How much longer does the product with int8 activations take?

# %%
rotation = lab.Rotation()
points, roof = lab.sweep(four_bits, wide_x, tokens, roof, rotation)
sentence = lab.say_times(points, roof)
plots.show(lab.time_against_tokens(points, roof), sentence)
display(Markdown(sentence))
display(Markdown(words.markdown([p.row for p in points])))

# %% [markdown]
# **Look.** Left of the knee the limit is flat: reading the weights takes as long for several tokens as for one. Right
# of it time grows with the tokens. A share of 1 is the roof itself; a share above 1 says that something disturbed the
# measurement of the ceiling: run the cell again.
#
# **Answer.** With int8 activations 8 rows take one and a half times as long as 1, not eight times: up to the knee, at about 7
# rows, another row is nearly free.
#
# **Explain.** The limit is a bound, not a forecast. Around the knee a kernel pays for both, since reading and computing do
# not overlap perfectly; with float32 activations it must also turn each code into a float. Up to 8 rows it does so in
# registers; for more it unpacks some codes into the first-level cache, for all rows at once, which pays the more the more
# rows there are: so the share falls at 16 rows and climbs again (on AVX-512; other processors change over elsewhere). The
# limit counts the weights alone: for few tokens activations and results are small beside them, and stay in the cache. The
# ceilings are measured again beside each product, and the highest count: what else runs can only lower them.

# %% [markdown]
# **The first control that must fail: the same weight again and again.** Most benchmarks multiply by one weight in a loop.
# After the first round it lies in the cache, and memory is not measured at all.
#
# **Predict.** Which share of the *memory* limit does such a benchmark report: 0.9, or more than 1?

# %%
cache = lab.cached_and_not(four_bits, wide_x[:1], roof, rotation)
for name, p in cache.items():
    print(f"{name:14}  {p.timing}   {p.nbytes / p.timing.median / 1e9:6.1f} GB/s   {p.share:.2f} of the memory limit")
print(f"the last cache holds {lab.last_level_cache() / 1e6:.0f} MB, the copies are {rotation.nbytes / 1e6:.0f} MB")
assert cache["from the cache"].timing.median < cache["from memory"].timing.median

# %% [markdown]
# **Answer.** More than 1: about twice what memory can deliver on the machine of the stored output.
#
# **Explain.** More than the memory can deliver, so it was not the memory that delivered. A real model reads all its
# other layers between two uses of the same weight. So here every call takes the next of many copies, which together are
# far larger than the cache.

# %% [markdown]
# ## 3. The baseline: unpack, then multiply
#
# The obvious way to use packed weights is to make floats of them and multiply those.
#
# The naive line below does so with NumPy, in the two lines of code that anyone would write first. The fair line keeps the
# weights as float32, unpacked once and for all, and multiplies with torch.
#
# **Predict.** Both compute the same. How much longer does each take for one token: 2, 10 or 300 times?

# %%
times = lab.contest(four_bits, wide_x[:1], rotation)
best = times["kernel, int8 activations"].median
display(
    Markdown(
        words.markdown([{"one token": k, "time (measured)": str(t), "times as long": f"{t.median / best:,.1f}"} for k, t in times.items()])
    )
)
dense = 4 * weight.numel() * repeat
print(f"{four_bits.nbytes:,} bytes packed, {dense:,} as float32 (counted): {dense / four_bits.nbytes:.1f} times as many; read (measured)")
for name, nbytes in (("kernel, int8 activations", four_bits.nbytes), ("float32 weights, torch", dense)):
    print(f"  {nbytes / times[name].median / 1e9:5.1f} GB/s by: {name}")
naive, unpacking = (times[name].median for name in ("naive: dequantize, then multiply, NumPy", "of it, dequantize alone"))
print(f"dequantizing alone takes {100 * unpacking / naive:.0f} % of the time of the naive way")
assert naive > 3 * best and times["float32 weights, torch"].median > best

# %% [markdown]
# **Answer.** Some 10 times with float32 weights, and hundreds of times the naive way.
#
# **Explain.** The two numbers have different causes. Float32 takes 32 bits where int4-g32 takes 4.5: seven times the bytes,
# and one token waits for bytes. NumPy's product of float32 weights (the last line) takes nearly that many times as long; the
# rest, up to what torch takes, is how steadily each reads: compare the GB/s. *That* is what packed weights are worth. The
# naive way spends nearly all its time before it multiplies at all: taking the bytes apart (*unpack*) is a NumPy loop of a
# few operations for each byte, a handful of codes at a time, and then converting, subtracting and scaling make one array of
# floats after the other, four bytes for each weight. That tells how this NumPy code is written, and little about 4 bits: it
# is no speed-up to boast of. The kernel does all these steps too, but in registers, on bytes that it reads once.
#
# Each kind is timed by itself, the two kernels in turn as in section 2, so that their times here are those of section 2.
# (Beside NumPy's temporaries in the same loop they took a third longer: their data push out others', and the clock follows
# the load. NumPy may use more threads than `threads`.)

# %% [markdown]
# ## 4. The same answer
#
# Each kernel has a twin in `kernels/reference.py`, a few lines of NumPy that say what it computes. Integer sums must agree
# exactly; float sums may differ by what rounding in another order can do, a bound that is derived beside the twin.

# %%
display(Markdown(words.markdown([c.row for c in lab.compare_all(seed)])))
assert all(c.agrees for c in lab.compare_all(seed))

# %% [markdown]
# **The second control that must fail: one flipped bit.** Of all the bits of a weight one is flipped, the lowest of one
# code, before the kernel sees it.
#
# **Predict.** Does a check with a tolerance notice one bit?

# %%
arguments = PAIRS["qmatmul"][2](np.random.default_rng(seed), bits=4, exact=True)
honest = lab.compare("qmatmul", arguments)
broken = lab.compare("qmatmul", arguments, given=lab.with_a_flipped_bit(arguments))
display(Markdown(words.markdown([honest.row, broken.row | {"kernel": "qmatmul, one bit flipped"}])))
assert honest.agrees and not broken.agrees, "the check would let a wrong kernel pass"

# %% [markdown]
# **Answer.** Yes: the bound is derived from the size of the sums and not from taste, and one bit lies hundreds of times
# beyond it.
#
# **Explain.** The bit moved 5 outputs of 320, by 5 % of the outputs' root mean square at most: an average over all would hide
# it, and so would a generous tolerance. Hence bounds that say what rounding can do and no more.

# %% [markdown]
# ## 5. Where the bits lie
#
# A kernel wants, in one load, codes that many output rows can multiply with the same inputs. So 16 rows form a *tile*: row
# *r* owns bytes 4*r* .. 4*r* + 3 of each 64-byte vector, and its sum never leaves that lane.
#
# **Predict.** At 4 bits a byte holds two codes of one row. Are they neighbours, inputs 0 and 1?

# %%
picture = TilePicture()
display(picture)
display(Markdown(picture.sentence))

# %% [markdown]
# **Look.** Each block is one code and bears the number of its input; a colour is four neighbouring inputs. In each byte the
# lowest bit is at the top, so of two blocks the upper one is the low half. Nobody drew this: every bit of every code was set
# alone, laid out by `kernels/pack.py`, and looked up.
#
# **Answer.** No: inputs 0 and 4 share a byte.
#
# **Explain.** They are four inputs apart. The instruction that matters multiplies four neighbouring *bytes* with four
# neighbouring activations and adds the four products to a 32-bit sum. With inputs 0 .. 3 in the low halves and 4 .. 7 in the
# high ones, a mask makes one operand and a shift the other, and no code is ever moved sideways. Three bits are two and one:
# the third bits of eight quads fill a vector of their own.

# %% [markdown]
# ## 6. What the codes cost: one scale per matrix, row or group
#
# The largest weight of its scale sets the step for all that share it. A scale takes 16 bits.
#
# **Predict.** 4 bits with one scale per row, and 3 bits with one for every 16 weights, take nearly the same bytes.
# Which errs less? And 4 bits with one scale for the whole matrix?

# %%
kinds = ("tensor", "row", "g128", "g32", "g16")
errors = lab.weight_errors(weight, [f"int{bits}-{kind}" for kind in kinds for bits in (2, 3, 4, 8)])
plots.show(lab.error_against_bits(errors), lab.say_errors(errors))
display(Markdown(lab.say_errors(errors)))
display(Markdown(words.markdown([e.row for e in errors])))

# %% [markdown]
# Errors are in per cent of the weight's own root mean square, the largest error too: it may well exceed 100, where one large
# weight is rounded away.
#
# **Answer.** Neither: 3 bits in groups of 16 and 4 bits per row err alike, for 4.00 and 4.06 bits. One scale for the whole
# matrix errs twice as much as one per row.
#
# **Explain.** Every bit halves the step, and so the error. Fewer weights to a scale help because the largest of 16 is
# smaller than the largest of a matrix, and the more so the more uneven a weight is. But scales take bytes too: here
# groups of 32 err least for their bytes, and groups of 16, which pay a whole bit for scales, come out level with one
# scale per row. One scale for the matrix wastes more than a bit. Errors are computed and bytes are counted: another
# machine finds the same.

# %% [markdown]
# ## 7. What int8 activations cost on top
#
# **Predict.** The weights are off by several per cent already. By how much does rounding the activations to 8 bits move the
# outputs?

# %%
outputs = lab.output_errors(weight, x, ["int8-row", "int8-g32", "int4-row", "int4-g32", "int3-g32", "int2-g32"])
display(Markdown(words.markdown([o.row for o in outputs])))
by_scheme = {str(o.scheme): o for o in outputs}
assert by_scheme["int4-g32"].between < by_scheme["int4-g32"].float_activations / 3

# %% [markdown]
# **Look.** All errors are in per cent of the outputs' root mean square. The first two columns are the distance of the
# outputs from those in floating point; the third is the distance between the two kernels: what int8 activations alone did.
# Independent errors add in squares, as 3 and 4 make 5. And outputs are off by less than the weights are: rounding errors
# have random signs, and the sum of many cancels more than what it is added to.
#
# **Answer.** By about a third of a per cent with groups of 32, 0.7 with one scale per row; 4-bit weights moved them by 5 and
# 10.
#
# **Explain.** Beside 4-bit weights, 8-bit activations cost next to nothing, and from a few tokens on they make the
# product several times as fast. Beside 8-bit weights they cost as much as the weights themselves. A group's activations
# share a scale as its weights do, so that one large activation does not spoil the rest. The last columns ask what
# matters for text: is the likeliest word still the same?

# %% [markdown]
# ## 8. Try it yourself
#
# **Predict.** Which choice takes the least time for one row, which does most operations per second, and which errs least? Is
# any of them the same?
#
# Every choice is rounded, multiplied and timed anew (well under a second), then kept. The slider takes powers of two, the
# box beside it any number of rows.

# %%
control = MatmulControl(weight, x, roof, repeat=repeat, rotation=rotation)
control

# %%
for choice in (("int2-g32", 1), ("int8-row", 1), ("int4-g32", 128), ("int4-g32", 1)):
    for activations in ("float32", "int8"):
        control.choose(*choice, activations)
        assert control.error is None, control.error
for part in control.static():
    plots.show(part, f"{part.layout.title.text}: the numbers are in the table below.")
display(HTML(control.told), HTML(control.html))
drawn = control.points.values()
fastest = min((p for p in drawn if p.tokens == 1), key=lambda p: p.timing.median)
busiest = max(drawn, key=lambda p: p.operations / p.timing.median)
for what, p in (("least time for one row", fastest), ("most operations per second", busiest)):
    print(f"{what}: {p.name}, rows: {p.tokens}, {p.activations} activations")

# %% [markdown]
# **Look.** More rows move a point to the right and up to the roof; so do fewer bits, since each byte then holds more
# weights. The table holds the same numbers as the plots, and says of each whether it was measured, counted or computed.
#
# **Answer.** No two are the same: the fewest bits take the least time for one row and err most, many rows of int8
# activations do most operations per second, and 8 bits err least.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import matmul_lab

# %% [markdown] tags=["exercise"] exercise="knee" difficulty=2 importance=3 minutes=5
# A machine reads 40 GB/s from memory and makes 800 · 10⁹ multiply-adds of bytes per second. A weight is in `int4-g32`. From how many rows
# of inputs on does the product take longer to compute than to read? (Activations are not counted.)

# %% tags=["stub"]
rows = None

# %% tags=["check"]
matmul_lab.check_knee(rows)

# %% [markdown] tags=["hint"]
# For one weight: the seconds to read its bits, and the seconds of one multiply-add. The size of the matrix falls out.

# %% [markdown] tags=["expected"]
# Between 10 and 15 rows.

# %% tags=["solution"]
rows = 4.5 / 8 / 40 * 800

# %% [markdown] tags=["why"]
# A model that decodes one token for one user sits far to the left of the knee. That is why bits, and not operations, decide its speed.

# %% tags=["mutant"]
# forgets the scales
rows = 4 / 8 / 40 * 800

# %% tags=["mutant"]
# a multiply-add as two operations
rows = 4.5 / 8 / 40 * 800 / 2

# %% tags=["mutant"]
# bits for bytes
rows = 4.5 / 40 * 800

# %% tags=["mutant"]
# weights of 16 bits
rows = 2 / 40 * 800

# %% tags=["mutant"]
# upside down
rows = 40 / 800 * 8 / 4.5

# %% [markdown] tags=["exercise"] exercise="pack-nibbles" difficulty=2 importance=2 minutes=8
# Write the packing of 4-bit codes: two neighbours share a byte, the first in its low half. With an odd number of codes, the last byte's
# high half is zero.


# %% tags=["stub"]
def pack(codes):
    """The bytes, a uint8 array half as long (rounded up) as `codes`, a uint8 array of numbers 0 .. 15."""
    ...


# %% tags=["check"]
matmul_lab.check_pack(pack)

# %% [markdown] tags=["hint"]
# `codes[::2]` are the first of each pair, `codes[1::2]` the second; shift the latter by four bits. An odd number: add a zero first.

# %% [markdown] tags=["expected"]
# The codes 1 and 2 make one byte, 33.


# %% tags=["solution"]
def pack(codes):
    even = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return even[::2] | even[1::2] << 4


# %% tags=["mutant"]
# the first code in the high half
def pack(codes):
    even = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return even[::2] << 4 | even[1::2]


# %% tags=["mutant"]
# loses the last of an odd number
def pack(codes):
    n = len(codes) // 2
    return codes[: 2 * n : 2] | codes[1 : 2 * n : 2] << 4


# %% tags=["mutant"]
# the first half of the codes into the low halves, the second into the high ones
def pack(codes):
    half = (len(codes) + 1) // 2
    packed = codes[:half].copy()
    packed[: len(codes) - half] |= codes[half:] << 4
    return packed


# %% tags=["mutant"]
# multiplies by 15, the largest code, instead of 16
def pack(codes):
    even = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return even[::2] + 15 * even[1::2]


# %% [markdown] tags=["exercise"] exercise="round-activations" difficulty=2 importance=3 minutes=8
# Write what the int8 kernel does to a group of activations before it multiplies: symmetric, one step for the group, step = max|x| / 127,
# codes from −127 to 127. A group of zeros has the step 0 and codes 0.


# %% tags=["stub"]
def round_group(x):
    """(codes, step) of a float array `x`: codes as an array of its length, step as a number."""
    ...


# %% tags=["check"]
matmul_lab.check_activations(round_group)

# %% [markdown] tags=["hint"]
# `np.rint` rounds to the nearest whole number. What does x / 0 do?

# %% [markdown] tags=["expected"]
# 2.54, −0.01, 0.333 and 1.0 have the step 0.02 and the codes 127, 0, 17, 50.


# %% tags=["solution"]
def round_group(x):
    step = np.abs(x).max() / 127
    if step == 0:
        return np.zeros(len(x)), 0.0
    return np.rint(x / step), step


# %% tags=["mutant"]
# the largest value instead of the largest magnitude
def round_group(x):
    step = x.max() / 127
    if step == 0:
        return np.zeros(len(x)), 0.0
    return np.clip(np.rint(x / step), -127, 127), step


# %% tags=["mutant"]
# 128 steps on each side
def round_group(x):
    step = np.abs(x).max() / 128
    if step == 0:
        return np.zeros(len(x)), 0.0
    return np.clip(np.rint(x / step), -128, 127), step


# %% tags=["mutant"]
# cuts off instead of rounding
def round_group(x):
    step = np.abs(x).max() / 127
    if step == 0:
        return np.zeros(len(x)), 0.0
    return np.trunc(x / step), step


# %% tags=["mutant"]
# zeros are divided by zero
def round_group(x):
    step = np.abs(x).max() / 127
    with np.errstate(invalid="ignore"):
        return np.rint(x / step), step


# %% tags=["mutant"]
# rounds half up by adding 0.5, which is wrong below zero
def round_group(x):
    step = np.abs(x).max() / 127
    if step == 0:
        return np.zeros(len(x)), 0.0
    return np.trunc(x / step + 0.5), step


# %% [markdown]
# ## What would change on your model
#
# The weights are larger, and the rest is the same. Any linear layer of any model takes the place of the head:
#
# ```python
# model, tokenizer = load("Qwen/Qwen3-0.6B"), load_tokenizer("Qwen/Qwen3-0.6B")   # needs a network, once
# weight = model.model.layers[0].mlp.down_proj.weight.detach().float()            # and x: that layer's inputs
# q = round_to_nearest(weight, QuantScheme.parse("int4-g32"))
# ```
#
# A layer as large as that needs no `repeat`. Your device's own two ceilings decide: divide the bytes of *all* weights
# that a token uses by the memory's bandwidth, and you have the time that no kernel can beat. Whole models use these
# kernels after `compress`; `edgelab.layers.set_kernel("numba-int8")` turns int8 activations on.
