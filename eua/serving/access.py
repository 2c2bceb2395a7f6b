"""Who may use the server: names of hosts, origins of web pages, and the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.requests import Request

from eua.errors import EUAError
from eua.serving.protocol import RequestError

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def is_loopback(address: str) -> bool:
    """Whether a socket that listens on this IP address is reached from the same machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        EUAError: if no client could send it in a header. The text does not quote it.
    """
    if not key or not all("!" <= character <= "~" for character in key):
        raise EUAError(
            "The API key is empty, or holds spaces or characters outside ASCII, so no client could send it: choose another "
            "key, or leave it out to serve without one."
        )
    return key


@dataclass(frozen=True)
class Access:
    """The checks of a request's headers, before its body is read.

    Every web page may send requests to servers on its visitor's machine. A page that has its own name resolve to 127.0.0.1
    ("DNS rebinding") is recognized by that name in ``Host``, any other by ``Origin``.

    >>> Access(hosts=("localhost",)).check(request)                      # doctest: +SKIP

    Args:
        hosts: names that clients may use for the server; None allows any.
        trusted: names whose web pages may use the server, apart from pages of the server's own address.
        key: what a client has to send as ``Authorization: Bearer KEY``; None requires none.
    """

    hosts: Collection[str] | None = None
    trusted: Collection[str] = ()
    key: str | None = field(default=None, repr=False)

    def check(self, request: Request) -> None:
        """Check host, origin and, except for ``/health``, the key.

        Raises:
            RequestError: 403 for a foreign host or origin, 401 for a missing or wrong key.
        """
        host = request.headers.get("host", "").lower()
        if self.hosts is not None and host_name(host) not in self.hosts:
            raise RequestError(
                "The request's Host header names a host that this server does not answer for: use its own address, or start "
                "the server with --allowed-host.",
                403,
            )
        for origin in request.headers.getlist("origin"):
            _, _, place = origin.lower().partition("://")
            if not place or (place != host and host_name(place) not in self.trusted):
                raise RequestError(
                    "The request comes from a web page of another origin, which may not use this server: start the server with "
                    "--allowed-host and the page's host, or ask without a browser.",
                    403,
                )
        if self.key is not None and request.scope["path"] != "/health":  # request.url would begin with the Host header
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode())
            if kind.lower() != "bearer" or not is_right:
                raise RequestError(
                    "The request has no valid API key: send the server's key in the header 'Authorization: Bearer KEY'.",
                    401,
                    code="invalid_api_key",
                )


def check_is_json(request: Request) -> None:
    """Raise :class:`RequestError` (415) unless the body is declared as JSON, which no web page can do for another origin."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("The body is not declared as JSON: send the header 'Content-Type: application/json'.", 415)


def host_name(place: str) -> str:
    """The host of ``host``, ``host:port``, ``[address]`` or ``[address]:port``."""
    host = place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
    return host.rstrip(".")
