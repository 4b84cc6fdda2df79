//! What the kernel has of sandboxes, read from it, and where that differs from the ledger. Reading takes a system call or
//! two for each process and file: it is a background thread's work.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::path::Path;

use super::home::{self, Places};
use super::ledger::{Account, Holding, Resource};

/// What was found by one name in the sandboxes' places.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// There is a directory on the data partition.
    pub directory: bool,
    /// There is an overlay in it.
    pub disk: bool,
    /// There is a worker's socket.
    pub socket: bool,
    /// There is a control group.
    pub cgroup: bool,
    /// Its memory limit, in octets, where it has one.
    pub memory_max: Option<u64>,
    /// Its processes, with their real user ids.
    pub processes: Vec<(u64, u32)>,
}

/// Everything that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// By name.
    pub homes: BTreeMap<String, Found>,
    /// Processes that run by a worker's user id and are in no sandbox's group, with that id.
    pub strangers: Vec<(u64, u32)>,
    /// Names of overlays without a sandbox.
    pub spares: BTreeSet<String>,
    /// Mount points in the sandboxes' places.
    pub mounts: Vec<String>,
}

/// Something that ledger and kernel do not agree on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Whose, where that is known.
    pub sandbox: Option<String>,
    /// What: a word of `Resource`, or `mount`.
    pub resource: String,
    /// Which.
    pub name: String,
    /// What the ledger says.
    pub record: String,
    /// What the kernel says.
    pub kernel: String,
}

impl Census {
    /// Looks. `spares` is the directory of overlays without a sandbox, `users` are the ids that workers run by.
    pub fn take(places: &Places, spares: &Path, users: &Range<u32>) -> Self {
        let mut homes: BTreeMap<String, Found> = BTreeMap::new();
        for name in names(&places.disks) {
            let found = homes.entry(name.clone()).or_default();
            found.directory = true;
            found.disk = !home::overlays_in(&places.disks.join(&name)).is_empty();
        }
        for name in names(&places.sockets) {
            homes.entry(name.strip_suffix(".sock").unwrap_or(&name).to_string()).or_default().socket = true;
        }
        let mut grouped = BTreeSet::new();
        let groups = names(&places.cgroups).into_iter().filter(|name| places.cgroups.join(name).is_dir());
        for name in groups {
            let group = places.cgroups.join(&name);
            let found = homes.entry(name).or_default();
            found.cgroup = true;
            found.memory_max =
                fs::read_to_string(group.join("memory.max")).ok().and_then(|text| text.trim().parse().ok());
            let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            let pids = listed.lines().filter_map(|line| line.parse().ok());
            found.processes = pids.filter_map(|pid| Some((pid, user_of(pid)?))).collect();
            grouped.extend(found.processes.iter().map(|(pid, _)| *pid));
        }
        let pids = names(Path::new("/proc")).into_iter().filter_map(|name| name.parse().ok());
        let of_workers = pids.filter_map(|pid| Some((pid, user_of(pid)?))).filter(|(_, uid)| users.contains(uid));
        let strangers = of_workers.filter(|(pid, _)| !grouped.contains(pid)).collect();
        Self { homes, strangers, spares: names(spares).into_iter().collect(), mounts: mounts(places) }
    }

    /// Where these accounts, by sandbox, differ from what was found. Resources on their way from one to the other do not;
    /// network slots are the network's to compare.
    pub fn differences<'a>(
        &self,
        accounts: impl Iterator<Item = (&'a str, &'a Account)>,
        places: &Places,
    ) -> BTreeSet<Difference> {
        let accounts: BTreeMap<&str, &Account> = accounts.collect();
        let (nothing, nobody) = (Found::default(), Account::default());
        let mut all = BTreeSet::new();
        let names = accounts.keys().copied().chain(self.homes.keys().map(String::as_str));
        for name in names.collect::<BTreeSet<&str>>() {
            let found = self.homes.get(name).unwrap_or(&nothing);
            let account = accounts.get(name).copied().unwrap_or(&nobody);
            let compared = Resource::ALL.iter().filter(|resource| **resource != Resource::Slot);
            for (resource, kernel) in
                compared.filter_map(|resource| Some((*resource, found.against(account, *resource)?)))
            {
                let record = match account.get(resource) {
                    Some(entry) => entry.holding.as_str(),
                    None => "none",
                };
                all.insert(Difference {
                    sandbox: Some(name.to_string()),
                    resource: resource.to_string(),
                    name: name_of(resource, name, account, places),
                    record: record.to_string(),
                    kernel,
                });
            }
        }
        for (pid, uid) in &self.strangers {
            all.insert(stray("user", &uid.to_string(), &format!("process {pid}, in no sandbox's group")));
        }
        for mount in &self.mounts {
            all.insert(stray("mount", mount, "present"));
        }
        all
    }
}

impl Census {
    /// Where the overlays without a sandbox differ from those that the pool has.
    pub fn spare_differences(&self, pool: &BTreeSet<String>) -> BTreeSet<Difference> {
        let difference = |name: &String, record: &str, kernel: &str| Difference {
            record: record.to_string(),
            ..stray(Resource::Disk.as_str(), name, kernel)
        };
        let missing = pool.difference(&self.spares).map(|name| difference(name, "reserved", "absent"));
        missing.chain(self.spares.difference(pool).map(|name| difference(name, "none", "present"))).collect()
    }
}

fn stray(resource: &str, name: &str, kernel: &str) -> Difference {
    let (resource, name, kernel) = (resource.to_string(), name.to_string(), kernel.to_string());
    Difference { sandbox: None, resource, name, record: "none".to_string(), kernel }
}

impl Found {
    /// What the kernel says of a resource, where that is not what the account says.
    fn against(&self, account: &Account, resource: Resource) -> Option<String> {
        let entry = account.get(resource);
        let holding = account.holding(resource);
        let present = match resource {
            Resource::Directory => self.directory,
            Resource::Disk => self.disk,
            Resource::Socket => self.socket,
            Resource::Cgroup => self.cgroup,
            Resource::Process => !self.processes.is_empty(),
            // They are the group's and the process': what there is of them is as it should be, or not.
            Resource::Memory | Resource::User | Resource::Slot => holding.is_held(),
        };
        let word = |present| if present { "present" } else { "absent" };
        if holding == Holding::Error || (holding.is_held() && !present) || (holding.is_free() && present) {
            return Some(word(present).to_string());
        }
        let value = entry.filter(|entry| entry.holding.is_held())?.value?;
        let wrong = match resource {
            Resource::Process => self.processes.iter().any(|(pid, _)| *pid != value),
            Resource::User => self.processes.iter().any(|(_, uid)| u64::from(*uid) != value),
            Resource::Memory => self.cgroup && self.memory_max.is_none_or(|max| max >> 20 < value),
            _ => false,
        };
        wrong.then(|| match resource {
            Resource::Process => texts(self.processes.iter().map(|(pid, _)| *pid)),
            Resource::User => texts(self.processes.iter().map(|(_, uid)| u64::from(*uid))),
            _ => self.memory_max.map_or("no limit".to_string(), |max| (max >> 20).to_string()),
        })
    }
}

fn texts(numbers: impl Iterator<Item = u64>) -> String {
    numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(",")
}

/// What a person looks for.
fn name_of(resource: Resource, id: &str, account: &Account, places: &Places) -> String {
    let path = match resource {
        Resource::Directory => places.disks.join(id),
        Resource::Disk => places.disks.join(id).join("overlay"),
        Resource::Socket => places.sockets.join(format!("{id}.sock")),
        Resource::Cgroup | Resource::Memory | Resource::Process => places.cgroups.join(id),
        Resource::User | Resource::Slot => {
            return account
                .get(resource)
                .and_then(|entry| entry.value)
                .map(|value| value.to_string())
                .unwrap_or_default();
        }
    };
    path.display().to_string()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The files of a control group itself are no groups; everything else in the places is somebody's.
fn mounts(places: &Places) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let inside = |point: &&str| {
        [&places.disks, &places.sockets, &places.cgroups].iter().any(|place| {
            let point = Path::new(OsStr::new(point));
            point.starts_with(place) && point != place.as_path()
        })
    };
    points.filter(inside).map(str::to_string).collect()
}

/// The real user id of a process (proc_pid_status(5)); `None` when it is gone.
pub fn user_of(pid: u64) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places { disks: "/d".into(), sockets: "/s".into(), cgroups: "/c".into() }
    }

    fn account(holding: Holding) -> Account {
        let words = Resource::ALL.iter().map(|resource| {
            let value = match resource {
                Resource::User => ":100000",
                Resource::Memory => ":128",
                Resource::Process => ":7",
                _ => "",
            };
            format!("{resource}={holding}{value}")
        });
        Account::parse(&words.collect::<Vec<_>>().join(" ")).unwrap()
    }

    fn running() -> Found {
        Found {
            directory: true,
            disk: true,
            socket: true,
            cgroup: true,
            memory_max: Some(192 << 20),
            processes: vec![(7, 100_000)],
        }
    }

    fn compared(holding: Option<Holding>, found: Option<Found>) -> Vec<String> {
        let account = holding.map(account);
        let census = Census { homes: found.into_iter().map(|f| ("a".to_string(), f)).collect(), ..Census::default() };
        let all = census.differences(account.iter().map(|account| ("a", account)), &places());
        all.into_iter().map(|d| format!("{} {} {}", d.resource, d.record, d.kernel)).collect()
    }

    #[test]
    fn what_is_as_recorded_is_no_difference() {
        assert_eq!(compared(Some(Holding::Active), Some(running())), Vec::<String>::new());
        assert_eq!(compared(Some(Holding::Released), None), Vec::<String>::new());
        assert_eq!(compared(None, None), Vec::<String>::new());
        for &on_its_way in Holding::ALL.iter().filter(|holding| !holding.is_held() && !holding.is_free()) {
            if on_its_way != Holding::Error {
                assert_eq!(compared(Some(on_its_way), Some(running())), Vec::<String>::new(), "{on_its_way}");
                assert_eq!(compared(Some(on_its_way), None), Vec::<String>::new(), "{on_its_way}");
            }
        }
    }

    #[test]
    fn whatever_is_missing_or_left_behind_is_named() {
        let present = |record: &str| {
            ["cgroup", "directory", "disk", "process", "socket"].map(|what| format!("{what} {record} present")).to_vec()
        };
        assert_eq!(compared(None, Some(running())), present("none"));
        assert_eq!(compared(Some(Holding::Released), Some(running())), present("released"));
        let absent = ["cgroup", "directory", "disk", "process", "socket"].map(|what| format!("{what} active absent"));
        assert_eq!(compared(Some(Holding::Active), None), absent);
        assert_eq!(compared(Some(Holding::Error), None).len(), Resource::ALL.len() - 1, "a failure is never in order");
    }

    #[test]
    fn another_process_user_or_limit_is_named() {
        let other = Found { processes: vec![(7, 100_000), (8, 100_001)], memory_max: Some(1 << 20), ..running() };
        assert_eq!(
            compared(Some(Holding::Active), Some(other)),
            ["memory active 1", "process active 7,8", "user active 100000,100001"]
        );
        let census = Census { strangers: vec![(9, 100_002)], mounts: vec!["/d/x".to_string()], ..Census::default() };
        let all = census.differences(std::iter::empty(), &places());
        let names: Vec<&str> = all.iter().map(|difference| difference.name.as_str()).collect();
        assert_eq!(names, ["/d/x", "100002"]);
    }

    #[test]
    fn a_spare_overlay_is_the_pools() {
        let census = Census { spares: BTreeSet::from(["a".to_string(), "b".to_string()]), ..Census::default() };
        let all = census.spare_differences(&BTreeSet::from(["b".to_string(), "c".to_string()]));
        let shown: Vec<String> = all.iter().map(|d| format!("{} {} {}", d.name, d.record, d.kernel)).collect();
        assert_eq!(shown, ["a none present", "c reserved absent"]);
    }

    #[test]
    fn a_process_has_a_user() {
        assert_eq!(user_of(std::process::id().into()), Some(nix::unistd::getuid().as_raw()));
        assert_eq!(user_of(u64::MAX), None);
    }
}
