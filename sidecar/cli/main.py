"""Parses the command line and calls the command."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import shutil
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from sidecar import __version__
from sidecar.settings import (
    FOREIGN_NAMES,
    METAVARS,
    PREFIX,
    Settings,
    SettingsError,
    load,
    missing_folder,
    notices,
    open_to_all,
    option_name,
    refuse_unintended_simulation,
    seconds_of,
    with_unusable_ports_removed,
)

log = logging.getLogger("sidecar")

_EPILOG = """\
to begin:
  vlm-sidecar demo                       see what it does; needs no key
  export SIDECAR_DASHSCOPE_API_KEY=sk-...  for DashScope; any OpenAI-compatible server: SIDECAR_DASHSCOPE_URL
  vlm-sidecar check                      try settings, network, key and model
  vlm-sidecar serve                      requests to http://127.0.0.1:8100/v1, live page at http://127.0.0.1:9464/

vlm-sidecar COMMAND --help tells more of each, with examples.
exit status: 0 well, 2 bad usage or settings (one line on stderr names the setting), 1 anything else, 130 on Ctrl-C
"""

#: The text below the options in the help of each command.
_EPILOGS = {
    "serve": """\
examples:
  vlm-sidecar serve                                          no key, no URL: answers are simulated, and it says so
  vlm-sidecar serve --dashscope-api-key-file /run/secrets/dashscope
  vlm-sidecar serve --dashscope-url http://127.0.0.1:8000/v1 --max-concurrency 16      vLLM and others
  vlm-sidecar serve --config sidecar.toml --log-level debug

SIGTERM, Ctrl-C or `vlm-sidecar drain`: what was accepted is finished, within --drain-timeout; a second one gives up.
SIGHUP: with --config, the settings are loaded again; without, it drains. A changed file is loaded again too.
""",
    "check": """\
It takes the settings that serve takes, from the same places, and prints each with where it came from; secrets as ***.
Then each backend: name, connection, TLS, key, model, one small request of a few LLM tokens. A failed step says what to
do.

examples:
  vlm-sidecar check
  vlm-sidecar check --json --dashscope-url http://127.0.0.1:8000/v1
  vlm-sidecar check --answer refusal.txt                     how a provider's answer would be read, without a call

exit status: 0 all is well, 1 a step failed, 2 a setting cannot be used
""",
    "top": """\
examples:
  vlm-sidecar top                                            q or Ctrl-C leaves
  vlm-sidecar top --admin-host 10.0.0.7
  vlm-sidecar top --admin-port 19464                         as after: kubectl port-forward POD 19464:9464
  vlm-sidecar top | head -5                                  once, as plain text

NO_COLOR in the environment: without colours. The same in a browser: http://127.0.0.1:9464/
""",
    "demo": """\
It starts a simulated provider with a hidden quota and a sidecar as processes of its own, on free ports, and lets ten
cameras send real JPEG frames: behind a semaphore of 1, of 16, and through the sidecar. It takes a minute and a half.
Settings in the environment are not looked at.

examples:
  vlm-sidecar demo
  vlm-sidecar demo --html report.html
  vlm-sidecar demo --speed 10                                to see that it runs: nothing learns the faster for it
""",
    "simulate": """\
It prints its base URL, and counts what it saw at /_simulate/stats.

examples:
  vlm-sidecar simulate --requests-per-second 5 --burst 5 --latency 1.27
  vlm-sidecar simulate --port 0 --tokens-per-second 16000 --burst-tokens 50000
""",
    "drain": """\
What a preStop hook calls, in the container of the sidecar: the admin listener takes it from its own machine only.

examples:
  vlm-sidecar drain
  vlm-sidecar drain --admin-port 9464 --timeout 40

exit status: 0 it has finished, 1 nobody answers there or it is still draining after --timeout
""",
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit. Status 0: success; 2: invalid usage or settings (one line on stderr); 1: other errors.

    130: interrupted by Ctrl-C.
    """
    _open_standard_files()
    arguments = sys.argv[1:] if argv is None else argv
    args = _parser(arguments[:1]).parse_args(arguments or ["--help"])
    try:
        status = args.run(args)
        if sys.stdout is not None:  # None: the process was started with stdout closed
            sys.stdout.flush()
    except SettingsError as error:
        print(f"vlm-sidecar: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of the output has ended, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at exit would fail again
        status = 1
    sys.exit(status)


def _open_standard_files() -> None:
    """Open `/dev/null` in the place of each standard file that is closed.

    Otherwise a connection could get the number of stderr, and the event loop (libuv) aborts the process when it closes
    a file with such a number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error as one line, without the long usage text."""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help tells more)\n")


def _parser(called: list[str]) -> argparse.ArgumentParser:
    """Return the parser. Options that need a special import are added only if their command is called."""
    parser = _Parser(
        prog="vlm-sidecar",
        description="A localhost proxy that learns how much a vision-model provider allows, and queues fairly for it.",
        formatter_class=_Help,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show what is running and on what, and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=_Help,
            epilog=_EPILOGS[name],
        )
        added.set_defaults(run=run)
        return added

    _add_settings(command("serve", _serve, "run the sidecar"))
    check = command("check", _check, "print the settings in force, and try the backend step by step")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument(
        "--answer", type=Path, metavar="FILE",
        help="only say how this answer of a provider would be read, and why; FILE is what `curl -i` prints",
    )  # fmt: skip
    _add_settings(check)
    environ = with_unusable_ports_removed(os.environ)
    port = environ.get(f"{PREFIX}ADMIN_PORT") or 9464  # the port of a sidecar with the same environment
    top = command("top", _top, "show live where requests wait and why; plain text once when not on a terminal")
    top.add_argument(
        "--admin-host", metavar="HOST", default="127.0.0.1", help="where its admin listener is (default: 127.0.0.1)"
    )
    top.add_argument(
        "--admin-port", type=int, metavar="PORT", default=port, help="its admin port (default: %(default)s)"
    )
    demo = command("demo", _demo, "show the main job end to end: the same cameras with and without a sidecar")
    demo.add_argument(
        "--speed", type=float, metavar="N", default=1.0, help="play it so many times as fast (default: 1)"
    )
    demo.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots there too")
    simulate = command("simulate", _simulate, "run the simulated provider alone, with hidden quotas, for tests")
    if called == ["simulate"]:
        from backends.simulated.command import add_options  # noqa: PLC0415

        add_options(simulate)
    drain = command("drain", _drain, "ask a running sidecar to finish what it has and stop; waits until it has")
    drain.add_argument(
        "--admin-port", type=int, metavar="PORT", default=port, help="its admin port (default: %(default)s)"
    )
    drain.add_argument(
        "--timeout", type=_seconds, metavar="TIME", default=30.0, help="time to wait for it (default: 30s)"
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option for each setting. `settings.load` checks the values, together with those of the other sources."""
    parser.usage = f"{parser.prog} [options] [settings]"
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings, weaker than environment")
    group = parser.add_argument_group(
        "settings",
        f"each also from the environment as {PREFIX}… and from the file; stronger first: option, environment, file",
    )
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        kind = field.annotation
        if kind is bool:
            group.add_argument(
                option_name(name),
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
            continue
        if field.default not in (None, ""):
            text += f" (default: {field.default})"
        group.add_argument(option_name(name), dest=name, metavar=_metavar(field), default=argparse.SUPPRESS, help=text)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that is as wide as the terminal, at most 118 columns, and leaves room for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120) - 2)


def _seconds(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not {text[:40]!r}") from None


def _metavar(field: FieldInfo) -> str:
    """Return the kind of value that a setting takes, for its help text."""
    for known, metavar in METAVARS:
        if set(typing.get_args(known)[1:]) & set(field.metadata):
            return metavar
    kind = field.annotation
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(kind) if union else (kind,)) - {type(None)}
    kind = kinds.pop()
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return {"int": "N", "float": "N"}.get(getattr(kind, "__name__", ""), "TEXT")


def _settings_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in Settings.model_fields}


def _serve(args: argparse.Namespace) -> int:
    from sidecar.assembly import StartError  # noqa: PLC0415  not needed for `--help`
    from sidecar.observe import logging as logs  # noqa: PLC0415
    from sidecar.observe.log_writer import STDERR  # noqa: PLC0415

    options = _settings_options(args)
    settings, origins = load(options, file=args.config)
    refuse_unintended_simulation(settings, origins, os.environ, Path())
    logs.set_up(settings.log_format, settings.log_level)
    try:
        return _serve_until_drained(args.config, options, settings, origins)
    except StartError as error:
        STDERR.put(f"vlm-sidecar: {error}")  # `print` would block if nobody reads stderr
        return 2
    except Exception:
        log.exception("a defect in the sidecar: it ends")
        return 1
    finally:
        STDERR.close()


def _serve_until_drained(
    config: Path | None, options: Mapping[str, Any], settings: Settings, origins: Mapping[str, str]
) -> int:
    from sidecar.app import Sidecar  # noqa: PLC0415
    from sidecar.config_file import Source  # noqa: PLC0415

    for line in (*notices(os.environ, Path()), missing_folder(settings, origins), open_to_all(settings, origins)):
        if line is not None:
            log.warning("%s", line)
    foreign = sorted(set(origins.values()) & set(FOREIGN_NAMES))
    if foreign:
        log.info("taken over from the environment: %s", ", ".join(foreign))
    if origins.get("max_concurrency") == "TRIO_VLM_API_CONCURRENCY":
        log.info(
            "at most %d attempts in flight, since TRIO_VLM_API_CONCURRENCY says so. It is no longer needed: without it "
            "the sidecar learns what the provider allows", settings.max_concurrency,
        )  # fmt: skip

    async def serve() -> None:
        source = None if config is None else Source(config, lambda: load(options, file=config)[0])
        await Sidecar(settings, source).run()

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve())
    return 0


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop  # noqa: PLC0415

    return uvloop.new_event_loop()


def _check(args: argparse.Namespace) -> int:
    if args.answer is not None:
        return _explain(args.answer, as_json=args.json)
    from sidecar.cli.check import check  # noqa: PLC0415

    settings, origins = load(_settings_options(args), file=args.config)
    for line in (*notices(os.environ, Path()), missing_folder(settings, origins), open_to_all(settings, origins)):
        if line is not None:
            print(f"vlm-sidecar: {line}", file=sys.stderr)
    refuse_unintended_simulation(settings, origins, os.environ, Path())
    return check(settings, origins, as_json=args.json)


def _explain(file: Path, *, as_json: bool) -> int:
    """Print how the answer in the file would be read. Return the exit status."""
    import json  # noqa: PLC0415  only this command needs it
    from dataclasses import asdict  # noqa: PLC0415

    from backends.remote.answer_file import explain, lines_of  # noqa: PLC0415

    try:
        explanation = explain(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        print(f"vlm-sidecar: --answer {file}: {reason}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(explanation), indent=1) if as_json else "\n".join(lines_of(explanation)))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from sidecar.cli.demo import show  # noqa: PLC0415

    return show(args.speed, args.html)


def _simulate(args: argparse.Namespace) -> int:
    from backends.simulated.command import run  # noqa: PLC0415

    return run(args)


def _top(args: argparse.Namespace) -> int:
    from sidecar.cli.top import top  # noqa: PLC0415

    return top(args.admin_host, args.admin_port)


class _Version(argparse.Action):
    """Print the versions that a report of a problem needs, for `--version`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  needs a megabyte; `serve` does not need it

        parts = [f"Python {platform.python_version()}"]
        for name in ("aiohttp", "uvloop", "pillow", "onnxruntime", "torch", "transformers"):
            with contextlib.suppress(PackageNotFoundError):  # an extra that is not installed
                parts.append(f"{name} {version(name)}")
        print(f"vlm-sidecar {__version__} ({', '.join(parts)}, {platform.platform()})")
        parser.exit()


def _drain(args: argparse.Namespace) -> int:
    from sidecar.cli.drain import drain  # noqa: PLC0415

    return drain(args.admin_port, args.timeout)
