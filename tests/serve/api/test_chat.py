"""The page to try a model on, and what it shows: where an answer looked, without disturbing anybody else's."""

import asyncio
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from chromium import chromium
from live import NAME, serving, wait_for
from starlette.testclient import TestClient

import keepsight
from keepsight.errors import KeepsightError
from keepsight.lab.samples import example_image, example_images, far_reading
from keepsight.serve.openai.chat.remote import Remote, remote_page
from keepsight.serve.openai.settings import FarReading


def request(prompt="read", image=None, memory=True, **more):
    buffer = io.BytesIO()
    (image or example_image()).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    asked = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24}
    return asked | {"keepsight": {"memory": memory}} | more


@pytest.fixture(scope="module", params=["PVM", "VisMem"])
def live(request):
    model, processor = keepsight.load(f"keepsight/reference-{request.param.lower()}")
    with serving(model, processor, chat=True, far_reading=lambda _: FarReading(**far_reading(2000))) as live:
        yield live


def answered(live, asked):
    reply = httpx.post(f"{live.url}/v1/chat/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["message"]["content"], reply.json().get("keepsight") or choice["keepsight"]


def looked(live, asked, answer, told, changed=()):
    memories = [{"type": one["kind"], "text_offset": one["text_offset"]} for one in told["invocations"]]
    body = {"request": asked, "answer": answer, "invocations": memories} | dict(changed)
    return httpx.post(f"{live.url}/chat/look", json=body, timeout=60)


@pytest.mark.parametrize("memory", [True, False])
def test_a_look_tells_for_every_word_where_it_looked(live, memory):
    asked = request(memory=memory)
    answer, told = answered(live, asked)
    found = looked(live, asked, answer, told).json()
    assert "".join(found["words"]).split() == answer.split()
    assert found["images"] == [[4, 4]]
    assert all(0 < mass < 1 for mass in found["mass"])
    has_pvm = "pvm" in live.api.offers[NAME].served.memories
    names = {"the model's own attention"} | ({"the memory"} if has_pvm and memory else set())
    assert found["views"].keys() == names
    for view in found["views"].values():
        cells = np.array(view)
        assert cells.shape == (len(found["words"]), 1, 16)
        assert (cells.max(-1) == 255).all()


def test_it_reads_a_digit_where_the_digit_is(live):
    """The trained model, without its memory: the digit behind a cell's name is looked up in that cell."""
    asked = request(memory=False)
    answer, told = answered(live, asked)
    found = looked(live, asked, answer, told).json()
    words = [word.strip() for word in found["words"]]
    looks = found["views"]["the model's own attention"]
    hits = [
        int(np.argmax(looks[n][0])) == "abcd".index(cell[0]) + 4 * (int(cell[1]) - 1)
        for n, cell in enumerate(words, 1)
        if len(cell) == 2 and cell[0] in "abcd" and n < len(words)
    ]
    assert len(hits) > 3
    assert np.mean(hits) > 0.5


def test_a_look_disturbs_nobody(live):
    (other, _), *_ = example_images(1, 5)
    alone = answered(live, request(image=other))[0]
    asked = request()
    answer, told = answered(live, asked)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answered, live, request(image=other)) for _ in range(4)]
        looks = [pool.submit(looked, live, asked, answer, told) for _ in range(4)]
        assert {one.result()[0] for one in answers} == {alone}
        assert len({one.result().text for one in looks}) == 1
    assert answered(live, asked)[0] == answer


def test_a_look_waits_for_its_turn_to_decode(live, monkeypatch):
    """As every request: no more pictures are in memory at a time than the server was told."""
    asked = request()
    answer, told = answered(live, asked)
    monkeypatch.setattr(live.api, "prepared", asyncio.Semaphore(1))
    (kind,) = {type(offer.prompts) for offer in live.api.offers.values()}
    decode, at_a_time, most = kind.decode, [], []

    def spy(*args):
        at_a_time.append(None)
        most.append(len(at_a_time))
        time.sleep(0.05)
        at_a_time.pop()
        return decode(*args)

    monkeypatch.setattr(kind, "decode", spy)
    with ThreadPoolExecutor() as pool:
        looks = [pool.submit(looked, live, asked, answer, told) for _ in range(4)]
        assert all(one.result().status_code == 200 for one in looks)
    assert most == [1] * 4


def test_wrong_looks_are_refused(live):
    asked = request()
    answer, told = answered(live, asked)
    for more, word in (
        ({"answer": ""}, "no word"),
        ({"answer": 3}, "Expected"),
        ({"request": {}}, "model"),
        ({"x": 1}, "Expected"),
    ):
        reply = looked(live, asked, answer, told, changed=more)
        assert reply.status_code == 400
        assert word in reply.json()["error"]["message"]
    assert httpx.post(f"{live.url}/chat/look", content="{}").status_code == 415


def test_the_page_is_only_there_where_it_is_offered(live):
    page = httpx.get(f"{live.url}/chat")
    assert page.status_code == 200
    assert "http://" not in page.text.replace("http://127", "")
    assert "https://" not in page.text
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(f"{live.url}/chat/far", params={"model": NAME}).json()["question"] == "read"
    assert httpx.get(f"{live.url}/chat/far", params={"model": "another"}).status_code == 404
    model, processor = keepsight.load("keepsight/reference")
    with serving(model, processor) as plain:
        assert httpx.get(f"{plain.url}/chat").status_code == 404
        assert httpx.post(f"{plain.url}/chat/look", json={}).status_code == 404


def test_the_page_for_a_server_elsewhere(live):
    """It hands on what the page asks, whole and streamed, for this machine alone, and says what the server cannot."""
    remote = Remote(f"{live.url}/v1/")
    assert remote.check() == [NAME]
    asked = request()
    answer, told = answered(live, asked)
    with TestClient(remote_page(remote), base_url="http://localhost") as here:
        assert here.get("/chat").text == httpx.get(f"{live.url}/chat").text
        assert here.get("/chat/far", params={"model": NAME}).json()["question"] == "read"
        assert here.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"] == answer
        stream = here.post("/v1/chat/completions", json=asked | {"stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.text.rstrip().endswith("data: [DONE]")
        memories = [{"type": one["kind"], "text_offset": one["text_offset"]} for one in told["invocations"]]
        seen = here.post("/chat/look", json={"request": asked, "answer": answer, "invocations": memories})
        assert seen.json() == looked(live, asked, answer, told).json()
        wrong = here.post("/v1/chat/completions", json={"model": NAME})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
        assert here.post("/chat/look", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert here.get("/chat", headers={"Host": "elsewhere.example"}).status_code == 400


def test_servers_that_cannot_be_used_or_tell_less():
    model, processor = keepsight.load("keepsight/reference")
    with serving(model, processor, api_key="secret") as plain:
        with pytest.raises(KeepsightError, match="wants a key"):
            Remote(plain.url).check()
        with TestClient(remote_page(Remote(plain.url, "secret")), base_url="http://localhost") as here:
            assert here.get("/v1/models").json()["data"][0]["id"] == NAME
            less = here.post("/chat/look", json={})
            assert (less.status_code, "--chat does" in less.json()["error"]["message"]) == (404, True)
        with pytest.raises(KeepsightError, match="is no server of OpenAI's API"):
            Remote(f"{plain.url}/docs", "secret").check()
        gone = plain.url
    with pytest.raises(KeepsightError, match="does not answer"):
        Remote(gone).check()


@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(live, tmp_path, width):
    image = tmp_path / "a_photo_with_a_name_that_is_longer_than_a_phone_is_wide.png"
    example_image().save(image)
    with chromium() as window:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        window.get(f"{live.url}/chat")
        wait_for(lambda: NAME in window.find_element("id", "model").text)
        broken = tmp_path / "broken.png"
        broken.write_text("no picture")
        window.find_element("id", "file").send_keys(str(broken))
        wait_for(lambda: "broken.png is not a picture" in window.find_element("id", "drop").text)
        assert not window.find_element("id", "pic").is_displayed()
        window.find_element("id", "example").click()  # no file at hand
        wait_for(lambda: window.find_element("id", "pic").is_displayed())
        assert window.find_element("id", "text").get_property("value") == "read"
        window.find_element("id", "text").clear()
        window.find_element("id", "file").send_keys(str(image))
        wait_for(lambda: image.name in window.find_element("id", "drop").text)
        window.find_element("id", "text").send_keys("read")
        window.find_element("id", "send").click()
        wait_for(lambda: window.find_elements("css selector", ".a span[tabindex]"), 60)
        wait_for(lambda: window.find_element("id", "send").is_enabled(), 60)
        assert [h.text for h in window.find_elements("css selector", ".pair h2")] == ["with the memory", "without"]
        drawn = "const c = document.querySelector('canvas'); return c.toDataURL()"
        empty = window.execute_script(drawn)
        seen = set()
        for word in window.find_elements("css selector", ".a span[tabindex]")[:3]:
            window.execute_script("arguments[0].click()", word)
            seen.add(window.execute_script(drawn))
        assert len(seen) >= 2
        assert empty not in seen
        assert "of the model's attention" in window.find_element("id", "now").text
        wide = window.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        rights = "return [...document.querySelectorAll('main *, #bar *')].map(n => n.getBoundingClientRect().right)"
        assert max(window.execute_script(rights)) <= width
        window.find_element("id", "clear").click()
        window.find_element("id", "long").click()
        wait_for(lambda: len(window.find_elements("css selector", ".turn")) == 3, 60)
        wait_for(lambda: window.find_element("id", "send").is_enabled(), 60)
        others = "a => a.querySelectorAll('.changed').length"
        others = f"return [...document.querySelectorAll('.turn:last-child .a')].map({others})"
        kept, lost = window.execute_script(others)
        assert kept < lost / 2  # what the memory is for: far from the image it changes fewer words
        invoked = window.find_elements("css selector", ".turn:last-child .a .mem")
        assert ["◆" in mark.text for mark in invoked] == [True] * len(invoked)
        assert bool(invoked) == ("vismem" in live.api.offers[NAME].served.memories)
        assert max(window.execute_script(rights)) <= width
        window.find_element("id", "long").click()
        window.find_element("id", "clear").click()  # while it writes: what comes late belongs to nothing
        wait_for(lambda: window.find_element("id", "send").is_enabled(), 60)
        assert window.find_element("id", "talk").text == ""
        assert window.execute_script("return columns.map(column => column.messages.length)") == [0, 0]
        assert [line for line in window.get_log("browser") if "favicon" not in line["message"]] == []
