//! HTTP dialects of a node.
pub mod backend;
