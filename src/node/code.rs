//! Code in sandboxes: which command runs a language, and what is asked of the agent. docs/code.md.
//!
//! A run is a program to the node (`sandbox/exec.rs`): it has a number, its output is kept, and it outlives a supervisor.

use super::packages::What;
use super::supervisor::Supervisor;
use crate::control::code::{Bounds, RunAsk};
use crate::sandbox::exec::{CodeRun, Exec};
use crate::sandbox::id::SandboxId;
use crate::storage::languages::Language;
use crate::wire::{Code, Error, Fields, Message, Request};

impl Supervisor {
    /// `code.run`
    pub(super) fn run_code(&mut self, key: u64, tag: &str, sandbox: &str, ask: RunAsk) -> Result<(), Error> {
        let id = self.find_running(key, sandbox)?.id.clone();
        let RunAsk { language, context, bounds, timeout_ms, detach } = ask;
        let mut request = Request::new("", "code.run");
        if let Some(ms) = timeout_ms {
            request = request.set("timeout_ms", ms);
        }
        if let (Some(name), false) = (language.clone(), bounds.dependencies.is_empty()) {
            self.check_bounds(&id, &name, &bounds)?;
            let ask = RunAsk { language, context, bounds, timeout_ms, detach };
            return self.ask_packages(key, tag, &id, &name, What::Run(Box::new(ask)));
        }
        let language = match (language, context) {
            (Some(language), _) => {
                request = self.with_language(request, &id, &language, &bounds)?;
                language
            }
            (None, Some(context)) => {
                request = request.set("context", context);
                String::new()
            }
            (None, None) => return Err(Error::new(Code::MissingArgument, "language is missing")),
        };
        let run = CodeRun { language: language.clone(), context, running: false };
        let argv = vec![b"code.run".to_vec(), language.into_bytes()];
        self.start_exec(key, tag, sandbox, argv, request, detach, Some(run))
    }

    /// `code.context.create`
    pub(super) fn create_context(
        &mut self,
        key: u64,
        tag: &str,
        sandbox: &str,
        language: &str,
        bounds: Bounds,
    ) -> Result<(), Error> {
        let id = self.find_running(key, sandbox)?.id.clone();
        if !bounds.dependencies.is_empty() {
            self.check_bounds(&id, language, &bounds)?;
            let what = What::Context { language: language.to_string(), bounds };
            return self.ask_packages(key, tag, &id, language, what);
        }
        let request = self.with_language(Request::new("", "code.context.create"), &id, language, &bounds)?;
        self.relay(key, tag, sandbox, request)
    }

    /// `code.list`
    pub(super) fn list_code(&mut self, key: u64, tag: &str, sandbox: &str) -> Result<(), Error> {
        let id = self.find(key, sandbox)?;
        let rows: Vec<Fields> =
            self.sandboxes.get(&id).into_iter().flat_map(|s| s.execs.values()).filter_map(Exec::code_fields).collect();
        for row in rows {
            self.answer(key, &Message::item(tag, row));
        }
        self.answer(key, &Message::ok(tag, Fields::new()));
        Ok(())
    }

    /// How a language of a sandbox's template is started, where what is asked for can be.
    fn check_bounds(&self, id: &SandboxId, language: &str, bounds: &Bounds) -> Result<&Language, Error> {
        let Some(sandbox) = self.sandboxes.get(id) else {
            return Err(Error::new(Code::NotFound, format!("no sandbox {id}")));
        };
        if bounds.network && sandbox.spec.network.is_none() {
            let message = format!("sandbox {id} has no network, and a run cannot have more than its sandbox");
            return Err(Error::new(Code::NetworkOff, message).with("argument", "network"));
        }
        let template = &sandbox.spec.template;
        let languages = &self.catalogue.get(template)?.manifest.languages;
        languages.get(language).ok_or_else(|| {
            let known: Vec<&str> = languages.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
            let message = format!("template {template} has no language {language}; it has {known}");
            Error::new(Code::NotFound, message).with("language", language)
        })
    }

    /// Adds what the agent needs to start a language of the sandbox's template within bounds.
    fn with_language(
        &self,
        mut request: Request,
        id: &SandboxId,
        language: &str,
        bounds: &Bounds,
    ) -> Result<Request, Error> {
        let how = self.check_bounds(id, language, bounds)?;
        request = request.set("language", language);
        request = how.start.iter().fold(request, |request, word| request.set("start", word));
        request = how.once.iter().fold(request, |request, word| request.set("once", word));
        request = bounds.env.iter().fold(request, |request, entry| request.set_bytes("env", entry));
        if let Some(user) = &bounds.user {
            request = request.set("user", user);
        }
        if let Some(memory) = bounds.memory {
            request = request.set("memory_mib", memory);
        }
        if let Some(cwd) = &bounds.cwd {
            request = request.set_bytes("cwd", cwd);
        }
        Ok(request.set("network", if bounds.network { "on" } else { "off" }))
    }
}
