"""The server's metrics, in Prometheus' text format. They contain only numbers: no text of prompts or answers, no addresses."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from eua.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)


class Metrics:
    """The metrics of one server; its engine provides the numbers of waiting and running requests."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "eua_requests", "Chat requests and those without access, by status", ["status"], registry=self.registry
        )
        self.refusals = Counter("eua_refusals", "Requests that the guard refused", registry=self.registry)
        self.cancelled = Counter("eua_cancelled", "Requests whose client disconnected", registry=self.registry)
        self.tokens = Counter("eua_tokens", "Tokens of answered requests", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "eua_request_seconds", "From request to complete answer", buckets=SECONDS, registry=self.registry
        )
        self.first_seconds = Histogram(
            "eua_first_piece_seconds", "From request to the first text", buckets=SECONDS, registry=self.registry
        )
        for name, what in (("waiting", "Requests in the queue"), ("running", "Requests in the running batch")):
            gauge = Gauge(f"eua_requests_{name}", what, registry=self.registry)
            gauge.set_function(lambda name=name: getattr(engine, name))

    def render(self) -> bytes:
        return generate_latest(self.registry)
