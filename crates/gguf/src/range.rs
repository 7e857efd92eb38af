//! Layer ranges, where a model may be cut, and where to cut it for stages of equal weight.

use std::fmt;
use std::str::FromStr;

use crate::gguf::Gguf;
use crate::slice::{SliceError, Source};

/// Layers `first..end` of a model, counted from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct LayerRange {
    /// The first layer.
    pub first: u32,
    /// The layer after the last.
    pub end: u32,
}

impl LayerRange {
    /// Layers `first..end`.
    pub fn new(first: u32, end: u32) -> Self {
        Self { first, end }
    }

    /// Number of layers.
    pub fn len(self) -> u32 {
        self.end.saturating_sub(self.first)
    }

    /// Whether there is no layer in it.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Whether `layer` is in it.
    pub fn contains(self, layer: u32) -> bool {
        (self.first..self.end).contains(&layer)
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

/// The text is not of the form `first..end`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a layer range; write it as 0..8, the second number being the layer after the last")]
pub struct ParseLayerRangeError(String);

impl FromStr for LayerRange {
    type Err = ParseLayerRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed =
            text.split_once("..").and_then(|(first, end)| Some(Self::new(first.parse().ok()?, end.parse().ok()?)));
        parsed.filter(|range| !range.is_empty()).ok_or_else(|| ParseLayerRangeError(text.to_owned()))
    }
}

/// Whether the model can be cut at all.
pub fn sliceable(gguf: &Gguf) -> Result<(), SliceError> {
    Source::of(gguf).map(|_| ())
}

/// The layers before which the model may be cut, from 1 to the number of layers less one. Empty when it cannot be cut.
pub fn allowed_cuts(gguf: &Gguf) -> Vec<u32> {
    Source::of(gguf).map(|source| source.allowed_cuts()).unwrap_or_default()
}

/// Cuts the model into `stages` ranges so that the slowest stage reads as few bytes per token as possible.
///
/// Counted are the layers and, in the last stage, the head. The embedding is not: a stage reads one row of it per token.
/// Among equally good cuts the earliest are taken.
pub fn even_cuts(gguf: &Gguf, stages: u32) -> Result<Vec<LayerRange>, SliceError> {
    let source = Source::of(gguf)?;
    let allowed = source.allowed_cuts();
    let stages_max = allowed.len() as u32 + 1;
    if stages == 0 || stages > stages_max {
        return Err(SliceError::StageCount { stages, stages_max });
    }
    let mut layer_bytes = vec![0u64; source.facts.layers as usize];
    for tensor in gguf.tensors() {
        if let Some((il, _)) = tensor.layer()
            && let Some(bytes) = layer_bytes.get_mut(il as usize)
        {
            *bytes += tensor.bytes;
        }
    }
    if let Some(last) = layer_bytes.last_mut() {
        *last += gguf.tensor("output.weight").or_else(|| gguf.tensor("token_embd.weight")).map_or(0, |t| t.bytes);
    }
    // Between neighbouring bounds lie the smallest pieces that exist.
    let bounds: Vec<u32> = std::iter::once(0).chain(allowed).chain(std::iter::once(source.facts.layers)).collect();
    let pieces: Vec<u64> = bounds
        .windows(2)
        .map(|pair| layer_bytes.get(pair[0] as usize..pair[1] as usize).unwrap_or_default().iter().sum())
        .collect();
    let cuts = smallest_largest_part(&pieces, stages as usize);
    let edges: Vec<u32> = cuts.iter().filter_map(|&i| bounds.get(i).copied()).collect();
    Ok(edges.windows(2).map(|pair| LayerRange::new(pair[0], pair[1])).collect())
}

/// Splits `weights` into `parts` non-empty runs so that the heaviest is as light as possible; returns `parts + 1` edges.
///
/// `best[p][i]` is the heaviest run of the best split of the first `i` weights into `p` runs.
fn smallest_largest_part(weights: &[u64], parts: usize) -> Vec<usize> {
    let n = weights.len();
    let mut before = vec![0u64; n + 1];
    for (i, weight) in weights.iter().enumerate() {
        before[i + 1] = before[i] + weight;
    }
    let mut best = vec![vec![u64::MAX; n + 1]; parts + 1];
    let mut came_from = vec![vec![0usize; n + 1]; parts + 1];
    best[0][0] = 0;
    for part in 1..=parts {
        for end in part..=n {
            for start in part - 1..end {
                let heaviest = best[part - 1][start].max(before[end] - before[start]);
                if heaviest < best[part][end] {
                    best[part][end] = heaviest;
                    came_from[part][end] = start;
                }
            }
        }
    }
    let mut edges = vec![n];
    let mut end = n;
    for part in (1..=parts).rev() {
        end = came_from[part][end];
        edges.push(end);
    }
    edges.reverse();
    edges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_written_as_first_dot_dot_end() {
        assert_eq!("3..7".parse(), Ok(LayerRange::new(3, 7)));
        assert_eq!(LayerRange::new(3, 7).to_string(), "3..7");
        for bad in ["", "3", "7..3", "3..3", "-1..3", "a..b", "3...7"] {
            assert!(bad.parse::<LayerRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn equal_weights_are_split_evenly() {
        assert_eq!(smallest_largest_part(&[1; 8], 4), [0, 2, 4, 6, 8]);
        assert_eq!(smallest_largest_part(&[1, 1, 1, 9], 2), [0, 1, 4].map(|x| if x == 1 { 3 } else { x }));
    }

    fn heaviest(weights: &[u64], edges: &[usize]) -> u64 {
        edges.windows(2).map(|e| weights[e[0]..e[1]].iter().sum()).max().unwrap()
    }

    fn best_by_trying_all(weights: &[u64], parts: usize) -> u64 {
        if parts == 1 {
            return weights.iter().sum();
        }
        (1..=weights.len() - (parts - 1))
            .map(|i| weights[..i].iter().sum::<u64>().max(best_by_trying_all(&weights[i..], parts - 1)))
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn no_other_split_has_a_lighter_heaviest_part(weights in prop::collection::vec(0u64..50, 1..9), parts in 1usize..9) {
            prop_assume!(parts <= weights.len());
            let edges = smallest_largest_part(&weights, parts);
            prop_assert_eq!(edges.len(), parts + 1);
            prop_assert!(edges.windows(2).all(|e| e[0] < e[1]));
            prop_assert_eq!(heaviest(&weights, &edges), best_by_trying_all(&weights, parts));
        }
    }
}
