"""Work on every record: in order, ahead only so far, and over when it fails."""

import threading
import time

import pytest

from dlc_jax.data.sweep import CHUNK, sweep


@pytest.mark.parametrize("count", [0, 1, CHUNK, 10 * CHUNK + 3])
def test_results_come_in_order_and_progress_ends_at_all(count):
    told = []

    def work(row):
        time.sleep(0.001 * (row % 3))  # so that later chunks are done before earlier ones
        return row * row

    rows = list(range(count))[::-1]
    assert list(sweep(work, rows, workers=4, progress=lambda *now: told.append(now))) == [
        row * row for row in rows
    ]
    assert told == sorted(told) and (not count or told[-1] == (count, count))


def test_results_that_wait_are_few():
    started = []
    results = sweep(started.append, range(1000), workers=2)
    next(results)
    time.sleep(0.2)
    assert len(started) <= 3 * 2 * CHUNK
    results.close()


def test_who_wants_no_more_does_not_wait_for_it():
    started = []
    results = sweep(
        lambda row: started.append(row) or time.sleep(0.02 * (row >= CHUNK)), range(1000), workers=2
    )
    next(results)
    results.close()
    # The chunk that was taken and two that were begun; not the one that waited.
    assert max(started) < 3 * CHUNK


def test_workers_work_at_the_same_time():
    meeting = threading.Barrier(3)
    list(
        sweep(
            lambda row: meeting.wait(timeout=20) if row % CHUNK == 0 else None,
            range(3 * CHUNK),
            workers=3,
        )
    )


def test_an_error_ends_it():
    def work(row):
        if row == 40:
            raise ValueError("row 40")
        return row

    got = []
    with pytest.raises(ValueError, match="row 40"):
        got.extend(sweep(work, range(200), workers=2))
