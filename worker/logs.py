"""Logs of a worker: one line an event on stderr, as text or as JSON."""

import json
import logging
import sys
import time

from jobs.redaction import hide


class TextFormatter(logging.Formatter):
    """Lines for people, tracebacks and all, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, thread, message, and the traceback when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": hide(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = hide(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def set_up(*, as_json: bool, level: int = logging.INFO) -> None:
    """Replace the root logger's handlers. Of Celery only warnings: its two lines a task say less than ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("celery", "kombu", "botocore", "urllib3", "alembic"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
