"""One JSON answer of a server, or an error that says which address gave none."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
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
            found = json.load(response)
    except urllib.error.HTTPError as error:
        raise CannotJudge(f"{request.full_url} answered {error.code}: {error.read(300)!r}") from error
    except (OSError, HTTPException, ValueError) as error:  # HTTPException: an answer that breaks off
        raise CannotJudge(f"{request.full_url} cannot be reached or does not answer in JSON: {error}") from error
    if not isinstance(found, dict):
        raise CannotJudge(f"{request.full_url} answered {str(found)[:80]}, but should answer with a JSON object")
    return found
