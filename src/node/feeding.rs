//! Who attaches to a program, and who feeds its stdin.

use super::instance::Sandbox;
use super::requests::Job;
use super::supervisor::Supervisor;
use crate::control::command::Verb;
use crate::sandbox::exec::{Exec, has_ended};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::stdin::{Standing, not_open};
use crate::wire::{Code, Error, Fields, Message, Request};

/// Programs of a sandbox that others than their owners feed, or for which octets of such wait: for each a window may.
const FED_MAX: usize = 256;

/// Whether a request may change something.
pub(super) fn is_audited(request: &Request) -> bool {
    let feeds = request.verb == "exec.attach" && request.has("stdin");
    Verb::of(&request.verb).is_some_and(|verb| verb.is_audited() || feeds)
}

impl Supervisor {
    /// `exec.attach`
    pub(super) fn attach_exec(
        &mut self,
        key: u64,
        tag: &str,
        given: &str,
        number: u64,
        feeds: bool,
    ) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let missing = || Error::new(Code::NotFound, format!("sandbox {id} has no exec {number}")).with("exec", number);
        if feeds {
            let sandbox = self.sandboxes.get(&id).ok_or_else(missing)?;
            check_feeder(sandbox.execs.get(&number).ok_or_else(missing)?)?;
            let fed = |exec: &&Exec| exec.stdin.is_holding() || exec.feeder().is_some_and(|viewer| !viewer.owner);
            if sandbox.execs.values().filter(fed).count() >= FED_MAX {
                let message = format!("sandbox {id} has {FED_MAX} programs that are fed after their start, the limit");
                return Err(Error::new(Code::NoCapacity, message).with("max", FED_MAX));
            }
            self.find_running(key, given)?;
        }
        let exec = self.sandboxes.get_mut(&id).and_then(|sandbox| sandbox.execs.get_mut(&number));
        exec.ok_or_else(missing)?.attach(key, tag, feeds);
        self.add_job(key, tag, Job::Exec { sandbox: id, number });
        Ok(())
    }

    /// The program whose stdin a request of a client feeds, if it does. One of a code run has none.
    fn fed(&mut self, key: u64, tag: &str) -> Option<(&SandboxId, &mut Exec)> {
        let Job::Exec { sandbox, number } = self.clients.get(&key)?.jobs.get(tag)? else { return None };
        let sandbox = self.sandboxes.get_mut(sandbox)?;
        let exec = sandbox.execs.get_mut(number)?;
        (exec.code.is_none() && exec.is_fed_by(key, tag)).then_some((&sandbox.id, exec))
    }

    /// A client sends octets for a program's stdin. What comes from one that does not feed it is dropped.
    pub(super) fn feed(&mut self, key: u64, tag: &str, octets: Vec<u8>) -> Result<(), Error> {
        if let Some((id, exec)) = self.fed(key, tag)
            && exec.outcome.is_none()
        {
            let id = id.clone();
            exec.stdin.take(octets)?;
            self.touched_sandboxes.insert(id);
        }
        Ok(())
    }

    /// A client says that nothing more comes for a program's stdin.
    pub(super) fn end_feed(&mut self, key: u64, tag: &str) {
        if let Some((id, exec)) = self.fed(key, tag) {
            let id = id.clone();
            exec.stdin.end();
            self.touched_sandboxes.insert(id);
        }
    }

    /// Nothing more comes from a client: others may feed what it attached to.
    pub(super) fn let_go_of_stdins(&mut self, key: u64) {
        let Some(client) = self.clients.get(&key) else { return };
        for job in client.jobs.values() {
            let Job::Exec { sandbox, number } = job else { continue };
            let exec = self.sandboxes.get_mut(sandbox).and_then(|sandbox| sandbox.execs.get_mut(number));
            let viewers = exec.into_iter().flat_map(|exec| &mut exec.viewers);
            viewers.filter(|viewer| viewer.client == key && !viewer.owner).for_each(|viewer| viewer.feeds = false);
        }
    }

    /// Over a new link an agent says where a program's streams stand.
    pub(super) fn streams_stand(&mut self, id: &SandboxId, number: u64, said: &Fields) {
        let Some(exec) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.execs.get_mut(&number)) else { return };
        let standing = exec.stdin.stands(said.number("stdin_offset"), said.number("stdin_credit"));
        let error = match standing {
            Standing::Same => None,
            Standing::Closed => Some(not_open().with("exec", number)),
            Standing::Elsewhere(offset) => {
                let message = format!("what was sent to stdin after octet {offset} was lost with the sandbox's link");
                Some(Error::new(Code::LinkLost, message).with("stdin_offset", offset))
            }
        };
        let feeder = exec.feeder().map(|viewer| (viewer.client, viewer.tag.clone()));
        if let (Some(error), Some((key, tag))) = (error, feeder) {
            self.cancel(key, &tag);
            self.answer(key, &Message::err(&tag, error));
        }
        self.touched_sandboxes.insert(id.clone());
        self.touch_viewers(id, number);
    }
}

/// Why a client cannot begin to feed a program.
fn check_feeder(exec: &Exec) -> Result<(), Error> {
    let number = exec.number;
    let refused = |what: &str| Err(Error::new(Code::BadState, format!("exec {number} {what}")).with("exec", number));
    if exec.code.is_some() {
        return refused("is a code run: it has no stdin");
    }
    if exec.outcome.is_some() {
        return Err(has_ended(number));
    }
    if exec.feeder().is_some_and(|viewer| !viewer.owner) {
        return refused("is fed by another client");
    }
    exec.stdin.check().map_err(|error| error.with("exec", number))?;
    if exec.feeder().is_some() { refused("is fed by another client, whose program it is") } else { Ok(()) }
}

/// Sends a program what waits for its stdin, where its sandbox runs or is asked to end: what is sent to one that is about to stand
/// still might not arrive before that.
pub(super) fn pour(sandbox: &mut Sandbox) {
    let running = matches!(sandbox.state, State::Running | State::Stopping);
    let Some(worker) = sandbox.worker.as_mut().filter(|_| running) else { return };
    for exec in sandbox.execs.values_mut() {
        let Some(route) = &exec.route else { continue };
        while let Some(octets) = exec.stdin.pass_on() {
            worker.agent.send(&Message::data(route, "stdin", octets));
        }
        if exec.stdin.ends() {
            worker.agent.send(&Message::end(route, "stdin"));
        }
    }
}
