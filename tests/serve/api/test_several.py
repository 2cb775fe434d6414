"""Several adapters on one base: a request gets the model that it names, whatever else is being answered."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from helpers import attach
from live import NAME, ask, generated, images, serving

import keepsight
from keepsight.checkpoints.load import load_several
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import KeepsightError
from keepsight.serve.hf.served import Served

BASE = "keepsight/reference"
LENGTH = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two PVMs on the reference VLM."""
    root = tmp_path_factory.mktemp("adapters")
    for name, gate in (("one", 0.3), ("two", -0.6)):
        attach(keepsight.load(BASE)[0], width=32, gate=gate).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    sets = {"one": [folders / "one"], "two": [folders / "two"], "latent": ["keepsight/reference-vismem"]}
    return load_several(BASE, {NAME: []} | {name: check_sources(BASE, own)[1] for name, own in sets.items()})


@pytest.fixture(scope="module")
def live(loaded):
    others = {name: Served.of(*pair) for name, pair in loaded.items() if name != NAME}
    with serving(*loaded[NAME], others=others) as live:
        yield live


def test_their_weights_are_the_bases_own_and_their_modules_are_not(loaded):
    base = loaded[NAME][0]
    names = {p.data_ptr(): name for name, p in base.named_parameters()}
    modules = {id(module) for module in base.modules()}
    for name, (model, _) in loaded.items():
        found = {p.data_ptr() for p in model.parameters()}
        assert set(names) <= found
        if name != NAME:
            assert not modules & {id(module) for module in model.modules()}


def test_each_is_what_it_is_alone(loaded, folders):
    picture = images(1)[0]
    for name, source in (("one", folders / "one"), ("two", folders / "two"), ("latent", "keepsight/reference-vismem")):
        assert generated(*loaded[name], picture, LENGTH) == generated(*keepsight.load(source), picture, LENGTH)
    assert generated(*loaded[NAME], picture, LENGTH) == generated(*keepsight.load(BASE), picture, LENGTH)


def test_interleaved_requests_get_what_they_get_alone(live, loaded):
    pictures = images(4)
    jobs = [(name, image) for image in pictures for name in loaded]
    expected = [generated(*loaded[name], image, LENGTH) for name, image in jobs]
    assert len({tuple(expected[i :: len(loaded)]) for i in range(len(loaded))}) >= 3

    def one(job):
        name, image = job
        answer = live.client().chat.completions.create(model=name, messages=ask(image), max_tokens=LENGTH)
        assert answer.model == name
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, jobs)) == expected


def test_they_are_listed_and_others_refused(live, loaded):
    client = live.client()
    found = {model.id: model.keepsight["memories"] for model in client.models.list().data}
    assert found == {NAME: [], "one": ["pvm"], "two": ["pvm"], "latent": ["vismem"]}
    assert client.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError, match="'one', 'two'"):
        client.chat.completions.create(model="three", messages=ask(images(1)[0]))
    with pytest.raises(openai.BadRequestError, match="carries no memory"):
        client.chat.completions.create(
            model=NAME, messages=ask(images(1)[0]), extra_body={"keepsight": {"memory": True}}
        )


def test_an_adapter_that_changes_the_base_is_refused(folders, tmp_path):
    model = attach(keepsight.load(BASE)[0], width=32)
    model.save_pretrained(tmp_path / "embedding", save_embedding_layers=True)
    sets = {NAME: [], "embedding": check_sources(BASE, [tmp_path / "embedding"])[1]}
    with pytest.raises(KeepsightError, match="weights of the base itself"):
        load_several(BASE, sets)


def test_the_page_says_what_is_served(live):
    page = httpx.get(live.url)
    assert page.headers["content-type"].startswith("text/html")
    assert all(name in page.text for name in (NAME, "one", "latent", "/v1/chat/completions", "/docs"))
    assert "http" not in page.text.replace(live.url, "").replace("http-equiv", "")  # it asks nothing of other hosts


def test_the_schema_is_that_of_the_requests(live):
    schema = httpx.get(f"{live.url}/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    assert {"/v1/chat/completions", "/v1/models", "/v1/files", "/health"} <= set(schema["paths"])
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    assert {"messages", "top_k", "min_p", "response_format", "tools", "keepsight"} <= set(fields)
    text = str(schema)
    named = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(schema["components"]["schemas"])
    assert "ValidationError" not in text  # FastAPI's own form of errors, which this server never sends
    error = httpx.get(f"{live.url}/v1/models/none").json()["error"]
    assert set(schema["components"]["schemas"]["Error"]["properties"]["error"]["required"]) == set(error)
    page = httpx.get(f"{live.url}/docs")
    assert all(field in page.text for field in fields)
    assert "http" not in page.text.replace(live.url, "").replace("http-equiv", "")
