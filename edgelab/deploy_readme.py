"""The README of a deployment: for the developer who has only its folder."""

import math
from collections.abc import Mapping
from pathlib import Path

from edgelab.export import TARGETS

PROMPT = 128  # tokens that a file of fixed shapes reads at once

_USE = {
    "android": "A Gradle module: Java, C, and the model as an asset. `android/README.md` says how an app takes it in; in `android/ios` "
    "lies a Swift package over the same C code, not executed.",
    "onnx": "One file for ONNX Runtime (Java, Kotlin, Swift, C, Python). {onnx} The text's ids come from `tokenizer/tokenizer.json` "
    "(Hugging Face's `tokenizers`).",
    "gguf": "One file for llama.cpp: `llama-cli -m model.gguf -t {threads}`, or its Android and Swift bindings. The tokenizer is inside.",
    "web": "A static page. Put the folder on any https host and open it on the phone; installed, it works without a network.",
    "litert": "One file for LiteRT's interpreter with two signatures over the same weights: `prefill` reads {prompt} tokens at once "
    "(fill up on the right), `decode` one, both with a cache of {length} places: give each answer's `key.*`, `value.*` to the next call.",
    "executorch": "One file for ExecuTorch with two methods over the same weights: `prefill` reads {prompt} tokens at once (fill up on the "
    "right), `decode` one, both with a cache of {length} places.",
    "coreml": "A package for Xcode, converted and not executed: Core ML predicts on Apple's systems only. Fill up on the right, and read "
    "the logits of your last token.",
    "openvino": "Two files for OpenVINO, which belong together. Fill up on the right; a text is computed anew for each token.",
}
_ONNX = {
    True: "Inputs and outputs are named as in transformers: give `present.*` back as `past_key_values.*` at the next token, which have no "
    "places at first, and `attention_mask` with a 1 for every token so far.",
    False: "Give `input_ids`, filled up on the right, and read the `logits` of your last token; there is no cache.",
}


def shape_of(target: str, settings: Mapping) -> str:
    """What goes into a target's file."""
    rows, tokens = settings["batch_size"], settings["length"]
    if target in ("litert", "executorch"):
        return f"1 row, {min(PROMPT, tokens)} or 1 tokens, {tokens} places"
    if target == "coreml":
        return f"1 row of {tokens} tokens"
    if target == "onnx" and not settings["dynamic_shape"]:
        return f"{rows} rows of {tokens} tokens"
    if target in ("onnx", "android"):
        return f"any; meant for up to {rows} rows"
    return {"gguf": "the runtime's choice", "web": "one text at a time"}.get(target, "any, no cache")


def readme(d, bundle: str | Path, budget: int, manifest: str, contract: Mapping) -> str:
    """The text of a `Deployment` made of `bundle`, with `budget` bytes of RAM for the app. `contract`: of `deploy._contract`."""
    settings, name = d.settings, Path(bundle).name
    words = {**settings, "prompt": min(PROMPT, int(settings["length"])), "onnx": _ONNX[bool(settings["dynamic_shape"])]}
    lines = [
        f"# {name} for {d.device.about}",
        "",
        f"Made by `edgelab deploy` for `{d.device.name}` ({d.device.abi}).",
        f"Threads: **{d.device.threads}** ({d.device.why}). This is a starting point: measure on your device.",
        f"Memory an app may take, as assumed: {budget / 1e6:,.0f} MB.",
        "",
        "## What is here",
        "",
        *_markdown(d.table()),
        "",
        "`weights as codes` were counted in the file. `RAM there, estimated`: weights, logits of a prompt, and where there is a cache its "
        f"keys and values of {settings['batch_size']} x {settings['length']} tokens; not measured on a device.",
        "`1 - cosine` and `same top token` compare the file's logits, in its own runtime, with torch and the same codes. llama.cpp is "
        "compared with the file's weights as float32; `as it runs` is what a phone gets, whose llama.cpp rounds inputs to int8.",
        "",
        "## How it is used",
        "",
    ]
    for target in d.results:
        lines += [f"**{TARGETS[target]}** {_USE.get(target, 'See its runtime.').format(**words)}", ""]
        lines += [f"- {note}" for note in d.results[target].notes] + [""]
    lines += _what_goes_in(contract, bool(settings["dynamic_shape"])) if contract and "onnx" in d.results else []
    if d.batch_difference is not None and int(settings["batch_size"]) > 1:
        lines += [
            "## Batches",
            "",
            "Rows of different lengths are filled up **on the left**, with zeros in `attention_mask`. Checked here with "
            f"{settings['batch_size']} rows: no logit is further from the row's alone than {_above(d.batch_difference):.0e} of the largest",
            "",
        ]
    if d.measured:
        rows = [
            {
                "rows": str(m["rows"]),
                "threads": str(m["threads"]),
                f"first token of {m['prompt']}": f"{1e3 * m['first_token_s']:.0f} ms",
                "tokens/s, all rows": f"{m['tokens_per_s']:.0f} ({m['tokens_per_s_low']:.0f} to {m['tokens_per_s_high']:.0f})",
                "RAM above the imports": f"{m['peak_bytes'] / 1e6:.0f} MB",
            }
            for m in d.measured
        ]
        lines += [
            "## Measured where it was made, not on a device",
            "",
            f"The ONNX file on {d.measured[0]['machine']}:",
            "",
            *_markdown(rows),
            "",
        ]
    lines += [
        "## Whether it is whole",
        "",
        f"`{manifest}` lists the sha256 of every file: `sha256sum -c SHA256SUMS` compares them, and so does "
        "`edgelab verify FOLDER`; with BUNDLE behind it each target is run again too.",
        "The model's own licence applies to these files; edgelab adds none.",
        "",
    ]
    return "\n".join(lines)


def _above(x: float) -> float:
    """The next power of ten: nothing is rounded down."""
    return 10.0 ** math.ceil(math.log10(x)) if x > 0 else 0.0


_GREEDY = """import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer

session, tokens = ort.InferenceSession("model.onnx"), Tokenizer.from_file("tokenizer/tokenizer.json")
ids = np.array([tokens.encode({text}, add_special_tokens={special}).ids])
state = {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if "past" in i.name}}
answer, seen = [], 0
while seen + ids.shape[1] < {context}:
    seen += ids.shape[1]
    logits, *present = session.run(None, {{"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64)}} | state)
    state, token = dict(zip(state, present)), int(logits[0, -1].argmax())
    if token in {stop}:
        break
    answer.append(token)
    ids = np.array([[token]])
print(tokens.decode(answer))"""


def _what_goes_in(contract: Mapping, cached: bool) -> list[str]:
    """The ONNX file's inputs and outputs, what text has to look like, and a program that generates."""
    chat, stop, context = contract["chat"], contract["stop"], contract["context"]
    rows = [{"": way, "name": f"`{n}`", "type": t, "shape": s} for way in ("inputs", "outputs") for n, t, s in contract[way]]
    lines = ["### What goes into model.onnx", "", *_markdown([r | {"": r[""][:-1]} for r in rows]), ""]
    if chat:
        lines += [
            f"A message is written `{chat['before']}`, message, `{chat['after']}`; the answer follows. The tokenizer adds nothing to it."
        ]
    lines += [
        f"An answer ends with the id {' or '.join(map(str, stop)) or '(none)'}; prompt and answer have "
        f"{context or 'any number of'} tokens at most.",
        "",
    ]
    if cached:
        text = repr(f"{chat['before']}turn on the light{chat['after']}" if chat else "turn on the light")
        lines += ["```python", *_GREEDY.format(text=text, special=not chat, stop=stop, context=context or 2**31).splitlines(), "```", ""]
    return lines


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return table + ["| " + " | ".join(row.get(c, "").replace("|", "\\|") for c in columns) + " |" for row in rows]
