//! Overlays that wait for a sandbox: made, handed out, removed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::exhausted;
use crate::node::start::MIB;
use crate::node::supervisor::{Done, Supervisor};
use crate::pool::Item;
use crate::sandbox::id::SandboxId;
use crate::storage::overlay;
use crate::wire::{Code, Error};

/// What an overlay is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::node) struct Shape {
    /// Size of the disk, in octets.
    pub disk_bytes: u64,
    /// Size of the image below, in octets.
    pub base_bytes: u64,
    /// Digest of that image.
    pub base_sha256: [u8; 32],
}

impl Shape {
    fn write(&self, file: &File) -> io::Result<()> {
        let made = overlay::create(file, self.disk_bytes, self.base_bytes, self.base_sha256);
        made.map_err(|e| io::Error::other(e.to_string()))
    }
}

/// An overlay that waits for a sandbox.
#[derive(Debug)]
pub(super) struct Blank {
    path: PathBuf,
    file: File,
    shape: Shape,
}

impl Blank {
    pub fn name(&self) -> Option<String> {
        Some(self.path.file_name()?.to_str()?.to_string())
    }
}

impl Supervisor {
    /// Sees to it that a sandbox has an overlay. `false` when that is still to come.
    pub(in crate::node) fn has_overlay(&mut self, id: &SandboxId, shape: Shape) -> bool {
        let now = Instant::now();
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        if sandbox.held.blank.is_some() || sandbox.comes_back() {
            return true;
        }
        if std::mem::replace(&mut sandbox.held.asked, true) {
            return false;
        }
        self.pools.shape = Some(shape);
        let taken = self.pools.overlays.take(now);
        match &taken {
            Some(item) => {
                sandbox.held.asked = false;
                sandbox.held.overlay_place = Some(item.number);
            }
            None => self.pools.overlays.wait(id.clone(), now),
        }
        let has = taken.is_some();
        sandbox.held.blank = taken;
        self.refill_later();
        has
    }

    /// Moves a sandbox's overlay into its home. One that is started again has it there.
    pub(in crate::node) fn take_blank(&mut self, id: &SandboxId, shape: Shape) -> io::Result<File> {
        let sandbox = self.sandboxes.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
        if sandbox.comes_back() {
            return OpenOptions::new().read(true).write(true).open(sandbox.home.overlay());
        }
        let Item { thing: Blank { path, file, shape: made_for }, .. } =
            sandbox.held.blank.take().ok_or(io::ErrorKind::NotFound)?;
        let ready = if made_for == shape { Ok(()) } else { shape.write(&file) };
        let moved = ready.and_then(|()| sandbox.home.take_overlay(&path));
        if moved.is_err() {
            remove_files(vec![path]);
        }
        moved.map(|()| file)
    }

    /// A thread made an overlay, or could not.
    pub(in crate::node) fn overlay_made(&mut self, place: u32, path: PathBuf, shape: Shape, result: io::Result<File>) {
        self.pools.look = true;
        let now = Instant::now();
        match result {
            Ok(file) => {
                let item = Item { number: place, thing: Blank { path, file, shape }, made: now };
                self.pools.overlays.made(item, now);
                if self.stopping.is_some() {
                    self.drain_pools();
                }
            }
            Err(e) => self.no_overlay(place, &e),
        }
    }

    fn no_overlay(&mut self, place: u32, error: &io::Error) {
        log::error!("an overlay cannot be made: {error}");
        self.pools.overlays.failed(place, error.to_string(), Instant::now());
        for id in self.pools.overlays.give_up() {
            self.fail_start(&id, Error::new(Code::NoCapacity, format!("overlay: {error}")).with("resource", "overlay"));
        }
    }

    pub(super) fn drop_blank(&mut self, Item { number, thing, .. }: Item<Blank>) {
        remove_files(vec![thing.path]);
        self.pools.overlays.freed(number);
    }

    pub(super) fn tend_overlays(&mut self, now: Instant) {
        while let Some((id, item)) = self.pools.overlays.serve(now) {
            let Some(sandbox) = self.sandboxes.get_mut(&id) else {
                self.pools.overlays.put_back(item, now);
                continue;
            };
            sandbox.held.overlay_place = Some(item.number);
            sandbox.held.blank = Some(item);
            self.schedule_or_fail(&id);
        }
        for id in self.pools.overlays.too_late(now) {
            self.fail_start(&id, exhausted("overlay", "overlay_pool.max", self.pools.overlays.limits()));
        }
        for item in self.pools.overlays.expired(now) {
            self.drop_blank(item);
        }
        let early = now < self.pools.refill && !self.pools.overlays.is_waited_for();
        let Some(shape) = self.pools.shape.or_else(|| self.usual_shape()) else { return };
        if early || self.stopping.is_some() {
            return;
        }
        while let Some(place) = self.pools.overlays.wanted(now) {
            if let Err(e) = self.make_overlay(place, shape) {
                self.no_overlay(place, &e);
            }
        }
    }

    /// What a sandbox of which nothing is said has.
    fn usual_shape(&self) -> Option<Shape> {
        let manifest = &self.catalogue.get("base").ok()?.manifest;
        let extra = self.config.sandbox.default_extra_disk_mib;
        let disk_bytes = (manifest.size_bytes.div_ceil(MIB) + extra) * MIB;
        Some(Shape { disk_bytes, base_bytes: manifest.size_bytes, base_sha256: manifest.sha256 })
    }

    fn make_overlay(&self, place: u32, shape: Shape) -> io::Result<()> {
        let path = self.pools.directory.join(SandboxId::random()?.as_str());
        self.background.run("overlay", move || {
            let result = new_overlay(&path, &shape);
            Done::OverlayMade { place, path, shape, result }
        })
    }
}

fn new_overlay(path: &Path, shape: &Shape) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
    if let Err(e) = shape.write(&file) {
        let _ = fs::remove_file(path);
        return Err(e);
    }
    Ok(file)
}

/// Removes files on a thread of its own: a large one takes its time.
pub(super) fn remove_files(files: Vec<PathBuf>) {
    if files.is_empty() {
        return;
    }
    let body = move || {
        for file in files {
            if let Err(e) = fs::remove_file(&file) {
                log::error!("{}: {e}", file.display());
            }
        }
    };
    if let Err(e) = std::thread::Builder::new().name("overlays".to_string()).stack_size(64 * 1024).spawn(body) {
        // The next supervisor removes them.
        log::warn!("no thread to remove overlays: {e}");
    }
}
