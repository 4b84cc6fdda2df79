//! Who did what: each request that changes something goes to the audit log when it is taken, and once more with its result.

use super::supervisor::{Supervisor, now_ms};
use crate::control::client::{Ended, Noted};
use crate::storage::audit::{AuditEnd, AuditQuery, AuditRow};
use crate::storage::state::{Change, Query};
use crate::wire::{Arg, Code, Error, Fields, Message, Request};

/// Longest arguments that are kept, in octets.
const MAX_ARGUMENTS: usize = 1024;
/// Rows that may wait for the medium; with more, nothing that would need another is taken.
const MAX_PENDING: usize = 16 * 1024;

impl Supervisor {
    /// Notes a request that was just taken. Fails when the database is too far behind.
    pub(super) fn audit(&mut self, key: u64, request: &Request) -> Result<(), Error> {
        let pending = self.database.pending();
        if pending > MAX_PENDING {
            let message = format!("the state database is {pending} rows behind: over the limit of {MAX_PENDING}");
            return Err(Error::new(Code::NoCapacity, message).with("max", MAX_PENDING));
        }
        let named = request.args.iter().find_map(|arg| match arg {
            Arg::Positional(value) => String::from_utf8(value.clone()).ok(),
            Arg::Named(..) => None,
        });
        let named = named.filter(|_| !request.verb.starts_with("node."));
        let sandbox = named.map(|given| self.find(key, &given).map_or(given, |id| id.to_string()));
        let Some(client) = self.clients.get_mut(&key) else { return Ok(()) };
        let (who, id) = (client.identity().clone(), self.next_audit);
        self.next_audit += 1;
        client.audits.insert(request.tag.clone(), Noted { row: id, names_sandbox: sandbox.is_some() });
        let row = AuditRow {
            id,
            began_ms: now_ms(),
            ended_ms: None,
            peer: who.peer,
            owner: who.owner,
            role: who.role.to_string(),
            verb: request.verb.clone(),
            sandbox,
            arguments: arguments(request),
            result: None,
        };
        self.database.submit(Change::BeginAudit(Box::new(row)));
        Ok(())
    }

    /// Notes how a client's requests ended.
    pub(super) fn audit_ends(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        for Ended { audit: id, result, sandbox } in std::mem::take(&mut client.ended) {
            self.database.submit(Change::EndAudit(AuditEnd { id, ended_ms: now_ms(), result, sandbox }));
        }
    }

    /// A client is gone: nobody gets these answers.
    pub(super) fn audit_gone(&mut self, key: u64) {
        self.audit_ends(key);
        let Some(client) = self.clients.get_mut(&key) else { return };
        for Noted { row: id, .. } in std::mem::take(&mut client.audits).into_values() {
            let result = Code::Cancelled.as_str().to_string();
            self.database.submit(Change::EndAudit(AuditEnd { id, ended_ms: now_ms(), result, sandbox: None }));
        }
    }

    /// Begins to read the audit log for a client.
    pub(super) fn ask_audit(&mut self, key: u64, tag: &str, query: AuditQuery) {
        self.ask_database(key, tag, Query::Audit(query));
    }
}

/// A row of the log as clients see it.
pub(super) fn fields(row: &AuditRow) -> Fields {
    let fields = Fields::new()
        .with("audit", row.id)
        .with("began_ms", row.began_ms)
        .with("peer", &row.peer)
        .with("owner", &row.owner)
        .with("role", &row.role)
        .with("verb", &row.verb);
    let maybe = [("sandbox", &row.sandbox), ("result", &row.result)];
    let fields = maybe.into_iter().fold(fields, |fields, (key, value)| match value {
        Some(value) => fields.with(key, value),
        None => fields,
    });
    let fields = match row.ended_ms {
        Some(time) => fields.with("ended_ms", time),
        None => fields,
    };
    fields.with("arguments", &row.arguments)
}

/// The arguments as a line has them. What environment variables are set to may be secret.
fn arguments(request: &Request) -> String {
    let shown = |arg: &Arg| match arg {
        Arg::Named(key, value) if key == "env" => {
            let name = value.split(|octet| *octet == b'=').next().unwrap_or_default();
            Arg::Named(key.clone(), [name, b"=..."].concat())
        }
        other => other.clone(),
    };
    let shown = Request { tag: String::new(), verb: String::new(), args: request.args.iter().map(shown).collect() };
    let line = Message::Request(shown).to_bytes();
    let mut text = String::from_utf8_lossy(&line).trim().to_string();
    if text.len() > MAX_ARGUMENTS {
        let end = (0..=MAX_ARGUMENTS).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_variables_are_set_to_is_not_kept() {
        let request = Request::new("1", "sandbox.create").set("name", "a b").set("env", "KEY=secret").set("env", "X");
        assert_eq!(arguments(&request), r#"name="a b" env="KEY=..." env="X=...""#);
    }

    #[test]
    fn long_arguments_are_cut() {
        let request = Request::new("1", "exec.start").arg("ä".repeat(MAX_ARGUMENTS));
        let text = arguments(&request);
        assert!(text.len() <= MAX_ARGUMENTS + 3 && text.ends_with("ä..."), "{text}");
    }
}
