//! The arguments of `vm.start`, checked.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::devices::block::ID_LEN;
use super::devices::net::{MAX_MTU, MIN_MTU, NetConfig};
use super::devices::rate::{Limits, LimitsChange, Rate};
use super::devices::{ExtraDisk, MAX_EXTRA_DISKS, ROOT};
use super::memory::PAGE;
use crate::storage::overlay::MAX_LAYERS;
use crate::wire::{Args, Code, Error, Request};

/// Most processors of a guest.
pub const MAX_VCPUS: u64 = 16;
/// Least memory of a guest, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;
/// Most memory of a guest, in MiB.
pub const MAX_MEMORY_MIB: u64 = 32 * 1024;
/// Least memory that a balloon is asked to leave a guest, in MiB.
pub const MIN_TARGET_MIB: u64 = 32;
/// First guest address of vsock; lower ones have meanings of their own (virtio 1.2 §5.10.4).
const MIN_CID: u64 = 3;

/// MTU of Ethernet, where none is given.
const DEFAULT_MTU: u64 = 1500;

/// What a guest starts from.
#[derive(Debug)]
pub enum Source {
    /// A cold boot.
    Kernel {
        /// Guest kernel, an uncompressed ELF.
        kernel: File,
        /// Guest initramfs.
        initramfs: File,
        /// Kernel parameters after the worker's own.
        command_line: String,
    },
    /// A snapshot: it goes on where that was taken. Its network is closed until `vm.open`.
    Snapshot {
        /// Its files.
        files: SnapshotFiles,
        /// Name of what was prepared of it beforehand, which is used where the worker has it.
        prepared: Option<String>,
    },
}

/// What a guest goes on from.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// Devices and processors.
    pub state: File,
    /// RAM without its hole; never changes.
    pub memory: File,
    /// What such guests touch at once (`snapshot::working_set`).
    pub working_set: Option<File>,
}

/// What a microVM is started with.
#[derive(Debug)]
pub struct StartConfig {
    /// Processors, 1 to `MAX_VCPUS`.
    pub vcpus: u8,
    /// Memory in octets, a multiple of a page.
    pub memory_bytes: u64,
    /// Guest's vsock address.
    pub cid: u32,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// What the guest starts from.
    pub source: Source,
    /// Where the serial port's output goes.
    pub serial: File,
    /// Read-only image under the root disk.
    pub base: File,
    /// What the guest writes to its root disk.
    pub overlay: File,
    /// Frozen layers between them, newest first, at most `MAX_LAYERS`.
    pub layers: Vec<File>,
    /// Further disks, at most `MAX_EXTRA_DISKS`, in the guest's order; names are unique.
    pub disks: Vec<ExtraDisk>,
    /// Of all disks together.
    pub disk_limits: Limits,
    /// The network, with the host's end of it.
    pub net: Option<(OwnedFd, NetConfig)>,
}

impl StartConfig {
    /// Length of the longest file that it may write to, in octets: a disk, or a snapshot of its memory.
    pub fn longest_file(&self) -> u64 {
        let disks = self.disks.iter().filter(|disk| !disk.read_only).map(|disk| &disk.file);
        let lengths = disks.chain([&self.overlay]).map(|file| file.metadata().map_or(0, |meta| meta.len()));
        lengths.max().unwrap_or(0).max(self.memory_bytes)
    }

    /// Checks a `vm.start` request; `descriptors` are those that came with it. What it does not name is closed.
    pub fn parse(request: Request, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut args = Args::of(request);
        let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
        let vcpus = args.number("vcpus", 1..=MAX_VCPUS)?.unwrap_or(1) as u8;
        let memory_mib = needed("memory_mib", args.number("memory_mib", MIN_MEMORY_MIB..=MAX_MEMORY_MIB)?)?;
        let memory_bytes = memory_mib << 20;
        debug_assert_eq!(memory_bytes % PAGE, 0);
        let cid = needed("cid", args.number("cid", MIN_CID..=u64::from(u32::MAX) - 1)?)? as u32;
        let mut limit = |key| Ok::<_, Error>(args.number(key, 1..=u64::MAX)?.map(Rate::per_second));
        let disk_limits = Limits { operations: limit("disk_iops")?, bytes: limit("disk_bytes_per_s")? };
        let disks = take_disks(&mut args, &mut descriptors)?;
        let layers = take_layers(&mut args, &mut descriptors)?;
        let net = take_net(&mut args, &mut descriptors)?;
        let state = args.text("state")?;
        let prepared = args.text("prepared")?;
        let working_set = match (&state, args.text("working_set")?) {
            (Some(_), Some(given)) => Some(take_named(&mut descriptors, "working_set", &given)?.into()),
            (None, Some(_)) => {
                let message = "working_set is of a snapshot, which is given by state";
                return Err(Error::new(Code::BadArgument, message).with("argument", "working_set"));
            }
            (_, None) => None,
        };
        let command_line = if state.is_none() { args.text("cmdline")?.unwrap_or_default() } else { String::new() };
        let mut take = |key| take_descriptor(&mut args, &mut descriptors, key);
        let config = Self {
            vcpus,
            memory_bytes,
            cid,
            kvm: take("kvm")?,
            serial: take("serial")?.into(),
            base: take("base")?.into(),
            overlay: take("overlay")?.into(),
            layers,
            source: match state {
                None => Source::Kernel {
                    kernel: take("kernel")?.into(),
                    initramfs: take("initramfs")?.into(),
                    command_line,
                },
                Some(state) => {
                    let memory = take("memory")?.into();
                    let state = take_named(&mut descriptors, "state", &state)?.into();
                    Source::Snapshot { files: SnapshotFiles { state, memory, working_set }, prepared }
                }
            },
            disks,
            disk_limits,
            net,
        };
        args.finish()?;
        Ok(config)
    }
}

/// The arguments of `vm.prepare`.
#[derive(Debug)]
pub struct PrepareConfig {
    /// What `vm.start` will call it.
    pub name: String,
    /// Processors, 1 to `MAX_VCPUS`.
    pub vcpus: u8,
    /// Memory in octets, a multiple of a page.
    pub memory_bytes: u64,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// The snapshot.
    pub files: SnapshotFiles,
}

impl PrepareConfig {
    /// Checks a `vm.prepare` request; `descriptors` are those that came with it.
    pub fn parse(request: Request, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut args = Args::of(request);
        let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
        let name = needed("name", args.text("name")?)?;
        let vcpus = args.number("vcpus", 1..=MAX_VCPUS)?.unwrap_or(1) as u8;
        let memory_mib = needed("memory_mib", args.number("memory_mib", MIN_MEMORY_MIB..=MAX_MEMORY_MIB)?)?;
        let working_set = match args.text("working_set")? {
            Some(given) => Some(take_named(&mut descriptors, "working_set", &given)?.into()),
            None => None,
        };
        let mut take = |key| take_descriptor(&mut args, &mut descriptors, key);
        let (kvm, state, memory) = (take("kvm")?, take("state")?.into(), take("memory")?.into());
        args.finish()?;
        let files = SnapshotFiles { state, memory, working_set };
        Ok(Self { name, vcpus, memory_bytes: memory_mib << 20, kvm, files })
    }
}

/// The arguments of `vm.capture`.
#[derive(Debug)]
pub struct CaptureConfig {
    /// Where the state goes, an empty file.
    pub state: File,
    /// Where the memory goes, as long as the guest's memory and without data.
    pub memory: File,
    /// /proc/PID/pagemap of this process; without it all of the memory is written.
    pub page_map: Option<File>,
    /// Gets `Done` when both are written; the supervisor has the other end.
    pub done: File,
    /// The guest stands still afterwards, until `vm.resume`.
    pub hold: bool,
    /// Of a restored guest's memory only what differs from its file is written.
    pub diff: bool,
    /// The root disk's overlay is frozen at the same instant, and this one, empty, is written from then on.
    pub overlay: Option<NextOverlay>,
}

/// What a root disk is written to after a snapshot.
#[derive(Debug)]
pub struct NextOverlay {
    /// What the supervisor calls it: the worker says it in its greeting once the guest writes to it.
    pub name: String,
    /// Empty, on the medium, of the disk's shape.
    pub file: File,
}

impl CaptureConfig {
    /// Checks a `vm.capture` request; `descriptors` are those that came with it.
    pub fn parse(request: Request, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut args = Args::of(request);
        let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
        let (hold, diff) = (args.flag("hold")?, args.flag("diff")?);
        let page_map = match args.text("page_map")? {
            Some(given) => Some(take_named(&mut descriptors, "page_map", &given)?.into()),
            None => None,
        };
        let overlay = match args.text("overlay_name")? {
            Some(name) => {
                let file = take_descriptor(&mut args, &mut descriptors, "overlay")?.into();
                Some(NextOverlay { name, file })
            }
            None => None,
        };
        let mut take = |key| take_descriptor(&mut args, &mut descriptors, key);
        let (state, memory, done) = (take("state")?.into(), take("memory")?.into(), take("done")?.into());
        args.finish()?;
        Ok(Self { state, memory, page_map, done, hold, diff, overlay })
    }
}

/// The arguments of `vm.working_set`: /proc/PID/pagemap of this process, and the empty file that it goes to.
pub fn parse_working_set(request: Request, descriptors: Vec<OwnedFd>) -> Result<(File, File), Error> {
    let mut args = Args::of(request);
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let mut take = |key| take_descriptor(&mut args, &mut descriptors, key);
    let files = (take("page_map")?.into(), take("into")?.into());
    args.finish()?;
    Ok(files)
}

/// The arguments of `vm.limits`: what is to change of the disks, and each way of the network (to the guest first). With 0 there is no
/// limit any more.
pub fn parse_limits(request: Request) -> Result<(LimitsChange, Option<[LimitsChange; 2]>), Error> {
    let mut args = Args::of(request);
    let mut rate = |key| {
        let rate = args.number(key, 0..=u64::MAX)?;
        Ok::<_, Error>(rate.map(|rate| (rate > 0).then(|| Rate::per_second(rate))))
    };
    let disks = LimitsChange { operations: rate("disk_iops")?, bytes: rate("disk_bytes_per_s")? };
    let rx = LimitsChange { operations: rate("net_rx_packets_per_s")?, bytes: rate("net_rx_bytes_per_s")? };
    let tx = LimitsChange { operations: rate("net_tx_packets_per_s")?, bytes: rate("net_tx_bytes_per_s")? };
    args.finish()?;
    let net = [rx, tx];
    Ok((disks, (net != [LimitsChange::default(); 2]).then_some(net)))
}

fn needed<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::new(Code::MissingArgument, format!("{key} is missing")).with("argument", key))
}

/// The further disks: `disk=NAME:ro|rw:fd:N` each.
fn take_disks(args: &mut Args, descriptors: &mut [Option<OwnedFd>]) -> Result<Vec<ExtraDisk>, Error> {
    let mut disks: Vec<ExtraDisk> = Vec::new();
    let bad = |message: String| Error::new(Code::BadArgument, message).with("argument", "disk");
    for value in args.all("disk") {
        let value = String::from_utf8(value).map_err(|_| bad("disk is not UTF-8".to_string()))?;
        let mut parts = value.splitn(3, ':');
        let (Some(name), Some(mode @ ("ro" | "rw")), Some(descriptor)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(bad(format!("disk={value} is not of the form NAME:ro|rw:fd:N")));
        };
        if name.is_empty() || name.len() > ID_LEN || name == ROOT || disks.iter().any(|disk| disk.name == name) {
            return Err(bad(format!("disk={value}: the name must be another one of 1 to {ID_LEN} octets")));
        }
        let file = take_named(descriptors, "disk", descriptor)?.into();
        disks.push(ExtraDisk { name: name.to_string(), file, read_only: mode == "ro" });
    }
    if disks.len() > MAX_EXTRA_DISKS {
        return Err(bad(format!("{} disks are over the limit of {MAX_EXTRA_DISKS}", disks.len())));
    }
    Ok(disks)
}

/// The frozen layers: `layer=fd:N` each, newest first.
fn take_layers(args: &mut Args, descriptors: &mut [Option<OwnedFd>]) -> Result<Vec<File>, Error> {
    let bad = |message: String| Error::new(Code::BadArgument, message).with("argument", "layer");
    let named = args.all("layer");
    if named.len() > MAX_LAYERS {
        return Err(bad(format!("{} layers are over the limit of {MAX_LAYERS}", named.len())));
    }
    let text = |value| String::from_utf8(value).map_err(|_| bad("layer is not UTF-8".to_string()));
    named.into_iter().map(|value| Ok(take_named(descriptors, "layer", &text(value)?)?.into())).collect()
}

/// The network, where `tap=fd:N` is given.
fn take_net(args: &mut Args, descriptors: &mut [Option<OwnedFd>]) -> Result<Option<(OwnedFd, NetConfig)>, Error> {
    let Some(tap) = args.text("tap")? else { return Ok(None) };
    let tap = take_named(descriptors, "tap", &tap)?;
    let mac = needed("mac", args.text("mac")?)?;
    let mac = parse_mac(&mac).ok_or_else(|| {
        Error::new(
            Code::BadArgument,
            format!("mac={mac} is no address of one station, six octets as xx:xx:xx:xx:xx:xx"),
        )
        .with("argument", "mac")
    })?;
    let mtu = args.number("mtu", u64::from(MIN_MTU)..=u64::from(MAX_MTU))?.unwrap_or(DEFAULT_MTU) as u16;
    let ipv4 = args.text("ipv4")?.map(|given| {
        given.parse().map_err(|_| {
            Error::new(Code::BadArgument, format!("ipv4={given} is no IPv4 address")).with("argument", "ipv4")
        })
    });
    let offloads = !args.flag("plain_frames")?;
    let mut limit = |key| Ok::<_, Error>(args.number(key, 1..=u64::MAX)?.map(Rate::per_second));
    let rx = Limits { bytes: limit("net_rx_bytes_per_s")?, operations: limit("net_rx_packets_per_s")? };
    let tx = Limits { bytes: limit("net_tx_bytes_per_s")?, operations: limit("net_tx_packets_per_s")? };
    Ok(Some((tap, NetConfig { mac, mtu, ipv4: ipv4.transpose()?, offloads, rx, tx })))
}

/// A hardware address of one station: not a group's, and not zero.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && octets[0] & 1 == 0 && octets != [0; 6]).then_some(octets)
}

/// The descriptor that `key=fd:N` names. Each can be named once.
fn take_descriptor(args: &mut Args, descriptors: &mut [Option<OwnedFd>], key: &'static str) -> Result<OwnedFd, Error> {
    let value = needed(key, args.text(key)?)?;
    take_named(descriptors, key, &value)
}

fn take_named(descriptors: &mut [Option<OwnedFd>], key: &'static str, value: &str) -> Result<OwnedFd, Error> {
    let index = value.strip_prefix("fd:").and_then(|n| n.parse::<usize>().ok());
    index.and_then(|n| descriptors.get_mut(n)).and_then(Option::take).ok_or_else(|| {
        Error::new(Code::BadArgument, format!("{key}={value} names no descriptor that came with the request"))
            .with("argument", key)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 6] = ["kvm", "kernel", "initramfs", "serial", "base", "overlay"];

    fn request() -> Request {
        let request = Request::new("1", "vm.start").set("memory_mib", 128).set("cid", 3);
        (0..).zip(KEYS).fold(request, |r, (n, key)| r.set(key, format!("fd:{n}")))
    }

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
    }

    fn code(request: Request) -> String {
        StartConfig::parse(request, descriptors(6)).expect_err("a bad request was taken").code
    }

    fn replace(key: &str, value: &str) -> Request {
        let mut request = request();
        request.args.retain(|a| !matches!(a, crate::wire::Arg::Named(k, _) if k == key));
        request.set(key, value)
    }

    #[test]
    fn what_is_to_be_prepared_names_its_snapshot() {
        let request = |keys: &[&str]| {
            let all = Request::new("1", "vm.prepare").set("name", "a").set("memory_mib", 128);
            (0..).zip(keys).fold(all, |request, (n, key)| request.set(key, format!("fd:{n}")))
        };
        let config = PrepareConfig::parse(request(&["kvm", "state", "memory", "working_set"]), descriptors(4)).unwrap();
        assert_eq!((config.name.as_str(), config.vcpus, config.memory_bytes), ("a", 1, 128 << 20));
        assert!(config.files.working_set.is_some());
        assert!(PrepareConfig::parse(request(&["kvm", "state", "memory"]), descriptors(3)).is_ok());
        for keys in [&["kvm", "state"][..], &["state", "memory"], &["kvm", "state", "memory", "disk"]] {
            assert!(PrepareConfig::parse(request(keys), descriptors(4)).is_err(), "{keys:?}");
        }
    }

    #[test]
    fn a_full_request_is_taken() {
        let config = StartConfig::parse(request().set("cmdline", "a b"), descriptors(6)).unwrap();
        assert_eq!((config.vcpus, config.memory_bytes, config.cid), (1, 128 << 20, 3));
        assert!(matches!(config.source, Source::Kernel { command_line, .. } if command_line == "a b"));
    }

    #[test]
    fn numbers_outside_their_limits_are_refused() {
        for (key, value) in
            [("vcpus", "0"), ("vcpus", "17"), ("memory_mib", "1"), ("memory_mib", "1073741824"), ("cid", "2")]
        {
            assert_eq!(code(replace(key, value)), "OUT_OF_RANGE", "{key}={value}");
        }
        assert_eq!(code(replace("vcpus", "two")), "BAD_ARGUMENT");
    }

    #[test]
    fn disks_have_names_of_their_own_and_descriptors() {
        let with = |disks: &[&str]| disks.iter().fold(request(), |request, disk| request.set("disk", disk));
        let config = StartConfig::parse(with(&["a:ro:fd:7", "b:rw:fd:6"]), descriptors(8)).unwrap();
        let found: Vec<_> = config.disks.iter().map(|disk| (disk.name.as_str(), disk.read_only)).collect();
        assert_eq!(found, [("a", true), ("b", false)]);
        let long = format!("{}:ro:fd:6", "a".repeat(21));
        for bad in
            ["a", "a:ro", "a:fd:6", "a:wo:fd:6", ":ro:fd:6", "root:ro:fd:6", "a:ro:fd:5", "a:ro:6", long.as_str()]
        {
            let error = StartConfig::parse(with(&[bad]), descriptors(7)).unwrap_err();
            assert_eq!(error.code, "BAD_ARGUMENT", "{bad}");
        }
        assert!(StartConfig::parse(with(&["a:ro:fd:7", "a:rw:fd:6"]), descriptors(8)).is_err());
        let nine: Vec<String> = (0..9).map(|n| format!("d{n}:rw:fd:{}", 6 + n)).collect();
        let nine: Vec<&str> = nine.iter().map(String::as_str).collect();
        assert!(StartConfig::parse(with(&nine), descriptors(15)).is_err());
        assert_eq!(StartConfig::parse(with(&nine[..8]), descriptors(14)).unwrap().disks.len(), 8);
    }

    #[test]
    fn layers_come_in_their_order_and_each_with_a_descriptor() {
        let with = |layers: &[String]| layers.iter().fold(request(), |request, layer| request.set("layer", layer));
        let named = |count: usize| (0..count).map(|n| format!("fd:{}", 6 + n)).collect::<Vec<_>>();
        let config = StartConfig::parse(with(&named(MAX_LAYERS)), descriptors(6 + MAX_LAYERS)).unwrap();
        assert_eq!(config.layers.len(), MAX_LAYERS);
        assert!(StartConfig::parse(request(), descriptors(6)).unwrap().layers.is_empty());
        let one_more = StartConfig::parse(with(&named(MAX_LAYERS + 1)), descriptors(7 + MAX_LAYERS));
        assert_eq!(one_more.unwrap_err().fields.get("argument"), Some("layer"));
        for bad in [vec!["fd:6".to_string(); 2], vec!["fd:5".to_string()], vec!["6".to_string()]] {
            assert_eq!(StartConfig::parse(with(&bad), descriptors(7)).unwrap_err().code, "BAD_ARGUMENT");
        }
        let mut files = descriptors(7);
        files.push(File::open("/proc/self/stat").unwrap().into());
        let order = StartConfig::parse(with(&["fd:7".to_string(), "fd:6".to_string()]), files).unwrap().layers;
        let is_null =
            |file: &File| std::os::unix::fs::FileTypeExt::is_char_device(&file.metadata().unwrap().file_type());
        assert_eq!(order.iter().map(is_null).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn a_snapshot_takes_the_kernels_place() {
        let mut request = replace("kernel", "fd:0");
        request.args.retain(|a| !matches!(a, crate::wire::Arg::Named(k, _) if k == "kernel" || k == "initramfs"));
        let from = request.set("state", "fd:1").set("memory", "fd:2").set("kvm", "fd:0");
        let from = |set: &[(&str, &str)]| set.iter().fold(from.clone(), |r, (k, v)| r.set(k, v));
        let mut whole = from(&[]);
        whole.args.remove(2);
        let config = StartConfig::parse(whole.clone(), descriptors(6)).unwrap();
        assert!(matches!(config.source, Source::Snapshot { .. }));
        assert_eq!(config.longest_file(), 128 << 20);
        assert_eq!(code(whole.clone().set("cmdline", "a")), "UNKNOWN_ARGUMENT", "it has booted long ago");
        assert_eq!(code(whole.set("kernel", "fd:0")), "UNKNOWN_ARGUMENT");
    }

    #[test]
    fn limits_are_optional() {
        let limited = request().set("disk_iops", 100).set("disk_bytes_per_s", 1_000_000);
        let limits = StartConfig::parse(limited, descriptors(6)).unwrap().disk_limits;
        assert_eq!((limits.operations.unwrap().per_second, limits.bytes.unwrap().per_second), (100, 1_000_000));
        assert_eq!(StartConfig::parse(request(), descriptors(6)).unwrap().disk_limits, Limits::default());
        assert_eq!(code(request().set("disk_iops", 0)), "OUT_OF_RANGE");
    }

    #[test]
    fn a_change_of_limits_names_what_changes() {
        let change = Request::new("1", "vm.limits").set("disk_iops", 0).set("net_tx_bytes_per_s", 5000);
        let (disks, net) = parse_limits(change).unwrap();
        assert_eq!(disks, LimitsChange { operations: Some(None), bytes: None });
        let [rx, tx] = net.unwrap();
        assert_eq!((rx, tx.bytes), (LimitsChange::default(), Some(Some(Rate::per_second(5000)))));
        assert_eq!(parse_limits(Request::new("1", "vm.limits")).unwrap(), (LimitsChange::default(), None));
        assert!(parse_limits(Request::new("1", "vm.limits").set("vcpus", 1)).is_err());
    }

    #[test]
    fn a_network_is_taken_with_its_addresses_and_limits() {
        assert!(StartConfig::parse(request(), descriptors(6)).unwrap().net.is_none());
        let net = || request().set("tap", "fd:6").set("mac", "02:00:00:00:aB:01");
        let (_, config) = StartConfig::parse(net(), descriptors(7)).unwrap().net.unwrap();
        assert_eq!((config.mac, config.mtu, config.ipv4), ([2, 0, 0, 0, 0xab, 1], 1500, None));
        assert!(config.offloads && config.rx == Limits::default() && config.tx == Limits::default());
        let full = net()
            .set("mtu", 9000)
            .set("ipv4", "10.0.0.2")
            .set("plain_frames", "true")
            .set("net_rx_bytes_per_s", 1000)
            .set("net_tx_packets_per_s", 7);
        let (_, config) = StartConfig::parse(full, descriptors(7)).unwrap().net.unwrap();
        assert_eq!((config.mtu, config.ipv4, config.offloads), (9000, Some([10, 0, 0, 2].into()), false));
        assert_eq!((config.rx.bytes, config.rx.operations), (Some(Rate::per_second(1000)), None));
        assert_eq!((config.tx.bytes, config.tx.operations), (None, Some(Rate::per_second(7))));
    }

    #[test]
    fn networks_that_cannot_be_are_refused() {
        let code = |request: Request| StartConfig::parse(request, descriptors(7)).expect_err("was taken").code;
        let net = || request().set("tap", "fd:6");
        assert_eq!(code(net()), "MISSING_ARGUMENT");
        assert_eq!(code(request().set("mac", "02:00:00:00:00:01")), "UNKNOWN_ARGUMENT", "without a device");
        for mac in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "03:00:00:00:00:01", "00:00:00:00:00:00", "2:0:0:0:0:+1"]
        {
            assert_eq!(code(net().set("mac", mac)), "BAD_ARGUMENT", "{mac}");
        }
        let net = || net().set("mac", "02:00:00:00:00:01");
        assert_eq!(code(net().set("ipv4", "10.0.0")), "BAD_ARGUMENT");
        assert_eq!(code(net().set("mtu", 67)), "OUT_OF_RANGE");
        assert_eq!(code(net().set("mtu", 65_522)), "OUT_OF_RANGE");
        assert_eq!(code(net().set("net_rx_packets_per_s", 0)), "OUT_OF_RANGE");
    }

    #[test]
    fn descriptors_must_be_there_and_are_used_once() {
        for bad in ["fd:6", "fd:0", "fd:", "fd:-1", "/dev/kvm"] {
            assert_eq!(code(replace("overlay", bad)), "BAD_ARGUMENT", "{bad}");
        }
        assert_eq!(StartConfig::parse(request(), descriptors(5)).unwrap_err().code, "BAD_ARGUMENT");
        assert_eq!(code(Request::new("1", "vm.start").set("memory_mib", 64)), "MISSING_ARGUMENT");
        assert_eq!(code(request().set("surprise", 1)), "UNKNOWN_ARGUMENT");
    }
}
