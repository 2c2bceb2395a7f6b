"""HTTP connections: uvicorn's, with a deadline, and errors in OpenAI's format for what is not HTTP."""

from __future__ import annotations

import asyncio
import json
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

from eua.serving.protocol import RequestError


class Connection(H11Protocol):
    """One connection of a client. ``since`` is when it was made or, if requests were answered, when the last answer ended."""

    since: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.since = time.monotonic()
        super().connection_made(transport)

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered: none has been sent, or its headers are incomplete."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_receiving(self) -> bool:
        """Whether a request is still awaited or incomplete."""
        return self.is_idle or self.cycle.more_body

    def close(self) -> None:
        """Close without waiting for a client that does not read; a running answer is cancelled."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Reject what is not HTTP. uvicorn calls this."""
        if self.is_idle or not self.cycle.response_started:
            error = RequestError(f"The request cannot be read as HTTP ({msg.rstrip('.')}): send HTTP/1.1.")
            body = json.dumps(error.body())
            head = ["HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}"]
            head += ["connection: close", ""]
            self.transport.write("\r\n".join([*head, body]).encode())
        self.transport.close()
