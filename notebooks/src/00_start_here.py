# %% [markdown]
# # 00 · Start here
#
# **Claim: this machine alone, without a network, is enough to make a mixture-of-experts language model small, to measure
# what that costs, and to hand it to another runtime.**
#
# After this notebook you can
#
# 1. say whether your machine is ready, and what to do where it is not,
# 2. read a machine's fingerprint and say why every figure carries one,
# 3. name the parts of a mixture-of-experts (MoE) model and say which of them hold its bytes,
# 4. say where the course's text comes from, and recognise a figure that was measured on other text,
# 5. compare a language model with a baseline in a unit that no tokenizer can hide in.
#
# *Before you start*: Python, and an idea of what a neural network's weight matrix is. *Takes* about half a minute on two
# cores and 1 GB of memory. Run it from top to bottom; every cell may be run again.
#
# How each section goes: **predict** (write your guess down, it is worth more than the answer), **run**, **look**,
# **explain**.

# %%
from IPython.display import Markdown, display

from edgelab import data, doctor, plots, start_lab, words
from edgelab.compress import audit
from edgelab.evaluate import documents as choose_documents
from edgelab.evaluate import evaluate, generate_answers
from edgelab.model import family_of, load, load_tokenizer
from edgelab.paths import data_dir

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")  # any folder with a Hugging Face causal language model
documents = 12  # per domain, for the measurement at the end
seed = 0

# %% [markdown]
# ## 1. Is this machine ready?
#
# **Predict.** The course compresses, evaluates and exports a model of some seven million parameters. Which of these does
# it need: a graphics card, a network, 16 GB of memory, two processor cores?

# %%
checks = doctor.examine()
display(Markdown(words.markdown(doctor.table(checks))))
assert not [c for c in checks if c.status == "fail"], "something essential is missing: see the way out beside it"

# %% [markdown]
# **Look.** Every line says `ok`, `warn` or `fail`, what was found, and the way out. `edgelab doctor` prints the same in a
# terminal.
#
# **Explain.** None of the first three, and one core does too, more slowly. The model is small on purpose, so that you can
# repeat every measurement. What the course does need is a complete Python: the corpus is read from its standard library.

# %% [markdown]
# ## 2. The machine's fingerprint
#
# **Predict.** Which numbers in this course would change on another machine: bits per weight, KL divergence, tokens per
# second?

# %%
display(Markdown(words.markdown([{"what": k, "value": v} for k, v in doctor.fingerprint().items()])))

# %% [markdown]
# **Explain.** Bits per weight is counted, and is the same everywhere. KL divergence hardly changes: float additions happen
# in another order. Tokens per second belongs to one machine, and a figure without its machine says nothing. So each row
# of a report carries this line, and *measured here*, *measured at build* and *modelled* never share a column.

# %% [markdown]
# ## 3. What a mixture-of-experts model is made of
#
# In each MoE layer a **router** picks a few of many small feed-forward networks, the **experts**, for each token; a
# *shared* expert sees them all. The model computes little per token but has to *store* every expert: on a phone, storage
# and memory are what is scarce.
#
# **Predict.** The model below has 16 experts in a layer and uses 2 of them per token. What share of its parameters are
# experts? And what share of those does one token use?

# %%
model, tokenizer = load(model_dir), load_tokenizer(model_dir)
config = model.config.get_text_config()
coverage = audit(model)
print(f"{type(model).__name__}, family {family_of(model).model_type}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}")
coverage

# %%
plots.show(plots.layer_bytes(coverage, title="Bytes per layer, as stored in bfloat16"), plots.say_layer_bytes(coverage))
display(Markdown(plots.say_layer_bytes(coverage)))

# %%
by_role = {line["role"]: line["parameters"] for line in coverage.by_role()}
experts = by_role["experts"]
used = experts * config.num_experts_per_tok / config.n_routed_experts
print(f"{experts / coverage.parameters:.1%} of {coverage.parameters:,} parameters are experts; a token uses {used / experts:.1%} of them")
print(f"so one token touches {(coverage.parameters - experts + used) / coverage.parameters:.1%} of the model, and the phone stores 100 %")
assert used < experts

# %% [markdown]
# **Explain.** The experts are where the bytes are. A tool that compresses only `nn.Linear` modules walks past them,
# because current libraries keep all experts of a layer in one three-dimensional parameter. Notebook 01 shows what such a
# "4-bit" model really weighs.

# %% [markdown]
# ## 4. The text
#
# **Predict.** No text of strangers lies in this repository and nothing is downloaded. Where do several megabytes of
# English and code come from?

# %%
corpus = data.corpus()
test = corpus["test"]
print("documents:", {split: len(part) for split, part in corpus.items()})
print("fingerprint of the corpus (all splits):", data.fingerprint(corpus))
print("fingerprint of the test split, which the rows of a report carry:", data.fingerprint(test))
for domain in data.DOMAINS:
    example = next(row for row in test if row["domain"] == domain)
    display(Markdown(f"**{domain}**\n```text\n{example['text'][:260].rstrip()}\n```"))

# %% [markdown]
# **Explain.** Prose and code are read from the Python that runs this notebook; commands and sums are generated.
# A sum's answer is written least significant digit first, in the order in which carries are worked out: `37+45=28` says 82. A
# document's split is decided by the hash of its name, so that no text is both trained on and tested on. Another patch
# release of Python has slightly other text, and the fingerprint says so.
#
# **The control that must fail.** If the fingerprint noticed nothing, it would be worthless. Change one letter of one
# document:

# %%
texts = list(test["text"])
changed = test.remove_columns("text").add_column("text", [texts[0][:-1] + "?", *texts[1:]])
before, after = data.fingerprint(test), data.fingerprint(changed)
print(before, "->", after)
assert before != after, "the fingerprint did not notice a changed letter"

# %% [markdown]
# ## 5. Does the model know anything?
#
# **Predict.** The baseline is `zlib`, which knows no language but finds repetitions: how many bits does it need per byte
# of prose? And the model? (Bytes that are pure chance need 8.)

# %%
report = evaluate({"fp": model}, tokenizer, test, max_docs=documents, seed=seed, bootstrap=500, speed=False, progress=False)
chosen = choose_documents(test, tokenizer, documents)  # the same ones that evaluate takes
for domain in ("prose", "code"):
    packed = start_lab.zlib_bits_per_byte("".join(tokenizer.decode(d.ids, skip_special_tokens=True) for d in chosen if d.domain == domain))
    row = report.get(metric="bits_per_byte", slice=domain)
    print(f"{domain:6}  zlib {packed:.2f}   model {words.shown(row)}   bits per byte, {row.n} documents")
    assert row.high < packed, f"the model knows no more of {domain} than zlib"

# %% [markdown]
# **Look.** The interval in brackets is a bootstrap over documents: with few documents it is wide, and a difference inside
# it is no difference. Both read the same documents. The comparison is not quite fair, in both directions: `zlib` sees all of
# them in one piece and the model each by itself, but the model has learnt from other documents and `zlib` from none.
# Commands and sums are left out here: the model is scored on the answer alone there, because a prompt that was drawn by
# dice cannot be known.
#
# And in words: the model turns a spoken command into a call that a program can execute.

# %%
command = next(row for row in test if row["domain"] == "assistant")
answer = generate_answers(model, tokenizer, [command["prompt"]])[0]
print("asked    ", command["prompt"])
print("expected ", command["answer"])
print("answered ", tokenizer.decode(answer, skip_special_tokens=True))

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import zlib

from edgelab import start_lab

# %% [markdown] tags=["exercise"] exercise="one-token" difficulty=1 importance=3 minutes=3
# A mixture has 64 experts in each layer and uses 6 of them per token. The experts are 90 % of its weights; the rest (attention,
# embedding, router, norms) is used by every token. What share of all weights does one token use?

# %% tags=["stub"]
share = None  # between 0 and 1

# %% tags=["check"]
start_lab.check_touched(share)

# %% [markdown] tags=["hint"]
# Two parts: what every token uses, and its share of the experts.

# %% [markdown] tags=["expected"]
# A share that is nearer to 0.2 than to 0.1.

# %% tags=["solution"]
share = 0.1 + 0.9 * 6 / 64

# %% [markdown] tags=["why"]
# The answer says how much is computed and read per token, not how much is stored: all of it is.

# %% tags=["mutant"]
# only the experts count
share = 6 / 64

# %% tags=["mutant"]
# the experts' share of the whole, but the rest is forgotten
share = 0.9 * 6 / 64

# %% tags=["mutant"]
# 6 of 64 taken as a share of the whole model
share = 0.1 + 6 / 64

# %% tags=["mutant"]
# per cent
share = 18.4

# %% [markdown] tags=["exercise"] exercise="bits-per-byte" difficulty=2 importance=3 minutes=4
# A model needs 1.7 nats per token on a text whose tokens are 3.4 bytes long on average. How many bits per byte is that?

# %% tags=["stub"]
bits = None

# %% tags=["check"]
start_lab.check_bits_per_byte(bits)

# %% [markdown] tags=["hint"]
# A nat is 1 / ln 2 bits: `math.log(2)` is 0.693.

# %% [markdown] tags=["expected"]
# Less than one bit per byte: less than a third of what `zlib` needs for prose.

# %% tags=["solution"]
bits = 1.7 / 0.6931 / 3.4

# %% [markdown] tags=["why"]
# Nats per token, or perplexity, can be compared between models with the same tokenizer only: whoever cuts text into longer tokens needs
# more nats for each. Bytes are the same for all.

# %% tags=["mutant"]
# takes nats for bits
bits = 1.7 / 3.4

# %% tags=["mutant"]
# bits per token
bits = 1.7 / 0.6931

# %% tags=["mutant"]
# a nat as 0.69 bits instead of 1.44
bits = 1.7 * 0.6931 / 3.4

# %% tags=["mutant"]
# multiplies by the bytes of a token
bits = 1.7 / 0.6931 * 3.4

# %% [markdown] tags=["exercise"] exercise="zlib-baseline" difficulty=2 importance=2 minutes=6
# Write the baseline of section 5: a function of a text that returns how many bits per byte `zlib` needs for it, at level 9.


# %% tags=["stub"]
def bits_per_byte(text):
    """A number: the bits of the packed text over the bytes of the text in UTF-8."""
    ...


# %% tags=["check"]
start_lab.check_zlib(bits_per_byte)

# %% [markdown] tags=["hint"]
# `text.encode()` makes UTF-8 bytes; `zlib.compress(raw, 9)` packs them.

# %% [markdown] tags=["expected"]
# The text "a" needs 72 bits for its one byte: `zlib` has a header and a checksum.


# %% tags=["solution"]
def bits_per_byte(text):
    raw = text.encode()
    return 8 * len(zlib.compress(raw, 9)) / len(raw)


# %% tags=["mutant"]
# divides by characters: an umlaut is two bytes
def bits_per_byte(text):
    return 8 * len(zlib.compress(text.encode(), 9)) / len(text)


# %% tags=["mutant"]
# bytes per byte
def bits_per_byte(text):
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw)


# %% tags=["mutant"]
# upside down: the rate of compression
def bits_per_byte(text):
    raw = text.encode()
    return 8 * len(raw) / len(zlib.compress(raw, 9))


# %% tags=["mutant"]
# an encoding of one byte per character, which loses the rest
def bits_per_byte(text):
    raw = text.encode("latin-1", "replace")
    return 8 * len(zlib.compress(raw, 9)) / len(raw)


# %% [markdown]
# ## What would change on your model
#
# Nothing but a name. Any causal language model of the Hugging Face hub, or a folder with one, takes the place of the
# embedded one, and any text file that of the corpus:
#
# ```python
# model, tokenizer = load("Qwen/Qwen3-0.6B"), load_tokenizer("Qwen/Qwen3-0.6B")   # needs a network, once
# ```
#
# ```
# edgelab evaluate Qwen/Qwen3-0.6B --data my_text.txt --out runs/mine.json
# ```
#
# Next: [01, compress, evaluate, export](01_compress_evaluate_export.ipynb), the whole way once.
