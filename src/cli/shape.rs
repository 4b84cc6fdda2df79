//! What is said of a sandbox: its shape, what it may reach and take, and for how long.

use clap::{ArgAction, Args};

use super::values::{Disk, parse_disk, parse_label, parse_mib, parse_time_limit};
use crate::wire::Request;

/// What a sandbox may reach.
#[derive(Debug, Default, Args)]
pub struct NetworkArgs {
    /// Whether it reaches the internet [default: off]
    #[arg(long, value_name = "on|off", value_parser = ["on", "off"])]
    pub network: Option<String>,
    /// A range of IPv4 addresses that it may reach; nothing else then, but for what has a longer prefix in --deny
    #[arg(long, value_name = "CIDR", requires = "network", value_delimiter = ',')]
    pub allow: Vec<String>,
    /// A range of IPv4 addresses that it may not reach
    #[arg(long, value_name = "CIDR", requires = "network", value_delimiter = ',')]
    pub deny: Vec<String>,
}

impl NetworkArgs {
    /// The request with these.
    pub fn add_to(&self, request: Request) -> Request {
        let request = self.network.iter().fold(request, |request, network| request.set("network", network));
        let request = self.allow.iter().fold(request, |request, range| request.set("allow", range));
        self.deny.iter().fold(request, |request, range| request.set("deny", range))
    }
}

/// What a running sandbox may take.
#[derive(Debug, Default, Args)]
#[group(id = "limits", multiple = true)]
pub struct LimitArgs {
    /// Time of processors, in hundredths of one
    #[arg(long, value_name = "N")]
    pub cpu_quota: Option<u64>,
    /// Most requests a second to all disks together
    #[arg(long, value_name = "N")]
    pub disk_iops: Option<u64>,
    /// Most megabytes (10^6) a second to and from all disks together
    #[arg(long, value_name = "N")]
    pub disk_mbps: Option<u64>,
    /// Most megabytes (10^6) a second over the network, each way
    #[arg(long, value_name = "N")]
    pub net_mbps: Option<u64>,
}

/// How long a sandbox may be there: each a time such as 10m, which ends with a stop, or 10m:pause, or none.
#[derive(Debug, Default, Clone, Args)]
#[group(id = "time limits", multiple = true)]
pub struct TimeLimitArgs {
    /// How long from now it may be there, such as 10m or 10m:pause (then it is paused, not stopped), or none
    #[arg(long, value_name = "LIMIT", value_parser = parse_time_limit)]
    pub ttl: Option<String>,
    /// How long it may be without use
    #[arg(long, value_name = "LIMIT", value_parser = parse_time_limit)]
    pub idle_timeout: Option<String>,
    /// How long it may be there at most, from its creation on
    #[arg(long, value_name = "LIMIT", value_parser = parse_time_limit)]
    pub max_lifetime: Option<String>,
}

impl TimeLimitArgs {
    /// Puts those that were given into a request.
    pub fn add_to(&self, request: Request) -> Request {
        let limits = [("ttl", &self.ttl), ("idle_timeout", &self.idle_timeout), ("max_lifetime", &self.max_lifetime)];
        let given = limits.into_iter().filter_map(|(key, limit)| Some((key, limit.as_ref()?)));
        given.fold(request, |request, (key, limit)| request.set(key, limit))
    }

    /// Whether there are any.
    pub fn are_given(&self) -> bool {
        self.ttl.is_some() || self.idle_timeout.is_some() || self.max_lifetime.is_some()
    }
}

/// What a new sandbox is to be.
#[derive(Debug, Default, Args)]
pub struct Shape {
    /// A name for the sandbox
    #[arg(long)]
    pub name: Option<String>,
    /// Whose it is, where that is somebody else (admins only)
    #[arg(long)]
    pub owner: Option<String>,
    /// Virtual CPUs
    #[arg(long, alias = "cpus", value_name = "N")]
    pub vcpus: Option<u64>,
    /// Time of processors that it may take, in hundredths of one; without it what its own may take
    #[arg(long, value_name = "N")]
    pub cpu_quota: Option<u64>,
    /// Memory, such as 512M or 2G; a bare number is MiB
    #[arg(short, long, value_name = "SIZE", value_parser = parse_mib)]
    pub memory: Option<u64>,
    /// Size of the root disk, such as 4G (a bare number is MiB), or a further disk: NAME:new:SIZE,
    /// NAME:file:FILE[:ro] or NAME:device:DEVICE[:ro], with the node's names of files and devices
    #[arg(long, value_name = "SIZE|DISK", value_parser = parse_disk)]
    pub disk: Vec<Disk>,
    /// Most requests a second to all disks together
    #[arg(long, value_name = "N")]
    pub disk_iops: Option<u64>,
    /// Most megabytes (10^6) a second to and from all disks together
    #[arg(long, value_name = "N")]
    pub disk_mbps: Option<u64>,
    /// Its network
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Most megabytes (10^6) a second over the network, each way
    #[arg(long, value_name = "N", requires = "network")]
    pub net_mbps: Option<u64>,
    /// An environment variable for commands; without =VALUE it is taken from here
    #[arg(short, long, value_name = "NAME[=VALUE]", action = ArgAction::Append)]
    pub env: Vec<String>,
    /// Whether it is started again when it fails: never, on-failure, on-failure:N
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<String>,
    /// How long it may be there
    #[command(flatten)]
    pub time_limits: TimeLimitArgs,
    /// Its programs, but for root's, write below /workspace and /tmp only
    #[arg(long)]
    pub read_only: bool,
    /// Boot it, also where its template has a snapshot to start from
    #[arg(long)]
    pub cold: bool,
    /// A label
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse_label)]
    pub label: Vec<String>,
}
