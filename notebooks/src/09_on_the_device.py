# %% [markdown]
# # 09 · On the device
#
# **Claim: the speed of a language model on a phone follows from a few numbers that anyone can look up, bytes per token and bytes per
# second first of all, to within a factor that can be stated beforehand. Peak TOPS say nothing about it. And what a battery policy gains
# hangs on a number that no article states: what the rest of the phone takes.**
#
# After this notebook you can
#
# 1. run a model on the project's own runtime, and say where its memory is,
# 2. tell what bounds decoding and what bounds a prompt, on this machine and on a phone,
# 3. predict tokens per second, memory, load time and energy of a model on a device, with a band, and say what the band was tested on,
# 4. say what a mixture costs whose experts do not fit into memory,
# 5. simulate a governor, and judge "15 % slower, 40 % longer",
# 6. chat with the model, and read from the monitor how it does.
#
# *Before you start*: [01](01_compress_evaluate_export.ipynb) for bundles; [06](06_moe_experts.ipynb) for experts on disk. *Takes* about
# half a minute on two quiet cores and 1.3 GB of memory. Every cell may be run again. **Measured** here means: on this machine, in this run.
# All that is said of phones is **modelled**, and says so.

# %%
import torch
from IPython.display import Markdown, display

from edgelab import corpus, data, expert_cache, plots
from edgelab import device_lab as lab
from edgelab.chat import Chat
from edgelab.device import discrepancies, predict
from edgelab.efficiency import efficiency_table, leave_one_device_out, validation
from edgelab.governor import PHONE, DeviceState, Governor, read_state
from edgelab.governor_plots import endurance, frontier, say_endurance, say_frontier, table_endurance
from edgelab.host import calibrate_runtime, measure_host
from edgelab.model import load, load_tokenizer
from edgelab.monitor import Monitor
from edgelab.paths import data_dir
from edgelab.probes import Probe
from edgelab.runtime import Runtime
from edgelab.simulate import Device, Workload, claim_share, dvfs, sensitivity, static_for, work_of

# %% tags=["parameters"]
bundle = str(data_dir() / "edge-phone")  # any bundle, or a checkpoint of a family that the runtime knows
mixture = str(data_dir() / "edge-moe")  # whose experts' use is replayed in section 4
command = "heat the kitchen to twenty one degrees"
new_tokens = 64
probe_seconds = 0.05  # for each of the models that this machine is timed on
draws = 200  # of what nobody knows of a phone, section 5
seed = 0

# %% [markdown]
# ## 1. A token, here
#
# `Runtime` writes tokens with the kernels of notebook 02: one compiled call per token, no torch in the loop. A prompt is read many rows at
# a time, an answer is written one by one.
#
# **Predict.** Reading a token of a prompt and writing one take the same arithmetic. How do their speeds compare? Which of the two do more
# threads help?

# %%
tokenizer = load_tokenizer(bundle)
asked = tokenizer.apply_chat_template([{"role": "user", "content": command}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
runtime = Runtime.open(bundle)
runtime.generate(ids, new_tokens)  # the first one meets cold caches
answer = runtime.generate(ids, new_tokens)
print(tokenizer.decode(answer.tokens))
display(answer)
long = (ids * 100)[:512]
speeds, read, written = [], [], []
for threads in sorted({1, runtime.threads}):
    runtime.threads = threads
    runs = [runtime.generate(long, new_tokens, stop=[]) for _ in range(5)]
    read.append(max(g.prefill_tokens_per_s for g in runs))
    written.append(max(g.decode_tokens_per_s for g in runs))
    speeds.append({
        "threads": str(threads),
        "prompt of 512, tokens/s (measured)": f"{read[-1]:,.0f}",
        "answer behind it, tokens/s (measured)": f"{written[-1]:,.0f}",
    })  # fmt: skip
plots.show_rows(speeds)
assert max(read) > max(written)

# %% [markdown]
# **Look.** The best of five runs: other work on the machine only ever makes one slower, and two threads more than one.
#
# **Answer.** A prompt goes faster: its rows share each weight that is read and unpacked, and there is enough to do for a second thread, if
# a core is free. One token of a model this small takes about a tenth of a millisecond; handing work to a thread and waiting for it
# costs as much as it saves.
#
# **Predict.** Weights, activations, cache of keys and values: which takes most memory? And with eight conversations at once?

# %%
eight = Runtime.open(bundle, slots=8)
plots.show_rows(lab.plan_rows({"1 sequence, bytes": runtime.plan, "8 sequences, bytes": eight.plan}))
print(f"the plan saves {runtime.plan.saved:.0%} of the activations, {runtime.plan.saved_with_cache:.0%} with the cache counted")
assert runtime.plan.bound_bytes <= runtime.plan.planned_bytes < runtime.plan.unplanned_bytes

# %% [markdown]
# **Answer.** Without planning, activations would take ten times what the weights do. Buffers that are never needed together share their
# memory (`memory_plan.py`), and what is left is close to the bound that no plan can beat. What grows with conversations is the cache.
#
# **Explain.** "Before" counts every intermediate result of every operation: what a runtime holds that frees nothing. An article that says
# how much planning saves has chosen what to count before; the cache belongs on both sides, and makes the share smaller.
#
# ## 2. What bounds it: the roof
#
# To write one token, every weight that takes part is read once. So a first prediction is a division: bandwidth / bytes per token.
#
# **Predict.** This machine's memory gives some tens of GB/s, and a token of the phone model reads a megabyte or two. What does the division
# promise, and what will be measured? And for a model of 60 MB?

# %%
host = measure_host(threads=(1,), seconds=0.05, disk=False)
host = calibrate_runtime(host, seconds=probe_seconds)
print(host)
large = Probe("64 M random weights, int4-g32", {
    "model_type": "llama", "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 2048, "max_position_embeddings": 2048, "tie_word_embeddings": False,
})  # fmt: skip
here = [lab.own(host, bundle), lab.own(host, large, seconds=2.0)]
plots.show_rows(lab.own_rows(here))
assert all(o.roof_error > -0.3 for o in here), "a roof was passed"
assert abs(here[0].error) < here[0].roof_error, "the division was the better prediction of the small model"

# %% [markdown]
# **Look.** *Off by* is how much faster a prediction is than what came out; both predictions were made before the model ran. The right one
# adds what a step costs that is not reading: norms, rotations, rounding of the inputs, handing on, unpacking codes. These costs were
# fitted on 27 models of random weights, none of which is one of these two.
#
# **Answer.** For the phone model the division promises a multiple of what comes, and the second prediction is close. For the larger model
# the division comes nearer: the more bytes, the more they decide. (On a busy machine it misses by more: the memory is shared with whatever
# else runs, and what was measured a minute ago is no longer so.)
#
# **Explain.** A roof is what can't be passed, and no prediction. Weights of a megabyte lie in a cache, and a step of seventy microseconds
# at a short context is mostly everything else. The models that people put on phones read a gigabyte per token, where the roof is all but
# the whole story.
#
# Here is one of them on a phone, with prompts beside it:

# %%
one = lab.shape_with("llama-3.2-1b", lab.models()["llama-3.2-1b"], "int4-g32")
roofs = lab.roofs("oneplus-12", one)
sentence = lab.say_roofline(roofs)
plots.show(lab.roofline_figure(roofs), sentence)
display(Markdown(sentence))
plots.show_rows(lab.roofline_rows(roofs))

# %% [markdown]
# **Answer** to a question of section 1. A prompt stands on the flat part of the roof, where arithmetic binds, and more cores or an
# accelerator help; decoding stands on the slope, where only fewer bytes do. That is why this course is about bits.
#
# ## 3. A model, a device, a recipe
#
# `data/devices.toml` has thirty devices, each number with its source and with how it is known: measured, vendor, derived, assumed. Classes
# of software differ in how much of the bandwidth they reach; that share, and a time per layer, were fitted on published
# measurements of *some* devices:

# %%
plots.show_rows(efficiency_table())

# %% [markdown]
# **Predict.** Llama-3.2-1B on a OnePlus 12: ExecuTorch's authors measured 19.2 tokens/s in 16 bits and 50.2 in 4 bits. 4 bits are a
# quarter of the bytes: why not four times the speed? What would 2 bits give?

# %%
control = lab.DeviceControl("oneplus-12", "llama-3.2-1b", "int4-g32")
control

# %%
by_bits = [control.choose("oneplus-12", "llama-3.2-1b", r) for r in ("16 bits", "int8-g32", "int4-g32", "int2-g64")]
plots.show_rows(lab.prediction_rows(by_bits))
control.choose("oneplus-12", "llama-3.2-1b", "int4-g32")
assert control.error is None, control.error
for figure in control.static():
    plots.show(figure, control.told)
display(Markdown(control.told))

# %% [markdown]
# **Look.** The brackets hold four of five measurements on devices that the fit had not seen. A star says that the number rests on
# something assumed: nobody states how many watts the chip takes while it decodes, or how much of the memory an app may have.
#
# **Answer.** Half a bit per weight goes to scales, the cache stays in 16 bits, and each layer costs its time whatever its bits: the fewer
# bytes, the more of the token is overhead. The agreement with the two measurements proves nothing: this phone is one of those that were
# fitted on. What was not is below.
#
# More of them, one recipe, five phones and boards:
#
# **Predict.** Which of these do not fit? Where does twice the bandwidth *not* give twice the speed?

# %%
names = ("oneplus-12", "iphone-15-pro", "redmi-6a", "raspberry-pi-5", "jetson-orin-nano")
shapes = [lab.shape_with(m, lab.models()[m], "int4-g32") for m in ("llama-3.2-3b", "qwen2.5-1.5b", "llama-3-8b")]
software = dict.fromkeys(names, "cpu-tuned") | {"jetson-orin-nano": "gpu"}
plots.show_rows(lab.prediction_rows([predict(n, s, engine=software[n]) for s in shapes for n in names]))

# %% [markdown]
# **Explain.** The ratio of two predictions is better than either: what the fit has wrong for a device is in both. Compare models on one
# device with confidence, devices with each other with the band in mind.
#
# How good are the predictions? The devices below were **held out**: they were set aside, by a rule, before anything was fitted.

# %%
held = validation()
print(held.say())
print(leave_one_device_out().say())
plots.show_rows(lab.validation_rows(held))
assert held.median_error < 0.5

# %% [markdown]
# **Look.** Tuned kernels on a phone or a Raspberry Pi and most GPUs are predicted to a tenth or two. Processors whose cores cannot draw
# their memory's bandwidth (the twelve cores of an AGX Orin) come out two or three times too fast: if your device is like that, measure.
#
# The numbers of articles went into no prediction. Where they differ from what makers state, both are kept:

# %%
plots.show_rows(lab.discrepancy_rows(discrepancies()))

# %% [markdown]
# **Explain.** 4.7 TOPS of a Jetson Nano are ten times what its GPU does at any precision; 275 TOPS of an AGX Orin count zeros that are
# skipped, and accelerators beside the GPU. "1 % of the battery in 10 minutes" would be 1.1 W for a whole phone, chip and screen
# together. Do TOPS matter? For decoding, hardly:
#
# **The control that must fail: predict from TOPS.** Operations per token are known, peak operations too, so divide.
#
# **Predict.** By which factor is that too fast, on the held-out devices?

# %%
peaks = lab.by_peak()
plots.show_rows(lab.peak_rows(peaks))
wrong, right = lab.factor(peaks, "by_peak"), lab.factor(peaks, "by_bandwidth")
print(f"median factor between prediction and measurement, {len(peaks)} rows: {wrong:.0f} from peak operations, {right:.2f} from bandwidth")
assert wrong > 5 > 2 > right

# %% [markdown]
# **Answer.** By tens and hundreds.
#
# ## 4. Experts that do not fit
#
# Moonlight-16B-A3B has the architecture of DeepSeek-V3: 64 experts per layer, six per token. In four bits it takes 9 GB; of a phone's 12 an
# app may have perhaps half. What does not fit stays on flash and is read when a token wants it.
#
# **Predict.** Five eighths of the experts are in RAM. What does the token wait for now? By how much does a better hit rate help?

# %%
moonlight = lab.shape_with("moonlight-16b-a3b", lab.MOONLIGHT, "int4-g32")
model = load(mixture)
text = data.calibration_batches(load_tokenizer(mixture), corpus()["calibration"], tokens=2048, context=256, seed=seed)
with torch.no_grad():
    chosen = expert_cache.trace(model, text)
flash = lab.flash_rows("xiaomi-13-pro", moonlight, chosen)
plots.show_rows(flash)
half = lab.shape_with("moonlight-16b-a3b", lab.MOONLIGHT, "half of the experts, int4-g32")
plots.show_rows(lab.prediction_rows([predict("xiaomi-13-pro", s) for s in (moonlight, half)]))
assert flash[0]["waits for"] == "flash" and flash[-1]["waits for"] == "bandwidth"

# %% [markdown]
# **Answer.** For flash, which is twenty times slower than memory: the experts that are missing take more time than all that is there.
#
# **Explain.** Neighbouring tokens want the same experts, so a cache hits more often than chance. The middle line takes the rate that lru
# has on *our* mixture with the same share of experts in RAM: borrowed from another model, so a guess, but a better one than "all equally
# likely". Half of the experts dropped fits and needs no flash; what that costs in quality is notebook 06.
#
# ## 5. Battery and heat
#
# A governor reads sensors and sets precision, threads, experts and pauses; thresholds with hysteresis decide (`governor.py`). Its decision
# right now, from this machine's sensors, and for a phone with 18 % battery:

# %%
now = Governor(PHONE).decide(read_state(), 0.0)
print("this machine:", now.reason)
low = Governor(PHONE).decide(DeviceState(battery=0.18, plugged=False, temperature_c=31.0, load=0.1), 0.0)
print("a phone:", low.setting, "|", low.reason)
low.apply(runtime)
print(f"the runtime now uses {runtime.threads} threads and {runtime.top_k} experts per token")

# %% [markdown]
# An article: below 20 % battery a low-power mode, "15 % slower, 40 % longer". Move the sliders: what the screen and the rest of the phone
# take, how often somebody asks, when the mode begins, and what it sets. The whole discharge is simulated at each change.
#
# **Predict.** From which static power on does the mode gain less than 40 %? Does it make answers slower at all?

# %%
governor = lab.GovernorControl()
governor

# %%
gains = [governor.choose(static_w=p) for p in (0.3, 1.0, 3.0)]
assert governor.error is None, governor.error
assert gains[0].hours > gains[1].hours > gains[2].hours
plots.show(governor.figure(), governor.told)
display(Markdown(governor.told))

# %% [markdown]
# That was one phone, with numbers as they stand, some of which nobody measured. Now all that is not known is drawn from its range, `draws`
# times, and the intervals hold 95 % of the draws:

# %%
normal, frugal = PHONE.levels["normal"], PHONE.levels["low-power"]
ours = {str(frugal): sensitivity(Device(), Workload(), normal, frugal, draws=draws, seed=seed)}
ours |= {s: sensitivity(Device(), Workload(), normal, lab.LOW_SETTINGS[s], draws=draws, seed=seed) for s in list(lab.LOW_SETTINGS)[1:3]}
sentence = say_endurance(ours, claim=40)
plots.show(endurance(ours, claim=40), sentence)
plots.show_rows(table_endurance(ours))
for watts in (0.3, 1.0, 3.0):
    share = claim_share(15, 40, Device(static_w=watts), Workload(), normal, frugal, draws=draws, seed=seed)
    print(f"static power {watts} W: +15 % latency at most and +40 % hours at least, at once, in {share:.0%} of the draws (modelled)")
most = static_for(40, Device(), Workload(), normal, frugal)
print(f"numbers as they stand: 40 % up to {most:.2f} W of static power (modelled)")

# %% [markdown]
# **Answer.** With the screen off a policy like this gains far more than 40 %, with a bright one less; and because four bits are half
# the bytes of eight, answers are rather faster than slower, although two threads and a lower clock do the work.
#
# **Explain.** Endurance is battery / (static + compute). The policy touches only the second term. An article that states a gain and no
# static power has stated half a fact. It can be true, and so can 10 %.
#
# **Frequency.** Run slowly all the time, or fast and then sleep? "Race to idle" against "slow and steady", for an inference of 2.1 ms
# at the highest frequency that comes every 10 or 50 ms:
#
# **Predict.** Power goes with the square of the voltage. Who wins?

# %%
phone = Device()
work = work_of(phone, 2.1e-3, memory=0.3)
points = {f"every {1000 * t:g} ms": dvfs(phone, work, t) for t in (0.01, 0.05)}
sentence = say_frontier(points)
plots.show(frontier(points), sentence)
display(Markdown(sentence))

# %% [markdown]
# **Answer.** Slow and steady, as long as the lowest frequencies have lower voltages and sleep costs little; with more leakage, or more that
# is on only while the cores are, racing wins. It is a property of the chip, no law.
#
# **The second control that must fail: the same thresholds without hysteresis.** The battery falls from 21 to 19 % in half an hour, and its
# gauge errs by half a percent.
#
# **Predict.** With hysteresis the mode begins once. How often without?

# %%
flapping = lab.flapping_rows(seed=seed)
plots.show_rows(flapping)
column = list(flapping[0])[1]
assert int(flapping[0][column]) == 1 and int(flapping[-1][column]) > 20

# %% [markdown]
# **Answer.** Dozens of times; and each is a swap of models, which notebook 08 measured. Hysteresis alone is enough for noise; the dwell is
# there for signals that really do swing, as temperature does.
#
# ## 6. Chat
#
# The phone model was trained on commands (and on sums, prose and Python), one exchange at a time; so *remember* is off. With it on, each
# message is read behind what the cache holds of the conversation, and the answer says how many tokens that saved. Enter sends; Stop
# stops between two tokens; nothing leaves this kernel.
#
# **Predict.** The model says how sure it is of each token. Is it less sure of things that it was never trained on?

# %%
monitor = Monitor("chat")
chat = Chat(Runtime.open(bundle, slots=2), tokenizer, monitor=monitor, seed=seed, remember=False)
chat

# %%
known = [chat.ask(t) for t in (command, "wake me at half past six tomorrow", "dim the lamp in the bedroom")]
strange = [chat.ask(t) for t in ("who was the first on the moon", "my back hurts when I sit")]
assert chat.error is None, chat.error
print(chat)
print(
    f"mean confidence: {sum(a.confidence for a in known) / 3:.2f} on commands, {sum(a.confidence for a in strange) / 2:.2f} on the others"
)
monitor

# %% [markdown]
# **Answer.** A little, and it answers all the same, with a command. Nor is a sure answer right: in the stored run the alarm is set for
# 05:30, with confidence 0.98. Confidence is no measure of truth, but when its mean over requests falls, inputs have changed or the model
# broke: the monitor watches for that (Page and Hinkley's test), and offers its numbers to Prometheus (`monitor.serve()`), on this
# machine only.
#
# **Explain.** What can be known without a right answer: speed, memory, errors, confidence. What can't: accuracy. For that somebody has
# to judge, with the two buttons below the chat; the monitor shows the share with its interval.

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
from edgelab import device_lab as lab

# %% [markdown] tags=["exercise"] exercise="roofline" difficulty=2 importance=3 minutes=10
# The roofline of decoding as a function. A dense model of so many `weights` with `bits` each; the cache of keys and values has `kv_bytes`.
# The memory gives `bandwidth` bytes per second, of which software reaches a `share`; the cores do `peak` operations per second.
# Every weight and the whole cache are read for each token, and each weight takes two operations. Memory and arithmetic overlap.


# %% tags=["stub"]
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    """Tokens per second, overheads left out."""
    ...


# %% tags=["check"]
lab.check_roofline(tokens_per_s)

# %% [markdown] tags=["hint"]
# Two times, in seconds per token: one of reading, one of computing. What overlaps takes as long as the slower of the two.

# %% [markdown] tags=["expected"]
# 1.5 · 10⁹ weights of 4.5 bits, no cache, 60 % of 68 GB/s, fast cores: 0.6 · 68 / (1.5 · 4.5 / 8) = 48.4.


# %% tags=["solution"]
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    """Tokens per second, overheads left out."""
    reading = (weights * bits / 8 + kv_bytes) / (share * bandwidth)
    computing = 2 * weights / peak
    return 1 / max(reading, computing)


# %% tags=["mutant"]
# bits taken for bytes
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    return 1 / max((weights * bits + kv_bytes) / (share * bandwidth), 2 * weights / peak)


# %% tags=["mutant"]
# the cache costs nothing
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    return 1 / max(weights * bits / 8 / (share * bandwidth), 2 * weights / peak)


# %% tags=["mutant"]
# times added up, though memory and arithmetic overlap
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    return 1 / ((weights * bits / 8 + kv_bytes) / (share * bandwidth) + 2 * weights / peak)


# %% tags=["mutant"]
# bandwidth alone: on slow cores arithmetic decides
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    return share * bandwidth / (weights * bits / 8 + kv_bytes)


# %% tags=["mutant"]
# the theoretical bandwidth, which no software reaches
def tokens_per_s(weights, bits, kv_bytes, bandwidth, share, peak):
    return 1 / max((weights * bits / 8 + kv_bytes) / bandwidth, 2 * weights / peak)


# %% [markdown] tags=["exercise"] exercise="cache-bytes" difficulty=1 importance=2 minutes=5
# Llama-3.2-1B: 16 layers, 32 heads of queries, 8 of keys and values, each of 64 numbers. How many MB (10⁶ bytes) are its keys and
# values at 4,096 tokens, in float16?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_cache(answer)

# %% [markdown] tags=["hint"]
# Queries are not kept.

# %% [markdown] tags=["expected"]
# More than a hundred MB: a sixth of the model's weights in four bits.

# %% tags=["solution"]
answer = 2 * 16 * 8 * 64 * 2 * 4096 / 1e6

# %% tags=["mutant"]
# keys, but no values
answer = 16 * 8 * 64 * 2 * 4096 / 1e6

# %% tags=["mutant"]
# as many heads as there are queries
answer = 2 * 16 * 32 * 64 * 2 * 4096 / 1e6

# %% tags=["mutant"]
# one layer
answer = 2 * 8 * 64 * 2 * 4096 / 1e6

# %% tags=["mutant"]
# float32
answer = 2 * 16 * 8 * 64 * 4 * 4096 / 1e6

# %% [markdown] tags=["exercise"] exercise="static-power" difficulty=2 importance=3 minutes=5
# Compute takes 2 W, in the low-power mode 1 W. At which static power, in W, does the battery last 40 % longer?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_static(answer)

# %% [markdown] tags=["hint"]
# Life goes with one over the total power.

# %% [markdown] tags=["expected"]
# Between one and two watts, about what a screen takes.

# %% tags=["solution"]
answer = (2 - 1.4 * 1) / 0.4

# %% tags=["mutant"]
# 1 W is 40 % of 2.5 W, so the rest takes 2.5 W
answer = 1 / 0.4

# %% tags=["mutant"]
# the gain counted on compute alone
answer = 0.0

# %% tags=["mutant"]
# a round number that looks right: at 1 W the gain is 50 %
answer = 1.0

# %% [markdown] tags=["exercise"] exercise="flash" difficulty=2 importance=2 minutes=5
# A mixture takes 10 ms per token with all experts in RAM. A token uses 300 MB of experts, 80 % of them are found in RAM, flash gives
# 4 GB/s. Tokens per second?

# %% tags=["stub"]
answer = None

# %% tags=["check"]
lab.check_flash(answer)

# %% [markdown] tags=["hint"]
# Times add up, speeds do not.

# %% [markdown] tags=["expected"]
# Less than half of the 100 tokens per second that it would be with all experts in RAM.

# %% tags=["solution"]
answer = 1 / (10e-3 + 0.2 * 300e6 / 4e9)

# %% tags=["mutant"]
# the hits are read, the misses are not
answer = 1 / (10e-3 + 0.8 * 300e6 / 4e9)

# %% tags=["mutant"]
# flash alone, the 10 ms forgotten
answer = 1 / (0.2 * 300e6 / 4e9)

# %% tags=["mutant"]
# all 300 MB from flash
answer = 1 / (10e-3 + 300e6 / 4e9)

# %% tags=["mutant"]
# speeds added up
answer = 1 / 10e-3 + 1 / (0.2 * 300e6 / 4e9)

# %% [markdown]
# ## What would change on your model
#
# The path. The runtime takes plain quantized models of the families that it knows and says why it refuses another; the predictor takes any
# `config.json` of `edgelab.shape.FAMILIES`: `edgelab predict config.json --scheme int4-g32 --device all`. A device that is not in
# `data/devices.toml` is one table there; its bandwidth and the memory that an app may have are the two numbers to look for. Before you
# rely on a prediction, measure one model of about that size on the device and compare. For this machine: `edgelab calibrate-host`, once.
