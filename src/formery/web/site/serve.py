"""Serves the pages until Ctrl-C."""

import ipaddress
import socket

import uvicorn

from formery.errors import FormeryError, first_line
from formery.web.output import note
from formery.web.site.app import Site

AT_ONCE = 200  # connections; who comes after them is told 503
PORTS = 65535
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(host: str, port: int, runs: int) -> None:
    """Serves on that address, and returns after Ctrl-C; FormeryError where the address cannot be taken."""
    site = Site(runs)
    taken = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{taken.getsockname()[1]}/"
    config = uvicorn.Config(
        site.app(hosts(host)),
        log_level="warning",
        limit_concurrency=AT_ONCE,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    note(f"Formery's pages are at {address} (Ctrl-C ends this).")
    if not local(host):
        note("Whoever reaches this machine can read them and use its processor; leave --host out to keep them here.")
    try:
        uvicorn.Server(config).run(sockets=[taken])
    except KeyboardInterrupt:
        pass  # that is how it ends
    finally:
        taken.close()
    note("Ended.")


def local(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts(host: str) -> list[str]:
    """The names under which the pages may be asked for: a page elsewhere must not reach them by a name of its own."""
    return [*LOOPBACK, f"[{host}]" if ":" in host else host] if local(host) else ["*"]


def bind(host: str, port: int) -> socket.socket:
    """The address, taken."""
    if not 0 <= port <= PORTS:
        raise FormeryError(f"there is no port {port}: choose one from 1 to {PORTS}, or 0 for a free one.")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(place)
    except OSError as error:
        said = f"cannot serve on {host}, port {port}: {first_line(error)}; choose another --port or --host."
        raise FormeryError(said) from error
    return taken
