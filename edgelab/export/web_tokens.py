"""The page's tokenizer: a fast tokenizer of transformers as data for `tokenizer.js`, and what the page offers to ask."""

import json
import re

from edgelab.export import ExportError

FORMAT = 1


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel(use_regex=True) cuts by
_PIECE = re.compile(
    r"(?P<property>\\[pP]\{\^?[A-Z][a-z]?\})|(?P<space>\\[sSd])|(?P<control>\\[rnt])|(?P<escape>\\[\\^$.*+?()\[\]{}|/\-])|(?P<open>\[\^?)|(?P<close>\])"
    r"|(?P<caseless>\(\?i:[^()\[\]{}\\*+?.^$]*\))|(?P<group>\(\?[:=!]|\((?!\?))|(?P<end>\))|(?P<repeat>[*+?]\??(?![*+?])|\{\d+(?:,\d*)?\}(?![*+?]))"
    r"|(?P<other>[|.]|[^\\\[\](){}*+?.^$|])",
    re.DOTALL,
)
_SAME_FOLDED = {"s": "ſ", "k": "\u212a"}  # beyond the other case, what Unicode folds to these letters


def browser_pattern(pattern: str) -> str:
    r"""A pattern of the `tokenizers` library (Oniguruma) as JavaScript's RegExp writes it, with the flag u.

    The two mean different things by `\s`: JavaScript adds U+FEFF and leaves out U+0085. Raises ExportError for what is not
    known to mean the same in both.

    >>> print(browser_pattern(r" ?[^\s\p{L}]+|(?i:'s)"))
     ?[^\p{White_Space}\p{L}]+|(?:'[sSſ])
    """
    at, out, inside = 0, [], False  # inside: of a class [...]
    while at < len(pattern):
        found = _PIECE.match(pattern, at)
        if found is None or (inside and (found.lastgroup == "open" or pattern.startswith("&&", at))):  # Oniguruma's sets of sets
            raise ExportError(f"the tokenizer cuts text by {pattern!r}; what stands at {pattern[at : at + 8]!r} is not known to JavaScript")
        text, at = found.group(), found.end()
        inside = found.lastgroup == "open" or (inside and found.lastgroup != "close")
        match found.lastgroup:
            case "space":
                out.append({r"\s": r"\p{White_Space}", r"\S": r"\P{White_Space}", r"\d": r"\p{Nd}"}[text])
            case "property":
                negated = (text[1] == "P") != ("^" in text)
                out.append(f"\\{'P' if negated else 'p'}{{{text[3:-1].lstrip('^')}}}")
            case "caseless":
                letters = (
                    f"[{c.lower()}{c.upper()}{_SAME_FOLDED.get(c.lower(), '')}]" if c.isascii() and c.isalpha() else c for c in text[4:-1]
                )
                out.append(f"(?:{''.join(letters)})")
            case _:
                out.append(text)
    return "".join(out)


def tokenizer_data(tokenizer) -> dict:
    """The tokenizer as tokenizer.js reads it (its fields are described there).

    Raises ExportError for anything but byte-level BPE with steps and patterns that JavaScript computes alike.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{type(tokenizer).__name__} is no fast tokenizer; the page reads byte-level BPE of the `tokenizers` library only"
        )
    spec = json.loads(backend.to_str())
    model = spec["model"]

    def refuse(what: str):
        return ExportError(f"the tokenizer {what}; the page reads byte-level BPE only, as GPT-2, Qwen, Llama 3 and edgelab's own use it")

    if model["type"] != "BPE":
        raise refuse(f"is {model['type']}")
    odd = {
        k: model.get(k)
        for k in ("unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(k)
    }
    if odd:
        raise refuse(f"has {odd}")
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise refuse(f"normalizes text by {normalizer['type']}")
    pre = spec.get("pre_tokenizer") or {"type": "nothing"}
    steps, byte_level = [], False
    for step in pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        match step["type"]:
            case "Digits" if step["individual_digits"]:
                steps.append({"digits": True})
            case "Split" if step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
                steps.append({"pattern": browser_pattern(step["pattern"]["Regex"])})
            case "ByteLevel" if not step["add_prefix_space"]:
                steps += [{"pattern": browser_pattern(_GPT2)}] if step["use_regex"] else []
                byte_level = True
            case other:
                raise refuse(f"cuts text by {other} with {json.dumps(step)}")
    if not byte_level or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise refuse("is not byte-level")
    vocabulary: list[str | None] = [None] * (1 + max([*model["vocab"].values(), *(t["id"] for t in spec["added_tokens"])]))
    for token, i in model["vocab"].items():
        vocabulary[i] = token
    lacking = [b for b in _byte_alphabet() if b not in model["vocab"]]
    if lacking:
        raise refuse(f"has no token for {len(lacking)} of the 256 bytes")
    for t in spec["added_tokens"]:
        if t["single_word"] or t["lstrip"] or t["rstrip"] or (t["normalized"] and normalizer):
            raise refuse(f"finds {t['content']!r} in a way of its own (single_word, lstrip, rstrip or normalized)")
        vocabulary[t["id"]] = t["content"]
    plain, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if dressed[len(dressed) - len(plain) :] != plain:
        raise refuse("puts tokens behind a text, which would end it before its answer")
    return {
        "format": FORMAT,
        "vocab": vocabulary,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "whole": bool(model.get("ignore_merges")),
        "steps": steps,
        "normalize": normalizer and "NFC",
        "added": {t["content"]: t["id"] for t in spec["added_tokens"]},
        "special": sorted(t["id"] for t in spec["added_tokens"] if t["special"]),
        "begin": dressed[: len(dressed) - len(plain)],
        "chat": _chat(tokenizer),
    }


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _chat(tokenizer) -> dict | None:
    """What the chat template puts around one message of the user: {before, after, trim}, found by rendering it; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(message: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)

    mark = "q7d1a5"
    before, found, after = render(mark).partition(mark)
    trim = render(f"  {mark}\n") == before + mark + after
    chat = {"before": before, "after": after, "trim": trim}
    for message in ("", "two words", " spaces \n and lines\n", "{% if x %}", "ü 🙂"):
        if not found or render(message) != before + (message.strip() if trim else message) + after:
            raise ExportError(
                f"the chat template does more than put text before and after a message ({message!r} shows it); the page can't do that"
            )
    return chat


def tasks_of(tokens: dict) -> list[dict]:
    """What the page offers to ask. A model of edgelab's corpus gets its commands and sums; others a chat, or text to go on with.

    The commands are of the corpus' test split, and edge-moe (in floats, int4-g32 and as edge-phone) answers them and the sums right.

    A task: {id, label, chat, placeholder, examples, limit}; `chat` puts the chat template around the text. Further: `temperature`;
    `pattern` (the groups of a JavaScript RegExp, joined, are what is sent) with `ending` behind and `wanted` said where it does not
    match; `reading`: "last digit first".
    """
    from edgelab.data import CALL, END, USER

    own = tokens["chat"] is not None and (tokens["chat"]["before"], tokens["chat"]["after"]) == (END + USER, CALL)
    if own:
        return [
            {
                "id": "command",
                "label": "Command",
                "chat": True,
                "placeholder": "Say a command",
                "examples": [
                    "heat the kitchen to twenty one degrees",
                    "call grace at quarter to twelve",
                    "sunday weather for oslo",
                    "text emma dinner is ready",
                    "play jazz at twenty nine percent volume",
                    "meet emma on sunday at fifteen past four",
                    "add thirteen eggs to my list",
                    "book half past six on saturday with lena",
                ],
                "limit": 96,
            },
            {
                "id": "sum",
                "label": "Sum",
                "chat": False,
                "placeholder": "37+45",
                "examples": ["37+45=", "58+67=", "81-46=", "63-28="],
                "pattern": r"\s*(\d{2})\s*([+-])\s*(\d{2})\s*=?",
                "ending": "=",
                "wanted": "A sum of two numbers from 10 to 99, such as 37+45 or 90-17.",
                "reading": "last digit first",
                "limit": 8,
            },
            {
                "id": "text",
                "label": "Free text",
                "chat": False,
                "placeholder": "Begin a text",
                "examples": ["def __init__(self, ", "Return a list of ", "Return True if ", "import os\n"],
                "limit": 160,
                "temperature": 0.7,
            },
        ]
    chat = {"id": "chat", "label": "Ask", "chat": True, "placeholder": "Ask something", "examples": [], "limit": 256, "temperature": 0.7}
    text = {"id": "text", "label": "Free text", "chat": False, "placeholder": "Begin a text", "examples": [], "limit": 160}
    return ([chat] if tokens["chat"] else []) + [text | {"temperature": 0.7}]
