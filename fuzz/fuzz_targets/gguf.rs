//! A GGUF file from a stranger: parsing, checking and planning must end without a panic, whatever it holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use murmur_gguf::{Facts, Gguf, allowed_cuts, even_cuts, sliceable};

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_reader(bytes, bytes.len() as u64, "fuzz.gguf") else { return };
    for tensor in gguf.tensors() {
        assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
        assert!(tensor.elements() > 0);
    }
    let _ = gguf.validate_for_engine();
    let _ = Facts::of(&gguf).map(|facts| facts.kv_bytes_per_token_per_layer());
    let _ = sliceable(&gguf);
    let _ = even_cuts(&gguf, 2);
    assert!(allowed_cuts(&gguf).iter().all(|&cut| cut > 0 && Some(cut) < gguf.layer_count()));
});
