"""Serve a model on this machine: OpenAI's completions with suffix, llama.cpp's infill, a page where text grows.

python -m examples.serve --port 8000
"""

import argparse
import socket
import sys
import time
from importlib.util import find_spec


NEEDED = ("fastapi", "uvicorn")


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve",
        description=__doc__,
        formatter_class=type(
            "Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}
        ),
    )
    parser.add_argument("--model", help="folder of an InsNeXt or a DRT; without it insnext-smol or insnext-mini")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; others than loopback are open to all")
    parser.add_argument("--port", type=int, default=8000, help="port to bind")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; one more gets 429")
    parser.add_argument("--rows", type=int, default=16, help="most texts of a batch")
    parser.add_argument("--max_tokens", type=int, default=512, help="most tokens that a request may ask for")
    parser.add_argument("--seconds", type=float, default=120.0, help="most from a request's arrival to its end")
    return parser.parse_args(args)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket of that address, which takes no connection before somebody listens.

    Raises:
        OSError: If the address is taken, or none of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def main() -> int:
    options = parse()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f'examples.serve needs {" and ".join(missing)}: pip install ".[serve]"', file=sys.stderr)
        return 1
    try:
        listener = bound(options.host, options.port)
    except OSError as error:
        print(f"nothing can be served on {options.host}, port {options.port}: {error.strerror}", file=sys.stderr)
        return 1
    with listener:
        return serve(options, listener)


def serve(options: argparse.Namespace, listener: socket.socket) -> int:
    """Read the model and answer until somebody ends it; return the exit status."""
    print("reading the model ...", flush=True)
    began = time.monotonic()
    # torch and the models are worth waiting for only if the server can start
    import torch
    import uvicorn

    from .app import LOOPBACK, make_app
    from .engine import Engine, Limits
    from .model import load

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    limits = Limits(options.queue, options.rows, options.max_tokens, options.seconds)
    try:
        engine = Engine(*load(options.model, options.dtype), limits)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    hosts = None if options.host in ("0.0.0.0", "::") else LOOPBACK | {options.host.lower()}
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(
        f"{engine.name}, read in {time.monotonic() - began:.0f} s, answers at {address} (Ctrl C ends it)", flush=True
    )
    # who is answered when the server ends is not waited for longer than that
    config = uvicorn.Config(make_app(engine, hosts), access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
