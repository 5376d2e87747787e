"""The corpus: four domains of text, made on the reader's own machine, never downloaded.

    prose       CPython's documentation topics (`pydoc_data.topics`) and the docstrings of its standard library
    code        the sources of that library, one top-level definition a document, docstrings taken out
    assistant   a spoken-style command and the JSON call it means (generated; scored by exact match)
    arithmetic  sums and differences of two-digit numbers (generated; scored by exact match)

No third-party text lies in the repository: prose and code are read from the running interpreter, so another Python
patch release gives a slightly different text. `fingerprint` says which text a figure was measured on.

Splits. A document goes to train, calibration or test by the SHA-256 of its *identity*: the qualified name
(`code:json.decoder:JSONDecoder`) for prose and code, the text itself for what is generated. Hashing the name instead
of the text keeps a document in its split when a patch release changes one of its lines, so that a model trained on
3.11.7 is not tested on its own training text under 3.11.9. Texts that occur twice are kept once, before the split.

Arithmetic answers are written least significant digit first (`37+45=28` means 82): the order in which carries are
computed, and the one small models learn (Lee et al. 2023, arXiv 2307.03381, section 3).
"""

import ast
import hashlib
import json
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

DOMAINS = ("prose", "code", "assistant", "arithmetic")
SPLITS = ("train", "calibration", "test")
SCORED = ("assistant", "arithmetic")  # domains with a prompt and an answer

USER, CALL, END = "<|user|>", "<|call|>", "<|end|>"

# Left out of prose and code: tests and demos (some distributions strip them), generated tables, third-party packages.
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_SKIP |= {"pydoc_data", "encodings", "__pycache__", "lib-dynload", "config"}
_MAX_CHARS = 2400  # a document longer than this is cut at line ends; its pieces stay in one split
_MIN_CHARS = 120


def split_of(identity: str) -> str:
    """The split of the document called `identity`: 88 % train, 4 % calibration, 8 % test, by SHA-256.

    >>> split_of("code:json.decoder:JSONDecoder") == split_of("code:json.decoder:JSONDecoder")
    True
    """
    bucket = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 88 else "calibration" if bucket < 92 else "test"


# --------------------------------------------------------------------------------------------- prose and code


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    kept = (p for p in files if not any(part in _SKIP or part.startswith("config-") for part in p.parts))
    return [root / p for p in sorted(kept, key=lambda p: p.parts)]


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most `_MAX_CHARS` characters, cut at line ends (a single longer line is dropped)."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if len(line) > _MAX_CHARS:
            continue
        if size + len(line) > _MAX_CHARS:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)


def _docstring_node(node: ast.AST) -> ast.Expr | None:
    body = getattr(node, "body", None)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            return first
    return None


def _read_module(path: Path, root: Path) -> Iterator[tuple[str, str, str]]:
    """(domain, identity, text) of one source file: per top-level definition its docstrings and its code without them.

    Nothing for a file that is not UTF-8 Python of this interpreter's grammar.
    """
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    lines = source.splitlines(keepends=True)
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def docstrings(node: ast.AST, name: str) -> Iterator[str]:
        """The docstrings at and below `node`, each below its qualified name; takes them out of `lines`."""
        doc = _docstring_node(node)
        if doc is not None:
            yield f"{name}\n{ast.get_docstring(node)}\n"
            lines[doc.lineno - 1 : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
            if len(node.body) == 1 and not isinstance(node, ast.Module):  # keep a body, so that code still reads as code
                lines[doc.lineno - 1] = " " * doc.col_offset + "...\n"
        for child in ast.iter_child_nodes(node):
            if isinstance(child, definitions) and not isinstance(node, ast.Module):
                yield from docstrings(child, f"{name}.{child.name}")

    head = []
    prose = list(docstrings(tree, module))
    yield "prose", f"prose:{module}", "\n".join(prose)
    for node in tree.body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        if isinstance(node, definitions):
            yield "prose", f"prose:{module}.{node.name}", "\n".join(docstrings(node, f"{module}.{node.name}"))
            yield "code", f"code:{module}.{node.name}", "".join(lines[start : node.end_lineno])
        else:
            head.append("".join(lines[start : node.end_lineno]))
    yield "code", f"code:{module}", "".join(head)


# Run in a fresh interpreter: IPython puts `display` into `builtins`, its kernel another `input`, a prompt `_`.
_READ_BUILTINS = """
import builtins, json
found = {}
for name, value in sorted(vars(builtins).items()):
    members = sorted(vars(value).items()) if isinstance(value, type) else []
    docs = [(name, value), *((f"{name}.{k}", v) for k, v in members if not k.startswith("_"))]
    told = ((n, getattr(v, "__doc__", None)) for n, v in docs)
    found[name] = "\\n".join(f"{n}\\n{d}\\n" for n, d in told if isinstance(d, str))
print(json.dumps(found))
"""


def _built_ins() -> dict[str, str]:
    """{name: the docstrings of it and of its members} of `builtins` as Python itself starts with it."""
    out = subprocess.run([sys.executable, "-I", "-c", _READ_BUILTINS], capture_output=True, text=True, check=True, encoding="utf-8")
    return json.loads(out.stdout)


def _library_documents() -> Iterator[tuple[str, str, str]]:
    """(domain, identity, text) of everything readable in this interpreter's standard library, in a fixed order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield "prose", f"prose:topic:{name}", topics[name]
    for name, text in _built_ins().items():
        yield "prose", f"prose:builtins.{name}", text
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _stdlib_files():
        yield from _read_module(path, root)


# ------------------------------------------------------------------------------------------------- assistant

# ruff: noqa: SIM905 (lists of words read better as words)
_HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_UNITS += "seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ROOMS = "kitchen,bedroom,hall,office,garage,bathroom,living room,attic,cellar,garden".split(",")
_PEOPLE = "anna,ben,carla,david,emma,felix,grace,hugo,ida,jonas,kim,lena,mia,noah,olga,paul,rosa,sam,tina,victor".split(",")
_CITIES = "berlin,madrid,oslo,paris,rome,vienna,lisbon,prague,dublin,warsaw,athens,zurich,helsinki,bergen".split(",")
_DAYS = "monday,tuesday,wednesday,thursday,friday,saturday,sunday".split(",")
_ITEMS = "milk,bread,apples,rice,coffee,eggs,butter,soap,batteries,tomatoes,onions,paper,tea,sugar,cheese".split(",")
_APPS = "camera,calendar,maps,notes,mail,calculator,gallery,clock,radio,settings".split(",")
_MUSIC = "jazz,rock,piano music,folk songs,the news,quiet songs,film music,the blues,techno,opera".split(",")
_COLOURS = "red,green,blue,white,warm,purple,orange".split(",")
_ERRANDS = "water the plants,feed the cat,call the bank,take out the rubbish,pay the rent,buy stamps,book a table".split(",")
_NEWS = "i am late,dinner is ready,the train is on time,see you soon,i have the keys,the meeting moved,it is raining".split(",")


def spoken(n: int) -> str:
    """The number 0 <= n < 100 in words.

    >>> spoken(7), spoken(40), spoken(85)
    ('seven', 'forty', 'eighty five')
    """
    if n < 20:
        return _UNITS[n]
    tens, unit = _TENS[n // 10 - 2], n % 10
    return f"{tens} {_UNITS[unit]}" if unit else tens


def _time(r: random.Random) -> tuple[str, str]:
    """A time of day as it is said, and as HH:MM. Morning unless 'in the evening' (which adds twelve hours)."""
    hour, minute = r.randrange(1, 12), r.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55))
    evening = r.random() < 0.4
    style = r.randrange(3)
    if minute == 0:
        said = f"{_HOURS[hour - 1]} o'clock"
    elif style == 0 and minute == 30:
        said = f"half past {_HOURS[hour - 1]}"
    elif style == 0 and minute in (15, 45):
        said = f"quarter past {_HOURS[hour - 1]}" if minute == 15 else f"quarter to {_HOURS[hour % 12]}"
    elif style == 1 and minute > 30:
        said = f"{spoken(60 - minute)} to {_HOURS[hour % 12]}"
    elif style == 1 and minute < 30:
        said = f"{spoken(minute)} past {_HOURS[hour - 1]}"
    else:
        said = f"{_HOURS[hour - 1]} {'oh ' if minute < 10 else ''}{spoken(minute)}"
    return said + (" in the evening" if evening else ""), f"{hour + 12 * evening:02d}:{minute:02d}"


def _duration(r: random.Random) -> tuple[str, int]:
    """A duration as it is said, and in seconds."""
    kind, n = r.randrange(4), r.randrange(2, 60)
    if kind == 0:
        return f"{spoken(n)} seconds", n
    if kind == 1:
        return f"{spoken(n)} minutes", 60 * n
    if kind == 2:
        return r.choice((("an hour", 3600), ("half an hour", 1800), ("one and a half minutes", 90), ("a minute", 60)))
    m, s = r.randrange(2, 10), r.choice((10, 15, 20, 30, 40, 45))
    return f"{spoken(m)} minutes and {spoken(s)} seconds", 60 * m + s


def _command(r: random.Random) -> tuple[str, dict]:
    """One spoken-style command and the call it means, drawn from a few hundred thousand."""
    pick = r.choice
    match r.randrange(14):
        case 0:
            said, at = _time(r)
            return pick(("wake me at {}", "set an alarm for {}", "i need to get up at {}")).format(said), {"call": "alarm", "at": at}
        case 1:
            said, seconds = _duration(r)
            text = pick(("set a timer for {}", "start a {} timer", "tell me when {} have passed", "count down {}")).format(said)
            return text, {"call": "timer", "seconds": seconds}
        case 2:
            who, what = pick(_PEOPLE), pick(_NEWS)
            text = pick(("tell {0} that {1}", "send {0} a message saying {1}", "text {0} {1}")).format(who, what)
            return text, {"call": "message", "to": who, "text": what}
        case 3:
            what, volume = pick(_MUSIC), r.randrange(1, 100)
            if r.random() < 0.5:
                return pick(("play {}", "put on {}", "i want to hear {}")).format(what), {"call": "play", "what": what}
            return f"play {what} at {spoken(volume)} percent volume", {"call": "play", "what": what, "volume": volume}
        case 4:
            city, day = pick(_CITIES), pick(_DAYS)
            text = pick(("will it rain in {0} on {1}", "how is the weather in {0} on {1}", "{1} weather for {0}")).format(city, day)
            return text, {"call": "weather", "city": city, "day": day}
        case 5:
            start, goal = r.sample(_CITIES, 2)
            text = pick(("take me from {0} to {1}", "how do i get to {1} from {0}", "route to {1} starting in {0}")).format(start, goal)
            return text, {"call": "route", "from": start, "to": goal}
        case 6:
            room, on = pick(_ROOMS), r.random() < 0.5
            text = pick(("turn {1} the {0} light", "switch {1} the light in the {0}", "{0} light {1} please"))
            return text.format(room, "on" if on else "off"), {"call": "light", "room": room, "on": on}
        case 7:
            room, level, colour = pick(_ROOMS), r.randrange(1, 100), pick(_COLOURS)
            text = pick(("dim the {0} light to {1} percent and make it {2}", "make the {0} {2} at {1} percent"))
            return text.format(room, spoken(level), colour), {"call": "light", "room": room, "level": level, "colour": colour}
        case 8:
            who, later = pick(_PEOPLE), r.random() < 0.5
            if not later:
                return pick(("call {}", "ring {}", "phone {} now")).format(who), {"call": "phone", "who": who}
            said, at = _time(r)
            return f"call {who} at {said}", {"call": "phone", "who": who, "at": at}
        case 9:
            what, (said, at), day = pick(_ERRANDS), _time(r), pick(_DAYS)
            text = pick(("remind me to {0} on {1} at {2}", "on {1} at {2} i have to {0}", "don't let me forget to {0} {1} at {2}"))
            return text.format(what, day, said), {"call": "remind", "what": what, "day": day, "at": at}
        case 10:
            items, n = r.sample(_ITEMS, 2), r.randrange(2, 20)
            if r.random() < 0.5:
                return f"put {items[0]} and {items[1]} on the list", {"call": "list", "add": items}
            return f"add {spoken(n)} {items[0]} to my list", {"call": "list", "add": [items[0]], "count": n}
        case 11:
            app = pick(_APPS)
            return pick(("open the {}", "start {}", "show me the {} app")).format(app), {"call": "open", "app": app}
        case 12:
            room, degrees = pick(_ROOMS), r.randrange(5, 30)
            text = pick(("heat the {0} to {1} degrees", "set the {0} to {1} degrees", "i want {1} degrees in the {0}"))
            return text.format(room, spoken(degrees)), {"call": "heat", "room": room, "degrees": degrees}
        case _:
            who, day, (said, at) = pick(_PEOPLE), pick(_DAYS), _time(r)
            text = pick(("meet {0} on {1} at {2}", "book {2} on {1} with {0}", "plan a meeting with {0} {1} at {2}"))
            return text.format(who, day, said), {"call": "meeting", "with": who, "day": day, "at": at}


def _assistant_documents(n: int, seed: int = 0) -> Iterator[tuple[str, str, str, str]]:
    r = random.Random(seed)
    for _ in range(n):
        said, call = _command(r)
        yield "assistant", said, f"{USER}{said}{CALL}", json.dumps(call)


def _arithmetic_documents() -> Iterator[tuple[str, str, str, str]]:
    for a in range(10, 100):
        for b in range(10, 100):
            yield "arithmetic", f"{a}+{b}", f"{a}+{b}=", str(a + b)[::-1]
            if a >= b:
                yield "arithmetic", f"{a}-{b}", f"{a}-{b}=", str(a - b)[::-1]


# ---------------------------------------------------------------------------------------------------- corpus


def _records(domains: Iterable[str], assistant: int) -> Iterator[dict]:
    """Every document once, in a fixed order, as {domain, id, split, text, prompt, answer}."""
    domains, seen = set(domains), set()
    if domains & {"prose", "code"}:
        for domain, identity, text in _library_documents():
            if domain not in domains:
                continue
            split = split_of(identity)
            for i, piece in enumerate(_pieces(text.strip() + "\n")):
                key = hashlib.sha256(" ".join(piece.split()).encode()).digest()
                if len(piece) < _MIN_CHARS or key in seen:
                    continue
                seen.add(key)
                yield {"domain": domain, "id": f"{identity}#{i}", "split": split, "text": piece, "prompt": "", "answer": ""}
    for domain, documents in (("assistant", _assistant_documents(assistant)), ("arithmetic", _arithmetic_documents())):
        if domain not in domains:
            continue
        for _, said, prompt, answer in documents:
            if said not in seen:
                seen.add(said)
                row = {"domain": domain, "id": f"{domain}:{said}", "split": split_of(f"{domain}:{said}")}
                yield row | {"text": prompt + answer, "prompt": prompt, "answer": answer}


def corpus(domains: Iterable[str] = DOMAINS, *, assistant: int = 60_000):
    """The corpus as a `datasets.DatasetDict` of train, calibration and test.

    Columns: `domain`, `id`, `text`, and for the scored domains `prompt` and `answer` (text = prompt + answer;
    both empty for prose and code). `assistant` is the number of commands drawn before duplicates are removed.

    Raises ValueError for an unknown domain.
    """
    import datasets

    domains = tuple(domains)
    for domain in domains:
        if domain not in DOMAINS:
            raise ValueError(f"domain {domain!r} is not one of {', '.join(DOMAINS)}")
    columns: dict[str, dict[str, list]] = {s: {k: [] for k in ("domain", "id", "text", "prompt", "answer")} for s in SPLITS}
    for row in _records(domains, assistant):
        target = columns[row.pop("split")]
        for k, v in row.items():
            target[k].append(v)
    return datasets.DatasetDict({s: datasets.Dataset.from_dict(columns[s]) for s in SPLITS})


def fingerprint(data) -> str:
    """Twelve hex digits that change whenever a document, its order or its split does: print them beside each figure.

    `data` is a Dataset or DatasetDict with a `text` column.
    """
    h = hashlib.sha256()
    parts = data.items() if hasattr(data, "items") else [("", data)]
    for name, part in sorted(parts):
        h.update(f"{name}:{len(part)}\n".encode())
        for text in part["text"]:
            h.update(hashlib.sha256(text.encode()).digest())
    return h.hexdigest()[:12]


# ------------------------------------------------------------------------------------------ text of your own

_TEXT, _JSON, _PARQUET = (".txt", ".md"), (".jsonl", ".json"), (".parquet",)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` (blank lines part them); one shorter than `_MIN_CHARS` is joined to the next."""
    block = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if paragraph.strip():
            block = f"{block}\n\n{paragraph.strip()}" if block else paragraph.strip()
        if len(block) >= _MIN_CHARS:
            yield block + "\n"
            block = ""
    if block:
        yield block + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it, as in: iconv -f latin1 -t utf-8") from None


def _read_files(path: Path):
    """A Dataset of a file, or of all files below a folder; its column `_file` names the document where a file is one."""
    import datasets

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    known = [f for f in files if f.suffix.lower() in _TEXT + _JSON + _PARQUET]
    if not known:
        wanted = ", ".join(_TEXT + _JSON + _PARQUET)
        raise ValueError(f"{path} {'is not' if path.is_file() else 'holds no'} file that can be read here ({wanted})")
    parts = []
    for kinds, read in ((_JSON, datasets.Dataset.from_json), (_PARQUET, datasets.Dataset.from_parquet)):
        if some := [str(f) for f in known if f.suffix.lower() in kinds]:
            parts.append(read(some, keep_in_memory=True))
    texts = [f for f in known if f.suffix.lower() in _TEXT]
    if texts and path.is_file():
        parts.append(datasets.Dataset.from_dict({"text": list(_paragraphs(_read_text(path)))}))
    elif texts:
        names = [f.relative_to(path).as_posix() for f in texts]
        parts.append(datasets.Dataset.from_dict({"text": [_read_text(f) for f in texts], "_file": names}))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _one_dataset(source, config: str | None):
    """Any source as one `datasets.Dataset`, its own splits put together."""
    import datasets

    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists():
            source = _read_files(path)
        elif (
            isinstance(source, Path) or path.is_absolute() or str(source).startswith(".") or path.suffix.lower() in _TEXT + _JSON + _PARQUET
        ):
            raise FileNotFoundError(
                f"source={str(source)!r} does not exist; give a text, jsonl or parquet file, a folder of them, or a hub name"
            )
        else:
            try:
                source = datasets.load_dataset(source, config)
            except (OSError, datasets.exceptions.DatasetNotFoundError) as e:
                raise FileNotFoundError(f"source={source!r} is neither a local path nor a data set that the hub gave: {e}") from e
    if isinstance(source, datasets.DatasetDict):
        source = datasets.concatenate_datasets(list(source.values()))
    if not isinstance(source, datasets.Dataset):
        raise TypeError(f"source is a {type(source).__name__}; give a Dataset, a DatasetDict, a path or a hub name")
    return source


def from_source(
    source,
    *,
    text: str = "text",
    prompt: str | None = None,
    answer: str | None = None,
    domain: str | None = None,
    id: str | None = None,
    label: str = "text",
    config: str | None = None,
):
    """Text of your own in the corpus' place: a `datasets.DatasetDict` of train, calibration and test with its columns.

    `source` is a `datasets` Dataset or DatasetDict, a hub name (with `config`, its configuration), a .txt/.md, .jsonl/.json
    or .parquet file, or a folder of such files. A single text file has a document per paragraph, a folder of text files
    a document per file; long ones are cut at line ends as in the corpus, and their pieces stay in one split.

    `text`, `prompt`, `answer`, `domain` and `id` name columns. Where prompt and answer are given, text = prompt + answer
    and the answer is what evaluation scores; without `domain` every document's domain is `label`. Columns of the corpus'
    own names are taken without being named. The split is `split_of` of the document's id (what is before a '#', so that
    pieces x#0 and x#1 stay together), or of its text where there is no id: the source's own splits are put together
    first. Texts that occur twice are kept once.

    >>> import datasets
    >>> mine = datasets.Dataset.from_dict({"body": [f"letter number {i}" for i in range(50)]})
    >>> {split: len(part) for split, part in from_source(mine, text="body", label="letters").items()}
    {'train': 42, 'calibration': 1, 'test': 7}

    Raises FileNotFoundError for a source that does not exist, ValueError for a missing column or no documents.
    """
    import datasets

    rows = _one_dataset(source, config)
    named = {"text": text, "prompt": prompt, "answer": answer, "domain": domain, "id": id}
    for mine, column in named.items():
        if column is None and mine in rows.column_names:
            named[mine] = mine
    if (prompt is None) != (answer is None):
        raise ValueError(f"prompt={prompt!r} and answer={answer!r}: name both columns or neither")
    if not (named["prompt"] and named["answer"]):  # half a pair, as in a question without its answer, is no pair
        named["prompt"] = named["answer"] = None
    if named["id"] is None and "_file" in rows.column_names:
        named["id"] = "_file"
    if named["prompt"] and text not in rows.column_names:
        named["text"] = None
    for mine, column in named.items():
        if column is not None and column not in rows.column_names:
            raise ValueError(f"{mine}={column!r} is not a column of the source; it has {', '.join(rows.column_names)}")
    columns = {mine: rows[column][:] if column else None for mine, column in named.items()}

    def cell(name: str, i: int) -> str:
        value = columns[name][i] if columns[name] is not None else None
        return "" if value is None else str(value)

    seen: set[bytes] = set()
    out: dict[str, dict[str, list]] = {s: {k: [] for k in ("domain", "id", "text", "prompt", "answer")} for s in SPLITS}
    for i in range(len(rows)):
        asked, said = cell("prompt", i), cell("answer", i)
        whole = asked + said if said else cell("text", i)
        kind = cell("domain", i) or label
        name = cell("id", i)
        identity = name.rsplit("#", 1)[0] if name else f"{kind}:{whole}"
        pieces = [whole] if said else list(_pieces_of_any(whole))
        for part, piece in enumerate(pieces):
            key = hashlib.sha256(" ".join(piece.split()).encode()).digest()
            if not piece.strip() or key in seen:
                continue
            seen.add(key)
            short = name or f"{kind}:{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
            called = short if len(pieces) == 1 else f"{short}#{part}"
            target = out[split_of(identity)]
            record = {"domain": kind, "id": called, "text": piece, "prompt": asked if said else "", "answer": said}
            for k, v in record.items():
                target[k].append(v)
    if not seen:
        raise ValueError(f"the source holds no documents: {len(rows)} rows, all of them empty in {text!r}")
    return datasets.DatasetDict({s: datasets.Dataset.from_dict(out[s]) for s in SPLITS})


def _pieces_of_any(text: str) -> Iterator[str]:
    """`_pieces`, but a line longer than `_MAX_CHARS` is cut instead of dropped: other people's text wraps as it likes."""
    lines = text.splitlines(keepends=True)
    yield from (
        _pieces("".join(lines))
        if all(len(line) <= _MAX_CHARS for line in lines)
        else (text[i : i + _MAX_CHARS] for i in range(0, len(text), _MAX_CHARS))
    )


# ------------------------------------------------------------------------------------------------- calibration text


def calibration_batches(tokenizer, dataset, *, tokens: int = 65536, context: int = 512, batch: int = 8, seed: int = 0) -> list:
    """Token ids int64 [<= batch, context] to calibrate on: about `tokens` of them, without padding, as a list of tensors.

    `dataset` is one split, as in corpus()["calibration"], with the columns `text` and, where present, `domain` and `prompt`.
    Documents are taken in an order that `seed` fixes. As in training, each row begins with the beginning token, and documents
    follow each other with the end token (and the next one's beginning token, where that is another) between them. The
    domains take turns, a row of each, so that they weigh alike for as long as their text lasts; what is left of each when no
    whole row is, is joined at last. No document is read twice: a small data set gives fewer tokens than asked for.

    Raises ValueError for a data set with less text than one row.
    """
    import torch

    from edgelab.evaluate import _borders  # evaluate imports this module

    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or "text" not in columns:
        raise ValueError(f"dataset is a {type(dataset).__name__} with columns {columns}; give one split with a text column")
    if context < 2 or tokens < context or batch < 1:
        raise ValueError(f"tokens={tokens}, context={context}, batch={batch}: needed are tokens >= context >= 2 and batch >= 1")
    begin, end = _borders(tokenizer)
    between = [end] if begin == end else [end, begin]
    texts = ["" if t is None else str(t) for t in dataset["text"]]
    domains = [str(d) for d in dataset["domain"]] if "domain" in columns else ["text"] * len(texts)
    prompts = ["" if p is None else str(p) for p in dataset["prompt"]] if "prompt" in columns else [""] * len(texts)
    left: dict[str, list[int]] = {}

    def cut(stream: list[int]) -> Iterator[list[int]]:
        """Rows off the front of `stream`, for as long as they are whole; what is left stays in it."""
        while True:
            while stream and stream[0] in (begin, end):  # the row before ended with its document
                del stream[0]
            if len(stream) < context - 1:
                return
            yield [begin, *stream[: context - 1]]
            del stream[: context - 1]

    def rows_of(domain: str) -> Iterator[list[int]]:
        """Whole rows of one domain; what remains then lies in `left`."""
        order = [i for i, d in enumerate(domains) if d == domain and texts[i]]
        random.Random(f"{seed}:{domain}").shuffle(order)
        stream: list[int] = []
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            head = [prompts[i] if texts[i].startswith(prompts[i]) else "" for i in chosen]
            tail = [texts[i][len(h) :] for i, h in zip(chosen, head, strict=True)]
            # in two parts, as in training: where the prompt ends must not depend on how the tokenizer joins across
            heads, tails = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (head, tail))
            for h, t in zip(heads, tails, strict=True):
                stream += [*h, *t, *between]
            yield from cut(stream)
        left[domain] = stream

    wanted, rows = tokens // context, []
    turns = [rows_of(domain) for domain in dict.fromkeys(domains)]
    while turns and len(rows) < wanted:
        for turn in list(turns):
            row = next(turn, None)
            if row is None:
                turns.remove(turn)
            elif len(rows) < wanted:
                rows.append(row)
    rest = [i for stream in left.values() for i in stream]
    rows += islice(cut(rest), wanted - len(rows))
    if not rows:
        raise ValueError(
            f"the data set holds {len(rest) + 1} tokens in {len(texts)} documents, less than one row of context={context}; "
            "use a shorter context or more text"
        )
    return [torch.tensor(rows[i : i + batch], dtype=torch.int64) for i in range(0, len(rows), batch)]
