//! Templates: a read-only root image and a manifest that says what it is. Built-in ones come with the node,
//! others are imported from a template disk (`template_disk`).
//!
//! A template is a folder NAME with `rootfs.img` and `manifest.toml`. Both may come from a disk that somebody
//! prepared: everything in a manifest is checked, and an image is hashed before it is trusted.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::languages::{self, Languages};

/// Name of the image in a template's folder.
pub const IMAGE: &str = "rootfs.img";
/// Name of the manifest in a template's folder.
pub const MANIFEST: &str = "manifest.toml";
/// Images are multiples of this, in octets.
pub const BLOCK: u64 = 4096;

const MAX_MANIFEST: u64 = 64 * 1024;
const MAX_IMAGE: u64 = 1 << 40;
const MAX_NAME: usize = 63;
const MAX_DESCRIPTION: usize = 1024;
const MAX_ENV: usize = 256;
const MAX_ENV_OCTETS: usize = 4096;
const MAX_PATH: usize = 4095;
const MAX_START: usize = 256;
const MAX_COMMAND: usize = 16 * 1024;

/// What a manifest says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// `[a-z0-9][a-z0-9._-]{0,62}`, and where it has one, `:` and a tag of that form.
    pub name: String,
    /// One line for people, at most 1,024 octets.
    pub description: String,
    /// Of the image.
    pub sha256: [u8; 32],
    /// Of the image; a multiple of 4,096, at most 1 TiB.
    pub size_bytes: u64,
    /// For execs that say nothing else.
    pub defaults: Defaults,
    /// How code is run.
    pub languages: Languages,
    /// Where it was built.
    pub build: Build,
}

/// What a template that was built has besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Build {
    /// Digest of all that it was built from, in hex; empty where it was not built.
    pub key: String,
    /// The command that runs in sandboxes that start from its snapshot, and its arguments; empty where it has none.
    pub start: Vec<String>,
    /// The command, for a shell, that succeeds once the start command is ready; empty where it has none.
    pub ready: String,
}

/// How an exec runs that says nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// User id, and group id.
    pub user: u32,
    /// Working directory, absolute.
    pub cwd: String,
    /// `KEY=value` each.
    pub env: Vec<String>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            user: 1000,
            cwd: "/workspace".to_string(),
            env: vec![
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_string(),
                "HOME=/workspace".to_string(),
            ],
        }
    }
}

/// Where a template comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Part of the node.
    BuiltIn,
    /// From a template disk; verified when it was imported.
    Imported,
}

/// A template that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// What it is.
    pub manifest: Manifest,
    /// Its folder.
    pub folder: PathBuf,
    /// Where it comes from.
    pub origin: Origin,
}

impl Template {
    /// Path of the image.
    pub fn image(&self) -> PathBuf {
        self.folder.join(IMAGE)
    }
}

/// Why a template cannot be used or imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateError {
    /// A manifest or a template disk's header breaks a rule.
    Invalid {
        /// File or device, and entry.
        place: String,
        /// Which rule, with value and limit.
        message: String,
    },
    /// The image is not as long as its manifest says, or no regular file.
    WrongSize {
        /// Name of the template.
        name: String,
        /// Octets in the manifest.
        expected: u64,
        /// Octets found.
        found: u64,
    },
    /// The image is not what its manifest says.
    WrongHash {
        /// Name of the template.
        name: String,
        /// In hex, from the manifest.
        expected: String,
        /// In hex, of the image.
        found: String,
    },
    /// A built-in template, or another one on the same disk, has the name.
    NameTaken {
        /// The name.
        name: String,
    },
    /// Reading or writing failed.
    Io {
        /// What was done to which file.
        action: String,
        /// The system's words.
        message: String,
        /// Whether the data partition is full.
        disk_full: bool,
    },
}

impl TemplateError {
    pub(super) fn io(action: impl fmt::Display, error: &io::Error) -> Self {
        Self::Io {
            action: action.to_string(),
            message: error.to_string(),
            disk_full: error.kind() == io::ErrorKind::StorageFull,
        }
    }

    pub(super) fn invalid(place: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::Invalid { place: place.to_string(), message: message.into() }
    }
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { place, message } => write!(f, "{place}: {message}"),
            Self::WrongSize { name, expected, found } => {
                write!(f, "image of template {name} has {found} octets, its manifest says {expected}")
            }
            Self::WrongHash { name, expected, found } => {
                write!(f, "image of template {name} has sha256 {found}, its manifest says {expected}")
            }
            Self::NameTaken { name } => write!(f, "template name {name} is taken"),
            Self::Io { action, message, .. } => write!(f, "cannot {action}: {message}"),
        }
    }
}

impl std::error::Error for TemplateError {}

/// The manifest as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawManifest {
    pub(super) name: String,
    #[serde(default)]
    pub(super) description: String,
    pub(super) sha256: String,
    pub(super) size_bytes: u64,
    #[serde(default)]
    pub(super) defaults: Defaults,
    #[serde(default)]
    pub(super) languages: Languages,
    #[serde(default, skip_serializing_if = "Build::is_none")]
    pub(super) build: Build,
}

impl Build {
    /// Whether the template was not built.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn check(&self) -> Result<(), String> {
        let Self { key, start, ready } = self;
        let octets = start.iter().map(|word| word.len() + 1).sum::<usize>();
        if !key.is_empty() && parse_hex(key).is_none() {
            return Err(format!("build.key {key:?} is not 64 hex digits"));
        }
        if start.len() > MAX_START || octets > MAX_COMMAND {
            return Err(format!(
                "build.start has {} words of {octets} octets, the limits are {MAX_START} and {MAX_COMMAND}",
                start.len()
            ));
        }
        if ready.len() > MAX_COMMAND {
            return Err(format!("build.ready has {} octets, the limit is {MAX_COMMAND}", ready.len()));
        }
        match start.iter().chain([ready]).any(|word| word.contains('\0')) {
            true => Err("build.start or build.ready has an octet that is 0".to_string()),
            false => Ok(()),
        }
    }
}

impl Manifest {
    /// Parses and checks a manifest; `place` is named in errors.
    pub fn parse(text: &str, place: impl fmt::Display) -> Result<Self, TemplateError> {
        let raw = toml::from_str(text)
            .map_err(|e: toml::de::Error| TemplateError::invalid(&place, e.to_string().trim().replace('\n', "; ")))?;
        Self::check(raw, place)
    }

    /// Applies the rules that types do not say.
    pub(super) fn check(raw: RawManifest, place: impl fmt::Display) -> Result<Self, TemplateError> {
        let bad = |message: String| Err(TemplateError::invalid(&place, message));
        if !is_template_name(&raw.name) {
            return bad(format!("name {:?} is not of the form [a-z0-9][a-z0-9._-]{{0,62}}[:TAG]", raw.name));
        }
        if raw.description.len() > MAX_DESCRIPTION || raw.description.chars().any(char::is_control) {
            return bad(format!("description is no line of at most {MAX_DESCRIPTION} octets"));
        }
        let Some(sha256) = parse_hex(&raw.sha256) else {
            return bad(format!("sha256 {:?} is not 64 hex digits", raw.sha256));
        };
        if raw.size_bytes == 0 || raw.size_bytes > MAX_IMAGE || !raw.size_bytes.is_multiple_of(BLOCK) {
            return bad(format!(
                "size_bytes {} is no multiple of {BLOCK} between {BLOCK} and {MAX_IMAGE}",
                raw.size_bytes
            ));
        }
        let Defaults { user, cwd, env } = &raw.defaults;
        if *user == u32::MAX {
            return bad(format!("defaults.user {user} is no user id"));
        }
        if !cwd.starts_with('/') || cwd.len() > MAX_PATH || cwd.contains('\0') {
            return bad(format!("defaults.cwd {cwd:?} is no absolute path of at most {MAX_PATH} octets"));
        }
        if env.len() > MAX_ENV {
            return bad(format!("defaults.env has {} entries, the limit is {MAX_ENV}", env.len()));
        }
        if let Some(entry) = env.iter().find(|entry| !is_env_entry(entry)) {
            return bad(format!("defaults.env entry {entry:?} is not KEY=value of at most {MAX_ENV_OCTETS} octets"));
        }
        if let Err(message) = languages::check(&raw.languages).and_then(|()| raw.build.check()) {
            return bad(message);
        }
        Ok(Self {
            name: raw.name,
            description: raw.description,
            sha256,
            size_bytes: raw.size_bytes,
            defaults: raw.defaults,
            languages: raw.languages,
            build: raw.build,
        })
    }

    /// The same, if it is one that can be read again.
    pub fn checked(&self) -> Result<Self, TemplateError> {
        let text = self.to_toml()?;
        if text.len() as u64 > MAX_MANIFEST {
            let message = format!("its manifest has {} octets, the limit is {MAX_MANIFEST}", text.len());
            return Err(TemplateError::invalid(&self.name, message));
        }
        Self::parse(&text, &self.name)
    }

    /// The hash in lower-case hex.
    pub fn sha256_hex(&self) -> String {
        to_hex(&self.sha256)
    }

    /// Digest of all that it says, in hex: another manifest is another template, also under the same name.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn fingerprint(&self) -> Result<String, TemplateError> {
        let digest: [u8; 32] = Sha256::digest(self.to_toml()?).into();
        Ok(to_hex(&digest))
    }

    /// The manifest as it is written.
    pub(super) fn to_toml(&self) -> Result<String, TemplateError> {
        let raw = RawManifest {
            name: self.name.clone(),
            description: self.description.clone(),
            sha256: self.sha256_hex(),
            size_bytes: self.size_bytes,
            defaults: self.defaults.clone(),
            languages: self.languages.clone(),
            build: self.build.clone(),
        };
        toml::to_string(&raw).map_err(|error| TemplateError::invalid(&self.name, error.to_string()))
    }
}

/// Whether a name may name a template, with or without a tag. Such a name is also a safe name of a folder.
pub fn is_template_name(name: &str) -> bool {
    let (name, tag) = name.split_once(':').unwrap_or((name, "latest"));
    is_part_of_name(name) && is_part_of_name(tag)
}

fn is_part_of_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
    name.len() <= MAX_NAME
        && name.bytes().all(inner)
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        // Left-over folders of an import end so.
        && !name.ends_with(".tmp")
}

fn is_env_entry(entry: &str) -> bool {
    let Some((key, _)) = entry.split_once('=') else { return false };
    entry.len() <= MAX_ENV_OCTETS
        && !entry.contains('\0')
        && !key.is_empty()
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !key.as_bytes()[0].is_ascii_digit()
}

/// The templates of one folder by name, and what was wrong with the others. A folder that is not there is empty.
pub fn discover(folder: &Path, origin: Origin) -> (Vec<Template>, Vec<TemplateError>) {
    let mut found = Vec::new();
    let mut errors = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return (found, errors),
        Err(error) => {
            errors.push(TemplateError::io(format_args!("list {}", folder.display()), &error));
            return (found, errors);
        }
    };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    for name in names.into_iter().filter(|name| is_template_name(name)) {
        match load(&folder.join(name), origin) {
            Ok(template) => found.push(template),
            Err(error) => errors.push(error),
        }
    }
    (found, errors)
}

/// Built-in templates of `share` and imported ones of `data`. A built-in template keeps its name.
pub fn discover_all(share: &Path, data: &Path) -> (Vec<Template>, Vec<TemplateError>) {
    let (mut all, mut errors) = discover(&share.join("templates"), Origin::BuiltIn);
    let taken: BTreeSet<String> = all.iter().map(|template| template.manifest.name.clone()).collect();
    let (imported, more) = discover(&data.join("templates"), Origin::Imported);
    errors.extend(more);
    for template in imported {
        if taken.contains(&template.manifest.name) {
            errors.push(TemplateError::NameTaken { name: template.manifest.name });
        } else {
            all.push(template);
        }
    }
    (all, errors)
}

/// Reads one template's folder. The image's content is not looked at: that is `verify`.
pub fn load(folder: &Path, origin: Origin) -> Result<Template, TemplateError> {
    let path = folder.join(MANIFEST);
    let failed = |error: io::Error| TemplateError::io(format_args!("read {}", path.display()), &error);
    let mut text = String::new();
    let file = open_regular(&path).map_err(failed)?;
    file.take(MAX_MANIFEST + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_MANIFEST {
        return Err(TemplateError::invalid(path.display(), format!("is over the limit of {MAX_MANIFEST} octets")));
    }
    let manifest = Manifest::parse(&text, path.display())?;
    if folder.file_name().and_then(|name| name.to_str()) != Some(&manifest.name) {
        return Err(TemplateError::invalid(path.display(), format!("name {} is not its folder's", manifest.name)));
    }
    let template = Template { manifest, folder: folder.to_path_buf(), origin };
    open_image(&template)?;
    Ok(template)
}

/// Opens a template's image read-only, to use it as a base. Its size is checked.
pub fn open_image(template: &Template) -> Result<File, TemplateError> {
    let path = template.image();
    let failed = |error: io::Error| TemplateError::io(format_args!("open {}", path.display()), &error);
    let file = open_regular(&path).map_err(failed)?;
    let (found, expected) = (file.metadata().map_err(failed)?.len(), template.manifest.size_bytes);
    if found != expected {
        return Err(TemplateError::WrongSize { name: template.manifest.name.clone(), expected, found });
    }
    Ok(file)
}

/// Hashes a template's image and compares it with the manifest. Reads the whole image: for a thread of its own.
pub fn verify(template: &Template) -> Result<(), TemplateError> {
    let mut file = open_image(template)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1024 * 1024];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => hash.update(&chunk[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(TemplateError::io(format_args!("read {}", template.image().display()), &error));
            }
        }
    }
    check_hash(&template.manifest, hash.finalize().into())
}

pub(super) fn check_hash(manifest: &Manifest, found: [u8; 32]) -> Result<(), TemplateError> {
    if found == manifest.sha256 {
        return Ok(());
    }
    Err(TemplateError::WrongHash {
        name: manifest.name.clone(),
        expected: manifest.sha256_hex(),
        found: to_hex(&found),
    })
}

/// No symbolic link, no device, no pipe that would block.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"))
}

pub(super) fn to_hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

pub(super) fn parse_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut octets = [0; 32];
    for (index, octet) in octets.iter_mut().enumerate() {
        *octet = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(change: &str, to: &str) -> Result<Manifest, TemplateError> {
        let text = format!(
            "name = \"python\"\ndescription = \"d\"\nsha256 = \"{}\"\nsize_bytes = 8192\n\
             [defaults]\nuser = 1000\ncwd = \"/workspace\"\nenv = [\"A=1\", \"B_2=\"]\n",
            "ab".repeat(32)
        );
        assert!(text.contains(change));
        Manifest::parse(&text.replacen(change, to, 1), "m.toml")
    }

    #[test]
    fn a_manifest_is_read_and_written_the_same() {
        let manifest = manifest("", "").unwrap();
        assert_eq!((manifest.name.as_str(), manifest.sha256, manifest.size_bytes), ("python", [0xab; 32], 8192));
        assert_eq!(manifest.defaults.env, ["A=1", "B_2="]);
        assert_eq!(Manifest::parse(&manifest.to_toml().unwrap(), "x").unwrap(), manifest);
        assert_eq!(manifest.checked().unwrap(), manifest);
        let mut long = manifest;
        // Each of them may be, all of them together are no manifest that is read again.
        long.defaults.env = (0..20).map(|n| format!("A{n}={}", "x".repeat(4000))).collect();
        let error = long.checked().unwrap_err().to_string();
        assert!(error.contains("octets, the limit is 65536"), "{error}");
    }

    #[test]
    fn a_manifest_that_says_anything_else_has_another_fingerprint() {
        let of = |change: &str, to: &str| manifest(change, to).unwrap().fingerprint().unwrap();
        let own = of("", "");
        assert_eq!(own.len(), 64);
        assert_eq!(own, of("", ""));
        for (change, to) in [("A=1", "A=2"), ("user = 1000", "user = 0"), ("ab", "cd"), ("\"d\"", "\"e\"")] {
            assert_ne!(own, of(change, to), "{to}");
        }
    }

    #[test]
    fn defaults_may_be_left_out() {
        let manifest =
            manifest("[defaults]\nuser = 1000\ncwd = \"/workspace\"\nenv = [\"A=1\", \"B_2=\"]\n", "").unwrap();
        assert_eq!(manifest.defaults, Defaults::default());
    }

    #[test]
    fn every_broken_rule_is_an_error_that_names_the_place() {
        let long = "x".repeat(64);
        for (change, to) in [
            ("\"python\"", "\"../python\""),
            ("\"python\"", "\"\""),
            ("\"python\"", "\"-a\""),
            ("\"python\"", "\"a.tmp\""),
            ("\"python\"", "\"a:\""),
            ("\"python\"", "\"a:b:c\""),
            ("\"python\"", "\"a:b.tmp\""),
            ("\"python\"", &format!("\"{long}\"")),
            ("\"d\"", "\"a\\nb\""),
            ("abab", "abxy"),
            ("abab", "ab"),
            ("abab", "é"),
            ("8192", "0"),
            ("8192", "8191"),
            ("8192", "-4096"),
            ("8192", "1099511631872"),
            ("1000", "4294967295"),
            ("1000", "\"root\""),
            ("/workspace", "workspace"),
            ("/workspace", "/a\\u0000"),
            ("A=1", "A"),
            ("A=1", "=1"),
            ("A=1", "1A=1"),
            ("A=1", "A=\\u0000"),
            ("size_bytes", "bytes"),
            ("description", "extra"),
        ] {
            match manifest(change, to) {
                Err(TemplateError::Invalid { place, .. }) => assert_eq!(place, "m.toml"),
                other => panic!("{change} -> {to}: {other:?}"),
            }
        }
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("warren-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn add(&self, group: &str, name: &str, image: &[u8]) -> PathBuf {
            let folder = self.0.join(group).join("templates").join(name);
            fs::create_dir_all(&folder).unwrap();
            let sha256 = to_hex(&Sha256::digest(image));
            let text = format!("name = {name:?}\nsha256 = {sha256:?}\nsize_bytes = {}\n", image.len());
            fs::write(folder.join(MANIFEST), text).unwrap();
            fs::write(folder.join(IMAGE), image).unwrap();
            folder
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn templates_are_discovered_and_bad_ones_reported() {
        let root = Folder::new("discover");
        root.add("share", "base", &[1; 4096]);
        root.add("data", "base", &[2; 4096]);
        root.add("data", "python", &[3; 8192]);
        root.add("data", "half.tmp", &[3; 8192]);
        fs::write(root.add("data", "short", &[4; 8192]).join(IMAGE), [4; 4096]).unwrap();
        fs::rename(root.add("data", "moved", &[5; 4096]), root.0.join("data/templates/other")).unwrap();
        fs::remove_file(root.add("data", "lacking", &[6; 4096]).join(IMAGE)).unwrap();
        let linked = root.add("data", "linked", &[7; 4096]).join(IMAGE);
        fs::remove_file(&linked).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &linked).unwrap();
        fs::write(root.add("data", "huge", &[8; 4096]).join(MANIFEST), vec![b'#'; 100_000]).unwrap();

        let (found, errors) = discover_all(&root.0.join("share"), &root.0.join("data"));
        let names: Vec<_> = found.iter().map(|t| (t.manifest.name.as_str(), t.origin)).collect();
        assert_eq!(names, [("base", Origin::BuiltIn), ("python", Origin::Imported)]);
        let said = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert_eq!(errors.len(), 6, "{said}");
        for part in [
            "short has 4096 octets",
            "moved is not its folder's",
            "lacking",
            "linked",
            "limit of 65536",
            "base is taken",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert_eq!(discover(&root.0.join("nowhere"), Origin::BuiltIn), (Vec::new(), Vec::new()));
    }

    #[test]
    fn a_changed_image_does_not_verify() {
        let root = Folder::new("verify");
        let template = load(&root.add("share", "base", &[1; 8192]), Origin::BuiltIn).unwrap();
        verify(&template).unwrap();
        let mut image = [1; 8192];
        image[5000] = 2;
        fs::write(template.image(), image).unwrap();
        assert!(matches!(verify(&template), Err(TemplateError::WrongHash { name, .. }) if name == "base"));
        fs::write(template.image(), [1; 4096]).unwrap();
        assert!(matches!(verify(&template), Err(TemplateError::WrongSize { found: 4096, expected: 8192, .. })));
    }
}
