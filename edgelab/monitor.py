"""What a deployed model does, as numbers: latency, throughput, confidence, memory, errors; for Prometheus too, on this machine alone.

**Latency** is kept apart as time to the first token (with the prompt, and waiting in a queue) and time per further token, each in a
histogram whose buckets are Prometheus's cumulative ones. **Accuracy** can't be seen without knowing what is right, so it is the
share of answers that somebody judged (`feedback`), with Wilson's interval. What can always be seen is **confidence**, the
probability that the model gave to the token it chose; its mean over a request is watched for a fall by Page and Hinkley's test:

    m_t = sum_{i<=t} (x_i - mean_i + delta),   M_t = max_{i<=t} m_i,   alarm when  M_t - m_t > threshold

(Page 1954, Biometrika 41, "Continuous inspection schemes"; Hinkley 1971, Biometrika 58. The running mean in place of a known one as in
Gama et al. 2014, ACM Computing Surveys 46(4), "A survey on concept drift adaptation".) Falls of less than `delta` are let go; a fall by d
is found after about threshold / (d - delta) requests. Confidence that falls says that inputs changed or the model broke, not that
answers are wrong.

Counting needs the standard library and psutil. `text` and `serve` need the package prometheus-client (extra "monitor").
"""

import math
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from edgelab import html_table

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
QUEUE_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LOCALHOST = "127.0.0.1"


class Histogram:
    """Counts by upper bound, as Prometheus keeps them: a value that equals a bound is in its bucket; the last bucket has none."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.recent: deque[float] = deque(maxlen=1024)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
        self.recent.append(value)

    @property
    def n(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """[(upper bound as text, values up to it)], the last one "+Inf".

        >>> h = Histogram([1.0, 2.0])
        >>> for v in (0.5, 1.0, 1.5, 9.0): h.add(v)
        >>> h.cumulative()
        [('1.0', 2), ('2.0', 3), ('+Inf', 4)]
        """
        below, found = 0, []
        for bound, count in zip((*map(lambda b: str(float(b)), self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            found.append((bound, below))
        return found

    def quantile(self, q: float) -> float:
        """Of the latest 1,024 values, the smallest that at least a share q of them does not exceed; NaN for none."""
        values = sorted(self.recent)
        return values[max(0, math.ceil(q * len(values)) - 1)] if values else math.nan


class PageHinkley:
    """The test for a falling mean; see the module's docstring. It begins anew after an alarm.

    >>> test = PageHinkley(delta=0.0, threshold=1.0, least=2)
    >>> [test.update(x) for x in (1.0, 1.0, 0.0, 0.0)]  # means 1, 1, 2/3, 1/2: m falls by 2/3, then by 1/2 more
    [False, False, False, True]
    """

    def __init__(self, delta: float = 0.02, threshold: float = 1.0, least: int = 30) -> None:
        if not delta >= 0 or not threshold > 0 or least < 1:
            raise ValueError(f"delta={delta}, threshold={threshold}, least={least}: give delta >= 0, threshold > 0, least >= 1")
        self.delta, self.threshold, self.least = delta, threshold, least
        self._begin()

    def _begin(self) -> None:
        self.n, self.mean, self._sum, self._max = 0, 0.0, 0.0, -math.inf

    @property
    def statistic(self) -> float:
        """M_t - m_t: how far below its highest the sum lies."""
        return self._max - self._sum if self.n else 0.0

    def update(self, x: float) -> bool:
        """Takes the next value; True is the alarm, not before `least` values since the last."""
        self.n += 1
        self.mean += (x - self.mean) / self.n
        self._sum += x - self.mean + self.delta
        self._max = max(self._max, self._sum)
        if self.n >= self.least and self.statistic > self.threshold:
            self._begin()
            return True
        return False


@dataclass(frozen=True)
class Alarm:
    """Confidence fell: at which request (counted from 1), its mean before, and over the 10 requests up to the alarm."""

    request: int
    before: float
    after: float


@dataclass
class _Counts:
    """What is counted. One lock, the monitor's, guards it."""

    first: Histogram = field(default_factory=lambda: Histogram(FIRST_S))
    token: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    queue: Histogram = field(default_factory=lambda: Histogram(QUEUE_S))
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    confidence: Histogram = field(default_factory=lambda: Histogram(SHARES))
    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    unusable: int = 0  # confidences that are no number from 0 to 1
    errors: Counter[str] = field(default_factory=Counter)
    feedback: Counter[bool] = field(default_factory=Counter)


class Monitor:
    """Observes requests from any thread; shows itself as a table, writes itself as Prometheus text.

    `window_s`: over how many past seconds throughput is told. `clock` in seconds is there to be replaced.
    """

    def __init__(
        self, name: str = "edgelab", drift: PageHinkley | None = None, window_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not name.isidentifier() or not name.isascii():
            raise ValueError(f"name={name!r} begins the metrics' names: use ASCII letters, digits and _, not a digit first")
        if not window_s > 0:
            raise ValueError(f"window_s={window_s} must be more than 0")
        self.name, self.window_s = name, window_s
        self.alarms: list[Alarm] = []
        self._drift = PageHinkley() if drift is None else drift
        self._means: deque[float] = deque(maxlen=10)  # confidence of the latest requests
        self._lock, self._clock = threading.Lock(), clock
        self._began = clock()
        self._done: deque[tuple[float, int]] = deque()  # (when, tokens) within the window
        self._c = _Counts()

    # ---------------------------------------------------------------------------------------------------- observing

    def observe(
        self, seconds: Sequence[float], confidences: Sequence[float] = (), *, prompt_tokens: int = 0, new_tokens: int | None = None
    ) -> bool:
        """A finished request: `seconds` that each token took, the first with all that came before it. True: confidence fell.

        `new_tokens` where that is not their number (a token that stops takes time and is no output).
        """
        seconds = [float(s) for s in seconds]
        if any(not s >= 0 for s in seconds):
            raise ValueError(f"seconds={min(seconds)} is no duration; give seconds per token, 0 or more")
        usable = [float(p) for p in confidences if 0 <= p <= 1]
        tokens = len(seconds) if new_tokens is None else int(new_tokens)
        with self._lock:
            c, now = self._c, self._clock()
            c.requests += 1
            c.tokens += tokens
            c.prompt_tokens += prompt_tokens
            c.unusable += len(confidences) - len(usable)
            for i, s in enumerate(seconds):
                (c.token if i else c.first).add(s)
            for p in usable:
                c.confidence.add(p)
            self._done.append((now, tokens))
            self._forget(now)
            if not usable:
                return False
            before, mean = self._drift.mean, sum(usable) / len(usable)
            self._means.append(mean)
            fell = self._drift.update(mean)
            if fell:
                self.alarms.append(Alarm(c.requests, before, sum(self._means) / len(self._means)))
            return fell

    def generation(self, g: Any) -> bool:
        """A finished `Generation` of the runtime: its prefill is the time to the first token, its decoding is shared out evenly."""
        n = len(g.tokens)
        seconds = [g.prefill_s, *([g.decode_s / (n - 1)] * (n - 1) if n > 1 else [])] if n else []
        return self.observe(seconds, g.confidences, prompt_tokens=g.prompt_tokens)

    def watch(self, tokens: Iterable, prompt_tokens: int = 0) -> Iterator:
        """The same `tokens`, timed as they pass; an error that ends them is counted in place of an answer, and raised on."""
        at, seconds = self._clock(), []
        try:
            for token in tokens:
                now = self._clock()
                seconds.append(now - at)
                yield token
                at = self._clock()  # what the reader does with a token is not the model's time
        except GeneratorExit:  # the reader has enough: an answer all the same
            pass
        except BaseException as error:
            self.failed(error)
            raise
        if seconds:
            self.observe(seconds, prompt_tokens=prompt_tokens)

    def failed(self, error: BaseException | None) -> None:
        """A request that ended without an answer; counted by the error's kind."""
        with self._lock:
            self._c.errors[type(error).__name__] += 1

    def queued(self, seconds: float) -> None:
        """A request was admitted after `seconds` in the queue."""
        with self._lock:
            self._c.queue.add(float(seconds))

    def stepped(self, rows: int) -> None:
        """The engine took a step of `rows` requests together."""
        with self._lock:
            self._c.rows.add(rows)

    def feedback(self, right: bool) -> None:
        """Somebody judged an answer."""
        with self._lock:
            self._c.feedback[bool(right)] += 1

    # ------------------------------------------------------------------------------------------------------ telling

    def _forget(self, now: float) -> None:
        while self._done and self._done[0][0] <= now - self.window_s:
            self._done.popleft()

    @property
    def uptime_s(self) -> float:
        """Seconds since the monitor began."""
        return self._clock() - self._began

    def tokens_per_s(self) -> float:
        """Tokens of the requests that finished within the last `window_s`, per second of it (of the time since the start, if shorter)."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            length = min(self.window_s, self.uptime_s)
            return sum(n for _, n in self._done) / length if length > 0 else 0.0

    def confidence(self) -> float:
        """Mean of the latest 1,024 tokens' confidence; NaN for none."""
        with self._lock:
            recent = self._c.confidence.recent
            return sum(recent) / len(recent) if recent else math.nan

    def accuracy(self) -> tuple[float, float, float] | None:
        """(share of judged answers that were right, low, high of Wilson's 95 % interval); None where none was judged."""
        with self._lock:
            right, wrong = self._c.feedback[True], self._c.feedback[False]
        return None if right + wrong == 0 else wilson(right, right + wrong)

    def summary(self) -> list[dict[str, str]]:
        """The numbers in words, a dict per line: {"what", "value"}."""
        with self._lock:
            c = self._c
            latency = {
                what: f"{_ms(h.quantile(0.5))}, 95 %: {_ms(h.quantile(0.95))}"
                for what, h in (("time to first token, median", c.first), ("time per token, median", c.token), ("queued, median", c.queue))
                if h.n
            }
            rows = f"{c.rows.total / c.rows.n:.2f}" if c.rows.n else ""
            counts = {"requests": f"{c.requests:,}", "tokens written": f"{c.tokens:,}", "tokens read": f"{c.prompt_tokens:,}"}
            errors = ", ".join(f"{n} {kind}" for kind, n in sorted(c.errors.items())) or "none"
        judged, confidence = self.accuracy(), self.confidence()
        told = counts | {"errors": errors} | latency | {f"tokens per second, last {self.window_s:g} s": f"{self.tokens_per_s():.1f}"}
        told |= {"requests per step, mean": rows} if rows else {}
        told |= {} if math.isnan(confidence) else {"confidence, mean": f"{confidence:.3f}"}
        told |= {"falls of confidence": str(len(self.alarms)) + "".join(f"; at request {a.request}" for a in self.alarms[-1:])}
        if judged:
            told["right, of those judged"] = f"{100 * judged[0]:.1f} % [{100 * judged[1]:.1f}, {100 * judged[2]:.1f}]"
        told["memory of this process"] = f"{psutil.Process().memory_info().rss / 1e6:,.0f} MB"
        return [{"what": k, "value": v} for k, v in told.items()]

    def __repr__(self) -> str:
        return f"Monitor({', '.join(r['what'] + ': ' + r['value'] for r in self.summary())})"

    def _repr_html_(self) -> str:
        return html_table.facts((r["what"], r["value"]) for r in self.summary())

    def collect(self) -> Iterator:
        """The metrics as prometheus_client's families: what makes a monitor a collector that any registry takes."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        speed, confidence = self.tokens_per_s(), self.confidence()
        rss = psutil.Process().memory_info().rss
        with self._lock:
            c, found = self._c, []
            for what, about, value in (
                ("requests", "Requests that were answered.", c.requests),
                ("tokens", "Tokens that were written.", c.tokens),
                ("prompt_tokens", "Tokens that were read.", c.prompt_tokens),
                ("confidence_falls", "Alarms of the Page-Hinkley test on the confidence of requests.", len(self.alarms)),
                ("confidences_unusable", "Confidences that are no number from 0 to 1.", c.unusable),
            ):
                found.append(CounterMetricFamily(f"{self.name}_{what}", about, value=value))
            errors = CounterMetricFamily(f"{self.name}_errors", "Requests that ended without an answer.", labels=["kind"])
            for kind, n in sorted(c.errors.items()):
                errors.add_metric([kind], n)
            judged = CounterMetricFamily(f"{self.name}_feedback", "Answers that were judged.", labels=["right"])
            for right in (True, False):
                judged.add_metric([str(right).lower()], c.feedback[right])
            found += [errors, judged]
            for what, about, h in (
                ("first_token_seconds", "Time to the first token, queue and prompt included.", c.first),
                ("token_seconds", "Time of each further token.", c.token),
                ("queue_seconds", "Time that requests waited to be admitted.", c.queue),
                ("step_rows", "Requests that shared a step.", c.rows),
                ("confidence", "Probability of the token that was chosen.", c.confidence),
            ):
                found.append(HistogramMetricFamily(f"{self.name}_{what}", about, buckets=h.cumulative(), sum_value=h.total))
            for what, about, value in (
                ("tokens_per_second", f"Tokens written per second, over {self.window_s:g} s.", speed),
                ("confidence_mean", "Mean confidence of the latest 1024 tokens.", confidence),
                ("confidence_statistic", "Page-Hinkley statistic; an alarm above its threshold.", self._drift.statistic),
                ("resident_bytes", "Resident memory of the process.", rss),
            ):
                found.append(GaugeMetricFamily(f"{self.name}_{what}", about, value=value))
        yield from found

    def _registry(self):
        try:
            from prometheus_client import CollectorRegistry
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Prometheus text needs the package prometheus-client: pip install 'edgelab[monitor]'; summary() needs nothing",
                name="prometheus_client",
            ) from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def text(self) -> str:
        """The metrics in Prometheus's text exposition format, version 0.0.4, as prometheus_client writes it."""
        registry = self._registry()
        from prometheus_client import generate_latest

        return generate_latest(registry).decode()

    def serve(self, port: int = 0, host: str = LOCALHOST) -> "Served":
        """Answers GET /metrics on 127.0.0.1 from a thread until closed. `port` 0 takes a free one, which `Served.url` says.

        Any other host raises ValueError: how a model is used is nobody's business on the network.
        """
        if host != LOCALHOST:
            raise ValueError(
                f"host={host!r} is refused: the metrics are served on {LOCALHOST} alone; let a local agent or an SSH tunnel fetch them"
            )
        if not 0 <= port <= 65535:
            raise ValueError(f"port={port} is no port; give 1 to 65535, or 0 for a free one")
        registry = self._registry()
        from prometheus_client import start_http_server

        return Served(*start_http_server(port, LOCALHOST, registry))


class Served:
    """A running endpoint; `close` ends it, leaving a `with` block too."""

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port: int = server.server_port
        self.url = f"http://{LOCALHOST}:{self.port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Served({self.url!r})"


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float, float]:
    """(share, low, high) of Wilson's score interval (1927, Journal of the American Statistical Association 22).

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.8, 0.49, 0.943]
    """
    p, zz = right / n, z * z / n
    mid, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return p, max(0.0, mid - half), min(1.0, mid + half)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
