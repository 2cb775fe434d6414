"""Videos in requests: frames one by one or in one animated image, each seen; what is no such thing is refused."""

import base64
import copy
import io

import httpx
import pytest
import torch
from live import NAME, as_bytes, ask, images, serving
from PIL import Image

from keepsight.serve.openai.settings import Limits

LENGTH = 12


def encoded(content):
    return base64.b64encode(content).decode()


def as_frames(frames):
    return "data:video/png;base64," + ",".join(encoded(as_bytes(frame)) for frame in frames)


def as_animation(frames, kind="PNG", **more):
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=500, **more)
    return f"data:image/{kind.lower()};base64,{encoded(buffer.getvalue())}"


def send(live, url, **more):
    content = [{"type": "video_url", "video_url": {"url": url} | more}, {"type": "text", "text": "read"}]
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": LENGTH, "logprobs": True}
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)


def told(live, url, **more):
    """(text, log-probabilities, length of the prompt)."""
    response = send(live, url, **more)
    assert response.status_code == 200, response.text
    answer = response.json()
    entries = answer["choices"][0]["logprobs"]["content"]
    found = torch.tensor([entry["logprob"] for entry in entries])
    return answer["choices"][0]["message"]["content"], found, answer["usage"]["prompt_tokens"]


def test_a_video_is_that_of_generate(server, remembering):
    model, processor = remembering
    frames = images(4)
    content = [{"type": "video"}, {"type": "text", "text": "read"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=[text],
        videos=[frames],
        video_metadata=[{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}],
        do_sample_frames=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    inputs = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told(server, as_frames(frames))[::2] == (expected, inputs["input_ids"].shape[1])


def test_every_frame_makes_a_difference(server):
    frames = images(4)
    whole = told(server, as_frames(frames))
    for i in range(4):
        other = [*frames[:i], images(5)[4], *frames[i + 1 :]]
        assert not torch.equal(told(server, as_frames(other))[1], whole[1])
    assert told(server, as_frames(frames[:2]))[2] < whole[2]


def test_an_animation_is_its_frames(server):
    frames = images(4)
    expected = told(server, as_frames(frames), fps=2)
    for url in (as_animation(frames), as_animation(frames, "WEBP", lossless=True)):
        found = told(server, url)
        assert found[0] == expected[0]
        torch.testing.assert_close(found[1], expected[1])
    single = send(server, as_animation(frames[:1])).json()["error"]  # this processor wants two frames
    assert single["param"] == "messages.0.content.0"


def test_what_the_template_leaves_out_is_refused(remembering):
    model, processor = remembering
    blind = copy.copy(processor)
    for kind in ("image", "video"):
        blind.chat_template = processor.chat_template.replace(f"part['type'] == '{kind}'", "false")
        with serving(model, blind) as live:
            body = {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": 1}
            image = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
            for response, is_refused in ((image, kind == "image"), (send(live, as_frames(images(2))), kind == "video")):
                assert response.status_code == (400 if is_refused else 200), response.text
                assert not is_refused or response.json()["error"]["param"] == "messages.0.content.0"


def test_a_vismem_reads_videos_too(latent):
    with serving(*latent) as live:
        response = send(live, as_frames(images(4)))
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["keepsight"]["invocations"]


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("data:video/mp4;base64,AAAA", 400, "invalid_video"),
        ("data:image/gif;base64,AAAA", 400, "invalid_video"),
        ("data:video/png;base64,AAAA,AAAA", 400, "invalid_image"),
        ("data:video/png;base64,", 400, "invalid_video"),
        ("http://example.com/a.gif", 400, "remote_image_not_allowed"),
        (as_frames([images(1)[0], Image.new("RGB", (40, 40))]), 400, "invalid_video"),
        (as_frames(images(1) * 5), 400, "too_many_frames"),
        (as_animation(images(5)), 400, "too_many_frames"),
        (as_animation([Image.new("RGB", (90, 90), c) for c in ("red", "blue", "white")]), 413, "images_too_large"),
    ],
    ids=range(9),
)
def test_what_is_refused(remembering, url, status, code):
    with serving(*remembering, limits=Limits(max_frames=4, max_image_pixels=10_000)) as strict:
        response = send(strict, url)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "messages.0.content.0"), error
