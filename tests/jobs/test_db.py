"""How the databases are opened."""

import subprocess
import sys

ASK = """
import psycopg
from jobs.db import open_engines

ours = {"uuid.UUID", "datetime.datetime"}
named = lambda adapters: ours & adapters._dumpers[psycopg.adapt.PyFormat.AUTO].keys()
assert named(psycopg.adapters) == ours, "psycopg has another way now"
engines = open_engines("postgresql://host/name")
assert not named(engines.writer.dialect._psycopg_adapters_map)
"""


def test_no_thread_ever_meets_a_driver_that_is_about_to_learn_our_types() -> None:
    """In a process of its own: any test before this one may have taught it."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
