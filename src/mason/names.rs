//! Name servers of the builder: an image that brings a file of others does not take them from the steps that follow.

use std::fs;
use std::io;
use std::path::Path;

use super::{Refusal, place};
use crate::guest::read_file;

const PLACE: &str = "/etc/resolv.conf";
/// What the builder had before its first layer, in memory.
const KEPT: &str = "/run/warren/resolv.conf";

/// What /etc/resolv.conf of a builder is. Empty: it has no network, and the image's own is as good as any.
pub(super) struct NameServers(Vec<u8>);

impl NameServers {
    /// Keeps what there is before the first layer: only the agent can have written it then.
    pub fn of_builder() -> Result<Self, Refusal> {
        if !Path::new(KEPT).exists() {
            fs::write(KEPT, read_file(PLACE)).map_err(|e| Refusal::io(KEPT, &e))?;
        }
        Ok(Self(read_file(KEPT)))
    }

    /// Writes it again where a layer has changed it.
    pub fn put_back(&self) -> Result<(), Refusal> {
        if self.0.is_empty() || read_file(PLACE) == self.0 {
            return Ok(());
        }
        let path = Path::new(PLACE);
        if path.parent().is_some_and(|above| !above.is_dir()) {
            return Ok(());
        }
        let written: io::Result<()> = place::clear(path).and_then(|()| fs::write(path, &self.0));
        written.map_err(|e| Refusal::io(PLACE, &e))
    }
}
