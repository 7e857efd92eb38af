#!/usr/bin/env python3
"""Builds the fuzz targets and runs each for a while from seeds: broken things found fail, and stay in fuzz/artifacts.

    run.py --murmur BINARY --target-dir FOLDER [--seconds N] [--junit FILE] [TARGET...]

The targets are libFuzzer programs; coverage comes from flags that a stable compiler has, so neither cargo-fuzz nor a nightly
compiler is needed. With a nightly one, `cargo fuzz run TARGET` adds the address sanitizer.
"""

import argparse
import os
import pathlib
import re
import struct
import subprocess
import sys
import time
import xml.sax.saxutils

HERE = pathlib.Path(__file__).resolve().parent
TARGETS = ("gguf", "frame", "record", "ticket", "control", "work", "card", "contact", "attestation", "content")
# What cargo-fuzz gives the compiler, without the sanitizer.
FLAGS = (
    "--cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 "
    "-C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table "
    "-C llvm-args=-sanitizer-coverage-trace-compares -C codegen-units=1 -C debug-assertions"
)
ARCHITECTURES = ("llama", "bert", "gemma3")
INPUT_BYTES_MAX = 1 << 18
# One input that takes longer is a finding.
INPUT_SECONDS_MAX = 10
MEMORY_MIB_MAX = 1024


def golden():
    """(name, bytes) of every message in the golden vectors: a name at the left, an indented description, then the encoding."""
    for block in (HERE.parent / "crates/protocol/tests/golden/mesh.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if len(lines) < 3:
            continue
        name, encoding = lines[0], "".join(line.strip() for line in lines[2:])
        yield name, bytes.fromhex(encoding) if re.fullmatch("[0-9a-f]+", encoding) else encoding.encode()


def frames():
    """Frames of all kinds: crates/protocol/src/frame.rs has the layout."""
    for kind in range(1, 0x43):
        payload = struct.pack("<4i", 1, 2, 3, 4)
        yield struct.pack("<BBBBHHQIIII", 0x4D, 1, kind, 0, 1, 0, 7, 0, 0, 4, len(payload)) + payload


def write_seeds(target, folder, murmur):
    if target == "gguf":
        for name in ARCHITECTURES:
            file = folder / f"{name}.gguf"
            subprocess.run([murmur, "models", "synth", name, file], check=True, capture_output=True)
            # The header is what is parsed; of the weights only the length matters.
            file.write_bytes(file.read_bytes()[:INPUT_BYTES_MAX])
        return
    if target == "frame":
        seeds = frames()
    else:
        seeds = (encoding for name, encoding in golden() if target in name)
    for index, seed in enumerate(seeds):
        (folder / f"seed-{index}").write_bytes(seed)


def host():
    version = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    return re.search(r"^host: (.*)$", version, re.MULTILINE)[1]


def build(targets, target_dir):
    """Builds the targets; returns the folder they are in. Naming the host keeps the flags away from build scripts."""
    flags = os.environ.get("RUSTFLAGS", "") + " " + FLAGS
    command = [
        "cargo", "build", "--release", "--manifest-path", HERE / "Cargo.toml", "--target-dir", target_dir / "fuzz",
        "--target", host(),
    ]
    for target in targets:
        command += ["--bin", target]
    subprocess.run(command, check=True, env=os.environ | {"RUSTFLAGS": flags})
    return target_dir / "fuzz" / host() / "release"


def run(target, programs, options):
    """(passed, what libFuzzer said)"""
    corpus, artifacts = options.target_dir / "fuzz-corpus" / target, HERE / "artifacts" / target
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    write_seeds(target, corpus, options.murmur)
    command = [
        programs / target, corpus, f"-max_total_time={options.seconds}", f"-timeout={INPUT_SECONDS_MAX}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}", f"-max_len={INPUT_BYTES_MAX}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.returncode == 0, done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--murmur", type=pathlib.Path, required=True)
    parser.add_argument("--target-dir", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--junit", type=pathlib.Path)
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=TARGETS, help=f"default: {' '.join(TARGETS)}")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))} (there are: {' '.join(TARGETS)})")
    programs = build(options.targets, options.target_dir)
    cases, failed = [], 0
    for target in options.targets:
        begin = time.monotonic()
        passed, said = run(target, programs, options)
        took = time.monotonic() - begin
        failed += not passed
        executed = re.search(r"number_of_executed_units:\s*(\d+)", said)
        print(f"fuzz {target}: {'ok' if passed else 'FAILED'}, {executed[1] if executed else '?'} inputs in {took:.0f} s", flush=True)
        failure = ""
        if not passed:
            print(said[-6000:])
            failure = f"<failure>{xml.sax.saxutils.escape(said[-2000:])}</failure>"
        cases.append(f'<testcase classname="fuzz" name="{target}" time="{took:.1f}">{failure}</testcase>')
    if options.junit:
        options.junit.write_text(f'<testsuite name="fuzz">{"".join(cases)}</testsuite>')
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
