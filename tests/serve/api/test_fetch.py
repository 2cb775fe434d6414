"""What the server reads on behalf of strangers: nothing it was not told to, and never its own network."""

import contextlib
import http.server
import os
import socket
import threading
import time

import pytest

from keepsight.serve.errors import ApiError
from keepsight.serve.openai.images.fetch import Fetcher, is_public
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.images.uploads import Uploads
from keepsight.serve.openai.settings import Limits

LIMITS = Limits(max_image_bytes=1000, fetch_seconds=3)


def refused(call, *args):
    with pytest.raises(ApiError) as error:
        call(*args, "there")
    assert 400 <= error.value.status < 500
    return error.value.code


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
        ),
        *(
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
        ),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "192.0.2.1", "198.18.0.1"),
        # Old and new ways to write an IPv4 address as an IPv6 one; site-local; documentation; segment routing.
        *("::7f00:1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "2001:4860::5efe:a00:1", "fec0::1", "3fff::1", "5f00::1"),
        *("2001:4860::200:5efe:a00:1", "192.88.99.1", "168.63.129.16"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address):
    assert is_public(address)


class Site:
    """A web site on loopback that redirects, trickles, or answers too much."""

    def __init__(self):
        site = self
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append((self.path, self.headers["Host"]))
                if self.path.startswith("/to/"):
                    self.send_response(302)
                    self.send_header("Location", self.path[4:])
                    self.end_headers()
                    return
                if self.path == "/missing":
                    self.send_error(404)
                    return
                if self.path == "/trickle":
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        for _ in range(200):
                            self.wfile.write(b"x")
                            time.sleep(0.1)
                    return
                body = b"x" * (5000 if self.path == "/huge" else 10)
                self.send_response(200)
                if self.path == "/claims":
                    self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def fetcher(site, is_public=lambda address: True, names=None, hosts=None):
    names = {"good.example": "127.0.0.1", "evil.example": "127.0.0.1"} if names is None else names
    hosts = [f"good.example:{site.port}"] if hosts is None else hosts
    return Fetcher(hosts, LIMITS, resolve=lambda host, port: [names[host]], is_public=is_public)


def test_an_allowed_host_is_fetched_under_its_name(site):
    content = fetcher(site).fetch(f"http://good.example:{site.port}/a?b=c", "there")
    assert content == b"x" * 10
    assert site.asked[-1] == ("/a?b=c", f"good.example:{site.port}")


def test_redirects_are_followed_and_checked(site):
    good, evil = f"good.example:{site.port}", f"evil.example:{site.port}"
    fetch = fetcher(site).fetch
    assert fetch(f"http://{good}/to//a", "there") == b"x" * 10
    for target in (
        f"http://{evil}/a",
        f"http://127.0.0.1:{site.port}/a",
        "file:///etc/passwd",
        "http://169.254.169.254/",
    ):
        before = len(site.asked)
        assert refused(fetch, f"http://{good}/to/{target}") == "remote_image_not_allowed"
        assert len(site.asked) == before + 1  # the redirect itself, and nothing after it
    assert refused(fetch, f"http://{good}/to/http://{good}/to/http://{good}/to/http://{good}/to/http://{good}/a") == (
        "image_fetch_failed"
    )


def test_private_addresses_are_refused_even_for_allowed_hosts(site):
    before = len(site.asked)
    assert refused(fetcher(site, is_public).fetch, f"http://good.example:{site.port}/a") == "remote_image_not_allowed"
    assert len(site.asked) == before
    mixed = Fetcher(["good.example"], LIMITS, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    assert refused(mixed.fetch, "http://good.example/") == "remote_image_not_allowed"


def test_a_name_is_resolved_once(site):
    """DNS rebinding: the second answer would be another; it is never asked for."""
    answers = []

    def resolve(host, port):
        answers.append(host)
        return ["127.0.0.1"]

    found = Fetcher([f"good.example:{site.port}"], LIMITS, resolve=resolve, is_public=lambda a: True)
    found.fetch(f"http://good.example:{site.port}/a", "there")
    assert answers == ["good.example"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://other.example/",
            "http://good.example.evil.example/",
            "http://evil-good.example/",
            "ftp://good.example/",
        ),
        *("http://user@good.example/", "http://good.example:22/", "http://good.example@127.0.0.1/", "http://[::1]/"),
        *(
            "gopher://good.example/",
            "http://2130706433/",
            "http://good.example:x/",
            "http:///a",
            "http://good.example\\@x/",
        ),
    ],
)
def test_urls_that_are_not_allowed(url):
    asked = []
    fetch = Fetcher(["good.example"], LIMITS, resolve=lambda *a: asked.append(a) or ["8.8.8.8"]).fetch
    assert refused(fetch, url) in ("remote_image_not_allowed", "invalid_image_url")
    assert not asked


def test_hosts_below_a_domain():
    below = Fetcher([".good.example"], LIMITS)
    assert below._checked("https://a.b.good.example/x", "there")[1] == "a.b.good.example"
    for host in ("good.example", "evilgood.example"):
        assert refused(below._checked, f"https://{host}/x") == "remote_image_not_allowed"


def test_too_much_and_too_slow(site):
    fetch = fetcher(site).fetch
    for path in ("huge", "claims"):
        assert refused(fetch, f"http://good.example:{site.port}/{path}") == "image_too_large"
    assert refused(fetch, f"http://good.example:{site.port}/missing") == "image_fetch_failed"
    hasty = fetcher(site)
    hasty.limits = Limits(fetch_seconds=0.5)
    assert refused(hasty.fetch, f"http://good.example:{site.port}/trickle") == "image_fetch_failed"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        port = silent.getsockname()[1]
        slow = Fetcher(
            [f"good.example:{port}"],
            Limits(fetch_seconds=0.3),
            resolve=lambda *a: ["127.0.0.1"],
            is_public=lambda a: True,
        )
        assert refused(slow.fetch, f"http://good.example:{port}/") == "image_fetch_failed"


@pytest.fixture
def folders(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "image.png").write_bytes(b"content")
    (inside / "link.png").symlink_to(outside / "image.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "big.png").write_bytes(b"x" * 5000)
    os.mkfifo(inside / "pipe.png")
    return inside, outside


def test_local_paths_are_read_from_allowed_folders_only(folders):
    inside, outside = folders
    closed = ImageSources(LIMITS, Uploads(LIMITS))
    opened = ImageSources(LIMITS, Uploads(LIMITS), folders=[inside])
    assert opened.read(f"{inside}/image.png", "there") == b"content"
    assert opened.read(f"file://{inside}/image.png", "there") == b"content"
    for path in (
        f"{outside}/image.png",
        f"{inside}/../outside/image.png",
        f"file://{inside}/%2e%2e/outside/image.png",
        *(f"{inside}/{name}" for name in ("link.png", "loop.png", "pipe.png", "missing.png", "", "image.png\0")),
        "image.png",
        "~/image.png",
        "/dev/zero",
        "/proc/self/environ",
        str(outside),
        f"{inside}x/image.png",
    ):
        assert refused(opened.read, path) == "local_image_not_allowed", path
    assert refused(opened.read, f"{inside}/big.png") == "image_too_large"
    assert refused(closed.read, f"{inside}/image.png") == "local_image_not_allowed"
    assert refused(closed.read, "https://good.example/a.png") == "remote_image_not_allowed"
    assert refused(closed.read, "iVBORw0KGgo" + "A" * 80) == "invalid_image_url"  # base64 that does not say so


def test_data_urls():
    sources = ImageSources(LIMITS, Uploads(LIMITS))
    assert sources.read("data:image/png;base64,eHh4", "there") == b"xxx"
    # As browsers read them.
    for body in ("+/+/eA==", "+/+/eA", "%2B%2F%2b%2feA%3D%3D", "+/+/\neA==\n", " +/+/ eA"):
        assert sources.read(f"data:image/png;base64,{body}", "there") == b"\xfb\xff\xbfx"
    assert sources.read("data:image/png,x%00", "there") == b"x\0"
    for body in ("e!", "eHh4e", "=eA"):
        assert refused(sources.read, f"data:image/png;base64,{body}") == "invalid_image_url"
    for url in ("data:image/png;base64", "data:text/html;base64,eHh4", "data:"):
        assert refused(sources.read, url) == "invalid_image_url"
    assert refused(sources.read, "data:image/png;base64," + "eHh4" * 1000) == "image_too_large"


def test_uploads_expire_and_make_room():
    uploads = Uploads(Limits(max_upload_bytes=25))
    first, second, third = (uploads.add(b"x" * 10, "a") for _ in range(3))
    assert refused(lambda name, there: uploads.get(name), first.id) == "file_not_found"
    assert uploads.get(second.id).content == uploads.get(third.id).content
    brief = Uploads(Limits(upload_seconds=1e-6))
    assert refused(lambda name, there: brief.get(name), brief.add(b"x", "a").id) == "file_not_found"
