"""Recognizes requests that a browser sends for a web page of another site. Both listeners refuse them.

Without this, any page that is open in a browser on this machine could spend the provider's account, or read `/status`
by DNS rebinding: the page's own name is made to resolve to this machine, so that the browser takes both for one site.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Final

#: The endings of names that only a private network can resolve: RFC 6761 (.localhost), RFC 6762 (.local), Kubernetes'
#: services, and .internal, which ICANN keeps for private use.
_LOCAL_ENDINGS: Final = (".localhost", ".svc", ".cluster.local", ".internal", ".local")
#: The port that a browser leaves out of `Origin` and `Host`, by scheme.
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
_ADVICE: Final = (
    "open it under an address or a local name of this machine, or add the name to SIDECAR_ALLOWED_HOSTS; a proxy in "
    "between must keep the Host header"
)


class ForeignPages:
    """The rules, with the names of `SIDECAR_ALLOWED_HOSTS`."""

    def __init__(self, allowed_hosts: Iterable[str] = ()) -> None:
        self._allowed = frozenset(name.lower() for name in (*allowed_hosts, socket.gethostname()))

    def __repr__(self) -> str:
        return f"<ForeignPages allowed={sorted(self._allowed)}>"

    def refusal(
        self, headers: Mapping[str, str], *, navigable: bool = False, own_page: bool = False, any_host: bool = False
    ) -> str | None:
        """Return why a request is refused: one sentence with the way out. None: it is not from a foreign page.

        `navigable`: a link from another site may open this path as a document. `own_page`: the path is refused under
        a foreign name even without a mark of a browser, because a page that uses DNS rebinding sends no such mark.
        `any_host`: the path is answered under any name.
        """
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        if origin is None and site is None:  # no browser, or a page that the browser takes for one of ours
            if not own_page or self._is_local(headers.get("Host", "")):
                return None
            return f"the name in the Host header is not one of this machine's: {_ADVICE}"
        host = headers.get("Host", "")
        is_foreign = site in ("cross-site", "same-site") or (origin is not None and not _is_origin_of(origin, host))
        opens_page = (
            navigable and headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        )
        if is_foreign and not opens_page:
            return f"a web page of another site may not send this: {_ADVICE}"
        if not any_host and not self._is_local(host):
            return f"a web page may use this listener only under a name of this machine: {_ADVICE}"
        return None

    def _is_local(self, host: str) -> bool:
        """Return whether a `Host` header names this machine or its private network. A missing one does (HTTP/1.0)."""
        name, colon, port = host.lower().rpartition(":")
        if not (colon and port.isdigit()):
            name = host.lower()
        name = name.removesuffix(".")
        has_no_dot = not ("." in name or ":" in name)
        return has_no_dot or name.endswith(_LOCAL_ENDINGS) or name in self._allowed or _is_address(name)


def _is_origin_of(origin: str, host: str) -> bool:
    """Return whether `Origin` and `Host` name the same host and port. The scheme is not compared."""
    scheme, _, place = origin.lower().partition("://")
    default = _DEFAULT_PORTS.get(scheme, "")
    return place != "" and place.removesuffix(default) == host.lower().removesuffix(default)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
