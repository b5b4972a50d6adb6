"""The suite notices when we are broken. `make faults-mutations` breaks everything; here are two that are quick."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from jobs import schema
from jobs.store import Store
from tests.faults import lanes, mutate, mutations
from tests.faults.checker import check
from tests.faults.harness import Night
from tests.jobs import test_store


@lanes.only("embedded")
@pytest.mark.fault_slice
def test_the_oracle_notices_pictures_that_went_to_other_jobs(night: Night) -> None:
    worker = night.worker(mutation="swapped_slots")
    night.submit(8, images=2)  # those of one job are ready together
    night.wait_ended()
    with pytest.raises(AssertionError, match="is another picture"):
        check(night)
    worker.stop()


def test_the_stores_tests_notice_a_missing_fence(tmp_path: Path) -> None:
    with closing(Store.open(f"sqlite:///{tmp_path / 'jobs.db'}")) as store:
        schema.upgrade(store.engines)
        with mutations.applied("no_fencing"), pytest.raises(AssertionError):
            test_store.test_a_swept_lease_passes_to_the_next_worker_and_the_first_is_fenced_out(store)


def test_each_mutation_has_tests_that_are_meant_to_notice_it() -> None:
    assert mutate.MEANT.keys() == mutations.MUTATIONS.keys()
