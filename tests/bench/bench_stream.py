"""Streaming compression against the same bytes read and written alone: `make bench ARGS="-k stream"`.

The plain copy reads the checkpoint in the same blocks on as many threads, writes as many bytes as the bundle has into files as large as
its chunks, and has each on the disk before it is renamed, as `edgelab.stream` does: what is left out is the rounding, the packing
and the hashing. Both take turns, with the checkpoint out of the page cache, so that disk and neighbours are the same for both.

By hand, on a checkpoint of any size (see make_checkpoint.py), with kills at random moments:

    python tests/bench/bench_stream.py CHECKPOINT WORK --turns 3 --cold --kills 10
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCHEME = "int4-g32"
BLOCK = 2 * 2**20
CHILD = """
import resource, sys, time
from edgelab import Recipe
from edgelab.stream import compress_checkpoint
start, cpu = time.perf_counter(), time.process_time()
compress_checkpoint(sys.argv[1], sys.argv[2], Recipe.uniform(sys.argv[3]), progress=False)
print(time.perf_counter() - start, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def stream(folder: Path, out: Path) -> tuple[float, float, int]:
    """Seconds, CPU seconds and peak RSS in bytes of a process that compresses `folder` to `out`; imports are not timed."""
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.run([sys.executable, "-c", CHILD, folder, out, SCHEME], capture_output=True, text=True, check=True)
    seconds, cpu, peak = run.stdout.split()[-3:]
    return float(seconds), float(cpu), int(peak)


def plain(folder: Path, like: Path, out: Path, threads: int | None = None) -> float:
    """Seconds to read all of the checkpoint in `folder` and write files as large as those of the bundle `like` to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    threads = threads or len(os.sched_getaffinity(0))
    start = time.perf_counter()
    reads = [(f, at) for f in sorted(folder.glob("*.safetensors")) for at in range(0, f.stat().st_size, BLOCK)]
    sizes = [f.stat().st_size for f in sorted(like.glob("*.safetensors"))]
    share = sum(sizes) / len(reads)  # bytes to write per block read
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def work(number: int) -> None:
        """The reads and writes of one chunk file, and its fsync."""
        begin, end = ends[number] - sizes[number], ends[number]
        buffer, zeros = bytearray(BLOCK), memoryview(os.urandom(BLOCK))
        with (out / f"{number}.part").open("wb", buffering=0) as f:
            for file, at in reads[round(begin / share) : round(end / share)]:
                with file.open("rb", buffering=0) as source:
                    source.seek(at)
                    source.readinto(buffer)
                left = min(round(share), sizes[number] - f.tell())
                f.write(zeros[:left])
            while f.tell() < sizes[number]:
                f.write(zeros[: sizes[number] - f.tell()])
            os.fsync(f.fileno())
        (out / f"{number}.part").rename(out / f"{number}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(len(sizes))))
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def forget(folder: Path) -> None:
    """Take the files of `folder` out of the page cache."""
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def digest(bundle: Path) -> str:
    """The sha256 of all files of `bundle`, names included."""
    total = hashlib.sha256()
    for file in sorted(bundle.rglob("*")):
        if file.is_file():
            with file.open("rb") as f:
                total.update(file.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def killed(folder: Path, out: Path, times: int, longest: float, seed: int = 0) -> int:
    """Kill the compression at `times` random moments, each up to `longest` seconds after it began to work; then let it end.

    The number of kills that met a process at work. Raises AssertionError when something half-written lies at `out`.
    """
    shutil.rmtree(out, ignore_errors=True)
    moments, hits, folder_of_work = random.Random(seed), 0, out.parent / f".{out.name}.stream"
    for _ in range(times):
        child = subprocess.Popen([sys.executable, "-c", CHILD, folder, out, SCHEME], stdout=subprocess.DEVNULL)
        before = folder_of_work.stat().st_mtime_ns if folder_of_work.exists() else 0
        while child.poll() is None and (not folder_of_work.exists() or folder_of_work.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, longest))
        hits += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not out.exists() or child.returncode == 0, f"a killed run left something at {out}"
        whole = len(list((folder_of_work / "bundle").glob("*.safetensors"))) if folder_of_work.exists() else "all"
        print(f"killed: {whole} chunks are whole", flush=True)
        if child.returncode == 0:
            break
    stream_again = subprocess.run([sys.executable, "-c", CHILD, folder, out, SCHEME], check=True, stdout=subprocess.DEVNULL)
    assert stream_again.returncode == 0 and not folder_of_work.exists()
    return hits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from make_checkpoint import make

    folder = tmp_path_factory.mktemp("stream") / "half"
    make(folder, billions=1.1, shard_bytes=500 * 10**6)  # one layer, embedding and head: 1.9 GB
    return folder


@pytest.mark.benchmark(min_rounds=3, max_time=1)
def bench_stream(benchmark, checkpoint):
    out, copy = checkpoint.parent / "bundle", checkpoint.parent / "copy"
    stream(checkpoint, out)  # compiles
    alone, ours = [], []

    def turn() -> None:
        forget(checkpoint)  # a checkpoint larger than memory is not in the page cache either
        alone.append(plain(checkpoint, out, copy))
        forget(checkpoint)
        ours.append(stream(checkpoint, out))

    benchmark.pedantic(turn, rounds=3)
    seconds, peak = statistics.median(s for s, _, _ in ours), max(p for _, _, p in ours)
    benchmark.extra_info |= {"plain_seconds": statistics.median(alone), "stream_seconds": seconds, "peak_rss": peak}
    benchmark.extra_info["ratio"] = statistics.median(alone) / seconds
    assert benchmark.extra_info["ratio"] >= 0.5 and peak < 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path, help="a folder on the same disk, with room for two bundles")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="take the checkpoint out of the page cache before each")
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    out, read = given.work / "bundle", sum(f.stat().st_size for f in given.checkpoint.glob("*.safetensors"))
    seconds, _, peak = stream(given.checkpoint, out)
    written = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    print(f"{read / 1e9:.2f} GB to {written / 1e9:.2f} GB, first run {seconds:.1f} s, peak RSS {peak / 1e9:.3f} GB", flush=True)
    ratios = []
    for _ in range(given.turns):
        if given.cold:
            forget(given.checkpoint)
        alone = plain(given.checkpoint, out, given.work / "copy")
        if given.cold:
            forget(given.checkpoint)
        seconds, cpu, peak = stream(given.checkpoint, out)
        ratios.append(alone / seconds)
        print(
            f"plain {alone:.1f} s, stream {seconds:.1f} s ({cpu:.1f} s of CPU), {ratios[-1]:.2f} of the plain speed, "
            f"peak RSS {peak / 1e9:.3f} GB",
            flush=True,
        )
    if ratios:
        print(f"median {statistics.median(ratios):.2f} of the speed of reading and writing alone ({'cold' if given.cold else 'warm'})")
    if given.kills:
        want = digest(out)
        hits = killed(given.checkpoint, given.work / "killed", given.kills, longest=0.15 * seconds)
        got = digest(given.work / "killed")
        print(f"{hits} kills at work; sha256 {got[:16]}, uninterrupted {want[:16]}: {'the same' if got == want else 'DIFFERENT'}")
        sys.exit(got != want)


if __name__ == "__main__":
    main()
