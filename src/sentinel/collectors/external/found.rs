//! Plugins in the directory: which there are, and whether one has changed.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::sentinel::plugin::Manifest;

/// Plugins and files of one looked at, at most.
const MOST: usize = 1024;

/// A plugin as it is on disk.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    /// Where it is.
    pub directory: PathBuf,
    /// Changes with the manifest and with every file beside it.
    pub hash: [u8; 32],
}

/// Every plugin of a directory by name, and what is wrong with those that are none.
pub fn search(directory: &Path) -> (BTreeMap<String, Found>, Vec<String>) {
    let (mut found, mut wrong) = (BTreeMap::new(), Vec::new());
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) => return (found, vec![format!("{}: {e}", directory.display())]),
    };
    let mut places: Vec<PathBuf> = entries.flatten().take(MOST).map(|entry| entry.path()).collect();
    places.sort();
    for place in places.iter().filter(|place| place.join("plugin.toml").is_file()) {
        match load(place) {
            Ok(plugin) => {
                let name = plugin.manifest.name.clone();
                if let Some(other) = found.insert(name.clone(), plugin) {
                    wrong.push(format!("plugin {name}: is in {} as well", other.directory.display()));
                }
            }
            Err(e) => wrong.push(format!("{}: {e}", place.join("plugin.toml").display())),
        }
    }
    (found, wrong)
}

/// One plugin by its directory.
pub fn load(directory: &Path) -> Result<Found, String> {
    let path = directory.join("plugin.toml");
    let length = std::fs::metadata(&path).map_err(|e| e.to_string())?.len();
    if length > 1024 * 1024 {
        return Err(format!("{length} octets are no manifest"));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
    let manifest = Manifest::parse(&text).map_err(|e| e.to_string())?;
    if manifest.program.is_none() {
        return Err("has no [program]".into());
    }
    let mut hash = Sha256::new();
    hash.update(&text);
    let entries = std::fs::read_dir(directory).map_err(|e| e.to_string())?;
    let mut files: Vec<PathBuf> = entries.flatten().take(MOST).map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        // Not the content: a program may be large, and whoever replaces it changes these.
        if let Ok(data) = std::fs::metadata(&file)
            && data.is_file()
        {
            hash.update(file.as_os_str().as_encoded_bytes());
            for number in
                [data.ino(), data.size(), data.mtime() as u64, data.mtime_nsec() as u64, u64::from(data.mode())]
            {
                hash.update(number.to_le_bytes());
            }
        }
    }
    Ok(Found { manifest: Arc::new(manifest), directory: directory.to_path_buf(), hash: hash.finalize().into() })
}
