//! Container images on disk: an OCI image layout (image-spec 1.1, image-layout.md), as a directory or an archive of one, and
//! docker-archive, as `docker save` and `skopeo copy` write it.
//!
//! Documents are small, have a digest (but those of docker-archive), and are read whole; layers are named only. The digest of
//! a layer as it is stored is compared while it is sent (`Layer::open`), that of what it unpacks to by `mason`.

use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::RecipeError;
use super::key::hex;
use super::store::{Blob, Store};

/// Longest document, in octets.
pub const MAX_DOCUMENT: u64 = 4 * 1024 * 1024;
/// Most layers of an image.
pub const MAX_LAYERS: usize = 256;
/// Most images that one index names.
const MAX_MANIFESTS: usize = 1000;
/// Indexes within indexes.
const MAX_DEPTH: usize = 4;
const OCI_LAYOUT: &str = "oci-layout";
const DOCKER_MANIFEST: &str = "manifest.json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// What images have to be for.
const ARCHITECTURE: &str = "amd64";
const SYSTEM: &str = "linux";

/// What an image says of programs in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// `NAME=value` each.
    #[serde(rename = "Env")]
    pub env: Option<Vec<String>>,
    /// The working directory.
    #[serde(rename = "WorkingDir")]
    pub workdir: Option<String>,
    /// `USER[:GROUP]`; root where it is empty.
    #[serde(rename = "User")]
    pub user: Option<String>,
    /// The command, or its arguments where there is an entry point.
    #[serde(rename = "Cmd")]
    pub cmd: Option<Vec<String>>,
    /// The command.
    #[serde(rename = "Entrypoint")]
    pub entrypoint: Option<Vec<String>>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its file in the store.
    pub file: String,
    /// Of the file, in hex, where the image has one.
    pub sha256: Option<String>,
    /// Of what it unpacks to, in hex.
    pub diff_id: String,
    /// Length of the file, in octets, where the image says it.
    pub size: Option<u64>,
}

/// An image, but for what is in its layers.
#[derive(Debug)]
pub struct Image {
    /// Where its layers are.
    pub store: Store,
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// What it says of programs.
    pub settings: Settings,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Settings>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(default, rename = "RepoTags")]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

/// What a path is.
pub fn is_image(store: &Store) -> bool {
    store.has(OCI_LAYOUT) || store.has(DOCKER_MANIFEST)
}

/// Opens the image at a path; `reference` says which, where there is more than one.
pub fn open(path: &Path, reference: Option<&str>) -> Result<Image, RecipeError> {
    let store = match path.is_dir() {
        true => Store::Directory(path.to_path_buf()),
        false => Store::of_archive(path).map_err(|e| RecipeError::new(path.display(), e.to_string()))?,
    };
    of_store(store, reference)
}

/// The same of a store.
pub fn of_store(store: Store, reference: Option<&str>) -> Result<Image, RecipeError> {
    if store.has(OCI_LAYOUT) {
        return oci(store, reference);
    }
    if store.has(DOCKER_MANIFEST) {
        return docker(store, reference);
    }
    let message = format!("is no container image: it has neither {OCI_LAYOUT} nor {DOCKER_MANIFEST}");
    Err(RecipeError::new(store.place("").trim_end_matches([' ', ':', '/']), message))
}

fn document<'a, T: Deserialize<'a>>(octets: &'a [u8], place: &str) -> Result<T, RecipeError> {
    serde_json::from_slice(octets).map_err(|e| RecipeError::new(place, format!("is not what it should be: {e}")))
}

/// The digits of `sha256:HEX`.
fn digits<'a>(digest: &'a str, place: &str) -> Result<&'a str, RecipeError> {
    let digits = digest.strip_prefix("sha256:");
    let formed = digits.filter(|d| d.len() == 64 && d.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    formed.ok_or_else(|| RecipeError::new(place, format!("digest {digest:?} is not sha256: and 64 hex digits")))
}

fn blob(digits: &str) -> String {
    format!("blobs/sha256/{digits}")
}

/// Reads what a descriptor names, and compares its length and digest.
fn named(store: &Store, descriptor: &Descriptor, from: &str) -> Result<(String, Vec<u8>), RecipeError> {
    let digits = digits(&descriptor.digest, from)?;
    let name = blob(digits);
    let octets = store.read(&name, MAX_DOCUMENT)?;
    let (place, found) = (store.place(&name), hex(&Sha256::digest(&octets)));
    if octets.len() as u64 != descriptor.size {
        let message = format!("has {} octets, {from} says {}", octets.len(), descriptor.size);
        return Err(RecipeError::damaged(place, message));
    }
    if found != digits {
        return Err(RecipeError::damaged(place, format!("has sha256 {found}")));
    }
    Ok((place, octets))
}

fn oci(store: Store, reference: Option<&str>) -> Result<Image, RecipeError> {
    let place = store.place("index.json");
    let octets = store.read("index.json", MAX_DOCUMENT)?;
    let mut index: Index = document(&octets, &place)?;
    if let Some(reference) = reference {
        let name = |d: &Descriptor| {
            d.annotations.as_ref().and_then(|all| all.get(REF_NAME)).map(String::as_str) == Some(reference)
        };
        index.manifests.retain(name);
        if index.manifests.is_empty() {
            return Err(RecipeError::new(place, format!("names no image {reference}")));
        }
    }
    let (place, octets) = choose(&store, index, place, 0)?;
    let manifest: Manifest = document(&octets, &place)?;
    let (config_place, config) = named(&store, &manifest.config, &place)?;
    let config: Config = document(&config, &config_place)?;
    let layers = manifest.layers.iter().map(|layer| {
        let digits = digits(&layer.digest, &place)?;
        Ok((blob(digits), Some(digits.to_string()), Some(layer.size)))
    });
    let layers = layers.collect::<Result<Vec<_>, RecipeError>>()?;
    finish(store, config, &config_place, layers)
}

/// The one manifest that an index names for this machine.
fn choose(store: &Store, index: Index, place: String, depth: usize) -> Result<(String, Vec<u8>), RecipeError> {
    let count = index.manifests.len();
    if count > MAX_MANIFESTS {
        return Err(RecipeError::new(place, format!("names {count} images, the limit is {MAX_MANIFESTS}")));
    }
    let fits = |d: &&Descriptor| {
        d.platform
            .as_ref()
            .is_none_or(|platform| (platform.os.as_str(), platform.architecture.as_str()) == (SYSTEM, ARCHITECTURE))
    };
    let fitting: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
    let chosen = match fitting.as_slice() {
        [one] => one,
        [] => return Err(RecipeError::new(place, format!("names no image for {SYSTEM}/{ARCHITECTURE} among {count}"))),
        many => {
            let names = many.iter().filter_map(|d| d.annotations.as_ref()?.get(REF_NAME).map(String::as_str));
            let names = names.take(10).collect::<Vec<_>>().join(", ");
            return Err(RecipeError::new(place, format!("names {} images: say which by --ref ({names})", many.len())));
        }
    };
    let (inner_place, octets) = named(store, chosen, &place)?;
    if !chosen.media_type.ends_with("index.v1+json") && !chosen.media_type.ends_with("manifest.list.v2+json") {
        return Ok((inner_place, octets));
    }
    if depth >= MAX_DEPTH {
        return Err(RecipeError::new(inner_place, format!("is an index below {MAX_DEPTH} others")));
    }
    let inner: Index = document(&octets, &inner_place)?;
    choose(store, inner, inner_place, depth + 1)
}

fn docker(store: Store, reference: Option<&str>) -> Result<Image, RecipeError> {
    let place = store.place(DOCKER_MANIFEST);
    let octets = store.read(DOCKER_MANIFEST, MAX_DOCUMENT)?;
    let mut images: Vec<Saved> = document(&octets, &place)?;
    if let Some(reference) = reference {
        images.retain(|image| image.tags.iter().flatten().any(|tag| tag == reference));
        if images.is_empty() {
            return Err(RecipeError::new(place, format!("names no image {reference}")));
        }
    }
    let count = images.len();
    let Some(image) = images.pop().filter(|_| count == 1) else {
        return Err(RecipeError::new(place, format!("names {count} images: say one by --ref")));
    };
    let (config_place, config) = (store.place(&image.config), store.read(&image.config, MAX_DOCUMENT)?);
    let config: Config = document(&config, &config_place)?;
    let layers = image.layers.into_iter().map(|file| (file, None, None)).collect();
    finish(store, config, &config_place, layers)
}

fn finish(
    store: Store,
    config: Config,
    place: &str,
    files: Vec<(String, Option<String>, Option<u64>)>,
) -> Result<Image, RecipeError> {
    let (count, ids) = (files.len(), config.rootfs.diff_ids.len());
    if count > MAX_LAYERS {
        return Err(RecipeError::new(place, format!("the image has {count} layers, the limit is {MAX_LAYERS}")));
    }
    if count != ids {
        return Err(RecipeError::new(place, format!("has {ids} digests for {count} layers")));
    }
    for (found, own) in [(&config.architecture, ARCHITECTURE), (&config.os, SYSTEM)] {
        if !found.is_empty() && found != own {
            return Err(RecipeError::new(place, format!("the image is for {found}, this node is {own}")));
        }
    }
    let layers = files.into_iter().zip(&config.rootfs.diff_ids).map(|((file, sha256, size), diff_id)| {
        Ok(Layer { file, sha256, size, diff_id: digits(diff_id, place)?.to_string() })
    });
    let layers = layers.collect::<Result<Vec<_>, RecipeError>>()?;
    let settings = config.config.unwrap_or_default();
    let words = [&settings.env, &settings.cmd, &settings.entrypoint].into_iter().flatten().flatten();
    if words.chain(&settings.workdir).chain(&settings.user).any(|word| word.contains('\0')) {
        return Err(RecipeError::new(place, "a setting has an octet that is 0"));
    }
    Ok(Image { store, layers, settings })
}

/// A layer while it is read: at its end its length and digest are compared.
#[derive(Debug)]
pub struct Checked {
    blob: Blob,
    hash: Sha256,
    left: u64,
    sha256: Option<String>,
    place: String,
}

impl Layer {
    /// Opens the layer.
    pub fn open(&self, store: &Store) -> Result<Checked, RecipeError> {
        let (blob, place) = (store.open(&self.file)?, store.place(&self.file));
        if let Some(size) = self.size
            && size != blob.size
        {
            let message = format!("has {} octets, the image's manifest says {size}", blob.size);
            return Err(RecipeError::damaged(place, message));
        }
        Ok(Checked { left: blob.size, blob, hash: Sha256::new(), sha256: self.sha256.clone(), place })
    }
}

impl Read for Checked {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let damaged =
            |message: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {message}", self.place));
        let got = self.blob.read(into)?;
        if got == 0 && self.left > 0 && !into.is_empty() {
            return Err(damaged(format!("ends {} octets too early", self.left)));
        }
        self.left = self.left.saturating_sub(got as u64);
        self.hash.update(&into[..got]);
        // Before its last octets are passed on: nobody takes a damaged layer for a whole one.
        if self.left == 0
            && got > 0
            && let Some(expected) = &self.sha256
        {
            let found = hex(&self.hash.clone().finalize());
            if found != *expected {
                return Err(damaged(format!("has sha256 {found}")));
            }
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    struct Layout(PathBuf);

    impl Drop for Layout {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    impl Layout {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("warren-image-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("blobs/sha256")).unwrap();
            fs::write(path.join(OCI_LAYOUT), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
            Self(path)
        }

        /// A descriptor of what is put there.
        fn put(&self, content: &str, kind: &str) -> String {
            let digest = hex(&Sha256::digest(content));
            fs::write(self.0.join(blob(&digest)), content).unwrap();
            format!("{{\"mediaType\":\"{kind}\",\"digest\":\"sha256:{digest}\",\"size\":{}}}", content.len())
        }

        fn index(&self, manifests: &str) {
            fs::write(self.0.join("index.json"), format!("{{\"manifests\":[{manifests}]}}")).unwrap();
        }

        fn manifest(&self, config: &str, layers: &[&str]) -> String {
            let config = self.put(config, "c");
            let layers = layers.iter().map(|layer| self.put(layer, "l")).collect::<Vec<_>>().join(",");
            self.put(&format!("{{\"config\":{config},\"layers\":[{layers}]}}"), "m")
        }

        fn fails(&self) -> RecipeError {
            open(&self.0, None).unwrap_err()
        }
    }

    fn config(ids: usize) -> String {
        let id = format!("\"sha256:{}\"", "ab".repeat(32));
        let ids = vec![id; ids].join(",");
        format!(
            "{{\"architecture\":\"amd64\",\"config\":{{\"Env\":[\"A=1\"],\"User\":\"x\"}},\"rootfs\":{{\"diff_ids\":[{ids}]}}}}"
        )
    }

    #[test]
    fn an_oci_layout_is_read_and_a_layers_digest_is_compared() {
        let layout = Layout::new("good");
        layout.index(&layout.manifest(&config(2), &["one", "two"]));
        let image = open(&layout.0, None).unwrap();
        assert_eq!((image.layers.len(), image.settings.user.as_deref()), (2, Some("x")));
        let mut content = String::new();
        image.layers[1].open(&image.store).unwrap().read_to_string(&mut content).unwrap();
        assert_eq!(content, "two");
        fs::write(layout.0.join(&image.layers[1].file), "twx").unwrap();
        let error = image.layers[1].open(&image.store).unwrap().read_to_string(&mut content).unwrap_err();
        assert!(error.to_string().contains("has sha256"), "{error}");
        fs::write(layout.0.join(&image.layers[1].file), "twoo").unwrap();
        assert!(image.layers[1].open(&image.store).unwrap_err().damaged);
    }

    #[test]
    fn what_an_image_says_wrongly_is_an_error_with_its_place() {
        let layout = Layout::new("bad");
        layout.index("");
        assert!(layout.fails().message.contains("no image for linux/amd64"));
        layout.index(&layout.manifest(&config(1), &["one", "two"]));
        assert!(layout.fails().message.contains("1 digests for 2 layers"));
        layout.index(&layout.manifest(&config(1).replace("amd64", "arm64"), &["one"]));
        assert!(layout.fails().message.contains("for arm64"));
        layout.index(&layout.manifest(&config(1).replace("\"amd64\"", "\"amd64\",\"os\":\"windows\""), &["one"]));
        assert!(layout.fails().message.contains("for windows, this node is linux"));
        layout.index(&layout.manifest(&config(1).replace("abab", "XXab"), &["one"]));
        assert!(layout.fails().message.contains("64 hex digits"));
        layout.index("{\"digest\":\"sha256:../../../etc/passwd\",\"size\":1}");
        assert!(layout.fails().message.contains("../../../etc/passwd"));
        let manifest = layout.manifest(&config(1), &["one"]);
        layout.index(&manifest.replace("\"size\":", "\"size\":1"));
        assert!(layout.fails().damaged);
        layout.index(&[manifest.as_str(), &manifest].join(","));
        assert!(layout.fails().message.contains("names 2 images"));
        layout.index(&layout.manifest(&config(300), &vec!["x"; 300]));
        assert!(layout.fails().message.contains("300 layers, the limit is 256"));
        let inner = (0..6).fold(layout.manifest(&config(1), &["one"]), |inner, _| {
            layout.put(&format!("{{\"manifests\":[{inner}]}}"), "application/vnd.oci.image.index.v1+json")
        });
        layout.index(&inner);
        assert!(layout.fails().message.contains("below 4 others"));
        fs::write(layout.0.join("index.json"), vec![b' '; 5 << 20]).unwrap();
        assert!(layout.fails().message.contains("over the limit of 4194304"));
        fs::write(layout.0.join("index.json"), "[".repeat(10_000)).unwrap();
        assert!(layout.fails().message.contains("is not what it should be"));
    }
}
