"""The claims about policies (A14, A15, C8, D4, D5), simulated: the governor that we ship, on the simulated phone of `simulate`.

Whether a policy does what it says is a question about software, and has an answer. What it gains hangs on numbers of the device that
nobody published: these are drawn from `simulate.UNKNOWN`, and static power, which decides most, from `STATIC_W`.
"""

from dataclasses import replace

import numpy as np

from edgelab.claims.bench import Bench, found
from edgelab.governor import PHONE, Setting
from edgelab.ledger import Entry
from edgelab.simulate import EVENLY, OLMOE, UNKNOWN, Device, Gain, Workload, claim_share, dvfs, sensitivity, simulate, static_for, work_of

STATIC_W = (0.3, 1.0, 2.0)  # screen dark, screen on, screen bright: the middle one is the value
NORMAL, LOW = PHONE.levels["normal"], PHONE.levels["low-power"]
CAP = Setting("int8", threads=4, frequency_mhz=1200)  # D4 and D5: the article names no policy; this one does nothing but clock lower
RUNS, DRAWS = 6, 200


def a14(bench: Bench) -> Entry:
    """Below 20 % battery the mode changes: at which charge did it?"""
    at, without = [], 0
    for seed in range(RUNS):
        load = Workload(64, 2.0, poisson=True)
        trace = simulate(PHONE, Device(), load, battery=0.24, hours=2, seed=seed)
        low = np.array([("low-power" in level) for level in trace.levels])[trace.which]
        at.append(100 * float(trace.battery[np.argmax(low)]) if low.any() else 0.0)
        blind = simulate(PHONE.without("battery"), Device(), load, battery=0.24, hours=2, seed=seed)
        without += any("low-power" in level for level in blind.levels)
    return found(
        "A14",
        "the governor's policy for phones on a simulated discharge from 24 %: the charge at which the low-power mode began",
        (float(np.mean(at)), min(at), max(at)),
        "% battery",
        RUNS,
        "discharges with requests at random, least and most",
        provenance="simulated",
        control=f"the same policy without a battery sensor changed in {without} of {RUNS}",
        beside={"the mode": f"{NORMAL} becomes {LOW}"},
    )


def a15(bench: Bench) -> Entry:
    """Hot: two threads, and 500 ms between inferences. Of the time that the governor calls hot, the share that has both."""
    both, threads, pauses, hottest, blind_hottest, elsewhere = [], set(), set(), [], [], []
    for ambient in (30.0, 34.0, 38.0):
        device, load = Device(ambient_c=ambient), Workload(64, None)
        trace = simulate(PHONE, device, load, hours=0.75, seed=bench.seed)
        hot = np.array(["hot" in level for level in trace.levels])[trace.which]
        obeyed = np.array([s.threads == 2 and s.pause_ms == 500 for s in trace.settings])[trace.which]
        if hot.any():
            both.append(100 * float(obeyed[hot].mean()))
            threads |= {s.threads for s, level in zip(trace.settings, trace.levels, strict=True) if "hot" in level}
            pauses |= {s.pause_ms for s, level in zip(trace.settings, trace.levels, strict=True) if "hot" in level}
        elsewhere.append(100 * float(obeyed[~hot].mean()) if (~hot).any() else 0.0)
        hottest.append(trace.case_c.max())
        blind_hottest.append(simulate(PHONE.without("temperature_c"), device, load, hours=0.75, seed=bench.seed).case_c.max())
    if not both:
        raise ArithmeticError("the simulated phone never got hot, so nothing was seen of the policy: give warmer air or more work")
    return found(
        "A15",
        "the governor's policy for phones, one request after the other in air of 30, 34 and 38 °C: of the time while it calls the case "
        "hot, "
        "the share with two threads and 500 ms between inferences, both at once",
        (float(np.mean(both)), min(both), max(both)),
        "% of the hot time",
        len(both),
        "simulated hours that got hot, least and most",
        provenance="simulated",
        control="without a thermometer the case reaches "
        + ", ".join(f"{t:.1f}" for t in blind_hottest)
        + f" °C; while it is not hot, {max(elsewhere):.0f} % of the time have both",
        beside={
            "threads while hot": ", ".join(f"{n}" for n in sorted(threads)),
            "between inferences": ", ".join(f"{p:g} ms" for p in sorted(pauses)),
            "the case reaches": ", ".join(f"{t:.1f}" for t in hottest) + " °C",
        },
    )


def c8(bench: Bench, draws: int = 400) -> Entry:
    """Slow frequencies and sleep against the highest frequency awake, where an inference of 2.1 ms may take 4.7."""
    rng = np.random.default_rng(bench.seed)
    saved, chosen, fixed = [], [], []
    for _ in range(draws):
        unknown = {
            k: lo + (hi - lo) * p if k in EVENLY else lo * (hi / lo) ** p
            for (k, (lo, hi)), p in zip(UNKNOWN.items(), rng.random(len(UNKNOWN)), strict=True)
        }
        device = replace(Device(), **unknown)
        period = 5e-3 * 20 ** rng.random()  # 5 to 100 ms between inferences
        points = dvfs(device, work_of(device, 2.1e-3, memory=rng.random()), period)
        allowed = [p for p in points if p.latency_ms <= 4.7]
        best = min(allowed, key=lambda p: min(p.awake_mw, p.sleep_mw))
        fast = max(points, key=lambda p: p.mhz)
        saved.append(100 * (1 - min(best.awake_mw, best.sleep_mw) / fast.awake_mw))
        chosen.append(best.latency_ms)
        fixed.append(fast.awake_mw)
    low, value, high = np.percentile(saved, [2.5, 50, 97.5])
    return found(
        "C8",
        "cores and memory of the simulated phone: the best frequency with sleep that answers within 4.7 ms, against the highest one, awake",
        (value, low, high),
        "% less power",
        draws,
        "draws of what is not known of the device, and of 5 to 100 ms between inferences",
        provenance="simulated",
        beside={
            "latency chosen": f"{np.median(chosen):.1f} ms [{np.percentile(chosen, 2.5):.1f}, {np.percentile(chosen, 97.5):.1f}]",
            "the highest frequency, awake": f"{np.median(fixed):,.0f} mW",
            "of the whole phone, with a static watt": f"{100 * np.median(fixed) * value / 100 / (np.median(fixed) + 1000):.0f} % less",
        },
    )


def _gains(bench: Bench, setting: Setting = CAP) -> list[Gain]:
    return sensitivity(Device(), Workload(), NORMAL, setting, static_w=STATIC_W, draws=DRAWS, seed=bench.seed)


def _together(bench: Bench, setting: Setting = CAP) -> str:
    """In which share of the draws both figures hold at once, by static power."""
    shares = {w: claim_share(15, 40, Device(static_w=w), Workload(), NORMAL, setting, draws=DRAWS, seed=bench.seed) for w in STATIC_W}
    return ", ".join(f"{100 * share:.0f} % of the draws at {w:g} W of static power" for w, share in shares.items())


def _beside(bench: Bench) -> dict[str, str]:
    low = _gains(bench, LOW)[1]
    return {
        "both figures at once (D4 and D5)": _together(bench),
        f"the low-power mode that we ship ({LOW})": f"{low.latency:+.0f} % [{low.low[0]:.0f}, {low.high[0]:.0f}] time per answer, "
        f"{low.hours:+.0f} % [{low.low[1]:.0f}, {low.high[1]:.0f}] hours at 1 W; both at once in {_together(bench, LOW)}",
    }


def d4(bench: Bench) -> Entry:
    """Below 20 % battery: how much later do answers come?"""
    gains = _gains(bench)
    (same,) = sensitivity(Device(), Workload(), NORMAL, NORMAL, static_w=(1.0,), draws=20)
    return found(
        "D4",
        f"a frequency cap ({CAP}) against normal ({NORMAL}), OLMoE-1B-7B on the simulated phone: time per answer",
        (gains[1].latency, min(g.low[0] for g in gains), max(g.high[0] for g in gains)),
        "% more",
        gains[1].n,
        "draws of what is not known of the device",
        provenance="simulated",
        control=f"the normal mode against itself adds {same.latency:.0f} %",
        beside=_beside(bench),
    )


def d5(bench: Bench) -> Entry:
    """Below 20 % battery: how much longer does it last, by the policy of D4?"""
    gains = _gains(bench)
    watts = static_for(40, Device(), Workload(), NORMAL, CAP, OLMOE)
    return found(
        "D5",
        f"a frequency cap ({CAP}) against normal ({NORMAL}), OLMoE-1B-7B on the simulated phone: hours that the rest of the charge lasts",
        (gains[1].hours, min(g.low[1] for g in gains), max(g.high[1] for g in gains)),
        "% longer",
        gains[1].n,
        "draws of what is not known of the device, static power of 0.3 to 2 W",
        provenance="simulated",
        beside={
            "by static power": ", ".join(f"{g.static_w:g} W {g.hours:.0f} %" for g in gains),
            "40 % need": "static power below " + (f"{watts:.2f} W, all else at its middle" if watts is not None else "0 W: it can't be"),
        }
        | _beside(bench),
    )
