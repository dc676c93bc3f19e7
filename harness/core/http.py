"""One JSON answer of a server, or an error that says which address gave none."""

import json
import urllib.error
import urllib.request
from typing import Any

from moe_harness.harness.core.errors import CannotJudge


def get(address: str, timeout: float) -> dict[str, Any]:
    """What a GET of `address` answers; `timeout` in seconds.

    Raises:
        CannotJudge: it cannot be reached, answers with an error, or not in JSON.
    """
    return _open(urllib.request.Request(address), timeout)


def post(address: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    """As `get`, for a POST of `body`."""
    data = json.dumps(body).encode()
    return _open(urllib.request.Request(address, data, {"Content-Type": "application/json"}), timeout)


def _open(request: urllib.request.Request, timeout: float) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        raise CannotJudge(f"{request.full_url} answered {error.code}: {error.read(300)!r}") from error
    except (OSError, ValueError) as error:
        raise CannotJudge(f"{request.full_url} cannot be reached or does not answer in JSON: {error}") from error
