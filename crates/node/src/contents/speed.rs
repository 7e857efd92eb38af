//! How fast models are on this machine, or would be: for whoever chooses one.

use murmur_protocol::mesh::{MachineSpeed, ModelDigest};
use serde_json::{Value, json};

use crate::{Node, fit, measure, mesh::ring::facts::token_us, model::Model, status::per_second};

/// What this machine knows of its speed and its memory at one moment.
pub(super) struct Speeds {
    machine: MachineSpeed,
    /// Models that are loaded here whole, and what a token of a lone answer has taken, in us; `None`: none has been measured.
    loaded: Vec<(ModelDigest, Option<u64>)>,
    /// Memory that models can still have.
    free_bytes: u64,
}

impl Speeds {
    /// Those of a node. The first call in the life of a process may measure its machine, which blocks for a moment.
    pub(super) fn of(node: &Node) -> Speeds {
        let options = node.options();
        let loaded = |model: &Model| {
            let loaded = model.loaded().filter(|_| !model.is_spread())?;
            Some((model.identity()?.digest, loaded.engine.status().counters.us_per_token()))
        };
        Speeds {
            machine: node.machine().unwrap_or_else(|| measure::machine(options.threads)),
            loaded: node.models.iter().filter_map(loaded).collect(),
            free_bytes: fit::available_bytes().unwrap_or(u64::MAX).min(options.max_memory_bytes.unwrap_or(u64::MAX)),
        }
    }

    /// Tokens of a lone answer in a second, and whether that is an estimate. Null: the model does not fit.
    pub(super) fn view(&self, digest: ModelDigest, file_bytes: u64) -> Value {
        let loaded = self.loaded.iter().find(|(of, _)| *of == digest);
        let view =
            |tokens_per_s: f64, is_estimate: bool| json!({"tokens_per_s": tokens_per_s, "is_estimate": is_estimate});
        if let Some(measured) = loaded.and_then(|(_, us)| per_second((*us)?)) {
            return view(measured, false);
        }
        let fits = loaded.is_some() || fit::estimated_bytes(file_bytes) <= self.free_bytes;
        fits.then(|| view(1e6 / token_us(Some(self.machine), file_bytes).max(1.0), true)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn digest(number: u8) -> ModelDigest {
        ModelDigest::from_bytes([number; 32])
    }

    #[test]
    fn what_was_measured_counts_else_what_the_machine_reads_in_a_second_and_nothing_where_the_model_does_not_fit() {
        let machine = MachineSpeed { read_bytes_per_s: 10 * GIB, multiply_adds_per_s: 100 * GIB };
        let speeds =
            Speeds { machine, loaded: vec![(digest(1), Some(20_000)), (digest(2), None)], free_bytes: 8 * GIB };
        let tokens_per_s = |view: &Value| view["tokens_per_s"].as_f64().unwrap();
        let measured = speeds.view(digest(1), 100 * GIB);
        assert_eq!((tokens_per_s(&measured), &measured["is_estimate"]), (50.0, &json!(false)));
        let estimated = speeds.view(digest(3), 5 * GIB);
        assert!((tokens_per_s(&estimated) - 2.0).abs() < 1e-6 && estimated["is_estimate"] == true, "{estimated}");
        // What it takes besides its file does not fit; what is loaded does.
        assert_eq!(speeds.view(digest(3), 15 * GIB / 2), Value::Null);
        assert_eq!(speeds.view(digest(2), 20 * GIB)["is_estimate"], true);
    }
}
