//! What templates are built from: recipes (a part of what a Dockerfile may say) and container images on disk (OCI image layout,
//! docker-archive). All of it is hostile: sizes are checked before use, digests when something is read, and every error names
//! its place, the value and the limit. No layer is looked into here: `mason` does that, inside the builder.

pub mod dockerfile;
pub mod ignore;
pub mod image;
pub mod key;
pub mod store;
pub mod words;

use std::fmt;

/// Why something cannot be built from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeError {
    /// File, and line or entry.
    pub place: String,
    /// What is wrong, with the value and the limit.
    pub message: String,
    /// Content is other than its digest says.
    pub damaged: bool,
}

impl RecipeError {
    /// Something breaks a rule.
    pub fn new(place: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { place: place.to_string(), message: message.into(), damaged: false }
    }

    /// Something is not what its digest says.
    pub fn damaged(place: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { damaged: true, ..Self::new(place, message) }
    }
}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

impl std::error::Error for RecipeError {}
