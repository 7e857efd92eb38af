#!/usr/bin/env python3
"""What the mesh costs, with real nodes on this machine: a reader when a server dies, a request for being served elsewhere.

*failover*: several servers of one model and a client. A story is read through the client, and at a random moment the
server that writes it is killed with -9; then it is started again, and so on. Printed is the distribution of the time
from the kill to the next token at the reader. What was still under way counts as read before: the pause ends with the
token after the longest silence. In it the other server computes prompt and story so far once more; how long that takes is
measured beforehand, as the first token of prompts of such lengths, and what is left is printed too. A stream is lost if
it does not end as the undisturbed one, token for token.

*overhead*: requests through a client against the same requests to the server itself, in turns: same engine, same
model, and between them one QUIC connection over loopback. One core is left to the two nodes and the reader.

*ring*: a model of which each node holds a part against the same model whole on one node, one thread each, so that the
computation of a token takes the same time. What is more is the way around: to the first stage, from each to the next,
and back.

*hop*: the same with a model of the same width of which hardly anything has to be computed, so that what a token takes longer is what
hops cost: engine process to node, over QUIC to the next node, and into its engine process.

*requests*: requests for one token each, many at a time, of a model as small as possible: through the API, through the
API of another node, and straight into an engine.

`./x bench mesh` builds everything and runs this.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import tempfile
import threading
import time

import servers
from bench import Table, bench_models, decode_rate, first_token_s, in_turns, machine, prefill_rate, token_and_compute_ms

PARTS = ("failover", "overhead", "ring", "hop", "requests")
# Small, so that a story is over soon and what is measured is the mesh.
SMALL_SHAPE = "llama"
STORY_PROMPT_TOKENS, STORY_TOKENS = 64, 1000
# Servers are killed before this share of the time that an undisturbed story takes.
LATEST_KILL = 0.9
REPLAY_LENGTHS, REPLAY_ROUNDS = 5, 5
FIRST_TOKEN_PAIRS = 51
RING_SHAPE, RING_STAGES = "bench-1b", (2, 4)
HOP_SHAPE, HOP_STAGES, HOP_PAIRS = "bench-wide", 4, 15
CONTEXT = 2048
CONCURRENCY, REQUESTS = 8, 2000


def synthetic(options, shapes):
    """Models with random weights."""
    return bench_models(argparse.Namespace(murmur=options.murmur, models=options.models, shapes=shapes))


def layers_of(options, model):
    shown = subprocess.run([options.murmur, "models", "show", model, "--json"], capture_output=True, check=True)
    return len(json.loads(shown.stdout)["layers"])


def spread_over(layers, count):
    """Arguments of each of `count` nodes that share a model evenly."""
    return ("--max-layers", str(-(-layers // count)))


def ticket_of(client):
    return client.ask("POST", "/api/mesh/invite", {"valid_s": 24 * 3600, "role": "worker"})["ticket"]


class Mesh:
    """A client, and servers of one model; a context manager."""

    def __init__(self, options, model, count, more=(), **shape):
        self.options, self.model, self.count, self.more, self.shape = options, model, count, more, shape
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        with self.stack as stack:
            self.client = stack.enter_context(servers.client(self.options.murmur))
            ticket = ticket_of(self.client)
            start = lambda number: servers.murmur(
                self.options.murmur, self.model, **self.shape, name=f"server {number}",
                mesh=("--join", ticket, *servers.offline(), *self.more),
            )
            self.servers = [start(number) for number in range(1, self.count + 1)]
            # At once: those of a ring are ready when all are there.
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(stack.enter_context, self.servers))
            self.wait()
            self.by_id = {server.ask("GET", "/api/mesh")["node"]: server for server in self.servers}
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def wait(self):
        """Until the client has all servers and all servers have the client."""
        deadline = time.monotonic() + servers.READY_LIMIT_S
        while not self._is_whole():
            if time.monotonic() > deadline:
                raise SystemExit(f"the client and its {self.count} servers do not find each other")
            time.sleep(0.05)
        self.client.model = self.servers[0].model

    def _is_whole(self):
        # A server that was killed is listed for a while; that it has a connection again is for the new one to say.
        own = self.client.ask("GET", "/api/mesh")
        linked = [peer["node"] == own["node"] and peer["rtt_ms"] is not None for server in self.servers
                  for peer in server.ask("GET", "/api/mesh")["peers"]]
        serving = [peer for peer in own["peers"] if any(model["state"] == "ready" for model in peer["models"])]
        return sum(linked) == len(serving) == self.count and self.client.ask("GET", "/v1/models")["data"]


class Story(threading.Thread):
    """A streamed completion, read as it comes: the times of its tokens, its text, and how it ended."""

    def __init__(self, server, prompt, tokens=STORY_TOKENS):
        super().__init__()
        self.server, self.times, self.text, self.end = server, [], "", "cut off"
        self.body = {
            "model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 1, "seed": 7,
            "ignore_eos": True,
        }
        self.begun = time.perf_counter()
        self.start()

    def run(self):
        try:
            for event in self.server.stream(self.body):
                self._take(event, time.perf_counter())
        except (OSError, SystemExit) as failure:
            self.end = str(failure)

    def _take(self, event, now):
        if "error" in event:
            self.end = event["error"]["message"]
            return
        for choice in event["choices"]:
            if choice["text"]:
                self.times.append(now)
                self.text += choice["text"]
            self.end = choice["finish_reason"] or self.end

    def pause_s(self, killed):
        """From the kill to the token after the longest silence; None where no token was missing any more."""
        times = [killed] + [moment for moment in self.times if moment > killed]
        silences = [(after - before, after) for before, after in zip(times, times[1:])]
        return max(silences)[1] - killed if silences else None


def replay_of(client):
    """A function from tokens to seconds: a line through first token times."""
    lengths = [STORY_PROMPT_TOKENS + step * STORY_TOKENS // REPLAY_LENGTHS for step in range(REPLAY_LENGTHS)] * REPLAY_ROUNDS
    slope, intercept = statistics.linear_regression(lengths, [first_token_s(client, length) for length in lengths])
    return lambda tokens: slope * tokens + intercept


def failover(options, table):
    model = next(synthetic(options, [SMALL_SHAPE]))
    for exact in (True, False):
        mode = "exact" if exact else "default mode"
        before_first, in_stream, without_replay, lost = kills(options, model, exact, mode)
        for name, pauses in (("before the first token", before_first), ("in mid-stream", in_stream), ("all, less the replay", without_replay)):
            # In exact mode what was generated goes through slower kernels when it is computed again: a prompt's time says nothing of it.
            if pauses and not (exact and pauses is without_replay):
                print(f"  {name:24} {len(pauses):>4} kills   {distribution(pauses)}")
        if not exact:
            table.limit(f"{model.stem}: kill to next token less replay, median", "ms", 1000 * statistics.median(without_replay), 1000)
        table.limit(f"{model.stem}, {mode}: streams lost of {options.kills}", "", len(lost), 0)
        for reason in sorted(set(lost)):
            print(f"  lost: {reason}")


def kills(options, model, exact, mode):
    """Pauses in seconds: before the first token, in mid-stream, all less the replay of prompt and story; and how streams that were lost ended. In
    exact mode a stream with another text than without deaths is lost, too."""
    with Mesh(options, model, options.servers, threads=1, context=CONTEXT, parallel=1, exact=exact) as mesh:
        prompt = servers.unique_prompt(STORY_PROMPT_TOKENS)
        Story(mesh.client, prompt).join()
        undisturbed = Story(mesh.client, prompt)
        undisturbed.join()
        whole_s = undisturbed.times[-1] - undisturbed.begun
        what = f"{model.stem}, {mode}: {options.servers} servers, stream of {STORY_TOKENS} tokens, {whole_s:.1f} s undisturbed"
        print(f"{what}; kill -9 of the one that serves, to the next token at the reader:", flush=True)
        replay_s = replay_of(mesh.client)
        before_first, in_stream, without_replay, lost = [], [], [], []
        while len(without_replay) + len(lost) < options.kills:
            mesh.wait()
            # What a server has computed before it need not compute again; with exact the text is compared with the undisturbed one.
            story = Story(mesh.client, prompt if exact else servers.unique_prompt(STORY_PROMPT_TOKENS))
            time.sleep(random.uniform(0, LATEST_KILL * whole_s))
            running = mesh.client.ask("GET", "/api/status")["node"]["requests"]
            server = mesh.by_id.get(running[0]["at"]) if running else None
            if server is None:
                story.join()
                continue
            read = len(story.times)
            killed = time.perf_counter()
            server.kill()
            story.join()
            pause_s = story.pause_s(killed)
            if story.end != "length" or exact and story.text != undisturbed.text:
                lost.append(story.end)
            elif pause_s is not None:
                (in_stream if read else before_first).append(pause_s)
                without_replay.append(pause_s - replay_s(STORY_PROMPT_TOKENS + read))
            server.start()
    return before_first, in_stream, without_replay, lost


def distribution(values_s):
    cuts = statistics.quantiles(values_s, n=100, method="inclusive") if len(values_s) > 1 else values_s * 99
    figures = {"min": min(values_s), "p25": cuts[24], "median": cuts[49], "p75": cuts[74], "p90": cuts[89], "max": max(values_s)}
    return "   ".join(f"{name} {1000 * value:.0f} ms" for name, value in figures.items())


def overhead(options, table):
    for model in synthetic(options, options.shapes):
        with Mesh(options, model, 1, threads=options.threads, context=CONTEXT, parallel=1) as mesh:
            server, client = mesh.servers[0], mesh.client
            for node in (server, client):
                node.generate(servers.unique_prompt(64), 8)
            pair = in_turns(options.rounds, lambda: decode_rate(client), lambda: decode_rate(server))
            table.pairs(f"{model.stem}: decode, remote / local", "tok/s", *pair, bar=0.99)
            remote, local = in_turns(
                FIRST_TOKEN_PAIRS, lambda: first_token_s(client, STORY_PROMPT_TOKENS), lambda: first_token_s(server, STORY_PROMPT_TOKENS)
            )
            more_ms = [1000 * (there - here) for there, here in zip(remote, local, strict=True)]
            table.limit(f"{model.stem}: first token, remote - local", "ms", statistics.median(more_ms), 5)


@contextlib.contextmanager
def whole_and_ring(options, shape, stages):
    """A server that holds a model whole, and a driver of a ring of `stages` nodes that holds one part of it."""
    model = next(synthetic(options, [shape]))
    limit, given = spread_over(layers_of(options, model), stages), {"threads": 1, "context": CONTEXT, "parallel": 1}
    with servers.murmur(options.murmur, model, **given) as whole, Mesh(options, model, stages, limit, **given) as mesh:
        driver = mesh.servers[0]
        driver.model = whole.model
        for server in (driver, whole):
            server.generate(servers.unique_prompt(64), 8)
        yield whole, driver


def ring(options, table):
    for stages in RING_STAGES:
        with whole_and_ring(options, RING_SHAPE, stages) as (whole, driver):
            pair = in_turns(options.rounds, lambda: decode_rate(driver), lambda: decode_rate(whole))
            table.pairs(f"{RING_SHAPE}: decode, ring of {stages} / whole", "tok/s", *pair)
            pair = in_turns(options.rounds, lambda: prefill_rate(driver), lambda: prefill_rate(whole))
            table.pairs(f"{RING_SHAPE}: prefill, ring of {stages} / whole", "tok/s", *pair)


def hop(options, table):
    with whole_and_ring(options, HOP_SHAPE, HOP_STAGES) as (whole, driver):
        ring, alone = in_turns(HOP_PAIRS, lambda: token_and_compute_ms(driver), lambda: token_and_compute_ms(whole))
    # The driver holds a part itself, so each part is followed by one hop.
    median_us = lambda values_ms: 1000 * statistics.median(values_ms) / HOP_STAGES
    without_us = median_us([token - compute for token, compute in ring])
    table.limit(f"{HOP_SHAPE}: a hop in a ring of {HOP_STAGES}, computing left out", "us", without_us, 300)
    more_us = median_us([there[0] - here[0] for there, here in zip(ring, alone, strict=True)])
    slower_us = median_us([there[1] - here[1] for there, here in zip(ring, alone, strict=True)])
    print(f"  a token takes {more_us:.0f} us for each hop longer than on one node, of which stages compute {slower_us:.0f} us longer")


def requests(options, table):
    """Requests per second, as a program without an interpreter measures them in turns."""
    model = next(synthetic(options, [SMALL_SHAPE]))
    with Mesh(options, model, 1, threads=1, context=CONTEXT, parallel=CONCURRENCY) as mesh:
        with tempfile.TemporaryDirectory(prefix="murmur-bench-") as scratch:
            addresses = [f"127.0.0.1:{node.port}" for node in (mesh.servers[0], mesh.client)]
            command = [options.engine_bench, "requests", options.murmur, model, scratch, CONCURRENCY, REQUESTS, options.rounds, *addresses]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    engine, local, remote = ([row[name] for row in rows] for name in ("engine", *addresses))
    what = f"{model.stem}: {CONCURRENCY} at a time, 1 token each"
    table.pairs(f"{what}, API / engine", "1/s", local, engine)
    table.pairs(f"{what}, remote API / engine", "1/s", remote, engine)


def arguments():
    parser = argparse.ArgumentParser(prog="./x bench mesh", description="Measures the mesh on this machine.")
    parser.add_argument("--murmur", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--engine-bench", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--kills", type=int, default=200, help="servers to kill (default: %(default)s)")
    parser.add_argument("--servers", type=int, default=2, help="servers of which one is killed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=max(1, os.cpu_count() - 1), help="threads of a lone server (default: %(default)s, all but one)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", default=["bench-0.5b"], metavar="SHAPE", help="models of the overhead (default: bench-0.5b)")
    return parser.parse_args()


def main():
    options, table = arguments(), Table()
    print(machine())
    for part, measure in (("failover", failover), ("overhead", overhead), ("ring", ring), ("hop", hop), ("requests", requests)):
        if part in options.only:
            measure(options, table)


if __name__ == "__main__":
    main()
