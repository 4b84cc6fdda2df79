//! Import of templates from a template disk: a block device whose first block names raw images on it.
//!
//! ```text
//! warren-template-disk 1
//! header_bytes = 4096
//! [[template]]
//! name = "python"        # a manifest's keys, and
//! offset = 4096          # where the image begins, a multiple of 4096
//! ```
//! padded with NUL to `header_bytes` (a multiple of 4,096, at most 1 MiB); the images lie at their offsets.
//!
//! An image is hashed while it is copied to a folder NAME.tmp, which gets its name only when everything in it is
//! right and on the medium. So a power cut or a bad image leaves nothing that looks like a template.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::languages::Languages;
use super::templates::{
    BLOCK, Build, Defaults, IMAGE, MANIFEST, Manifest, Origin, RawManifest, Template, TemplateError, check_hash, load,
};

const MAGIC: &[u8] = b"warren-template-disk 1\n";
const MAX_HEADER: u64 = 1024 * 1024;
const MAX_TEMPLATES: usize = 1024;
const CHUNK: usize = 1024 * 1024;

/// What an import tells while it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateEvent {
    /// About every 64 MiB of a long copy.
    Progress {
        /// Name of the template.
        name: String,
        /// Octets done.
        done: u64,
        /// Octets in all.
        total: u64,
    },
    /// A new template can be used.
    Imported {
        /// It.
        template: Template,
    },
    /// It was imported before.
    Skipped {
        /// Name of the template.
        name: String,
    },
    /// Something could not be imported; the rest goes on.
    Failed {
        /// The device.
        device: PathBuf,
        /// Name of the template, where the header could be read that far.
        name: Option<String>,
        /// Why.
        error: TemplateError,
    },
    /// The last event.
    Finished,
}

/// Where to import to.
#[derive(Debug, Clone)]
pub struct Target {
    /// The folder of imported templates, /data/templates. It is made when it is not there.
    pub folder: PathBuf,
    /// Names that an import may not take: those of built-in templates.
    pub reserved: Vec<String>,
}

/// Imports from all `devices` that are template disks (others are passed over) on a thread of its own.
/// `report` is called on that thread.
pub fn import_in_background(
    devices: Vec<PathBuf>,
    target: Target,
    report: impl Fn(TemplateEvent) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("template-import".to_string()).spawn(move || import(&devices, &target, &report))
}

/// The same on this thread.
pub fn import(devices: &[PathBuf], target: &Target, report: &impl Fn(TemplateEvent)) {
    remove_leftovers(&target.folder);
    let mut seen = target.reserved.clone();
    for device in devices {
        // A drive without medium or one that is in use otherwise is no template disk.
        let Ok(file) = File::open(device) else { continue };
        let failed = |name: Option<String>, error| TemplateEvent::Failed { device: device.clone(), name, error };
        let entries = match read_header(&file, device) {
            Ok(None) => continue,
            Ok(Some(entries)) => entries,
            Err(error) => {
                report(failed(None, error));
                continue;
            }
        };
        for (name, entry) in entries {
            let result = entry.and_then(|entry| {
                if seen.contains(&entry.manifest.name) {
                    return Err(TemplateError::NameTaken { name: entry.manifest.name });
                }
                seen.push(entry.manifest.name.clone());
                import_one(&file, device, &entry, target, report)
            });
            report(result.unwrap_or_else(|error| failed(name, error)));
        }
    }
    report(TemplateEvent::Finished);
}

/// One image on the disk.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    manifest: Manifest,
    offset: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    header_bytes: u64,
    #[serde(default)]
    template: Vec<toml::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    name: String,
    #[serde(default)]
    description: String,
    sha256: String,
    size_bytes: u64,
    #[serde(default)]
    defaults: Defaults,
    #[serde(default)]
    languages: Languages,
    #[serde(default)]
    build: Build,
    offset: u64,
}

/// Each entry by itself, with its name where it has one: a bad one does not spoil the others.
type Entries = Vec<(Option<String>, Result<Entry, TemplateError>)>;

/// `None` where the device is no template disk.
fn read_header(device: &File, path: &Path) -> Result<Option<Entries>, TemplateError> {
    let mut first = [0; BLOCK as usize];
    if device.read_exact_at(&mut first, 0).is_err() || !first.starts_with(MAGIC) {
        return Ok(None);
    }
    let length = header_bytes(&first)
        .ok_or_else(|| TemplateError::invalid(path.display(), "no line `header_bytes = N` after the first"))?;
    if length == 0 || length > MAX_HEADER || !length.is_multiple_of(BLOCK) {
        return Err(TemplateError::invalid(
            path.display(),
            format!("header_bytes {length} is no multiple of {BLOCK} between {BLOCK} and {MAX_HEADER}"),
        ));
    }
    let mut header = vec![0; length as usize];
    device
        .read_exact_at(&mut header, 0)
        .map_err(|error| TemplateError::io(format_args!("read the header of {}", path.display()), &error))?;
    parse_header(&header, path).map(Some)
}

/// The number in the second line.
fn header_bytes(first: &[u8]) -> Option<u64> {
    let rest = first.strip_prefix(MAGIC)?;
    let line = rest.split(|&b| b == b'\n').next()?;
    let value = std::str::from_utf8(line).ok()?.strip_prefix("header_bytes")?.trim_start().strip_prefix('=')?;
    value.trim().parse().ok()
}

/// Parses a whole header of octets that anybody may have written.
fn parse_header(header: &[u8], path: &Path) -> Result<Entries, TemplateError> {
    let bad = |message: String| TemplateError::invalid(path.display(), message);
    let text = header.strip_prefix(MAGIC).ok_or_else(|| bad("is no template disk".to_string()))?;
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    if text[end..].iter().any(|&b| b != 0) {
        return Err(bad("header goes on after its padding began".to_string()));
    }
    let text = std::str::from_utf8(&text[..end]).map_err(|_| bad("header is not UTF-8".to_string()))?;
    let raw: RawHeader = toml::from_str(text)
        .map_err(|error| bad(format!("header: {}", error.to_string().trim().replace('\n', "; "))))?;
    if raw.header_bytes != header.len() as u64 {
        return Err(bad(format!("header_bytes {} is not the header's {}", raw.header_bytes, header.len())));
    }
    if raw.template.len() > MAX_TEMPLATES {
        return Err(bad(format!("{} templates are over the limit of {MAX_TEMPLATES}", raw.template.len())));
    }
    let entries = raw.template.into_iter().enumerate().map(|(index, value)| {
        let name = value.get("name").and_then(toml::Value::as_str).map(str::to_string);
        let place = format!("{}: template {}", path.display(), index + 1);
        (name, parse_entry(value, raw.header_bytes, &place))
    });
    Ok(entries.collect())
}

fn parse_entry(value: toml::Value, header_bytes: u64, place: &str) -> Result<Entry, TemplateError> {
    let RawEntry { name, description, sha256, size_bytes, defaults, languages, build, offset } = value
        .try_into()
        .map_err(|error: toml::de::Error| TemplateError::invalid(place, error.message().replace('\n', "; ")))?;
    let manifest =
        Manifest::check(RawManifest { name, description, sha256, size_bytes, defaults, languages, build }, place)?;
    if !offset.is_multiple_of(BLOCK) || offset < header_bytes || offset.checked_add(manifest.size_bytes).is_none() {
        return Err(TemplateError::invalid(
            place,
            format!("offset {offset} is no multiple of {BLOCK} behind the header of {header_bytes} octets"),
        ));
    }
    Ok(Entry { manifest, offset })
}

fn import_one(
    device: &File,
    path: &Path,
    entry: &Entry,
    target: &Target,
    report: &impl Fn(TemplateEvent),
) -> Result<TemplateEvent, TemplateError> {
    let name = &entry.manifest.name;
    let folder = target.folder.join(name);
    // What was built here is not what a disk that stays attached brings again at each start.
    let stays = |there: &Template| there.manifest.sha256 == entry.manifest.sha256 || !there.manifest.build.is_none();
    if load(&folder, Origin::Imported).is_ok_and(|there| stays(&there)) {
        return Ok(TemplateEvent::Skipped { name: name.clone() });
    }
    let temporary = target.folder.join(format!("{name}.tmp"));
    fs::create_dir_all(&temporary)
        .map_err(|error| TemplateError::io(format_args!("make {}", temporary.display()), &error))?;
    let done = copy_image(device, path, entry, &temporary.join(IMAGE), report)
        .and_then(|()| write_manifest(&entry.manifest, &temporary))
        .and_then(|()| put_in_place(&temporary, &folder));
    // What is left under the temporary name is a failed import or the predecessor.
    let _ = fs::remove_dir_all(&temporary);
    done?;
    Ok(TemplateEvent::Imported { template: load(&folder, Origin::Imported)? })
}

/// Copies the image, leaving holes for zeros, and checks its hash.
fn copy_image(
    device: &File,
    path: &Path,
    entry: &Entry,
    image: &Path,
    report: &impl Fn(TemplateEvent),
) -> Result<(), TemplateError> {
    let total = entry.manifest.size_bytes;
    let write_failed = |error: io::Error| TemplateError::io(format_args!("write {}", image.display()), &error);
    let output = OpenOptions::new().write(true).create(true).truncate(true).open(image).map_err(write_failed)?;
    output.set_len(total).map_err(write_failed)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut done = 0;
    while done < total {
        let piece = &mut chunk[..usize::try_from(total - done).unwrap_or(CHUNK).min(CHUNK)];
        device.read_exact_at(piece, entry.offset + done).map_err(|error| {
            TemplateError::io(format_args!("read {} at {}", path.display(), entry.offset + done), &error)
        })?;
        hash.update(&*piece);
        write_sparsely(&output, piece, done).map_err(write_failed)?;
        done += piece.len() as u64;
        if done.is_multiple_of(64 * CHUNK as u64) && done < total {
            report(TemplateEvent::Progress { name: entry.manifest.name.clone(), done, total });
        }
    }
    check_hash(&entry.manifest, hash.finalize().into())?;
    output.sync_all().map_err(write_failed)
}

/// Writes the blocks that are not all zero, neighbours together.
pub(super) fn write_sparsely(output: &File, piece: &[u8], at: u64) -> io::Result<()> {
    let block = BLOCK as usize;
    let mut start = None;
    for (index, octets) in piece.chunks(block).enumerate() {
        let here = index * block;
        match (octets.iter().all(|&b| b == 0), start) {
            (true, Some(from)) => {
                output.write_all_at(&piece[from..here], at + from as u64)?;
                start = None;
            }
            (false, None) => start = Some(here),
            _ => {}
        }
    }
    match start {
        Some(from) => output.write_all_at(&piece[from..], at + from as u64),
        None => Ok(()),
    }
}

pub(super) fn write_manifest(manifest: &Manifest, folder: &Path) -> Result<(), TemplateError> {
    let path = folder.join(MANIFEST);
    let text = manifest.to_toml()?;
    fs::write(&path, text)
        .and_then(|()| File::open(&path)?.sync_all())
        .and_then(|()| File::open(folder)?.sync_all())
        .map_err(|error| TemplateError::io(format_args!("write {}", path.display()), &error))
}

/// Gives the folder its name. A predecessor changes places with it, so that at every instant one of them has the name.
pub(super) fn put_in_place(temporary: &Path, folder: &Path) -> Result<(), TemplateError> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    let renamed = if folder.exists() {
        renameat2(AT_FDCWD, temporary, AT_FDCWD, folder, RenameFlags::RENAME_EXCHANGE).map_err(io::Error::from)
    } else {
        fs::rename(temporary, folder)
    };
    renamed
        .and_then(|()| match folder.parent() {
            Some(parent) => File::open(parent)?.sync_all(),
            None => Ok(()),
        })
        .map_err(|error| TemplateError::io(format_args!("rename to {}", folder.display()), &error))
}

/// What a power cut left of an earlier import.
fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().ends_with(".tmp")
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            log::warn!("cannot remove {}: {error}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::unix::fs::MetadataExt;

    use super::super::templates::{to_hex, verify};
    use super::*;

    struct Scene {
        root: PathBuf,
    }

    impl Scene {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("warren-import-{name}-{}", std::process::id()));
            fs::create_dir_all(&root).unwrap();
            Self { root }
        }

        fn target(&self) -> Target {
            Target { folder: self.root.join("templates"), reserved: vec!["base".to_string()] }
        }

        /// Writes a template disk; each image lies behind the one before, with the hash that `lie` leaves of its own.
        fn disk(&self, file: &str, images: &[(&str, &[u8])], lie: impl Fn(String) -> String) -> PathBuf {
            let mut text = "warren-template-disk 1\nheader_bytes = 4096\n".to_string();
            let mut body = Vec::new();
            for (name, image) in images {
                text += &format!(
                    "[[template]]\nname = {name:?}\nsha256 = {:?}\nsize_bytes = {}\noffset = {}\n",
                    to_hex(&Sha256::digest(image)),
                    image.len(),
                    4096 + body.len()
                );
                body.extend_from_slice(image);
            }
            let mut disk = lie(text).into_bytes();
            disk.resize(4096, 0);
            disk.extend(body);
            let path = self.root.join(file);
            fs::write(&path, disk).unwrap();
            path
        }

        fn import(&self, devices: &[&Path]) -> Vec<TemplateEvent> {
            let events = RefCell::new(Vec::new());
            let devices: Vec<PathBuf> = devices.iter().map(|path| path.to_path_buf()).collect();
            import(&devices, &self.target(), &|event| events.borrow_mut().push(event));
            let mut events = events.into_inner();
            assert_eq!(events.pop(), Some(TemplateEvent::Finished));
            events
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(self.root.join("templates"))
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    /// An image with holes at its begin, in its middle and at its end.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 3 * 1024 * 1024 + 8192];
        for (at, value) in [(4096, 1), (1024 * 1024 - 1, 2), (1024 * 1024, 3), (2_500_000, 4)] {
            image[at] = value;
        }
        image
    }

    #[test]
    fn images_are_imported_sparsely_once() {
        let scene = Scene::new("once");
        let disk = scene.disk("disk", &[("python", &image()), ("tiny", &[7; 4096])], |text| text);
        let other = scene.root.join("other");
        fs::write(&other, [9; 8192]).unwrap();
        let missing = scene.root.join("missing");
        let events = scene.import(&[&missing, &other, &disk]);
        let [TemplateEvent::Imported { template }, TemplateEvent::Imported { template: tiny }] = events.as_slice()
        else {
            panic!("{events:?}")
        };
        assert_eq!((template.manifest.name.as_str(), tiny.manifest.name.as_str()), ("python", "tiny"));
        verify(template).unwrap();
        let meta = fs::metadata(template.image()).unwrap();
        assert_eq!(meta.len(), image().len() as u64);
        assert!(meta.blocks() * 512 <= 64 * 1024, "{} octets on disk", meta.blocks() * 512);
        assert_eq!(scene.names(), ["python", "tiny"]);

        let skipped = |name: &str| TemplateEvent::Skipped { name: name.to_string() };
        assert_eq!(scene.import(&[&disk]), [skipped("python"), skipped("tiny")]);
    }

    #[test]
    fn a_newer_image_takes_the_place_of_the_older() {
        let scene = Scene::new("newer");
        scene.import(&[&scene.disk("old", &[("python", &[1; 4096])], |text| text)]);
        let events = scene.import(&[&scene.disk("new", &[("python", &[2; 8192])], |text| text)]);
        let [TemplateEvent::Imported { template }] = events.as_slice() else { panic!("{events:?}") };
        verify(template).unwrap();
        assert_eq!(fs::read(template.image()).unwrap(), [2; 8192]);
        assert_eq!(scene.names(), ["python"]);
    }

    #[test]
    fn a_bad_image_leaves_nothing_and_harms_no_other() {
        let scene = Scene::new("bad");
        let images: [(&str, &[u8]); 4] =
            [("a", &[1; 4096]), ("b", &[2; 4096]), ("base", &[3; 4096]), ("d", &[4; 4096])];
        let hash = |image: &[u8]| to_hex(&Sha256::digest(image));
        let disk = scene.disk("disk", &images, |text| text.replace(&hash(&[1; 4096]), &hash(&[9; 4096])));
        fs::create_dir_all(scene.root.join("templates/left.tmp/deep")).unwrap(); // of a power cut
        let events = scene.import(&[&disk]);
        assert!(
            matches!(&events[0], TemplateEvent::Failed { name: Some(n), error: TemplateError::WrongHash { .. }, .. } if n == "a"),
            "{events:?}"
        );
        assert!(matches!(&events[1], TemplateEvent::Imported { .. }), "{events:?}");
        assert!(
            matches!(&events[2], TemplateEvent::Failed { error: TemplateError::NameTaken { name }, .. } if name == "base"),
            "{events:?}"
        );
        assert!(matches!(&events[3], TemplateEvent::Imported { .. }), "{events:?}");
        assert_eq!(scene.names(), ["b", "d"]);
    }

    #[test]
    fn an_image_beyond_the_end_of_the_disk_fails() {
        let scene = Scene::new("short");
        let disk =
            scene.disk("disk", &[("a", &[1; 4096])], |text| text.replace("size_bytes = 4096", "size_bytes = 8192"));
        let events = scene.import(&[&disk]);
        assert!(matches!(&events[0], TemplateEvent::Failed { error: TemplateError::Io { .. }, .. }), "{events:?}");
        assert_eq!(scene.names(), [""; 0]);
    }

    #[test]
    fn a_corrupt_header_is_a_typed_error_and_other_disks_go_on() {
        let scene = Scene::new("header");
        let good = scene.disk("good", &[("good", &[1; 4096])], |text| text);
        for (index, (change, to)) in [
            ("header_bytes = 4096", "header_bytes = 4095"),
            ("header_bytes = 4096", "header_bytes = 0"),
            ("header_bytes = 4096", "header_bytes = 99999999999999999999"),
            ("header_bytes = 4096", "header_bytes = 1048576"), // the disk is shorter
            ("header_bytes = 4096", "header_bytes = 2097152"),
            ("header_bytes = 4096", "x = 1"),
            ("[[template]]", "[[templates]]"),
            ("[[template]]", "[[template"),
            ("[[template]]", "\0[[template]]"),
            ("size_bytes", "sise_bytes"),
            ("offset = 4096", "offset = 0"),
            ("offset = 4096", "offset = 4097"),
            ("offset = 4096", "offset = 9223372036854771712"),
            ("offset = 4096", "offset = -4096"),
            ("name = \"bad\"", "name = \"../../bad\""),
            ("name = \"bad\"", "name = 5"),
        ]
        .iter()
        .enumerate()
        {
            let bad = scene.disk("bad", &[("bad", &[1; 4096])], |text| text.replace(change, to));
            let events = scene.import(&[&bad, &good]);
            assert!(matches!(&events[0], TemplateEvent::Failed { device, .. } if *device == bad), "{to}: {events:?}");
            let second = matches!(&events[1], TemplateEvent::Imported { .. } | TemplateEvent::Skipped { .. });
            assert!(second && events.len() == 2, "case {index}: {events:?}");
            assert_eq!(scene.names(), ["good"]);
        }
    }

    #[test]
    fn no_header_makes_the_parser_panic() {
        // A small generator (xorshift) over a good header: every run tries the same damage.
        let scene = Scene::new("fuzz");
        let disk = scene.disk("disk", &[("a", &[1; 4096])], |text| text);
        let good = fs::read(disk).unwrap()[..4096].to_vec();
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        for _ in 0..5000 {
            let mut header = good.clone();
            for _ in 0..=random(4) {
                header[random(200)] = random(256) as u8;
            }
            let _ = parse_header(&header, Path::new("x"));
            let _ = header_bytes(&header);
        }
    }
}
