//! The node's templates, and which of their images are known to be whole.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::storage::block_devices;
use crate::storage::state::{Change, State as Database, TemplateRow};
use crate::storage::template_disk::{self, Target, TemplateEvent};
use crate::storage::template_file;
use crate::storage::templates::{Origin, Template, discover_all};
use crate::wire::{Code, Error, Fields};

/// What tells that an image was not touched since it was hashed: device, inode, size, time of the last write, change time.
type Seal = (u64, u64, u64, [i64; 2], [i64; 2]);

#[derive(Debug)]
struct Entry {
    template: Template,
    verified: Option<Seal>,
    verifying: bool,
    /// The image's seal when hashing began: what changed meanwhile was not hashed.
    begun: Option<Seal>,
}

/// Every template that can be used.
#[derive(Debug)]
pub struct Catalogue {
    entries: BTreeMap<String, Entry>,
    /// Template disks are being looked at: what is not here yet may still come.
    pub importing: bool,
}

impl Catalogue {
    /// The templates that came with the node and those imported earlier. Broken ones are logged and left out.
    pub fn load(share: &Path, data: &Path) -> Self {
        template_file::sweep(&data.join("templates"));
        let (templates, errors) = discover_all(share, data);
        for error in errors {
            log::error!("{error}");
        }
        let mut catalogue = Self { entries: BTreeMap::new(), importing: false };
        for template in templates {
            catalogue.add(template, None);
        }
        catalogue
    }

    /// A template that was made here, by its name, or before it has one by another. With `whole` its image is what its
    /// manifest says.
    pub fn put(&mut self, name: &str, template: Template, whole: bool) {
        let verified = seal(&template).filter(|_| whole);
        self.entries.insert(name.to_string(), Entry { template, verified, verifying: false, begun: None });
    }

    /// A template is none any more.
    pub fn forget(&mut self, name: &str) {
        self.entries.remove(name);
    }

    /// An image has a name more, or less: that shows in its times, and is no change of it.
    pub fn reseal(&mut self) {
        for entry in self.entries.values_mut() {
            let Some((now, before)) = seal(&entry.template).zip(entry.verified) else { continue };
            if (now.0, now.1, now.2, now.3) == (before.0, before.1, before.2, before.3) {
                entry.verified = Some(now);
            }
        }
    }

    /// Whether two templates have one file for their image, which is known to be whole.
    pub fn shares_whole(&self, name: &str, with: &Template) -> bool {
        let known = self.entries.get(name).and_then(|entry| entry.verified);
        known.zip(seal(with)).is_some_and(|(known, with)| (known.0, known.1) == (with.0, with.1))
    }

    fn add(&mut self, template: Template, verified: Option<Seal>) {
        self.entries
            .insert(template.manifest.name.clone(), Entry { template, verified, verifying: false, begun: None });
    }

    fn entry(&self, name: &str) -> Result<&Entry, Error> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::new(Code::NotFound, format!("no template {name}")).with("template", name))
    }

    /// A template by its name.
    pub fn get(&self, name: &str) -> Result<&Template, Error> {
        self.entry(name).map(|entry| &entry.template)
    }

    /// Whether the template's image was hashed and not touched since.
    pub fn is_verified(&self, name: &str) -> Result<bool, Error> {
        let entry = self.entry(name)?;
        Ok(entry.verified.is_some() && entry.verified == seal(&entry.template))
    }

    /// Notes that hashing begins. `false` when it is under way already.
    pub fn begin_verifying(&mut self, name: &str) -> bool {
        let Some(entry) = self.entries.get_mut(name).filter(|entry| !entry.verifying) else { return false };
        (entry.verifying, entry.begun) = (true, seal(&entry.template));
        true
    }

    /// Hashing is over and showed that the image is `whole`, or not. `false` when the image was touched meanwhile: then
    /// nothing is known of it as it is now.
    pub fn hashed(&mut self, name: &str, whole: bool) -> bool {
        let Some(entry) = self.entries.get_mut(name) else { return true };
        entry.verifying = false;
        let now = seal(&entry.template);
        let untouched = entry.begun.take() == now;
        entry.verified = now.filter(|_| whole && untouched);
        untouched
    }

    /// The template disks were looked at; what they brought was hashed on its way.
    /// Name and digest of those that are new.
    pub fn imported(
        &mut self,
        events: Vec<TemplateEvent>,
        database: &mut Database,
        now_ms: u64,
    ) -> Vec<(String, String)> {
        self.importing = false;
        let mut arrived = Vec::new();
        for event in events {
            match event {
                TemplateEvent::Imported { template } => {
                    log::info!("template {} was imported", template.manifest.name);
                    database.submit(Change::PutTemplate(TemplateRow {
                        name: template.manifest.name.clone(),
                        sha256: template.manifest.sha256_hex(),
                        size_bytes: template.manifest.size_bytes,
                        description: template.manifest.description.clone(),
                        imported_ms: now_ms,
                        path: template.folder.display().to_string(),
                    }));
                    let verified = seal(&template);
                    arrived.push((template.manifest.name.clone(), template.manifest.sha256_hex()));
                    self.add(template, verified);
                }
                TemplateEvent::Failed { device, name, error } => {
                    log::error!("{}: template {}: {error}", device.display(), name.as_deref().unwrap_or("?"));
                }
                TemplateEvent::Progress { .. } | TemplateEvent::Skipped { .. } | TemplateEvent::Finished => {}
            }
        }
        arrived
    }

    /// Names of the templates that came with the node.
    pub fn built_in(&self) -> Vec<String> {
        let entries = self.entries.values().filter(|entry| entry.template.origin == Origin::BuiltIn);
        entries.map(|entry| entry.template.manifest.name.clone()).collect()
    }

    /// The templates as rows of a list.
    pub fn rows(&self) -> impl Iterator<Item = Fields> + '_ {
        let named = self.entries.iter().filter(|(name, _)| !template_file::is_staged(name));
        named.map(|(_, entry)| fields(&entry.template))
    }

    /// One template as a row.
    pub fn row(&self, name: &str) -> Result<Fields, Error> {
        self.entry(name).map(|entry| fields(&entry.template))
    }
}

fn fields(template: &Template) -> Fields {
    let Template { manifest, origin, .. } = template;
    let built = !manifest.build.key.is_empty();
    let fields = Fields::new()
        .with("name", &manifest.name)
        .with("description", &manifest.description)
        .with("size_bytes", manifest.size_bytes)
        .with("sha256", manifest.sha256_hex())
        .with(
            "origin",
            match origin {
                Origin::BuiltIn => "built-in",
                Origin::Imported if built => "built",
                Origin::Imported => "imported",
            },
        )
        .with("user", manifest.defaults.user)
        .with("cwd", &manifest.defaults.cwd);
    let fields = manifest.languages.keys().fold(fields, |fields, language| fields.with("language", language));
    let installing = manifest.languages.iter().filter(|(_, language)| language.packages.is_some());
    let fields = installing.fold(fields, |fields, (language, _)| fields.with("installs", language));
    let fields = manifest.defaults.env.iter().fold(fields, |fields, entry| fields.with("env", entry));
    let fields = manifest.build.start.iter().fold(fields, |fields, word| fields.with("start", word));
    let more = [("ready", &manifest.build.ready), ("key", &manifest.build.key)];
    more.into_iter().filter(|(_, value)| !value.is_empty()).fold(fields, |fields, (key, value)| fields.with(key, value))
}

fn seal(template: &Template) -> Option<Seal> {
    let meta = template.image().metadata().ok()?;
    let (written, changed) = ([meta.mtime(), meta.mtime_nsec()], [meta.ctime(), meta.ctime_nsec()]);
    Some((meta.dev(), meta.ino(), meta.size(), written, changed))
}

/// Looks at every block device and imports from those that are template disks what is not here yet. Blocks for
/// as long as reading takes.
pub fn import(folder: PathBuf, reserved: Vec<String>) -> Vec<TemplateEvent> {
    let events = RefCell::new(Vec::new());
    template_disk::import(&block_devices::list(), &Target { folder, reserved }, &|event| {
        events.borrow_mut().push(event)
    });
    events.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::templates::Manifest;

    #[test]
    fn an_image_that_is_touched_while_it_is_hashed_is_not_known_to_be_whole() {
        let folder = std::env::temp_dir().join(format!("warren-catalogue-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let text = format!("name = \"a\"\ndescription = \"d\"\nsha256 = \"{}\"\nsize_bytes = 8192\n", "ab".repeat(32));
        let text = format!("{text}[defaults]\nuser = 1000\ncwd = \"/\"\nenv = []\n");
        let manifest = Manifest::parse(&text, "m.toml").unwrap();
        let template = Template { manifest, folder: folder.clone(), origin: Origin::BuiltIn };
        std::fs::write(template.image(), [1; 8192]).unwrap();
        let mut catalogue = Catalogue { entries: BTreeMap::new(), importing: false };
        catalogue.add(template.clone(), None);

        assert!(catalogue.begin_verifying("a"));
        assert!(!catalogue.begin_verifying("a"), "it is under way");
        std::fs::write(template.image(), [2; 4096]).unwrap();
        assert!(!catalogue.hashed("a", true));
        assert!(!catalogue.is_verified("a").unwrap());

        assert!(catalogue.begin_verifying("a"));
        assert!(catalogue.hashed("a", true));
        assert!(catalogue.is_verified("a").unwrap());
        std::fs::write(template.image(), [3; 2048]).unwrap();
        assert!(!catalogue.is_verified("a").unwrap(), "touched since");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
