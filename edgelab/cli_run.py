"""`edgelab run`: a bundle answers in the shell, on the numba runtime, token by token."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import Threads, err_console, guarded, local_only, out_console, print_table, tokenizer_of

app = typer.Typer()


@app.command()
@guarded
def run(
    bundle: Annotated[str, typer.Argument(help="A bundle written by `edgelab compress`, or a model.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - reads it from standard input.")] = None,
    max_new: Annotated[int, typer.Option("--max-new", help="Tokens of an answer at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the most probable token each time.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the fewest tokens with so much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws: the same seed, the same answer.")] = None,
    context: Annotated[int, typer.Option("--context", help="Positions in all; 0: the model's, 4096 at most.", min=0)] = 0,
    experts: Annotated[int, typer.Option("--experts", help="Experts per token; 0: the model's number.", min=0)] = 0,
    remember: Annotated[bool, typer.Option("--remember/--forget", help="Whether a line's answer knows the lines before it.")] = True,
    exact: Annotated[bool, typer.Option("--exact", help="float32 inputs and cache: transformers' numbers, slower.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the model's chat template.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what was measured, and where the memory is.")] = False,
    govern: Annotated[bool, typer.Option("--govern", help="Follow battery, heat and load: threads, experts, pauses.")] = False,
    metrics: Annotated[int | None, typer.Option("--metrics", help="Prometheus text on this port of localhost; 0: any free.")] = None,
    threads: Threads = 0,
) -> None:
    """Answer PROMPT with BUNDLE on the numba runtime; without PROMPT, line by line until the input ends."""
    from edgelab.doctor import usable_cores
    from edgelab.governor import PHONE, Governed, Governor
    from edgelab.monitor import Monitor
    from edgelab.runtime import Runtime
    from edgelab.sampling import Sampler

    if not Path(bundle).is_dir():
        raise ValueError(f"{bundle!r} is no folder; give a bundle (`edgelab compress MODEL --out OUT` makes one, also of a hub name)")
    Sampler(temperature, top_p, seed)  # says what is wrong before anything is opened
    if prompt == "":
        raise ValueError("the prompt is empty: give at least one character")
    local_only(bundle)
    tokenizer = tokenizer_of(bundle)
    if tokenizer is None:
        raise ValueError(f"{bundle} has no tokenizer: a prompt in words cannot be read; Runtime.open takes ids")
    monitor = Monitor()
    served = None if metrics is None else monitor.serve(metrics)  # before any work: the port may be taken
    try:
        began = time.perf_counter()
        settings = {"activations": "float32", "kv": "float32"} if exact else {}
        cores = usable_cores()
        runtime = Runtime.open(bundle, threads=min(threads or cores, cores), context=context or _context(Path(bundle)), **settings)
        if experts:
            runtime.top_k = experts
        opened_s = time.perf_counter() - began
        if prompt is None and sys.stdin is not None and sys.stdin.isatty():
            err_console.print("Ask, line by line; /clear forgets what was said, /bye ends (so does Ctrl-D).", markup=False, style="dim")
        engine = Governed(runtime, Governor(PHONE)) if govern else runtime
        if served is not None:
            err_console.print(f"metrics: {served.url}", markup=False)
        said: list[dict[str, str]] = []
        last: list[float] = []  # seconds of the last answer's tokens
        for message in _messages(prompt):
            if prompt is None and message.strip() in ("/bye", "/clear"):
                if message.strip() == "/bye":
                    break
                said = []
                continue
            try:
                ids = _ids(tokenizer, said if remember else [], message, raw, runtime.context, max_new)
                stream = engine.stream(ids, max_new=max_new, temperature=temperature, top_p=top_p, seed=seed)
                answer = ""
                for piece in pieces(tokenizer, _watched(stream, runtime, monitor, len(ids), last)):
                    answer += piece
                    print(piece, end="", flush=True)
                print(flush=True)
                if len(ids) + max_new > runtime.context == runtime.lengths[0]:
                    err_console.print(f"The context of {runtime.context} positions is full: the answer was cut.", markup=False)
            except ValueError as error:
                if prompt is not None:
                    raise
                err_console.print(f"Error: {error}", markup=False, style="bold red", soft_wrap=True)  # the next line may be better
                continue
            said += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
            if govern:
                err_console.print(f"{engine.decision.setting}: {engine.decision.reason}", markup=False)
    finally:
        if served is not None:
            served.close()
    if stats:
        rows = [{"what": "opened in", "value": f"{opened_s:.2f} s"}]
        if last:
            first, rest = last[0], last[1:]
            told = (
                f"{len(last)} tokens"
                + (f", {len(rest) / sum(rest):,.0f} tokens/s" if rest else "")
                + f", the first after {1e3 * first:,.1f} ms"
            )
            rows.append({"what": "last answer", "value": told})
        print_table([*rows, *_two(monitor.summary())], "Measured")
        out_console.print(repr(runtime), markup=False)
        out_console.print(repr(runtime.plan), markup=False)


def _watched(tokens, runtime, monitor, prompt_tokens: int, seconds: list[float]) -> Iterator[int]:
    """The tokens as they pass, observed with their times (kept in `seconds`) and probabilities."""
    seconds.clear()
    confidences, at = [], time.perf_counter()
    try:
        for token in tokens:
            seconds.append(time.perf_counter() - at)
            confidences.append(runtime.confidence)
            yield token
            at = time.perf_counter()  # what is done with a token is not the model's time
    finally:
        if seconds:
            monitor.observe(seconds, confidences, prompt_tokens=prompt_tokens)


def _two(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of any two columns under the names of ours."""
    return [dict(zip(("what", "value"), row.values(), strict=False)) for row in rows]


def pieces(tokenizer, tokens) -> Iterator[str]:
    """The text of tokens as it grows, in pieces that are whole characters.

    A tokenizer may write a token differently at the beginning of a text (without its space, say), so new tokens are decoded behind some old
    ones, and what these alone give is cut off.
    """
    held: list[int] = []  # old tokens, then those not shown yet
    shown = 0  # how many are old
    for token in tokens:
        held.append(token)
        before, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (held[:shown], held))
        if not text.endswith("\ufffd") and len(text) > len(before):  # else the first bytes of a character, or nothing to see
            yield text[len(before) :]
            held, shown = held[shown:], len(held) - shown
    before, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (held[:shown], held))
    if text[len(before) :]:
        yield text[len(before) :]


def _messages(prompt: str | None) -> Iterator[str]:
    if prompt not in (None, "-"):
        yield prompt
        return
    if sys.stdin is None:  # closed by the caller
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if prompt == "-":
        yield sys.stdin.read()
        return
    while True:
        if sys.stdin.isatty():
            err_console.print("> ", end="", markup=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _ids(tokenizer, said: list[dict[str, str]], message: str, raw: bool, context: int, max_new: int) -> list[int]:
    """Tokens of the conversation with its new message; the oldest exchanges are left out where it would not fit with an answer."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(message)["input_ids"]
    while True:
        every = [*said, {"role": "user", "content": message}]
        found = tokenizer.apply_chat_template(every, add_generation_prompt=True, tokenize=True)
        ids = list(found["input_ids"] if hasattr(found, "keys") else found)
        if not said or len(ids) + min(max_new, context // 4) <= context:
            return ids
        said = said[2:]


def _context(folder: Path) -> int:
    most = json.loads((folder / "config.json").read_text()).get("max_position_embeddings") or 4096
    return min(most, 4096)
