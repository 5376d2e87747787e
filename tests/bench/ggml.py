"""llama.cpp's matmul, called through ctypes: `Ggml(threads).product("Q4_0", q, n, xs)`.

The libraries libggml*.so come with the package llama-cpp-python (`pip install llama-cpp-python`; the registry has its source
only, so that pip needs a C++ compiler and cmake, and some minutes) or lie in the folder that $GGML_LIB names. The calls
are those of llama.cpp's own loader: a weight goes into the first of the CPU's extra buffers that supports the product
(`CPU_REPACK` interleaves the rows of Q4_0 for the vector unit), else into a plain one, and each product is a graph of one node.
"""

import ctypes as c
import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

_SILENT = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda level, text, user: None)
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8}  # enum ggml_type


class _Params(c.Structure):
    """struct ggml_init_params, passed by value."""

    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool))


P, N = c.c_void_p, c.c_size_t
PROTOTYPES = {  # name: (result, arguments), of ggml.h, ggml-backend.h and ggml-cpu.h
    "ggml_log_set": (None, (P, P)),
    "ggml_init": (P, (_Params,)),
    "ggml_new_tensor_2d": (P, (P, c.c_int, c.c_int64, c.c_int64)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_nbytes": (N, (P,)),
    "ggml_row_size": (N, (c.c_int, c.c_int64)),
    "ggml_quantize_chunk": (N, (c.c_int, P, P, c.c_int64, c.c_int64, c.c_int64, P)),
    "ggml_new_graph": (P, (P,)),
    "ggml_graph_overhead": (N, ()),
    "ggml_tensor_overhead": (N, ()),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_backend_cpu_init": (P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (P, c.c_int)),
    "ggml_backend_get_device": (P, (P,)),
    "ggml_backend_dev_backend_reg": (P, (P,)),
    "ggml_backend_reg_get_proc_address": (P, (P, c.c_char_p)),
    "ggml_backend_dev_supports_op": (c.c_bool, (P, P)),
    "ggml_backend_cpu_buffer_type": (P, ()),
    "ggml_backend_buft_alloc_buffer": (P, (P, N)),
    "ggml_backend_buft_get_alloc_size": (N, (P, P)),
    "ggml_backend_buffer_get_base": (P, (P,)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_tensor_alloc": (c.c_int, (P, P, P)),
    "ggml_backend_tensor_set": (None, (P, P, N, N)),
    "ggml_backend_graph_compute": (c.c_int, (P, P)),
    "ggml_get_data": (P, (P,)),
    "ggml_free": (None, (P,)),
    "ggml_backend_free": (None, (P,)),
}


def folder() -> Path | None:
    """Where libggml*.so lie: $GGML_LIB, or inside the installed package llama_cpp; None when in neither."""
    spec = importlib.util.find_spec("llama_cpp")
    places = [os.environ.get("GGML_LIB", ""), str(Path(spec.origin).parent / "lib") if spec and spec.origin else ""]
    return next((Path(p) for p in places if p and (Path(p) / "libggml-cpu.so").is_file()), None)


def version() -> str | None:
    """Of the library that `Ggml` uses; None where there is none."""
    found = folder()
    if found is None:
        return None
    base = c.CDLL(str(found / "libggml-base.so"))
    if not hasattr(base, "ggml_version"):
        return "unknown"
    base.ggml_version.restype = c.c_char_p
    return base.ggml_version().decode()


class Ggml:
    """llama.cpp's CPU backend with its number of threads. Its memory goes back when it and all functions it made are gone."""

    def __init__(self, threads: int) -> None:
        found = folder()
        if found is None:
            raise ImportError("libggml-cpu.so is not there: pip install llama-cpp-python, or name the library's folder in GGML_LIB")
        libraries = [c.CDLL(str(found / f"libggml{part}.so"), mode=c.RTLD_GLOBAL) for part in ("-base", "-cpu")]
        for name, (result, arguments) in PROTOTYPES.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_SILENT, None)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.backend_get_device(self.backend)
        address = self.backend_reg_get_proc_address(self.backend_dev_backend_reg(self.device), b"ggml_backend_dev_get_extra_bufts")
        extra = c.CFUNCTYPE(c.POINTER(P), P)(address)(self.device) if address else [None]  # an array that ends with NULL
        self.plain = self.backend_cpu_buffer_type()
        self.kinds = [*itertools.takewhile(bool, extra), self.plain]
        self.contexts, self.buffers, self.outputs = [], [], {}

    def quantize(self, kind: str, w: np.ndarray) -> np.ndarray:
        """`w` float32 [out, in] as llama.cpp's bytes of that type: uint8 [out, row_bytes]."""
        out, n = w.shape
        q = np.empty((out, self.row_size(TYPES[kind], n)), np.uint8)
        self.quantize_chunk(TYPES[kind], w.ctypes.data, q.ctypes.data, 0, out, n, None)
        return q

    def put(self, x: np.ndarray) -> int:
        """The tensor of x float32 [tokens, in], for `product`."""
        tensor = self.new_tensor_2d(self._context(1, 0), TYPES["F32"], x.shape[1], len(x))
        self._place(tensor, self.plain)
        self.backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
        return tensor

    def product(self, kind: str, q: np.ndarray, n: int, xs: dict[int, int]) -> dict[int, Callable[[], np.ndarray]]:
        """{tokens: a function that returns x W^T float32 [tokens, out]} of W as `quantize` gave it and {tokens: what `put` gave}."""
        ctx = self._context(len(self.kinds) * 2 + len(xs), len(xs))
        w, runs = self._weight(ctx, kind, q, n, next(iter(xs.values()))), {}
        for tokens, x in xs.items():
            y = self.mul_mat(ctx, w, x)
            if (tokens, len(q)) in self.outputs:  # all products of a shape write to one place, as the next layer would read it
                self.backend_tensor_alloc(self.outputs[tokens, len(q)], y, self.backend_buffer_get_base(self.outputs[tokens, len(q)]))
            else:
                self.outputs[tokens, len(q)] = self._place(y, self.plain)
            graph = self.new_graph(ctx)
            self.build_forward_expand(graph, y)
            array = np.ctypeslib.as_array(c.cast(self.get_data(y), c.POINTER(c.c_float)), (tokens, len(q)))
            runs[tokens] = self._run(graph, array)
        return runs

    def __del__(self) -> None:
        if not hasattr(self, "outputs"):  # it was not made
            return
        for buffer in self.buffers:
            self.backend_buffer_free(buffer)
        for context in self.contexts:
            self.free(context)
        self.backend_free(self.backend)

    def _context(self, tensors: int, graphs: int) -> int:
        size = tensors * self.tensor_overhead() + graphs * self.graph_overhead() + 4096  # what describes them; data lie in buffers
        self.contexts.append(self.init(_Params(size, None, True)))
        return self.contexts[-1]

    def _place(self, tensor: int, kind: int) -> int:
        """The buffer of that kind that was made for `tensor`."""
        buffer = self.backend_buft_alloc_buffer(kind, self.backend_buft_get_alloc_size(kind, tensor))
        if not buffer or self.backend_tensor_alloc(buffer, tensor, self.backend_buffer_get_base(buffer)):
            raise MemoryError(f"ggml cannot place {self.nbytes(tensor)} bytes")
        self.buffers.append(buffer)
        return buffer

    def _weight(self, ctx: int, kind: str, q: np.ndarray, n: int, x: int) -> int:
        for place in self.kinds:  # the plain one is the last, and takes every type
            w = self.new_tensor_2d(ctx, TYPES[kind], n, len(q))
            buffer = self._place(w, place)
            if place == self.plain or self.backend_dev_supports_op(self.device, self.mul_mat(ctx, w, x)):  # it looks where w lies
                break
            self.buffers.remove(buffer)
            self.backend_buffer_free(buffer)
        self.backend_tensor_set(w, q.ctypes.data, 0, q.nbytes)
        return w

    def _run(self, graph: int, y: np.ndarray) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            self.backend_graph_compute(self.backend, graph)
            return y

        return run
