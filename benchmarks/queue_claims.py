"""One process of `queue_figures.claims`: claims jobs with many threads. Light, so that it starts in a moment.

Reads JSON from its input (url, ids, threads); says "ready", waits for a line, and writes how many it claimed, from when
to when on the machine's monotonic clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from uuid import UUID

from jobs.store import Store


def main() -> None:
    told = json.loads(sys.stdin.readline())
    ids, threads = [UUID(id) for id in told["ids"]], int(told["threads"])
    name = f"bench:{os.getpid()}"
    with closing(Store.open(told["url"])) as store, ThreadPoolExecutor(threads) as pool:
        # Every connection is there before the clock starts.
        list(pool.map(lambda _: store.claim(UUID(int=0), name), range(4 * threads)))
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        claimed = sum(pool.map(lambda job_id: store.claim(job_id, name) is not None, ids))
        print(json.dumps([claimed, began, time.monotonic()]), flush=True)


if __name__ == "__main__":
    main()
