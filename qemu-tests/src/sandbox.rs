//! A sandbox on the node that is removed when the test is done with it.

use warren::wire::{Error, Fields, Request};

use crate::client::{Call, Client, Reply};

/// A sandbox. Dropping it removes it.
#[derive(Debug)]
pub struct Sandbox {
    client: Client,
    /// Its id.
    pub id: String,
    removed: bool,
}

impl Sandbox {
    /// Creates one and waits until its agent is ready.
    ///
    /// # Panics
    /// When it fails.
    pub fn create(client: &Client, keys: &[(&str, &str)]) -> Self {
        let reply = client.ok(Self::create_request(keys));
        Self::of(client, reply.field("id"))
    }

    /// The request that `create` sends.
    pub fn create_request(keys: &[(&str, &str)]) -> Request {
        // Small: a sandbox of the tests needs no more, and the node has 4 GiB for all of them.
        let memory: &[(&str, &str)] =
            if keys.iter().any(|(key, _)| *key == "memory_mib") { &[] } else { &[("memory_mib", "128")] };
        keys.iter()
            .chain(memory)
            .fold(Request::new("", "sandbox.create"), |request, (key, value)| request.set(key, value))
    }

    /// Takes over a sandbox that is there already.
    pub fn of(client: &Client, id: &str) -> Self {
        Self { client: client.clone(), id: id.to_string(), removed: false }
    }

    /// A request about this sandbox.
    pub fn request(&self, verb: &str) -> Request {
        Request::new("", verb).arg(&self.id)
    }

    /// A request that runs a command in it.
    pub fn exec_request(&self, argv: &[&str]) -> Request {
        argv.iter().fold(self.request("exec.start"), |request, argument| request.arg(argument))
    }

    /// Starts a command in it.
    pub fn start(&self, request: Request) -> Call {
        self.client.start(request)
    }

    /// Runs a command in it and waits for its end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn exec(&self, argv: &[&str]) -> Reply {
        self.client.ok(self.exec_request(argv))
    }

    /// Runs a line of shell in it as root and gives what it printed.
    ///
    /// # Panics
    /// When it does not end with 0.
    pub fn sh(&self, script: &str) -> String {
        let reply = self.client.ok(self.exec_request(&["sh", "-c", script]).set("user", 0));
        let (out, err) = (reply.text("stdout"), reply.text("stderr"));
        assert_eq!(reply.field("exit"), "0", "in sandbox {} `{script}` said {out:?} and {err:?}", self.id);
        out
    }

    /// Puts the guest tool into it, as /run/guest-tool.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn put_guest_tool(&self) {
        let tool = std::fs::read(crate::artefacts::node_tool("guest-tool")).expect("it was built");
        let request = self.request("file.write").set("path", "/run/guest-tool").set("mode", "0755").set("user", 0);
        let call = self.start(request);
        let writer = call.writer();
        assert!(writer.write("content", &tool), "writing the tool broke off");
        writer.end("content");
        call.finish_ok();
    }

    /// Its row, as `sandbox.inspect` gives it.
    pub fn inspect(&self) -> Fields {
        self.client.ok(self.request("sandbox.inspect")).fields
    }

    /// Its state.
    pub fn state(&self) -> String {
        self.inspect().get("state").unwrap_or_default().to_string()
    }

    /// Stops it in order.
    pub fn stop(&self) -> Reply {
        self.client.ok(self.request("sandbox.stop"))
    }

    /// Removes it, running or not.
    pub fn remove(mut self) -> Result<Reply, Error> {
        self.removed = true;
        self.client.call(self.request("sandbox.remove").set("force", true))
    }

    /// Leaves it on the node.
    pub fn keep(mut self) -> String {
        self.removed = true;
        self.id.clone()
    }

    /// The connection it is driven through.
    pub fn client(&self) -> &Client {
        &self.client
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.removed || self.client.closed().is_some() {
            return;
        }
        let mut call = self.client.start(self.request("sandbox.remove").set("force", true));
        // Not `finish`: a panic while a failed test unwinds would end the whole run.
        let _ = call.message_within(crate::timing::hang());
    }
}
