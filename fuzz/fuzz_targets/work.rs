//! Bytes on the mesh's work stream: decoding must end without a panic, not depend on how the bytes are cut, and give only
//! messages that can be sent.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::{Decoder, Work, encode};

fuzz_target!(|bytes: &[u8]| {
    let mut whole = Decoder::<Work>::new();
    let mut cut = Decoder::<Work>::new();
    let (mut input, mut halves) = (bytes, bytes.split_at(bytes.len() / 2));
    while let Ok(Some(message)) = whole.next(&mut input) {
        let again = encode(&message).expect("what was read can be sent");
        let mut rest = again.as_slice();
        let read = Decoder::<Work>::new().next(&mut rest).expect("what was sent is read").expect("it is complete");
        assert_eq!(encode(&read).expect("what was read can be sent"), again);

        let first = cut.next(&mut halves.0).expect("it is read however it is cut");
        let pieced = match first {
            Some(message) => message,
            None => cut.next(&mut halves.1).expect("it is read however it is cut").expect("it is complete"),
        };
        assert_eq!(encode(&pieced).expect("what was read can be sent"), again);
    }
});
