//! Compiles the mesh's message definitions: parsed by `protox`, so that no `protoc` has to be installed.

use std::io;

const DEFINITIONS: [&str; 5] = [
    "proto/murmur/v1/attestation.proto",
    "proto/murmur/v1/record.proto",
    "proto/murmur/v1/member.proto",
    "proto/murmur/v1/control.proto",
    "proto/murmur/v1/work.proto",
];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(DEFINITIONS, ["proto"]).map_err(io::Error::other)?;
    prost_build::Config::new().disable_comments(["."]).compile_fds(descriptors)
}
