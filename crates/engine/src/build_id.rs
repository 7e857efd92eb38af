//! Which engines give the same bits.
//!
//! In exact mode a token depends on the weights, the request, and the floating-point sums of the kernels. llama.cpp
//! chooses its CPU kernels when it is compiled (`llama-cpp-sys-2` passes on the target features of this build), so those
//! count that the build has, not those that the processor has. The C library is another matter: glibc chooses its
//! `expf` and `cosf` when it runs, by whether the processor has fused multiply-add.
//!
//! Equal names are needed for equal bits. They are not proof: the compiler of llama.cpp and the version of the C library
//! are not in them.

/// Most bytes of a build's name.
pub const BUILD_ID_BYTES_MAX: usize = 64;

/// The version of `llama-cpp-sys-2`, which holds the source of llama.cpp. A test compares it with `Cargo.lock`.
const LLAMA_CPP_VERSION: &str = "0.1.161";

/// Names what must be equal for bit-equal results, in at most [`BUILD_ID_BYTES_MAX`] bytes: versions of engine and
/// llama.cpp, processor and C library (or system), the kernels' instruction sets, back ends.
/// `0.1.0/0.1.161/x86_64-gnu/avx512,vnni/cpu`, for instance.
pub fn build_id() -> String {
    let library = if cfg!(target_os = "macos") {
        "macos"
    } else if cfg!(target_env = "musl") {
        "musl"
    } else if cfg!(target_env = "gnu") {
        "gnu"
    } else {
        std::env::consts::OS
    };
    compose(std::env::consts::ARCH, library, &present(&instruction_sets()), &present(&BACK_ENDS))
}

fn compose(processor: &str, library: &str, instruction_sets: &str, back_ends: &str) -> String {
    let back_ends = if back_ends.is_empty() { "cpu" } else { back_ends };
    let engine = env!("CARGO_PKG_VERSION");
    format!("{engine}/{LLAMA_CPP_VERSION}/{processor}-{library}/{instruction_sets}/{back_ends}")
}

fn present(features: &[(&'static str, bool)]) -> String {
    let names = features.iter().filter(|(_, is_present)| *is_present).map(|(name, _)| *name);
    names.collect::<Vec<_>>().join(",")
}

/// Besides the processor.
const BACK_ENDS: [(&str, bool); 4] = [
    ("cuda", cfg!(feature = "cuda")),
    ("metal", cfg!(feature = "metal")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("rocm", cfg!(feature = "rocm")),
];

/// Those that ggml has kernels for. One that implies others stands for them.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
fn instruction_sets() -> [(&'static str, bool); 7] {
    let avx512 = cfg!(target_feature = "avx512f");
    [
        ("avx512", avx512),
        ("vbmi", cfg!(target_feature = "avx512vbmi")),
        ("vnni", cfg!(any(target_feature = "avx512vnni", target_feature = "avxvnni"))),
        ("bf16", cfg!(target_feature = "avx512bf16")),
        ("avx2", cfg!(target_feature = "avx2") && !avx512),
        ("avx", cfg!(target_feature = "avx") && !cfg!(target_feature = "avx2")),
        ("fma", std::is_x86_feature_detected!("fma") && !avx512),
    ]
}

/// Those that ggml has kernels for.
#[cfg(target_arch = "aarch64")]
fn instruction_sets() -> [(&'static str, bool); 4] {
    [
        ("neon", cfg!(target_feature = "neon")),
        ("dotprod", cfg!(target_feature = "dotprod")),
        ("i8mm", cfg!(target_feature = "i8mm")),
        ("sve", cfg!(target_feature = "sve")),
    ]
}

/// No others are known.
#[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
fn instruction_sets() -> [(&'static str, bool); 0] {
    []
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_llama_cpp_is_the_one_that_is_built() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock")).unwrap();
        let (_, package) = lock.split_once("name = \"llama-cpp-sys-2\"\n").unwrap();
        assert_eq!(package.lines().next(), Some(format!("version = \"{LLAMA_CPP_VERSION}\"").as_str()));
    }

    #[test]
    fn the_name_is_short_printable_and_always_the_same() {
        let id = build_id();
        assert_eq!(id, build_id());
        assert!(id.len() <= BUILD_ID_BYTES_MAX && id.bytes().all(|b| b.is_ascii_graphic()), "{id}");
        assert!(id.contains(std::env::consts::ARCH), "{id}");
    }

    #[test]
    fn the_longest_names_fit() {
        for (processor, library, sets) in
            [("x86_64", "musl", "avx512,vbmi,vnni,bf16"), ("aarch64", "musl", "neon,dotprod,i8mm,sve")]
        {
            let id = compose(processor, library, sets, "cuda,vulkan");
            assert!(id.len() <= BUILD_ID_BYTES_MAX, "{id}");
        }
    }
}
