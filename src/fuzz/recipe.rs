//! Recipes, images' documents, and the headers of archives: whatever they say, they are read or refused, within their limits.

use std::fs::File;
use std::io::Read;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::archive::{Archive, MAX_PATH};
use crate::recipe::dockerfile::{self, MAX_STEPS};
use crate::recipe::ignore::{Held, Ignore};
use crate::recipe::image::{self, MAX_LAYERS};
use crate::recipe::store::Store;
use crate::storage::template_file;
use crate::storage::templates::TemplateError;

/// The first octet says what the rest is.
pub fn recipe(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else { return };
    match kind % 4 {
        0 => {
            ignored(rest);
            let Ok(text) = std::str::from_utf8(rest) else { return };
            match dockerfile::parse(text, "D") {
                Ok(recipe) => {
                    assert!(recipe.from_line > 0 && recipe.steps.len() <= MAX_STEPS);
                    let lines = text.lines().count();
                    assert!(recipe.steps.iter().all(|step| (1..=lines).contains(&step.line)));
                    // A value that has what values are of in it is no variable once more.
                    let value = |name: &str| name.len().is_multiple_of(2).then_some("$A/..");
                    assert!(recipe.steps.iter().all(|step| step.what.expanded(&value) != Err(String::new())));
                }
                Err(error) => assert!(error.place.starts_with('D') && !error.message.is_empty()),
            }
        }
        1 if kind & 0x40 != 0 => archived(rest),
        1 => documents(rest),
        2 => carried(rest),
        _ => {
            let mut archive = Archive::new(rest);
            // No entry is shorter than its header.
            for _ in 0..=rest.len() / 512 {
                let Ok(Some(entry)) = archive.next() else { return };
                assert!(
                    !entry.path.is_empty()
                        && entry.path.len() as u64 <= MAX_PATH
                        && entry.link.len() as u64 <= MAX_PATH
                );
                let mut content = Vec::new();
                match archive.read_to_end(&mut content) {
                    Ok(length) => assert_eq!(length as u64, entry.size),
                    Err(_) => return,
                }
            }
            assert!(!matches!(archive.next(), Ok(Some(_))), "more entries than there is room for");
        }
    }
}

/// What COPY leaves out: what is below something that no pattern excepts goes with it.
fn ignored(data: &[u8]) {
    let Ok(ignore) = Ignore::parse(data, "I") else { return };
    let path = &data[..data.len().min(64)];
    let held = ignore.held(path, &Held::default());
    let below = ignore.held(&[path, b"/x"].concat(), &held);
    assert!(ignore.has_exceptions() || ignore.left_out(&held).is_none() || ignore.left_out(&below).is_some());
}

/// A template's file.
fn carried(data: &[u8]) {
    let image = memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).map(File::from);
    let taken = template_file::import(data, |manifest| {
        assert!(manifest.checked().is_ok());
        image.map_err(|_| TemplateError::NameTaken { name: String::new() })
    });
    // Its digest is at its end: nobody guesses it.
    assert!(taken.is_err() || data.starts_with(b"WARRENTP"));
}

/// Documents of an image, each behind its length: they stand in an archive that is a file.
fn documents(data: &[u8]) {
    let mut rest = data;
    let directory = std::env::temp_dir().join(format!("warren-fuzz-recipe-{}", std::process::id()));
    if std::fs::create_dir_all(directory.join("blobs/sha256")).is_err() {
        return;
    }
    for name in ["oci-layout", "index.json", "manifest.json", "one", "two"] {
        let Some((length, behind)) = rest.split_first_chunk::<2>() else { break };
        let length = usize::from(u16::from_le_bytes(*length)).min(behind.len());
        let (content, behind) = behind.split_at(length);
        rest = behind;
        // What has a digest is found by it.
        let digest = crate::recipe::key::hex(&<sha2::Sha256 as sha2::Digest>::digest(content));
        let _ = std::fs::write(directory.join("blobs/sha256").join(&digest), content);
        let _ = std::fs::write(directory.join(name), content);
    }
    assert_image(Store::Directory(directory.clone()));
    let _ = std::fs::remove_dir_all(&directory);
}

/// An archive of an image, as it comes.
fn archived(data: &[u8]) {
    let path = std::env::temp_dir().join(format!("warren-fuzz-recipe-{}.tar", std::process::id()));
    if std::fs::write(&path, data).is_ok()
        && let Ok(store) = Store::of_archive(&path)
    {
        assert_image(store);
    }
    let _ = std::fs::remove_file(&path);
}

fn assert_image(store: Store) {
    if let Ok(image) = image::of_store(store, None) {
        assert!(image.layers.len() <= MAX_LAYERS);
        for layer in &image.layers {
            let Ok(mut open) = layer.open(&image.store) else { continue };
            let mut content = Vec::new();
            if open.read_to_end(&mut content).is_ok()
                && let Some(expected) = &layer.sha256
                && !content.is_empty()
            {
                assert_eq!(crate::recipe::key::hex(&<sha2::Sha256 as sha2::Digest>::digest(&content)), *expected);
            }
        }
    }
}
