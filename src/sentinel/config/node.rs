//! The same tables as part of a node's one file, below `[sentinel]`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Config, Paths, TaskEntry};
use crate::node::config::{Config as NodeConfig, ConfigError};
use crate::sentinel::secret::Given;

/// What a node measures of itself where the file has no `[[sentinel.task]]`.
const OWN_TASKS: [&str; 2] = ["node", "sandbox"];
const OWN_INTERVAL_MS: u64 = 15_000;

/// Where a sentinel's configuration is.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Whether it is a node's.
    pub node: bool,
}

impl Source {
    /// Reads and checks it.
    pub fn load(&self) -> Result<Config, ConfigError> {
        if !self.node {
            return Config::load(&self.path);
        }
        let missing = || ConfigError {
            file: self.path.clone(),
            line: None,
            key: Some("sentinel".into()),
            message: "there is no such table".into(),
        };
        let config = NodeConfig::load(&self.path)?.sentinel.ok_or_else(missing)?;
        config.check_mode(&self.path, "sentinel.")?;
        Ok(config)
    }

    /// Its data directory, from a file that may be as wrong as it likes: a sentinel that runs is to be asked and told all
    /// the same.
    pub fn data_directory(&self) -> Result<PathBuf, String> {
        let text = fs::read_to_string(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))?;
        let (table, _) = toml::de::DeTable::parse_recoverable(&text);
        let data = |table: &toml::de::DeTable<'_>| {
            let paths = table.get("paths")?.get_ref().as_table()?;
            Some(PathBuf::from(paths.get("data")?.get_ref().as_str()?))
        };
        if !self.node {
            return Ok(data(table.get_ref()).unwrap_or_else(|| Paths::default().data));
        }
        let own = table.get_ref().get("sentinel").and_then(|table| data(table.get_ref().as_table()?));
        let node = || data(table.get_ref()).unwrap_or_else(|| crate::node::config::Paths::default().data);
        Ok(own.unwrap_or_else(|| below(&node())))
    }
}

fn below(data: &Path) -> PathBuf {
    data.join("sentinel")
}

impl Config {
    /// Fills in what a node knows: its name, where its data is, its own tasks.
    pub fn settle_on_node(&mut self, name: &str, data: &Path, socket: &Path) {
        if self.name.is_empty() {
            self.name = name.to_string();
        }
        if self.paths == Paths::default() {
            self.paths.data = below(data);
        }
        if self.task.is_empty() {
            self.task = OWN_TASKS.iter().map(|plugin| own_task(plugin)).collect();
        }
        for task in self.task.iter_mut().filter(|task| task.plugin == "sandbox" && !task.device.contains_key("socket"))
        {
            task.device.insert("socket".into(), Value::String(socket.display().to_string()));
        }
    }
}

fn own_task(plugin: &str) -> TaskEntry {
    TaskEntry {
        id: plugin.into(),
        plugin: plugin.into(),
        device: Given::default(),
        config: Given::default(),
        labels: Default::default(),
        interval_ms: OWN_INTERVAL_MS,
        timeout_ms: None,
        priority: 0,
        retries: 0,
    }
}
