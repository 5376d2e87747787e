"""The tools that need no calibration: each is given one [out, in] matrix after the other.

Scales and zero points are rounded to the dtype in which the tool stores them (float16, if the tool leaves the choice
to the model's dtype), so that a tool is not measured with more bits than are counted.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

if __package__:
    from edgelab.peers.worker import Clock, Job, Outcome, no_method, settings, targets
else:  # in the tool's environment, where there is no edgelab
    from worker import Clock, Job, Outcome, no_method, settings, targets


def each(job: Job, model: nn.Module, quantize: Callable[[Tensor], tuple[Tensor, float]], notes: list[str]) -> Outcome:
    """`quantize` of every weight of the job: (dequantized, stored bits)."""
    weights, bits = {}, 0.0
    with Clock() as clock, torch.no_grad():
        for name, layer in targets(model, job).items():
            weights[f"{name}.weight"], stored = quantize(layer.weight.detach())
            bits += stored
    return Outcome(weights, bits, clock.seconds, notes)


def bits_of(*tensors: Tensor) -> int:
    return sum(8 * t.numel() * t.element_size() for t in tensors)


def bitsandbytes(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """NF4 and FP4 (arXiv 2305.14314), a float32 scale per block; "-double": scales in 8 bits, 256 of them to a block."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind, _, double = job.method.partition("-")
    if kind not in ("nf4", "fp4") or double not in ("", "double"):
        raise no_method(job, ("nf4", "nf4-double", "fp4", "fp4-double"))
    if job.bits != 4:
        raise ValueError(f"bits={job.bits}; {job.method} has 4")

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        codes, state = quantize_4bit(w, blocksize=job.group_size, compress_statistics=bool(double), quant_type=kind)
        inner = (state.state2.absmax,) if double else ()  # the two code tables, 16 and 256 numbers for all, are not counted
        return dequantize_4bit(codes, state), bits_of(codes, state.absmax, *inner)

    settings(job)
    return each(job, model, quantize, [f"blocks of {job.group_size}" + (", double quantization" if double else "")])


def hqq(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """Half-quadratic quantization along the input (axis=1): float16 scale and unrounded float16 zero point per group."""
    from hqq.core.quantize import Quantizer

    if job.method != "hqq":
        raise no_method(job, ("hqq",))
    s = settings(job, optimize=True, round_zero=False)

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        codes, meta = Quantizer.quantize(w, nbits=job.bits, group_size=job.group_size, axis=1, device="cpu", bitpack=False, **s)
        scale, zero = meta["scale"].half(), meta["zero"].half()
        values = (codes.float().reshape(scale.shape[0], -1) - zero.float()) * scale.float()
        return values.reshape(w.shape), codes.numel() * job.bits + bits_of(scale, zero)

    return each(job, model, quantize, [f"axis=1, settings {s}; 3 bits are counted as 3 though it packs ten of them into 32"])


def optimum_quanto(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """quanto's qint2, qint4 (scale and shift per group) and qint8 (scale per row)."""
    from optimum.quanto import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer, qtypes, quantize_weight

    optimizers = {"max": MaxOptimizer, "hqq": HqqOptimizer}
    if job.method not in optimizers:
        raise no_method(job, tuple(optimizers))
    if job.bits not in (2, 4, 8):
        raise ValueError(f"bits={job.bits}; optimum-quanto has 2, 4 and 8")
    qtype = qtypes[f"qint{job.bits}"]
    settings(job)

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        if job.bits == 8:
            scale = AbsmaxOptimizer()(w, qtype=qtype, axis=0).half().float()
            return quantize_weight(w, qtype=qtype, axis=0, scale=scale, optimized=False).dequantize(), w.numel() * 8 + scale.numel() * 16
        scale, shift = optimizers[job.method]()(w, qtype=qtype, axis=0, group_size=job.group_size)
        scale, shift = scale.half().float(), shift if shift.dtype == torch.uint8 else shift.half().float()
        q = quantize_weight(w, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=job.group_size, optimized=False)
        shift_bits = 8 if shift.dtype == torch.uint8 else 16
        return q.dequantize(), w.numel() * job.bits + scale.numel() * (16 + shift_bits)

    return each(job, model, quantize, [f"{optimizers[job.method].__name__}"])


def torchao(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """torchao's IntxWeightOnlyConfig; "intx-hqq" chooses scales (and zero points, if asymmetric) by HQQ."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    if job.method not in ("intx", "intx-hqq"):
        raise no_method(job, ("intx", "intx-hqq"))
    extra = {}
    if job.method == "intx-hqq":
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

        extra = {"intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY}
    settings(job)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size) if job.group_size > 0 else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        **extra,
    )

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        holder = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
        holder[0].weight = nn.Parameter(w.clone(), requires_grad=False)
        quantize_(holder, config)
        q = holder[0].weight
        zeros = 0 if job.symmetric else q.scale.numel() * job.bits
        return q.dequantize().float(), w.numel() * job.bits + q.scale.numel() * 16 + zeros

    return each(job, model, quantize, ["IntxWeightOnlyConfig, float16 scales"])


def onnxruntime(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """ONNX Runtime's block quantizer of MatMulNBits, 4 bits: w = scale * (code - zero point), zero point 8 if symmetric."""
    import numpy as np
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    if job.method != "rtn":
        raise no_method(job, ("rtn",))
    if job.bits != 4:
        raise ValueError(f"bits={job.bits}; this backend reads ONNX Runtime's 4 bits only")
    settings(job)
    tool = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=job.group_size, is_symmetric=job.symmetric, bits=4))

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        out, n = w.shape
        packed, scales, zeros = tool.qbits_block_quant(np.ascontiguousarray(w.numpy().T))
        low, high = packed & 15, packed >> 4  # [out, groups, group_size / 2], the even weight in the low half
        codes = np.stack([low, high], -1).reshape(out, -1, job.group_size).astype(np.float32)
        groups = codes.shape[1]
        if job.symmetric:
            zero = np.full((out, groups), 8, np.float32)
        else:
            z = np.asarray(zeros).reshape(out, -1)
            zero = np.stack([z & 15, z >> 4], -1).reshape(out, -1)[:, :groups].astype(np.float32)
        scale = np.asarray(scales).reshape(out, groups).astype(np.float16).astype(np.float32)
        values = ((codes - zero[..., None]) * scale[..., None]).reshape(out, -1)[:, :n]
        return torch.from_numpy(values.copy()), w.numel() * 4 + out * groups * (16 + (0 if job.symmetric else 4))

    return each(job, model, quantize, ["scales rounded to float16"])


def nncf(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """OpenVINO's NNCF, compress_weights without data: INT4_SYM, INT4_ASYM, INT8_SYM or INT8_ASYM.

    Its layers unpack inside their forward pass, so the values are read off the image of the unit vectors.
    """
    import nncf as tool

    if job.method != "int":
        raise no_method(job, ("int",))
    if job.bits not in (4, 8):
        raise ValueError(f"bits={job.bits}; nncf has 4 and 8")
    settings(job)
    mode = tool.CompressWeightsMode[f"INT{job.bits}_{'SYM' if job.symmetric else 'ASYM'}"]
    grouped = {"group_size": job.group_size, "ratio": 1.0, "all_layers": True} if job.bits == 4 else {}

    def quantize(w: Tensor) -> tuple[Tensor, float]:
        out, n = w.shape
        holder = nn.Linear(n, out, bias=False).eval()
        holder.weight = nn.Parameter(w.clone(), requires_grad=False)
        small = tool.compress_weights(holder, mode=mode, dataset=tool.Dataset([torch.zeros(1, n)]), **grouped)
        groups = out * (n // job.group_size if job.bits == 4 and job.group_size > 0 else 1)
        return small(torch.eye(n)).T.contiguous(), w.numel() * job.bits + groups * (16 + (0 if job.symmetric else job.bits))

    return each(job, model, quantize, [f"{mode.name}, data-free, float16 scales"])
