"""Streaming: what arrives is the same answer, in order, ended exactly once."""

import json
import time

import pytest
from conftest import user

STORY = "Tell me a story about Lily and a kitten."


def stream(client, model, question=STORY, **options):
    options = {"temperature": 0, **options}
    return list(client.chat.completions.create(model=model, messages=user(question), stream=True, **options))


def text_of(chunks, index=0):
    return "".join(
        choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index
    )


def test_the_pieces_of_a_stream_make_the_whole_answer(client, model, ask):
    chunks = stream(client, model)
    assert text_of(chunks) == ask(STORY).choices[0].message.content
    assert len(chunks) > 10
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert reasons[-1] == "stop"


def test_usage_comes_in_a_last_chunk_when_asked_for(client, model, ask):
    chunks = stream(client, model, "Who are you?", stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == ask("Who are you?").usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_is_streamed_unless_asked_for(client, model):
    assert all(chunk.usage is None for chunk in stream(client, model, "Who are you?"))


def test_a_stream_ends_with_exactly_one_done(server):
    body = {"model": server.model, "messages": user("Who are you?"), "temperature": 0, "stream": True}
    status, headers, raw = server.request("POST", "/v1/chat/completions", json.dumps(body))
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    events = [line for line in raw.decode().split("\n") if line.startswith("data:")]
    assert [event for event in events if "[DONE]" in event] == ["data: [DONE]"]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        json.loads(event[len("data:"):])


def test_statistics_come_as_a_comment_that_clients_skip(server, client, model):
    body = {"model": model, "messages": user("Who are you?"), "temperature": 0, "stream": True}
    _, _, raw = server.request("POST", "/v1/chat/completions", json.dumps(body))
    [comment] = [line for line in raw.decode().split("\n") if line.startswith(": murmur ")]
    statistics = json.loads(comment.removeprefix(": murmur "))
    assert statistics["usage"]["completion_tokens"] == statistics["timings"]["predicted_n"] > 0
    assert text_of(stream(client, model, "Who are you?"))


def test_a_stop_string_never_shows_in_a_stream_not_even_in_part(client, model, ask):
    whole = ask(STORY).choices[0].message.content
    stop = whole[33:49]
    chunks = stream(client, model, stop=stop)
    assert text_of(chunks) == whole[: whole.index(stop)]


def test_n_answers_share_a_stream(client, model):
    options = {"n": 2, "temperature": 1, "seed": 4, "max_tokens": 30}
    chunks = stream(client, model, **options)
    whole = client.chat.completions.create(model=model, messages=user(STORY), **options)
    for index in (0, 1):
        assert text_of(chunks, index) == whole.choices[index].message.content


def test_logprobs_are_streamed_with_their_tokens(client, model):
    chunks = stream(client, model, "Who are you?", logprobs=True)
    tokens = [
        token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert b"".join(bytes(token.bytes) for token in tokens).decode().startswith(text_of(chunks))


def test_a_slow_reader_loses_nothing(client, model, ask):
    pieces = []
    for chunk in client.chat.completions.create(model=model, messages=user(STORY), temperature=0, stream=True):
        pieces.append(chunk)
        time.sleep(0.01)
    assert text_of(pieces) == ask(STORY).choices[0].message.content


def test_a_client_that_leaves_stops_the_computation(server):
    """The engine's own counter of tokens stands still soon after, far below what was asked for."""
    name = "murmur_generated_tokens_total"
    before = server.metric(name)
    assert before is not None, f"/metrics has no {name}"
    body = {"model": server.model, "messages": user(STORY), "n": 8, "temperature": 1, "max_tokens": 400, "ignore_eos": True}
    connection = server.open_stream("/v1/chat/completions", body)
    response = connection.getresponse()
    assert response.status == 200
    response.read(1)
    connection.sock.close()
    response.close()
    connection.close()
    deadline = time.monotonic() + 20
    last = server.metric(name)
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = server.metric(name)
        if now == last:
            break
        last = now
    else:
        pytest.fail("tokens were still being generated 20 s after the client had left")
    assert last - before < 8 * 400


def test_a_stream_can_be_closed_through_the_client(client, model):
    with client.chat.completions.create(model=model, messages=user(STORY), stream=True, temperature=0) as answer:
        for _, _chunk in zip(range(3), answer):
            pass
    assert client.models.retrieve(model).id == model
