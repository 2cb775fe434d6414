"""OpenAI's own client, unchanged, against `keepsight serve`."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers import with_continuation
from live import NAME, as_bytes, ask, generated, images, serving

LENGTH = 24


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def complete(client, image, **more):
    return client.chat.completions.create(**({"model": NAME, "messages": ask(image), "max_tokens": LENGTH} | more))


def streamed(stream):
    """(texts by choice, finish reasons, memory fields, usage, logprobs) of a stream."""
    texts, reasons, memories, usage, logprobs = {}, {}, {}, None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.logprobs:
                logprobs += choice.logprobs.content
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
                memories[choice.index] = choice.keepsight
    return texts, reasons, memories, usage, logprobs


def test_an_answer_is_that_of_generate(client, remembering):
    for image in images(3):
        answer = complete(client, image)
        assert answer.choices[0].message.content == generated(*remembering, image, LENGTH)
        assert answer.choices[0].message.role == "assistant"
        written = answer.usage.completion_tokens
        assert answer.choices[0].finish_reason == ("length" if written == LENGTH else "stop")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + written


def test_a_stream_is_the_whole_answer(client):
    more = {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0, "seed": 3}
    whole = complete(client, images(1)[0], **more)
    stream = complete(client, images(1)[0], stream=True, stream_options={"include_usage": True}, **more)
    texts, reasons, memories, usage, logprobs = streamed(stream)
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert texts[0] != texts[1]
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert memories == {c.index: c.keepsight for c in whole.choices}
    assert usage == whole.usage
    assert sorted(e.logprob for e in logprobs) == sorted(e.logprob for c in whole.choices for e in c.logprobs.content)


def test_an_answer_goes_back_into_the_conversation_as_it_came(client, remembering):
    first, second = images(2)
    turns = ask(first)
    message = complete(client, first).choices[0].message
    turns += [message, *ask(second, "read")]
    found = client.chat.completions.create(model=NAME, messages=turns, max_tokens=LENGTH).choices[0].message.content
    model, processor = remembering
    asked = {"type": "text", "text": "read"}
    inputs = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image", "image": first}, asked]},
            {"role": "assistant", "content": [{"type": "text", "text": message.content}]},
            {"role": "user", "content": [{"type": "image", "image": second}, asked]},
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    assert found == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("memory", [True, False])
def test_log_probabilities_are_those_of_one_plain_forward(client, remembering, memory):
    model, processor = remembering
    picture = images(1)[0]
    answer = complete(client, picture, logprobs=True, top_logprobs=5, extra_body={"keepsight": {"memory": memory}})
    entries = answer.choices[0].logprobs.content
    ids = processor.tokenizer.convert_tokens_to_ids([entry.token for entry in entries])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "read"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = with_continuation(dict(inputs), torch.tensor([ids]))
    with torch.no_grad(), contextlib.nullcontext() if memory else model.disable_adapter():
        expected = model(**inputs).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    found = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(found, expected[range(len(ids)), ids], rtol=0, atol=5e-5)
    likeliest = torch.tensor([[top.logprob for top in entry.top_logprobs] for entry in entries])
    torch.testing.assert_close(likeliest, expected.topk(5).values, rtol=0, atol=5e-5)


def test_log_probabilities(client):
    answer = complete(client, images(1)[0], logprobs=True, top_logprobs=3, max_tokens=8)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:  # greedy: the chosen token is the likeliest
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
        assert bytes(entry.bytes).decode() == entry.token


def test_concurrent_clients_get_what_they_get_alone(client, remembering):
    pictures = images(16)
    expected = [generated(*remembering, image, LENGTH) for image in pictures]
    assert len(set(expected)) == 16
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda image: complete(client, image).choices[0].message.content, pictures))
    assert found == expected


def test_memory_is_off_for_one_request_and_on_for_the_next(client, server, remembering):
    model, processor = remembering
    pictures = images(4)
    on = [generated(model, processor, image, LENGTH) for image in pictures]
    with model.disable_adapter():
        off = [generated(model, processor, image, LENGTH) for image in pictures]
    assert all(a != b for a, b in zip(on, off, strict=True))

    def one(job):
        image, memory = job
        answer = complete(client, image, extra_body={"keepsight": {"memory": memory}})
        assert answer.choices[0].keepsight["memory"] is memory
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, [(image, memory) for image in pictures for memory in (True, False)]))
    assert found == [text for pair in zip(on, off, strict=True) for text in pair]


def test_invocations_are_reported_and_can_be_switched_off(latent):
    model, processor = latent
    picture = images(1)[0]
    with serving(model, processor) as live:
        client = live.client()
        answer = complete(client, picture, max_tokens=60).choices[0]
        texts, _, memories, _, _ = streamed(complete(client, picture, max_tokens=60, stream=True))
        off = complete(client, picture, max_tokens=60, extra_body={"keepsight": {"memory": False}}).choices[0]
    assert answer.message.content == texts[0] == generated(model, processor, picture, 60)
    assert answer.keepsight == memories[0]
    found = answer.keepsight["invocations"]
    assert len(found) == 3
    assert {i["kind"] for i in found} <= {"short", "long"}
    assert answer.keepsight["memory_tokens"] == sum(i["latents"] + 2 for i in found)
    assert [i["text_offset"] for i in found] == sorted(i["text_offset"] for i in found)
    assert off.message.content == generated(model, processor, picture, 60, memory="off")
    assert off.keepsight == {"memory": False, "memory_tokens": 0, "invocations": []}


def test_stop_ends_the_answer_before_its_text(client):
    whole = complete(client, images(1)[0]).choices[0].message.content
    stop = " " + whole.split()[5]
    expected = whole[: whole.index(stop)]
    answer = complete(client, images(1)[0], stop=stop, logprobs=True)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    texts, reasons, _, _, _ = streamed(complete(client, images(1)[0], stop=[stop, "never"], stream=True))
    assert (texts[0], reasons[0]) == (expected, "stop")
    assert "".join(e.token for e in answer.choices[0].logprobs.content) == expected.replace(" ", "")


def test_seeds_and_penalties(client):
    def text(**more):
        return complete(client, images(1)[0], temperature=1.3, **more).choices[0].message.content

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_p=1e-6) == complete(client, images(1)[0]).choices[0].message.content
    plain = complete(client, images(1)[0]).choices[0].message.content.split()
    penalised = complete(client, images(1)[0], frequency_penalty=2, presence_penalty=2).choices[0].message.content
    assert len(set(penalised.split())) > len(set(plain))
    banned = complete(client, images(1)[0], logit_bias={"34": -100}).choices[0].message.content  # 34 is "."
    assert "." in plain
    assert "." not in banned


def test_conversations_several_images_and_uploads(client):
    first, second = images(2)
    messages = [
        {"role": "system", "content": "a"},
        *ask(first),
        {"role": "assistant", "content": "a1 1 ."},
        {"role": "user", "content": [{"type": "text", "text": "read"}, *ask(second)[0]["content"]]},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens > 2 * 16
    file = client.files.create(file=("a.png", as_bytes(first)), purpose="vision")
    content = [{"type": "file", "file": {"file_id": file.id}}, ask(first)[0]["content"][1]]
    messages = [{"role": "user", "content": content}]
    by_file = client.chat.completions.create(model=NAME, messages=messages, max_tokens=LENGTH)
    expected = complete(client, first).choices[0].message.content
    assert by_file.choices[0].message.content == expected
    assert complete(client, file.id).choices[0].message.content == expected
    assert client.files.retrieve(file.id).bytes == len(as_bytes(first))
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        complete(client, file.id)


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.keepsight) == (NAME, {"memories": ["pvm"], "adapters": []})
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
