"""Vectors for the kernels: the few LLVM instructions that numba cannot say, and which of them this processor has.

A *way* is one set of instructions. All ways read the same memory layout (`pack.py`) and give the same integers:

    way        lanes  product of bytes                 where
    avx512      16    vpdpbusd zmm                     AVX-512 VNNI: Xeon since 2019, Ryzen since Zen 4
    avxvnni      8    vpdpbusd ymm                     AVX-VNNI: Core since 2021
    avx2         8    vpmaddubsw + vpmaddwd            AVX2 with FMA and F16C: nearly any PC since 2013
    sdot         4    sdot                             Armv8.2 dot product: phones since 2018, Apple M, Graviton
    portable     4    plain multiplications            whatever LLVM compiles for

A lane is 32 bits wide and belongs to one output row. It holds four neighbouring inputs' codes as bytes, one int32 sum or
one float32. The instruction that matters multiplies four bytes by four bytes and adds the four products to the lane's
int32: `dot`. Everything else is ordinary LLVM vector arithmetic, the same text for every way.

The way is chosen once, from the features that numba compiles for; the environment variable EDGELAB_SIMD overrides it.
"""

import inspect
import os
from collections.abc import Callable
from functools import cache

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = {"avx512": 16, "avxvnni": 8, "avx2": 8, "sdot": 4, "portable": 4}
# LLVM's names of the features that each way needs, best way first
NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"},
    "avxvnni": {"avx2", "fma", "f16c", "avxvnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "sdot": {"neon", "dotprod"},
    "portable": set(),
}
VARIABLE = "EDGELAB_SIMD"

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, POINTER = ir.HalfType(), ir.FloatType(), ir.PointerType()


def features() -> set[str]:
    """LLVM's names of the processor's features that numba compiles for (NUMBA_CPU_FEATURES may hide some)."""
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        return {f[1:] for f in (numba.config.CPU_FEATURES or "").split(",") if f.startswith("+")}
    return {name for name, has in llvm.get_host_cpu_features().items() if has}


def ways() -> list[str]:
    """The ways that run here, best first."""
    have = features()
    return [way for way, needs in NEEDS.items() if needs <= have]


@cache
def way() -> str:
    """The way that the kernels of this process take. Raises ValueError when EDGELAB_SIMD asks for one that cannot run."""
    can = ways()
    asked = os.environ.get(VARIABLE)
    if not asked:
        return can[0]
    if asked not in can:
        raise ValueError(f"{VARIABLE}={asked!r} is not one of {', '.join(can)}, the ways that this processor can take")
    return asked


def zero_point(way: str, bits: int) -> int:
    """The code that `dot` takes for zero, whose share -zero_point * sum(x) a sum starts with.

    Codes are unsigned, 0 .. 2**bits - 1, and stand for code - 2**(bits - 1). `avx2` and `sdot` multiply signed bytes: to
    them `Vectors.operand` hands 8-bit codes shifted already, and zero is 0.
    """
    return 0 if bits == 8 and way in ("avx2", "sdot") else 1 << (bits - 1)


class Vectors:
    """Emits vector instructions with an LLVM builder, for one way.

    Addresses are LLVM pointers, offsets are bytes: Python integers or i64 values.
    """

    def __init__(self, builder: ir.IRBuilder, way: str) -> None:
        self.b, self.way, self.lanes = builder, way, LANES[way]
        n = self.lanes
        self.i32, self.f32, self.f16 = ir.VectorType(I32, n), ir.VectorType(F32, n), ir.VectorType(F16, n)
        self.i8, self.i16 = ir.VectorType(I8, 4 * n), ir.VectorType(I16, 2 * n)
        self.mask = ir.VectorType(I1, n)

    # ------------------------------------------------------------------------------------------------ plain LLVM
    def k(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def ints(self, value: int) -> ir.Constant:
        """All lanes int32 `value`."""
        return ir.Constant(self.i32, [value] * self.lanes)

    def floats(self, value: float) -> ir.Constant:
        """All lanes float32 `value`."""
        return ir.Constant(self.f32, [value] * self.lanes)

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        """An LLVM intrinsic."""
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def add(self, *parts) -> ir.Value:
        """The sum of i64 values and Python integers."""
        fixed = sum(p for p in parts if isinstance(p, int))
        values = [p for p in parts if not isinstance(p, int)]
        total = self.k(fixed) if not values else values[0]
        for p in values[1:]:
            total = self.b.add(total, p)
        return self.b.add(total, self.k(fixed)) if values and fixed else total

    def mul(self, a: ir.Value, b) -> ir.Value:
        return self.b.mul(a, self.k(b) if isinstance(b, int) else b)

    def at(self, pointer: ir.Value, *offsets) -> ir.Value:
        """The address some bytes behind `pointer`."""
        return self.b.gep(pointer, [self.add(*offsets)], source_etype=I8)

    def load(self, kind: ir.Type, pointer: ir.Value, *offsets) -> ir.Value:
        return self.b.load(self.at(pointer, *offsets), typ=kind, align=1)

    def store(self, value: ir.Value, pointer: ir.Value, *offsets) -> None:
        self.b.store(value, self.at(pointer, *offsets), align=1)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """All lanes `scalar`, int32 or float32."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(self.i32, [0] * self.lanes))

    def bytes(self, vector: ir.Value) -> ir.Value:
        return self.b.bitcast(vector, self.i8)

    def below(self, count: ir.Value, first: int = 0) -> ir.Value:
        """The mask of lanes whose number, counted from `first`, is below the i64 `count`."""
        numbers = ir.Constant(self.i32, list(range(first, first + self.lanes)))
        return self.b.icmp_signed("<", numbers, self.splat(self.b.trunc(count, I32)))

    def load_some(self, mask: ir.Value, kind: ir.Type, pointer: ir.Value, *offsets) -> ir.Value:
        """The lanes of `mask`; the others are 0 and their memory is not touched."""
        name = f"llvm.masked.load.v{self.lanes}{'f32' if kind == self.f32 else 'i32'}.p0"
        function = ir.FunctionType(kind, [POINTER, self.mask, kind])
        function = cgutils.get_or_insert_function(self.b.module, function, name)
        return self.b.call(function, [self.at(pointer, *offsets), mask, ir.Constant(kind, None)])

    def store_some(self, mask: ir.Value, value: ir.Value, pointer: ir.Value, *offsets) -> None:
        name = f"llvm.masked.store.v{self.lanes}{'f32' if value.type == self.f32 else 'i32'}.p0"
        function = ir.FunctionType(ir.VoidType(), [value.type, POINTER, self.mask])
        function = cgutils.get_or_insert_function(self.b.module, function, name)
        self.b.call(function, [value, self.at(pointer, *offsets), mask])

    def prefetch(self, pointer: ir.Value, *offsets) -> None:
        """Ask for a cache line that will be read soon. The address may lie outside any array: nothing is read."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        read, near, data = ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)
        self.b.call(function, [self.at(pointer, *offsets), read, near, data])

    def loop(self, count: ir.Value, carried: list, body: Callable[[ir.Value, list], list]) -> list:
        """carried = body(i, carried) for i = 0 .. count - 1, in registers; `count` is at least 1."""
        before, head, after = self.b.block, self.b.append_basic_block("loop"), self.b.append_basic_block("after")
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(I64)
        i.add_incoming(self.k(0), before)
        phis = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        new = body(i, phis)
        following = self.b.add(i, self.k(1))
        i.add_incoming(following, self.b.block)
        for phi, value in zip(phis, new, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), head, after)
        self.b.position_at_end(after)
        return new

    def either(self, condition: ir.Value, yes: Callable[[], list], no: Callable[[], list]) -> list:
        """What `yes` or `no` returns: a branch."""
        results = []
        with self.b.if_else(condition) as (then, otherwise):
            for way_out, emit in ((then, yes), (otherwise, no)):
                with way_out:
                    results.append((emit(), self.b.block))
        (a, a_end), (b, b_end) = results
        merged = []
        for x, y in zip(a, b, strict=True):
            phi = self.b.phi(x.type)
            phi.add_incoming(x, a_end)
            phi.add_incoming(y, b_end)
            merged.append(phi)
        return merged

    # ---------------------------------------------------------------------------------- what differs between the ways
    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once; twice on the portable way, where a single rounding may mean a library call."""
        if self.way == "portable":
            return self.b.fadd(self.b.fmul(a, b), c)
        return self.call(f"llvm.fma.v{self.lanes}f32", self.f32, a, b, c)

    def halves(self, pointer: ir.Value, *offsets) -> ir.Value:
        """float32 of the finite float16 numbers at `pointer`, one per lane."""
        if self.way != "portable":
            return self.b.fpext(self.load(self.f16, pointer, *offsets), self.f32)
        # Without the processor's own conversion LLVM calls a library function that numba does not link. By integers then;
        # no float32 on the way is subnormal, so torch.set_flush_denormal changes nothing.
        b, raw = self.b, self.b.sext(self.load(ir.VectorType(I16, self.lanes), pointer, *offsets), self.i32)
        magnitude, sign = b.and_(raw, self.ints(0x7FFF)), b.and_(raw, self.ints(-(1 << 31)))
        normal = b.add(b.shl(magnitude, self.ints(13)), self.ints((127 - 15) << 23))  # the exponent's bias: 15 to 127
        small = b.fmul(b.sitofp(magnitude, self.f32), self.floats(2.0**-24))  # a subnormal float16
        is_small = b.icmp_signed("<", magnitude, self.ints(0x0400))
        bits = b.select(is_small, b.bitcast(small, self.i32), normal)
        return b.bitcast(b.or_(bits, sign), self.f32)

    def operand(self, codes: ir.Value, bits: int) -> ir.Value:
        """Codes, four bytes per lane, as `dot` wants them (see `zero_point`)."""
        return self.b.xor(codes, self.ints(-0x7F7F7F80)) if bits == 8 and not zero_point(self.way, 8) else codes

    def dot(self, total: ir.Value, codes: ir.Value, x: ir.Value, bits: int) -> ir.Value:
        """total [lanes] int32 + per lane the sum of four products code * x: unsigned codes of `bits` bits, signed x."""
        b = self.b
        w, x = self.bytes(codes), self.bytes(x)
        match self.way:
            case "avx512":
                return self.call("llvm.x86.avx512.vpdpbusd.512", self.i32, total, w, x)
            case "avxvnni":  # LLVM 20 and later types the operands as bytes, as it does for 512 bits
                return self.call("llvm.x86.avx512.vpdpbusd.256", self.i32, total, w, x)
            case "sdot":
                return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.i32, total, w, x)
            case "avx2":
                return b.add(total, self.widen(self.pairs(w, x, bits)))
        # Products of 16-bit numbers summed in neighbours: a shape that LLVM has an instruction for on most processors.
        wide = ir.VectorType(I32, 4 * self.lanes)
        narrow = ir.VectorType(I16, 4 * self.lanes)
        products = b.mul(b.sext(b.zext(w, narrow), wide), b.sext(b.sext(x, narrow), wide))
        return b.add(total, self.neighbours(self.neighbours(products)))

    def neighbours(self, vector: ir.Value) -> ir.Value:
        """Half as many lanes: the sums of neighbours."""
        count = vector.type.count // 2
        kind = ir.VectorType(I32, count)
        even, odd = (
            self.b.shuffle_vector(vector, vector, ir.Constant(kind, [2 * lane + step for lane in range(count)])) for step in (0, 1)
        )
        return self.b.add(even, odd)

    def pairs(self, w: ir.Value, x: ir.Value, bits: int) -> ir.Value:
        """AVX2: w * x summed over neighbouring bytes, int16 [2 * lanes]. vpmaddubsw saturates, so the sum must fit.

        Codes below 16 give at most 2 * 15 * 127. Signed bytes go in as |w| (unsigned) and x with the sign of w: at most
        2 * 128 * 127 = 32,512.
        """
        if bits == 8:
            w, x = self.call("llvm.abs.v32i8", self.i8, w, ir.Constant(I1, 0)), self.call("llvm.x86.avx2.psign.b", self.i8, x, w)
        return self.call("llvm.x86.avx2.pmadd.ub.sw", self.i16, w, x)

    def widen(self, pairs: ir.Value) -> ir.Value:
        """AVX2: neighbouring int16 summed to int32 (vpmaddwd by ones)."""
        return self.call("llvm.x86.avx2.pmadd.wd", self.i32, pairs, ir.Constant(self.i16, [1] * 2 * self.lanes))

    def lookup(self, table: list, indices: ir.Value) -> ir.Value:
        """table[index & 15] for each lane's int32 index; `table` is 16 float32 as `levels` loads them."""
        b = self.b
        match self.way:
            case "avx512":  # vpermps looks at the low four bits only
                return self.call("llvm.x86.avx512.permvar.sf.512", self.f32, table[0], indices)
            case "avxvnni" | "avx2":  # vpermps looks at three bits, vblendvps at the sign
                low, high = (self.call("llvm.x86.avx2.permps", self.f32, half, indices) for half in table)
                upper = b.icmp_signed("<", b.shl(indices, self.ints(28)), self.ints(0))
                return b.select(upper, high, low)
        out = ir.Constant(self.f32, ir.Undefined)
        offsets = b.shl(b.and_(indices, self.ints(15)), self.ints(2))
        for lane in range(self.lanes):
            position = ir.Constant(I32, lane)
            offset = b.zext(b.extract_element(offsets, position), I64)
            out = b.insert_element(out, self.load(F32, table[0], offset), position)
        return out

    def levels(self, pointer: ir.Value) -> list:
        """The table for `lookup`: 16 float32 at `pointer`, in registers where an instruction looks them up there."""
        match self.way:
            case "avx512":
                return [self.load(self.f32, pointer)]
            case "avxvnni" | "avx2":
                return [self.load(self.f32, pointer), self.load(self.f32, pointer, 32)]
        return [pointer]


# parameters of emitting functions that are addresses; all others are sizes
POINTERS = {"codes", "scales", "levels", "x", "xq", "sx", "start", "panel", "kept", "y", "q", "keys", "gain", "eps"}


def emitted(emit, variants: tuple[int, ...] = (), **fixed):
    """An intrinsic void(int64 ...) for a function that emits vector code: addresses and sizes in the order of its parameters.

    `fixed` are compile-time parameters. With `variants`, values of the compile-time parameter `tokens`, the intrinsic has
    each of them inside, and its first argument chooses.
    """
    names = [name for name in inspect.signature(emit).parameters if name not in {"v", "tokens", *fixed}]

    def typed(typingctx, *args):
        def codegen(context, builder, signature, values):
            v = Vectors(builder, way())
            tokens, rest = (values[0], values[1:]) if variants else (None, values)
            given = dict(fixed)
            for name, value in zip(names, rest, strict=True):
                given[name] = builder.inttoptr(value, POINTER) if name in POINTERS else value
            if not variants:
                emit(v, **given)
                return context.get_dummy_value()
            after = builder.append_basic_block("done")
            for n in variants:
                with builder.if_then(builder.icmp_signed("==", tokens, v.k(n))):
                    emit(v, tokens=n, **given)
                    builder.branch(after)
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.trap"), [])  # no silent nothing
            builder.unreachable()
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(args)), codegen

    return spelled(typed, [*["tokens"] * bool(variants), *names], emit.__name__)


def spelled(typed: Callable, names: list[str], name: str):
    """The intrinsic of `typed` (typingctx, *args) with as many arguments as there are `names`.

    numba reads their number off the signature, and would fold `*args` into one tuple.
    """
    parameters = [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in ("typingctx", *names)]
    typed.__signature__ = inspect.Signature(parameters)
    typed.__name__ = name
    return intrinsic(typed)


@intrinsic
def peek(typingctx, address):
    """The int64 at an address."""

    def codegen(context, builder, signature, values):
        return builder.load(builder.inttoptr(values[0], POINTER), typ=I64)

    return types.int64(types.int64), codegen


@intrinsic
def poke(typingctx, address, value):
    """Write an int64 to an address."""

    def codegen(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], POINTER))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def pointer(kind: types.Type):
    """An intrinsic: the address, an int64, as a pointer to numbers of numba's `kind`, of which `carray` makes an array."""

    def typed(typingctx, address):
        def codegen(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return spelled(typed, ["address"], f"pointer_{kind}")


@intrinsic
def call(typingctx, function, plan, part, parts):
    """Call the C function void(int64 *plan, int64 part, int64 parts) whose address is `function`."""

    def codegen(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [POINTER, I64, I64])
        # llvmlite wants the pointee's type to call through a pointer
        function = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(values[1], POINTER), *values[2:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
