//! What a ring is to be like, as it is asked for over HTTP and set for a node.

use std::{fmt, ops::Range, str::FromStr, time::Duration};

use murmur_protocol::mesh::record::REGION_BYTES_MAX;

use crate::fields::shorten;

/// Digits of a node's id.
const NODE_DIGITS: usize = 64;

/// What rings are to be like. What is `None`, or empty, is left open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RingWishes {
    /// So many layers at either end stay on the node whose requests go around; 0: any node may hold them.
    pub keep_ends: Option<u32>,
    /// Most tokens per second of all streams together, instead of least time per token of one.
    pub many_streams: Option<bool>,
    /// First digits, in lower case, of the ids of nodes that must not be used.
    pub exclude: Vec<String>,
    /// Nodes that must be used.
    pub pin: Vec<PlanPin>,
    /// Longest round trip between neighbours in the ring.
    pub rtt_max: Option<Duration>,
    /// Regions of the nodes that may be used; empty: any, also those that do not say where they are.
    pub only_region: Vec<String>,
}

impl RingWishes {
    /// These wishes, and others where they leave something open.
    pub fn or(self, others: &RingWishes) -> RingWishes {
        RingWishes {
            keep_ends: self.keep_ends.or(others.keep_ends),
            many_streams: self.many_streams.or(others.many_streams),
            exclude: if self.exclude.is_empty() { others.exclude.clone() } else { self.exclude },
            pin: if self.pin.is_empty() { others.pin.clone() } else { self.pin },
            rtt_max: self.rtt_max.or(others.rtt_max),
            only_region: if self.only_region.is_empty() { others.only_region.clone() } else { self.only_region },
        }
    }
}

/// A node that must be in a ring, written `ID` or `ID:FIRST-END`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanPin {
    /// The first digits of its id, in lower case.
    pub node: String,
    /// The layers that it must hold; `None`: any. Not empty.
    pub layers: Option<Range<u32>>,
}

impl FromStr for PlanPin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((node, range)) = text.split_once(':') else {
            return Ok(PlanPin { node: node_digits(text)?, layers: None });
        };
        let layers = range.split_once('-').and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?));
        let layers = layers.filter(|layers: &Range<u32>| !layers.is_empty()).ok_or_else(|| {
            let range = shorten(range);
            format!("`{range}` are no layers. Write them as 0-8, the second number being the layer after the last.")
        })?;
        Ok(PlanPin { node: node_digits(node)?, layers: Some(layers) })
    }
}

impl fmt::Display for PlanPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.node)?;
        self.layers.as_ref().map_or(Ok(()), |layers| write!(f, ":{}-{}", layers.start, layers.end))
    }
}

/// The first digits of a node's id, in lower case.
///
/// # Errors
/// Why they are none, for people.
pub fn node_digits(text: &str) -> Result<String, String> {
    if (1..=NODE_DIGITS).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!(
        "`{}` is not how a node's id begins. Give up to {NODE_DIGITS} hex digits of it; `murmur mesh peers` and GET /api/mesh \
         have the ids.",
        shorten(text)
    ))
}

/// The name of a region.
///
/// # Errors
/// Why it is none, for people.
pub fn region(text: &str) -> Result<String, String> {
    let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=REGION_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_name) {
        return Ok(text.to_owned());
    }
    let text = shorten(text);
    Err(format!(
        "`{text}` names no region. Give up to {REGION_BYTES_MAX} small letters, digits and hyphens, such as eu-north."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_written_as_it_is_read() {
        for text in ["01ab", "01:0-8"] {
            assert_eq!(text.parse::<PlanPin>().unwrap().to_string(), text);
        }
        for text in ["", ":0-8", "xy", "01:", "01:8-8", "01:8-0", "01:-8", "01:0-8-9"] {
            assert!(text.parse::<PlanPin>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_wish_goes_before_another_and_leaves_the_rest_to_it() {
        let wishes = RingWishes { keep_ends: Some(0), exclude: vec!["01".into()], ..RingWishes::default() };
        let others = RingWishes {
            keep_ends: Some(2),
            many_streams: Some(true),
            exclude: vec!["02".into()],
            pin: vec!["03".parse().unwrap()],
            rtt_max: None,
            only_region: vec!["eu".into()],
        };
        let both = RingWishes { keep_ends: Some(0), exclude: vec!["01".into()], ..others.clone() };
        assert_eq!(wishes.or(&others), both);
    }
}
