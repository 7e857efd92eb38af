//! Signed statements from a stranger: records, certificates, lists of revocations and what is said of models. Nothing that was not signed may
//! verify, whatever it holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_protocol::mesh::{
    MeshId, ModelDigest, NodeId, RECORD_BYTES_MAX, SignedAttestation, SignedCertificate, SignedRecord, SignedRevocations,
};

fuzz_target!(|bytes: &[u8]| {
    let mesh = MeshId::public("fuzz");
    if let Ok(signed) = SignedRecord::from_bytes(bytes) {
        assert!(bytes.len() <= RECORD_BYTES_MAX);
        let _ = signed.claim();
        assert!(signed.verify(mesh).is_err());
    }
    if let Ok(signed) = SignedCertificate::from_bytes(bytes) {
        assert!(signed.verify(mesh, NodeId::from_bytes([1; 32]), 0).is_err());
    }
    if let Ok(signed) = SignedAttestation::from_bytes(bytes) {
        assert!(signed.verify(ModelDigest::from_bytes([1; 32])).is_err());
    }
    if let Ok(signed) = SignedRevocations::from_bytes(bytes) {
        assert!(signed.verify(mesh).is_err());
    }
});
