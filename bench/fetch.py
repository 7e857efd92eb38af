#!/usr/bin/env python3
"""Model files that come from other machines, over links of the lab. So it needs root.

*one*: a file from one machine, against the same file over HTTP and over QUIC with nothing around it (`crates/net/examples/raw_quic.rs`), on the same link.

*three*: a file from three machines with 100 Mbit/s each, against what the three links carry together.

*swarm*: machines that fetch a file at the same time from one, and hand on to each other what they have. Meant are 1 GB and 50 Mbit/s of each machine, 200 to it; since
one computer carries all of it, file and links are smaller by the same factor, so that the times are those of the large ones. Against the time in which the file leaves
its source once, which is the least that it can take, and against one download after the other, each as long as the source's link needs for it. How busy the
processors were is printed, how many times the source, and all together, have sent the file, and how much of it came twice.

*cold*: a ring of four machines of which one has the file and the others have nothing: from the start of the others until the model is ready on the
first, against the time that the longest part alone takes on the link, and against that of all parts out of the one source, which is the least that it can be.
Then all are killed and started again, with what they have.

`./x bench fetch` builds everything and runs this.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import time

import lab
import servers
from bench import Table, in_turns, machine
from mesh import layers_of, spread_over, synthetic, ticket_of

PARTS = ("one", "three", "swarm", "cold")
SHAPE = "bench-0.5b"
ONE_MBIT_S, ROUND_TRIPS_MS = 400, (0, 20)
THREE_MBIT_S, SOURCES = 100, 3
SWARM_BYTES, SWARM_UP_MBIT_S, SWARM_DOWN_MBIT_S, SWARM_MS = 1e9, 50, 200, 20
# Some 125 MB of which hardly anything is metadata: links of an eighth.
SWARM_SHAPE = "bench-wide:40"
RING, RING_MBIT_S, RING_MS = 4, 100, 20
NAME = "wanted"
# Reads a file over HTTP and says how long it took.
GET = """
import sys, time, urllib.request
begun = time.perf_counter()
with urllib.request.urlopen(sys.argv[1]) as answer:
    while answer.read(1 << 20): pass
print(time.perf_counter() - begun)
"""


def transfer_s(size, mbit_s):
    """The time that so many bytes take on a link, without anything around them."""
    return size * 8 / mbit_s / 1e6


def serving(options, host, words, joining):
    """A node that serves what the words say, and hands on what it has."""
    def command(port, folder):
        return [
            options.murmur, "serve", *words, "--api", f"127.0.0.1:{port}", "--data-dir", folder, "--threads", 1, "--ctx", 512, "--parallel", 1,
            *joining, *servers.offline(host.address),
        ]

    return servers.Server(host.name, command, host)


@contextlib.contextmanager
def sources(options, model, hosts):
    """Nodes that have the file; the ticket to them."""
    with contextlib.ExitStack() as stack:
        words = (model, "--alias", NAME)
        first = stack.enter_context(serving(options, hosts[0], words, ("--mesh", "bench")))
        ticket = ticket_of(first)
        for host in hosts[1:]:
            stack.enter_context(serving(options, host, words, ("--join", ticket)))
        yield ticket


@contextlib.contextmanager
def taking(options, host, ticket, known):
    """A node without the file that knows so many which have it."""
    node = serving(options, host, ("--on-demand",), ("--join", ticket))
    try:
        node.launch()
        node.wait(lambda: sum(len(file["nodes"]) for file in node.ask("GET", "/api/models")["models"]) == known)
        yield node
    finally:
        node.__exit__()


def pull_s(node):
    """Seconds until the whole file is there."""
    return pulled(node)[0]


def pulled(node):
    """Seconds until the whole file is there, and bytes of it that had come twice when it was asked last."""
    connection = node.host.connection(node.port, servers.REQUEST_LIMIT_S)
    begun = time.perf_counter()
    connection.request("POST", "/api/models/pull", json.dumps({"model": NAME}), {"Content-Type": "application/json"})
    last, doubled = {}, 0
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            last = json.loads(line[6:])
            doubled = ((last.get("fetch") or {}).get("doubled_bytes")) or doubled
    took = time.perf_counter() - begun
    connection.close()
    if last.get("state") != "done":
        raise SystemExit(f"a pull ended with {last}")
    return took, doubled


def one(options, model, table):
    size = model.stat().st_size
    with lab.Lab(options.lab, 2) as (network, (source, taker)):
        at_source = lambda *words: subprocess.Popen(
            [*map(str, (*source.entry, *words))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        web = at_source(sys.executable, "-m", "http.server", "8000", "--bind", source.address, "--directory", model.parent)
        quic = at_source(options.raw_quic, "send", model, source.address)
        quic_at = quic.stdout.readline().split()

        def taken_by(*words):
            words = [*map(str, (*taker.entry, *words))]
            return float(subprocess.run(words, capture_output=True, check=True, text=True).stdout)

        others = {
            "HTTP": lambda: taken_by(sys.executable, "-c", GET, f"http://{source.address}:8000/{model.name}"),
            "QUIC": lambda: taken_by(options.raw_quic, "take", *quic_at),
        }

        def murmur_s():
            with taking(options, taker, ticket, 1) as node:
                return pull_s(node)

        try:
            with sources(options, model, [source]) as ticket:
                for round_trip_ms in ROUND_TRIPS_MS:
                    network.links(round_trip_ms, ONE_MBIT_S)
                    for name, other_s in others.items():
                        pair = in_turns(options.rounds, murmur_s, other_s)
                        what = f"{size >> 20} MiB at {ONE_MBIT_S} Mbit/s and {round_trip_ms} ms, murmur / {name}"
                        table.pairs(what, "s", *pair, lower_is_better=True)
        finally:
            for server in (web, quic):
                server.terminate()
                server.communicate()


def three(options, model, table):
    size = model.stat().st_size
    with lab.Lab(options.lab, SOURCES + 1) as (network, (taker, *hosts)):
        with sources(options, model, hosts) as ticket:
            # Each machine sends that much; the taker sends next to nothing.
            network.links(0, THREE_MBIT_S)
            def murmur_s():
                with taking(options, taker, ticket, SOURCES) as node:
                    return pull_s(node)

            took = [murmur_s() for _ in range(options.rounds)]
            ideal = [transfer_s(size, SOURCES * THREE_MBIT_S)] * len(took)
            what = f"{size >> 20} MiB from {SOURCES} at {THREE_MBIT_S} Mbit/s, murmur / all links"
            table.pairs(what, "s", took, ideal, bar=0.9, lower_is_better=True)


def swarm(options, _, table):
    model = next(synthetic(options, [SWARM_SHAPE]))
    size, count = model.stat().st_size, options.takers
    factor = size / SWARM_BYTES
    up_mbit_s = SWARM_UP_MBIT_S * factor
    with lab.Lab(options.lab, count + 1) as (network, (source, *hosts)):
        network.links(SWARM_MS)
        with sources(options, model, [source]) as ticket, contextlib.ExitStack() as stack:
            nodes = [stack.enter_context(taking(options, host, ticket, 1)) for host in hosts]
            network.links(SWARM_MS, up_mbit_s, SWARM_DOWN_MBIT_S * factor)
            before, ticks = [host.sent_bytes() for host in (source, *hosts)], processor_ticks()
            begun = time.perf_counter()
            done, doubled = zip(*at_end(nodes), strict=True)
            took = time.perf_counter() - begun
            busy = busy_share(ticks, processor_ticks())
            sent = [host.sent_bytes() - bytes_before for host, bytes_before in zip((source, *hosts), before, strict=True)]
        least = transfer_s(size, up_mbit_s)
        print(
            f"{count} nodes fetch {size / 1e6:.0f} MB from one at {up_mbit_s:.2f} Mbit/s: first done after {min(done):.1f} s, median "
            f"{statistics.median(done):.1f} s, last {max(done):.1f} s; the source has sent {sent[0] / size:.2f} files, all together "
            f"{sum(sent) / size:.2f}, in whole packets; {sum(doubled) / size / count:.1%} came twice; processors {busy:.0%} busy",
            flush=True,
        )
        what = f"{count} nodes from one, {up_mbit_s:.2f} Mbit/s each, murmur / "
        table.pairs(what + "once out of the source", "s", [took], [least], lower_is_better=True)
        table.pairs(what + "one after the other", "s", [took], [least * count], lower_is_better=True)


def processor_ticks():
    """Ticks of all processors since the machine started: idle ones, and all."""
    ticks = [*map(int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])]
    return ticks[3] + ticks[4], sum(ticks)


def busy_share(before, after):
    (idle_before, all_before), (idle, ticks) = before, after
    return 1 - (idle - idle_before) / (ticks - all_before)


def at_end(nodes):
    """What each says of its pull, where all begin together."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(pulled, nodes))


def cold(options, model, table):
    layers = layers_of(options, model)
    with lab.Lab(options.lab, RING) as (network, hosts):
        hosts = list(hosts)
        part = spread_over(layers, RING)

        def ready_s():
            """Seconds until the ring is ready, bytes that each of the others has then, and seconds until it is ready when all have been killed and start again."""
            network.links(RING_MS, RING_MBIT_S)
            with contextlib.ExitStack() as stack:
                first = serving(options, hosts[0], (model, "--alias", NAME, *part), ("--mesh", "bench"))
                stack.callback(first.__exit__)
                first.launch()
                first.wait(lambda: any(file["held_bytes"] for file in first.ask("GET", "/api/models")["models"]))
                ticket = ticket_of(first)
                begun = time.perf_counter()
                others = [serving(options, host, (NAME, *part), ("--join", ticket)) for host in hosts[1:]]
                for node in others:
                    stack.callback(node.__exit__)
                    node.launch()
                first.wait(lambda: first.answers("/health"))
                took = time.perf_counter() - begun
                held = [file["held_bytes"] for node in others for file in node.ask("GET", "/api/models")["models"]]
                for node in (first, *others):
                    node.kill()
                begun = time.perf_counter()
                for node in (first, *others):
                    node.launch()
                first.wait(lambda: first.answers("/health"))
                return took, held, time.perf_counter() - begun

        results = [ready_s() for _ in range(max(2, options.rounds // 2))]
        took = [seconds for seconds, *_ in results]
        what = f"cold ring of {RING} at {RING_MBIT_S} Mbit/s and {RING_MS} ms, ready / "
        for name, of in (("largest part over the link", max), ("all parts out of the source", sum)):
            ideal = [transfer_s(of(held), RING_MBIT_S) for _, held, _ in results]
            table.pairs(f"{what}{name} ({of(results[0][1]) >> 20} MiB)", "s", took, ideal, lower_is_better=True)
        table.pairs("the same ring, all started again with what they have / cold", "s", [warm for *_, warm in results], took, lower_is_better=True)


def arguments():
    parser = argparse.ArgumentParser(prog="./x bench fetch", description="Measures how model files come from other machines; needs root.")
    parser.add_argument("--murmur", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--lab", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--raw-quic", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure (default: %(default)s)")
    parser.add_argument("--takers", type=int, default=20, help="nodes of `swarm` (default: %(default)s)")
    parser.add_argument("--shape", default=SHAPE, help="the model whose file is fetched (default: %(default)s)")
    return parser.parse_args()


def main():
    options, table = arguments(), Table()
    print(machine())
    model = next(synthetic(options, [options.shape]))
    for part in (one, three, swarm, cold):
        if part.__name__ in options.only:
            part(options, model, table)


if __name__ == "__main__":
    main()
