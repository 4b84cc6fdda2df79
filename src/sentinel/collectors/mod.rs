//! The kinds of collection, each a [`Service`] of the collecting loop. What each wants to know of a task is its
//! `plugin.toml`, built into the binary.

mod datagrams;
pub mod external;
pub mod http;
pub mod modbus;
pub mod node;
pub mod ping;
pub mod sandbox;
pub mod snmp;

use std::collections::HashMap;
use std::sync::Arc;

use crate::sentinel::collect::{Service, Settings, Stats};
use crate::sentinel::plugin::{FieldError, Manifest, Values};
use crate::sentinel::task::Task;

/// Every built-in plugin's manifest, as text.
pub const BUILT_IN: [(&str, &str); 6] = [
    ("http", include_str!("http/plugin.toml")),
    ("modbus", include_str!("modbus/plugin.toml")),
    ("node", include_str!("node/plugin.toml")),
    ("ping", include_str!("ping/plugin.toml")),
    ("sandbox", include_str!("sandbox/plugin.toml")),
    ("snmp", include_str!("snmp/plugin.toml")),
];

/// The manifest of a built-in plugin.
pub fn manifest(name: &str) -> Manifest {
    let text = BUILT_IN.iter().find(|(built_in, _)| *built_in == name).map_or("", |(_, text)| text);
    // Every one of them is parsed by a test.
    Manifest::parse(text).unwrap_or_else(|e| panic!("the manifest of {name} is part of this program: {e}"))
}

/// Checks a task's device and config fields against a manifest.
pub fn checked(manifest: &Manifest, task: &Task) -> Result<(Values, Values), FieldError> {
    Ok((manifest.device.check("device", &task.device)?, manifest.config.check("config", &task.config)?))
}

/// All services of one loop.
pub struct Services {
    /// In the order of their numbers; the last one runs the external plugins.
    pub all: Vec<Box<dyn Service>>,
    /// Which one runs a built-in plugin.
    pub built_in: HashMap<&'static str, usize>,
}

/// All services.
pub fn services(settings: &Settings, stats: &Arc<Stats>) -> Services {
    let built_in: [(&str, Box<dyn Service>); 6] = [
        ("http", Box::new(http::Http::new())),
        ("modbus", Box::new(modbus::Modbus::new())),
        ("node", Box::new(node::Node::new())),
        ("ping", Box::new(ping::Ping::new())),
        ("sandbox", Box::new(sandbox::Sandboxes::new())),
        ("snmp", Box::new(snmp::Snmp::new())),
    ];
    let names = built_in.iter().enumerate().map(|(number, (name, _))| (*name, number)).collect();
    let mut all: Vec<Box<dyn Service>> = built_in.into_iter().map(|(_, service)| service).collect();
    all.push(Box::new(external::External::new(settings, stats)));
    Services { all, built_in: names }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_manifest_is_one() {
        for (name, _) in BUILT_IN {
            let manifest = manifest(name);
            assert_eq!(manifest.name, name);
            assert!(manifest.program.is_none() && !manifest.description.is_empty());
        }
    }
}
