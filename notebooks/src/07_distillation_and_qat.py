# %% [markdown]
# # 07 · Distillation and quantization-aware training
#
# **Claim: half and more of what compression breaks can be learnt back in minutes, because the original model is still there to ask.** Its
# distributions teach more per token than the text does; and a model that sees its own rounding while it learns loses less by it.
#
# After this notebook you can
#
# 1. say what a temperature does to a soft target, and why the loss is multiplied by T²,
# 2. choose between forward, reverse, Jensen-Shannon and skewed divergence,
# 3. read a recovery curve, and tell what was recovered from what was not,
# 4. explain the straight-through estimator and LSQ's step gradient,
# 5. choose what learns on top of frozen codes: adapters, or the scales alone.
#
# *Before you start*: [04](04_quantize_a_model.ipynb) and [06](06_moe_experts.ipynb). *Takes* about a minute on two cores and 2 GB
# of memory: the runs here are short. Tables marked **measured at build** come from longer runs of the same functions
# (`python -m edgelab.studies`).

# %%
import numpy as np
import torch
from IPython.display import Markdown, display
from transformers import AutoModelForCausalLM

from edgelab import Distill, DropExperts, Qat, Quantize, QuantScheme, Recipe, compress, corpus, data, plots, studies
from edgelab import train_lab as lab
from edgelab.evaluate import evaluate
from edgelab.methods.distill import draw, sampled_cross_entropy, top_k_cross_entropy
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir

# %% tags=["parameters"]
model_dir = str(data_dir() / "edge-moe")
steps = 20  # of the runs in this notebook
documents = {"prose": 2, "code": 2, "assistant": 24, "arithmetic": 0}
sentence = "<|user|>set a timer for five"

# %%
teacher, tokenizer = load(model_dir), load_tokenizer(model_dir)
text = corpus()
calibration = data.calibration_batches(tokenizer, text["calibration"], tokens=4096, context=256)
training = data.calibration_batches(tokenizer, text["train"], tokens=50_000, context=256)
print(f"{sum(p.numel() for p in teacher.parameters()):,} parameters; {sum(b.numel() for b in training):,} tokens to learn from")


# %% [markdown]
# ## 1. Soft targets
#
# A text says which token came next. A teacher says how likely *every* token was. Divided by a temperature T before the softmax, its
# logits give a flatter distribution, in which the unlikely tokens can be seen.
#
# **Predict.** At T = 3, as the Open-AutoGLM article has it, is the likeliest token still likelier than all others together?

# %%
ids = tokenizer(sentence, return_tensors="pt").input_ids
with torch.inference_mode():
    logits = teacher(ids).logits[0, -1].clone()
vocabulary = [tokenizer.decode([i]) for i in range(len(logits))]
control = lab.TemperatureControl(logits, vocabulary, sentence)
display(control)
for t in (1.0, 3.0, 10.0):
    control.choose(t)
    print(control.told)

# %% [markdown]
# **Explain.** Gradients of the softened loss shrink with 1/T², so Hinton's loss multiplies the divergence by T²: at every temperature it
# weighs the same beside the cross entropy, L = α T² KL(p_T ‖ q_T) + (1 − α) CE. For the prediction: read the largest share at T = 3.
#
# ## 2. Which divergence?
#
# A small student can't say all that its teacher does. Below the teacher has two modes and the student is a single bell: each
# divergence finds another best bell.
#
# **Predict.** Which one sits on one mode, and which spreads over both and the valley between, where the teacher never goes?

# %%
x = np.arange(32)
two = np.exp(-0.5 * ((x - 8) / 1.5) ** 2) + 0.6 * np.exp(-0.5 * ((x - 22) / 1.5) ** 2) + 1e-4
two /= two.sum()
students = lab.narrow_students(two)
told = lab.say_students(two, students)
plots.show(lab.students_figure(two, students), told)
display(Markdown(told))
valley = slice(12, 19)
assert students["forward"][valley].sum() > students["reverse"][valley].sum()

# %% [markdown]
# **Explain.** *Forward* KL(p ‖ q) punishes what the student leaves out, so it covers both modes and pays for the valley. *Reverse*
# KL(q ‖ p) punishes what the student adds, so it stays on one. Mixtures of the two sides take a side, too: with the weights of their
# papers Jensen-Shannon covers here like the forward one, and the skewed divergence seeks like the reverse one, but neither
# blows up where one of the two is zero. Forward is the default: a compressed model is wide enough to cover what the original says.
#
# ## 3. Half of the experts, then learning
#
# REAP takes 8 of 16 experts out of every layer. Then a short run learns from the original. (In one recipe: `Recipe((DropExperts(0.5),
# Distill(steps=500)))`, whose teacher is the model that it was given.)

# %%
cut = compress(teacher, Recipe((DropExperts(0.5),)), calibration=calibration, progress=False)
lesson = Recipe((Distill(steps=steps, lr=1e-3, batch=4),))
learnt = compress(cut.model, lesson, training=training, teacher=teacher, progress=False)
print(learnt.remarks[-1])
report = evaluate(
    {"original": teacher, "8 of 16 experts": cut.model, f"and {steps} steps": learnt.model},
    tokenizer, text["test"], max_docs=documents, speed=False, sizes=dict.fromkeys(("original", "8 of 16 experts", f"and {steps} steps"), 0),
    progress=False,
)  # fmt: skip
plots.show_rows(
    lab.rows(
        report,
        {"KLD, code": ("kld", "code"), "KLD, assistant": ("kld", "assistant"), "exact match, assistant": ("exact_match", "assistant")},
    )
)
before, after = (report.get(model=m, metric="kld", slice="code").value for m in ("8 of 16 experts", f"and {steps} steps"))
assert after < before

# %% [markdown]
# **The control that must fail: a teacher that knows nothing.** The same steps on the same rows from random weights: were it moving the
# weights a little that mends the model, and not what the teacher says, this would mend it as well.

# %%
torch.manual_seed(0)
stranger = AutoModelForCausalLM.from_config(teacher.config).eval()
misled = compress(cut.model, lesson, training=training, teacher=stranger, progress=False)
code_only = dict.fromkeys(documents, 0) | {"code": documents["code"]}
control = evaluate({"original": teacher, "misled": misled.model}, tokenizer, text["test"], max_docs=code_only, speed=False, progress=False)
print(f"KLD on code: {control.get(model='misled', metric='kld', slice='code').value:.3f}; from the original as teacher {after:.3f}")
assert control.get(model="misled", metric="kld", slice="code").value > before

# %% [markdown]
# **Explain.** What is learnt is the function of the original on these rows, token by token. It needs no labels, and no text that the
# original was trained on: only text on which it has something to say.
#
# **Predict.** The fair rival is no random teacher but the text itself. 500 steps of either (`Distill` and `FineTune`, same rate and
# batch): which wins on KLD, and which on exact match? **Measured at build**:

# %%
recovery = studies.read("recovery")
curves = {k: v for k, v in recovery.curves.items() if "distilled" in k}
told = lab.say_curves(curves)
plots.show(lab.curves_figure(curves, "Half of the experts, learning from the original", "held-out KL divergence, nats per token"), told)
display(Markdown(told))
plots.show_rows(lab.rows(recovery.report, {
    "KLD, mean of domains": ("kld", studies.MEAN),
    "exact match, assistant": ("exact_match", "assistant"),
    "exact match, arithmetic": ("exact_match", "arithmetic"),
}))  # fmt: skip

# %% [markdown]
# **Answer.** On KLD the original by far: the text pulls the model towards another one than it was. On the assistant's exact match the text
# alone does as well, for its answers are in the text; on sums the original wins. Name the metric before you say "recovered".
#
# **Look** at the axis before you believe a curve: its loss is on held-out *rows of the training text*, the table's on the test split.
#
# ## 4. A student from nothing
#
# Two layers, 128 wide, random weights: 300 steps from the teacher, or from the same rows of text. Three seeds each (mean, least
# and most in brackets). **Measured at build**:

# %%
found = studies.read("students")
rows = lab.rows(
    found.report,
    {
        "bits per byte, prose": ("bits_per_byte", "prose"),
        "bits per byte, code": ("bits_per_byte", "code"),
        "KLD, mean of domains": ("kld", studies.MEAN),
    },
    ("teacher", "distilled", "text"),
)
plots.show_rows(rows)
distilled, plain = (found.report.get(model=m, metric="bits_per_byte", slice="code") for m in ("distilled", "text"))
assert distilled.high < plain.low

# %% [markdown]
# ## 5. Asking the teacher once
#
# A teacher may be too slow to be asked at every step. Keep its logits? For a vocabulary of 150,000 that is 300 kB per token. The k largest
# are cheap to keep and *biased*; tokens drawn from its distribution are cheap and unbiased.

# %%
generator = torch.Generator().manual_seed(0)
with torch.inference_mode():
    t = teacher(calibration[0][:4]).logits.flatten(0, 1).clone()
    s = cut.model(calibration[0][:4]).logits.flatten(0, 1).clone()
exact = float(-(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean())
kept = [{"kept of the teacher": "everything", "cross entropy": f"{exact:.4f}", "off by": ""}]
for k in (1, 4, 12):
    value = float(top_k_cross_entropy(s, t, k))
    kept.append({"kept of the teacher": f"the {k} largest", "cross entropy": f"{value:.4f}", "off by": f"{value - exact:+.4f}"})
    value = float(np.mean([float(sampled_cross_entropy(s, draw(t, k, generator))) for _ in range(20)]))
    kept.append(
        {"kept of the teacher": f"{k} drawn (mean of 20 draws)", "cross entropy": f"{value:.4f}", "off by": f"{value - exact:+.4f}"}
    )
plots.show_rows(kept)

# %% [markdown]
# **Explain.** The k largest leave out the tail, always on the same side: more steps don't average that away. A drawn token is right in the
# mean and noisy each time; over many steps noise averages out. `Distill(samples=12)` does that.
#
# ## 6. Rounding in the loop
#
# **Predict.** Below the rounded value is drawn over the weight. What is its derivative, and what could a weight learn from that?
#
# Rounding has the derivative 0 nearly everywhere: nothing could learn. The straight-through estimator takes 1 inside of the range and 0
# where a weight is clipped. LSQ gives the step s a derivative, too: of s · round(clip(w / s, −Qn, Qp)), with the rounding taken as the
# identity, it is round(w/s) − w/s inside of the range, −Qn or Qp outside of it (arXiv 1902.08153, equation 3), times g = 1/√(n · Qp), so
# that n weights don't push one step harder than one weight is pushed. Codes of 3 bits go from −Qn = −4 to Qp = 3.

# %%
figure = lab.staircase_figure()
told = "The value rises in eight stairs from -2 to 1.5; the derivative put in its place is 1 between them and 0 outside."
plots.show(figure, told)
display(Markdown(told))

# %%
rules = (("@router", None), ("*", QuantScheme.parse("int3-row")))
nearest = compress(teacher, Recipe((Quantize(rules),)), progress=False)
aware = compress(teacher, Recipe((Quantize(rules, method=Qat(steps=steps, lr=3e-4, batch=4)),)), training=training, progress=False)
print(aware.remarks[-1])
report = evaluate(
    {"original": teacher, "int3-row, to nearest": nearest.model, f"int3-row, {steps} steps of QAT": aware.model},
    tokenizer, text["test"], max_docs=documents, speed=False, progress=False,
)  # fmt: skip
plots.show_rows(
    lab.rows(report, {"KLD, prose": ("kld", "prose"), "KLD, code": ("kld", "code"), "exact match, assistant": ("exact_match", "assistant")})
)

# %% [markdown]
# **Explain.** A weight that is pushed long enough crosses a border and its code changes: the float behind it remembers the pushes. The
# steps learn together with the weights, and a few wide weights no longer decide how coarse a row is.
#
# 4 and 8 bits, one scale per row, for longer. The Qingzhou article claims 98.7 % of the accuracy for INT8. **Measured at build**:

# %%
qat = studies.read("qat")
plots.show_rows(lab.rows(qat.report, {
    "KLD, mean of domains": ("kld", studies.MEAN),
    "exact match, assistant": ("exact_match", "assistant"),
    "exact match, arithmetic": ("exact_match", "arithmetic"),
}))  # fmt: skip
eight, whole = (qat.report.get(model=m, metric="exact_match", slice=studies.MEAN).value for m in ("int8-row, QAT", "fp"))
print(f"INT8 with QAT keeps {100 * eight / whole:.1f} % of the original's exact match (claimed: 98.7 %)")
back = lab.recovered(qat.report, "fp", "int4-row, to nearest", "int4-row, QAT", "kld", studies.MEAN)
print(f"QAT at 4 bits wins back {100 * back:.0f} % of the KL divergence that rounding to nearest costs")

# %% [markdown]
# **Answer.** The claim for INT8 holds, and rounding to nearest keeps it without learning, too: at 8 bits per row there is nothing to win
# back on this model. At 4 bits there is. (600 steps of 8 rows of 256 tokens at a rate of 1e-4; 400 steps at 2e-4 gave 49 %.)

# %% [markdown]
# ## 7. A new task on top of frozen codes
#
# The Qingzhou article says that about 1,000 labelled examples are enough for a new domain. Here: spoken commands to a robot, which no model
# ever saw, learnt by an int4 model through adapters (LoRA) or through its scales alone, and by the original.
#
# **Predict.** What happens to the assistant, whose commands look the same and mean other calls?

# %%
few_shot = studies.read("adapt")
plots.show_rows(lab.rows(few_shot.report, {
    "exact match, robot": ("exact_match", "robot"),
    "exact match, assistant": ("exact_match", "assistant"),
    "exact match, arithmetic": ("exact_match", "arithmetic"),
}))  # fmt: skip

# %% [markdown]
# **Answer.** Alone, 1,000 examples teach the new task nearly whole, and the assistant forgets *everything*: it answers with a robot's
# calls. With as many rows of the old text between them ("rehearsed", the other lines) most of the old stays, and less of the new is
# learnt. "Enough" is half of the truth: ask what was lost.
#
# ## 8. The recipe of the house
#
# `Recipe.phone()`: REAP drops half of the experts, the rest learns from the original, GPTQ spends 2.85 bits per weight where they
# count, and then the *scales* of the frozen codes learn, which adds no byte. The bundle ships in `data/edge-phone`.

# %%
import json

from edgelab.bundle import read_manifest
from edgelab.report import Report

manifest = read_manifest(data_dir() / "edge-phone")
phone = Report.from_json(json.dumps(manifest["report"]))
plots.show_rows(lab.rows(phone, {
    "bytes": ("weight_bytes", ""), "bits per byte, prose": ("bits_per_byte", "prose"),
    "exact match, assistant": ("exact_match", "assistant"), "exact match, arithmetic": ("exact_match", "arithmetic"),
}))  # fmt: skip
sizes = [phone.get(model=m, metric="weight_bytes").value for m in ("fp", "phone")]
names = ", ".join(s["step"] for s in manifest["recipe"]["steps"])
print(f"{sizes[0] / sizes[1]:.2f} times smaller than 16 bits (measured at build); the steps: {names}")

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
import numpy as np

from edgelab import train_lab as lab

# %% [markdown] tags=["exercise"] exercise="hinton" difficulty=2 importance=3 minutes=10
# Hinton's loss of one position as a function of two lists of logits, the label, T and α: α T² KL(p_T ‖ q_T) + (1 − α) CE, in nats.
# p is the teacher's distribution, q the student's; CE is minus the logarithm of what the student at T = 1 gives the label.


# %% tags=["stub"]
def loss(student, teacher, label, temperature, alpha):
    """Hinton's loss in nats; `student` and `teacher` are lists of logits, `label` the number of the token that came."""
    ...


# %% tags=["check"]
lab.check_hinton(loss)

# %% [markdown] tags=["hint"]
# A function inside yours for the logarithm of the softmax pays: x - max(x) - log(sum(exp(x - max(x)))). Logits may be 800.

# %% [markdown] tags=["expected"]
# Teacher (0.8, 0.2), student (0.5, 0.5), label 0, T = 1, α = 0.7: 0.7 · 0.1927 + 0.3 · 0.6931 = 0.3429.


# %% tags=["solution"]
def loss(student, teacher, label, temperature, alpha):
    """Hinton's loss in nats; `student` and `teacher` are lists of logits, `label` the number of the token that came."""

    def log_softmax(logits):
        x = np.asarray(logits, dtype=float) - np.max(logits)
        return x - np.log(np.exp(x).sum())

    p, q = log_softmax(np.divide(teacher, temperature)), log_softmax(np.divide(student, temperature))
    kl = (np.exp(p) * (p - q)).sum()
    return alpha * temperature**2 * kl - (1 - alpha) * log_softmax(student)[label]


# %% tags=["mutant"]
# the reverse divergence, KL(student || teacher)
def loss(student, teacher, label, temperature, alpha):
    s, t = np.array(student, float), np.array(teacher, float)
    q, p = s / temperature - np.log(np.exp(s / temperature).sum()), t / temperature - np.log(np.exp(t / temperature).sum())
    return alpha * temperature**2 * (np.exp(q) * (q - p)).sum() - (1 - alpha) * (s - np.log(np.exp(s).sum()))[label]


# %% tags=["mutant"]
# without the factor T squared
def loss(student, teacher, label, temperature, alpha):
    s, t = np.array(student, float), np.array(teacher, float)
    q, p = s / temperature - np.log(np.exp(s / temperature).sum()), t / temperature - np.log(np.exp(t / temperature).sum())
    return alpha * (np.exp(p) * (p - q)).sum() - (1 - alpha) * (s - np.log(np.exp(s).sum()))[label]


# %% tags=["mutant"]
# the cross entropy is softened, too
def loss(student, teacher, label, temperature, alpha):
    s, t = np.array(student, float), np.array(teacher, float)
    q, p = s / temperature - np.log(np.exp(s / temperature).sum()), t / temperature - np.log(np.exp(t / temperature).sum())
    return alpha * temperature**2 * (np.exp(p) * (p - q)).sum() - (1 - alpha) * q[label]


# %% tags=["mutant"]
# alpha weighs the text and 1 - alpha the teacher
def loss(student, teacher, label, temperature, alpha):
    s, t = np.array(student, float), np.array(teacher, float)
    q, p = s / temperature - np.log(np.exp(s / temperature).sum()), t / temperature - np.log(np.exp(t / temperature).sum())
    return (1 - alpha) * temperature**2 * (np.exp(p) * (p - q)).sum() - alpha * (s - np.log(np.exp(s).sum()))[label]


# %% tags=["mutant"]
# right, but exp(800) overflows
def loss(student, teacher, label, temperature, alpha):
    s, t = np.array(student, float), np.array(teacher, float)
    with np.errstate(all="ignore"):
        q, p = s / temperature - np.log(np.exp(s / temperature).sum()), t / temperature - np.log(np.exp(t / temperature).sum())
        return alpha * temperature**2 * (np.exp(p) * (p - q)).sum() - (1 - alpha) * (s - np.log(np.exp(s).sum()))[label]


# %% [markdown] tags=["exercise"] exercise="step-gradient" difficulty=3 importance=2 minutes=10
# LSQ's derivative of the fake-quantized weights by their common step s, without the factor g (section 6), summed over a list of
# weights: a function of the weights, s and the number of bits.


# %% tags=["stub"]
def step_gradient(weights, step, bits):
    """The sum over `weights` of the derivative of step * round(clip(w / step, -Qn, Qp)) by `step`, straight through the rounding."""
    ...


# %% tags=["check"]
lab.check_step_gradient(step_gradient)

# %% [markdown] tags=["hint"]
# Three cases: w / s below -Qn, above Qp, or between. With b bits Qn = 2^(b-1) and Qp = 2^(b-1) - 1.

# %% [markdown] tags=["expected"]
# `step_gradient([1.7], 0.5, 3)` is 3, for 1.7 / 0.5 = 3.4 lies above Qp; `step_gradient([0.9], 0.5, 3)` is 2 - 1.8 = 0.2.


# %% tags=["solution"]
def step_gradient(weights, step, bits):
    """The sum over `weights` of the derivative of step * round(clip(w / step, -Qn, Qp)) by `step`, straight through the rounding."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = np.array(weights, float) / step
    return np.where(v < low, low, np.where(v > high, high, np.round(v) - v)).sum()


# %% tags=["mutant"]
# clipped weights are taken to have no gradient, as that of the weight is 0 there
def step_gradient(weights, step, bits):
    v = np.array(weights, float) / step
    inside = (v >= -(2 ** (bits - 1))) & (v <= 2 ** (bits - 1) - 1)
    return np.where(inside, np.round(v) - v, 0.0).sum()


# %% tags=["mutant"]
# a symmetric range: both ends at 2^(b-1) - 1
def step_gradient(weights, step, bits):
    top = 2 ** (bits - 1) - 1
    v = np.array(weights, float) / step
    return np.where(abs(v) > top, np.sign(v) * top, np.round(v) - v).sum()


# %% tags=["mutant"]
# the code itself: as if w / s did not depend on s
def step_gradient(weights, step, bits):
    return np.clip(np.round(np.array(weights, float) / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).sum()


# %% tags=["mutant"]
# the mean over the weights, though the step is common to all of them
def step_gradient(weights, step, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = np.array(weights, float) / step
    return np.where(v < low, low, np.where(v > high, high, np.round(v) - v)).mean()


# %% [markdown] tags=["exercise"] exercise="lora-bytes" difficulty=1 importance=2 minutes=3
# LoRA of rank 8 in bfloat16 beside a 256 × 640 weight in int4-g32: how many percent of the weight's bytes?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_bytes(answer)

# %% [markdown] tags=["hint"]
# A has 8 rows and B 8 columns; int4-g32 takes 4.5 bits a weight.

# %% [markdown] tags=["expected"]
# About a sixth of the weight: `train="scales"` adds nothing.

# %% tags=["solution"]
answer = 100 * 8 * (256 + 640) * 2 / (256 * 640 * 4.5 / 8)

# %% tags=["mutant"]
# a byte per number
answer = 100 * 8 * (256 + 640) / (256 * 640 * 4.5 / 8)

# %% tags=["mutant"]
# beside the weight in 16 bits
answer = 100 * 8 * (256 + 640) * 2 / (256 * 640 * 2)

# %% tags=["mutant"]
# the scales of int4-g32 are forgotten
answer = 100 * 8 * (256 + 640) * 2 / (256 * 640 * 4 / 8)

# %% tags=["mutant"]
# a share, not percent
answer = 8 * (256 + 640) * 2 / (256 * 640 * 4.5 / 8)

# %% [markdown]
# ## What would change on your model
#
# Time and text. A step costs a forward pass of the teacher and a step of training, so a model of a billion parameters wants a GPU, or
# `Distill(samples=12)`, which asks the teacher once. Learn from text like that which the model will see, from the training split of it, and
# keep the test split for the table. On frozen codes: to heal what rounding broke, `train="scales"`, which adds no byte and nothing to the
# format; to learn a new task, `train="lora"`, which learns more and forgets less.
