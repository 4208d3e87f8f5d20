import functools
import itertools
import threading

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import Counted, make_batch

from elastictok.train import DataError, data_mesh
from elastictok.train._batches import Batches
from elastictok.train._devices import place


def first_pixel(batch):
    return int(batch.pixels[0, 0, 0, 0, 0, 0])


def take(batches, count):
    return [first_pixel(batches.next()) for _ in range(count)]


def open_batches(data, state=None):
    mesh = data_mesh(jax.local_devices()[:1])
    return Batches(data, functools.partial(place, mesh=mesh), state)


@given(first=st.integers(0, 6), second=st.integers(0, 6), peek=st.booleans())
def test_the_state_is_that_of_the_batches_handed_out(first, second, peek):
    whole = open_batches(Counted(1, 1))
    expected = take(whole, first + second)
    whole.close()

    before = open_batches(Counted(1, 1))
    if peek:
        before.peek()
    assert take(before, first) == expected[:first]
    state = before.state
    assert state == (None if first == 0 else {"next": first})  # however many were made ahead
    before.close()
    after = open_batches(Counted(1, 1), state)
    assert take(after, second) == expected[first:]
    after.close()


def test_one_batch_is_made_ahead_and_no_more():
    made = []

    def source():
        for seed in range(100):
            made.append(seed)
            yield make_batch(seed, examples=1, blocks=1)

    batches = open_batches(source())
    take(batches, 3)
    threading.Event().wait(0.3)
    assert len(made) <= 3 + 2  # one in the queue and one in the making
    batches.close()


def test_closing_ends_the_thread_and_closes_the_iterator():
    data = Counted(1, 1)
    batches = open_batches(data)
    batches.next()
    batches.close()
    assert data.closed == 1
    assert not [t for t in threading.enumerate() if t.name == "elastictok-batches"]


def test_errors_of_the_data_arrive_every_time():
    def source():
        yield make_batch(0, examples=1, blocks=1)
        raise OSError("disk on fire")

    batches = open_batches(source())
    batches.next()
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            batches.next()
    batches.close()


def test_an_end_names_the_remedy():
    batches = open_batches([make_batch(0, examples=1, blocks=1)] * 2)
    take(batches, 2)
    with pytest.raises(DataError, match=r"ended after 2 batches.*itertools\.cycle"):
        batches.next()
    batches.close()


def test_plain_iterables_cannot_be_resumed():
    batch = make_batch(0, examples=1, blocks=1)
    batches = open_batches(itertools.repeat(batch))
    assert take(batches, 2) == [first_pixel(batch)] * 2
    assert batches.state is None
    batches.close()
    with pytest.raises(DataError, match=r"repeat cannot be resumed.*get_state"):
        open_batches(itertools.repeat(batch), {"next": 2})


def test_a_state_that_is_no_json_is_an_error():
    class Odd(Counted):
        def __iter__(self):
            iterator = super().__iter__()
            iterator.get_state = lambda: {"next": object()}
            return iterator

    batches = open_batches(Odd(1, 1))
    with pytest.raises(TypeError, match="not JSON serializable"):
        batches.next()
    batches.close()
