//! Templates as they are made here: from a disk that was filled, from another template under a further name, from a file that
//! carries one between nodes; and how they go.
//!
//! A template's folder is made under a name that no template can have (`staged`), and gets its own only when all of it is on
//! the medium. What has such a name at a start of the supervisor is nobody's.
//!
//! The file that carries a template, little endian:
//!
//! | octets | field |
//! |---|---|
//! | 8 | magic `WARRENTP` |
//! | 4 | version, 1 |
//! | 4 | length of the manifest, at most 64 KiB |
//! | | the manifest (TOML), with size and digest of the image |
//! | 8, 4, … | a run of the image: offset and length, multiples of 4096, at most 1 MiB long; its octets. Runs rise; what is in none is zeroes |
//! | 8, 4 | the end: 2^64-1 and 0 |
//! | 32 | SHA-256 of all before it |

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use super::overlay::{Overlay, OverlayError};
use super::template_disk::{put_in_place, write_manifest, write_sparsely};
use super::templates::{BLOCK, IMAGE, Manifest, Origin, Template, TemplateError, load, verify};

const MAGIC: [u8; 8] = *b"WARRENTP";
/// The only one so far.
pub const VERSION: u32 = 1;
const MAX_MANIFEST: u32 = 64 * 1024;
const CHUNK: usize = 1024 * 1024;
const END: u64 = u64::MAX;
/// Names of folders that are no templates' yet begin so.
const STAGED: &str = ".build-";

/// Where a template is made that has no name yet.
pub fn staged(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{STAGED}{id}"))
}

/// Whether this is what the catalogue calls a template that has no name yet.
pub fn is_staged(name: &str) -> bool {
    name.starts_with(STAGED)
}

/// What the catalogue calls the template that is made as `id`.
pub fn staged_name(id: &str) -> String {
    format!("{STAGED}{id}")
}

/// Takes away what an earlier supervisor left half made. Blocks.
pub fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_staged(&entry.file_name().to_string_lossy())) {
        log::warn!("{}: it was being made when the supervisor before this one ended: it goes", entry.path().display());
        discard(&entry.path());
    }
}

/// Takes a folder away. Blocks.
pub fn discard(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => log::error!("{} stays: {e}", folder.display()),
        _ => {}
    }
}

fn failed<'a>(what: &'a str, path: &'a Path) -> impl Fn(io::Error) -> TemplateError + 'a {
    move |e| TemplateError::io(format_args!("{what} {}", path.display()), &e)
}

fn invalid(what: impl Into<String>) -> TemplateError {
    TemplateError::invalid("the exported template", what)
}

/// Makes the image of a template from all that a disk has, and its folder, which is not there yet. The manifest's digest and
/// size are set. Ends early once `stop` is set. Blocks.
pub fn flatten(
    disk: &Overlay,
    mut manifest: Manifest,
    folder: &Path,
    stop: &AtomicBool,
) -> Result<Template, TemplateError> {
    let made = (|| {
        fs::create_dir_all(folder).map_err(failed("make", folder))?;
        let image = folder.join(IMAGE);
        let new = OpenOptions::new().write(true).create_new(true).open(&image).map_err(failed("make", &image))?;
        manifest.size_bytes = disk.disk_bytes();
        new.set_len(manifest.size_bytes).map_err(failed("make", &image))?;
        let (mut hash, mut chunk, mut at) = (Sha256::new(), vec![0; CHUNK], 0);
        while at < manifest.size_bytes {
            if stop.load(Ordering::Relaxed) {
                return Err(TemplateError::io("go on", &io::ErrorKind::Interrupted.into()));
            }
            let length = usize::try_from(manifest.size_bytes - at).unwrap_or(CHUNK).min(CHUNK);
            let piece = &mut chunk[..length];
            disk.read_at(at, piece).map_err(failed("read the disk for", folder))?;
            hash.update(&*piece);
            write_sparsely(&new, piece, at).map_err(failed("write", &image))?;
            at += length as u64;
        }
        manifest.sha256 = hash.finalize().into();
        new.sync_all().map_err(failed("write", &image))?;
        write_manifest(&manifest, folder)?;
        // What is written must be read again.
        manifest.checked()
    })();
    match made {
        Ok(manifest) => Ok(Template { manifest, folder: folder.to_path_buf(), origin: Origin::Imported }),
        Err(error) => {
            discard(folder);
            Err(error)
        }
    }
}

/// The disk of a sandbox, with nobody who writes to it.
pub fn open_disk(top: &Path, layers: Vec<File>, base: File) -> Result<Overlay, OverlayError> {
    let top = OpenOptions::new().read(true).write(true).open(top);
    let top = top.map_err(|cause| OverlayError::Io { doing: "opening the disk", cause })?;
    Overlay::open(top, layers, base)
}

/// Gives a template that was made its name, in place of one that has it. Blocks.
pub fn publish(template: &Template, folder: &Path) -> Result<Template, TemplateError> {
    let target = folder.join(&template.manifest.name);
    put_in_place(&template.folder, &target)?;
    // The one before it, where there was one.
    discard(&template.folder);
    load(&target, Origin::Imported)
}

/// Takes a template away: first its name, then the rest. Blocks.
pub fn remove(template: &Template, id: &str) -> Result<(), TemplateError> {
    let aside = staged(template.folder.parent().unwrap_or(&template.folder), id);
    fs::rename(&template.folder, &aside).map_err(failed("remove", &template.folder))?;
    discard(&aside);
    Ok(())
}

/// Gives a template a further name; its image is on the disk once. Blocks.
pub fn tag(template: &Template, name: &str, folder: &Path, id: &str) -> Result<Template, TemplateError> {
    let place = staged(folder, id);
    let manifest = Manifest { name: name.to_string(), ..template.manifest.clone() };
    let made = (|| {
        fs::create_dir_all(&place).map_err(failed("make", &place))?;
        let image = place.join(IMAGE);
        if fs::hard_link(template.image(), &image).is_err() {
            // A template that came with the node is on another file system.
            fs::copy(template.image(), &image).map_err(failed("write", &image))?;
        }
        File::open(&image).and_then(|image| image.sync_all()).map_err(failed("write", &image))?;
        write_manifest(&manifest, &place)?;
        publish(&Template { manifest, folder: place.clone(), origin: Origin::Imported }, folder)
    })();
    made.inspect_err(|_| discard(&place))
}

/// Hashes what passes.
struct Summed<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(octets)?;
        self.hash.update(&octets[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(into)?;
        self.hash.update(&into[..got]);
        Ok(got)
    }
}

/// Writes a template, whose image is open, as one file. Blocks.
pub fn export(manifest: &Manifest, image: &File, out: impl Write) -> Result<(), TemplateError> {
    let mut out = Summed { inner: out, hash: Sha256::new() };
    let text = manifest.to_toml()?;
    let written = (|| -> io::Result<()> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(text.len() as u32).to_le_bytes())?;
        out.write_all(text.as_bytes())?;
        let (mut chunk, mut at) = (vec![0; CHUNK], 0);
        while at < manifest.size_bytes {
            let length = usize::try_from(manifest.size_bytes - at).unwrap_or(CHUNK).min(CHUNK);
            let piece = &mut chunk[..length];
            image.read_exact_at(piece, at)?;
            for (from, run) in runs(piece) {
                out.write_all(&(at + from as u64).to_le_bytes())?;
                out.write_all(&(run.len() as u32).to_le_bytes())?;
                out.write_all(run)?;
            }
            at += length as u64;
        }
        out.write_all(&END.to_le_bytes())?;
        out.write_all(&0u32.to_le_bytes())?;
        let digest = out.hash.clone().finalize();
        out.inner.write_all(&digest)?;
        out.inner.flush()
    })();
    written.map_err(|e| TemplateError::io(format_args!("export template {}", manifest.name), &e))
}

/// The runs of blocks that are not all zeroes, with where they begin.
fn runs(piece: &[u8]) -> Vec<(usize, &[u8])> {
    let block = BLOCK as usize;
    let mut found: Vec<(usize, usize)> = Vec::new();
    for at in (0..piece.len()).step_by(block) {
        let end = piece.len().min(at + block);
        if piece[at..end].iter().all(|&octet| octet == 0) {
            continue;
        }
        match found.last_mut() {
            Some((_, before)) if *before == at => *before = end,
            _ => found.push((at, end)),
        }
    }
    found.into_iter().map(|(from, to)| (from, &piece[from..to])).collect()
}

/// Reads a template's file: `place` makes a file of the image's size for a manifest that is right. The image is as the
/// manifest says where that is so. Blocks.
pub fn import(
    from: impl Read,
    place: impl FnOnce(&Manifest) -> Result<File, TemplateError>,
) -> Result<Manifest, TemplateError> {
    let mut from = Summed { inner: from, hash: Sha256::new() };
    let read = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof => invalid("ends too early"),
        _ => TemplateError::io("read the exported template", &e),
    };
    let mut head = [0; 16];
    from.read_exact(&mut head).map_err(read)?;
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (version, length) = (number(8), number(12));
    if head[..8] != MAGIC {
        return Err(invalid("is none: it does not begin as one"));
    }
    if version != VERSION {
        return Err(invalid(format!("is of version {version}, known is {VERSION}")));
    }
    if length > MAX_MANIFEST {
        return Err(invalid(format!("has a manifest of {length} octets, the limit is {MAX_MANIFEST}")));
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text).map_err(read)?;
    let text = String::from_utf8(text).map_err(|_| invalid("has a manifest that is not UTF-8"))?;
    let manifest = Manifest::parse(&text, "the exported template")?;
    let image = place(&manifest)?;
    let (mut chunk, mut done) = (vec![0; CHUNK], 0);
    loop {
        let mut run = [0; 12];
        from.read_exact(&mut run).map_err(read)?;
        let offset = u64::from_le_bytes(run[..8].try_into().unwrap_or_default());
        let length = u32::from_le_bytes(run[8..].try_into().unwrap_or_default());
        if offset == END {
            break;
        }
        let end = offset.checked_add(length.into()).filter(|end| *end <= manifest.size_bytes);
        let formed = offset >= done
            && length > 0
            && length as usize <= CHUNK
            && offset.is_multiple_of(BLOCK)
            && u64::from(length).is_multiple_of(BLOCK);
        let Some(end) = end.filter(|_| formed) else {
            return Err(invalid(format!(
                "has a run of {length} octets at {offset}, behind {done}, in an image of {}",
                manifest.size_bytes
            )));
        };
        let piece = &mut chunk[..length as usize];
        from.read_exact(piece).map_err(read)?;
        image.write_all_at(piece, offset).map_err(|e| TemplateError::io("write the image", &e))?;
        done = end;
    }
    let digest: [u8; 32] = from.hash.clone().finalize().into();
    let mut expected = [0; 32];
    from.inner.read_exact(&mut expected).map_err(read)?;
    if digest != expected {
        return Err(invalid("is damaged: its checksum is wrong"));
    }
    if from.inner.read(&mut [0]).map_err(read)? > 0 {
        return Err(invalid("has more behind its end"));
    }
    image.sync_all().map_err(|e| TemplateError::io("write the image", &e))?;
    Ok(manifest)
}

/// Takes a template from a file, under its own name or another, into a folder that has no name yet. Blocks.
pub fn arrive(from: impl Read, name: Option<String>, place: &Path, most: u64) -> Result<Template, TemplateError> {
    let made = (|| {
        let mut manifest = import(from, |manifest| {
            if manifest.size_bytes > most {
                let error = io::Error::from(io::ErrorKind::StorageFull);
                return Err(TemplateError::io(format_args!("make an image of {} octets", manifest.size_bytes), &error));
            }
            fs::create_dir_all(place).map_err(failed("make", place))?;
            let path = place.join(IMAGE);
            let image = OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed("make", &path))?;
            image.set_len(manifest.size_bytes).map_err(failed("make", &path))?;
            Ok(image)
        })?;
        manifest.name = name.unwrap_or(manifest.name);
        write_manifest(&manifest, place)?;
        let template = Template { manifest, folder: place.to_path_buf(), origin: Origin::Imported };
        verify(&template)?;
        Ok(template)
    })();
    made.inspect_err(|_| discard(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene(PathBuf);

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn scene(name: &str) -> Scene {
        let path = std::env::temp_dir().join(format!("warren-template-file-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scene(path)
    }

    fn image() -> Vec<u8> {
        let mut image = vec![0; 3 << 20];
        for (at, value) in [(4096, 1), ((1 << 20) - 1, 2), (1 << 20, 3), ((3 << 20) - 1, 4)] {
            image[at] = value;
        }
        image
    }

    /// A template of a disk that has this content.
    fn template(scene: &Scene) -> Template {
        let base = scene.0.join("base");
        fs::write(&base, image()).unwrap();
        let top = scene.0.join("top");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&top).unwrap();
        super::super::overlay::create(&file, 4 << 20, 3 << 20, [0; 32]).unwrap();
        let mut disk = open_disk(&top, Vec::new(), File::open(&base).unwrap()).unwrap();
        disk.write_at((4 << 20) - 4096, &[9; 4096]).unwrap();
        let text = format!("name = \"a\"\nsha256 = \"{}\"\nsize_bytes = 4096\n", "00".repeat(32));
        let manifest = Manifest::parse(&text, "x").unwrap();
        flatten(&disk, manifest, &staged(&scene.0, "one"), &AtomicBool::new(false)).unwrap()
    }

    fn exported(template: &Template) -> Vec<u8> {
        let mut out = Vec::new();
        export(&template.manifest, &File::open(template.image()).unwrap(), &mut out).unwrap();
        out
    }

    #[test]
    fn a_disk_becomes_a_template_that_is_whole() {
        let scene = scene("flatten");
        let made = template(&scene);
        verify(&made).unwrap();
        let content = fs::read(made.image()).unwrap();
        assert_eq!((&content[..3 << 20], &content[(4 << 20) - 4096..]), (image().as_slice(), &[9; 4096][..]));
        let named = publish(&made, &scene.0).unwrap();
        assert_eq!(named.folder, scene.0.join("a"));
        let other = tag(&named, "a:1", &scene.0, "two").unwrap();
        verify(&other).unwrap();
        remove(&named, "three").unwrap();
        verify(&other).unwrap();
        let names: Vec<_> = fs::read_dir(&scene.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| ["a:1", "base", "top"].contains(&name.to_str().unwrap())), "{names:?}");
    }

    #[test]
    fn what_is_stopped_leaves_nothing() {
        let scene = scene("stop");
        let made = template(&scene);
        let disk = open_disk(&scene.0.join("top"), Vec::new(), File::open(scene.0.join("base")).unwrap()).unwrap();
        let place = staged(&scene.0, "stopped");
        assert!(flatten(&disk, made.manifest, &place, &AtomicBool::new(true)).is_err());
        assert!(!place.exists());
        sweep(&scene.0);
        assert!(!made.folder.exists());
    }

    #[test]
    fn a_template_is_read_as_it_was_written_and_damage_is_found() {
        let scene = scene("file");
        let made = template(&scene);
        let file = exported(&made);
        assert!(file.len() < 64 * 1024, "{} octets", file.len());
        let place = staged(&scene.0, "arrived");
        let arrived = arrive(file.as_slice(), Some("b:2".to_string()), &place, u64::MAX).unwrap();
        assert_eq!((arrived.manifest.name.as_str(), arrived.manifest.sha256), ("b:2", made.manifest.sha256));
        discard(&place);
        for at in (0..file.len()).step_by(97).chain([file.len() - 1]) {
            let mut damaged = file.clone();
            damaged[at] ^= 0x40;
            assert!(arrive(damaged.as_slice(), None, &place, u64::MAX).is_err(), "octet {at}");
            assert!(arrive(&file[..at], None, &place, u64::MAX).is_err(), "cut at {at}");
            assert!(!place.exists());
        }
        assert!(arrive([file.as_slice(), b"x"].concat().as_slice(), None, &place, u64::MAX).is_err());
        let error = arrive(file.as_slice(), None, &place, 4096).unwrap_err();
        assert!(matches!(error, TemplateError::Io { disk_full: true, .. }), "{error}");
    }
}
