"""A judging process ends with the one that it judges for."""

import os
import select
import threading
from multiprocessing.connection import Connection


def end_with(connection: Connection) -> None:
    """From now on this process ends as soon as the other end of the connection is gone.

    Whoever waits for a message sees that by itself; a kernel that hangs while its judge is killed would run for ever.
    """
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # of a connection without interest in its data only the end is told

    def watch(connection: Connection) -> None:  # which holds it: a connection is closed with its last name
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, args=(connection,), name="lifeline", daemon=True).start()
