"""Serve a model on this machine: OpenAI's completions with suffix, llama.cpp's infill, a page where text grows.

python -m examples.serve --port 8000
"""

import argparse
import sys
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


def main() -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f'examples.serve needs {" and ".join(missing)}: pip install ".[serve]"', file=sys.stderr)
        return 1
    # torch and the models are worth waiting for only if the server can start
    import torch
    import uvicorn

    from .app import LOOPBACK, make_app
    from .engine import Engine, Limits
    from .model import load

    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    limits = Limits(options.queue, options.rows, options.max_tokens, options.seconds)
    engine = Engine(*load(options.model, options.dtype), limits)
    hosts = None if options.host in ("0.0.0.0", "::") else LOOPBACK | {options.host.lower()}
    uvicorn.run(make_app(engine, hosts), host=options.host, port=options.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
