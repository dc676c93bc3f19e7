"""Time of a process's own: what it waits while others have the processor is not counted.

What is given seconds, a case or the search for a cause, has them on a busy machine too.
"""

import os
import time
from pathlib import Path


def waited_for_processor(pid: int | None) -> float:
    """Seconds that the main thread of a process was ready to run while others did; 0 where the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def own_time() -> float:
    """Seconds, from some time on, in which this process ran or waited for anything else than a processor."""
    return time.monotonic() - waited_for_processor(os.getpid())
