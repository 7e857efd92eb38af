"""The servers that are compared, started with the same threads, context and number of parallel requests."""

import json
import pathlib
import random
import re
import socket
import subprocess
import tempfile
import time

import lab

READY_LIMIT_S = 300
REQUEST_LIMIT_S = 900
# Ids that exist in any vocabulary of at least a thousand tokens and are no special tokens.
FIRST_TOKEN, LAST_TOKEN = 300, 999
# Murmur's engine lets other programs go first. So do the programs it is measured against: whatever else runs on the machine
# would take from one side only.
AS_NICE = ("nice", "-n", 10)
# Guesses of llama.cpp at once. Its default is three; where a step costs a long way, more pay.
LLAMA_GUESSES = 8


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server; a context manager. `command` makes its command line of a port and a folder; `host` is where it runs."""

    def __init__(self, name, command, host=None):
        self.name = name
        self.host = host or lab.Here()
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="murmur-bench-")
        self.command = [str(word) for word in (*self.host.entry, *command(self.port, self.folder.name))]

    def __enter__(self):
        self.start()
        models = self.ask("GET", "/v1/models")["data"]
        self.model = models[0]["id"] if models else ""
        return self

    def start(self):
        """Starts it, for the first time or again, and waits until it is ready."""
        self.launch()
        self.wait(lambda: self.answers("/health"))

    def launch(self):
        """Starts it and does not wait."""
        self.log = open(pathlib.Path(self.folder.name) / "log", "w+")
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def wait(self, condition):
        """Until `condition` holds of the server. That it cannot be reached yet is no answer."""
        deadline = time.monotonic() + READY_LIMIT_S

        def holds():
            try:
                return condition()
            except OSError:
                return False

        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                text = self.log.read()[-3000:]
                self.__exit__()
                raise SystemExit(f"{self.name} did not start: {' '.join(self.command)}\n{text}")
            time.sleep(0.1)

    def kill(self):
        """Ends it as a power failure would."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ask(self, method, path, value=None):
        """JSON of an answer."""
        status, body = self._exchange(method, path, value)
        if status != 200:
            raise SystemExit(f"{self.name} answered {status} to {path}: {body.decode()}")
        return json.loads(body)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def answers(self, path):
        return self._exchange("GET", path, None)[0] == 200

    def _exchange(self, method, path, value):
        connection = self.host.connection(self.port, REQUEST_LIMIT_S)
        try:
            body = None if value is None else json.dumps(value)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def generate(self, prompt, count, **more):
        """Streams `count` tokens after `prompt` (token ids): (seconds until the first event with a choice, seconds in all). `more`:
        further fields of the request."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}, **more,
        }
        connection = self.host.connection(self.port, REQUEST_LIMIT_S)
        try:
            begin = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name} answered {response.status}: {response.read().decode()}")
            first, usage, ended = None, None, False
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                if first is None:
                    first = time.perf_counter() - begin
                if b'"usage":{' in line or b'"usage": {' in line:
                    usage = json.loads(line[6:])["usage"]
            total = time.perf_counter() - begin
        finally:
            connection.close()
        if not ended or usage is None:
            raise SystemExit(f"{self.name} ended its stream without [DONE] or without usage")
        # What is compared must be the same work.
        if usage["completion_tokens"] != count or abs(usage["prompt_tokens"] - len(prompt)) > 1:
            raise SystemExit(f"{self.name} counted {usage}, asked were {len(prompt)} and {count} tokens")
        return first or total, total

    def stream(self, body):
        """The events of a streamed completion as they come, as JSON."""
        connection = self.host.connection(self.port, REQUEST_LIMIT_S)
        try:
            body = json.dumps({**body, "stream": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name} answered {response.status}: {response.read().decode()}")
            event = {}
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    yield event
            if "error" not in event:
                raise SystemExit(f"{self.name} ended its stream without [DONE]")
        finally:
            connection.close()

    def memory_mib(self):
        """Proportional set size of the process and all its descendants: shared pages count once."""
        return sum(pss_mib(pid) for pid in family(self.process.pid))


def family(pid):
    """A process and its descendants."""
    yield pid
    for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from family(int(child))


def pss_mib(pid):
    try:
        text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE).group(1)) / 1024


def unique_prompt(length):
    """Token ids that no earlier request shares a prefix with, for all practical purposes."""
    return [random.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]


def murmur(binary, model, *, threads, context, parallel, stages=1, exact=False, name="murmur", mesh=(), host=None):
    def command(port, folder):
        return [
            binary, "serve", model, "--api", f"127.0.0.1:{port}", "--data-dir", folder, "--threads", threads,
            "--ctx", context, "--parallel", parallel, "--stages", stages, f"--exact={str(exact).lower()}", *mesh,
        ]

    return Server(name, command, host)


def offline(address="127.0.0.1"):
    """Arguments of a node that asks and tells nobody outside this machine, and has the same port in each life."""
    return ("--relay", "none", "--no-nostr", "--no-mdns", "--bind", f"{address}:{free_port()}")


def client(binary, mesh=None, host=None):
    """A node of the public mesh `bench` without models of its own; `mesh`: other arguments that lead it into one."""
    into = mesh or ("--mesh", "bench", *offline())

    def command(port, folder):
        return [binary, "client", "--api", f"127.0.0.1:{port}", "--data-dir", folder, *into]

    return Server("client", command, host)


class seed:
    """Relays of one's own on a host of the lab; a context manager."""

    def __init__(self, binary, host):
        self.command = [str(word) for word in (*host.entry, binary, "seed", "--json", "--bind", host.address)]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.relay = json.loads(self.process.stdout.readline())["relay"]
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate()


def llama_server(folder, model, *, threads, context, parallel, host=None, rpc=None, draft=None):
    """`rpc`: address of an RPC server, and how many layers it computes. `draft`: a model that guesses, on this host."""
    elsewhere = () if rpc is None else ("--rpc", rpc[0], "--n-gpu-layers", rpc[1])
    if draft is not None:
        guesser = ("--model-draft", draft, "--threads-draft", threads, "--device-draft", "none")
        # A draft model alone is loaded and not used.
        elsewhere += (*guesser, "--spec-type", "draft-simple", "--spec-draft-n-max", LLAMA_GUESSES)

    def command(port, _):
        return [
            *AS_NICE, pathlib.Path(folder) / "llama-server", "--model", model, "--host", "127.0.0.1", "--port", port,
            "--threads", threads, "--ctx-size", context * parallel, "--parallel", parallel, "--no-webui", "--offline", *elsewhere,
        ]

    return Server("llama-server", command, host)


class rpc_server:
    """llama.cpp's server of layers, on a host of the lab; a context manager."""

    def __init__(self, folder, host):
        port = free_port()
        self.address = f"{host.address}:{port}"
        words = (*host.entry, *AS_NICE, pathlib.Path(folder) / "ggml-rpc-server", "-H", host.address, "-p", port, "-t", 1)
        self.command = [str(word) for word in words]

    def __enter__(self):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, **quiet)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
