//! What holds for the messages of any stream of the mesh.

use murmur_protocol::mesh::{Decoder, Message, encode};

/// Decoding ends without a panic, does not depend on how the bytes are cut, and gives only messages that can be sent.
pub fn decode<M: Message>(bytes: &[u8]) {
    let mut whole = Decoder::<M>::new();
    let mut cut = Decoder::<M>::new();
    let (mut input, mut halves) = (bytes, bytes.split_at(bytes.len() / 2));
    while let Ok(Some(message)) = whole.next(&mut input) {
        let again = encode(&message).expect("what was read can be sent");
        let mut rest = again.as_slice();
        let read = Decoder::<M>::new().next(&mut rest).expect("what was sent is read").expect("it is complete");
        assert_eq!(encode(&read).expect("what was read can be sent"), again);

        let first = cut.next(&mut halves.0).expect("it is read however it is cut");
        let pieced = match first {
            Some(message) => message,
            None => cut.next(&mut halves.1).expect("it is read however it is cut").expect("it is complete"),
        };
        assert_eq!(encode(&pieced).expect("what was read can be sent"), again);
    }
}
