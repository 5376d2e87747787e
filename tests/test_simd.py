"""The ways of `simd.py`: the same results from each, the instructions that each is there for, and Arm's under an emulator."""

import ctypes
import inspect
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import test_kernels
from llvmlite import ir
from test_kernels import NAMES, both, close, in_a_new_process

from edgelab.kernels import matmul, micro, simd
from edgelab.kernels.reference import BOUNDS, PAIRS, quantize_rows

WIDTHS = (3, 4, 8)

# ----------------------------------------------------------------------------------------------- whole products, by way


def results() -> dict[str, np.ndarray]:
    """Outputs of the kernels on this process's way, after what must hold on every way."""
    found = {}
    for name in NAMES:
        for bits in WIDTHS:
            test_kernels.test_nothing_rounds_where_all_sums_are_whole(name, bits)
            for group_size in (0, 7, 32, 128):
                for tokens in (1, 2, 7, 13, 40):
                    for out, n in ((35, 64), (16, 650)):
                        n = test_kernels.fitting(n, group_size)
                        comp, ref, bound = both(name, bits=bits, out=out, n=n, tokens=tokens, group_size=group_size)
                        assert close(comp, ref, bound), (name, bits, group_size, tokens, out, n)
                        found[f"{name} int{bits} g{group_size} {tokens} {out}x{n}"] = comp
        test_kernels.test_a_number_that_is_not_finite_shows_in_its_row_and_in_no_other(name, np.nan)
    for bits in (3, 4):
        test_kernels.test_codes_of_a_table_equal_their_twin("qmatmul", bits)
    test_kernels.test_every_finite_float16_scale_is_read_exactly()
    test_kernels.test_tiny_activations_become_zeros_and_tiny_weights_stay()
    test_kernels.test_the_longest_group_still_sums_to_an_int32()
    return found


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """The function from a way to its results, made in a process of its own where it is not this one's."""
    folder = tmp_path_factory.mktemp("ways")

    @cache
    def of(way: str) -> dict[str, np.ndarray]:
        if way not in simd.ways():
            pytest.skip(f"this processor cannot take the way {way}, only {', '.join(simd.ways())}")
        file = folder / f"{way}.npz"
        code = f"""
            import numpy as np, test_simd
            from edgelab.kernels import simd
            assert simd.way() == {way!r}
            np.savez({str(file)!r}, **test_simd.results())
        """
        in_a_new_process(code, EDGELAB_SIMD=way)
        with np.load(file) as arrays:
            return dict(arrays)

    return of


@pytest.mark.parametrize("way", ["avx512", "avxvnni", "avx2", "portable"])
def test_every_way_equals_the_twins(results_of, way):
    """The bounds and all that `results` checks hold on each way that runs here."""
    assert len(results_of(way)) == len(NAMES) * len(WIDTHS) * 4 * 5 * 2


@pytest.mark.parametrize("way", ["avxvnni", "avx2"])
def test_ways_with_fma_give_the_same_bits(results_of, way):
    """Integer sums are exact and the float operations are the same, so one processor's result is another's.

    With float32 activations too where all ways take few rows, or all many: 1, 2 and 40 here.
    """
    ours, best = results_of(way), results_of(simd.ways()[0])
    same = [key for key in best if "_int8 " in key or (key.startswith("qmatmul ") and key.split()[3] in ("1", "2", "40"))]
    assert len(same) > len(best) / 2
    for key in same:
        assert ours[key].tobytes() == best[key].tobytes(), key


@pytest.mark.skipif(test_kernels.sys.platform != "linux", reason="forbids pages with Linux's mprotect")
@pytest.mark.parametrize("edge", ["end", "beginning"])
@pytest.mark.parametrize("way", ["avxvnni", "avx2", "portable"])
def test_every_way_stays_inside_the_arrays(way, edge):
    if way not in simd.ways():
        pytest.skip(f"this processor cannot take the way {way}")
    in_a_new_process(f"import test_kernels; test_kernels.run_guarded({edge == 'end'}, {WIDTHS})", EDGELAB_SIMD=way, NUMBA_NUM_THREADS="2")


@pytest.mark.parametrize(
    ("asked", "environment"), [("neon", {}), ("AVX2", {}), ("avx2", {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""})]
)
def test_a_way_that_cannot_run_is_refused(asked, environment):
    can = "portable" if environment else ", ".join(simd.ways())
    code = """
        try:
            import edgelab.kernels.matmul
        except ValueError as error:
            print(error)
    """
    text = in_a_new_process(code, EDGELAB_SIMD=asked, **environment)
    assert text.strip() == f"EDGELAB_SIMD={asked!r} is not one of {can}, the ways that this processor can take"


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", ["portable"]),
        ("+avx2,+fma", ["portable"]),
        ("+avx2,+fma,+f16c,-avxvnni", ["avx2", "portable"]),
        ("+avx2,+fma,+f16c,+avxvnni", ["avxvnni", "avx2", "portable"]),
        ("+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl", ["avx2", "portable"]),
        ("+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512vnni", ["avx512", "avx2", "portable"]),
        ("+neon,+dotprod", ["sdot", "portable"]),
        ("+neon", ["portable"]),
    ],
)
def test_ways_follow_the_features_that_numba_compiles_for(monkeypatch, features, expected):
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert simd.ways() == expected


def test_a_number_of_rows_without_code_stops_the_process():
    """Had nothing happened, y would keep what was in it before."""
    code = """
        import numpy as np
        from numba import njit
        from edgelab.kernels import micro
        from edgelab.kernels.simd import emitted

        ahead = emitted(lambda v, tokens, codes, count: micro.ahead(v, codes, count), (2, 1))

        @njit
        def run(tokens, x):
            ahead(tokens, x.ctypes.data, 1)

        x = np.zeros(64, np.uint8)
        run(1, x), run(2, x)
        print("inside", flush=True)
        run(3, x)
    """
    with pytest.raises(AssertionError, match=r"exit status -\d+\s*inside"):
        in_a_new_process(code)


# -------------------------------------------------------------------------------- the emitting functions, one at a time
X86 = "x86_64-unknown-linux-gnu"
# way: triple, processor, features that it is compiled for
TARGETS = {
    "avx512": (X86, "cascadelake", ""),
    "avxvnni": (X86, "alderlake", ""),
    "avx2": (X86, "haswell", ""),
    "portable": (X86, "x86-64", ""),
    "sdot": ("aarch64-linux-gnu", "cortex-a76", "+dotprod,+neon,+fullfp16"),
}
FEW, MANY = (2, 1), (3, 2)  # rows of x at once: sizes that Arm takes


@cache
def functions() -> dict[str, tuple]:
    """name -> (function of `micro.py`, its compile-time arguments)."""
    made = {"quantize": (micro.quantize, {}), "spread": (micro.spread, {})}
    made |= {f"a16_many x{m}": (micro.a16_many, {"tokens": m}) for m in MANY}
    for bits in WIDTHS:
        one = {"bits": bits}
        made |= {f"{emit.__name__} {bits}": (emit, one) for emit in (micro.unpack, micro.dequantize)}
        made |= {f"{emit.__name__} {bits} x{m}": (emit, one | {"tokens": m}) for emit in (micro.a8_few, micro.a16_few) for m in FEW}
        made |= {f"{emit.__name__} {bits} x{m}": (emit, one | {"tokens": m}) for emit in (micro.a8_many, micro.a8_many_row) for m in MANY}
    return made


def parameters(name: str) -> list[str]:
    emit, fixed = functions()[name]
    return [p for p in inspect.signature(emit).parameters if p not in {"v", *fixed}]


def target_machine(way: str, **options) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu, features = TARGETS[way]
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", **options)


@cache
def bitcode(way: str) -> bytes:
    """Optimised LLVM code of all `functions`, and an array `kernels` of their addresses."""
    module, made = ir.Module(), []
    for name, (emit, fixed) in functions().items():
        names = parameters(name)
        kind = ir.FunctionType(ir.VoidType(), [simd.POINTER if n in simd.POINTERS else simd.I64 for n in names])
        made.append(ir.Function(module, kind, name))
        builder = ir.IRBuilder(made[-1].append_basic_block())
        emit(simd.Vectors(builder, way), **dict(zip(names, made[-1].args, strict=True)), **fixed)
        builder.ret_void()
    addresses = ir.ArrayType(simd.POINTER, len(made))
    table = ir.GlobalVariable(module, addresses, "kernels")
    table.global_constant, table.initializer = True, ir.Constant(addresses, [f.bitcast(simd.POINTER) for f in made])
    machine = target_machine(way)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return parsed.as_bitcode()


@cache
def assembly(way: str) -> dict[str, str]:
    """The instructions of each function, for a processor of that way."""
    text = target_machine(way, codemodel="small").emit_assembly(llvm.parse_bitcode(bitcode(way)))
    bodies = {}
    for part in re.split(r"^(?=\"?[\w ]+\"?:)", text, flags=re.MULTILINE):
        name, _, body = part.partition(":")
        bodies[name.strip('"')] = body
    return bodies


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("way", "there", "not_there"),
    [
        ("avx512", r"vpdpbusd\s.*%zmm", r"vpmaddubsw|vpmullw"),
        ("avxvnni", r"\{vex\}\s+vpdpbusd\s.*%ymm", r"vpmaddubsw|vpmullw|zmm"),
        ("avx2", r"vpmaddubsw\s.*%ymm", r"vpdpbusd|vpmullw|zmm"),
        ("portable", r"pmaddwd", r"vpdpbusd|pmaddubsw|%ymm"),
        ("sdot", r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.(16b|4b\[\d\])", r"[su]mull2?\s|\s(mul|mla)\s+v|\s[su]dot\s+v\d+\.2s"),
    ],
    ids=["avx512", "avxvnni", "avx2", "portable", "sdot"],
)
def test_products_of_bytes_take_the_instruction_of_the_way(way, there, not_there, bits):
    for name, body in assembly(way).items():
        if name.startswith(("a8_few", "a8_many")) and f" {bits} " in name:
            inner = len(re.findall(there, body))
            columns = 16 // simd.LANES[way]
            assert inner >= 8 * columns, (name, inner)  # eight quads of a unit, for each column at least once
            assert not re.search(not_there, body), name


@pytest.mark.parametrize("way", TARGETS)
def test_no_kernel_calls_a_library(way):
    """numba links no library of conversions or of fma for it; what fills memory with zeros it has."""
    bodies = assembly(way)
    assert set(functions()) <= set(bodies)
    for name in functions():
        assert re.search(r"\sret", bodies[name]), name
        assert set(re.findall(r"\s(?:callq?|blr?)\s+(\S+)", bodies[name])) <= {"memset", "memset@PLT"}, name


class Native:
    """Calls emitted functions on this processor."""

    def __init__(self, way: str) -> None:
        self.engine = llvm.create_mcjit_compiler(llvm.parse_bitcode(bitcode(way)), target_machine(way, jit=True))
        self.engine.finalize_object()

    def run(self, calls: list[tuple[str, dict]]) -> None:
        for name, given in calls:
            names = parameters(name)
            assert set(given) == set(names)
            values = [given[n] if isinstance(given[n], int) else given[n].ctypes.data for n in names]
            ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(values))(self.engine.get_function_address(name))(*values)


class Emulated:
    """Calls emitted functions on an emulated Arm processor: arrays go there in one image and come back in it."""

    arguments = 20

    def __init__(self, folder: Path) -> None:
        (folder / "kernels.o").write_bytes(target_machine("sdot").emit_object(llvm.parse_bitcode(bitcode("sdot"))))
        main = Path(__file__).parent / "aarch64" / "run.c"
        self.program = folder / "run"
        command = ["aarch64-linux-gnu-gcc", "-O1", "-Wall", "-Werror", "-static", main, folder / "kernels.o", "-o", self.program]
        subprocess.run(command, check=True)

    def run(self, calls: list[tuple[str, dict]]) -> None:
        owners = {}  # address of an array's memory -> (array that owns it, place in the image)
        size, margin = 256, 256
        for _, given in calls:
            for array in given.values():
                if isinstance(array, np.ndarray):
                    owner = array if array.base is None else array.base
                    if owner.ctypes.data not in owners:
                        owners[owner.ctypes.data] = owner, size
                        size += -(-owner.nbytes // 64) * 64 + margin
        image = np.full(size, 0xFF, np.uint8)
        for owner, at in owners.values():
            image[at : at + owner.nbytes] = owner.reshape(-1).view(np.uint8)
        numbers = [size, len(calls)]
        for name, given in calls:
            names = parameters(name)
            assert set(given) == set(names) and len(names) <= self.arguments
            numbers.append(list(functions()).index(name))
            pairs = []
            for n in names:
                if isinstance(given[n], int):
                    pairs += [0, given[n]]
                else:
                    owner, at = owners[(given[n] if given[n].base is None else given[n].base).ctypes.data]
                    pairs += [1, at + given[n].ctypes.data - owner.ctypes.data]
            numbers += pairs + [0] * (2 * self.arguments - len(pairs))
        told = np.array(numbers, np.int64).tobytes() + image.tobytes()
        done = subprocess.run(["qemu-aarch64", self.program], input=told, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr.decode()}"
        after = np.frombuffer(done.stdout, np.uint8)
        outside = np.ones(size, bool)
        for owner, at in owners.values():
            owner.reshape(-1).view(np.uint8)[:] = after[at : at + owner.nbytes]
            outside[at : at + owner.nbytes] = False
        assert (after[outside] == 0xFF).all(), "a kernel wrote outside its arrays"


@pytest.fixture(scope="module", params=[*simd.ways(), "arm"])
def processor(request, tmp_path_factory):
    """(way, something that calls emitted functions on that way)."""
    if request.param != "arm":
        return request.param, Native(request.param)
    for program, package in (("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"), ("qemu-aarch64", "qemu-user")):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (Debian: {package}), so Arm code cannot run here")
    library = subprocess.run(["aarch64-linux-gnu-gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=True).stdout
    if not Path(library.strip()).is_absolute():
        pytest.skip("Arm's libc.a is not installed (Debian: libc6-dev-arm64-cross), so no Arm program can be linked here")
    return "sdot", Emulated(tmp_path_factory.mktemp("arm"))


def quantized(x: np.ndarray, group: int, padded: int, zero: int) -> tuple[list, np.ndarray, np.ndarray, np.ndarray]:
    """(calls that quantize x, and their results: codes int8 [rows, groups, padded], scales and starts [groups, rows])."""
    rows, groups = len(x), x.shape[1] // group
    xq, sx, start = (
        np.full((rows, groups, padded), 99, np.int8),
        np.full((groups, rows), np.nan, np.float32),
        np.zeros((groups, rows), np.int32),
    )
    sizes = {"lds": rows, "groups": groups, "group": group, "padded": padded, "zero": zero}
    calls = [("quantize", {"x": x[t], "xq": xq[t], "sx": sx[0, t:], "start": start[0, t:], **sizes}) for t in range(rows)]
    return calls, xq, sx, start


@pytest.mark.parametrize("group", [1, 3, 4, 7, 16, 31, 32, 33, 100])
def test_activations_are_quantized_as_their_twin_does(processor, group):
    """Code by code, bit by bit: ties go to even, a group of zeros or of tiny numbers becomes zeros, its neighbours do not."""
    _, machine = processor
    rng = np.random.default_rng(group)
    x = (rng.standard_normal((6, 4, group)) * 2.0 ** rng.integers(-40, 40, (6, 4, 1))).astype(np.float32)
    x[1] = rng.integers(-127, 127, (4, group)) + np.float32(0.5)
    x[1, :, 0] = 127
    x[2, 1], x[2, 2], x[2, 3, 0] = 0, -0.0, 3e38
    x[3, 0], x[3, 1], x[3, 2], x[3, 3] = 2.0**-100, 2.0**-99, 2.0**-149, -(2.0**-126)
    x[4, :, -1] = 1e6
    x = x.reshape(6, 4 * group)
    for zero in (0, 8, 128):
        padded = -(-group // 32) * 32
        calls, xq, sx, start = quantized(x, group, padded, zero)
        machine.run(calls)
        codes, scales = quantize_rows(x, group)
        np.testing.assert_array_equal(xq[:, :, :group], codes)
        assert not xq[:, :, group:].any()
        assert sx.T.tobytes() == scales.tobytes()
        np.testing.assert_array_equal(start.T, -zero * codes.sum(axis=2, dtype=np.int64))


def test_rows_are_spread_over_whole_units(processor):
    _, machine = processor
    for group in (1, 5, 8, 32, 50):
        x = np.random.default_rng(group).standard_normal((1, 3 * group)).astype(np.float32)
        padded = -(-group // 32) * 32
        xq = np.full((3, padded), np.nan, np.float32)
        machine.run([("spread", {"x": x, "xq": xq, "groups": 3, "group": group, "padded": padded})])
        ref = np.zeros((3, padded), np.float32)
        ref[:, :group] = x.reshape(3, group)
        assert xq.tobytes() == ref.tobytes()


def integer_product(way: str, tiles, x: np.ndarray, y: np.ndarray, many: bool) -> list[tuple[str, dict]]:
    """Calls that fill y with the product, as `matmul.py` makes them: tile after tile, panels, blocks of rows."""
    rows, groups, units, bits = len(x), tiles.scales.shape[2], tiles.units, tiles.bits
    calls, xq, sx, start = quantized(x, tiles.group, units * 32, simd.zero_point(way, bits))
    across = max(1, micro.COLUMNS[way] * simd.LANES[way] // 16)
    for first_tile in range(0, tiles.codes.shape[1], 1 if not many else across):
        valid = tiles.out - 16 * first_tile
        if not many:
            codes, scales = tiles.codes[0, first_tile], tiles.scales[0, first_tile]
            sizes = {"ldx": tiles.padded, "lds": rows, "ldy": tiles.out, "valid": valid, "groups": groups, "units": units}
            for t, m in blocks(rows, FEW):
                where = {"x": xq[t], "sx": sx[0, t:], "start": start[0, t:], "y": y[t, 16 * first_tile :]}
                calls.append((f"a8_few {bits} x{m}", {"codes": codes, "scales": scales, **where, **sizes}))
            continue
        here = min(across, tiles.codes.shape[1] - first_tile)
        panel = np.full((across, tiles.codes.shape[2], 8, 64), 0xFF, np.uint8)
        for i in range(here):
            if bits < 8:
                calls.append(
                    (f"unpack {bits}", {"codes": tiles.codes[0, first_tile + i], "panel": panel[i], "units": tiles.codes.shape[2]})
                )
            else:
                panel[i] = tiles.codes[0, first_tile + i]
        scale_stride = tiles.scales[0, 0].nbytes if here > 1 else 0
        kept = waiting(way, rows)
        cut = tiles.codes.shape[2] // 2 if groups == 1 else groups // 2 * units
        for u, count in ((0, cut), (cut, tiles.codes.shape[2] - cut)):
            if not count:
                continue
            sizes = {"tile_stride": panel[0].nbytes if here > 1 else 0, "scale_stride": scale_stride, "ldx": tiles.padded}
            sizes |= {"ldy": tiles.out, "valid": valid, "first": int(u == 0), "last": int(u + count == tiles.codes.shape[2])}
            for t, m in blocks(rows, MANY):
                where = {"codes": panel[0, u], "kept": kept[t], "x": xq[t].reshape(-1)[32 * u :], "y": y[t, 16 * first_tile :]}
                if groups == 1:
                    name, more = "a8_many_row", {"units": count}
                    where |= {"scales": tiles.scales[0, first_tile], "sx": sx[0, t:], "start": start[0, t:]}
                else:
                    name, more = "a8_many", {"groups": count // units, "units": units, "lds": rows}
                    g = u // units
                    where |= {"scales": tiles.scales[0, first_tile, g], "sx": sx[g, t:], "start": start[g, t:]}
                calls.append((f"{name} {bits} x{m}", {**where, **sizes, **more}))
    return calls


def float_product(way: str, tiles, x: np.ndarray, y: np.ndarray, many: bool) -> list[tuple[str, dict]]:
    """As `integer_product` for float32 activations; the group divides into whole units."""
    rows, groups, units, bits = len(x), tiles.scales.shape[2], tiles.units, tiles.bits
    calls = []
    across = max(1, micro.COLUMNS[way] * simd.LANES[way] // 16)
    for first_tile in range(0, tiles.codes.shape[1], 1 if not many else across):
        valid = tiles.out - 16 * first_tile
        sizes = {"ldx": tiles.n, "ldy": tiles.out, "valid": valid}
        if not many:
            weights = {"codes": tiles.codes[0, first_tile], "scales": tiles.scales[0, first_tile], "levels": tiles.levels}
            for t, m in blocks(rows, FEW):
                given = {**weights, "x": x[t], "y": y[t, 16 * first_tile :], **sizes, "groups": groups, "units": units}
                calls.append((f"a16_few {bits} x{m}", given))
            continue
        panel = np.full((tiles.n, across, 16), np.nan, np.float32)
        for i in range(min(across, tiles.codes.shape[1] - first_tile)):
            weights = {"codes": tiles.codes[0, first_tile + i], "scales": tiles.scales[0, first_tile + i], "levels": tiles.levels}
            given = {**weights, "panel": panel[0, i], "panel_stride": panel[0].nbytes, "groups": groups, "units": units}
            calls.append((f"dequantize {bits}", given))
        kept = waiting(way, rows)
        for k, count in ((0, 32), (32, tiles.n - 32)):
            for t, m in blocks(rows, MANY):
                where = {"panel": panel[k], "panel_stride": panel[0].nbytes, "x": x[t, k:], "y": y[t, 16 * first_tile :], "kept": kept[t]}
                calls.append((f"a16_many x{m}", {**where, **sizes, "quads": count // 4, "first": int(k == 0), "last": int(k > 0)}))
    return calls


def waiting(way: str, rows: int) -> np.ndarray:
    """Memory [rows, columns] for the sums that the first of two panels leaves to the second."""
    return np.full((rows, micro.COLUMNS[way], simd.LANES[way]), np.nan, np.float32)


def blocks(rows: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first row, number of rows) of blocks of these sizes, the last ones first: five rows are 3 and 2."""
    found, at = [], 0
    while at < rows:
        size = next(s for s in sizes if s <= rows - at)
        found.append((at, size))
        at += size
    return found


@pytest.mark.parametrize("kind", ["few rows", "many rows"])
@pytest.mark.parametrize(("activations", "bits"), [*((a, b) for a in ("int8", "float32") for b in WIDTHS), ("table", 3), ("table", 4)])
def test_products_of_every_processor_are_the_same(processor, activations, bits, kind):
    """The bits of this process's kernels where both fuse multiply and add, else within the bound; Arm's under the emulator too."""
    way, machine = processor
    integer, many = activations == "int8", kind == "many rows"
    calls, checks = [], []
    for out, n, group_size in ((16, 64, 32), (17, 96, 96), (50, 128, 32), (33, 160, 0), (7, 256, 128)):
        _, reference, make = PAIRS["qmatmul_int8" if integer else "qmatmul"]
        # this process's kernels take two rows for few and forty for many, whatever their way; a row's result is its own
        tiles, x, ref = make(
            np.random.default_rng(9), bits=bits, out=out, n=n, group_size=group_size, tokens=40, table=activations == "table"
        )
        rows = 5 if many else 2
        mine = x.copy() if many else x[:rows].copy()
        ref = np.full((len(mine), out), np.nan, np.float32)
        matmul.qmatmul(tiles, mine, ref, "int8" if integer else "float32")
        comp = np.full((rows, out), np.nan, np.float32)
        calls += (integer_product if integer else float_product)(way, tiles, x[:rows].copy(), comp, many)
        checks.append((tiles, x[:rows], comp, ref[:rows]))
    machine.run(calls)
    for tiles, x, comp, ref in checks:
        if "portable" in (way, simd.way()):
            twin = np.empty(comp.shape, np.float32)
            reference(tiles, x, twin)
            assert close(comp, twin, BOUNDS["qmatmul_int8" if integer else "qmatmul"](tiles, x, comp)), (tiles.out, tiles.n, tiles.group)
        else:
            assert comp.tobytes() == ref.tobytes(), (tiles.out, tiles.n, tiles.group)
