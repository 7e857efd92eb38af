//! What was signed of a model's file: as bytes of a stranger, and as what a node with a key of its own has signed. Nothing without a
//! signature is believed, and what is believed can be signed again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::{ModelDigest, NodeKey, SignedAttestation, attestation};

/// Of the seed.
const MODEL: ModelDigest = ModelDigest::from_bytes([0x11; 32]);

fuzz_target!(|bytes: &[u8]| {
    let key = NodeKey::from_bytes(&[2; 32]);
    // The seed is signed with this key, so that only its own damage can make it fail.
    let body = bytes.get(64..).unwrap_or(bytes);
    let signed = [key.sign(attestation::DOMAIN, body).as_slice(), body].concat();
    for sealed in [bytes, &signed] {
        let Ok(signed) = SignedAttestation::from_bytes(sealed) else { continue };
        if let Ok(says) = signed.verify(MODEL) {
            assert_eq!((says.signer, says.model), (key.node_id(), MODEL));
            let again = says.sign(&key).expect("what was read can be signed");
            assert_eq!(again.verify(MODEL), Ok(says));
        }
    }
});
