//! What `system.configure` sets for all programs and files.

use std::path::PathBuf;

use super::exec::{Identity, resolve};
use super::files::Owner;
use crate::wire::{Code, Error};

/// Where programs are looked for when no environment says so.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Defaults of programs and files.
#[derive(Debug)]
pub(super) struct Settings {
    /// Working directory, and what relative paths are relative to.
    pub cwd: PathBuf,
    /// User; `None` is the agent's own.
    pub user: Option<String>,
    /// `NAME=value` each.
    pub env: Vec<Vec<u8>>,
    /// Programs may write below `/workspace` and `/tmp` only.
    pub read_only: bool,
}

impl Settings {
    /// What a sandbox has before it is configured.
    pub(super) fn of_sandbox() -> Self {
        Self { cwd: PathBuf::from("/workspace"), user: Some("1000".to_string()), env: Vec::new(), read_only: false }
    }

    /// What any other machine has: the agent is there to act as who started it.
    pub(super) fn of_machine() -> Self {
        Self { cwd: PathBuf::from("/"), user: None, env: Vec::new(), read_only: false }
    }

    /// Whom a program runs as.
    pub(super) fn identity(&self, user: Option<&str>) -> Result<Option<Identity>, Error> {
        user.or(self.user.as_deref()).map(resolve).transpose()
    }

    /// Whom a file is given to.
    pub(super) fn owner(&self, user: Option<&str>) -> Result<Owner, Error> {
        Ok(match self.identity(user)? {
            Some(identity) => Owner { uid: identity.uid, gid: identity.gid },
            None => Owner { uid: nix::unistd::getuid().as_raw(), gid: nix::unistd::getgid().as_raw() },
        })
    }

    /// The environment of a program: the account's, the defaults, the request's; later ones win.
    pub(super) fn environment(&self, identity: Option<&Identity>, terminal: bool, own: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut env: Vec<Vec<u8>> = vec![format!("PATH={DEFAULT_PATH}").into_bytes()];
        if let Some((name, home)) = identity.and_then(|identity| identity.account.as_ref()) {
            env.push([b"USER=", name.as_slice()].concat());
            env.push([b"HOME=", home.as_slice()].concat());
        } else {
            env.push(b"HOME=/".to_vec());
        }
        if terminal {
            env.push(b"TERM=xterm".to_vec());
        }
        for variable in self.env.iter().cloned().chain(own) {
            match env.iter_mut().find(|other| name_of(other) == name_of(&variable)) {
                Some(other) => *other = variable,
                None => env.push(variable),
            }
        }
        env
    }
}

/// Checks that entries of an environment have names.
pub(super) fn check_environment(env: &[Vec<u8>]) -> Result<(), Error> {
    match env.iter().find(|variable| variable.iter().position(|&b| b == b'=').is_none_or(|at| at == 0)) {
        None => Ok(()),
        Some(variable) => {
            let shown: String = String::from_utf8_lossy(variable).chars().take(64).collect();
            let message = format!("env={shown} is not of the form NAME=value");
            Err(Error::new(Code::BadArgument, message).with("argument", "env"))
        }
    }
}

fn name_of(variable: &[u8]) -> &[u8] {
    variable.split(|&b| b == b'=').next().unwrap_or_default()
}

/// The value of a variable.
pub(super) fn variable<'a>(env: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().find(|variable| name_of(variable) == name).and_then(|variable| variable.get(name.len() + 1..))
}
