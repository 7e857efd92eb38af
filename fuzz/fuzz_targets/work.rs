//! Bytes on the mesh's work stream.
#![no_main]

mod messages;

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::Work;

fuzz_target!(|bytes: &[u8]| messages::decode::<Work>(bytes));
