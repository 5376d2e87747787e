"""The tools that look at calibration tokens: each gets the same ids, and at least the effort that it makes by itself.

A backend `(job, model, ids) -> Outcome` drives a tool through its own public entry, as its documentation shows, and
reads the dequantized weights out of what the tool leaves behind. Models are given in float32, so that no rounding of
activations to bfloat16 is held against a tool. Stored bits are those of the tool's own packed format.
"""

import tempfile

import torch
from torch import Tensor, nn

if __package__:
    from edgelab.peers.worker import Clock, Job, Outcome, batches, left_alone, no_method, settings, targets
else:  # in the tool's environment, where there is no edgelab
    from worker import Clock, Job, Outcome, batches, left_alone, no_method, settings, targets


def packed_bits(weight: Tensor, job: Job) -> float:
    """The bits of one [out, in] matrix: codes, and per group a 16-bit scale and, if asymmetric, a zero point of `bits` bits.

    GPTQ's own packing writes the same zero point for every group of a symmetric matrix. These constants are not
    counted: a format need not store them, and counting them would favour us.
    """
    out, n = weight.shape
    groups = out * (n // job.group_size if job.group_size > 0 else 1)
    return weight.numel() * job.bits + groups * (16 + (0 if job.symmetric else job.bits))


def tokenizer_of(job: Job):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(job.model, local_files_only=True, trust_remote_code=False)


# ----------------------------------------------------------------------------------------------------------- auto-round


def auto_round(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """Intel's AutoRound: rounding and ranges by signed gradient descent, block after block (arXiv 2309.05516).

    Methods: "signround" (its algorithm), "signround-ext" (with `enable_alg_ext`, the extension for low bits), "rtn"
    (its search of scales without training).
    """
    from auto_round import AutoRound

    known = {"signround": {}, "signround-ext": {"enable_alg_ext": True}, "rtn": {"iters": 0}}
    if job.method not in known:
        raise no_method(job, tuple(known))
    # bfloat16 while training (`amp`) is its own default
    s = settings(job, iters=200, batch_size=8, lr=None, amp=True, enable_torch_compile=False) | known[job.method]
    layers = targets(model, job)
    tool = AutoRound(
        model,
        tokenizer=tokenizer_of(job),
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        dataset=list(batches(ids)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        seed=job.seed,
        device_map="cpu",
        low_cpu_mem_usage=False,
        layer_config={name: {"bits": 16} for name in left_alone(model, job)},
        **{k: v for k, v in s.items() if v is not None},
    )
    with Clock() as clock:
        done, _ = tool.quantize()
    done = done if done is not None else model
    # it leaves out, without saying so to the caller, layers whose features are no multiple of 32: these have no scale
    tuned = {name: layer for name in layers if hasattr(layer := done.get_submodule(name), "scale")}
    weights = {f"{name}.weight": _unrounded(layer) for name, layer in tuned.items()}
    bits = sum(packed_bits(w, job) for w in weights.values())
    notes = [f"settings {s}, sym={job.symmetric}, {len(ids)} x {ids.shape[1]} tokens"]
    if len(tuned) < len(layers):
        left = [name for name in layers if name not in tuned]
        notes.append(f"left {len(left)} of {len(layers)} layers alone, such as {', '.join(left[:4])}")
    return Outcome(weights, bits, clock.seconds, notes)


def _unrounded(layer: nn.Module) -> Tensor:
    """AutoRound's values in float32: it leaves them in the dtype that it trained in, beside their scales and zero points.

    Raises RuntimeError where code times scale is not what it left.
    """
    left = layer.weight.detach().float().cpu()
    scale = torch.as_tensor(layer.scale).float().cpu().reshape(left.shape[0], -1)
    zero = torch.as_tensor(layer.zp).float().cpu()
    zero = zero.reshape(left.shape[0], -1) if zero.numel() > 1 else zero
    grouped = left.reshape(*scale.shape, -1)
    codes = (grouped / scale[..., None] + zero[..., None]).round()
    values = ((codes - zero[..., None]) * scale[..., None]).reshape(left.shape)
    if (values - left).abs().max() > 2.0**-7 * left.abs().max():
        raise RuntimeError(f"auto-round's scales do not give its weights back: they differ by {float((values - left).abs().max()):.2g}")
    return values


# ------------------------------------------------------------------------------------------------------------ gptqmodel


def gptqmodel(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """ModelCloud's GPTQModel. It loads, unfuses and saves by itself, so `model` only tells which weights are meant.

    The weights are read from the checkpoint that it saved: `q.model` is not usable after `save` (its packed zero
    points are off by the one that its v1 format takes away, and which loading gives back).
    """
    import os

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, job.threads)))  # its loader asks for two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    known = {"gptq": {}, "gptq-act-order": {"desc_act": True}, "gptq-mse": {"mse": 2.4}, "gptaq": {"gptaq": True}}
    if job.method not in known:
        raise no_method(job, tuple(known))
    s = settings(job, batch_size=8, damp_percent=None, act_group_aware=None) | known[job.method]
    batch_size = s.pop("batch_size")
    if s.get("gptaq"):
        from gptqmodel.quantization.config import GPTAQConfig

        s["gptaq"] = GPTAQConfig()
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        offload_to_disk=False,
        device="cpu",
        **{k: v for k, v in s.items() if v is not None},
    )
    layers = targets(model, job)
    q = GPTQModel.load(job.model, config, dtype=torch.float32, trust_remote_code=False)
    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    with Clock() as clock:
        q.quantize(examples, batch_size=batch_size)
    weights = {}
    with tempfile.TemporaryDirectory() as folder:
        q.save(folder)
        del q
        again = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
        modules = dict(again.model.named_modules())
        for name in layers:
            packed = modules.get(name)
            if hasattr(packed, "qweight"):
                weights[f"{name}.weight"] = packed.dequantize_weight().T.float()
    bits = sum(packed_bits(w, job) for w in weights.values())
    return Outcome(weights, bits, clock.seconds, [f"settings {s}, sym={job.symmetric}, {len(ids)} x {ids.shape[1]} tokens"])


# -------------------------------------------------------------------------------------------------------- llmcompressor


def llmcompressor(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """vLLM's LLM Compressor: GPTQ ("-mse": scales by its MSE observer), AWQ, SmoothQuant with GPTQ at W8A8, RTN.

    Of "smoothquant-gptq-w8a8" only the weights are handed back: per row, 8 bits, for activations of 8 bits per token.
    """
    import datasets
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    known = ("gptq", "gptq-mse", "awq", "smoothquant-gptq-w8a8", "rtn")
    if job.method not in known:
        raise no_method(job, known)
    w8a8 = job.method.endswith("w8a8")
    s = settings(job, observer=f"memoryless_{'mse' if job.method.endswith('mse') else 'minmax'}", actorder="static", duo_scaling="both")
    scheme = {"num_bits": job.bits, "type": "int", "symmetric": job.symmetric, "observer": s["observer"]}
    scheme |= {"strategy": "group", "group_size": job.group_size} if job.group_size > 0 else {"strategy": "channel"}
    group: dict = {"targets": ["Linear"], "weights": scheme}
    if w8a8:
        group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    common = {"config_groups": {"group_0": group}, "ignore": left_alone(model, job)}
    recipe = []
    if job.method.startswith("awq"):
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # page-locked memory is for copies to an accelerator; without one, torch refuses it
        if not torch.accelerator.is_available():
            IntermediatesCache.pin_memory = lambda self, *_, **__: None
        recipe.append(AWQModifier(duo_scaling=s["duo_scaling"]))
    if job.method.startswith("smoothquant"):
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        recipe.append(SmoothQuantModifier(smoothing_strength=0.5))
    recipe.append(GPTQModifier(actorder=s["actorder"], **common) if "gptq" in job.method else QuantizationModifier(**common))
    layers = targets(model, job)
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    with Clock() as clock:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            tokenizer=tokenizer_of(job),
            batch_size=8,
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
        )
    weights, bits = {}, 0.0
    for name in layers:
        layer = model.get_submodule(name)
        args = getattr(getattr(layer, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        scale, zero = layer.weight_scale.data, getattr(layer, "weight_zero_point", None)
        weights[f"{name}.weight"] = fake_quantize(layer.weight.data, scale, zero, args, getattr(layer, "weight_g_idx", None))
        bits += packed_bits(layer.weight, job)
        assert args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    note = f"settings {s}, symmetric={job.symmetric}, {len(ids)} x {ids.shape[1]} tokens; scales counted as 16 bits"
    return Outcome(weights, bits, clock.seconds, [note])


# --------------------------------------------------------------------------------------------------- neural-compressor


def neural_compressor_pt(job: Job, model: nn.Module, ids: Tensor) -> Outcome:
    """Intel's Neural Compressor: RTN, GPTQ and AWQ, each with its search of clipping ranges where it has one."""
    from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, RTNConfig, convert, prepare

    common = {"bits": job.bits, "group_size": job.group_size, "use_sym": job.symmetric, "use_layer_wise": False}
    known = {
        "rtn": lambda **s: RTNConfig(**common, **s),
        "gptq": lambda **s: GPTQConfig(**common, **s),
        "awq": lambda **s: AWQConfig(**common, **s),
    }
    if job.method not in known:
        raise no_method(job, tuple(known))
    defaults = {
        "rtn": {"use_mse_search": True, "use_full_range": True},
        "gptq": {"act_order": True, "static_groups": False, "use_mse_search": False},
        "awq": {"use_auto_scale": True, "use_auto_clip": True, "folding": False},
    }
    s = settings(job, **defaults[job.method])
    config = known[job.method](**s)
    for name in left_alone(model, job):
        config.set_local(name, type(config)(dtype="fp32"))
    layers = targets(model, job)

    def read(m: nn.Module) -> None:
        with torch.no_grad():
            for x in batches(ids, 1):
                m(x)

    with Clock() as clock:
        if job.method == "rtn":
            done = convert(prepare(model, config))
        else:
            model = prepare(model, config, example_inputs=ids[:1])
            read(model)
            done = convert(model)
    weights = {}
    for name in layers:
        layer = done.get_submodule(name)
        if hasattr(layer, "recover"):
            weights[f"{name}.weight"] = layer.recover()
        elif hasattr(layer, "linear"):  # AWQ without folding: x is multiplied by input_scale before the layer
            weights[f"{name}.weight"] = layer.linear.recover() * layer.input_scale
    bits = sum(packed_bits(w, job) for w in weights.values())
    return Outcome(weights, bits, clock.seconds, [f"settings {s}, sym={job.symmetric}, {len(ids)} x {ids.shape[1]} tokens"])
