"""What notebook 02 shows of the quantized product: times, limits, errors, the layout, and the control that measures them."""

import itertools
import math
import re
import time
import xml.etree.ElementTree as ET

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from edgelab import matmul_lab as lab
from edgelab import plots, tile_picture
from edgelab.kernels import simd
from edgelab.kernels.reference import PAIRS, untile
from edgelab.matmul_lab import Point, Roofline, Timing
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.scheme import PerChannel, PerGroup, PerTensor, QuantScheme

ROOF = Roofline(40e9, 1000e9, 1, "avx512")


def rounded(weight: torch.Tensor, scheme: str) -> QTensor:
    return round_to_nearest(weight, QuantScheme.parse(scheme))


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((20, 64)).astype(np.float32)


def point(tokens: int, activations: str, seconds: float, roof: Roofline = ROOF) -> Point:
    timing = Timing(seconds, 0.9 * seconds, 1.2 * seconds, 9)
    return Point("int4-g32", tokens, activations, 2_359_296, 2 * tokens * 2048 * 2048, timing).under(roof)


# ----------------------------------------------------------------------------------------------------------------- time
def test_contenders_take_turns_and_are_timed_for_what_they_are():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.004)

    times = lab.timed({"slow": slow, "fast": lambda: order.append("fast")}, seconds=0.05, fewest=3)
    assert times["slow"].calls == times["fast"].calls >= 3
    assert times["slow"].low >= 0.004 > 20 * times["fast"].median
    assert times["slow"].low <= times["slow"].median <= times["slow"].high
    turns = "".join(name[0] for name in order[4:])  # each was called twice before anything counts
    assert turns == "sff" * times["slow"].calls  # a short call is made once more, to bring it back


def test_a_timing_says_its_unit_once():
    assert str(Timing(58.14e-6, 57e-6, 1.2e-3, 5)) == "58.1 µs [57.0, 1,200 µs]"
    assert lab.duration(0.0) == "0 µs"


def test_the_last_cache_is_the_largest_that_the_system_names(tmp_path):
    for i, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert lab.last_level_cache(tmp_path) == 32 << 20
    assert lab.last_level_cache(tmp_path / "nowhere") == 32 << 20


def test_copies_are_the_weight_and_come_in_turn(weight):
    tiles = lab.tiles_of(rounded(weight, "int4-g32"))
    rotation = lab.Rotation(5 * tiles.nbytes + 100)
    turn = rotation.of(tiles)
    copies = list(itertools.islice(turn, 10))
    starts = [c.codes.ctypes.data for c in copies]
    assert len(set(starts)) == 5 and starts[:5] == starts[5:]
    assert all(a % 64 == 0 for a in starts)
    spans = sorted(c.codes.ctypes.data for c in copies[:5])
    assert all(b - a >= tiles.nbytes for a, b in itertools.pairwise(spans))  # no copy lies in another
    for copy in copies[:5]:
        np.testing.assert_array_equal(untile(copy), untile(tiles))
        np.testing.assert_array_equal(copy.scales, tiles.scales)
    assert next(lab.Rotation(64).of(tiles)) is tiles  # too large for any copy


# ------------------------------------------------------------------------------------------------------------- roofline
def test_the_limit_is_the_longer_of_reading_and_multiplying():
    nbytes, per_row = 2_359_296, 2 * 2048 * 2048
    assert ROOF.limit(nbytes, per_row, "int8") == pytest.approx(nbytes / 40e9)
    assert ROOF.limit(nbytes, 512 * per_row, "int8") == pytest.approx(512 * per_row / 1000e9)
    assert ROOF.limit(nbytes, 512 * per_row, "float32") == pytest.approx(512 * per_row / 250e9)
    cross = ROOF.crossover(4.5, "int8")
    for tokens, bound in ((cross * 0.99, "memory"), (cross * 1.01, "arithmetic")):
        assert ROOF.bound(nbytes, tokens * per_row, "int8") == bound
    assert ROOF.crossover(4.5, "float32") == pytest.approx(cross / 4)


def test_every_way_has_a_float_peak():
    assert set(lab.FLOATS) == set(simd.NEEDS)
    for way in simd.NEEDS:
        assert ROOF._replace(way=way).floats <= ROOF.integer


def test_ceilings_are_measured_and_only_rise():
    roof = lab.measure_roofline()
    assert 1e8 < roof.read < 1e13 and 1e8 < roof.integer < 1e15 and roof.way == simd.way()
    assert "(measured)" in str(roof) and "(computed)" in str(roof)
    low = roof._replace(read=1.0, integer=1.0).again()
    assert low.read > 1e8 and low.integer > 1e8
    high = roof._replace(read=1e18, integer=1e18)
    assert high.again() == high


def test_a_sweep_measures_every_number_of_rows_and_kind_of_activations(weight, x):
    q = rounded(weight, "int4-g32")
    points, roof = lab.sweep(q, x, [1, 20], ROOF._replace(read=1.0), lab.Rotation(1 << 16), seconds=0.01)
    assert [(p.tokens, p.activations) for p in points] == [(1, "float32"), (1, "int8"), (20, "float32"), (20, "int8")]
    assert roof.read > 1e8  # measured again on the way
    for p in points:
        assert p.nbytes == lab.tiles_of(q).nbytes and p.operations == 2 * p.tokens * 48 * 64
        assert p.limit == roof.limit(p.nbytes, p.operations, p.activations) and p.bound == roof.bound(p.nbytes, p.operations, p.activations)
        assert p.share == pytest.approx(p.limit / p.timing.median)
        assert p.row["rows (tokens)"] == str(p.tokens) and f"{p.share:.2f}" in p.row.values()


def test_the_same_weight_again_and_again_is_read_from_the_cache():
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    found = lab.cached_and_not(lab.repeated(rounded(weight, "int8-row"), 4), np.ones((1, 1024), np.float32), ROOF, lab.Rotation())
    assert list(found) == ["from memory", "from the cache"]
    assert found["from the cache"].timing.median < found["from memory"].timing.median


def test_the_contest_beats_unpacking_first(weight):
    q = lab.repeated(rounded(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), "int4-g32"), 4)
    before = torch.get_num_threads()
    times = lab.contest(q, np.ones((1, 1024), np.float32), lab.Rotation(1 << 22))
    assert torch.get_num_threads() == before
    naive = times["naive: dequantize, then multiply, NumPy"].median
    assert naive > 3 * times["kernel, int8 activations"].median
    assert len(times) == 7
    parts = [times[f"of it, {part} alone"].median for part in ("dequantize", "multiply")]
    assert max(parts) < 1.5 * naive and sum(parts) > naive / 2  # the parts make up the whole


def test_the_kernels_are_timed_without_what_disturbs_them(weight, monkeypatch):
    groups = []

    def spy(calls, *args):
        groups.append(list(calls))
        return {name: Timing(1.0, 1.0, 1.0, 1) for name in calls}

    monkeypatch.setattr(lab, "timed", spy)
    lab.contest(rounded(weight, "int4-g32"), np.ones((1, 64), np.float32), lab.Rotation(1 << 16))
    assert [len(g) for g in groups] == [2, 1, 4] and all(name.startswith("kernel") for name in groups[0])


def test_per_cent_keeps_three_digits():
    shown = [lab.percent(share) for share in (0.053, 0.0531, 0.3, 0.35, 2.59, 0.0066, 0.9996, 9.994, 9.996, 12.3, 0)]
    assert shown == ["5.30", "5.31", "30.0", "35.0", "259", "0.660", "100", "999", "1,000", "1,230", "0.00"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["tensor", "row", "g32"])
def test_a_repeated_weight_is_the_weight_beside_itself(weight, bits, kind):
    q = rounded(weight, f"int{bits}-{kind}")
    wide = lab.repeated(q, 3)
    np.testing.assert_array_equal(wide.dequantize(), np.tile(q.dequantize(), (1, 3)))
    np.testing.assert_array_equal(untile(lab.tiles_of(wide))[0], np.tile(q.codes(), (1, 3)))


def test_a_row_that_ends_inside_a_byte_is_not_repeated():
    q = rounded(torch.randn(3, 5), "int3-row")
    with pytest.raises(ValueError, match=r"rows of 5 codes of 3 bits .* multiple of 8"):
        lab.repeated(q, 2)


# ----------------------------------------------------------------------------------------------------------- same answer
def test_all_matmul_kernels_are_compared():
    found = lab.compare_all(out=33, n=96, tokens=7)
    assert {c.kernel for c in found} == {name for name in PAIRS if name.startswith("qmatmul")} and len(found) >= 4
    assert all(c.agrees and c.numbers == 4 * 33 * 7 and c.row["same answer"] == "yes" for c in found)


@pytest.mark.parametrize("name", ["qmatmul", "qmatmul_int8"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_flipped_bit_is_noticed(name, bits):
    args = PAIRS[name][2](np.random.default_rng(0), bits=bits, exact=True)
    codes = args[0].codes.copy()
    broken = lab.with_a_flipped_bit(args)
    np.testing.assert_array_equal(args[0].codes, codes)  # the original is untouched
    assert np.unpackbits(broken[0].codes ^ codes).sum() == 1
    wrong = lab.compare(name, args, given=broken)
    assert not wrong.agrees and wrong.largest > 10 and wrong.row["same answer"] == "NO"
    assert lab.compare(name, args).agrees


def test_nan_is_no_agreement():
    assert not lab.Comparison("k", 1, math.nan).agrees
    args = PAIRS["qmatmul"][2](np.random.default_rng(0), exact=True)
    broken = list(lab.with_a_flipped_bit(args))
    broken[1] = np.full_like(args[1], np.nan)
    assert not lab.compare("qmatmul", args, given=tuple(broken)).agrees


# ---------------------------------------------------------------------------------------------------------------- errors
def test_weight_errors_by_hand():
    weight = torch.tensor([[-4.0, 1.0, 3.4, 0.2, 0, 0, 0, 0]])
    (error,) = lab.weight_errors(weight, ["int4-row"])  # scale 0.5: -4, 1, 3.5, 0
    size = math.sqrt((16 + 1 + 3.4**2 + 0.04) / 8)
    assert error.rms == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 8) / size, rel=1e-5)
    assert error.worst == pytest.approx(0.2 / size, rel=1e-5)
    assert (error.nbytes, error.bits_per_weight) == (6, 6.0)


def test_finer_scales_and_more_bits_err_less(weight):
    by = {
        str(e.scheme): e.rms
        for e in lab.weight_errors(weight, [f"int{b}-{k}" for b in (2, 3, 4, 8) for k in ("tensor", "row", "g32", "g16")])
    }
    for bits in (2, 3, 4, 8):
        assert by[f"int{bits}-g16"] < by[f"int{bits}-g32"] < by[f"int{bits}-row"] < by[f"int{bits}-tensor"]
    assert by["int8-row"] < by["int4-row"] / 8 < by["int2-row"] / 16


def test_output_error_is_that_of_the_dequantized_weight(weight, x):
    q = rounded(weight, "int4-g32")
    found = lab.output_error(weight, q, x)
    ref = x.astype(np.float64) @ weight.numpy().T.astype(np.float64)
    away = x.astype(np.float64) @ q.dequantize().T.astype(np.float64) - ref
    assert found.float_activations == pytest.approx(np.sqrt((away**2).mean() / (ref**2).mean()), rel=1e-4)
    assert 0.001 < found.between < 0.02 < found.float_activations
    assert found.int8_activations == pytest.approx(math.hypot(found.float_activations, found.between), rel=0.05)
    assert 0.5 < found.same_float <= 1 and found.row["scheme"] == "int4-g32"


def test_a_perfect_weight_loses_nothing_but_what_int8_activations_cost(x):
    weight = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = -8
    (found,) = lab.output_errors(weight, x, ["int4-row"])
    assert found.float_activations < 1e-6 and found.same_float == 1
    assert found.int8_activations == pytest.approx(found.between, rel=1e-3) and found.between > 1e-3


@pytest.mark.parametrize("scheme", ["int8-row", "int2-tensor"])
def test_the_outline_holds_every_weight_once(weight, scheme):
    q = rounded(weight, scheme)
    x, y = lab.error_outline(weight, q)
    assert len(x) == len(y) and y[0] == y[-1] == 0
    assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) == pytest.approx(100)
    spread = 100 * lab.weight_error(weight, q).worst
    assert spread <= x[-1] <= 1.03 * spread and x[0] == -x[-1]


# ---------------------------------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_map_says_what_the_table_of_pack_says(bits):
    where = tile_picture.tile_map(bits)
    assert where.shape == (bits, 64, 8, 3)
    assert len({tuple(w) for w in where.reshape(-1, 3).tolist()}) == 16 * 32 * bits  # each bit of each code has one place
    for vector, byte, bit in itertools.product(range(bits), range(64), range(8)):
        if bits == 8:
            quad, of_code = vector, bit
        elif bits == 4:
            quad, of_code = 2 * vector + bit // 4, bit % 4
        elif bits == 2 or vector < 2:
            quad, of_code = 4 * vector + bit // 2, bit % 2
        else:
            quad, of_code = bit, 2
        assert where[vector, byte, bit].tolist() == [byte // 4, 4 * quad + byte % 4, of_code]


def test_the_map_follows_the_code_and_not_this_file(monkeypatch):
    def other(*args):
        tiles = lab.tile(*args)
        return tiles._replace(codes=np.ascontiguousarray(tiles.codes[..., ::-1]))

    real = tile_picture.tile_map(4)
    monkeypatch.setattr(tile_picture, "tile", other)
    np.testing.assert_array_equal(tile_picture.tile_map(4), real[:, ::-1])
    monkeypatch.setattr(tile_picture, "tile", lambda *args: lab.tile(*args)._replace(codes=np.zeros_like(lab.tile(*args).codes)))
    with pytest.raises(RuntimeError, match="one place"):
        tile_picture.tile_map(4)


def test_blocks_fill_their_bytes():
    for bits in (2, 3, 4, 8):
        found = tile_picture.blocks(bits)
        assert sum(b.bits for b in found) == 16 * 32 * bits
        assert len(found) == 16 * 32 * (2 if bits == 3 else 1)  # at 3 bits a code lies in two pieces


def test_the_picture_shows_what_the_map_says():
    picture = tile_picture.TilePicture((3, 4))
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}
    assert "lowest bit (bit 0) at the top" in picture.sentence and {"bit 0", "bit 7"} <= set(picture.figure().layout.yaxis.ticktext)
    assert "lanes of all 16 rows are alike" in picture.sentence and "4 vectors of 64 bytes at 4 bits" in picture.sentence
    root = ET.fromstring(picture.svg())
    assert root.attrib["role"] == "img" and root.find("{http://www.w3.org/2000/svg}desc").text == picture.sentence
    numbers = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if re.fullmatch(r"\d+", t.text)]
    assert sorted(map(int, numbers)) == sorted(3 * 2 * list(range(32)))  # two rows; two pieces at 3 bits, one at 4
    three, four = picture.figure().data
    assert list(np.asarray(three.base) + three.y)[-1] <= 24 and max(np.asarray(four.base) + four.y) == 32
    first = np.flatnonzero((four.x == 5) & (np.asarray(four.base) == 12))[0]  # vector 1, byte 5, high half
    assert four.customdata[first].tolist() == [1, 13, 1, 4, 7, 0]
    assert four.base[first] == 8 + 4 and list(picture.figure().layout.yaxis.range) == [32, 0]  # bit 0 is on top, as it is said
    sizes = dict(zip(np.asarray(three.y).tolist(), three.textfont.size, strict=True))
    assert sizes[1] < sizes[2]  # a digit fits into its block
    assert len(str(bundle)) < 60_000


# --------------------------------------------------------------------------------------------------------------- figures
def test_the_figure_draws_measurements_and_limits():
    points = [point(t, a, 8e-5 * max(1, t / 8)) for t in (1, 4, 64) for a in ("float32", "int8")]
    fig = lab.time_against_tokens(points, ROOF)
    names = [t.name for t in fig.data]
    assert names == ["float32, measured", "float32, limit", "int8, measured", "int8, limit"]
    measured, limit = fig.data[2:]
    assert list(measured.x) == [1, 4, 64] and list(measured.y) == pytest.approx([80, 80, 640])
    assert list(measured.error_y.array) == pytest.approx([16, 16, 128])
    assert list(limit.x) == pytest.approx([1, 7.03125, 64])
    assert limit.y[0] == pytest.approx(limit.y[1]) == pytest.approx(1e6 * 2_359_296 / 40e9)
    assert limit.y[2] == pytest.approx(1e6 * points[-1].limit)
    assert len({t.marker.symbol for t in fig.data if t.mode == "markers"}) == 2  # never by colour alone
    assert fig.layout.title.text in plots.to_svg(fig)
    said = lab.say_times(points, ROOF)
    assert said.index("knee lies at 1.8 rows") < said.index("knee lies at 7.0 rows")
    assert "1 row took 80.0 µs, 0.74 of what memory allows" in said and "8 times as long for 64 times the work" in said


def test_errors_are_drawn_by_granularity(weight):
    errors = lab.weight_errors(weight, ["int2-tensor", "int4-tensor", "int2-g32", "int4-g32"])
    fig = lab.error_against_bits(errors)
    assert [t.name for t in fig.data] == ["one scale per matrix", "per group of 32"]
    assert list(fig.data[1].x) == [2.5, 4.5] and list(fig.data[1].y) == pytest.approx([100 * e.rms for e in errors[2:]])
    plots.to_svg(fig)
    said = lab.say_errors(errors)
    assert said.index("at 2 bits int2-g32") < said.index("int2-tensor") < said.index("at 4 bits int4-g32")


# --------------------------------------------------------------------------------------------------------------- control
@pytest.fixture
def control(weight, x):
    pytest.importorskip("ipywidgets")
    pytest.importorskip("anywidget")
    from edgelab.widgets import MatmulControl

    return MatmulControl(weight, x, ROOF, repeat=2, rotation=lab.Rotation(1 << 16), seconds=0.01)


def test_a_choice_is_measured_once_drawn_and_told(control, weight, x):
    first = control.point
    assert (first.name, first.tokens, first.activations) == ("int4-g32", 1, "int8")
    assert first.nbytes == 48 * 128 // 2 + 48 * 4 * 2 and first.operations == 2 * 48 * 128
    control.bits.value = 2
    control.granularity.value = PerChannel()
    assert [p.name for p in control.points.values()] == ["int4-g32", "int2-g32", "int2-row"]
    control.choose("int4-g32")
    assert control.point.timing is first.timing and len(control.points) == 3  # kept, not measured again
    *_, int8, float32 = control.figure.data
    assert len(int8.x) == 3 and list(int8.marker.size).count(16) == 1 and not float32.x
    here = int8.marker.size.index(16)
    assert int8.x[here] == pytest.approx(first.operations / first.nbytes)
    assert int8.y[here] == pytest.approx(first.operations / first.timing.median / 1e9)
    error = lab.weight_error(weight, rounded(weight, "int4-g32"))
    assert "<b>int4-g32, 1 row of int8 activations</b>" in control.sentence.value
    assert f"off by {lab.percent(error.rms)} %" in control.sentence.value and str(first.timing) in control.sentence.value
    for word in ("(measured", "(counted)", "(computed"):
        assert word in control.sentence.value and word in control.table.value
    assert control.table.value.count('<th scope="row">') == 3


def test_histogram_and_bytes_are_those_of_the_choice(control, weight):
    before, now, codes, scales, *_ = control.figure.data
    assert before.x is None
    x4, y4 = np.array(now.x), np.array(now.y)
    control.choose("int8-row")
    np.testing.assert_array_equal(before.x, x4)
    np.testing.assert_array_equal(before.y, y4)
    x, y = lab.error_outline(weight, rounded(weight, "int8-row"))
    np.testing.assert_array_equal(now.x, x)
    np.testing.assert_array_equal(now.y, y)
    assert tuple(control.figure.layout.xaxis.range) == (x[0], x[-1])
    assert list(codes.x) == ["bfloat16", "int8-row"]
    assert list(codes.y) == pytest.approx([2 * 48 * 128 / 1e6, 48 * 128 / 1e6]) and list(scales.y) == pytest.approx([0, 48 * 2 / 1e6])
    control.rows.value = 3
    np.testing.assert_array_equal(before.x, x4)  # another number of rows is no other weight


def test_slider_and_box_follow_one_another(control):
    control.slider.value = 5
    assert control.rows.value == 32 and control.point.tokens == 32
    control.rows.value = 11
    assert control.slider.value == 3 and control.rows.value == 11 and control.point.tokens == 11
    control.slider.value = 0
    assert control.rows.value == 1
    control.choose("int2-tensor", rows=100, activations="float32")
    assert (control.slider.value, control.rows.value, control.activations.value) == (7, 100, "float32")
    assert control.granularity.value == PerTensor()


def test_the_roof_rises_for_all_points_alike(control, monkeypatch):
    limit = control.point.limit
    key = next(iter(control.points))
    monkeypatch.setattr(Roofline, "again", lambda self: self._replace(read=1.2 * self.read))
    control.choose("int2-g32")
    assert control.points[key].limit < limit
    roof = control.figure.data[4]
    assert roof.y[0] == pytest.approx(control._roof.read * roof.x[0] / 1e9)
    assert max(roof.y) == pytest.approx(control._roof.integer / 1e9)


def test_an_error_is_shown_and_kept_and_goes_away(control, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(lab, "sweep", lambda *_: (_ for _ in ()).throw(ValueError("no <such> kernel")))
        assert control.choose("int3-g32") is None
        assert isinstance(control.error, ValueError) and 'role="alert"' in control.sentence.value
        assert "no &lt;such&gt; kernel" in control.sentence.value
    assert control.choose("int3-g32").name == "int3-g32"
    assert control.error is None and "alert" not in control.sentence.value


def test_only_groups_that_divide_are_offered_and_inputs_have_names(control):
    offered = [value for _, value in control.granularity.options]
    assert offered == [PerGroup(16), PerGroup(32), PerGroup(64), PerChannel(), PerTensor()]
    names = [c.description for c in (control.bits, control.granularity, control.activations, control.rows)]
    assert names == ["bits", "one scale per", "activations", "rows (tokens)"]


def test_the_static_parts_can_be_drawn_without_javascript(control):
    control.choose("int8-row", rows=4, activations="float32")
    parts = control.static()
    assert len(parts) == 3 and all(isinstance(p, go.Figure) for p in parts)
    errors, sizes, speed = (plots.to_svg(p) for p in parts)
    assert "int8-row" in errors and "bfloat16" in sizes
    assert "int8, measured" in speed and "float32, measured" in speed
    assert [t.name for t in parts[2].data] == ["roof, int8", "roof, float32", "int8, measured", "float32, measured"]
    assert all(t.showlegend for t in parts[2].data)
    *_, int8, float32 = parts[2].data
    assert list(int8.text) == ["int4-g32, 1 row"] and list(float32.text) == ["int8-row, 4 rows"]
    assert "text" in int8.mode and "of the limit" in int8.customdata[0]
    low, high = parts[2].layout.xaxis.range
    assert low < math.log10(min(parts[2].data[0].x)) - 0.5 and high > math.log10(max(parts[2].data[0].x))


@pytest.mark.parametrize(
    "choice, said",
    [
        (("int4-g32", 0, "int8"), "rows=0; use a whole number from 1 to 512"),
        (("int4-g32", 10**7, "int8"), "rows=10000000; .* from 1 to 512"),
        (("int4-g32", 1.5, "int8"), "rows=1.5; use a whole number"),
        (("int4-g32", 1, "bf16"), "activations='bf16'; use 'int8' or 'float32'"),
        (("int4-g24", 1, "int8"), "int4-g24 is not offered for rows of 64; .* g16, g32, g64, row, tensor"),
    ],
)
def test_what_is_not_offered_is_refused_and_changes_nothing(control, choice, said):
    before = control.scheme, control.rows.value, control.activations.value
    with pytest.raises(ValueError, match=said):
        control.choose(*choice)
    assert (control.scheme, control.rows.value, control.activations.value) == before and len(control.points) == 1
    assert control.choose("int4-g32", np.int64(2), "float32").tokens == 2


def test_without_widgets_the_control_is_a_sentence(control):
    bundle = control._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("A control of bits") and "int4-g32, 1 row of int8 activations" in bundle["text/plain"]
    assert "VBox" not in bundle["text/plain"] and control.figure._config["responsive"]


def test_an_error_in_the_first_choice_is_raised(weight, x):
    pytest.importorskip("ipywidgets")
    pytest.importorskip("anywidget")
    from edgelab.widgets import MatmulControl

    broken = weight.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds 1 NaN"):
        MatmulControl(broken, x, ROOF, rotation=lab.Rotation(1 << 16))
