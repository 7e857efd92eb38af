//! Bytes on the mesh's control stream.
#![no_main]

mod messages;

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::Control;

fuzz_target!(|bytes: &[u8]| messages::decode::<Control>(bytes));
