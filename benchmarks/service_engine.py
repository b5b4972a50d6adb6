"""One process of `benchmarks.service`: the engine alone, told over its input what to draw.

Reads its threads, its model (name and folder) and its dtype, says "ready"; then, for each line of requests, draws them
all and writes when it began and when it ended.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from sd_engine import Engine, Request, load_model, shipped_model
from worker.memory import keep_freed_memory


def main() -> None:
    keep_freed_memory()  # as a worker does: what it brings is the engine's gain, not the service's
    told = json.loads(sys.stdin.readline())
    torch.set_num_threads(told["threads"])
    folder = shipped_model() if told["folder"] == "shipped" else Path(told["folder"])
    engine = Engine({told["model"]: load_model(folder, "cpu", told["dtype"])})
    with torch.inference_mode():
        print("ready", flush=True)
        for line in sys.stdin:
            requests = [Request(**fields) for fields in json.loads(line)]
            began = time.time()
            images = engine.render(requests)
            assert len(images) == len(requests)
            print(json.dumps([began, time.time()]), flush=True)


if __name__ == "__main__":
    main()
