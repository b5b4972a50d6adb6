"""A worker process like any other, with the fake engine: ``python -m tests.integration.fake_worker OPTIONS STEP_S``.

OPTIONS is JSON for ``worker.process.Options``, and ``lookout_s`` of the pace beside a broker; the settings come from
the environment.
"""

import json
import sys
from dataclasses import replace

from jobs import Settings
from tests.fakes import fake_workshop
from worker import logs, sweeper
from worker.preflight import open_services
from worker.process import Options, run


def main() -> int:
    options, step_s = json.loads(sys.argv[1]), float(sys.argv[2])
    logs.set_up(as_json=False)
    settings = Settings()
    pace = sweeper.WITH_BROKER
    sweeper.WITH_BROKER = replace(pace, lookout_s=options.pop("lookout_s", pace.lookout_s))
    return run(open_services(settings), settings, Options(**options), lambda: fake_workshop(step_s=step_s))


if __name__ == "__main__":
    sys.exit(main())
