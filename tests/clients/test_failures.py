"""What clients see when something goes wrong: an engine process that hangs or cannot be brought back, a server that ends."""

import os
import signal
import threading

import murmur_server
import openai
import pytest
from conftest import user

BODY = {"messages": user("Tell me a story about Lily and a kitten."), "max_tokens": 400, "ignore_eos": True}


def test_a_stream_that_the_server_cuts_off_ends_with_an_error_and_without_done():
    with murmur_server.Server() as server:
        response = server.open_stream("/v1/chat/completions", {**BODY, "model": server.model, "n": 4}).getresponse()
        response.read(1)
        # Stages that hang finish nothing in the meantime.
        for pid in stage_processes(server):
            os.kill(pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGINT)
        wait_for_log(server, "Ctrl-C again")
        server.process.send_signal(signal.SIGINT)
        rest = response.read().decode()
        assert "[DONE]" not in rest
        assert "the server is shutting down" in rest.strip().splitlines()[-1]
        assert server.process.wait(20) == 0


def test_a_model_whose_processes_cannot_be_brought_back_is_refused_with_the_reason(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(murmur_server.DEMO_MODEL.read_bytes())
    with murmur_server.Server(model) as server:
        client = server.client()
        model.rename(tmp_path / "away.gguf")
        [pid] = stage_processes(server)
        os.kill(pid, signal.SIGKILL)
        # The request waits while the process is started again, until that is given up.
        with pytest.raises(openai.APIError, match="could not be restarted"):
            client.chat.completions.create(model=server.model, messages=user("Hi"))
        with pytest.raises(openai.InternalServerError, match="could not be restarted") as refused:
            client.chat.completions.create(model=server.model, messages=user("Hi"))
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) > 0
        assert client.models.retrieve(server.model).state == "failed"
        status, headers, body = server.request("GET", "/health")
        assert (status, b"could not be restarted" in body) == (503, True)
        assert "Retry-After" in headers


def stage_processes(server):
    """The process ids of a server's stages."""
    _, _, body = server.request("GET", "/api/status")
    [model] = murmur_server.json.loads(body)["node"]["models"]
    return [stage["process_id"] for stage in model["stages"]]


def wait_for_log(server, text):
    for _ in range(400):
        if text in server.log_text():
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{text!r} is not in the log: {server.log_text()}")
