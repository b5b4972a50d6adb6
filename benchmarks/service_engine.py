"""One process of `benchmarks.service`: the engine alone with the shipped model, told over its input what to draw.

Reads the number of threads, says "ready"; then, for each line of requests, draws them all and writes when it began and
when it ended.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from sd_engine import Engine, Request, load_model, shipped_model
from worker.memory import keep_freed_memory


def main() -> None:
    keep_freed_memory()  # as a worker does: what it brings is the engine's gain, not the service's
    torch.set_num_threads(int(sys.stdin.readline()))
    engine = Engine(load_model(shipped_model(), torch.device("cpu"), torch.float32))
    with torch.inference_mode():
        engine.render([Request(prompt="warm", seed=1, steps=2)])
        print("ready", flush=True)
        for line in sys.stdin:
            requests = [Request(**fields) for fields in json.loads(line)]
            began = time.time()
            images = engine.render(requests)
            assert len(images) == len(requests)
            print(json.dumps([began, time.time()]), flush=True)


if __name__ == "__main__":
    main()
