"""The command that runs the simulated provider as a server until a signal stops it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import uvloop

from backends.simulated.profile import Profile, add_arguments, profile_from
from backends.simulated.server import serve


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads to a command."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8200, metavar="N", help="0 takes a free one (default: 8200)")
    parser.add_argument("--api-key", default="", metavar="TEXT", help="key that callers must send (default: any)")
    add_arguments(parser.add_argument_group("the provider"))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status.

    Prints the base URL to stdout as soon as the server accepts requests. For an invalid option it prints one line to
    stderr.
    """
    try:
        profile = profile_from(args)
    except ValueError as error:
        print(f"vlm-sidecar simulate: {error} (--help shows what it takes)", file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(profile, args.host, args.port, args.api_key))


async def _serve(profile: Profile, host: str, port: int, api_key: str) -> int:
    loop, stop_requested = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_requested.set)
    try:
        runner = await serve(profile, host, port, api_key=api_key)
    except (OSError, OverflowError) as error:  # OverflowError: the port is out of range
        print(f"vlm-sidecar simulate: cannot listen on {host}:{port}: {error}", file=sys.stderr)
        return 1
    try:
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{runner.addresses[0][1]}/v1", flush=True)
        await stop_requested.wait()
    finally:
        await runner.cleanup()
    return 0
