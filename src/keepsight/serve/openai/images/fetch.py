"""Fetching remote images, for servers that were told from where. Nothing is fetched by default.

A host must be on the list, and every address it resolves to must be public. The connection goes to the address that was
checked, not to the name again, so that a name server which answers differently the second time (DNS rebinding) gains
nothing. Redirects are followed by hand, each checked like the first. No proxy, no cookies, no credentials.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from urllib.parse import urljoin, urlsplit

from keepsight.serve.errors import ApiError, bad
from keepsight.serve.openai.images.decode import check_bytes
from keepsight.serve.openai.settings import Limits

_REDIRECTS = 3
_NAT64, _UNICAST = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")
_ISATAP = 0x00005EFE  # the half before the IPv4 address, but for one bit
#: What `ipaddress` calls global and is not: documentation, 6to4 relays, and a cloud's own services (Azure's).
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("3fff::/20", "192.88.99.0/24", "168.63.129.16/32")))
_PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet: not loopback, private, link-local (cloud metadata), multicast,
    reserved, nor one of these hidden in an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and (ip in _NAT64 or int(ip) >> 32 & 0xFDFFFFFF == _ISATAP):
            inner = last
        if inner is not None:
            return is_public(str(inner))
        if ip not in _UNICAST:  # all of the public internet; what Python calls global outside of it depends on its age
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


class Fetcher:
    """Fetches images from allowed hosts.

    Args:
        hosts: names as in a URL, with a port where it is not the scheme's own; ".example.com" stands for all hosts
            below example.com.
        limits: size and time.
        resolve: finds addresses; replaced in tests.
        is_public: judges addresses; replaced in tests.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        limits: Limits,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
    ):
        self.hosts, self.limits = tuple(host.lower() for host in hosts), limits
        self._resolve, self._is_public = resolve, is_public

    def fetch(self, url: str, param: str, deadline: float | None = None) -> bytes:
        """The bytes behind a URL.

        Args:
            url: http or https.
            param: where in the request it stands, for errors.
            deadline: when to give up, on the monotonic clock.

        Raises:
            ApiError: 400 if the host is not allowed or the answer is none, 413 if it is too large.
        """
        if deadline is None:
            deadline = time.monotonic() + self.limits.fetch_seconds
        for _ in range(_REDIRECTS + 1):
            status, location, content = self._get(url, deadline, param)
            if status in (301, 302, 303, 307, 308) and location:
                url = urljoin(url, location)
                continue
            if status != 200:
                raise bad(f"The image's server answered {status}.", param, "image_fetch_failed")
            return content
        raise bad(f"More than {_REDIRECTS} redirects.", param, "image_fetch_failed")

    def _get(self, url: str, deadline: float, param: str) -> tuple[int, str | None, bytes]:
        scheme, host, port, target = self._checked(url, param)
        try:
            address = self._address(host, port, param)
            connection = _Pinned(host, port, address, scheme == "https", self._left(deadline))
            with contextlib.closing(connection):
                connection.connect()
                # A socket's own timeout starts anew with every byte that trickles in.
                end = threading.Timer(self._left(deadline), _hang_up, [connection.sock])
                end.start()
                try:
                    connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "keepsight"})
                    with connection.getresponse() as response:
                        content = self._content(response, param) if response.status == 200 else b""
                        self._left(deadline)
                        return response.status, response.getheader("Location"), content
                finally:
                    end.cancel()
        except ApiError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise bad(
                f"The image could not be fetched ({type(error).__name__}).", param, "image_fetch_failed"
            ) from None

    def _content(self, response: http.client.HTTPResponse, param: str) -> bytes:
        """A body, as long as it is not too large."""
        length = response.getheader("Content-Length") or ""
        if length.isdigit():
            check_bytes(int(length), self.limits, param)
        pieces, size = [], 0
        while piece := response.read1(65536):
            pieces.append(piece)
            size += len(piece)
            check_bytes(size, self.limits, param)
        return b"".join(pieces)

    def _checked(self, url: str, param: str) -> tuple[str, str, int, str]:
        """Scheme, host, port and target of a URL that may be fetched."""
        try:
            parts = urlsplit(url)
            host, scheme = (parts.hostname or "").lower().rstrip("."), parts.scheme.lower()
            port = parts.port or _PORTS.get(scheme, 0)
        except ValueError:
            raise bad("The image's URL cannot be read.", param, "invalid_image_url") from None
        name = host if port == _PORTS.get(scheme) else f"{host}:{port}"
        allowed = any(name == h or (h.startswith(".") and name.endswith(h)) for h in self.hosts)
        if scheme not in _PORTS or not host or not allowed or parts.username is not None or parts.password is not None:
            raise bad(
                "This server does not fetch images from there. Send the image itself, as a data URL "
                "(data:image/png;base64,...).",
                param,
                "remote_image_not_allowed",
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if any(c <= " " or c > "~" for c in target):
            raise bad("The image's URL is not percent-encoded.", param, "invalid_image_url")
        return scheme, host, port, target

    def _address(self, host: str, port: int, param: str) -> str:
        """One address of a host, all of which are public."""
        addresses = self._resolve(host, port)
        if not addresses or not all(self._is_public(a) for a in addresses):
            raise bad("The image's host is not on the public internet.", param, "remote_image_not_allowed")
        return addresses[0]

    @staticmethod
    def _left(deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, which speaks to it under the host's name."""

    def __init__(self, host: str, port: int, address: str, is_secure: bool, seconds: float):
        super().__init__(host, port, timeout=seconds)
        self._address, self._is_secure = address, is_secure
        if is_secure:
            self.default_port = 443

    def connect(self) -> None:
        """Never asks a name server."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._is_secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
