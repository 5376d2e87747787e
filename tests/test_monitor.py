"""The monitor: Prometheus's own parser reads what it writes, over HTTP on localhost alone; the drift test against a naive one."""

import builtins
import http.client
import math
import socket
import threading
import urllib.request
from bisect import bisect_right
from types import SimpleNamespace
from urllib.error import HTTPError

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from edgelab.monitor import FIRST_S, Histogram, Monitor, PageHinkley, wilson

parser = pytest.importorskip("prometheus_client.parser")


def samples(text: str) -> dict[tuple, float]:
    """{(name, labels): value} of a text by Prometheus's parser."""
    return {(s.name, *sorted(s.labels.items())): s.value for f in parser.text_string_to_metric_families(text) for s in f.samples}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def filled() -> Monitor:
    clock = Clock()
    m = Monitor(clock=clock)
    m.observe([0.1, 0.02, 0.03], [0.9, 0.8, 0.7], prompt_tokens=4)
    clock.now += 10
    m.observe([0.3, 0.02], [0.5, math.nan], prompt_tokens=6, new_tokens=1)
    m.queued(0.004)
    m.stepped(2)
    m.failed(KeyError("x"))
    m.failed(ValueError('with "quotes" and \\ and\nlines'))
    for right in (True, True, False):
        m.feedback(right)
    return m


# ------------------------------------------------------------------------------------------------------- exposition


def test_prometheus_reads_what_was_counted():
    found = samples(filled().text())
    assert found[("edgelab_requests_total",)] == 2 and found[("edgelab_tokens_total",)] == 4
    assert found[("edgelab_prompt_tokens_total",)] == 10 and found[("edgelab_confidences_unusable_total",)] == 1
    assert found[("edgelab_errors_total", ("kind", "KeyError"))] == found[("edgelab_errors_total", ("kind", "ValueError"))] == 1
    assert found[("edgelab_feedback_total", ("right", "true"))] == 2 and found[("edgelab_feedback_total", ("right", "false"))] == 1
    assert found[("edgelab_first_token_seconds_count",)] == 2
    assert found[("edgelab_first_token_seconds_sum",)] == pytest.approx(0.4)
    assert found[("edgelab_first_token_seconds_bucket", ("le", "0.1"))] == 1  # a bound is in its bucket
    assert (
        found[("edgelab_first_token_seconds_bucket", ("le", "0.5"))] == found[("edgelab_first_token_seconds_bucket", ("le", "+Inf"))] == 2
    )
    assert found[("edgelab_token_seconds_count",)] == 3 and found[("edgelab_queue_seconds_count",)] == 1
    assert found[("edgelab_step_rows_bucket", ("le", "1.0"))] == 0 and found[("edgelab_step_rows_bucket", ("le", "2.0"))] == 1
    assert found[("edgelab_confidence_mean",)] == pytest.approx(0.725)
    assert found[("edgelab_tokens_per_second",)] == pytest.approx(0.4)  # 4 tokens in the 10 s since the start
    assert abs(found[("edgelab_resident_bytes",)] / psutil.Process().memory_info().rss - 1) < 0.2


def test_the_format_is_the_one_of_the_text_parser():
    text = filled().text()
    families = {f.name: f for f in parser.text_string_to_metric_families(text)}
    assert {f.type for f in families.values()} == {"counter", "histogram", "gauge"} and all(f.documentation for f in families.values())
    assert text.endswith("\n") and "# EOF" not in text  # that would be OpenMetrics
    for f in families.values():
        if f.type == "histogram":
            counts = [s.value for s in f.samples if s.name.endswith("_bucket")]
            assert counts == sorted(counts) and f.samples[len(counts) - 1].labels["le"] == "+Inf"
            assert counts[-1] == next(s.value for s in f.samples if s.name.endswith("_count"))


def test_an_empty_monitor_can_be_told_and_read():
    m = Monitor("shop_2")
    found = samples(m.text())
    assert found[("shop_2_requests_total",)] == 0 and math.isnan(found[("shop_2_confidence_mean",)])
    assert m.accuracy() is None and "<table>" in m._repr_html_() and "errors: none" in repr(m)


def test_over_http_on_localhost_alone():
    m = filled()
    with m.serve() as served:
        assert served._server.socket.getsockname()[0] == "127.0.0.1" and str(served.port) in repr(served)
        answer = urllib.request.urlopen(served.url, timeout=20)
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        body = answer.read().decode()
        assert samples(body)[("edgelab_requests_total",)] == 2
        m.observe([0.1])
        assert samples(urllib.request.urlopen(served.url, timeout=20).read().decode())[("edgelab_requests_total",)] == 3
        with pytest.raises(HTTPError, match="405"):
            urllib.request.urlopen(urllib.request.Request(served.url, data=b"x", method="POST"), timeout=20)
        port = served.port
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    with m.serve(port) as again:  # the port is free again
        connection = http.client.HTTPConnection("127.0.0.1", again.port, timeout=20)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "localhost", "192.0.2.7"])
def test_any_other_host_is_refused(host):
    with pytest.raises(ValueError, match=r"is refused: the metrics are served on 127\.0\.0\.1 alone"):
        Monitor().serve(host=host)


def test_without_the_package_all_but_the_text_works(monkeypatch):
    real = builtins.__import__

    def no_prometheus(name, *args, **kwargs):
        if name.split(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_prometheus)
    m = filled()
    assert "requests: 2" in repr(m)
    for call in (m.text, m.serve):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'edgelab\[monitor\]'"):
            call()


# --------------------------------------------------------------------------------------------------------- observing


@given(st.lists(st.floats(0, 100), max_size=60))
def test_a_histogram_is_a_sorted_list(values):
    h = Histogram(FIRST_S)
    for v in values:
        h.add(v)
    ordered = sorted(values)
    assert [n for _, n in h.cumulative()] == [bisect_right(ordered, b) for b in FIRST_S] + [len(values)]
    assert h.n == len(values) and h.total == pytest.approx(sum(values))
    for q in (0.5, 0.95, 1.0):
        if values:
            assert h.quantile(q) == np.quantile(values, q, method="inverted_cdf")
        else:
            assert math.isnan(h.quantile(q))


def test_a_generation_and_a_stream_give_the_same_kinds_of_numbers():
    m = Monitor()
    m.generation(SimpleNamespace(tokens=[1, 2, 3], prompt_tokens=7, prefill_s=0.2, decode_s=0.06, confidences=[0.5, 0.5, 0.5]))
    assert m._c.first.recent[0] == 0.2 and list(m._c.token.recent) == pytest.approx([0.03, 0.03])
    m.generation(SimpleNamespace(tokens=[], prompt_tokens=7, prefill_s=0.2, decode_s=0.0, confidences=[]))
    assert (m._c.requests, m._c.tokens, m._c.first.n) == (2, 3, 1)


def test_watching_a_stream():
    clock = Clock()
    m = Monitor(clock=clock)

    def stream(times, error=None):
        for i, t in enumerate(times):
            clock.now += t
            yield i
        if error:
            raise error

    for _ in m.watch(stream([0.5, 0.1, 0.2]), prompt_tokens=3):
        clock.now += 9  # the reader takes its time
    assert list(m._c.first.recent) == pytest.approx([0.5]) and list(m._c.token.recent) == pytest.approx([0.1, 0.2])
    with pytest.raises(OSError, match="gone"):
        list(m.watch(stream([0.5], OSError("gone"))))
    assert m._c.errors == {"OSError": 1}
    reader = m.watch(stream([0.5, 0.5, 0.5]))
    next(reader)
    reader.close()
    assert m._c.errors == {"OSError": 1} and m._c.tokens == 4 and m._c.requests == 2  # a reader who has enough is no error


def test_throughput_forgets():
    clock = Clock()
    m = Monitor(window_s=10, clock=clock)
    assert m.tokens_per_s() == 0
    clock.now += 5
    m.observe([0.1] * 20)
    assert m.tokens_per_s() == 4 and m.uptime_s == 5
    clock.now += 8
    m.observe([0.1] * 30)
    assert m.tokens_per_s() == 5
    clock.now += 5
    assert m.tokens_per_s() == 3
    clock.now += 5
    assert m.tokens_per_s() == 0


def test_many_threads_lose_nothing():
    m = Monitor()

    def work():
        for _ in range(300):
            m.observe([0.1, 0.1], [0.9, 0.9])
            m.failed(ValueError())
            m.stepped(3)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for _ in range(5):
        samples(m.text())
    for t in threads:
        t.join()
    found = samples(m.text())
    assert found[("edgelab_requests_total",)] == 1800 == found[("edgelab_errors_total", ("kind", "ValueError"))]
    assert found[("edgelab_confidence_count",)] == 3600 and found[("edgelab_step_rows_sum",)] == 5400


@pytest.mark.parametrize(("right", "n"), [(0, 5), (8, 10), (97, 100), (50, 50)])
def test_wilson(right, n):
    exact = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((right / n, exact.low, exact.high), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- drift


def naive(values, delta: float, threshold: float, least: int) -> list[int]:
    """Indices of alarms: every sum added up anew from its definition."""
    alarms, start = [], 0
    for t in range(len(values)):
        x = np.array(values[start : t + 1])
        means = np.cumsum(x) / np.arange(1, len(x) + 1)
        m = np.cumsum(x - means + delta)
        if len(x) >= least and m.max() - m[-1] > threshold:
            alarms.append(t)
            start = t + 1
    return alarms


@given(st.lists(st.floats(0, 1), max_size=80), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.313, 1.017]), st.integers(1, 10))
def test_page_hinkley_against_its_definition(values, delta, threshold, least):
    test = PageHinkley(delta, threshold, least)
    assert [i for i, x in enumerate(values) if test.update(x)] == naive(values, delta, threshold, least)


@given(st.floats(0, 1), st.integers(1, 300))
def test_a_constant_never_alarms(x, n):
    test = PageHinkley()
    assert not any(test.update(x) for _ in range(n))


def test_a_fall_is_found_and_noise_is_not():
    """Confidence 0.80 with a standard deviation of 0.05 for 1,000 requests, then 0.65: no alarm before, one soon after."""
    late, false = [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        test = PageHinkley()
        false += sum(test.update(x) for x in 0.8 + 0.05 * rng.standard_normal(1000))
        after = [i for i, x in enumerate(0.65 + 0.05 * rng.standard_normal(100)) if test.update(x)]
        late.append(after[0])
    assert false == 0 and max(late) < 20  # threshold / (fall - delta) = 1 / 0.13 = 8
    rising = PageHinkley()
    assert not any(rising.update(x) for x in [0.5] * 100 + [0.9] * 100)


def test_the_monitor_tells_of_a_fall():
    m = Monitor()
    fell = [m.observe([0.1, 0.1], [p, p]) for p in [0.8] * 50 + [0.4] * 10]
    assert sum(fell) == 1 == len(m.alarms)
    alarm = m.alarms[0]
    assert alarm.request == fell.index(True) + 1 > 50 and alarm.before > 0.75 and alarm.after < 0.8
    assert samples(m.text())[("edgelab_confidence_falls_total",)] == 1
    assert any(r["what"] == "falls of confidence" and r["value"].startswith("1; at request 5") for r in m.summary())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Monitor("my monitor"), "name='my monitor' begins the metrics' names"),
        (lambda: Monitor(window_s=0), "window_s=0 must be more than 0"),
        (lambda: Monitor().observe([-1.0]), r"seconds=-1\.0 is no duration"),
        (lambda: Monitor().serve(70000), "port=70000 is no port"),
        (lambda: PageHinkley(threshold=0), "threshold=0"),
        (lambda: PageHinkley(delta=-1), "delta=-1"),
    ],
)
def test_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()
