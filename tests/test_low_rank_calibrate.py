"""Calibration of absorb-outliers: what it gathers, from which inputs, in how much memory, and how a run that was ended goes on."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.passes import progress
from graphwright.passes.low_rank import calibrate, resume
from graphwright.passes.low_rank.calibrate import collect, collect_waves
from graphwright.passes.low_rank.sample import RowSample, splitmix64
from graphwright.testing.bisect import bisect
from graphwright.testing.reduce import reduce

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = torch.ops.aten.linear.default


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def captured(module=None, args=None, **options):
    torch.manual_seed(0)
    return gw.ir.capture((module or Net()).eval(), args or (torch.zeros(3, 4),), **options)


def taps_of(program):
    """Each linear's input, by the name of its weight."""
    return {str(node.args[1].target): node.args[0] for node in program.main.calls if node.target is LINEAR}


def items(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*(shape or (3, 4)), generator=generator),) for _ in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(a[name].digest == b[name].digest for name in a)


# --- what is gathered ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_rows_that_a_site_reads():
    program, calibration = captured(), items(5)
    found = collect(program, taps_of(program), calibration)
    first, second = found["first.weight"], found["second.weight"]
    x = torch.cat([item[0] for item in calibration])
    inner = torch.relu(nn.functional.linear(x, *(program.weights[f"first.{name}"].tensor for name in ("weight", "bias"))))
    for statistics, rows in ((first, x), (second, inner.detach())):
        assert statistics.rows_seen == 15 and not statistics.refusal
        torch.testing.assert_close(statistics.amax, rows.abs().amax(0))
        assert statistics.low == pytest.approx(float(rows.min()))
        assert len(statistics.selection) == 2 and len(statistics.rows) == 13
    assert second.low == 0.0 and first.low < 0
    kept = {tuple(row) for row in torch.cat([first.rows, first.selection]).tolist()}
    assert kept == {tuple(row) for row in x.bfloat16().tolist()}


def test_all_leading_dims_are_rows_and_values_may_be_strided():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 2)

        def forward(self, x):
            return self.proj(x.transpose(1, 2))

    program = captured(Transposed(), (torch.zeros(2, 4, 3),))
    (statistics,) = collect(program, taps_of(program), calibration := items(2, 2, 4, 3)).values()
    rows = torch.cat([x.transpose(1, 2).reshape(-1, 4) for (x,) in calibration])
    assert statistics.rows_seen == 12 and torch.equal(statistics.amax, rows.abs().amax(0))


def test_inputs_of_the_program_can_be_watched_and_two_sites_can_read_one_value():
    program = captured()
    x = next(node for node in program.main.placeholders if node.meta.get("role", "input") == "input")
    found = collect(program, {"a": x, "b": x}, items(4))
    assert found["a"].rows_seen == 12 and found["a"] is not None and found["a"].digest == found["b"].digest


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)],
)
def test_rows_are_kept_in_two_bytes_and_maxima_in_float32(dtype, kept):
    program = captured(Net().to(dtype), (torch.zeros(3, 4, dtype=dtype),))
    (statistics, _) = collect(program, taps_of(program), [(x.to(dtype),) for (x,) in items(2)]).values()
    assert statistics.rows.dtype == statistics.selection.dtype == kept and statistics.amax.dtype == torch.float32


def test_a_digest_tells_statistics_apart_by_anything_in_them():
    program = captured()
    base = collect(program, taps_of(program), items(4))["first.weight"]
    other = {
        "amax": base.amax + 1, "low": base.low - 1, "rows_seen": 5, "rows": base.rows + 1, "selection": base.selection + 1, "refusal": "no",
    }  # fmt: skip
    digests = {dataclasses.replace(base, **{name: value}).digest for name, value in other.items()}
    assert len(digests | {base.digest}) == 7
    assert base.digest == collect(program, taps_of(program), items(4))["first.weight"].digest


def test_calibration_leaves_the_program_and_the_inputs_as_they_were():
    program, calibration = captured(), items(2)
    text = str(program)
    collect(program, taps_of(program), calibration)
    assert str(program) == text and all(torch.equal(a, b) for (a,), (b,) in zip(calibration, items(2), strict=True))


def test_random_operations_are_seeded_by_the_item_and_leave_the_generator():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            noisy = x + torch.randn_like(x)
            return self.a(noisy) + self.b(noisy * 2)

    program, calibration = captured(Noisy()), items(3)
    state = torch.random.get_rng_state()
    one_wave = collect(program, taps_of(program), calibration, max_rows=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(one_wave, collect(program, taps_of(program), calibration, max_rows=8, max_bytes=8 * 4 * 2 + 8 * 4))
    assert torch.equal(one_wave["a.weight"].amax * 2, one_wave["b.weight"].amax)


# --- the sample ------------------------------------------------------------------------------------------------------------


def test_splitmix64_is_the_published_function():
    # The first outputs of the reference implementation for seed 0.
    assert [int(value) for value in splitmix64(np.arange(3))] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 64))
def test_the_sample_does_not_depend_on_how_batches_were_cut(lengths, max_rows):
    rows = torch.arange(sum(lengths) * 2.0).reshape(-1, 2)
    whole, cut = RowSample(2, max_rows, torch.float16), RowSample(2, max_rows, torch.float16)
    whole.add(rows)
    for part in rows.split(lengths):
        cut.add(part)
    assert whole.seen == cut.seen == len(rows)
    assert torch.equal(whole.rows(), cut.rows()) and torch.equal(whole.selection(), cut.selection())


@given(st.integers(0, 300), st.integers(1, 64))
def test_the_sample_is_the_rows_of_smallest_hash_in_order_one_in_eight_for_selection(count, max_rows):
    sample = RowSample(1, max_rows, torch.float16)
    sample.add(torch.arange(float(count)).reshape(-1, 1))
    calibration, selection = (part.flatten().tolist() for part in (sample.rows(), sample.selection()))
    assert calibration == sorted(calibration) and selection == sorted(selection)
    assert sorted(calibration + selection) == sorted(np.argsort(splitmix64(np.arange(count)))[:max_rows].tolist())
    kept = min(count, max_rows)
    assert len(selection) == (max(1, round(kept / 8)) if kept > 1 else 0)


# --- which inputs fit ------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, scale=None, flag=True):
        return self.proj(x * scale) if flag else x


def test_items_are_tuples_or_pairs_of_arguments_by_position_and_by_name():
    program = captured(Named(), (torch.zeros(3, 4),), kwargs={"scale": torch.ones(4)})
    ((x,),) = items(1)
    (statistics,) = collect(program, taps_of(program), [((x,), {"scale": torch.full((4,), 2.0)})]).values()
    assert torch.equal(statistics.amax, (x * 2).abs().amax(0))


def test_a_model_that_takes_a_tuple_and_a_dict_is_given_them_as_two_arguments():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, pair, named):
            return self.proj(pair[0] + named["y"])

    x, y = torch.ones(3, 4), torch.ones(3, 4)
    program = captured(Pair(), ((x,), {"y": y}))
    (statistics,) = collect(program, taps_of(program), [((x,), {"y": y})]).values()
    assert statistics.low == 2.0


def test_sizes_may_differ_between_items_where_the_program_lets_them():
    n = torch.export.Dim("n", min=2, max=8)
    program = captured(Net(), (torch.zeros(3, 4),), dynamic_shapes=({0: n},))
    found = collect(program, taps_of(program), [*items(1, 2, 4), *items(1, 8, 4)])
    assert found["first.weight"].rows_seen == 10
    with pytest.raises(gw.InputError, match="calibration item 1 does not fit the model: .*9, but n ranges from 2 to 8"):
        collect(program, taps_of(program), [*items(1, 2, 4), *items(1, 9, 4)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 4), "calibration item 1 is a Tensor, but must be a tuple of the positional arguments"),
        (
            [torch.zeros(3, 4)],
            r"item 1 is a list, but must be a tuple .*: of those that a loader gives make \[tuple\(item\) for item in loader\]",
        ),
        ({"x": torch.zeros(3, 4)}, r"item 1 is a dict, but must be a tuple .* make \[\(\(\), dict\(item\)\) for item in loader\]"),
        (({"x": torch.zeros(3, 4)},), "calibration item 1 does not fit the model: argument x is a dict"),
        ((torch.zeros(3, 5),), "calibration item 1 does not fit the model: argument x dim 1 is 5"),
        ((torch.zeros(3, 4, dtype=torch.float64),), "calibration item 1 does not fit the model: argument x is torch.float64"),
        ((torch.zeros(3, 4), 1), "calibration item 1 does not fit the model: the call has 2 positional arguments"),
        ((), "calibration item 1 does not fit the model: argument x is missing"),
        (((torch.zeros(3, 4),), {"mask": 1}), "calibration item 1 does not fit the model: argument mask was not there"),
    ],
)
def test_an_item_that_does_not_fit_is_named_with_what_differs(bad, message):
    program = captured()
    with pytest.raises(gw.InputError, match=message):
        collect(program, taps_of(program), [*items(1), bad])


@pytest.mark.parametrize("bad", [torch.zeros(3, 4), 3, "data", {"x": 1}, None])
def test_calibration_that_is_no_iterable_of_items_is_refused(bad):
    program = captured()
    with pytest.raises(gw.InputError, match="calibration is a .*, but must be a list, or another iterable"):
        collect(program, taps_of(program), bad)


@pytest.mark.parametrize("kept", [True, False])
def test_no_items_are_refused(kept, tmp_path):
    program = captured()
    with pytest.raises(gw.InputError, match="calibration has no items: give at least one"):
        collect(program, taps_of(program), [], resume=tmp_path if kept else None)


def test_an_iterator_that_was_used_up_is_said_to_be_one():
    program, given = captured(), iter(items(2))
    collect(program, taps_of(program), given)
    with pytest.raises(gw.InputError, match="calibration is an iterator that has no items, or none left after an earlier run"):
        collect(program, taps_of(program), given)


def test_an_item_on_which_the_model_fails_is_named():
    program = captured(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), (torch.zeros(3, dtype=torch.int64),))
    with pytest.raises(gw.InputError, match="calibration item 1 fails in the model .IndexError"):
        collect(program, taps_of(program), [(torch.tensor([0, 1, 2]),), (torch.tensor([0, 1, 7]),)])


def test_a_program_without_weights_is_refused():
    program = gw.parse(str(captured()))
    with pytest.raises(gw.InputError, match="has no values"):
        collect(program, taps_of(program), items(1))


def test_taps_must_be_values_with_rows_of_the_function():
    program, other = captured(), captured()
    with pytest.raises(gw.InputError, match="site a is no value of function main"):
        collect(program, {"a": taps_of(other)["first.weight"]}, items(1))
    whole_numbers = captured(nn.Embedding(5, 4), (torch.zeros(3, dtype=torch.int64),))
    with pytest.raises(gw.InputError, match="site ids has no rows of real numbers"):
        collect(whole_numbers, {"ids": whole_numbers.main.placeholders[0]}, [(torch.zeros(3, dtype=torch.int64),)])
    n = torch.export.Dim("n", min=2, max=8)
    dynamic = captured(nn.ReLU(), (torch.zeros(4, 3),), dynamic_shapes=({1: n},))
    with pytest.raises(gw.InputError, match="site x has rows of n? ?.*numbers: tap a value whose last dim has a fixed size"):
        collect(dynamic, {"x": dynamic.main.placeholders[0]}, items(1, 4, 3))


def test_nothing_to_watch_runs_nothing():
    assert collect(captured(), {}, iter(())) == {}


class Raising:
    """A loader whose file ends in the midst of a sample."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        yield from items(self.count)
        raise EOFError("the shard ends early\nand more")


RAISED = "the iterator of the calibration inputs raised EOFError at sample {}: the shard ends early"


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("one_pass", [False, True])
def test_what_the_users_iterable_raises_is_said_to_be_its_own(tmp_path, number, one_pass):
    program = captured()
    for folder in (None, tmp_path):
        calibration = iter(Raising(number)) if one_pass else Raising(number)
        with pytest.raises(gw.CalibrationError) as caught:
            collect(program, taps_of(program), calibration, resume=folder)
        assert str(caught.value) == RAISED.format(number) and isinstance(caught.value.__cause__, EOFError)


def test_an_iterable_that_cannot_be_started_is_said_to_be_at_fault():
    class Unstarted:
        def __iter__(self):
            raise OSError("no such shard")

    program = captured()
    with pytest.raises(gw.CalibrationError, match="raised OSError at sample 0: no such shard"):
        collect(program, taps_of(program), Unstarted())


@pytest.mark.parametrize(
    ("made", "options"), [(gw.AbsorbOutliers, {"weight": "int8-channel"}), (gw.Smooth, {}), (gw.Quantize, {"weight": "int8-channel"})]
)
def test_a_loader_that_raises_is_no_fault_of_the_pass(made, options):
    each, program = made(calibration=Raising(2), min_numel=0, **options), captured()
    with pytest.raises(gw.CalibrationError) as caught:
        gw.compile(Net().eval(), [each], example_inputs=items(1)[0], backend="aten", cache=False)
    assert str(caught.value) == RAISED.format(2) and "failed" not in "".join(caught.value.__notes__)
    # Nothing to bisect or to reduce: no rewrite and no smaller program is at fault.
    for find in (lambda: bisect(program, [each]), lambda: reduce(program, [each], items(1)[0])):
        with pytest.raises(gw.CalibrationError, match="at sample 2"):
            find()


# --- sites that have no statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (float("nan"), "calibration item 1 has NaN there"),
        (float("inf"), "calibration item 1 has infinite or too large values there"),
        (-float("inf"), "calibration item 1 has infinite or too large values there"),
        (3.4e38, "calibration item 1 has infinite or too large values there"),  # infinite in bfloat16
    ],
)
def test_a_site_that_sees_a_number_that_is_none_is_refused_alone(bad, reason):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.bad(x), self.good(y)

    program = captured(Branches(), (torch.zeros(3, 4), torch.zeros(3, 4)))
    calibration = [(x.clone(), x) for (x,) in items(3)]
    calibration[1][0][2, 1] = bad
    found = collect(program, taps_of(program), calibration)
    assert found["bad.weight"].refusal == reason
    assert len(found["bad.weight"].amax) == len(found["bad.weight"].rows) == len(found["bad.weight"].selection) == 0
    assert found["good.weight"].refusal == "" and found["good.weight"].rows_seen == 9


def test_a_site_that_no_row_reaches_is_refused():
    program = captured(Net(), (torch.zeros(0, 4),))
    found = collect(program, taps_of(program), [(torch.zeros(0, 4),)])
    assert found["first.weight"].refusal == "no calibration item has a row there"


# --- waves and memory ------------------------------------------------------------------------------------------------------


class Counted:
    """An iterable that counts how often it is started and read."""

    def __init__(self, items):
        self.items, self.starts, self.read = items, 0, 0

    def __iter__(self):
        self.starts += 1
        for item in self.items:
            self.read += 1
            yield item


ONE_SITE = 16 * 6 * 2 + 8 * 6  # bytes for 16 rows of 6 numbers: less than for both sites of Net


def test_waves_give_what_one_run_gives_with_a_run_for_each():
    program, calibration = captured(), Counted(items(9))
    whole = collect(program, taps_of(program), calibration, max_rows=16)
    assert calibration.starts == 1
    waves = list(collect_waves(program, taps_of(program), calibration, max_rows=16, max_bytes=ONE_SITE))
    assert calibration.starts == 3 and [list(wave) for wave in waves] == [["first.weight"], ["second.weight"]]
    assert same(whole, {name: each for wave in waves for name, each in wave.items()})


def test_an_iterator_serves_one_wave_and_is_refused_for_two():
    program = captured()
    found = collect(program, taps_of(program), iter(items(9)), max_rows=16)
    assert same(found, collect(program, taps_of(program), items(9), max_rows=16))
    with pytest.raises(gw.InputError, match="calibration is an iterator, which gives its items once, and 2 runs over them are needed"):
        collect(program, taps_of(program), iter(items(9)), max_rows=16, max_bytes=ONE_SITE)


def test_too_little_memory_for_one_site_is_refused_with_what_it_needs():
    program = captured()
    with pytest.raises(
        gw.InputError, match="site second.weight needs 240 bytes for 16 rows of 6 numbers, more than the 239 of max_calib_bytes"
    ):
        collect(program, taps_of(program), items(1), max_rows=16, max_bytes=ONE_SITE - 1)


def script(body, *arguments):
    """Runs `body` in a process of its own, after the definitions of this file."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_low_rank_calibrate import *\n{body}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=env)


def test_memory_does_not_grow_with_the_number_of_items():
    done = script("""
import resource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def stream(count):
    for _ in range(count):
        yield (torch.ones(512, 1024),)
program = captured(nn.Sequential(nn.Linear(1024, 64), nn.Linear(64, 64)), (torch.zeros(512, 1024),))
collect(program, taps_of(program), stream(4), max_rows=64)
before = peak()
collect(program, taps_of(program), stream(64), max_rows=64)
print(peak() - before)
""")
    assert done.returncode == 0, done.stderr
    # 60 items more are 120 MiB; allocators keep a few.
    assert int(done.stdout) < 32 * 2**20


# --- a run that was ended --------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """The numbers of the items that the program ran on."""
    numbers = []
    original = calibrate._Run._show
    monkeypatch.setattr(calibrate._Run, "_show", lambda self, number, inputs: (numbers.append(number), original(self, number, inputs)))
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resume, "SAVE_SHARE", 1e9)
    return numbers


def test_a_process_that_was_killed_goes_on_where_it_was(tmp_path, shown):
    done = script(
        """
import os, signal
resume.SAVE_SECONDS, resume.SAVE_SHARE = 0.0, 1e9
class Killing(list):
    def __iter__(self):
        for number, item in enumerate(list.__iter__(self)):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item
program = captured()
collect(program, taps_of(program), Killing(items(9)), resume=Path(sys.argv[1]))
""",
        str(tmp_path),
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    program = captured()
    found = collect(program, taps_of(program), items(9), resume=tmp_path)
    assert shown == [5, 6, 7, 8]
    assert same(found, collect(program, taps_of(program), items(9)))


def test_what_is_finished_is_not_run_again(tmp_path, shown):
    program = captured()
    found = collect(program, taps_of(program), items(4), resume=tmp_path, max_rows=16)
    shown.clear()
    told = []
    options = {"max_rows": 16, "max_bytes": ONE_SITE, "tell": lambda *each: told.append(each)}
    again = collect(program, taps_of(program), items(4), resume=tmp_path, **options)
    assert shown == [] and same(found, again) and told == [(4, 8, None), (8, 8, None)]


def test_waves_go_on_from_the_one_that_was_ended(tmp_path, shown):
    program, calibration = captured(), items(6)
    waves = collect_waves(program, taps_of(program), calibration, resume=tmp_path, max_rows=16, max_bytes=ONE_SITE)
    next(waves)
    shown.clear()
    found = collect(program, taps_of(program), calibration, resume=tmp_path, max_rows=16)
    assert shown == list(range(6))  # for the second site alone
    assert same(found, collect(program, taps_of(program), calibration, max_rows=16))


def test_iterators_resume_as_well(tmp_path, shown):
    program = captured()
    found = collect(program, taps_of(program), iter(items(4)), resume=tmp_path)
    assert shown == [0, 1, 2, 3]
    assert same(found, collect(program, taps_of(program), iter(items(4)), resume=tmp_path)) and len(shown) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "removed"])
def test_a_damaged_file_costs_time_only(damage, tmp_path, shown):
    program, calibration = captured(), items(6)
    expected = collect(program, taps_of(program), calibration, resume=tmp_path)
    shown.clear()
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    written = {"cut": content[:-10], "flipped": content, "emptied": b""}
    file.unlink()
    if damage in written:
        file.write_bytes(written[damage])
    assert same(expected, collect(program, taps_of(program), calibration, resume=tmp_path))
    assert shown == list(range(6))


def test_another_calibration_starts_anew(tmp_path, shown):
    program = captured()
    collect(program, taps_of(program), items(3), resume=tmp_path, max_rows=16)
    changed = captured()
    with torch.no_grad():
        changed.weights["first.weight"].tensor.add_(1)
    for other, calibration, options in [
        (program, items(3, seed=1), {}),
        (program, items(4), {}),
        (program, items(3), {"max_rows": 8}),
        (changed, items(3), {}),
    ]:
        shown.clear()
        collect(other, taps_of(other), calibration, resume=tmp_path, **{"max_rows": 16, **options})
        assert shown == list(range(len(calibration)))


def test_a_resumed_run_with_fewer_items_than_were_seen_is_refused(tmp_path, shown):
    class Shrinking:
        def __init__(self, items):
            self.items = items

        def __iter__(self):
            return iter(self.items)

    calibration = Shrinking(items(6))
    program = captured()
    waves = collect_waves(program, taps_of(program), calibration, resume=tmp_path, max_rows=16, max_bytes=ONE_SITE)
    next(waves)
    calibration.items = calibration.items[:4]
    with pytest.raises(gw.InputError, match="calibration ended after 4 items, but the run to resume had seen 6"):
        collect(program, taps_of(program), calibration, resume=tmp_path, max_rows=16)


def test_refused_sites_stay_refused(tmp_path, shown):
    program, calibration = captured(), items(3)
    calibration[1][0][0, 0] = float("nan")
    found = collect(program, taps_of(program), calibration, resume=tmp_path)
    assert found["second.weight"].refusal
    assert same(found, collect(program, taps_of(program), calibration, resume=tmp_path)) and len(shown) == 3


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    program = captured()
    with pytest.raises(gw.InputError, match="the folder .*file to resume calibration from cannot be made .*: give another"):
        collect(program, taps_of(program), items(1), resume=tmp_path / "file")


def test_a_full_disk_costs_nothing_but_the_resuming(tmp_path, monkeypatch, shown):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "replace", full)
    program = captured()
    found = collect(program, taps_of(program), items(3), resume=tmp_path)
    assert same(found, collect(program, taps_of(program), items(3)))


# --- progress --------------------------------------------------------------------------------------------------------------


def test_progress_counts_items_over_all_waves_and_estimates_the_rest():
    program, told = captured(), []
    collect(program, taps_of(program), items(3), max_rows=16, max_bytes=ONE_SITE, tell=lambda *each: told.append(each))
    assert [(done, whole) for done, whole, _ in told] == [(n, 6) for n in range(1, 7)]
    assert all(left is not None and left >= 0 for *_, left in told) and told[-1][2] == 0


def test_progress_of_an_iterable_without_a_length_knows_the_whole_after_one_run():
    program, told = captured(), []
    collect(program, taps_of(program), Counted(items(2)), max_rows=16, max_bytes=ONE_SITE, tell=lambda *each: told.append(each))
    assert [(done, whole) for done, whole, _ in told] == [(1, None), (2, None), (3, 4), (4, 4)]
    assert [left is None for *_, left in told] == [True, True, False, False]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_is_drawn_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar() as tell:
        assert tell is None
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_bar("calibrating") as tell:
        tell(1, None, None)
        tell(2, 4, 125.0)
    assert "calibrating" in sys.stderr.getvalue() and "about 2 min left" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.2, "about 0 s left"), (89, "about 89 s left"), (600, "about 10 min left"), (7300, "about 2 h left")],
)
def test_times_are_told_in_one_unit(seconds, text):
    assert progress.time_left(seconds) == text
