//! What a node keeps on its data partition.

pub mod overlay;
