"""A producer process: ``python -m tests.integration.producer COUNT STEPS`` submits COUNT jobs to the batch "night"."""

import sys

from jobs import Client

COLOURS = ("red", "green", "blue", "yellow")


def main() -> None:
    count, steps = int(sys.argv[1]), int(sys.argv[2])
    with Client() as client:
        client.submit_many(
            (
                {
                    "prompt": f"a large {COLOURS[number % 4]} star on a white background",
                    "seed": 100 * number,
                    "steps": steps,
                    "sampler": ("euler", "ddim", "dpmpp_2m")[number % 3],
                    "guidance": None if number % 3 else 4.0,
                    "images": 2 if number % 5 == 0 else 1,
                    "width": 64,
                    "height": 64,
                }
                for number in range(count)
            ),
            batch="night",
        )


if __name__ == "__main__":
    main()
