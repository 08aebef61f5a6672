"""The proxy of the environment, read as `requests` and `curl` read it."""

from __future__ import annotations

import ipaddress
import re
from urllib.request import getproxies, proxy_bypass

from yarl import URL

_LOOPBACK_NAMES = ("localhost", "localhost.")


def environment_proxy(url: URL) -> URL | None:
    """Return the proxy that `HTTPS_PROXY`, `HTTP_PROXY` or else `ALL_PROXY` names for a URL, unless `NO_PROXY` does.

    Names in lower case have precedence. A proxy without a scheme, such as `proxy.lan:3128`, is an http:// proxy. This
    machine itself is never reached through a proxy. The variables are read once per `Origin`. aiohttp's own `trust_env`
    is not used: it knows neither `ALL_PROXY` nor networks in `NO_PROXY`, uses a thread for every request, and reads
    passwords from `~/.netrc`.

    Raises:
        ValueError: the proxy is of a kind that is not supported. The text contains no password.

    """
    host = url.host or ""
    if _is_loopback(host):
        return None
    found = getproxies()
    # `proxy_bypass` reads the settings of macOS and Windows too.
    if proxy_bypass(host) or _is_excluded(host, url.port, found.get("no", "")):
        return None
    variable = next((name for name in (url.scheme, "all") if found.get(name, "").strip()), None)
    if variable is None:
        return None
    named = found[variable].strip()
    try:
        proxy = URL(named if "://" in named else f"http://{named}")
        usable = proxy.scheme in ("http", "https") and proxy.host and proxy.port
    except ValueError:  # for example a port that is no number
        proxy, usable = URL(), None
    if not usable:
        kind = f", not {proxy.scheme}:// proxies" if proxy.scheme not in ("", "http", "https") else ""
        raise ValueError(
            f"{variable.upper()}_PROXY: must be an http:// or https:// proxy, such as http://proxy.lan:3128; "
            f"only these work{kind}"
        )
    return proxy


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host in _LOOPBACK_NAMES or (address is not None and address.is_loopback)


def _is_excluded(host: str, port: int | None, no_proxy: str) -> bool:
    """Return whether an entry of `NO_PROXY` matches a host and its port.

    An entry is `*`, an address, a network (`10.0.0.0/8`), or a name, which matches the names below it too
    (`example.com`, `.example.com`, `*.example.com`). A name or an address may have a port. Commas or spaces separate
    the entries.
    """
    host = host.lower().rstrip(".")
    address = _address(host)
    return any(_matches(entry.lower(), host, address, port) for entry in re.split(r"[\s,]+", no_proxy) if entry)


def _matches(
    entry: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int | None
) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    name, named_port = _split(entry)
    if named_port is not None and named_port != port:
        return False
    named = _address(name)
    if named is not None or address is not None:
        return named == address
    name = name.removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _split(entry: str) -> tuple[str, int | None]:
    """Return the name or address of an entry, and its port if it has one."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", entry)
    return (entry, None) if found is None else (found[1], int(found[2]))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
