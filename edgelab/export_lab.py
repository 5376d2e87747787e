"""What notebook 08 shows: the bytes of every exported file side by side, one flipped bit and who notices, the page in a frame, a control.

Nothing is looked up: maps are made of the files that lie there, damage is measured on models that were loaded from damaged files.
"""

import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch

from edgelab import byte_picture
from edgelab.byte_map import BLOCKS, KINDS, ByteMap, Segment, row_prints
from edgelab.byte_picture import BytePicture
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.export import TARGETS, ExportError, ExportResult, export, verify
from edgelab.export.gguf_file import Q4_0, blocks
from edgelab.frame import frame
from edgelab.report import Report

# ---------------------------------------------------------------------------------------------------- side by side


def places(bundle: str | Path, exports: Mapping[str, ExportResult]) -> dict[str, Path]:
    """{name: the file or folder} of a bundle and of what was exported from it; a page is its folder."""
    found = {"bundle": Path(bundle)}
    for target, result in exports.items():
        first = result.files[0]
        found[target] = first.parent if target == "web" else first
    return found


def written(ladder, model, out: str | Path, targets: Mapping[str, Mapping]) -> dict[str, ExportResult]:
    """The exports of a `ladder`; and of those that it refused the ones that can be written without being run: a runtime may be missing."""
    found = dict(ladder.exports)
    for target in ladder.refused:
        try:
            found[target] = export(model, target, Path(out) / TARGETS[target], **{**targets[target], "check": False})
        except ExportError as error:
            print(f"{target}: {error}")
    return found


def kind_rows(maps: Mapping[str, ByteMap]) -> list[dict[str, str]]:
    """A line per kind of bytes with what each file spends on it; then all of it, and what comes on top of codes and scales."""
    kinds = [kind for kind in KINDS if any(kind in m.by_kind() for m in maps.values())]
    lines = [{"kind": kind} | {name: f"{m.by_kind().get(kind, 0):,}" for name, m in maps.items()} for kind in kinds]
    lines.append({"kind": "all bytes"} | {name: f"{m.bytes:,}" for name, m in maps.items()})
    lines.append({"kind": "bits per weight"} | {name: f"{8 * m.bytes / m.weights:.3f}" for name, m in maps.items()})
    lines.append({"kind": "on top of codes and scales"} | {name: f"{overhead(m):.2%}" for name, m in maps.items()})
    but = {name: f"{overhead(m, ('vocabulary', 'program')):.2%}" for name, m in maps.items()}
    lines.append({"kind": "of that no vocabulary, no program"} | but)
    return lines


def overhead(m: ByteMap, but: Sequence[str] = ()) -> float:
    """What a file takes beyond its codes and scales (and the kinds `but`), as a share of these. Raises ValueError without codes."""
    kinds = m.by_kind()
    coded = kinds.get("codes", 0) + kinds.get("scales", 0)
    if not coded:
        raise ValueError(f"{m.path.name} holds no codes; compress the model first")
    return (m.bytes - sum(kinds.get(kind, 0) for kind in but)) / coded - 1


def code_rows(maps: Mapping[str, ByteMap]) -> list[dict[str, str]]:
    """A line per file: its rows of codes, read out of it by its map alone, and how many of them the first file has too."""
    prints = {name: row_prints(m) for name, m in maps.items()}
    first = next(iter(prints.values()))
    lines = []
    for name, found in prints.items():
        shared = sum((found & first).values())
        lines.append(
            {
                "file": name,
                "tensors of codes": str(sum(s.kind in ("codes", BLOCKS) for s in maps[name].segments)),
                "weights as codes": f"{sum(s.weights for s in maps[name].segments if s.kind in ('codes', BLOCKS)):,}",
                "rows": f"{sum(found.values()):,}",
                f"the same in {next(iter(prints))}": f"{shared:,}",
                "all the same": "yes" if found == first else "NO",
            }
        )
    return lines


# ------------------------------------------------------------------------------------------------------ one flipped bit


def flipped(source: str | Path, target: str | Path, segment: Segment, byte: int = 0, bit: int = 0) -> Path:
    """A copy of `source` (a file, or a folder) at `target` with one bit turned: bit `bit` of the byte `byte` of `segment`, of a map of it.

    Raises ValueError for a byte that is not in the segment.
    """
    if not (0 <= byte < segment.bytes and 0 <= bit < 8):
        raise ValueError(f"byte={byte}, bit={bit}: {segment.name} has bytes 0 .. {segment.bytes - 1}, and a byte bits 0 .. 7")
    source, target = Path(source), Path(target)
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    file = target / segment.file if target.is_dir() else target
    with open(file, "r+b") as f:
        f.seek(segment.offset + byte)
        old = f.read(1)[0]
        f.seek(segment.offset + byte)
        f.write(bytes([old ^ 1 << bit]))
    return target


def pick(m: ByteMap, kind: str, name: str = "") -> Segment:
    """The first segment of `kind` whose name has `name` in it. Raises LookupError."""
    for s in m.segments:
        if s.kind == kind and name in s.name:
            return s
    raise LookupError(f"{m.path.name} has no segment of kind {kind!r} with {name!r} in its name")


def damage_rows(bundle: str | Path, folder: str | Path, flips: Mapping[str, tuple[Segment, int, int]], ids: torch.Tensor) -> list[dict]:
    """What each flip (segment, byte, bit) does: a line with the divergence of the model that is loaded from the damaged copy of `bundle`
    from the undamaged one on `ids` int64 [rows, T] (nats per token), the share of tokens with the same most likely successor, and what
    `load_bundle` and `verify_bundle` say. The copies lie in `folder`."""
    from edgelab.bundle import load_bundle, verify_bundle
    from edgelab.export.checks import compared

    with torch.no_grad():
        before = load_bundle(bundle)(ids, use_cache=False).logits.flatten(0, 1)
    lines = []
    for what, (segment, byte, bit) in flips.items():
        copy = flipped(bundle, Path(folder) / "flipped", segment, byte, bit)
        line = {"bit": what, "of": segment.name, "file's byte": f"{segment.offset + byte:,}"}
        try:
            with torch.no_grad():
                after = load_bundle(copy)(ids, use_cache=False).logits.flatten(0, 1)
            found = compared([(after.numpy(), before)])
            line |= {"load_bundle": "loads it", "KLD": max(0.0, found["kld"]), "same top token": found["top1_agreement"]}
        except ValueError as error:
            line |= {"load_bundle": f"refuses: {str(error).rpartition('/')[2]}", "KLD": float("nan"), "same top token": float("nan")}
        try:
            verify_bundle(copy)
            line["verify_bundle"] = "accepts it"
        except ValueError as error:
            line["verify_bundle"] = f"refuses: {str(error).split(': ', 1)[0].rpartition('/')[2]}"
        lines.append(line)
        shutil.rmtree(copy)
    return lines


def shown_damage(lines: Sequence[Mapping]) -> list[dict[str, str]]:
    """`damage_rows` for a table."""
    forms = {"KLD": "{:.1e}", "same top token": "{:.2%}"}
    return [{k: "" if v != v else forms.get(k, "{}").format(v) for k, v in line.items()} for line in lines]


def verdict_rows(result: ExportResult, model, folder: str | Path, flips: Mapping[str, tuple[Segment, int, int]]) -> list[dict[str, str]]:
    """What `export.verify` says of copies of the exported file of `result` with one bit turned each, and of the file as it is."""
    lines = []
    for what, flip in {"none": None, **flips}.items():
        file, line = result.files[0], {"bit": what, "of": "", "file's byte": ""}
        if flip is not None:
            segment, byte, bit = flip
            file = flipped(file, Path(folder) / f"flipped{file.suffix}", segment, byte, bit)
            line |= {"of": segment.name, "file's byte": f"{segment.offset + byte:,}"}
        try:
            found = verify(replace(result, files=(file,)), model).parity
            line["verify"] = f"accepts it: 1 - cosine {1 - found['cosine']:.1e}"
        except ExportError as error:
            line["verify"] = f"refuses: {error}"
        lines.append(line)
        if flip is not None:
            file.unlink()
    return lines


# ------------------------------------------------------------------------------------------------- tables of the others


def fallback_rows(rows: Sequence[Mapping], on: Sequence[str] = ("all", "answers")) -> list[dict[str, str]]:
    """`fold.fallback_table` for a page: a line per rule; `on`: of which domains, the divergence of the first, right answers of the last."""
    lines = []
    for rule in dict.fromkeys(r["rule"] for r in rows):
        mine = {r["on"]: r for r in rows if r["rule"] == rule}
        first, last = mine[on[0]], mine[on[-1]]
        exact = "the same function" if first["exact"] else f"differs by up to {first['gap']:.3f}"
        lines.append(
            {
                "rule": rule,
                "as functions": exact,
                "KLD, nats per token": f"{max(first['kld'], 0):.1e} [{max(first['kld_low'], 0):.1e}, {first['kld_high']:.1e}]",
                "same top token": f"{first['same_top']:.2%}",
                "right answers": f"{last['exact_match']:.1%} (before: {last['exact_match_original']:.1%})",
            }
        )
    return lines


def start_rows(report: Report) -> list[dict[str, str]]:
    """`startup.startup_table` for a page: a line per way to start."""
    lines = []
    for name in report.models():
        mine = list(report.where(model=name))
        lines.append({"start": name} | {f"{r.metric}, {r.unit}": f"{r.value:.3f}" if r.unit == "s" else f"{r.value:.0f}" for r in mine})
    return lines


# ------------------------------------------------------------------------------------------------------------- the page


class Page:
    """The page of a folder that `export(..., "web")` wrote, served on 127.0.0.1 by a thread of this kernel, and shown in a frame.

    The thread ends with the kernel, or with `close()`. A notebook that shows the same folder again gets the same server. The frame may
    run scripts and store files under its own address, and nothing else: not leave its place, open windows, or reach the notebook, whose
    address is another.
    """

    _open: dict[Path, "Page"] = {}  # noqa: RUF012 (shared by all on purpose)
    _lock = threading.Lock()

    def __init__(self, folder: str | Path, height: int) -> None:
        from edgelab.export.web_server import server

        self.folder, self.height = Path(folder).resolve(), height
        self._server = server(self.folder)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        """Ends the server and frees its port; twice is once."""
        with Page._lock:
            if Page._open.get(self.folder) is self:
                del Page._open[self.folder]
            if self._thread.is_alive():
                self._server.shutdown()
                self._server.server_close()
                self._thread.join()

    @property
    def html(self) -> str:
        """The frame, and the way out where it stays empty."""
        return (
            f'<iframe src="{self.address}" title="The exported model, in this browser" width="100%" height="{self.height}" '
            'style="border:1px solid #8a94a3" sandbox="allow-scripts allow-same-origin allow-forms" referrerpolicy="no-referrer"></iframe>'
            f'<p>Is the frame empty? The page is at <a href="{self.address}" target="_blank" rel="noopener">{self.address}</a>, on the '
            "machine that runs this kernel, and only there. If that is not the one with your browser, copy the folder "
            f"<code>{escape(self.folder.name)}</code> to yours and run <code>edgelab serve {escape(self.folder.name)}</code> there.</p>"
        )

    def _repr_mimebundle_(self, **_) -> dict:
        return {"text/html": self.html, "text/plain": "The exported page in a frame, served by this kernel on 127.0.0.1."}


def page(folder: str | Path, height: int = 620) -> Page:
    """The `Page` of `folder`; the one that serves it already, if there is one. Raises ExportError when `folder` holds no page."""
    where = Path(folder).resolve()
    with Page._lock:
        if where not in Page._open or not Page._open[where]._thread.is_alive():
            Page._open[where] = Page(where, height)
        return Page._open[where]


# ------------------------------------------------------------------------------------------------------- the exercises


def q4_0_block(scale: float, codes: Sequence[int]) -> list[int]:
    """The 18 bytes of one block of Q4_0: `scale` as float16, then 32 `codes` 0 .. 15. By `export.gguf_file.blocks`."""
    return blocks(Q4_0, np.asarray(codes, np.uint8)[None], np.array([[scale]], np.float16))[0].tolist()


def check_block(answer) -> Verdict:
    """Exercise 1: a function of (scale, 32 codes) that returns the 18 bytes of a Q4_0 block."""
    rng = np.random.default_rng(8)
    codes = list(range(16)) + [0] * 16
    cases = [
        Case(
            "scale 1 and the codes 0, 1, 2 .. 15, then zeros",
            (1.0, codes),
            "first the float16 (1.0 is 0x3c00, the low byte first), then 16 bytes: byte j has code j low and code 16 + j high",
        ),
        Case(
            "the same codes in the second half",
            (1.0, codes[16:] + codes[:16]),
            "byte j holds code j in its low and code 16 + j in its high nibble",
        ),
        Case("a scale of 0.0123", (0.0123, [8] * 32), "the scale is rounded to float16; np.float16(scale).tobytes() has its two bytes"),
        Case(
            "random codes and a negative scale",
            (-2.5, rng.integers(0, 16, 32).tolist()),
            "codes go in as they are, 0 .. 15; the reader takes 8 off",
        ),
    ]
    form = "a function of a scale and a list of 32 codes that returns a list of 18 bytes, 0 .. 255"
    return check_function(answer, q4_0_block, cases, form, "18 bytes for 32 weights, 4.5 bits each, as llama.cpp reads them")


def varint(value: int) -> list[int]:
    """The bytes of a whole number as protobuf writes it: seven bits each, the lowest first, the highest bit set where more follow.

    >>> varint(32_768), varint(5)
    ([128, 128, 2], [5])
    """
    found = [value & 127]
    while value := value >> 7:
        found[-1] |= 128
        found.append(value & 127)
    return found


def check_varint(answer) -> Verdict:
    """Exercise 2: a function of a whole number that returns the bytes of its varint."""
    cases = [
        Case("300", (300,), "300 is 2 * 128 + 44: seven bits to a byte, the lowest first, and 128 is added where more follow"),
        Case("5", (5,), "one byte is enough, and nothing follows it"),
        Case("127", (127,), "seven bits still fit into one byte"),
        Case("128", (128,), "the first number that needs two bytes: 128, 1"),
        Case("32,768", (32_768,), "32,768 is 2 * 128 * 128"),
        Case("0", (0,), "nothing is not what a reader expects: it is one byte, 0"),
        Case("2 ** 40 + 1", (2**40 + 1,), "lengths above four gigabytes exist"),
    ]
    form = "a function of a whole number that returns a list of bytes, 0 .. 255, the first byte first"
    return check_function(answer, varint, cases, form, "as in front of every weight of an ONNX file")


def check_refusals(answer) -> Verdict:
    """Exercise 3: who refuses a bundle in which one bit of a scale was turned."""
    if answer is None:
        return unanswered('a set of names, as in {"load_bundle"}')
    if not isinstance(answer, str | set | frozenset | list | tuple):
        return not_yet(f"a set of names, please; this is a {type(answer).__name__}")
    names, known = {str(a) for a in answer} if not isinstance(answer, str) else {answer}, {"load_bundle", "verify_bundle", "update"}
    if names - known:
        return not_yet(f"names of {', '.join(sorted(known))}; {min(names - known)!r} is none")
    if names == {"verify_bundle", "update"}:
        return right("these two compare sha256. load_bundle looks at names and sizes, which did not change")
    if "load_bundle" in names:
        return not_yet("load_bundle looks at names and sizes; did these change?")
    if names == {"verify_bundle"}:
        return not_yet("a slot verifies what it is given before it swaps: section 6")
    return not_yet("who compares the sha256 of every file?")


def check_blocks(answer) -> Verdict:
    """Exercise 4: bytes of a 512 x 256 weight in Q4_0."""
    if answer is None:
        return unanswered("a number of bytes")
    given = numbers(answer, 1)
    if given is None:
        return not_yet("one number, the bytes")
    hints = {
        65_536.0: "these are the codes; each block has a scale as well",
        81_920.0: "the scale is a float16, two bytes",
        4_096.0: "this is the number of blocks; how many bytes has one?",
        65_536.0 + 512 * 2: "one scale for each block of 32, not for each row",
        589_824.0: "these are bits; a byte has 8 of them",
    }
    if given[0] == 512 * 256 / 32 * 18:
        return right("4,096 blocks of 2 + 16 bytes, 4.5 bits per weight")
    return hint(given[0], hints, "blocks of 32 weights, and the bytes of one block", tolerance=1e-7)


# ---------------------------------------------------------------------------------------------------------- the control


class MapControl:
    """File and kind in; the file's map out, with that kind standing out, and a table of its bytes.

    `maps` {name: map}. `choose` does from code what the inputs do by hand. Everything is drawn from the maps, which are in memory: a
    choice is answered at once.
    """

    ALL = "all kinds"

    def __init__(self, maps: Mapping[str, ByteMap]) -> None:
        if not maps:
            raise ValueError("maps is empty: give {name: byte_map(path)} of a file at least")
        self._maps, self._pictures = dict(maps), {}
        self.error: Exception | None = None
        self._busy, self._drawn = False, ""
        wide = {"description_width": "4em"}
        self.file = w.Dropdown(options=list(maps), description="file", style=wide, layout={"width": "16em"})
        self.kind = w.Dropdown(options=[self.ALL, *KINDS], description="kind", style=wide, layout={"width": "18em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._picture(self.file.value).figure())
        self.figure._config = self.figure._config | {"responsive": True}  # as wide as the page, also when that changes
        self.figure.update_layout(autosize=True)
        self._drawn = self.file.value
        self._changed()
        if self.error is not None:
            raise self.error
        for widget in (self.file, self.kind):
            widget.observe(lambda _: self._changed(), "value")

    def choose(self, file: str | None = None, kind: str | None = None) -> ByteMap:
        """Set the inputs and return the map that is shown. Raises ValueError for what the inputs do not offer."""
        for given, widget in ((file, self.file), (kind, self.kind)):
            if given is not None and given not in widget.options:
                raise ValueError(f"{widget.description}={given!r} is not offered; there are {', '.join(widget.options)}")
        self._busy = True
        try:
            self.file.value, self.kind.value = file or self.file.value, kind or self.kind.value
        finally:
            self._busy = False
        self._changed()
        return self._maps[self.file.value]

    def _picture(self, name: str) -> BytePicture:
        if name not in self._pictures:
            self._pictures[name] = BytePicture(self._maps[name])
        return self._pictures[name]

    def _changed(self) -> None:
        if self._busy:
            return
        try:
            self._draw()
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'

    def _draw(self) -> None:
        name, picture = self.file.value, self._picture(self.file.value)
        picture.kind = "" if self.kind.value == self.ALL else self.kind.value
        treemap, *strips = self.figure.data
        with self.figure.batch_update():
            if name == self._drawn:  # colours only: little goes to the browser
                treemap.marker.colors = picture.treemap()["marker"]["colors"]
                for trace, kind in zip(strips, byte_picture.COLOURS, strict=True):
                    trace.opacity = picture.strip_of(kind)["opacity"]
            else:
                treemap.update(picture.treemap(), overwrite=True)
                for trace, kind in zip(strips, byte_picture.COLOURS, strict=True):
                    trace.update(picture.strip_of(kind), overwrite=True)
                self.figure.update_layout(title_text=picture.title, **picture.axes())
                self._drawn = name
        self.sentence.value = f'<p aria-live="polite"><b>{escape(name)}</b>: {escape(self.told)}</p>'
        self.table.value = self.html

    @property
    def html(self) -> str:
        """The bytes of the chosen file by kind, as an HTML table."""
        lines = self._maps[self.file.value].table()
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in lines[0])
        body = ""
        for line in lines:
            first, *rest = line.values()
            mark = ' style="font-weight:700"' if first == self.kind.value else ""
            cells = "".join(f"<td>{escape(v)}</td>" for v in rest)
            body += f'<tr{mark}><th scope="row">{escape(first)}</th>{cells}</tr>'
        caption = f"Where the bytes of {escape(self.file.value)} are"
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, the sentence."""
        inputs = w.HBox([self.file, self.kind], layout={"flex_flow": "row wrap"})
        box = frame(inputs, self.sentence, self.figure, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    @property
    def told(self) -> str:
        """What is shown, in a sentence."""
        return self._picture(self.file.value).sentence

    def __repr__(self) -> str:
        return f"A control of file and kind, which needs a running notebook. {self.told}"
