"""Keep a random sample of a fresh cosmic-ray session's mutants, since all of them would take weeks.

Called as `python suites/meta/sample_mutants.py SESSION COUNT [SEED]`.
"""

import random
import sqlite3
import sys


def main(session: str, count: int, seed: int | None = None) -> None:
    """Drop all mutants but `count` of them from the session's file."""
    with sqlite3.connect(session) as database:
        jobs = sorted(row[0] for row in database.execute("SELECT job_id FROM work_items"))
        dropped = random.Random(seed).sample(jobs, max(0, len(jobs) - count))
        for table in ("mutation_specs", "work_items"):
            database.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(job,) for job in dropped])
    print(f"{len(jobs) - len(dropped)} of {len(jobs)} mutants are tried")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
