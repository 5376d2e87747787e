"""HTML tables of plain text: how the nouns show themselves in a notebook. Every cell is escaped; a row's first cell is its header.

Tables are the part of a view that a screen reader, a text browser and a copy into a paper all get right, so whatever shows itself
does it as one: `lines` for rows of a kind, `facts` for what is known of one thing.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def lines(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """A line per dict, a column per key that any of them has; the caption alone when there are no rows.

    >>> lines([{"model": "int4", "bytes": "<1 MB"}], "Sizes")  # doctest: +NORMALIZE_WHITESPACE
    '<table><caption>Sizes</caption><thead><tr><th scope="col">model</th><th scope="col">bytes</th></tr></thead><tbody><tr><th
    scope="row" style="text-align:left">int4</th><td>&lt;1 MB</td></tr></tbody></table>'
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(_line([row.get(c, "") for c in columns]) for row in rows)
    return f"<table>{_caption(caption)}" + (f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else "</table>")


def facts(pairs: Mapping[str, object] | Iterable[tuple[str, object]], caption: str = "") -> str:
    """A line per (what, value).

    >>> facts({"bits": 4})
    '<table><tbody><tr><th scope="row" style="text-align:left">bits</th><td>4</td></tr></tbody></table>'
    """
    body = "".join(_line(pair) for pair in (pairs.items() if isinstance(pairs, Mapping) else pairs))
    return f"<table>{_caption(caption)}<tbody>{body}</tbody></table>"


def _line(cells: Sequence[object]) -> str:
    first, *rest = (escape(str(c)) for c in cells)
    return f'<tr><th scope="row" style="text-align:left">{first}</th>' + "".join(f"<td>{c}</td>" for c in rest) + "</tr>"


def _caption(text: str) -> str:
    return f"<caption>{escape(text)}</caption>" if text else ""
