//! What becomes of templates that are there: further names, files that carry them, their end.

use std::io::{self, BufWriter, Read, Write};

use super::build::{open, to_error};
use super::requests::Job;
use super::supervisor::{Done, Supervisor};
use super::transfer::{self, Feed, Outlet};
use crate::sandbox::id::SandboxId;
use crate::storage::state::Change;
use crate::storage::template_file;
use crate::storage::templates::{Manifest, Origin, Template, TemplateError, is_template_name};
use crate::wire::{Code, Error, FRAME, Fields, Message};

/// Exports, and imports, at once: each has a thread.
const MOST: usize = 4;

/// What a thread has done to a template.
#[derive(Debug)]
pub(super) enum Changed {
    /// It has a further name.
    Tagged {
        /// The name before.
        of: String,
        /// What it is by its new one.
        template: Template,
    },
    /// It came from a file.
    Arrived(Template),
    /// It is gone.
    Removed(String),
}

fn no_thread(e: &io::Error) -> Error {
    Error::new(Code::NoCapacity, format!("no thread: {e}"))
}

impl Supervisor {
    /// Has a thread change templates; the client is answered when that is done.
    fn change_template(
        &mut self,
        key: u64,
        tag: &str,
        work: impl FnOnce() -> Result<Changed, TemplateError> + Send + 'static,
    ) -> Result<(), Error> {
        let owned = tag.to_string();
        let work = move || {
            let result = work().map_err(|error| to_error(&error));
            Done::TemplateChanged { client: key, tag: owned, result }
        };
        self.background.run("template", work).map_err(|e| no_thread(&e))?;
        self.add_job(key, tag, Job::Snapshot);
        Ok(())
    }

    fn random_id(&self) -> Result<String, Error> {
        let id = SandboxId::random().map_err(|e| Error::new(Code::Internal, format!("no random id: {e}")))?;
        Ok(id.to_string())
    }

    /// A client wants a template to have a further name.
    pub(super) fn ask_template_tag(&mut self, key: u64, tag: &str, of: &str, name: &str) -> Result<(), Error> {
        let template = self.catalogue.get(of)?.clone();
        self.template_name_is_free(name)?;
        if of == name {
            let message = format!("template {name} has that name");
            return Err(Error::new(Code::AlreadyExists, message).with("template", name));
        }
        let (id, folder, of, name) = (self.random_id()?, self.templates_folder(), of.to_string(), name.to_string());
        self.change_template(key, tag, move || {
            let template = template_file::tag(&template, &name, &folder, &id)?;
            Ok(Changed::Tagged { of, template })
        })
    }

    /// A client wants a template to go.
    pub(super) fn ask_template_remove(&mut self, key: u64, tag: &str, name: &str) -> Result<(), Error> {
        let template = self.catalogue.get(name)?.clone();
        if template.origin == Origin::BuiltIn {
            let message = format!("template {name} came with the node and stays");
            return Err(Error::new(Code::BadState, message).with("template", name));
        }
        self.template_is_unused(name)?;
        let id = self.random_id()?;
        // From now on nobody starts from it.
        self.catalogue.forget(name);
        self.drop_template_snapshots();
        let (name, kept) = (name.to_string(), template.clone());
        let started = self.change_template(key, tag, move || {
            template_file::remove(&template, &id)?;
            Ok(Changed::Removed(name))
        });
        if started.is_err() {
            let name = kept.manifest.name.clone();
            self.catalogue.put(&name, kept, false);
        }
        started
    }

    /// A template is another than before.
    pub(super) fn template_changed(&mut self, key: u64, tag: &str, result: Result<Changed, Error>) {
        let owner = self.owner_of_client(key);
        let name = match result {
            Ok(Changed::Tagged { of, template }) => {
                let name = template.manifest.name.clone();
                self.catalogue.reseal();
                let whole = self.catalogue.shares_whole(&of, &template);
                self.take_template(template, whole);
                self.tell_template("template.tagged", &name, &owner, &of);
                name
            }
            Ok(Changed::Arrived(template)) => {
                let name = template.manifest.name.clone();
                let digest = template.manifest.sha256_hex();
                self.take_template(template, true);
                self.tell_template("template.imported", &name, &owner, &digest);
                name
            }
            Ok(Changed::Removed(name)) => {
                self.database.submit(Change::RemoveTemplate { name: name.clone() });
                self.catalogue.reseal();
                self.tell_template("template.removed", &name, &owner, "");
                name
            }
            Err(error) => return self.finish(key, &Message::err(tag, error)),
        };
        self.finish(key, &Message::ok(tag, Fields::new().with("name", name)));
    }

    fn refuse_more_templates(&self, what: &str, is: impl Fn(&Job) -> bool) -> Result<(), Error> {
        let count = self.clients.values().flat_map(|client| client.jobs.values()).filter(|job| is(job)).count();
        if count < MOST {
            return Ok(());
        }
        let message = format!("{count} {what} are under way, the most at once");
        Err(Error::new(Code::NoCapacity, message).with("resource", what).with("max", MOST))
    }

    /// A client wants a template as one file.
    pub(super) fn ask_template_export(&mut self, key: u64, tag: &str, name: &str) -> Result<(), Error> {
        self.refuse_more_templates("exports", |job| matches!(job, Job::Export(_)))?;
        let template = self.catalogue.get(name)?;
        // Open from here on: whatever becomes of the template, it is whole.
        let (manifest, image) = (template.manifest.clone(), open(template)?);
        let report = self.background.reporter();
        let (outlet, download) = transfer::download(move || report(Done::Moved(key)));
        let work = move || {
            export(&manifest, &image, outlet);
            Done::Moved(key)
        };
        self.background.run("export", work).map_err(|e| no_thread(&e))?;
        self.add_job(key, tag, Job::Export(download));
        Ok(())
    }

    /// A client is about to send a template.
    pub(super) fn ask_template_import(&mut self, key: u64, tag: &str, name: Option<String>) -> Result<(), Error> {
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        self.refuse_more_templates("imports", |job| matches!(job, Job::Import(_)))?;
        name.iter().try_for_each(|name| self.template_name_is_free(name))?;
        let folder = self.templates_folder();
        let room = nix::sys::statvfs::statvfs(&self.config.paths.data)
            .map_err(|e| Error::new(Code::Internal, format!("{}: {e}", self.config.paths.data.display())))?;
        let most = room.blocks_available().saturating_mul(room.fragment_size());
        let place = template_file::staged(&folder, &self.random_id()?);
        let report = self.background.reporter();
        let (upload, mut feed): (_, Feed) = transfer::upload(u64::MAX, move || report(Done::Moved(key)));
        let owned = tag.to_string();
        let work = move || {
            let result = template_file::arrive(feed.by_ref(), name, &place, most).map_err(|error| to_error(&error));
            Done::TemplateArrived { client: key, tag: owned, result }
        };
        self.background.run("import", work).map_err(|e| no_thread(&e))?;
        self.add_job(key, tag, Job::Import(upload));
        Ok(())
    }

    /// A template that a client sent is there without a name, or there is nothing of it.
    pub(super) fn template_arrived(&mut self, key: u64, tag: &str, result: Result<Template, Error>) {
        let waits = self.clients.get_mut(&key).is_some_and(|client| client.jobs.remove(tag).is_some());
        let template = match result {
            Ok(template) => template,
            Err(error) if waits => return self.finish(key, &Message::err(tag, error)),
            Err(_) => return,
        };
        let name = &template.manifest.name;
        let free = match is_template_name(name) && waits {
            true => self.template_name_is_free(name),
            false => Err(Error::new(Code::Cancelled, "nobody waits for it any more")),
        };
        let (folder, made) = (self.templates_folder(), template.folder.clone());
        let started = free.and_then(|()| {
            self.change_template(key, tag, move || Ok(Changed::Arrived(template_file::publish(&template, &folder)?)))
        });
        if let Err(error) = started {
            self.discard_folder(made);
            if waits {
                self.finish(key, &Message::err(tag, error));
            }
        }
    }
}

/// Writes a template to a client. Blocks.
fn export(manifest: &Manifest, image: &std::fs::File, outlet: Outlet) {
    let mut out = BufWriter::with_capacity(FRAME, outlet);
    let written = template_file::export(manifest, image, &mut out).map_err(|error| to_error(&error));
    let flushed = out.flush();
    let (outlet, _) = out.into_parts();
    let result = written.and_then(|()| match flushed {
        Ok(()) => Ok(Fields::new().with("name", &manifest.name)),
        Err(e) => Err(Error::new(Code::LinkLost, e.to_string())),
    });
    outlet.end(result);
}
