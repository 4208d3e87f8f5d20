"""The cache against a list that does the same, slowly."""

import copy
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.data import Cache

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 4)),
        st.tuples(st.just("put"), st.integers(0, 4), st.sampled_from([0, 3, 5, 9, 25])),
    ),
    min_size=10,
    max_size=40,
)


@settings(max_examples=200)
@given(steps=STEPS, limit=st.integers(0, 24))
def test_keeps_what_was_used_last(steps, limit):
    cache = Cache(limit)
    model: list[tuple[int, int, int]] = []  # key, value, size; the last used one at the end
    for number, step in enumerate(steps):
        found = [entry for entry in model if entry[0] == step[1]]
        if step[0] == "get":
            assert cache.get(step[1]) == (found[0][1] if found else None)
            if found:
                model.remove(found[0])
                model.append(found[0])
        elif step[2] <= limit:
            cache.put(step[1], number, step[2])
            model = [entry for entry in model if entry[0] != step[1]]
            model.append((step[1], number, step[2]))
            while sum(size for _, _, size in model) > limit:
                model.pop(0)
        else:
            cache.put(step[1], number, step[2])
        assert cache.held == sum(size for _, _, size in model) <= limit


def test_a_copy_for_another_process_is_empty():
    cache = Cache(100)
    cache.put("a", b"x" * 50, 50)
    other = copy.copy(cache)  # by the same protocol as pickling
    assert (other.limit, other.held, other.get("a")) == (100, 0, None)
    other.put("a", b"y", 1)
    assert (other.get("a"), cache.get("a")) == (b"y", b"x" * 50)


def test_threads_do_not_break_the_count():
    cache = Cache(1000)

    def work(seed):
        for i in range(2000):
            cache.put((seed * i) % 37, i, (i * seed) % 90)
            cache.get(i % 37)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.held == sum(size for _, size in cache._values.values()) <= 1000
