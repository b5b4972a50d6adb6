"""How a worker process ended, as its supervisor and scripts read it."""

DONE = 0
"""It was told to leave, or ``--until-empty`` found nothing left."""

WRONG_SETTINGS = 2
"""A person must change something: a restart would end the same way. Also click's code for a wrong command line."""

UNAVAILABLE = 69
"""EX_UNAVAILABLE: a service is away, and trying again can help."""

BROKEN = 70
"""EX_SOFTWARE: what nobody foresaw, as when the engine's thread died."""

HUNG = 71
"""A step lasted longer than its limit, or the process gave no sign of life and was killed."""

NOT_CONSUMING = 75
"""EX_TEMPFAIL: rows waited, slots were free, the broker answered, and yet no bell was heard."""
