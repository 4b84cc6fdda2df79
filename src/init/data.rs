//! The data partition: found by its label on any disk, mounted, grown to its device. Without one the node keeps
//! its data in memory and says so.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount as mount_call};

use super::ext4::{self, Superblock};
use crate::storage::block_devices;

const LABEL: &[u8] = b"warren-data";
const FLAGS: MsFlags = MsFlags::MS_NODEV.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NOATIME);
/// Between two looks for a disk that is not there yet.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

struct Partition {
    path: PathBuf,
    device: File,
    superblock: Superblock,
}

/// Mounts the data partition on `target`, or a tmpfs where there is none. Gives `target` where there is something
/// to unmount at the end.
pub fn mount(target: &Path, wait: Duration) -> Option<PathBuf> {
    if let Err(error) = fs::create_dir_all(target) {
        log::error!("cannot make {}: {error}", target.display());
    }
    let partitions = find(wait);
    if partitions.len() > 1 {
        let paths: Vec<_> = partitions.iter().map(|partition| partition.path.display().to_string()).collect();
        log::warn!("several data partitions, the first that mounts is used: {}", paths.join(" "));
    }
    for partition in &partitions {
        match mount_call(Some(&partition.path), target, Some("ext4"), FLAGS, None::<&str>) {
            Ok(()) => {
                log::info!("data partition {} on {}", partition.path.display(), target.display());
                grow(partition, target);
                return Some(target.to_path_buf());
            }
            Err(error) => log::error!("cannot mount data partition {}: {error}", partition.path.display()),
        }
    }
    log::error!("no data partition (ext4 labelled warren-data): data is kept in memory and lost when the node stops");
    let tmpfs = mount_call(Some("tmpfs"), target, Some("tmpfs"), FLAGS, Some("mode=0755"));
    if let Err(error) = tmpfs {
        log::error!("cannot mount tmpfs on {}: {error}", target.display());
    }
    None
}

fn find(wait: Duration) -> Vec<Partition> {
    let deadline = Instant::now() + wait;
    loop {
        let found: Vec<_> = block_devices::list().into_iter().filter_map(look).collect();
        if !found.is_empty() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn look(path: PathBuf) -> Option<Partition> {
    let device = File::open(&path).ok()?;
    let superblock = Superblock::read(&device).filter(|superblock| superblock.label == LABEL)?;
    Some(Partition { path, device, superblock })
}

fn grow(partition: &Partition, target: &Path) {
    let started = Instant::now();
    match File::open(target).and_then(|mounted| ext4::grow(&mounted, &partition.device, &partition.superblock)) {
        Ok(None) => {}
        Ok(Some(octets)) => {
            let ms = started.elapsed().as_millis();
            log::info!("data partition grown to {} MiB in {ms} ms", octets / (1024 * 1024));
        }
        Err(error) => log::error!("cannot grow data partition {}: {error}", partition.path.display()),
    }
}
