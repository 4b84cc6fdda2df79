//! Connections to scraped targets between two scrapes: one for each task at most.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::exchange::Connection;
use crate::sentinel::collect::Io;

/// Connections kept altogether: descriptors are worth more than a handshake.
const MOST: usize = 1024;
/// A task with a longer interval keeps none: many servers close what is silent for so long.
const LONGEST: Duration = Duration::from_secs(120);

/// The connections, by task.
#[derive(Default)]
pub struct Idle {
    kept: HashMap<String, Connection>,
    tasks: HashMap<u64, String>,
}

impl Idle {
    /// Keeps a connection until the task's next run, if there is room and it is soon.
    pub fn keep(&mut self, task: &str, interval: Duration, mut connection: Connection, io: &Io<'_>) {
        self.forget(task, io);
        if self.kept.len() >= MOST || interval > LONGEST || !connection.is_quiet() {
            connection.close(io);
            return;
        }
        self.tasks.insert(connection.number, task.to_string());
        self.kept.insert(task.to_string(), connection);
    }

    /// The task's connection to one of these addresses, if it is still good.
    pub fn take(&mut self, task: &str, good: impl Fn(SocketAddr) -> bool, io: &Io<'_>) -> Option<Connection> {
        let mut connection = self.kept.remove(task)?;
        self.tasks.remove(&connection.number);
        if good(connection.address) && connection.is_quiet() {
            return Some(connection);
        }
        connection.close(io);
        None
    }

    /// Something has come on a connection that nothing was asked on: mostly its end.
    pub fn ready(&mut self, number: u64, io: &Io<'_>) {
        let Some(task) = self.tasks.get(&number) else { return };
        if self.kept.get_mut(task).is_some_and(Connection::is_quiet) {
            return;
        }
        let task = task.clone();
        self.forget(&task, io);
    }

    /// The task is gone or asks for something else.
    pub fn forget(&mut self, task: &str, io: &Io<'_>) {
        if let Some(connection) = self.kept.remove(task) {
            self.tasks.remove(&connection.number);
            connection.close(io);
        }
    }
}
