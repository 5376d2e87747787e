"""`Coverage`: what compression really touched. One row per stored tensor, its bytes, and the shares they add up to.

A tool that skips the fused expert stacks of a mixture-of-experts model calls it "4-bit" while 90 % of it stays in 16.
So the audit counts *everything* that a model stores: norms, routers, biases, buffers and the scales of every group.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from edgelab import html_table


@dataclass(frozen=True)
class CoverageRow:
    """One stored tensor. `scheme` is a QuantScheme's text or a dtype's name, `touched` says whether a step changed it.

    `parameters` is 0 for a buffer: its bytes are stored, but it is no parameter. `note` says why it was left alone.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    parameters: int
    scheme: str
    predicted_bytes: int
    touched: bool
    note: str = ""


@dataclass(frozen=True)
class Coverage:
    """The rows of a whole model; a tied weight has one row. `file_bytes`: what was written to disk, headers included.

    >>> rows = (CoverageRow("experts", "experts", (2, 4, 8), 64, "int4-row", 40, True),
    ...         CoverageRow("norm", "other", (8,), 8, "float32", 32, False))
    >>> c = Coverage(rows)
    >>> c.share, c.expert_share, c.predicted_bytes, c.bits_per_weight
    (0.8888888888888888, 1.0, 72, 8.0)
    """

    rows: tuple[CoverageRow, ...]
    file_bytes: int | None = None

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> int:
        return sum(r.parameters for r in self.rows)

    @property
    def share(self) -> float:
        """The share of all parameters that a step touched, 0 .. 1."""
        return _share(self.rows)

    @property
    def expert_share(self) -> float | None:
        """The share of the experts' parameters that a step touched, 0 .. 1; None for a model without experts."""
        experts = [r for r in self.rows if r.role == "experts" and r.parameters]
        return _share(experts) if experts else None

    @property
    def predicted_bytes(self) -> int:
        """Bytes of all stored tensors, from shapes and schemes alone."""
        return sum(r.predicted_bytes for r in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits per parameter with everything counted: scales, norms, routers, embeddings, buffers."""
        return 8 * self.predicted_bytes / max(self.parameters, 1)

    @property
    def file_error(self) -> float | None:
        """(file bytes - predicted bytes) / predicted bytes; None before the model was saved."""
        return None if self.file_bytes is None else (self.file_bytes - self.predicted_bytes) / max(self.predicted_bytes, 1)

    def with_file_bytes(self, file_bytes: int) -> "Coverage":
        """The same rows beside what was really written to disk."""
        return Coverage(self.rows, file_bytes)

    def check(self, min_expert_share: float = 1.0) -> None:
        """Raises ValueError, naming the experts that were left alone, when `expert_share` is below `min_expert_share`."""
        share = self.expert_share
        if share is None or share >= min_expert_share:
            return
        left = [r for r in self.rows if r.role == "experts" and r.parameters and not r.touched]
        names = "; ".join(f"{r.name} {r.shape}" + (f" ({r.note})" if r.note else "") for r in left[:4])
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        raise ValueError(
            f"{share:.1%} of the expert parameters were quantized, the recipe asks for min_expert_share={min_expert_share:.1%}. "
            f"Left alone: {names}{more}. Give them a scheme with a rule such as ('@experts', QuantScheme(4)), "
            f"or accept it with Quantize(..., min_expert_share={int(share * 1000) / 1000})"
        )

    def by_role(self) -> list[dict]:
        """One dict per role: parameters, the share of them that was touched, bytes, effective bits per parameter."""
        lines = []
        for role in dict.fromkeys(r.role for r in self.rows):
            rows = [r for r in self.rows if r.role == role]
            parameters, size = sum(r.parameters for r in rows), sum(r.predicted_bytes for r in rows)
            line = {"role": role, "parameters": parameters, "touched": _share(rows), "bytes": size}
            lines.append(line | {"bits_per_weight": 8 * size / parameters if parameters else 0.0})
        return lines

    def table(self) -> list[dict[str, str]]:
        """The audit as text: one line per role and a last line for the whole model."""
        whole = {"role": "all", "parameters": self.parameters, "touched": self.share, "bytes": self.predicted_bytes}
        return [
            {
                "role": line["role"],
                "parameters": f"{line['parameters']:,}",
                "touched": f"{line['touched']:.1%}",
                "bytes": f"{line['bytes']:,}",
                "bits per weight": f"{line['bits_per_weight']:.3f}",
            }
            for line in [*self.by_role(), whole | {"bits_per_weight": self.bits_per_weight}]
        ]

    def to_dict(self) -> dict:
        return {"file_bytes": self.file_bytes, "rows": [asdict(r) for r in self.rows]}

    @classmethod
    def from_dict(cls, d: dict) -> "Coverage":
        return cls(tuple(CoverageRow(**(r | {"shape": tuple(r["shape"])})) for r in d["rows"]), d["file_bytes"])

    def __repr__(self) -> str:
        experts = "" if self.expert_share is None else f", {self.expert_share:.1%} of the expert parameters"
        file = "" if self.file_bytes is None else f", {self.file_bytes:,} on disk ({self.file_error:+.2%})"
        return (
            f"Coverage({self.share:.1%} of {self.parameters:,} parameters in codes{experts}, "
            f"{self.predicted_bytes:,} bytes predicted{file}, "
            f"{self.bits_per_weight:.3f} bits per weight)"
        )

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), repr(self))


def _share(rows) -> float:
    whole = sum(r.parameters for r in rows)
    return sum(r.parameters for r in rows if r.touched) / whole if whole else 0.0
