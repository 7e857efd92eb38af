"""Bad input: each gets the right status and a message, and the server goes on serving."""

import json
import socket

import murmur_server
import openai
import pytest
from conftest import user

QUESTION = user("Who are you?")


@pytest.fixture(autouse=True)
def still_serving(client, model):
    """After every test here the server answers as before."""
    yield
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content


def chat(client, model, **options):
    options = {"messages": QUESTION, "max_tokens": 8, **options}
    return client.chat.completions.create(model=model, **options)


def test_an_unknown_model_is_not_found(client, model):
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, "no-such-model")
    assert refused.value.code == "model_not_found"
    assert "no-such-model" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_a_prompt_longer_than_the_context_says_both_lengths(client, model):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, model, messages=user("word " * 5_000))
    assert refused.value.code == "context_length_exceeded"
    assert "512" in refused.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": "warm"},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"n": 0},
        {"n": 100_000},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"frequency_penalty": 9},
        {"presence_penalty": "none"},
        {"logprobs": "yes"},
        {"logprobs": True, "top_logprobs": 1_000},
        {"top_logprobs": 3},
        {"logit_bias": {"cat": 1}},
        {"logit_bias": {"99999999": 1}},
        {"seed": "now"},
        {"stop": [str(number) for number in range(10_000)]},
        {"stop": 5},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"stream_options": {"include_usage": True}},
        {"extra_body": {"no_such_field": 1}},
    ],
    ids=lambda options: json.dumps(options)[:48],
)
def test_what_cannot_be_honoured_is_refused_and_named(client, model, options):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, model, **options)
    error = refused.value
    assert error.type == "invalid_request_error"
    assert error.message
    names = set(options.get("extra_body", options))
    assert error.param is None or error.param.split(".")[0].split("[")[0] in names


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "x"', b"\xff\xfe\x00", b'{"model": "\xff"}', b"[" * 100_000],
    ids=["empty", "open", "list", "null", "cut off", "not text", "not UTF-8", "deep"],
)
def test_a_body_that_is_no_request_is_refused(server, body):
    status, headers, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 400
    assert headers["Content-Type"].startswith("application/json")
    error = json.loads(answer)["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_temperature_that_is_no_number_is_refused(server, number):
    body = f'{{"model": "{server.model}", "messages": [{{"role": "user", "content": "Hi"}}], "temperature": {number}}}'
    status, _, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["message"]


def test_a_body_of_100_megabytes_is_refused_unread(server):
    body = json.dumps({"model": server.model, "messages": user("x" * 100_000_000)})
    try:
        status, _, _ = server.request("POST", "/v1/chat/completions", body)
    except (BrokenPipeError, ConnectionResetError):
        return
    assert status == 413


def test_unknown_paths_and_methods_have_json_errors(server):
    for method, path, expected in [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/models", 405)]:
        status, _, body = server.request(method, path)
        assert status == expected
        assert json.loads(body)["error"]["message"]


def test_a_foreign_web_page_cannot_use_the_server(server):
    body = json.dumps({"model": server.model, "messages": QUESTION, "max_tokens": 1})
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        status, answer_headers, _ = server.request("POST", "/v1/chat/completions", body, headers)
        assert status in (403, 421), headers
        assert answer_headers.get("Access-Control-Allow-Origin") is None


def test_half_a_request_holds_up_nobody(server, client, model):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        assert chat(client, model).choices


def test_overload_is_refused_with_a_time_to_come_back(server):
    """Long requests pile up until one is refused; nothing crashes, and all is well once they are gone."""
    body = {"model": server.model, "messages": user("Tell me a story."), "n": 8, "max_tokens": 400, "ignore_eos": True}
    waiting = []
    try:
        with server.client() as client:
            for _ in range(400):
                waiting.append(server.open_stream("/v1/chat/completions", body))
                if len(waiting) % 20:
                    continue
                try:
                    client.with_options(timeout=5).chat.completions.create(
                        model=server.model, messages=QUESTION, max_tokens=1
                    )
                except openai.APITimeoutError:
                    pass
                except openai.RateLimitError as refused:
                    assert int(refused.response.headers["Retry-After"]) >= 1
                    assert refused.message
                    return
        pytest.fail("400 waiting requests, and none was refused")
    finally:
        for connection in waiting:
            connection.close()


@pytest.fixture(scope="module")
def locked():
    with murmur_server.Server(api_key="s3cret") as server:
        yield server


def test_with_a_key_set_only_its_holders_are_served(locked):
    assert chat(locked.client(), locked.model).choices
    for wrong in ("s3cre", "s3cret2", "S3CRET"):
        with pytest.raises(openai.AuthenticationError) as refused:
            chat(locked.client(api_key=wrong), locked.model)
        assert wrong not in refused.value.message
    assert locked.request("GET", "/v1/models", headers={"Authorization": ""})[0] == 401


def test_a_public_address_demands_a_key():
    port = murmur_server.free_port()
    ended = murmur_server.run("serve", murmur_server.DEMO_MODEL, "--api", f"0.0.0.0:{port}")
    assert ended.returncode != 0
    assert "key" in ended.stderr.lower()


def test_a_port_in_use_is_said(server):
    ended = murmur_server.run("serve", murmur_server.DEMO_MODEL, "--api", f"127.0.0.1:{server.port}")
    assert ended.returncode != 0
    assert str(server.port) in ended.stderr


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\xff\xff\xff\xff" + b"\xff" * 64, b"not a model at all " * 9])
def test_a_file_that_is_no_model_is_refused_at_start(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    ended = murmur_server.run("serve", path, "--api", f"127.0.0.1:{murmur_server.free_port()}", "--data-dir", tmp_path)
    assert ended.returncode != 0
    assert "broken.gguf" in ended.stderr
    assert "panicked" not in ended.stderr


def test_a_truncated_model_is_refused_at_start(tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(murmur_server.DEMO_MODEL.read_bytes()[:1_000_000])
    ended = murmur_server.run("serve", path, "--api", f"127.0.0.1:{murmur_server.free_port()}", "--data-dir", tmp_path)
    assert ended.returncode != 0
    assert "half.gguf" in ended.stderr
