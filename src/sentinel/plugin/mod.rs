//! What a plugin says of itself and what it wants to know: the same for those built in and those in a directory.
//!
//! [`Manifest`] is the text form (`plugin.toml`); [`Schema`] checks what a task gives against the declared fields and
//! refuses with the field and the reason. A password's value is in no error, no log and no `Debug` output.

mod manifest;
mod schema;

pub use manifest::{Form, Format, Manifest, ManifestError, Mapping, Program};
pub use schema::{Field, FieldError, FieldType, Schema, Values};
