"""HTTP to public addresses only (SSRF guard): resolve once, check, connect to that very address.

A crawler that follows other people's links must not be led to `localhost`, to a cloud's metadata service
or into the intranet: not by a link, not by a redirect, not by a name that resolves differently the second
time (DNS rebinding).
"""

import asyncio
import ipaddress
import socket
import ssl

import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is handed out (RFC 4291). Outside lie, some of them global to Python: IPv4-compatible and
translated addresses, old site-local ones, NAT64 of a local network (RFC 4291, 6145, 3879, 8215)."""
ISATAP = frozenset({0x00005EFE, 0x02005EFE})
"""Interface ids of tunnels inside a network, before the IPv4 address that they lead to (RFC 5214)."""
MAX_HOSTS = 256
"""Hosts whose connections are kept open."""


class RefusedAddressError(httpx.RequestError):
    """The host is not a public one and was not allowed by name."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """Resolves, checks, then connects to the checked address; TLS still verifies the name.

    Connections are pooled by host *name*: two names on one address never share one.
    """

    def __init__(self, allow_hosts: tuple[str, ...]) -> None:
        self.allowed = frozenset(host.lower() for host in allow_hosts)
        self.pools: dict[str, httpx.AsyncHTTPTransport] = {}
        self.tls = ssl.create_default_context()  # reading the certificates takes 20 ms: once for all

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, port = request.url.host, request.url.port
        address = await self.resolve(host, port or (443 if request.url.scheme == "https" else 80), request)
        guarded = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,  # Host still names the site
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self.pool(host).handle_async_request(guarded)

    async def resolve(self, host: str, port: int, request: httpx.Request | None = None) -> str:
        """An address of `host` that may be connected to.

        Raises:
            RefusedAddressError: one of its addresses is not public, and the host is not allowed.
            httpx.ConnectError: the name does not resolve.
        """
        try:
            loop = asyncio.get_running_loop()
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{host} does not resolve: {error}", request=request) from None
        addresses = [str(info[4][0]) for info in infos]
        names = {host.lower(), f"{host.lower()}:{port}"}
        if not names & self.allowed:
            private = next((a for a in addresses if not is_public(ipaddress.ip_address(a))), None)
            if private:
                raise RefusedAddressError(
                    f"{host} is {private}, not a public address; --allow-host {host} permits it",
                    request=request,
                )
        return addresses[0]

    def pool(self, host: str) -> httpx.AsyncHTTPTransport:
        if host not in self.pools:
            if len(self.pools) >= MAX_HOSTS:
                self.pools.pop(next(iter(self.pools)))
            self.pools[host] = httpx.AsyncHTTPTransport(verify=self.tls, retries=0)
        return self.pools[host]

    async def aclose(self) -> None:
        for pool in self.pools.values():
            await pool.aclose()


def is_public(address: Address) -> bool:
    """Is this a unicast address of the public internet, and one that is wrapped in it too?"""
    if isinstance(address, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(address.packed[-4:])
        if address.ipv4_mapped or address in NAT64:
            return is_public(last)
        is_tunnel = int.from_bytes(address.packed[8:12], "big") in ISATAP
        inner = last if is_tunnel else address.sixtofour  # Teredo's are not global to Python
        if address not in GLOBAL_UNICAST or (inner and not is_public(inner)):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)
