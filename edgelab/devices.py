"""The kinds of device that `deploy` writes for: what comes first, how many threads, how much memory. Starting points, no measurements."""

from collections.abc import Mapping
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Device:
    """A kind of device. `targets`: with any shape, `fixed`: with one shape; the best first. `memory`: bytes that an app may take."""

    name: str
    about: str
    targets: tuple[str, ...]
    fixed: tuple[str, ...]
    threads: int
    why: str
    memory: int
    abi: str


DEVICES: Mapping[str, Device] = {
    d.name: d
    for d in (
        Device(
            "arm64",
            "Android phone, 64-bit Arm with at least four large or middle cores",
            ("android", "gguf"),
            ("litert", "onnx"),
            4,
            "decoding waits for memory, and small cores slow the large ones down: as many threads as there are large and middle cores",
            2 * GB,
            "arm64-v8a",
        ),
        Device(
            "arm64-low",
            "Android phone with small cores only (Cortex-A53 and A55) and 2 GB",
            ("android", "gguf"),
            ("litert", "onnx"),
            2,
            "the rest of the phone needs the other cores; two come close to what its memory delivers",
            GB // 2,
            "arm64-v8a",
        ),
        Device(
            "iphone",
            "iPhone; nothing of Apple's was at hand to run a file on (the Swift package of the target android is for it, too)",
            ("gguf", "coreml", "onnx"),
            ("coreml", "onnx"),
            2,
            "two performance cores; the efficiency cores slow them down",
            2 * GB,
            "arm64",
        ),
        Device(
            "linux-arm64", "single-board computer with 64-bit Arm", ("onnx", "gguf"), ("onnx",), 4, "its cores are alike", 3 * GB, "aarch64"
        ),
        Device(
            "x86-64",
            "laptop or server",
            ("onnx", "gguf"),
            ("openvino", "onnx"),
            4,
            "more than the memory can feed do not help",
            8 * GB,
            "x86_64",
        ),
        Device("browser", "any device with a browser", ("web",), (), 1, "threads need headers that static hosts do not send", GB, "wasm"),
    )
}
