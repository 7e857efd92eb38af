#!/usr/bin/env python3
"""A model over several machines with real distances between them, and llama.cpp's RPC under the same distances.

The machines are hosts of the lab: network namespaces on this machine with emulated links. So it needs root. Every engine
has one thread.

*tokens*: a model over two machines, at several round trips: the time of a token, through Murmur, through `llama-server`
with half of the layers on an `ggml-rpc-server`, and on one machine alone. What must be paid is one way round the ring.

*streams*: eight streams together against one, at 20 ms. One stream leaves the stages idle while its rows travel; eight
could use them up to eight times as well, but no better than the slowest stage allows.

*prefill*: a prompt of 4,096 tokens over four machines at 20 ms against one machine alone, and against its chunks going around one
after the other.

*codecs*: hidden states as f16 and q8 against f32 over two machines, on links of 20 and 100 Mbit/s.

`./x bench links` builds everything and runs this.
"""

import argparse
import pathlib
import statistics

import lab
import servers
from bench import Table, decode_rate, first_token_s, in_turns, machine, together_rate
from mesh import layers_of, spread_over, synthetic, ticket_of

PARTS = ("tokens", "streams", "prefill", "codecs")
SHAPE = "bench-1b"
CONTEXT = 4608
ROUND_TRIPS_MS = (0, 5, 20, 50)
FAR_MS = 20
STREAMS = 8
PROMPT_TOKENS, PREFILL_STAGES = 4096, 4
CHUNK_TOKENS = 256
CODECS, RATES_MBIT_S = ("f16", "q8"), (20, 100)


class Ring:
    """A model over the hosts of a lab; a context manager whose value is the node on the first of them."""

    def __init__(self, options, model, hosts, layers, parallel=1, arguments=()):
        limit = (*spread_over(layers, len(hosts)), *arguments)
        shape = {"threads": 1, "context": CONTEXT, "parallel": parallel}

        def node(host, joining):
            mesh = (*joining, *servers.offline(host.address), *limit)
            return servers.murmur(options.murmur, model, **shape, name=host.name, mesh=mesh, host=host)

        self.hosts, self.node = hosts, node

    def __enter__(self):
        # A model is ready when all its layers are there, so the others are started before the first is waited for.
        first = self.node(self.hosts[0], ("--mesh", "bench"))
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
                pair = in_turns(options.rounds, lambda: token_ms(ring), lambda: token_ms(whole))
                more = statistics.median(spread - alone for spread, alone in zip(*pair, strict=True))
                what = f"token at {round_trip_ms} ms less one on one machine less the round trip"
                table.limit(what, "ms", more - round_trip_ms, 1)


def streams(options, model, table):
    with lab.Lab(options.lab, 2) as (network, hosts):
        with Ring(options, model, list(hosts), layers_of(options, model), parallel=STREAMS) as ring:
            ring.generate(servers.unique_prompt(64), 8)
            network.links(FAR_MS)
            pair = in_turns(options.rounds, lambda: together_rate(ring, STREAMS), lambda: together_rate(ring, 1))
            stages = ring.ask("GET", "/api/status")["node"]["models"][0]["stages"]
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
                    chosen = smaller.ask("GET", "/api/status")["node"]["models"][0]["stages"][0]["codec"]
                    what = f"at {rate_mbit_s} Mbit/s and {FAR_MS} ms, {codec} allowed and {chosen} chosen / f32"
                    pair = in_turns(options.rounds, lambda: token_ms(smaller), lambda: token_ms(exact))
                    table.pairs(f"token {what}", "ms", *pair, lower_is_better=True)
                    first = lambda server: 1000 * first_token_s(server, 2 * CHUNK_TOKENS)
                    pair = in_turns(options.rounds, lambda: first(smaller), lambda: first(exact))
                    table.pairs(f"first token of {2 * CHUNK_TOKENS} {what}", "ms", *pair, lower_is_better=True)


def arguments():
    parser = argparse.ArgumentParser(prog="./x bench links", description="Measures rings of machines with distances between them, in the lab.")
    parser.add_argument("--murmur", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--lab", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--llama", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help="pairs per figure (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure (default: all): {', '.join(PARTS)}")
    return parser.parse_args()


def main():
    options, table = arguments(), Table()
    print(machine())
    model = next(synthetic(options, [SHAPE]))
    for part, measure in (("tokens", tokens), ("streams", streams), ("prefill", prefill), ("codecs", codecs)):
        if part in options.only:
            measure(options, model, table)


if __name__ == "__main__":
    main()
