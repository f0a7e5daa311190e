"""A recording gives what the calls give that it was made of. Here a recording is the calls themselves, run anew into the same memory;
CUDA graphs are what `bench/gpu.py` checks on a GPU.
"""

import threading
from contextlib import contextmanager

import pytest
import torch

from graphwright.runtime.graph_replay import MAX_RECORDINGS, Replayed


class Again:
    """Records by running anew; counts the turns."""

    def __init__(self):
        self.turns = 0

    def record(self, function):
        results = function()

        def replay():
            for held, value in zip(results, function(), strict=True):
                if isinstance(held, torch.Tensor):
                    held.copy_(value)

        return results, replay

    @contextmanager
    def turn(self):
        self.turns += 1
        yield


class Affine:
    """y = 2 x + w, and how often it was computed."""

    def __init__(self):
        self.weight, self.calls = torch.ones(3), 0

    def __call__(self, inputs):
        self.calls += 1
        (x,) = inputs
        inputs.clear()
        return [x * 2 + self.weight]


@pytest.fixture
def affine():
    run = Affine()
    return run, Replayed(run, Again(), [False], [run.weight])


def test_every_call_gives_its_own_result(affine):
    run, replayed = affine
    inputs = [torch.full((3,), float(n)) for n in range(6)]
    results = [replayed([x])[0] for x in inputs]
    assert replayed.num_recordings == 1
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, x * 2 + 1)


def test_inputs_stay_as_they_were_and_the_list_is_emptied(affine):
    _, replayed = affine
    for n in range(4):
        x = torch.full((3,), float(n))
        passed = [x]
        replayed(passed)
        assert passed == [] and torch.equal(x, torch.full((3,), float(n)))


def test_each_set_of_sizes_and_strides_is_recorded_for_itself(affine):
    _, replayed = affine
    for x in (torch.randn(3), torch.randn(2, 3), torch.randn(3, 2).t()):
        for _ in range(3):
            assert torch.equal(replayed([x])[0], x * 2 + 1)
    assert replayed.num_recordings == 3


def test_a_weight_written_in_place_is_read_and_one_replaced_is_recorded_anew(affine):
    run, replayed = affine
    for _ in range(3):
        replayed([torch.zeros(3)])
    run.weight.fill_(5.0)
    assert torch.equal(replayed([torch.zeros(3)])[0], torch.full((3,), 5.0))
    assert replayed.num_recordings == 1
    run.weight.data = torch.full((3,), 7.0)
    for _ in range(3):
        assert torch.equal(replayed([torch.zeros(3)])[0], torch.full((3,), 7.0))
    assert replayed.num_recordings == 1


def test_a_state_that_is_written_where_it_lies_is_its_own_result_and_is_not_held():
    def run(inputs):
        x, state = inputs
        inputs.clear()
        state[0] = x[0]
        return [x + 1, state]

    replayed = Replayed(run, Again(), [False, True])
    for state in (torch.zeros(3), torch.zeros(3)):
        for n in range(4):
            y, new = replayed([torch.full((3,), float(n)), state])
            assert new is state and state[0] == n and torch.equal(y, torch.full((3,), n + 1.0))
    assert replayed.num_recordings == 2
    assert all(recording.inputs[1] is None and recording.results[1] is None for recording in replayed._recordings.values())


def test_states_are_read_where_they_lie():
    replayed = Replayed(lambda inputs: [inputs[0] + inputs[1]], Again(), [False, True])
    state, other = torch.zeros(2), torch.full((2,), 9.0)
    for n in range(5):
        state.fill_(n)
        assert torch.equal(replayed([torch.ones(2), state])[0], torch.full((2,), n + 1.0))
    assert torch.equal(replayed([torch.ones(2), other])[0], torch.full((2,), 10.0)), "another state at another address"
    assert torch.equal(state, torch.full((2,), 4.0))


ALIASES = {
    "an input": lambda inputs, weight: [inputs[0].view(-1)],
    "a weight": lambda inputs, weight: [weight],
    "each other": lambda inputs, weight: [y := inputs[0] * 2, y.view(-1)],
}


@pytest.mark.parametrize("name", ALIASES)
def test_results_that_share_memory_are_not_recorded(name):
    weight = torch.ones(2)
    replayed = Replayed(lambda inputs: ALIASES[name](inputs, weight), Again(), [False], [weight])
    for _ in range(4):
        x = torch.randn(2, 2)
        results = replayed([x])
    assert replayed.num_recordings == 0
    storages = {results[-1].untyped_storage().data_ptr()}
    assert storages & {t.untyped_storage().data_ptr() for t in (x, weight, *results[:-1])}


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so():
    class Refuses(Again):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    replayed = Replayed(lambda inputs: [inputs[0] + 1], Refuses(), [False])
    replayed([torch.zeros(1)])
    with pytest.warns(UserWarning, match="not as one recording: operation not permitted when stream is capturing$"):
        assert replayed([torch.zeros(1)])[0] == 1
    assert replayed([torch.zeros(1)])[0] == 1 and replayed.num_recordings == 0


def test_the_first_sizes_are_recorded_and_no_others_in_their_place(affine):
    run, replayed = affine
    for _ in range(4):
        for size in range(1, MAX_RECORDINGS + 4):
            x = torch.randn(size, 3)
            assert torch.equal(replayed([x])[0], x * 2 + 1)
    assert replayed.num_recordings == MAX_RECORDINGS
    calls = run.calls
    replayed([torch.randn(MAX_RECORDINGS + 3, 3)])
    assert run.calls == calls + 1, "runs as it is, and is not recorded"


@pytest.mark.parametrize("wide", [lambda x: x.expand(4, 3), lambda x: x.expand(2, 4, 3)])
def test_expanded_inputs_and_results_run_as_they_are(affine, wide):
    _, replayed = affine
    for _ in range(3):
        x = wide(torch.randn(1, 3))
        assert torch.equal(replayed([x])[0], x * 2 + 1)
    assert replayed.num_recordings == 0
    expands = Replayed(lambda inputs: [(inputs[0] * 2).expand(4, 3)], Again(), [False])
    for _ in range(3):
        assert torch.equal(expands([torch.ones(1, 3)])[0], torch.full((4, 3), 2.0))
    assert expands.num_recordings == 0


def test_each_use_of_a_recording_is_a_turn():
    recorder = Again()
    replayed = Replayed(lambda inputs: [inputs[0] + 1], recorder, [False])
    for _ in range(5):
        replayed([torch.zeros(2)])
    assert recorder.turns == 4, "all but the first call"


def test_values_that_are_no_tensors_are_part_of_what_was_recorded():
    replayed = Replayed(lambda inputs: [inputs[0] * inputs[1], inputs[1] + 1], Again(), [False, False])
    for factor in (2, 3, 2, 3, 2, 3):
        y, n = replayed([torch.ones(1), factor])
        assert y.item() == factor and n == factor + 1


def test_threads_take_turns(affine):
    _, replayed = affine
    wrong = []

    def calls(value):
        for _ in range(200):
            x = torch.full((3,), float(value))
            if not torch.equal(replayed([x])[0], x * 2 + 1):
                wrong.append(value)

    threads = [threading.Thread(target=calls, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
