//! A contact from a Nostr relay: as bytes of a stranger, and as what a node with a key of its own has signed. Nobody is
//! shown at an address for which there is no signature, and what is kept can be published again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::{NodeKey, contact, record::DIRECT_ADDRESSES_MAX};

fuzz_target!(|bytes: &[u8]| {
    let key = NodeKey::from_bytes(&[1; 32]);
    // The seed is signed with this key, so that only its own damage can make it fail.
    let body = bytes.get(64..).unwrap_or(bytes);
    let signed = [key.sign(contact::DOMAIN, body).as_slice(), body].concat();
    for sealed in [bytes, &signed] {
        if let Ok((node, addresses)) = contact::open(sealed) {
            assert_eq!(node, key.node_id());
            assert!(addresses.direct.len() <= DIRECT_ADDRESSES_MAX);
            let again = contact::seal(&addresses, &key).expect("what was read can be written");
            assert_eq!(contact::open(&again), Ok((node, addresses)));
        }
    }
});
