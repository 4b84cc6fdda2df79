//! Workers driven without the supervisor, on the node as root: `vm-rig SCENARIO [ARGUMENT]…`.
//!
//! Each scenario is a function in a file of its own, entered in the table below. It panics when something does not
//! hold; what it prints is for the test outside, which calls it by `Node::rig`.

mod disks;
mod frames;
mod hostile;
mod identity;
mod internet;
mod jail;
mod net;
mod network;
mod smoke;
mod snapshot;

use std::process::ExitCode;

/// A scenario by its name.
type Scenario = (&'static str, fn(&[&str]));

const SCENARIOS: &[Scenario] = &[
    ("disks", disks::run),
    ("hostile", hostile::run),
    ("identity", identity::run),
    ("internet", internet::run),
    ("jail", jail::run),
    ("net", net::run),
    ("network", network::run),
    ("smoke", smoke::run),
    ("snapshot", snapshot::run),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let found = arguments.split_first().and_then(|(name, rest)| {
        let (_, scenario) = SCENARIOS.iter().find(|(known, _)| known == name)?;
        Some((scenario, rest))
    });
    let Some((scenario, rest)) = found else {
        let names: Vec<&str> = SCENARIOS.iter().map(|(name, _)| *name).collect();
        eprintln!("usage: vm-rig SCENARIO [ARGUMENT]...; scenarios: {}", names.join(" "));
        return ExitCode::from(2);
    };
    scenario(rest);
    ExitCode::SUCCESS
}
