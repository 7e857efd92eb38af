"""Starts the real `murmur` binary for a test and talks to it, through the official client or byte by byte.

The binary is the one that MURMUR_BIN names (`./x test` sets it), else the debug build of this clone.
"""

import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "models/demo/murmur-demo-q8_0.gguf"
READY_LIMIT_S = 120
REQUEST_LIMIT_S = 120


def binary():
    """The path of the binary under test."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    path = pathlib.Path(os.environ.get("MURMUR_BIN", target / "debug/murmur"))
    assert path.exists(), f"{path} does not exist: build it (cargo build --bin murmur) or set MURMUR_BIN"
    return path


def run(*args, **kwargs):
    """Runs the binary to its end."""
    return subprocess.run([binary(), *map(str, args)], capture_output=True, text=True, timeout=REQUEST_LIMIT_S, **kwargs)


_taken = []


def free_port():
    """A port on which nothing listens. The system gives it to nobody who asks for any, since a socket of this process has it; a
    server that asks for just this one, and lets it be shared as servers do, gets it all the same."""
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", 0))
    _taken.append(taken)
    return taken.getsockname()[1]


class Server:
    """One `murmur serve` with a data folder of its own. A context manager: leaving it ends the process."""

    def __init__(self, *models, stages=None, args=(), api_key=None):
        self.models = models or (DEMO_MODEL,)
        self.stages = stages
        self.args = args
        self.api_key = api_key
        self.port = free_port()

    def __enter__(self):
        self.data = tempfile.TemporaryDirectory(prefix="murmur-test-")
        self.log = open(os.path.join(self.data.name, "server.log"), "w+")
        command = [binary(), "serve", *self.models, "--api", f"127.0.0.1:{self.port}", "--data-dir", self.data.name]
        if self.stages:
            command += ["--stages", self.stages]
        if self.api_key:
            command += ["--api-key", self.api_key]
        self.process = subprocess.Popen(
            [str(word) for word in [*command, *self.args]], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        try:
            self._wait_until_ready()
            self.model = self.client().models.list().data[0].id
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def _wait_until_ready(self):
        deadline = time.monotonic() + READY_LIMIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended: {self.process.returncode}\n{self.log_text()}"
            try:
                if self.request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready within {READY_LIMIT_S} s\n{self.log_text()}")

    def _stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.data.cleanup()

    def log_text(self):
        self.log.flush()
        with open(self.log.name) as log:
            return log.read()[-4000:]

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, api_key=None, kind=openai.OpenAI):
        """The official client, without its own retries: a test wants to see the first answer."""
        return kind(
            base_url=self.base_url, api_key=api_key or self.api_key or "unused", max_retries=0, timeout=REQUEST_LIMIT_S,
        )

    def request(self, method, path, body=None, headers=None):
        """One raw HTTP request: (status, headers, body bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_LIMIT_S)
        try:
            connection.request(method, path, body, self._headers(headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(self, path, value, headers=None):
        """Posts JSON: (status, parsed JSON)."""
        status, _, body = self.request("POST", path, json.dumps(value), headers)
        return status, json.loads(body)

    def open_stream(self, path, value):
        """Sends a streaming request on a connection of its own and leaves the answer unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_LIMIT_S)
        connection.request("POST", path, json.dumps({**value, "stream": True}), self._headers(None))
        return connection

    def _headers(self, more):
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return {**headers, **(more or {})}

    def metric(self, name):
        """The value of a counter or gauge, summed over its labels; None when there is none of that name."""
        _, _, body = self.request("GET", "/metrics")
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in body.decode().splitlines()
            if line.startswith((name + " ", name + "{"))
        ]
        return sum(values) if values else None
