"""``eua serve``: serves a model as a chat endpoint over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from eua.cli.options import Parser, add_guard, add_model, positive
from eua.errors import EUAError


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "serve",
        "Serves OpenAI's chat endpoint, /v1/chat/completions, to the same machine. For others, set a key (EUA_API_KEY), and "
        "put a proxy with TLS in front of it.",
        ("eua serve --model unlearned", "eua serve --model unlearned --port 0 --max-batch 1"),
    )
    add_model(parser)
    add_guard(parser)
    parser.add_argument("--no-guard", action="store_true", help="answer everything")
    parser.add_argument("--name", help="name of the model for clients (default: the last part of --model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that clients may use for this server, and whose web pages may use it; may be repeated "
        "(default: localhost if --host is a loopback address, otherwise any)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that clients must send. Other users of the machine can see it in the list of processes; the environment "
        "variable EUA_API_KEY sets it out of their sight",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes any free one")
    parser.add_argument(
        "--max-batch", type=positive(int), default=8, help="requests in a batch; with 1, an answer is the same as alone"
    )
    parser.add_argument("--queue", type=positive(int), default=128, help="requests that may wait; more get status 429")
    parser.add_argument(
        "--timeout", type=positive(float), default=120.0, help="seconds that a request may take; then status 504"
    )
    parser.add_argument(
        "--read-timeout",
        type=positive(float),
        default=15.0,
        help="seconds in which a request's headers must arrive, and then its body (status 408)",
    )
    parser.add_argument(
        "--max-connections",
        type=positive(int),
        default=512,
        help="open connections; a new one takes the place of the one that has waited longest without a complete request",
    )
    parser.add_argument(
        "--max-prompt-tokens", type=positive(int), help="longest prompt (default: the model's number of positions)"
    )
    parser.add_argument("--max-tokens", type=positive(int), default=512, help="longest answer, and the default of a request")
    parser.add_argument(
        "--max-body-bytes", type=positive(int), default=2**20, help="largest request; larger ones get status 413"
    )
    parser.add_argument("--grace", type=positive(float), default=30.0, help="seconds after SIGTERM to finish accepted requests")
    arguments = parser.parse_args(argv)

    try:
        from eua.serving.server import run_serve
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise EUAError(f"Serving needs {error.name}, which is not installed: pip install 'eua[serve]'.") from error
    run_serve(arguments)
