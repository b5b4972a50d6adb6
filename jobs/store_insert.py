"""The store's INSERTs: many rows in one transaction, nothing per row but its validation.

Rows travel as JSON, a few thousand in one parameter of one statement. A bound parameter per value, or a statement per
row, costs the driver and the database three times as much as the insertion itself.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from jobs.db import db_now
from jobs.errors import FieldError, InvalidSpec
from jobs.models import MAX_ATTEMPTS, job
from jobs.models import batch as batch_table
from jobs.spec import JobSpec
from jobs.states import State
from jobs.store_read import chunks
from jobs.views import JobView, Output

#: Rows sent to the database at once: bounds memory, costs nothing measurable in speed.
ROWS_AT_ONCE = 2000
MAX_NAME = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A job that may be inserted."""

    id: UUID
    spec: JobSpec
    idempotency_key: str | None


def prepare(
    specs: Sequence[JobSpec], idempotency_keys: Sequence[str | None] | None, rng: random.Random
) -> list[Prepared]:
    """Jobs with their ids and seeds. Raises InvalidSpec for a picture that is not stored, or an unusable key."""
    keys = [None] * len(specs) if idempotency_keys is None else list(idempotency_keys)
    if len(keys) != len(specs):
        raise InvalidSpec(
            FieldError("idempotency_keys", f"{len(keys)} keys for {len(specs)} specs; give one key or none per spec")
        )
    for key in keys:
        _check_name("idempotency_key", key)
    ids = ordered_ids(len(specs), time.time_ns() // 1_000_000, rng)
    rows = [Prepared(id, spec.with_seed(rng), key) for id, spec, key in zip(ids, specs, keys, strict=True)]
    for row in rows:
        _ = row.spec.input_key, row.spec.mask_key  # refuses a picture that only this machine has
    return rows


def ordered_ids(count: int, now_ms: int, rng: random.Random) -> Iterator[UUID]:
    """UUIDs (version 7) that ascend in the order given, so that a batch keeps the order of its file.

    The time in them only keeps an index compact; nothing compares it with the database's clock.
    """
    drawn = rng.randbytes(6 * count)  # at once: each draw from the system's own randomness is a call into the kernel
    for number in range(count):
        high, low = number >> 14 & 0xFFF, number & 0x3FFF
        rest = int.from_bytes(drawn[6 * number : 6 * number + 6], "big")
        yield UUID(int=now_ms << 80 | 7 << 76 | high << 64 | 0b10 << 62 | low << 48 | rest)


def _check_name(field: str, name: object) -> None:
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()):
        raise InvalidSpec(
            FieldError(
                field, f"{str(name)[:40]!r} is not allowed; allowed: text of 1 to {MAX_NAME} printable characters"
            )
        )


def jobs(connection: Connection, rows: Sequence[Prepared], *, batch: str | None, rung: bool) -> Mapping[UUID, JobView]:
    """Insert the rows, leaving out those whose idempotency key is known; a view of each row as if it were new."""
    now: datetime = connection.scalar(sa.select(db_now()))
    common = {
        "batch_id": None if batch is None else _batch_id(connection, batch, now, rows),
        "state": State.queued,
        "attempts": 0,
        "max_attempts": MAX_ATTEMPTS,
        "created_at": now,
        "available_at": now,
        "rung_at": now if rung else None,
    }
    statement = _insert_many(connection.dialect.name, tuple(common))
    bound = {_bound(name): value for name, value in common.items()}
    # In the order of the keys: two producers that insert the same keys then wait for, and never deadlock, each other.
    in_order = sorted(rows, key=lambda row: row.idempotency_key or "")
    for text in _texts(list(chunks(in_order, ROWS_AT_ONCE))):
        connection.execute(statement, bound | {"rows": text})
    return {row.id: _new_view(row, batch, now) for row in rows}


#: The columns in which the rows of one submit differ.
_OWN = (job.c.id, job.c.idempotency_key, job.c.spec, job.c.model, job.c.urgency)


def _texts(parts: Sequence[Sequence[Prepared]]) -> Iterator[str]:
    """Each part as JSON. The next ones are made while the database, which needs no interpreter, stores the first."""
    if len(parts) < 2:
        yield from map(_as_json, parts)
        return
    with ThreadPoolExecutor(1) as pool:
        yield from pool.map(_as_json, parts)


def _as_json(rows: Sequence[Prepared]) -> str:
    return json.dumps([_own(row) for row in rows])


def _own(row: Prepared) -> dict[str, Any]:
    spec = row.spec
    return {
        "id": row.id.hex,
        "idempotency_key": row.idempotency_key,
        "spec": spec.model_dump_json(),
        "model": spec.model,
        "urgency": 9 - spec.priority,
    }


@cache
def _insert_many(dialect: str, common: tuple[str, ...]) -> sa.Insert:
    """INSERT of the JSON array `rows`, in its order, each with the same value in the `common` columns."""
    array = sa.bindparam("rows", type_=sa.Text)
    own: Sequence[sa.ColumnElement[Any]]
    if dialect == "sqlite":
        each = sa.func.json_each(array).table_valued("value")
        own = [sa.func.json_extract(each.c.value, f"$.{column.name}") for column in _OWN]
    else:
        typed = [sa.column(column.name, column.type) for column in _OWN]
        each = sa.func.json_to_recordset(sa.cast(array, sa.JSON)).table_valued(*typed).render_derived(with_types=True)
        own = list(each.c)
    same = [sa.bindparam(_bound(name), type_=job.c[name].type) for name in common]
    # SQLite needs a WHERE here: without one it takes ON CONFLICT for the beginning of a join.
    chosen = sa.select(*own, *same).select_from(each).where(sa.true())
    names = [column.name for column in _OWN] + list(common)
    return _leaving_out_known(_KINDS[dialect].insert(job).from_select(names, chosen), "idempotency_key")


def _bound(column: str) -> str:
    return f"common_{column}"


def _new_view(row: Prepared, batch: str | None, now: datetime) -> JobView:
    return JobView(row.id, State.queued, 0, None, row.spec, batch, now, None, None)


def _batch_id(connection: Connection, name: str, now: datetime, rows: Sequence[Prepared]) -> UUID:
    """The batch of this name, made when it is new, and held until the end of the transaction: no prune removes it."""
    _check_name("batch", name)
    fresh = rows[0].id if rows else next(ordered_ids(1, time.time_ns() // 1_000_000, random.SystemRandom()))
    insert = _leaving_out_known(_KINDS[connection.dialect.name].insert(batch_table), "name")
    hold = sa.select(batch_table.c.id).where(batch_table.c.name == name).with_for_update(read=True, key_share=True)
    found: UUID | None = None
    while found is None:  # again when an empty batch was pruned between the two
        connection.execute(insert, [{"id": fresh, "name": name, "created_at": now}])
        found = connection.scalar(hold)
    return found


_KINDS: Mapping[str, Any] = {"sqlite": sqlite, "postgresql": postgresql}


def _leaving_out_known(insert: Any, unique: str) -> sa.Insert:
    """An INSERT that leaves out rows whose `unique` column is taken, also by a transaction that commits meanwhile."""
    statement: sa.Insert = insert.on_conflict_do_nothing(index_elements=[unique])
    return statement


def as_row(output: Output) -> dict[str, Any]:
    """The columns of an image."""
    return dataclasses.asdict(output)
