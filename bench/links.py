#!/usr/bin/env python3
"""A model over several machines with real distances between them, and llama.cpp's RPC under the same distances.

The machines are hosts of the lab: network namespaces on this machine with emulated links. So it needs root. Every engine
has one thread.

*tokens*: a model over two machines, at several round trips: the time of a token, through Murmur, through `llama-server`
with half of the layers on an `ggml-rpc-server`, and on one machine alone. What must be paid is one way round the ring: as long as a row
there and a token back take between two UDP sockets on the same links, after pauses as long as stages compute.

*streams*: eight streams together against one, at 20 ms. One stream leaves the stages idle while its rows travel; eight
could use them up to eight times as well, but no better than the slowest stage allows.

*prefill*: a prompt of 4,096 tokens over four machines at 20 ms against one machine alone, and against its chunks going around one
after the other.

*codecs*: hidden states as f16 and q8 against f32 over two machines, on links of 20 and 100 Mbit/s.

*deaths*: one of three machines that hold a model is killed with -9, in an answer and in a prompt, where others stand by
(`--standby`) and where others have to load its layers: the longest silence in an answer, and how much later than usual the first
token of a prompt comes, of a model of usual shape and of one of which there is little to compute. What the layers' new host computes once more is a part of it. The driver holds no layers.

*guesses*: a small model over two and four machines, so that the way around the ring is what a token takes, with guesses of a model of
which a known part is right. All layers of the large model but the first change nothing, so that a model of this layer alone always guesses
right, for a part of the time; the rest of its guesses are spoilt (`--draft-spoilt`). Answers are greedy, with a penalty for repetitions, as
random weights would repeat themselves and all could be looked up. With

    L    the time of a token without guesses: once around the ring, computing included, measured in the same minutes,
    tau  the time of a token that the pipe cannot beat if it computes one after the other: what the slowest stage computes for a row (its steps,
         as seen in `/api/status` ten times a second while guesses are made) or what the model that guesses needs for a token (measured
         alone on one machine), whichever is longer,
    a    the part of the guesses compared that was right, as counted,

no ring that guesses one token after the other is faster than X(a) = 1 / ((1 - a) L + a tau): each wrong guess costs once around. So does
the end of an answer, where no guess is wrong: answers are so long that some fifty are. The rate is printed as a part of X, and the rate
times L: tokens for each time around the ring. The time of a token without guesses is printed as well, less what stages compute of it, beside the way around the links: no more than 1.15 times
that. All hosts are on one machine: on its two processors, stages and the model that guesses do not run at once as those of real rings do.
So the model has one layer for each machine, and it is printed what they need together for a token, and how busy the processors are:
where these are not idle for a good part, the figure says more of the machine than of the ring.

*deep*: the same over two machines, 100 ms around, with as many layers as the slowest stage computes for 0.062 of the time of a token
without guesses, and 0.855 of the guesses right. X comes to 5.05 tokens for each time around then, and the bar is 5. A stage computes guesses that wait
behind one another together, and rows that share a step cost less each: that may make up for what a ring has besides.

*pair*: the demo model over two machines and the small model that was trained with it to guess, at several ways around the ring: stories at
temperature 0, with and without guesses, and the same through `llama-server` with half of the layers on an `ggml-rpc-server`, with and
without the same model as its draft (eight guesses at once). All four are told the same beginnings.

*alone*: the same stories on one machine, without a ring, ours and `llama-server`'s.

*borrowed*: as *guesses*, around a ring of two and 60 ms, with guesses of a node that is 2 ms away and back, against none and against a model
on the driver's own machine. The node nearby has the same weights under another name.

*window*: eight rows that go around a ring of two together against one, 60 ms around: the time of a token, and how much later the first one
comes where eight rows of a prompt are new instead of one; and what stages compute of it. Of a model of this width that has hardly anything to compute, and of one that has: what rows cost there is the back end's.

*candidates*: for each token of stories of the demo model at temperature 0, whether the small model's first choice is right, and if not, its second
one and so on: what several candidates for a position could bring.

*shared*: eight streams together on a ring of two, 60 ms around, with guesses of which 0.85 are right and without: the rate of all, and how
much slower than their mean the slowest is.

*relayed*: a small model served from one home to another. Behind cones the two come to a direct connection, with the addresses that a
seed tells them; behind symmetric NATs all goes through the seed's relay. The relay is as far from each home as the homes are from each other, so
that its way is twice as long.

*replay*: the arrivals and lengths of an hour of a production service (`--trace FILE`, the CSV of the Azure LLM inference trace of 2023; left out
without one) through a ring of three, 20 ms around. The hour goes by in `--replay-minutes`, and of its requests every n-th is made, so that the ring is busy for
half of the time. Printed are the times of first and of later tokens and how the nodes' memory grows after the first quarter. Requests that find the ring
busy wait, and that is in the first token's time.

*copied*: one stream that says what it has said before, on a ring of two, 60 and 200 ms around, so that guesses are looked up: one token over and
over, and another one at places drawn by chance, so many that about 0.97 of the guesses are right. A model of two layers.

`./x bench links` builds everything and runs this.
"""

import argparse
import collections
import contextlib
import csv
import datetime
import itertools
import math
import os
import pathlib
import random
import statistics
import tempfile
import threading
import time

import lab
import servers
from bench import Table, at_once, decode_rate, first_token_s, in_turns, machine, status, together_rate, token_and_compute_ms
from mesh import Story, distribution, layers_of, spread_over, synthetic, ticket_of

PARTS = ("tokens", "streams", "prefill", "codecs", "deaths", "guesses", "deep", "borrowed", "pair", "alone", "window", "candidates", "shared", "copied", "relayed", "replay")
SHAPE = "bench-1b"
CONTEXT = 4608
ROUND_TRIPS_MS = (0, 5, 20, 50)
FAR_MS = 20
# What goes around for a token: a row with its header, and what was sampled. How often that is timed without a ring.
ROW_BYTES, TOKEN_BYTES, DATAGRAM_BYTES, BARE_TRIPS, BARE_LIMIT_S = 2048 * 4 + 36, 64, 1400, 60, 10
STREAMS = 8
PROMPT_TOKENS, PREFILL_STAGES = 4096, 4
CHUNK_TOKENS = 256
CODECS, RATES_MBIT_S = ("f16", "q8"), (20, 100)
DEATHS_STAGES, DEATHS_MS = 3, (0, 20)
# What is interrupted, by the model: prompt and answer, tokens. Of the second there is little to compute.
DEATHS = {
    "bench-0.5b": (("an answer", 16, 48), ("a prompt of 512", 512, 1)),
    "bench-wide:3": (("a prompt of 2,048", 2048, 1),),
}
# Where in an answer or a prompt somebody is killed, as parts of the time that it takes undisturbed.
DEATHS_BETWEEN = (0.1, 0.8)
# Small, so that computing hides no link.
GUESSED_SHAPE, GUESSED_STAGES, RINGS_MS = "llama", (2, 4), (0, 20, 60, 100, 200)
# What one layer of it says, any number of them say.
DEEP_SHAPE, DEEP_MS, DEEP_RIGHT, DEEP_SHARE, DEEP_BAR = "bench-deep", 100, 0.855, 0.062, 5
# Layers of each machine in a ring that tells how long one takes.
DEEP_TRIED = 40
STEPS_EVERY_S = 0.1
# How much longer a token without guesses may be on its way than the links are.
WAY_MAX = 1.15
RIGHT_PARTS, RIGHT_PARTS_BARRED = (0.5, 0.7, 0.85, 0.95), (0.7, 0.85)
# About what one measurement without guesses takes, how many tokens it has, and how many guesses of an answer with some are wrong.
GUESSES_S, GUESSED_TOKENS, WRONG_GUESSES = 3, (16, 192), 50
UNREPEATED = {"frequency_penalty": 1, "presence_penalty": 1}
DEMO, DEMO_DRAFT = (pathlib.Path(__file__).parent.parent / "models" / "demo" / f"murmur-demo-{name}.gguf" for name in ("q8_0", "draft-q8_0"))
DEMO_CONTEXT, STORY_TOKENS = 512, 120
CANDIDATES, CANDIDATES_STORIES, CANDIDATES_TOKENS = 4, 20, 100
NAMES, FRIENDS = ("Lily", "Tom", "Mia", "Ben", "Sue", "Max"), ("a kitten", "a dog", "a bird", "a frog", "a bear", "a duck")
DEEDS = ("went to the park", "played with a ball", "found a box", "saw a big tree", "were very sad", "wanted to fly", "ran to the river")
RELAYED_MS, FIRST_TOKENS, SETTLED_S = (0, 20), 25, 12
REPLAY_STAGES, REPLAY_STREAMS, REPLAY_BUSY, REPLAY_SAMPLE = 3, 8, 0.5, (1024, 192)
WINDOW_SHAPES, WINDOW_MS, WINDOW_ROWS, WINDOW_PREFIX, WINDOW_PAIRS = ("bench-wide", "bench-1b"), 60, 8, 64, 15
SHARED_MS, SHARED_RIGHT, SHARED_TOKENS = 60, 0.85, 160
BORROWED_MS, NEAR_MS, BORROWED_RIGHT = 60, 2, (0.7, 0.85)
# The name in the file of the synthetic model, and another one that is as long.
NAMED, RENAMED = b"murmur-synth-llama", b"murmur-twin--llama"
COPIED_MS, COPIED_RIGHT, COPIED_TOKENS, COPIED_TRIES, COPIED_ABOUT = (60, 200), (1, 0.97), 1024, 6, 0.003
# What is said again, from the first token on.
COPIED = (*[servers.FIRST_TOKEN] * 8, servers.LAST_TOKEN, *[servers.FIRST_TOKEN] * 8)


class Ring:
    """A model over the hosts of a lab, or `stages` of them; a context manager whose value is the node on the first of them.
    `driver`: arguments of that one alone."""

    def __init__(self, options, model, hosts, layers, parallel=1, arguments=(), driver=(), stages=None, context=CONTEXT):
        limit = (*spread_over(layers, stages or len(hosts)), *arguments)
        shape = {"threads": 1, "context": context, "parallel": parallel}

        def node(host, joining):
            mesh = (*joining, *servers.offline(host.address), *limit)
            return servers.murmur(options.murmur, model, **shape, name=host.name, mesh=mesh, host=host)

        self.hosts, self.node, self.driver = hosts, node, driver

    def __enter__(self):
        # A model is ready when all its layers are there, so the others are started before the first is waited for.
        first = self.node(self.hosts[0], ("--mesh", "bench", *self.driver))
        self.nodes = [first]
        try:
            first.launch()
            first.wait(lambda: first.answers("/api/mesh"))
            ticket = ticket_of(first)
            for host in self.hosts[1:]:
                self.nodes.append(self.node(host, ("--join", ticket)))
                self.nodes[-1].launch()
            first.wait(lambda: first.answers("/health"))
        except BaseException:
            self.__exit__()
            raise
        first.model = first.ask("GET", "/v1/models")["data"][0]["id"]
        return first

    def __exit__(self, *_):
        for node in reversed(self.nodes):
            node.__exit__()


def token_ms(server):
    return 1000 / decode_rate(server)


def bare_trip_ms(here, there, pause_s):
    """What a row takes there, and a token back, with nothing around them: the datagrams that QUIC would need, and `pause_s` between any two trips,
    in which everything goes to sleep as it does while stages compute."""
    row = [bytes(min(DATAGRAM_BYTES, ROW_BYTES - at)) for at in range(0, ROW_BYTES, DATAGRAM_BYTES)]

    def answer():
        for _ in range(BARE_TRIPS):
            for _ in row:
                _, asked_by = far.recvfrom(DATAGRAM_BYTES)
            far.sendto(bytes(TOKEN_BYTES), asked_by)

    times = []
    with here.datagrams() as near, there.datagrams() as far:
        near.connect(far.getsockname())
        for socket in (near, far):
            socket.settimeout(BARE_LIMIT_S)
        answering = threading.Thread(target=answer)
        answering.start()
        for _ in range(BARE_TRIPS):
            time.sleep(pause_s)
            begun = time.perf_counter()
            for datagram in row:
                near.send(datagram)
            near.recv(TOKEN_BYTES)
            times.append(time.perf_counter() - begun)
        answering.join()
    return 1000 * statistics.median(times)


def tokens(options, model, table):
    shape = {"threads": 1, "context": CONTEXT, "parallel": 1}
    layers = layers_of(options, model)
    with lab.Lab(options.lab, 2) as (network, (here, there)):
        # llama.cpp counts the head as a layer, and puts the last ones elsewhere.
        far_layers = layers // 2 + 1
        with (
            servers.rpc_server(options.llama, host=there) as far,
            servers.llama_server(options.llama, model, **shape, host=here, rpc=(far.address, far_layers)) as rpc,
            servers.murmur(options.murmur, model, **shape, host=here) as whole,
            Ring(options, model, [here, there], layers) as ring,
        ):
            for server in (rpc, whole, ring):
                server.generate(servers.unique_prompt(64), 8)
            for round_trip_ms in ROUND_TRIPS_MS:
                network.links(round_trip_ms)
                pair = in_turns(options.rounds, lambda: token_ms(ring), lambda: token_ms(rpc))
                table.pairs(f"token at {round_trip_ms} ms, ring of 2 / llama.cpp RPC", "ms", *pair, lower_is_better=True)
                spread, alone = in_turns(options.rounds, lambda: token_and_compute_ms(ring), lambda: token_and_compute_ms(whole))
                compute_ms = statistics.median(compute for _, compute in spread)
                bare_ms = bare_trip_ms(here, there, compute_ms / 1000)
                rest_ms = statistics.median(token - compute for token, compute in spread) - bare_ms
                table.limit(f"token at {round_trip_ms} ms less computing and a bare trip of {bare_ms:.1f} ms", "ms", rest_ms, 1)
                token, compute = (statistics.median(both[at] - one[at] for both, one in zip(spread, alone, strict=True)) for at in (0, 1))
                print(f"  a token takes {token:.1f} ms longer than on one machine, of which stages compute {compute:.1f} ms longer", flush=True)


def streams(options, model, table):
    with lab.Lab(options.lab, 2) as (network, hosts):
        with Ring(options, model, list(hosts), layers_of(options, model), parallel=STREAMS) as ring:
            ring.generate(servers.unique_prompt(64), 8)
            network.links(FAR_MS)
            pair = in_turns(options.rounds, lambda: together_rate(ring, STREAMS), lambda: together_rate(ring, 1))
            stages = status(ring)["stages"]
            slowest_ms = max(stage["last_step"]["compute_us"] for stage in stages) / 1000
            alone_ms = token_ms(ring)
            most = min(STREAMS, alone_ms / slowest_ms)
            print(f"a token alone takes {alone_ms:.1f} ms, the slowest stage computes {slowest_ms:.1f} ms of it: {most:.2f} times are possible")
            table.pairs(f"{STREAMS} streams / 1 at {FAR_MS} ms", "tok/s", *pair, bar=0.8 * most)


def prefill(options, model, table):
    shape = {"threads": 1, "context": CONTEXT, "parallel": 1}
    with lab.Lab(options.lab, PREFILL_STAGES) as (network, hosts):
        hosts = list(hosts)
        with (
            servers.murmur(options.murmur, model, **shape, host=hosts[0]) as whole,
            Ring(options, model, hosts, layers_of(options, model)) as ring,
        ):
            for server in (whole, ring):
                server.generate(servers.unique_prompt(64), 8)
            network.links(FAR_MS)
            rate = lambda server: PROMPT_TOKENS / first_token_s(server, PROMPT_TOKENS)
            pair = in_turns(max(2, options.rounds // 2), lambda: rate(ring), lambda: rate(whole))
            what = f"prefill of {PROMPT_TOKENS} tokens at {FAR_MS} ms, ring of {PREFILL_STAGES}"
            table.pairs(f"{what} / whole", "tok/s", *pair)
            # The later chunks of a prompt take longer, so this is less than they would take one after the other.
            one_by_one = lambda: CHUNK_TOKENS / first_token_s(ring, CHUNK_TOKENS)
            table.pairs(f"{what} / chunk by chunk", "tok/s", *in_turns(len(pair[0]), lambda: rate(ring), one_by_one))


def codecs(options, model, table):
    layers = layers_of(options, model)
    with lab.Lab(options.lab, 4) as (network, hosts):
        for rate_mbit_s in RATES_MBIT_S:
            network.links(FAR_MS, rate_mbit_s)
            for codec in CODECS:
                with (
                    Ring(options, model, list(hosts[:2]), layers) as exact,
                    Ring(options, model, list(hosts[2:]), layers, arguments=("--codec", codec)) as smaller,
                ):
                    for server in (exact, smaller):
                        server.generate(servers.unique_prompt(64), 8)
                    chosen = status(smaller)["stages"][0]["codec"]
                    what = f"at {rate_mbit_s} Mbit/s and {FAR_MS} ms, {codec} allowed and {chosen} chosen / f32"
                    pair = in_turns(options.rounds, lambda: token_ms(smaller), lambda: token_ms(exact))
                    table.pairs(f"token {what}", "ms", *pair, lower_is_better=True)
                    first = lambda server: 1000 * first_token_s(server, 2 * CHUNK_TOKENS)
                    pair = in_turns(options.rounds, lambda: first(smaller), lambda: first(exact))
                    table.pairs(f"first token of {2 * CHUNK_TOKENS} {what}", "ms", *pair, lower_is_better=True)


def deaths(options, _, table):
    for (shape, moments), standby in itertools.product(DEATHS.items(), (("--standby",), ())):
        model = next(synthetic(options, [shape]))
        with lab.Lab(options.lab, 1 + 2 * DEATHS_STAGES) as (network, hosts):
            network.links(0)
            driver = ("--max-memory", "1MiB", *standby)
            ring = Ring(options, model, list(hosts), layers_of(options, model), driver=driver, stages=DEATHS_STAGES)
            with ring as first:
                by_id = {node.ask("GET", "/api/mesh")["node"]: node for node in ring.nodes[1:]}
                for round_trip_ms, (moment, prompt, answer) in itertools.product(DEATHS_MS, moments):
                    network.links(round_trip_ms)
                    pauses_s, lost = pauses(options, first, by_id, prompt, answer, bool(standby))
                    what = f"{shape}, killed in {moment} at {round_trip_ms} ms, {'one stands by' if standby else 'nobody stands by'}"
                    print(f"{what}: {len(pauses_s)} kills   {distribution(pauses_s)}", flush=True)
                    bar_ms = 2 * round_trip_ms + 200 if standby else 1000
                    table.limit(f"{what}, median", "ms", 1000 * statistics.median(pauses_s), bar_ms)
                    table.limit(f"{what}: streams lost", "", lost, 0)


def pauses(options, first, by_id, prompt, answer, standby):
    """What kills of hosts cost an answer of so many tokens to a prompt of so many, in seconds, and how many were lost."""

    def stages():
        return status(first)["stages"]

    def complete():
        held = stages()
        return len(held) == DEATHS_STAGES and all(stage["node"] and (stage["standby"] or not standby) for stage in held)

    def story():
        return Story(first, servers.unique_prompt(prompt), answer)

    first.wait(complete)
    undisturbed = [told(story()) for _ in range(2)]
    paused_s, lost = [], 0
    while len(paused_s) + lost < options.kills:
        first.wait(complete)
        # How long it takes undisturbed differs from one ring to the next, and most by what else the processors have to do.
        undisturbed.append(told(story()))
        first_s, whole_s = (statistics.median(times) for times in zip(*undisturbed, strict=True))
        begin_s = first_s if answer > 1 else 0
        victim = by_id[random.choice(stages())["node"]]
        disturbed = story()
        time.sleep(begin_s + random.uniform(*DEATHS_BETWEEN) * (whole_s - begin_s))
        killed = time.perf_counter()
        victim.kill()
        _, end_s = told(disturbed)
        if disturbed.end != "length":
            print(f"  lost: {disturbed.end}")
            lost += 1
        elif (pause_s := disturbed.pause_s(killed) if answer > 1 else end_s) is not None:
            paused_s.append(pause_s)
        victim.launch()
    if answer == 1:
        paused_s = [end_s - statistics.median(ends_s for _, ends_s in undisturbed) for end_s in paused_s]
        print("  undisturbed: " + distribution([whole_s for _, whole_s in undisturbed]))
    return paused_s, lost


def told(story):
    """Seconds until the first token of a story, and until its end."""
    story.join()
    return (story.times or [time.perf_counter()])[0] - story.begun, time.perf_counter() - story.begun


def layer_each(options, machines):
    """A model of so many layers: as little to compute as can be divided among so many machines, which share the processors of this one."""
    model = next(synthetic(options, [f"{GUESSED_SHAPE}:{machines}"]))
    return model, layers_of(options, model)


def deep_model(options, layers):
    """One of so many layers, and the one that guesses what it says."""
    return tuple(synthetic(options, [f"{DEEP_SHAPE}:{count}" for count in (layers, 1)]))


def alone_ms(options, model, host):
    """What a token takes on one machine."""
    with servers.murmur(options.murmur, model, threads=1, context=CONTEXT, parallel=1, host=host) as whole:
        whole.generate(servers.unique_prompt(64), 8)
        return statistics.median(token_ms(whole) for _ in range(options.rounds))


def guesses(options, _, table):
    for stages in GUESSED_STAGES:
        model, draft = deep_model(options, stages)
        with lab.Lab(options.lab, 2 * stages) as (network, hosts):
            hosts = list(hosts)
            draft_ms = alone_ms(options, draft, hosts[0])
            # Where there is no distance, the order of the stages does not matter to anybody: rings are formed over one.
            network.links(FAR_MS)
            with ring_from_an_end(options, model, hosts[:stages], stages) as plain:
                for right in RIGHT_PARTS:
                    spoilt = ("--draft", draft, "--draft-spoilt", f"{1 - right:.2f}")
                    network.links(FAR_MS)
                    with ring_from_an_end(options, model, hosts[stages:], stages, driver=spoilt) as guessing:
                        for ring_ms in options.rings_ms:
                            # Each of as many hops takes half a round trip.
                            network.links(2 * ring_ms / stages)
                            what = f"ring of {stages} at {ring_ms} ms"
                            guesses_at(options, table, what, (plain, guessing), right, ring_ms, draft_ms)


def deep(options, _, table):
    with lab.Lab(options.lab, 4) as (network, hosts):
        hosts = list(hosts)
        _, draft = deep_model(options, 2)
        draft_ms = alone_ms(options, draft, hosts[0])
        network.links(DEEP_MS)
        spoilt = ("--draft", draft, "--draft-spoilt", f"{1 - DEEP_RIGHT:.3f}")
        # How long a layer takes where all machines of the ring compute at once on processors that they share, a first ring tells.
        for each, is_told in ((DEEP_TRIED, False), (None, True)):
            each = each or round(DEEP_TRIED * DEEP_SHARE * ring_ms / tau_ms)
            model, _ = deep_model(options, 2 * each)
            with (
                ring_from_an_end(options, model, hosts[:2], 2 * each) as plain,
                ring_from_an_end(options, model, hosts[2:], 2 * each, driver=spoilt) as guessing,
            ):
                what = f"ring of 2 with {each} layers each at {DEEP_MS} ms"
                rates, ring_ms, tau_ms = guesses_at(options, table, what, (plain, guessing), DEEP_RIGHT, DEEP_MS, draft_ms)
            if is_told:
                around = [rate * ring_ms / 1000 for rate in rates]
                table.pairs(f"{what}, a = {DEEP_RIGHT}, tokens for each time around / {DEEP_BAR}", "", around, [DEEP_BAR] * len(around), bar=1)


@contextlib.contextmanager
def ring_from_an_end(*ring, **options):
    """A ring whose driver holds the first part or the last. Whoever holds one in the middle goes a way more, and one ring's length
    would say nothing of another's. All nodes drive a ring, so its order is good for them together, and chance decides who is in the middle."""
    while True:
        with Ring(*ring, **options) as driver:
            holders, own = [stage["node"] for stage in status(driver)["stages"]], driver.ask("GET", "/api/mesh")["node"]
            if own in (holders[0], holders[-1]):
                yield driver
                return
            print(f"  the driver is in the middle of a ring ({holders.index(own) + 1} of {len(holders)}): another one", flush=True)


def guesses_counted(server):
    """How many of its guesses were right so far, and of how many that is known."""
    counts = status(server)
    return [sum(counts[f"{which}_by_depth"]) for which in ("right", "guessed")]


def guesses_since(before, server):
    """The same since that was counted."""
    return [now - then for now, then in zip(guesses_counted(server), before, strict=True)]


def processor_s():
    """Seconds for which processors of this machine have worked so far, and all there were."""
    with open("/proc/stat") as stat:
        user, nice, system, idle, waiting, *more = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in stat.readline().split()[1:9])
    busy = user + nice + system + sum(more)
    return busy, busy + idle + waiting


def part_right(were_right, compared):
    return were_right / max(1, compared)


def guesses_at(options, table, what, rings, right, way_ms, draft_ms):
    """One cell: a ring that takes `way_ms` to get around."""
    plain, guessing = rings
    least, most = GUESSED_TOKENS
    few = min(most, max(least, round(1000 * GUESSES_S / (way_ms + 1))))
    many = round(WRONG_GUESSES / (1 - right))
    # How far the ring is now, it finds out with the first tokens.
    for server in rings:
        server.generate(servers.unique_prompt(64), least)
    counts, seen, plain_ms, worked = [], Steps(guessing), [], []

    def guessed():
        before, begun = guesses_counted(guessing), processor_s()
        with seen:
            rated = decode_rate(guessing, many, **UNREPEATED)
        worked.append([now - then for now, then in zip(processor_s(), begun, strict=True)])
        counts.append(guesses_since(before, guessing))
        return rated

    def unguessed():
        timed = token_and_compute_ms(plain, few, **UNREPEATED)
        plain_ms.append(max(stage["last_step"]["compute_us"] for stage in status(plain)["stages"]) / 1000)
        return timed

    rates, tokens = in_turns(max(2, options.rounds // 2), guessed, unguessed)
    if right == RIGHT_PARTS[0] and way_ms > 0:
        ways_ms = [token_ms - compute_ms for token_ms, compute_ms in tokens]
        table.pairs(f"{what}, plain token less computing / the way", "ms", ways_ms, [way_ms] * len(ways_ms), lower_is_better=True, bar=1 / WAY_MAX)
    were_right, compared = (sum(count) for count in zip(*counts, strict=True))
    ring_ms, stages_ms = statistics.median(token_ms for token_ms, _ in tokens), seen.row_ms()
    tau_ms, all_ms = max(*stages_ms, draft_ms), draft_ms + sum(stages_ms)
    busy = statistics.median(busy_s / all_s for busy_s, all_s in worked)
    parts = [part_right(*count) for count in counts]
    limits = [1000 / ((1 - part) * ring_ms + part * tau_ms) for part in parts]
    bar = 0.9 if right in RIGHT_PARTS_BARRED else None
    table.pairs(f"{what}, a = {right}, guesses / X", "tok/s", rates, limits, bar=bar)
    print(
        f"  of {compared} guesses {part_right(were_right, compared):.3f} were right; L {ring_ms:.1f} ms, tau {tau_ms:.2f} ms (guesser {draft_ms:.2f}, slowest stage {max(stages_ms):.2f}, "
        f"{statistics.median(plain_ms):.2f} without guesses), "
        f"{all_ms / os.cpu_count():.2f} ms on {os.cpu_count()} processors, which were {busy:.0%} busy; "
        f"{seen.rows():.1f} rows in a step; {statistics.median(rates) * ring_ms / 1000:.2f} tokens for each time around",
        flush=True,
    )
    return rates, ring_ms, tau_ms


class Steps:
    """What stages compute while something runs; a context manager that may be used several times."""

    def __init__(self, server):
        self.server, self.steps = server, []

    def __enter__(self):
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        # What was over sooner than anybody looked has its last steps.
        self._note()

    def _look(self):
        while not self.over.wait(STEPS_EVERY_S):
            self._note()

    def _note(self):
        self.steps.append([stage["last_step"] for stage in status(self.server)["stages"]])

    def row_ms(self):
        """The time of a row in each stage."""
        return [statistics.median(step["compute_us"] / step["batch_rows"] / 1000 for step in stage) for stage in zip(*self.steps, strict=True)]

    def rows(self):
        """Rows of a step, on average."""
        return statistics.mean(step["batch_rows"] for steps in self.steps for step in steps)


def borrowed(options, model, table):
    layers = layers_of(options, model)
    with tempfile.TemporaryDirectory(prefix="murmur-bench-") as folder, lab.Lab(options.lab, 7) as (network, hosts), contextlib.ExitStack() as running:
        hosts = list(hosts)
        network.links(NEAR_MS)
        network.away(hosts[1:6:2], BORROWED_MS - NEAR_MS / 2)
        # Who serves the ring's model itself would be asked for whole answers.
        twin = pathlib.Path(folder) / "twin.gguf"
        twin.write_bytes(model.read_bytes().replace(NAMED, RENAMED, 1))
        plain = running.enter_context(Ring(options, model, hosts[:2], layers))
        for right in BORROWED_RIGHT:
            with contextlib.ExitStack() as guessing:
                here, near = (
                    guessing.enter_context(Ring(options, model, at, layers, driver=("--draft", draft, "--draft-spoilt", f"{1 - right:.2f}")))
                    for at, draft in ((hosts[2:4], model), (hosts[4:6], "peer:twin"))
                )
                joining = ("--join", ticket_of(near), *servers.offline(hosts[6].address))
                guessing.enter_context(servers.murmur(options.murmur, twin, threads=1, context=CONTEXT, parallel=1, mesh=joining, host=hosts[6]))
                borrowed_at(options, table, plain, here, near, right)


def borrowed_at(options, table, plain, here, near, right):
    """One part of right guesses, of a model on the driver's machine (`here`) and of one at a node nearby."""
    few = round(1000 * GUESSES_S / BORROWED_MS)
    many = round(few / (1 - right))

    def rate(server, tokens):
        # It is looked for while requests run, and left alone when none has for a while.
        while server is near and not (status(near)["draft"] or {}).get("node"):
            server.generate(servers.unique_prompt(64), GUESSED_TOKENS[0])
        return decode_rate(server, tokens, **UNREPEATED)

    for server in (plain, here, near):
        rate(server, GUESSED_TOKENS[0])
    before = guesses_counted(near)
    what = f"ring of 2 at {BORROWED_MS} ms, a = {right}, guesses from {NEAR_MS} ms away"
    table.pairs(f"{what} / none", "tok/s", *in_turns(options.rounds, lambda: rate(near, many), lambda: rate(plain, few)))
    were_right, compared = guesses_since(before, near)
    table.pairs(f"{what} / from here", "tok/s", *in_turns(options.rounds, lambda: rate(near, many), lambda: rate(here, many)))
    print(f"  of {compared} guesses {part_right(were_right, compared):.3f} were right", flush=True)


def pair(options, _, table):
    shape = {"threads": 1, "context": DEMO_CONTEXT, "parallel": 1}
    layers = layers_of(options, DEMO)
    with lab.Lab(options.lab, 4) as (network, hosts), contextlib.ExitStack() as running:
        hosts = list(hosts)
        plain, guessing = (
            running.enter_context(Ring(options, DEMO, at, layers, driver=("--draft", draft), context=DEMO_CONTEXT))
            for at, draft in ((hosts[:2], "off"), (hosts[2:], DEMO_DRAFT))
        )
        # Each serves one client at a time.
        far = [running.enter_context(servers.rpc_server(options.llama, host=hosts[1])) for _ in range(2)]
        rpc, rpc_guessing = (
            running.enter_context(
                servers.llama_server(options.llama, DEMO, **shape, host=hosts[0], rpc=(at.address, layers // 2 + 1), draft=draft)
            )
            for at, draft in zip(far, (None, DEMO_DRAFT), strict=True)
        )
        for ring_ms in options.rings_ms:
            network.links(ring_ms)
            compare_stories(options, table, f"at {ring_ms:g} ms", (plain, guessing), (rpc, rpc_guessing))


def alone(options, _, table):
    shape = {"threads": 1, "context": DEMO_CONTEXT, "parallel": 1}
    with contextlib.ExitStack() as running:
        plain, guessing = (
            running.enter_context(servers.murmur(options.murmur, DEMO, **shape, mesh=("--draft", draft))) for draft in ("off", DEMO_DRAFT)
        )
        theirs = [running.enter_context(servers.llama_server(options.llama, DEMO, **shape, draft=draft)) for draft in (None, DEMO_DRAFT)]
        compare_stories(options, table, "on one machine", (plain, guessing), theirs)


def compare_stories(options, table, where, ours, theirs):
    """Stories of ours and of llama.cpp, each without guesses and with them."""
    stories = {server: [] for server in (*ours, *theirs)}
    for server in stories:
        story_told(server, asked_for_a_story())
    for turn in range(options.rounds):
        # The same for all: how well a story can be guessed differs much.
        beginning = asked_for_a_story()
        for server in stories if turn % 2 == 0 else reversed(stories):
            stories[server].append(story_told(server, beginning))
    rates = {server: [rate for rate, _, _ in told] for server, told in stories.items()}
    for name, one, other in (
        ("guesses / none", ours[1], ours[0]),
        ("llama.cpp, guesses / none", theirs[1], theirs[0]),
        ("ours / llama.cpp, no guesses", ours[0], theirs[0]),
        ("ours / llama.cpp, guesses", ours[1], theirs[1]),
    ):
        table.pairs(f"stories {where}, {name}", "tok/s", rates[one], rates[other])
    for name, server in (("ours", ours[1]), ("llama.cpp's", theirs[1])):
        right, guessed = (sum(count) for count in list(zip(*stories[server], strict=True))[1:])
        print(f"  of {guessed} guesses of {name} {right / max(1, guessed):.3f} were right", flush=True)


def window(options, _, table):
    with lab.Lab(options.lab, 2) as (network, hosts):
        for shape, bar in zip(WINDOW_SHAPES, (1 / 1.1, None), strict=True):
            model = next(synthetic(options, [shape]))
            network.links(WINDOW_MS)
            with Ring(options, model, list(hosts), layers_of(options, model)) as ring:
                known, computed_ms = servers.unique_prompt(WINDOW_PREFIX), {WINDOW_ROWS: [], 1: []}

                def first_ms(rows):
                    took_s = ring.generate(known + servers.unique_prompt(rows), 1)[1]
                    steps = [stage["last_step"] for stage in status(ring)["stages"]]
                    if any(step["batch_rows"] != rows for step in steps):
                        raise SystemExit(f"the rows before were not kept: {steps}")
                    computed_ms[rows].append(sum(step["compute_us"] for step in steps) / 1000)
                    return 1000 * took_s

                ring.generate(known + servers.unique_prompt(1), 1)
                pair = in_turns(WINDOW_PAIRS, lambda: first_ms(WINDOW_ROWS), lambda: first_ms(1))
                # What a first token takes before its rows leave: the session is opened once around.
                opening_ms = statistics.median(pair[1]) - token_ms(ring)
                pair = ([first - opening_ms for first in rows] for rows in pair)
                table.pairs(f"{shape}, {WINDOW_ROWS} rows / 1 around a ring of {WINDOW_MS} ms", "ms", *pair, lower_is_better=True, bar=bar)
                table.pairs(f"{shape}, of which stages compute", "ms", computed_ms[WINDOW_ROWS], computed_ms[1], lower_is_better=True)


def asked_for_a_story():
    """A prompt that was hardly asked before."""
    return f"Once upon a time, {random.choice(NAMES)} and {random.choice(FRIENDS)} {random.choice(DEEDS)}"


def candidates(options, _, table):
    shape = {"threads": 1, "context": DEMO_CONTEXT, "parallel": 1}
    ranks = collections.Counter()
    with servers.murmur(options.murmur, DEMO, **shape) as teller, servers.murmur(options.murmur, DEMO_DRAFT, **shape) as guesser:

        def told_by(server, prompt, tokens, **more):
            body = {"model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
            return server.ask("POST", "/v1/completions", body)["choices"][0]["logprobs"]

        for _ in range(CANDIDATES_STORIES):
            text = asked_for_a_story()
            for token in told_by(teller, text, CANDIDATES_TOKENS, logprobs=0)["tokens"]:
                likely = told_by(guesser, text, 1, logprobs=CANDIDATES, ignore_eos=True)["top_logprobs"][0]
                order = sorted(likely, key=likely.get, reverse=True)
                ranks[order.index(token) if token in order else CANDIDATES] += 1
                text += token
    left = ranks.total()
    print(f"{left} tokens of {CANDIDATES_STORIES} stories")
    for rank in range(CANDIDATES):
        print(f"  where the {rank} before it were wrong, candidate {rank + 1} is right: {ranks[rank] / left:.3f} of {left}")
        left -= ranks[rank]


def story_told(server, beginning):
    """Tokens per second after the first of a story that has not been told before, and its guesses: right ones, and all."""
    body = {
        "model": server.model, "prompt": beginning,
        "max_tokens": STORY_TOKENS, "temperature": 0, "stream_options": {"include_usage": True},
    }
    begun, usage, timings = None, {}, {}
    for event in server.stream(body):
        if event.get("choices") and begun is None:
            begun = time.perf_counter()
        usage, timings = event.get("usage") or usage, event.get("timings") or timings
    rate = (usage["completion_tokens"] - 1) / (time.perf_counter() - begun)
    if "draft_n" in timings:
        return rate, timings["draft_n_accepted"], timings["draft_n"]
    ours = usage.get("completion_tokens_details") or {}
    right, wrong = (ours.get(f"{which}_prediction_tokens", 0) for which in ("accepted", "rejected"))
    return rate, right, right + wrong


def shared(options, model, table):
    layers = layers_of(options, model)
    with lab.Lab(options.lab, 4) as (network, hosts):
        hosts = list(hosts)
        spoilt = ("--draft", model, "--draft-spoilt", f"{1 - SHARED_RIGHT:.2f}")
        with (
            Ring(options, model, hosts[:2], layers, parallel=STREAMS) as plain,
            Ring(options, model, hosts[2:], layers, parallel=STREAMS, driver=spoilt) as guessing,
        ):
            network.links(SHARED_MS)
            for server in (plain, guessing):
                server.generate(servers.unique_prompt(64), 64, **UNREPEATED)
            for count in (1, STREAMS):
                sides = in_turns(options.rounds, lambda: stream_rates(guessing, count), lambda: stream_rates(plain, count))
                what = f"{count} streams at {SHARED_MS} ms, guesses / none"
                table.pairs(what, "tok/s", *([sum(rates) for rates in side] for side in sides))
                slowest, mean = ([of(rates) for rates in sides[0]] for of in (min, statistics.mean))
                table.pairs(f"{what}: slowest / mean", "tok/s", slowest, mean, bar=0.7)


def stream_rates(server, count):
    """Tokens per second of each of `count` streams that start together, prompts included."""
    seconds = at_once(count, lambda: server.generate(servers.unique_prompt(16), SHARED_TOKENS, **UNREPEATED)[1])
    return [SHARED_TOKENS / one for one in seconds]


def copied(options, _, table):
    model, layers = layer_each(options, 2)
    with lab.Lab(options.lab, 4) as (network, hosts):
        hosts = list(hosts)
        with (
            Ring(options, model, hosts[:2], layers) as plain,
            Ring(options, model, hosts[2:], layers, driver=("--draft", "lookup")) as guessing,
        ):
            for ring_ms, right in itertools.product(COPIED_MS, COPIED_RIGHT):
                network.links(ring_ms)
                again = copying(guessing, right)
                for server in (plain, guessing):
                    decode_rate(server, 64, **again)
                before = guesses_counted(guessing)
                rate = lambda server, tokens: decode_rate(server, tokens, **again)
                pair = in_turns(options.rounds, lambda: rate(guessing, COPIED_TOKENS), lambda: rate(plain, 64))
                share = part_right(*guesses_since(before, guessing))
                bar = 18 if right < 1 else None
                table.pairs(f"copied text at {ring_ms} ms, {share:.3f} of the guesses right, looked up / not", "tok/s", *pair, bar=bar)


def copying(server, right):
    """A request that makes a server say one token over and over, and another one at so many places that about this part of guesses is `right`:
    the same answer each time."""
    # One token, and another one with so much less of it, are far more likely than all others.
    bias = {str(servers.FIRST_TOKEN): 100}
    again = {"prompt": [*servers.unique_prompt(len(COPIED)), *COPIED], "logit_bias": bias, "temperature": 1, "seed": 1}
    if right < 1:
        # What the weights themselves say of the two differs from prompt to prompt, so it is tried.
        odds = math.log(1 - right)
        for _ in range(COPIED_TRIES):
            bias[str(servers.LAST_TOKEN)] = 100 + odds
            before = guesses_counted(server)
            decode_rate(server, COPIED_TOKENS, **again)
            share = part_right(*guesses_since(before, server))
            if abs(share - right) < COPIED_ABOUT:
                break
            odds += math.log((1 - right) / max(1 - share, 0.1 * (1 - right)))
    return again


def relayed(options, model, table):
    nats = {"direct": ("port-restricted-cone", ("h2", "h3")), "relayed": ("symmetric", ("h4", "h5"))}
    homes = {name: kind for kind, names in nats.values() for name in names}
    with lab.Lab(options.lab, 5, homes) as (network, hosts), contextlib.ExitStack() as stack:
        relay = stack.enter_context(servers.seed(options.murmur, hosts[0])).relay
        by_name = {host.name: host for host in hosts}
        clients = {}
        for path, (_, (there, here)) in nats.items():
            clients[path] = from_home_to_home(options, model, stack, relay, by_name[there], by_name[here], path)
        for round_trip_ms in RELAYED_MS:
            network.links(round_trip_ms)
            # Round trips are measured every few seconds, and smoothed.
            time.sleep(SETTLED_S)
            rtts = ", ".join(f"{path} {peer_of(client)['rtt_ms']:.1f} ms" for path, client in clients.items())
            print(f"homes {round_trip_ms} ms apart; round trips as nodes tell them: {rtts}", flush=True)
            first = lambda path: 1000 * first_token_s(clients[path], 64)
            pair = in_turns(FIRST_TOKENS, lambda: first("relayed"), lambda: first("direct"))
            table.pairs(f"first token of 64 at {round_trip_ms} ms, relayed / direct", "ms", *pair, lower_is_better=True)
            pair = in_turns(options.rounds, lambda: decode_rate(clients["relayed"]), lambda: decode_rate(clients["direct"]))
            table.pairs(f"decode at {round_trip_ms} ms, relayed / direct", "tok/s", *pair)


def from_home_to_home(options, model, stack, relay, there, here, path):
    """A client at `here` of a server at `there`, once they are connected in this way."""
    ways = ("--no-nostr", "--no-mdns", "--relay", relay)
    shape = {"threads": 1, "context": CONTEXT, "parallel": 1}
    server = stack.enter_context(servers.murmur(options.murmur, model, **shape, mesh=("--mesh", "bench", *ways), host=there))
    server.wait(lambda: server.ask("GET", "/api/mesh")["relay"])
    client = stack.enter_context(servers.client(options.murmur, ("--join", ticket_of(server), *ways), here))
    client.wait(lambda: client.ask("GET", "/v1/models")["data"])
    client.model = server.model
    client.wait(lambda: peer_of(client)["path"].startswith(path))
    client.generate(servers.unique_prompt(64), 8)
    return client


def peer_of(client):
    return client.ask("GET", "/api/mesh")["peers"][0]


def replay(options, model, table):
    if options.trace is None:
        print("replay: left out, as --trace names no file")
        return
    with lab.Lab(options.lab, REPLAY_STAGES) as (network, hosts):
        ring = Ring(options, model, list(hosts), layers_of(options, model), parallel=REPLAY_STREAMS)
        with ring as first:
            network.links(FAR_MS / REPLAY_STAGES)
            arrivals = replayed(options, first)
            begun, stories, memory_mib = time.perf_counter(), [], []
            for number, (at_s, prompt, answer) in enumerate(arrivals):
                time.sleep(max(0, begun + at_s - time.perf_counter()))
                stories.append(Story(first, servers.unique_prompt(prompt), answer))
                if number % (len(arrivals) // 4) == 0:
                    memory_mib.append([node.memory_mib() for node in ring.nodes])
            for story in stories:
                story.join()
            memory_mib.append([node.memory_mib() for node in ring.nodes])
    whole = [story for story in stories if story.end == "length"]
    waits_s = [story.times[0] - story.begun for story in whole if story.times]
    gaps_s = [after - before for story in whole for before, after in zip(story.times, story.times[1:])]
    for what, values_s in (("first token", waits_s), ("later tokens", gaps_s)):
        cuts = statistics.quantiles(values_s, n=100, method="inclusive")
        print(f"{what}: {len(values_s)}   " + "   ".join(f"p{part} {1000 * cuts[part - 1]:.0f} ms" for part in (50, 95, 99)))
    print("memory of the nodes, MiB: " + ", then ".join("/".join(f"{node:.0f}" for node in nodes) for nodes in memory_mib))
    table.limit(f"requests of {len(stories)} that failed", "", len(stories) - len(whole), 0)
    for reason in sorted({story.end for story in stories if story.end != "length"}):
        print(f"  failed: {reason}")


def replayed(options, server):
    """(seconds from the beginning, prompt tokens, answer tokens) of the requests of a trace that a ring can carry."""
    with open(options.trace, newline="") as file:
        rows = [(datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    begin, minutes = rows[0][0], options.replay_minutes
    shrink = 60 * minutes / (rows[-1][0] - begin).total_seconds()
    # What the longest ask for is more than the context has.
    fits = lambda prompt, answer: (min(prompt, CONTEXT - answer - 1), answer)
    all_of_it = [((at - begin).total_seconds() * shrink, *fits(prompt, answer)) for at, prompt, answer in rows]
    # A mean request, as many at once as the ring takes.
    busy_s = statistics.median(at_once(REPLAY_STREAMS, lambda: server.generate(servers.unique_prompt(REPLAY_SAMPLE[0]), REPLAY_SAMPLE[1])[1])) / REPLAY_STREAMS
    every = math.ceil(len(rows) * busy_s / (REPLAY_BUSY * 60 * minutes))
    taken = all_of_it[::every]
    print(f"a request of {REPLAY_SAMPLE[0]} and {REPLAY_SAMPLE[1]} tokens takes {1000 * busy_s:.0f} ms of the ring: every {every}th of {len(rows)}, {len(taken)} in {minutes:.0f} min", flush=True)
    return taken


def arguments():
    parser = argparse.ArgumentParser(prog="./x bench links", description="Measures rings of machines with distances between them, in the lab.")
    parser.add_argument("--murmur", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--lab", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--llama", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=12, help="machines to kill for each figure of `deaths` (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--rings-ms", nargs="+", type=float, default=RINGS_MS, metavar="MS", help="ways around the rings of `guesses` and `pair` (default: 0 20 60 100 200)")
    parser.add_argument("--trace", type=pathlib.Path, help="arrivals and lengths for `replay`: CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--replay-minutes", type=float, default=6, help="what the hour of `replay` takes (default: %(default)s)")
    return parser.parse_args()


def main():
    options, table = arguments(), Table()
    print(machine())
    shapes = {
        SHAPE: (tokens, streams, prefill, codecs),
        GUESSED_SHAPE: (deaths, guesses, deep, borrowed, pair, alone, window, candidates, shared, copied, relayed, replay),
    }
    for shape, parts in shapes.items():
        for part in parts:
            if part.__name__ in options.only:
                part(options, next(synthetic(options, [shape])), table)


if __name__ == "__main__":
    main()
