"""The claims of the guide to language models on phones (E1 to E4), a function each: it measures, and returns an `Entry`."""

from edgelab import studies
from edgelab.claims.bench import Bench, counted, found
from edgelab.compress import compress
from edgelab.ledger import Entry
from edgelab.model import weights
from edgelab.prune_lab import break_even
from edgelab.recipe import Prune, Recipe
from edgelab.sparsify import storage_table
from edgelab.studies import MEAN


def e1(bench: Bench, sparsity: float = 0.5) -> Entry:
    """Pruned weights stored as sparse matrices: bytes over those of the same weights stored densely, in 16 bits."""

    pruned = compress(bench.moe, Recipe((Prune(sparsity, method="magnitude"),)), progress=False).model
    half = {row.format: row.of_float16 for row in storage_table(pruned)}
    one = next(w.tensor for w in weights(bench.moe) if w.role == "mlp")
    few = one * (one.abs() > one.abs().flatten().kthvalue(int(0.03 * one.numel())).values)
    little = {row.format: row.of_float16 for row in storage_table(few)}
    sparse = {name: share for name, share in half.items() if name.split()[0] in ("bitmap", "csr", "2:4") and "int4" not in name}
    best = min(sparse, key=sparse.get)
    return counted(
        "E1",
        f"bytes of the embedded mixture's blocks with {sparsity:.0%} zeros as {best}, over the same as dense float16",
        sparse[best],
        "of dense",
        len(half),
        "formats, each counted exactly",
        control=f"a weight with 3 % zeros takes {little[best]:.3f} in the same form: an index for nothing",
        beside={
            "all forms": ", ".join(f"{name} {share:.3f}" for name, share in half.items()),
            "against int4": f"{sparse[best] / half['int4-g32']:.2f} times the bytes of dense int4-g32, which keeps every weight; a "
            f"bitmap of float16 is smaller from {100 * break_even('bitmap float16', 'dense int4-g32'):.0f} % zeros",
        },
    )


def e2(bench: Bench) -> Entry:
    """Fine-tuning after compression: which share of the lost accuracy comes back."""
    report = studies.read("recovery").report
    whole, cut, tuned = (report.get(model=m, metric="exact_match", slice=MEAN) for m in ("fp", "REAP 50%", "REAP 50%, fine-tuned"))
    distilled = report.get(model="REAP 50%, distilled", metric="exact_match", slice=MEAN)
    value = (tuned.value - cut.value) / (whole.value - cut.value)
    low = (tuned.low - cut.high) / (whole.high - cut.high)
    high = (tuned.high - cut.low) / (whole.low - cut.low)
    return found(
        "E2",
        "half of the experts dropped, then 500 steps of fine-tuning on text: share of the lost exact match that came back",
        (100 * value, 100 * low, 100 * high),
        "% recovered",
        tuned.n,
        "the ends of three 95 % intervals put together, wider than a paired one",
        provenance="measured at build",
        beside={
            "exact match": f"original {100 * whole.value:.1f} %, cut {100 * cut.value:.1f} %, fine-tuned {100 * tuned.value:.1f} %",
            "distilled instead": f"{100 * distilled.value:.1f} %",
        },
    )
