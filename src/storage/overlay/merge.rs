//! Several layers made one.

use std::fs::File;

use super::OverlayError;
use super::bitmap::Bitmap;
use super::format::{BLOCK, Geometry, create, while_doing};
use super::frozen::Frozen;
use crate::storage::space::{copy, data_extents};

/// Makes one layer of `layers` (newest first, readable; at least one, at most `MAX_LAYERS`) that follow each other in a
/// disk: each block is what the newest that has it says, holes stay holes, and discarded blocks stay discarded. It is
/// written into `out`, whatever that held, and is on the medium on return. The layers stay as they are: whoever
/// takes `out` for them does so afterwards, so that a crash at any point leaves one or the other.
///
/// Blocks for as long as the copying takes.
pub fn merge(layers: &[&File], out: &File) -> Result<(), OverlayError> {
    let (geometry, frozen) = Frozen::share(layers)?;
    let Geometry { disk_bytes, base_bytes, base_sha256 } = geometry;
    create(out, disk_bytes, base_bytes, base_sha256)?;
    let mut bitmap = Bitmap::new(geometry.blocks());
    let (mut block, blocks) = (0, geometry.blocks());
    while block < blocks {
        let (layer, end) = frozen.run(block, blocks);
        if let Some(layer) = layer {
            let place = |block: u64| geometry.data_offset() + block * BLOCK;
            let failed = "copying blocks into the merged layer";
            for extent in data_extents(layer, place(block)..place(end)) {
                let extent = extent.map_err(while_doing(failed))?;
                copy(layer, extent.start, out, extent.start, extent.end - extent.start).map_err(while_doing(failed))?;
            }
            (block..end).for_each(|block| bitmap.set(block));
        }
        block = end;
    }
    // As everywhere: data before its bits.
    out.sync_data().map_err(while_doing("syncing the merged layer's blocks"))?;
    bitmap.write(out).map_err(while_doing("writing the merged layer's bitmap"))?;
    out.sync_all().map_err(while_doing("syncing the merged layer"))
}
