//! A ticket from a stranger, as text: what is accepted is written as it was read, and everything else is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::SignedTicket;

fuzz_target!(|text: &str| {
    if let Ok(ticket) = text.parse::<SignedTicket>() {
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
    }
});
