"""Hosts of the lab, entered from Python: programs run there, and connections begin there."""

import contextlib
import ctypes
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import tempfile

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


class Host:
    """A network namespace. `entry`: the words that start a program in it."""

    def __init__(self, name, address, entry):
        self.name, self.address, self.entry = name, address, entry
        # ip netns exec NAMESPACE
        self.namespace = pathlib.Path("/run/netns") / entry[-1]

    def connection(self, port, timeout):
        """An HTTP connection from this host to itself."""
        return _Connection(self.namespace, port, timeout)

    def datagrams(self):
        """A UDP socket of this host."""
        with _inside(self.namespace):
            made = socket.socket(type=socket.SOCK_DGRAM)
        made.bind((self.address, 0))
        return made

    def sent_bytes(self):
        """What it has sent to others so far, in whole IP packets."""
        words = [*map(str, (*self.entry, "cat", "/proc/net/dev"))]
        interfaces = [line.split(":") for line in subprocess.check_output(words, text=True).splitlines() if ":" in line]
        # Eight columns of what was received come first.
        return sum(int(columns.split()[8]) for name, columns in interfaces if name.strip() != "lo")


class Here:
    """This machine, outside of any lab."""

    entry = ()

    def connection(self, port, timeout):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)


class _Connection(http.client.HTTPConnection):
    def __init__(self, namespace, port, timeout):
        super().__init__("127.0.0.1", port, timeout=timeout)
        self.namespace = namespace

    def connect(self):
        # A socket stays where it was made.
        with _inside(self.namespace):
            super().connect()


@contextlib.contextmanager
def _inside(namespace):
    """The calling thread, and no other, is in the namespace."""

    def enter(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if LIBC.setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"entering {path}")
        finally:
            os.close(descriptor)

    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(f"/proc/self/fd/{own}")
    finally:
        os.close(own)


class Lab:
    """Hosts with links between them; a context manager: (itself, its hosts). `homes`: the names of hosts behind NATs of their own,
    with the NAT's kind; all others are alone on the internet."""

    def __init__(self, binary, count, homes=None):
        self.binary, self.names, self.homes = binary, [f"h{number}" for number in range(1, count + 1)], homes or {}

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="murmur-bench-")
        topology = pathlib.Path(self.folder.name) / "topology.toml"
        homes = "".join(f'[[site]]\nname = "at-{name}"\nnat = {{ kind = "{kind}" }}\n' for name, kind in self.homes.items())
        site = lambda name: f'site = "at-{name}"\n' if name in self.homes else ""
        topology.write_text(homes + "".join(f'[[host]]\nname = "{name}"\n{site(name)}' for name in self.names))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(self.binary), str(topology)], **pipes)
        self.hosts = []
        for _ in self.names:
            words = self.process.stdout.readline().split()
            if len(words) < 4:
                self.__exit__()
                raise SystemExit("the lab did not start: it needs root, and /dev/net/tun")
            self.hosts.append(Host(words[0], words[1], words[2:-1]))
        return self, self.hosts

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.communicate()
        self.folder.cleanup()

    def links(self, round_trip_ms, rate_mbit_s=None, down_mbit_s=None):
        """From now on, between any two hosts. `rate_mbit_s`: what each sends at most, `down_mbit_s`: what each receives."""
        self.away(self.hosts, round_trip_ms / 2, rate_mbit_s)
        for host in self.hosts:
            self._change("down", host, _rate(down_mbit_s))

    def away(self, hosts, way_ms, rate_mbit_s=None):
        """From now on, from each of these hosts to any other."""
        for host in hosts:
            self._change("up", host, [f"delay_ms = {way_ms:.3f}", *_rate(rate_mbit_s)])

    def _change(self, direction, host, link):
        print(f"{direction} {host.name} {{ {', '.join(link)} }}", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if answer != "done":
            raise SystemExit(f"the lab did not change a link: {answer}")


def _rate(mbit_s):
    return [f"rate_mbit_s = {mbit_s:.3f}"] if mbit_s else []
