# %% [markdown]
# # 08 · Export and verify
#
# **Claim: the same codes go out to every runtime that is here, bit for bit, and what a format adds to them can be counted byte by byte.
# But a file that opens is not yet a file that is right: only running it in its own runtime, and hashing it, tells.**
#
# After this notebook you can
#
# 1. climb the ladder from the trained model to each runtime, and say on which rung quality is lost,
# 2. say of every byte of an ONNX, GGUF or safetensors file what it is for, and compare formats by what they add,
# 3. read codes out of a file without the library that belongs to it,
# 4. tell which check notices which damage, and where none does,
# 5. replace an operator that a runtime lacks, and measure what that costs,
# 6. start a model from a map, and swap it under a running answer,
# 7. open the model in a browser, from which nothing leaves.
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb) for bundles, KL divergence ("KLD") and ONNX. *Takes* about a minute on two
# cores; 1.3 GB of memory in this kernel, and as much again beside it while Chromium checks the page. Every cell may be run again. What is
# not installed (llama.cpp, Chromium) is left out and said so.

# %%
import shutil
from pathlib import Path

import torch
from IPython.display import display

from edgelab import Recipe, compress, corpus, data, plots, save_bundle
from edgelab import export_lab as lab
from edgelab.bundle import load_bundle
from edgelab.byte_map import byte_map
from edgelab.byte_picture import FilesPicture
from edgelab.export.ladder import climb
from edgelab.fold import fallback_for, fallback_table
from edgelab.hot import BundleRefused, ModelSlot
from edgelab.lazy import LazyBundle
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.startup import Start, startup_table

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a Hugging Face causal language model
scheme = "int4-g32"
documents = {"prose": 3, "code": 3, "assistant": 16, "arithmetic": 16}  # of the test split, for section 4
command = "heat the kitchen to twenty one degrees"
seed = 0
out = "../runs/08"  # what this notebook writes

# %%
out = Path(out)
shutil.rmtree(out, ignore_errors=True)  # so that a second run starts like the first
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
made = compress(model, Recipe.uniform(scheme), progress=False)
bundle = save_bundle(made.model, tokenizer, out / "bundle", recipe=made.recipe, coverage=made.coverage)
print(made.coverage)

# %% [markdown]
# ## 1. The ladder
#
# Each rung holds its logits against the rung below, on the same tokens. *Fake-quantized* has the rounded weights in floating point;
# *packed* computes with codes; *bundle* was written and loaded; the others were exported and opened in the target's own runtime: ONNX
# Runtime, llama.cpp, and ONNX Runtime Web in a real Chromium with every way to the network walled off.
#
# **Predict.** On which rung is quality lost, and how much on the others: nothing at all, some digits, some percent?

# %%
targets = {"onnx": {"cache": True, "experts": "auto"}, "gguf": {"tokenizer": tokenizer}, "web": {"tokenizer": tokenizer}}
ladder = climb(model, made.model, bundle, out, targets, seed=seed)
plots.show_rows(ladder.table())
rungs = {r.name: r for r in ladder.rungs}
assert rungs["fake-quantized"].parity["kld"] > 1e-4
assert all(abs(r.parity["kld"]) < 1e-6 for name, r in rungs.items() if name not in ("original", "fake-quantized"))

# %% [markdown]
# **Look.** The column *weights as codes* is counted in each file again, and every code in it was compared with the model's. The tokens are
# random ones, the hardest there are: on text the same rounding costs far less (notebook 01).
#
# **Answer.** All of it on the first, where weights are rounded. Above, sums come in another order: the sixth digit.
#
# **Explain.** Because the codes *are* the weights from there on, an export can be held to being the same function, not to being
# "about as good". A target that rounds again, skips the experts or loses a scale can't hide behind a tolerance.
#
# One runtime goes its own way: llama.cpp rounds the *inputs* of its products to int8 and has no switch for it. The line above has its
# weights in float32; this is the file as it runs:

# %%
exports = lab.written(ladder, made.model, out, targets)
for target, result in exports.items():
    print(f"{target}: {result.verified_by or 'written, not run'}")
if "gguf" in ladder.exports:
    p = ladder.exports["gguf"].parity
    print(f"gguf as it runs: 1 - cosine {1 - p['as_run_cosine']:.1e}, same top token {p['as_run_top1_agreement']:.1%}")

# %% [markdown]
# ## 2. Where the bytes are
#
# Nothing in a file is a secret: its header says what is where. `byte_map` reads the headers of safetensors, ONNX (protobuf) and GGUF by
# itself and accounts for every byte once: codes, scales, norms, names, even the zeros between.
#
# **Predict.** 4 bits for a code and half a bit for its share of a scale make 4.5 bits per weight. Put the files in order of size. What
# does the page in the browser need besides the model, and how much of it is that?

# %%
files = lab.places(bundle, exports)
maps = {name: byte_map(path) for name, path in files.items()}
display(FilesPicture(maps))
plots.show_rows(lab.kind_rows(maps))
assert all(sum(s.bytes for s in m.segments) == m.bytes for m in maps.values())
assert len({m.by_kind()["codes"] for m in maps.values()}) == 1

# %% [markdown]
# **Look.** One scale for all files: a row is as many bytes in each. In the bundle all scales come first, in ONNX each weight's follow its
# codes, in GGUF they lie between them: two bytes of scale, sixteen of codes, and so on.
#
# **Answer.** Codes and scales take the same bytes everywhere, to the byte. ONNX adds a graph and no words, GGUF its words and no graph; the
# bundle adds a tokenizer in a generous JSON and its proofs, and keeps norms and router in two bytes where the others take four. Of the
# page three quarters are the runtime: a fixed price, which a larger model makes small.
#
# **Explain.** A format is an opinion about who reads it. GGUF's reader walks through blocks, so a scale lies where its codes are. ONNX's
# reader is a graph of named arrays, so each node pays for names. safetensors' reader maps single tensors. None is smaller because it
# *compresses* better; ask what "4-bit" in a file's name leaves out.
#
# Any file, any kind, down to the single tensor: choose, point at a box or a bar, click a box to go into it.
#
# **Predict.** How many bits per weight does the router take in the GGUF file? (Point at it.)

# %%
control = lab.MapControl(maps)
control

# %%
control.choose("onnx", "scales")
assert control.error is None
print(control.told)
first = maps["onnx"].at(maps["onnx"].segments[0].file, 100_000)
print(f"byte 100,000 of the ONNX file: {first.name} ({first.kind}), bytes {first.offset:,} to {first.end - 1:,}")

# %% [markdown]
# **Answer.** 32: routers stay in floating point, since a wrong choice of expert costs more than the few bytes.
#
# ## 3. The same codes, read out of each
#
# The map knows where codes and scales lie, so they can be read there, with no library but NumPy. A *row* is what one output
# needs: its integers and their scales. Formats name, cut, stack and order rows in their own ways; so we compare which rows there are.
#
# **Predict.** GGUF has more tensors than the bundle. Has it more rows?

# %%
rows = lab.code_rows(maps)
plots.show_rows(rows)
assert all(line["all the same"] == "yes" for line in rows)

# %% [markdown]
# **Explain.** The bundle keeps gate and up of all experts in one stack, GGUF in two, ONNX's `QMoE` wants their rows in turn. The
# same rows, other tensors. Which row is *where* this does not say; `verify` does, and the logits of section 1 prove it.
#
# ## 4. One bit
#
# Files are copied, flash wears out, downloads break off. So: copies of the bundle, with one bit turned in each.
#
# **Predict.** Put these in order of damage: the highest bit of a code; the lowest bit of a scale; the highest bit of a scale's exponent.
# For which does the model lose a single top token? And which of the copies does loading refuse?

# %%
b = maps["bundle"]
code, scale, filler = lab.pick(b, "codes", "down"), lab.pick(b, "scales", "layers.2.self_attn.o_proj"), lab.pick(b, "padding")
flips = {
    "lowest of a code": (code, 0, 0),
    "highest of a code": (code, 0, 3),
    "lowest of a scale": (scale, 0, 0),
    "highest of a scale's exponent": (scale, 1, 6),
    "in the header's padding": (filler, 0, 0),
}
ids = torch.cat(data.calibration_batches(tokenizer, corpus()["test"], tokens=1024, context=128, seed=seed))
damage = lab.damage_rows(bundle, out, flips, ids)
plots.show_rows(lab.shown_damage(damage))
assert damage[3]["KLD"] > 1 > 1e-2 > max(line["KLD"] for line in damage[:3])
assert all(line["verify_bundle"].startswith("refuses") for line in damage)

# %% [markdown]
# **Answer.** A bit of a code moves one weight, and hardly anything else. One bit of the exponent makes a scale 65,536 times larger, and the
# model is gone: one bit of thirty million. Loading notices only what it has to parse, for names and sizes are right; `verify_bundle`
# compares sha256 and refuses all.
#
# **The control that must fail: an exported file with one bit turned.** `verify` opens the ONNX file again. Has it hashes? No: it
# compares with the model.
#
# **Predict.** Which of these does it refuse? The last two are a float of a norm, at its lowest bit, and a letter of the program's name.

# %%
o = maps["onnx"]
code, scale = lab.pick(o, "codes", "down"), lab.pick(o, "scales", "o_proj")
norm, name = lab.pick(o, "norms"), lab.pick(o, "graph and metadata", "producer")
flips = {"lowest of a code": (code, 0, 0), "lowest of a scale": (scale, 0, 0), "lowest of a norm": (norm, 0, 0), "of a name": (name, 2, 0)}
verdicts = lab.verdict_rows(exports["onnx"], made.model, out, flips)
plots.show_rows(verdicts)
refused = {line["bit"]: line["verify"].startswith("refuses") for line in verdicts}
assert refused == {"none": False, "lowest of a code": True, "lowest of a scale": True, "lowest of a norm": True, "of a name": False}

# %% [markdown]
# **Explain.** Two questions, two checks. *Is it the right model?* `verify` answers that, against the model, when the file is made: every
# code, scale and float to the bit, the graph by what comes out. *Is it the file that was made?* Only a hash answers that, on the device,
# for every byte. The bundle has one for each file, and so has the page; a single .onnx or .gguf has none: ship its sha256 beside it
# (`edgelab deploy` does).
#
# ## 5. An operator that is not there
#
# SiLU, x · sigmoid(x), is not in every runtime. Articles put GELU in its place, since the curves look alike. `fallback_for` takes
# an *exact* rule where the runtime has the parts, and else the nearest function.
#
# **Predict.** The two functions differ by at most 0.19. How many percent of the top tokens change? What if GELU is scaled first,
# 1.702 · gelu(x / 1.702)? Which of them do answers notice?

# %%
for operators in ({"Mul", "Sigmoid", "Gelu"}, {"Mul", "Gelu"}, {"Gelu"}):
    print(f"a runtime with {', '.join(sorted(operators))}: {fallback_for('silu', operators)}")
rules = ("silu -> mul_sigmoid", "silu -> scaled_gelu", "silu -> gelu", "silu -> relu")
costs = fallback_table(made.model, tokenizer, corpus()["test"], rules, max_docs=documents, seed=seed)
plots.show_rows(lab.fallback_rows(costs))
kld = {r["rule"]: r["kld"] for r in costs if r["on"] == "all"}
assert kld["silu -> mul_sigmoid"] < 1e-5 < kld["silu -> scaled_gelu"] < kld["silu -> gelu"] < kld["silu -> relu"]

# %% [markdown]
# **Answer.** The article's rule changes a tenth of the top tokens, the scaled one less than a hundredth, for one more product. Writing SiLU
# as a product and a sigmoid costs nothing at all, and every runtime has both.
#
# **Explain.** Right answers show it only for ReLU, because an answer has few tokens that are in doubt; that is no reason to give the rest
# away. Look for the exact rewriting first.
#
# ## 6. On the device
#
# **Start.** A phone should show something before it has read everything. `LazyBundle` opens the headers; a layer is filled when it
# is first called, from a map of the file.

# %%
lazy = LazyBundle(bundle)
print(lazy, f"opened in {1000 * lazy.opened_s:.1f} ms")
with torch.no_grad():
    same = torch.equal(lazy.model(ids[:1], use_cache=False).logits, load_bundle(bundle)(ids[:1], use_cache=False).logits)
print(lazy, "- the logits are the same to the bit" if same else "- the logits DIFFER")
assert same
plots.show_rows(lab.start_rows(startup_table(bundle, starts=(Start("load_bundle", "load"), Start("lazy")))))

# %% [markdown]
# **Look.** Each line is a process of its own. On four megabytes little is to be saved; of 400 MB the first weight was there after 0.02 s
# instead of 0.7, and with one layer at a time 66 MB of memory were enough (`edgelab startup --megabytes 400 --fewer`).
#
# **Swap.** A new version comes while an answer is being written. `ModelSlot` verifies the new bundle, tries it, and swaps by one rename.
#
# **Predict.** Five tokens are out when the new version arrives. Who writes the rest? And if the new one was tampered with?

# %%
next_one = compress(model, Recipe.uniform("int3-g32"), progress=False)
smaller = save_bundle(next_one.model, tokenizer, out / "next", recipe=next_one.recipe, coverage=next_one.coverage)
tampered = lab.flipped(smaller, out / "tampered", lab.pick(byte_map(smaller), "scales", "o_proj"), 1, 6)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": command}], tokenize=False, add_generation_prompt=True)

slot = ModelSlot(out / "slot")
versions = {slot.update(bundle): "first"}
running = slot.stream(prompt)
begun = [next(running) for _ in range(5)]
try:
    slot.update(tampered)
except BundleRefused as error:
    print(f"refused: {str(error).replace(str(out), '...')}")
else:
    raise AssertionError("a tampered bundle was taken")
versions[slot.update(smaller)] = "next"
rest = list(running)
after = slot.generate(prompt)
slot.rollback()
plots.show_rows([
    {"answer": "began before the swap", "by": versions[running.version], "text": running.text},
    {"answer": "began after it", "by": versions[after.version], "text": after.text},
    {"answer": "after going back", "by": versions[slot.version], "text": slot.generate(prompt).text},
])  # fmt: skip
assert (versions[running.version], versions[after.version], versions[slot.version]) == ("first", "next", "first")

# %% [markdown]
# **Answer.** An answer ends with the model that began it. The tampered one was never seen by anyone.
#
# **Explain.** The digest of a bundle is the sha256 of its manifest, and that states the sha256 of every file: one short number for all
# bytes. Who may say which number is right is another matter: an app brings it (`expected=`), signed or in its own release.
#
# ## 7. In your browser
#
# The page below was exported in section 1 and is served by this kernel, on this machine only. Type a command, or a sum; watch the tokens
# come, and the counter of requests stay at zero. It computes in the browser: interrupt the kernel, it goes on.
#
# **Predict.** Its policy allows its own address alone. Pull the network cable and reload: what happens?

# %%
shown = lab.page(files["web"]) if "web" in files else "no page was exported: see what section 1 says, then run that cell again"
shown

# %% [markdown]
# **Answer.** It answers as before: a first visit stores every file, by its sha256.
#
# **Explain.** If the frame stays empty, kernel and browser are probably on different machines (JupyterHub, a container, a remote host):
# 127.0.0.1 is then the *other* machine, and the page tells nothing to strangers. Copy the folder `runs/08/web` to where your browser is
# and run `edgelab serve web` there; or put it on any static host, over https. A hub's proxy is refused: the server answers only to its
# own name. And where frames are forbidden altogether, the link below the frame opens a tab.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import export_lab as lab

# %% [markdown] tags=["exercise"] exercise="q4-block" difficulty=2 importance=3 minutes=10
# One block of GGUF's Q4_0: 32 weights in 18 bytes. First the scale as float16 (two bytes, the low one first), then sixteen bytes:
# byte j holds code j in its low half and code 16 + j in its high half. Write the function.


# %% tags=["stub"]
def q4_block(scale, codes):
    """The 18 bytes (a list of numbers 0 .. 255) of a block of Q4_0; `codes` are 32 numbers 0 .. 15."""
    ...


# %% tags=["check"]
lab.check_block(q4_block)

# %% [markdown] tags=["hint"]
# `list(np.float16(scale).tobytes())` has the two bytes of the scale. A high half is sixteen times as much as a low one.

# %% [markdown] tags=["expected"]
# For scale 1 and codes 0 .. 15 followed by zeros: 0, 60, then 0, 1, 2 .. 15.


# %% tags=["solution"]
def q4_block(scale, codes):
    """The 18 bytes (a list of numbers 0 .. 255) of a block of Q4_0; `codes` are 32 numbers 0 .. 15."""
    return [*np.float16(scale).tobytes(), *(codes[j] + 16 * codes[16 + j] for j in range(16))]


# %% tags=["mutant"]
# neighbours share a byte: code 2 j and 2 j + 1, as other formats have it
def q4_block(scale, codes):
    return [*np.float16(scale).tobytes(), *(codes[2 * j] + 16 * codes[2 * j + 1] for j in range(16))]


# %% tags=["mutant"]
# low and high half exchanged
def q4_block(scale, codes):
    return [*np.float16(scale).tobytes(), *(codes[16 + j] + 16 * codes[j] for j in range(16))]


# %% tags=["mutant"]
# the scale behind the codes
def q4_block(scale, codes):
    return [*(codes[j] + 16 * codes[16 + j] for j in range(16)), *np.float16(scale).tobytes()]


# %% tags=["mutant"]
# a scale of four bytes
def q4_block(scale, codes):
    return [*np.float32(scale).tobytes(), *(codes[j] + 16 * codes[16 + j] for j in range(16))]


# %% tags=["mutant"]
# codes with the 8 taken off: signed halves, which the reader takes off once more
def q4_block(scale, codes):
    return [*np.float16(scale).tobytes(), *((codes[j] - 8) % 16 + 16 * ((codes[16 + j] - 8) % 16) for j in range(16))]


# %% [markdown] tags=["exercise"] exercise="varint" difficulty=2 importance=2 minutes=10
# Before the codes of each weight an ONNX file says how many bytes follow, as a *varint*: seven bits to a byte, the lowest first; the
# highest bit of a byte says whether another follows. Write the function.


# %% tags=["stub"]
def varint(value):
    """The bytes (a list of numbers 0 .. 255) of a whole number >= 0."""
    ...


# %% tags=["check"]
lab.check_varint(varint)

# %% [markdown] tags=["hint"]
# `value % 128` is a byte's seven bits, `value // 128` what remains. Zero takes a byte, too.

# %% [markdown] tags=["expected"]
# `varint(32_768)` is `[128, 128, 2]`, for 32,768 is 2 · 128 · 128.


# %% tags=["solution"]
def varint(value):
    """The bytes (a list of numbers 0 .. 255) of a whole number >= 0."""
    if value < 128:
        return [value]
    return [128 + value % 128, *varint(value // 128)]


# %% tags=["mutant"]
# the highest seven bits first
def varint(value):
    return [value] if value < 128 else [*varint(value // 128), 128 + value % 128]


# %% tags=["mutant"]
# eight bits to a byte, no mark that more follow
def varint(value):
    return [value] if value < 256 else [value % 256, *varint(value // 256)]


# %% tags=["mutant"]
# every byte marked, the last one, too
def varint(value):
    return [128 + value] if value < 128 else [128 + value % 128, *varint(value // 128)]


# %% tags=["mutant"]
# 128 taken to fit into one byte
def varint(value):
    return [value] if value <= 128 else [128 + value % 128, *varint(value // 128)]


# %% tags=["mutant"]
# zero has no bytes
def varint(value):
    return [] if value == 0 else [value] if value < 128 else [128 + value % 128, *varint(value // 128)]


# %% [markdown] tags=["exercise"] exercise="who-refuses" difficulty=1 importance=3 minutes=3
# One bit of a scale is turned in a bundle. Of `load_bundle`, `verify_bundle` and a slot's `update`, which refuse it? A set of names.

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_refusals(answer)

# %% [markdown] tags=["hint"]
# Section 4 shows two of them, section 6 the third.

# %% [markdown] tags=["expected"]
# Those that read every byte.

# %% tags=["solution"]
answer = {"verify_bundle", "update"}

# %% tags=["mutant"]
# whatever opens a file checks it
answer = {"load_bundle", "verify_bundle", "update"}

# %% tags=["mutant"]
# only the function with "verify" in its name verifies
answer = {"verify_bundle"}

# %% tags=["mutant"]
# loading would have to notice a broken scale
answer = {"load_bundle"}

# %% [markdown] tags=["exercise"] exercise="bytes-of-blocks" difficulty=1 importance=2 minutes=3
# A weight of 512 × 256 goes out as Q4_0. How many bytes?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_blocks(answer)

# %% [markdown] tags=["hint"]
# How many blocks, and how many bytes has one?

# %% [markdown] tags=["expected"]
# 4.5 bits per weight.

# %% tags=["solution"]
answer = 512 * 256 / 32 * 18

# %% tags=["mutant"]
# the scales are forgotten
answer = 512 * 256 / 2

# %% tags=["mutant"]
# a scale of four bytes
answer = 512 * 256 / 32 * 20

# %% tags=["mutant"]
# bits, not bytes
answer = 512 * 256 * 4.5

# %% [markdown]
# ## What would change on your model
#
# The path of the model, and the shares. The page's runtime is 14 MB whatever the model is, and a browser holds one file of about 2 GB at
# most; from 2 GB on ONNX keeps its weights in a second file, which the map shows, too. A vocabulary of 150,000 words makes the tokenizer
# and the embedding heavy: look at them before you spend a day on the experts. Other schemes have other homes: two bits, uint4 and MXFP4
# go to GGUF, three bits go out as four everywhere. And verify on the device what you verified here: `edgelab export --target onnx
# --target gguf --target web` writes the folder, your own hash list travels beside it.
