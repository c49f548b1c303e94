"""The same work on every record of a set, by threads: results in order, and little memory."""

import collections
import concurrent.futures

CHUNK = 16  # records of one task: taking a task costs more than some records do


def sweep(work, rows, *, workers, progress=None):
    """Yields work(row) of every row, in order.

    Threads are enough: reading files, hashing and Pillow's decoding let the others run. At most 3 *
    workers * CHUNK results wait.

    Args:
      work: row -> result, called from `workers` threads.
      rows: a sequence.
      workers: threads.
      progress: called as progress(rows done, rows in all), now and then.
    """
    done, waiting = 0, collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for start in range(0, len(rows), CHUNK):
                waiting.append(
                    pool.submit(
                        lambda chunk: [work(row) for row in chunk], rows[start : start + CHUNK]
                    )
                )
                while len(waiting) >= 2 * workers or (waiting and start + CHUNK >= len(rows)):
                    results = waiting.popleft().result()
                    yield from results
                    done += len(results)
                    if progress is not None:
                        progress(done, len(rows))
        finally:  # an error, or the caller wants no more
            pool.shutdown(wait=False, cancel_futures=True)
