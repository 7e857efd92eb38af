//! What a user calls a model that may be elsewhere.

use std::{fmt, str::FromStr};

use murmur_store::{HubRef, ModelName, StoreError};

/// A model by one of its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sought {
    /// As nodes of the mesh call it.
    Name(ModelName),
    /// As a hub calls it.
    Hub(HubRef),
}

impl FromStr for Sought {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        match text.starts_with("hf:") {
            true => text.parse().map(Self::Hub),
            false => text.parse().map(Self::Name),
        }
    }
}

impl fmt::Display for Sought {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Hub(reference) => reference.fmt(f),
        }
    }
}
