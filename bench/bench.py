#!/usr/bin/env python3
"""Murmur against llama.cpp, on this machine, in the same minutes.

Every figure is a ratio of pairs: one server does the work, then at once the other, in turns of alternating order, so
that what the machine does besides hits both. Printed are the medians and the median of the pairs' ratios with its
range. Both servers are driven by the same client over HTTP with the same token ids; every prompt is new, so that no
prefix cache helps, except where the prefix cache is what is measured. docs/benchmarks.md says more.

`./x bench` builds everything and runs this. Nothing is written to the repository.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import servers

SHORT_PROMPT, DECODE_TOKENS, STREAM_TOKENS = 16, 128, 64
PREFILL_TOKENS = (512, 4096)
CACHED_TOKENS = 512
STREAMS = (1, 4, 8)
CONTEXT = 4608
STATUS_RUNS = 25
TURNS_PER_START = 3
PARTS = ("decode", "prefill", "streams", "cache", "memory", "stages", "exact", "status", "llama-bench", "engine")


class Table:
    """Rows as they come: what, ours, theirs, ratio, bar."""

    def __init__(self):
        self.missed = []
        print(f"{'':50} {'murmur':>12} {'reference':>12} {'ratio':>7} {'range':>13}  bar")

    def pairs(self, what, unit, ours, theirs, bar=None, lower_is_better=False):
        """`ours` and `theirs` are paired measurements; a ratio above 1 is in our favour."""
        ratios = [b / a if lower_is_better else a / b for a, b in zip(ours, theirs, strict=True)]
        self._row(what, unit, statistics.median(ours), statistics.median(theirs), ratios, bar)

    def limit(self, what, unit, value, limit):
        verdict = self._verdict(what, value <= limit)
        print(f"{what:50} {value:>9.1f} {unit:<3}{'':33} <= {limit} {unit} {verdict}", flush=True)

    def _row(self, what, unit, ours, theirs, ratios, bar):
        ratio = statistics.median(ratios)
        spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
        verdict = "" if bar is None else f">= {bar:.2f} {self._verdict(what, ratio >= bar)}"
        print(f"{what + ', ' + unit:50} {ours:>12.1f} {theirs:>12.1f} {ratio:>7.3f} {spread:>13}  {verdict}", flush=True)

    def _verdict(self, what, reached):
        if not reached:
            self.missed.append(what)
        return "ok" if reached else "MISSED"


def in_turns(rounds, first, second):
    """Measures both in alternating order: two lists of results, paired."""
    ours, theirs = [], []
    for turn in range(rounds):
        order = [(first, ours), (second, theirs)]
        for measure, results in order if turn % 2 == 0 else reversed(order):
            results.append(measure())
    return ours, theirs


def status(server):
    """What it says of its model."""
    return server.ask("GET", "/api/status")["node"]["models"][0]


def decode_rate(server, tokens=DECODE_TOKENS, prompt=None, **more):
    """Tokens per second after the first, the cost of prompt and connection taken off by a request for one token. `prompt`: token ids,
    others each time if none are given; `more`: further fields of the requests."""
    _, one = server.generate(prompt or servers.unique_prompt(SHORT_PROMPT), 1, **more)
    _, many = server.generate(prompt or servers.unique_prompt(SHORT_PROMPT), tokens, **more)
    return (tokens - 1) / (many - one)


def token_and_compute_ms(server, *tokens, **more):
    """How long a token takes after the first, and for how long engines compute in it, as the server counts; of an answer as `decode_rate`
    asks for it."""

    def counted():
        model = status(server)
        return model["token_steps"], model["token_compute_us"]

    before = counted()
    token_ms = 1000 / decode_rate(server, *tokens, **more)
    steps, compute_us = (now - then for now, then in zip(counted(), before, strict=True))
    return token_ms, compute_us / steps / 1000


def first_token_s(server, length):
    return server.generate(servers.unique_prompt(length), 1)[1]


def prefill_rate(server):
    """Prompt tokens per second up to the first new token."""
    return 512 / first_token_s(server, 512)


def cached_first_token_ms(server):
    """A prompt that was computed just before, with a short new end."""
    prompt = servers.unique_prompt(CACHED_TOKENS)
    server.generate(prompt, 1)
    return server.generate(prompt + servers.unique_prompt(8), 1)[1] * 1000


def at_once(count, one):
    """What `one()` gives each of `count` callers that start together."""
    with ThreadPoolExecutor(count) as callers:
        return [call.result() for call in [callers.submit(one) for _ in range(count)]]


def together_rate(server, count):
    """Tokens per second over all of `count` streams that start together, prompts included."""
    begin = time.perf_counter()
    at_once(count, lambda: server.generate(servers.unique_prompt(SHORT_PROMPT), STREAM_TOKENS))
    return count * STREAM_TOKENS / (time.perf_counter() - begin)


def started_anew(options, ours, theirs, *measures):
    """Pairs for each of the measures, of servers that are started anew for each pair: a process keeps the memory that it got when
    it started, and that alone makes some per cent. Within a pair the two take short turns, as the machine's mood changes by the second."""
    pairs = [([], []) for _ in measures]
    for _ in range(options.rounds):
        with ours() as first, theirs() as second:
            for server in (first, second):
                server.generate(servers.unique_prompt(64), 8)
            for measure, pair in zip(measures, pairs, strict=True):
                turns = in_turns(TURNS_PER_START, lambda: measure(first), lambda: measure(second))
                for side, values in zip(pair, turns, strict=True):
                    side.append(statistics.median(values))
    return pairs


def decode_against_llama_server(options, model, table):
    shape = {"threads": options.threads, "context": CONTEXT, "parallel": max(STREAMS)}
    ours = lambda: servers.murmur(options.murmur, model, **shape)
    theirs = lambda: servers.llama_server(options.llama, model, **shape)
    [pair] = started_anew(options, ours, theirs, decode_rate)
    table.pairs(f"{model.stem}: decode, 1 stream", "tok/s", *pair, bar=0.98)


def against_llama_server(options, model, table):
    label = model.stem
    shape = {"threads": options.threads, "context": CONTEXT, "parallel": max(STREAMS)}
    with (
        servers.murmur(options.murmur, model, **shape) as ours,
        servers.llama_server(options.llama, model, **shape) as theirs,
    ):
        for server in (ours, theirs):
            server.generate(servers.unique_prompt(64), 8)

        def compare(what, unit, measure, bar=None, lower_is_better=False, rounds=options.rounds):
            pair = in_turns(rounds, lambda: measure(ours), lambda: measure(theirs))
            table.pairs(f"{label}: {what}", unit, *pair, bar=bar, lower_is_better=lower_is_better)

        if "prefill" in options.only:
            for length in PREFILL_TOKENS:
                rounds = options.rounds if length < 1000 else max(2, options.rounds // 2)
                pair = in_turns(rounds, lambda: first_token_s(ours, length), lambda: first_token_s(theirs, length))
                milliseconds = [[value * 1000 for value in side] for side in pair]
                rates = [[length / value for value in side] for side in pair]
                table.pairs(f"{label}: first token, {length} tokens", "ms", *milliseconds, lower_is_better=True)
                table.pairs(f"{label}: prefill, {length} tokens", "tok/s", *rates, bar=0.98)
        if "streams" in options.only:
            for count in STREAMS:
                bar = 1.0 if count == max(STREAMS) else None
                compare(f"all of {count} streams", "tok/s", lambda server, n=count: together_rate(server, n), bar=bar)
        if "cache" in options.only:
            compare(f"first token, {CACHED_TOKENS} cached", "ms", cached_first_token_ms, lower_is_better=True)
        if "memory" in options.only:
            compare("memory after this", "MiB", lambda server: server.memory_mib(), lower_is_better=True, rounds=1)
        if "status" in options.only and model == options.first_model:
            command = [options.murmur, "status", "--api", f"127.0.0.1:{ours.port}"]
            times = []
            for _ in range(STATUS_RUNS):
                begin = time.perf_counter()
                subprocess.run(command, capture_output=True, check=True)
                times.append((time.perf_counter() - begin) * 1000)
            table.limit("murmur status, start to end", "ms", statistics.median(times), 30)


def three_stages_against_one(options, model, table):
    shape = {"threads": 1, "context": CONTEXT, "parallel": 1}
    start = lambda stages: servers.murmur(options.murmur, model, **shape, stages=stages)
    pairs = started_anew(options, lambda: start(3), lambda: start(1), decode_rate, prefill_rate)
    for what, pair in zip(("decode", "prefill"), pairs, strict=True):
        table.pairs(f"{model.stem}: {what}, 3 stages / 1, 1 thread", "tok/s", *pair, bar=0.97)


def exact_against_default(options, model, table):
    shape = {"threads": options.threads, "context": CONTEXT, "parallel": 1}
    with (
        servers.murmur(options.murmur, model, **shape, exact=True) as exact,
        servers.murmur(options.murmur, model, **shape) as default,
    ):
        for server in (exact, default):
            server.generate(servers.unique_prompt(64), 8)
        pair = in_turns(options.rounds, lambda: decode_rate(exact), lambda: decode_rate(default))
        table.pairs(f"{model.stem}: decode, exact / default", "tok/s", *pair)
        pair = in_turns(options.rounds, lambda: prefill_rate(exact), lambda: prefill_rate(default))
        table.pairs(f"{model.stem}: prefill, exact / default", "tok/s", *pair)


def against_llama_bench(options, model, table):
    """Both without HTTP, client and text: the engine against llama.cpp's own loop."""
    words = [DECODE_TOKENS, "-r", 1, "-o", "json"]
    bench = [*servers.AS_NICE, options.llama / "llama-bench", "-m", model, "-t", options.threads, "-p", PREFILL_TOKENS[0], "-n", *words]

    def alone():
        done = subprocess.run([str(word) for word in bench], capture_output=True, text=True, check=True)
        rows = json.loads(done.stdout)
        return [next(row["avg_ts"] for row in rows if bool(row["n_gen"]) == generates) for generates in (True, False)]

    with tempfile.TemporaryDirectory(prefix="murmur-bench-") as scratch:
        command = [options.engine_bench, "rates", options.murmur, model, scratch, options.threads, PREFILL_TOKENS[0], DECODE_TOKENS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([str(word) for word in command], **pipes) as engine:

            def ours():
                print(file=engine.stdin, flush=True)
                line = engine.stdout.readline()
                if not line:
                    raise SystemExit("the engine's benchmark ended")
                rates = json.loads(line)
                return [rates["decode"], rates["prefill"]]

            ours()
            pair = in_turns(options.rounds, ours, alone)
            engine.stdin.close()
    for index, what in enumerate(("decode", f"prefill, {PREFILL_TOKENS[0]} tokens")):
        columns = [[value[index] for value in side] for side in pair]
        table.pairs(f"{model.stem}: {what}, engine / llama-bench", "tok/s", *columns, bar=0.98)


def engine_alone(options, table):
    """What murmur's own engine benchmark reports: the cost of the process boundary, and the default mode's flips."""
    with tempfile.TemporaryDirectory(prefix="murmur-bench-") as scratch:
        command = [options.engine_bench, "boundary", options.murmur, options.demo_model, scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        mode = f"{'exact' if row['exact'] else 'default'} mode"
        if row["temperature"] == 0:
            table.limit(f"child process per step, {mode}", "us", row["outside_compute_us"], 50)
        print(
            f"{mode}, temperature {row['temperature']}, 8 streams together against alone: {row['streams_diverged']} flips in "
            f"{row['tokens_compared']} tokens, {row['flips_per_million_tokens']} per million",
            flush=True,
        )


def bench_models(options):
    """Models with random weights of two usual shapes, made once by the binary. `SHAPE:LAYERS`: with another number of layers."""
    options.models.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        path = options.models / f"{shape.replace(':', '-')}.gguf"
        if not path.exists():
            print(f"making {path} ...", flush=True)
            partial = path.with_suffix(".partial")
            shape, _, layers = shape.partition(":")
            more = ("--layers", layers) if layers else ()
            subprocess.run([options.murmur, "models", "synth", shape, partial, *more], check=True)
            partial.rename(path)
        yield path


def machine():
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors, load {load}"


def arguments():
    parser = argparse.ArgumentParser(prog="./x bench", description="Measures murmur against llama.cpp on this machine.")
    parser.add_argument("--murmur", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--llama", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--engine-bench", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--demo-model", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both sides (default: %(default)s, all of them)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--shapes", nargs="+", default=["bench-1b", "bench-0.5b"], metavar="SHAPE", help="models (default: bench-1b bench-0.5b)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    return parser.parse_args()


def main():
    options = arguments()
    print(f"{machine()}; {options.threads} threads, {options.rounds} pairs per figure")
    models = list(bench_models(options))
    options.first_model = models[0]
    table = Table()
    if "engine" in options.only:
        engine_alone(options, table)
    for model in models:
        if "decode" in options.only:
            decode_against_llama_server(options, model, table)
        if {"prefill", "streams", "cache", "memory", "status"} & set(options.only):
            against_llama_server(options, model, table)
        if "llama-bench" in options.only:
            against_llama_bench(options, model, table)
        if "stages" in options.only:
            three_stages_against_one(options, model, table)
        if "exact" in options.only:
            exact_against_default(options, model, table)
    print(f"\n{len(table.missed)} bars missed" + "".join(f"\n  {what}" for what in table.missed))
    return 1 if options.strict and table.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
