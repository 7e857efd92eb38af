//! Bytes from a peer: reading frames must end without a panic, and agree with parsing them from a buffer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::{
    frame::Frame,
    stage::{Load, Loaded, NotOpened, Open, Opened, Route, RouteTo, Sessions, Step, Tokenize},
};

fuzz_target!(|bytes: &[u8]| {
    let mut input = bytes;
    let mut at = 0;
    while let Ok(Some(frame)) = Frame::read_from(&mut input) {
        let parsed = Frame::parse(&bytes[at..]).expect("what was read parses");
        let (again, length) = parsed.expect("what was read is complete");
        assert_eq!(again, frame);
        at += length;
        let _ = (frame.token_rows(), frame.hidden_rows(64), frame.as_text());
        let _ = (frame.decode::<Load>(), frame.decode::<Loaded>(), frame.decode::<Open>(), frame.decode::<Opened>());
        let _ = (frame.decode::<NotOpened>(), frame.decode::<Step>(), frame.decode::<Tokenize>());
        let _ = (frame.decode::<Route>(), frame.decode::<RouteTo>(), frame.decode::<Sessions>());
    }
});
