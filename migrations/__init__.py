"""The history of the tables; installed as `jobs.migrations`."""
