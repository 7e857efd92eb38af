#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starts `murmur serve MODEL --stages 3`, asks it one question over HTTP and prints the answer as it arrives.

    MURMUR_BIN=target/release/murmur python3 models/demo/demo.py MODEL PROMPT

Standard library only: what any OpenAI client does is a POST and a line-by-line read.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

START_LIMIT_S = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server, port, log):
    """The server answers /health with 200 once the model is loaded."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; its log:\n{log_text(log)}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the server was not ready within {START_LIMIT_S} s; its log:\n{log_text(log)}")


def log_text(log):
    log.seek(0)
    return log.read()[-4000:]


def ask(port, prompt):
    """Streams one chat completion to the terminal; returns (tokens, seconds to the first text, seconds in all)."""
    body = {
        "model": "murmur-demo-q8_0",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    begin = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    tokens, first, ended = 0, None, False
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            ended = True
            break
        if not line.startswith("data: "):
            continue
        event = json.loads(line[len("data: "):])
        if "error" in event:
            raise SystemExit(f"\nthe answer broke off: {event['error']['message']}")
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            text = choice["delta"].get("content")
            if text:
                first = first or time.monotonic() - begin
                print(text, end="", flush=True)
    if not ended:
        raise SystemExit("\nthe stream ended without [DONE]")
    return tokens, first or 0.0, time.monotonic() - begin


def main():
    model, prompt = sys.argv[1:3]
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="murmur-demo-") as data, tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [os.environ["MURMUR_BIN"], "--data-dir", data, "--api", f"127.0.0.1:{port}", "serve", model, "--stages", "3"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )
        try:
            wait_until_ready(server, port, log)
            print(f"\nready on http://127.0.0.1:{port}/v1 (12 layers in 3 stages)\n\n> {prompt}\n", flush=True)
            tokens, first, total = ask(port, prompt)
            rate = (tokens - 1) / (total - first) if total > first and tokens > 1 else 0.0
            print(f"\n\n{tokens} tokens, the first after {first * 1000:.0f} ms, then {rate:.0f} tokens/s")
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


if __name__ == "__main__":
    main()
