//! `node`: this machine's own metrics, from /proc and /sys. Names, labels and units are node_exporter's, so that its
//! dashboards and rules work.
//!
//! The files are read as hostile input: bounded, and a line that is not understood is left out. Reading and asking file
//! systems for their room may block, so a run is a job of the pool; a dead network file system costs this task only.

mod files;
mod filesystem;
mod parse;
mod sensors;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use regex_lite::Regex;

use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::plugin::{FieldError, Manifest, Values};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;

pub use filesystem::mounts;
pub use parse::{diskstats, loadavg, meminfo, net_dev, pressure, stat, vmstat};

/// The service.
pub struct Node {
    manifest: Manifest,
}

/// What one task measures.
#[derive(Clone)]
struct NodePlan {
    root: PathBuf,
    parts: Vec<String>,
    disks: Regex,
    interfaces: Regex,
    mounts: Regex,
    types: Regex,
}

impl Node {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self { manifest: manifest("node") }
    }
}

fn excluded(config: &Values, key: &str) -> Result<Regex, FieldError> {
    Regex::new(&format!("^(?:{})$", config.text(key)))
        .map_err(|e| FieldError::new(format!("config.{key}"), e.to_string()))
}

impl Service for Node {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (_, config) = checked(&self.manifest, task)?;
        Ok(Arc::new(NodePlan {
            root: config.text("root").into(),
            parts: config.texts("collectors").into_iter().map(str::to_string).collect(),
            disks: excluded(&config, "disks_exclude")?,
            interfaces: excluded(&config, "interfaces_exclude")?,
            mounts: excluded(&config, "mounts_exclude")?,
            types: excluded(&config, "types_exclude")?,
        }))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<NodePlan>().cloned() else { return };
        let (table, task, started_ms) = (Arc::clone(io.table), Arc::clone(&run.task), run.started_ms);
        io.work(
            run.id,
            Box::new(move || {
                let mut out = Gatherer::new(&table, &task.labels, started_ms);
                plan.measure(&mut out);
                if out.is_empty() {
                    return Finished::failure(format!("nothing could be read under {}", plan.root.display()));
                }
                Finished::success(out.done())
            }),
        );
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        if io.unwork(run) { Cancelled::Gone(Finished::failure("no thread was free")) } else { Cancelled::Held }
    }
}

impl NodePlan {
    fn measure(&self, out: &mut Gatherer<'_>) {
        let read = |path: &str| files::read(&self.root.join(path));
        for part in &self.parts {
            match part.as_str() {
                "cpu" => {
                    stat(&read("proc/stat"), out);
                    loadavg(&read("proc/loadavg"), out);
                }
                "memory" => {
                    meminfo(&read("proc/meminfo"), out);
                    vmstat(&read("proc/vmstat"), out);
                }
                "disk" => diskstats(&read("proc/diskstats"), &|disk| !self.disks.is_match(disk), out),
                "network" => {
                    // A process's own network namespace, not that of whoever mounted /proc.
                    let wanted = |name: &str| !self.interfaces.is_match(name);
                    net_dev(&read("proc/self/net/dev"), &wanted, out);
                    sensors::interfaces(&self.root, &wanted, out);
                }
                "pressure" => {
                    for resource in ["cpu", "io", "memory", "irq"] {
                        pressure(resource, &read(&format!("proc/pressure/{resource}")), out);
                    }
                }
                "filesystem" => self.filesystems(out),
                "hwmon" => sensors::hwmon(&self.root, out),
                "system" => system(&self.root, out),
                _ => {}
            }
        }
    }

    fn filesystems(&self, out: &mut Gatherer<'_>) {
        // PID 1 sees the machine's mounts; without the right to look there, our own do.
        let mut mounts = files::read(&self.root.join("proc/1/mounts"));
        if mounts.is_empty() {
            mounts = files::read(&self.root.join("proc/self/mounts"));
        }
        for mount in filesystem::mounts(&mounts) {
            if !self.mounts.is_match(&mount.point) && !self.types.is_match(&mount.kind) {
                filesystem::measure(&self.root, &mount, out);
            }
        }
    }
}

/// What is neither one nor the other: time, kernel, open files, entropy.
fn system(root: &Path, out: &mut Gatherer<'_>) {
    use crate::sentinel::model::Kind;
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    out.gauge("node_time_seconds", since.as_secs_f64());
    let handles = files::read(&root.join("proc/sys/fs/file-nr"));
    let handles: Vec<f64> = handles.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    if let [allocated, _, maximum] = handles[..] {
        out.gauge("node_filefd_allocated", allocated);
        out.gauge("node_filefd_maximum", maximum);
    }
    if let Ok(bits) = files::read(&root.join("proc/sys/kernel/random/entropy_avail")).trim().parse() {
        out.gauge("node_entropy_available_bits", bits);
    }
    if let Ok(name) = nix::sys::utsname::uname() {
        let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
        let labels = [
            ("sysname", text(name.sysname())),
            ("release", text(name.release())),
            ("version", text(name.version())),
            ("machine", text(name.machine())),
            ("nodename", text(name.nodename())),
            ("domainname", text(name.domainname())),
        ];
        out.add("node_uname_info", Kind::Gauge, &labels, 1.0);
    }
}

#[cfg(test)]
mod tests;
