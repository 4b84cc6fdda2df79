//! Who a sandbox is, and how one that was made from another's memory becomes itself: clock, randomness, names,
//! addresses, and the notice to its programs. All by system calls of the agent's own: a program started for it would
//! cost a clone more than everything else.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

use super::network::{HardwareAddress, Network};
use super::{report, system};
use crate::wire::{Args, Code, Error};

/// Where programs find who they are.
const PLACE: &str = "/run/warren";
const MACHINE_ID: &str = "/etc/machine-id";

/// Octets of a seed.
const SEED: std::ops::RangeInclusive<usize> = 16..=512;

/// Who the sandbox is, as its programs are told.
#[derive(Debug, Default)]
pub(super) struct Identity {
    /// The sandbox's id, once it was told.
    pub id: Option<String>,
    /// Grows each time that the sandbox goes on from a snapshot.
    pub generation: u64,
    /// The id before this one.
    previous: Option<String>,
}

impl Identity {
    /// The notice at the start, so that there is one to be watched.
    pub(super) fn introduce(&self) {
        if let Err(e) = self.publish(Path::new(PLACE)) {
            report(&format!("cannot write {PLACE}/generation: {e}"));
        }
    }

    /// Writes the notice, in place of the one before.
    fn publish(&self, place: &Path) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let (id, previous) = (self.id.as_deref().unwrap_or_default(), self.previous.as_deref().unwrap_or_default());
        let text = format!("generation={}\nid={id}\nprevious={previous}\ntime_ns={now}\n", self.generation);
        fs::create_dir_all(place)?;
        let new = place.join(".generation");
        fs::write(&new, text)?;
        fs::rename(&new, place.join("generation"))
    }

    /// Who comes after it: what is not said goes on, and the number grows by itself.
    fn next(&self, id: Option<String>, generation: Option<u64>) -> Self {
        Self {
            id: id.or_else(|| self.id.clone()),
            generation: generation.unwrap_or(self.generation.saturating_add(1)),
            previous: self.id.clone(),
        }
    }
}

/// What `system.thaw` changes before the programs go on.
#[derive(Debug)]
pub(super) struct Renewal {
    clock: Option<Duration>,
    seed: Option<Vec<u8>>,
    hostname: Option<String>,
    machine_id: Option<String>,
    network: Option<(Option<HardwareAddress>, Network)>,
    id: Option<String>,
    generation: Option<u64>,
}

impl Renewal {
    /// Takes the arguments. All of them are checked before the first takes effect.
    pub(super) fn parse(mut args: Args) -> Result<Self, Error> {
        let renewal = Self {
            clock: system::clock(&mut args)?,
            seed: seed(&mut args)?,
            hostname: system::host_name(&mut args)?,
            machine_id: machine_id(&mut args)?,
            network: interface(&mut args)?,
            id: sandbox_id(&mut args)?,
            generation: args.number("generation", 0..=u64::MAX)?,
        };
        args.finish()?;
        Ok(renewal)
    }

    /// Does each step that has its argument, in this order. The error names the step at which it ended.
    pub(super) fn apply(self, identity: &mut Identity) -> Result<(), Error> {
        let at = |step: &'static str| move |error: Error| error.with("step", step);
        if let Some(clock) = self.clock {
            system::set_clock(clock).map_err(at("clock"))?;
        }
        if let Some(seed) = &self.seed {
            reseed(seed).map_err(|e| failed("reseed the random pool", &e)).map_err(at("random"))?;
        }
        if let Some(name) = &self.hostname {
            system::set_host_name(name).map_err(at("hostname"))?;
        }
        if let Some(id) = &self.machine_id {
            let written = write_machine_id(Path::new(MACHINE_ID), id);
            written.map_err(|e| failed(&format!("write {MACHINE_ID}"), &e)).map_err(at("machine-id"))?;
        }
        if let Some((hardware, network)) = &self.network {
            network.renew(*hardware).map_err(at("network"))?;
        }
        if self.id.is_some() || self.generation.is_some() {
            let next = identity.next(self.id, self.generation);
            let published = next.publish(Path::new(PLACE));
            published.map_err(|e| failed(&format!("write {PLACE}/generation"), &e)).map_err(at("notice"))?;
            *identity = next;
        }
        Ok(())
    }
}

fn failed(what: &str, error: &io::Error) -> Error {
    let error_number = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Error::new(Code::Internal, format!("cannot {what}: {error}")).with("errno", format!("{error_number:?}"))
}

fn bad(argument: &str, sentence: String) -> Error {
    Error::new(Code::BadArgument, sentence).with("argument", argument)
}

/// `id=`: a sandbox's id. Anything of 1 to 64 letters, digits and `-`.
pub(super) fn sandbox_id(args: &mut Args) -> Result<Option<String>, Error> {
    let Some(id) = args.text("id")? else { return Ok(None) };
    let fits = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fits { Ok(Some(id)) } else { Err(bad("id", format!("id={id} is no sandbox's id"))) }
}

fn seed(args: &mut Args) -> Result<Option<Vec<u8>>, Error> {
    match args.bytes("seed")? {
        Some(seed) if !SEED.contains(&seed.len()) => {
            let sentence =
                format!("a seed of {} octets is out of range: {} to {}", seed.len(), SEED.start(), SEED.end());
            let error = Error::new(Code::OutOfRange, sentence).with("argument", "seed");
            Err(error.with("min", SEED.start()).with("max", SEED.end()))
        }
        seed => Ok(seed),
    }
}

/// The interface's addresses. A hardware address alone would leave it without its routes.
fn interface(args: &mut Args) -> Result<Option<(Option<HardwareAddress>, Network)>, Error> {
    match (HardwareAddress::parse(args)?, Network::parse(args)?) {
        (Some(_), None) => {
            Err(Error::new(Code::MissingArgument, "mac is given without address").with("argument", "address"))
        }
        (hardware, network) => Ok(network.map(|network| (hardware, network))),
    }
}

/// machine-id(5): 32 lower-case hexadecimal digits, not all of them 0.
fn machine_id(args: &mut Args) -> Result<Option<String>, Error> {
    let Some(id) = args.text("machine_id")? else { return Ok(None) };
    let fits = id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if fits && id.bytes().any(|b| b != b'0') {
        Ok(Some(id))
    } else {
        Err(bad("machine_id", format!("machine_id={id} is not 32 hexadecimal digits of machine-id(5)")))
    }
}

/// The file keeps its permissions, and needs no room on the disk where it was one before. A root disk without /etc gets
/// none.
fn write_machine_id(path: &Path, id: &str) -> io::Result<()> {
    let text = format!("{id}\n");
    // A pipe or a terminal in its place must not hold the agent up.
    let mut options = File::options();
    options.write(true).create(true).truncate(false).mode(0o444).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = match options.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)`, include/uapi/linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// `struct rand_pool_info` with its buffer.
#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; *SEED.end()],
}

/// Mixes the seed into the kernel's random pool and has its generator, and with it those that programs have in the
/// vDSO, begin anew from the pool: from here on they say something else than any other machine of the same memory.
fn reseed(seed: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo { entropy_count: 0, buf_size: 0, buf: [0; *SEED.end()] };
    let room = info.buf.get_mut(..seed.len()).ok_or(io::ErrorKind::InvalidInput)?;
    room.copy_from_slice(seed);
    // At most 4096 and 512.
    (info.entropy_count, info.buf_size) = (seed.len() as libc::c_int * 8, seed.len() as libc::c_int);
    let device = File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/dev/urandom")?;
    // SAFETY: the descriptor is open; RNDADDENTROPY reads the two numbers and as many octets behind them as the second
    // says, which `buf` has.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: the descriptor is open; RNDRESEEDCRNG takes nothing.
    match Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) }) {
        // It was never seeded, so there is nothing that another machine could say too.
        Ok(_) | Err(Errno::ENODATA) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::wire::Request;

    fn parse(keys: &[(&str, &str)]) -> Result<Renewal, String> {
        let request = keys.iter().fold(Request::new("1", "system.thaw"), |r, (key, value)| r.set(key, *value));
        Renewal::parse(Args::of(request)).map_err(|e| e.code)
    }

    struct Place(std::path::PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("burrow-identity-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn arguments_are_checked_before_anything_is_done() {
        let seed = "s".repeat(32);
        let id = "0123456789abcdef0123456789abcdef";
        let all = [
            ("id", "k3v9x0q2m7ta"),
            ("hostname", "clone-1"),
            ("machine_id", id),
            ("clock_ns", "1800000000000000000"),
            ("seed", &seed),
            ("generation", "7"),
            ("mac", "02:00:00:00:00:07"),
            ("address", "10.0.0.1/31"),
            ("gateway", "10.0.0.0"),
            ("mtu", "1500"),
            ("dns", "1.1.1.1"),
        ];
        assert!(parse(&all).is_ok());
        assert!(parse(&[]).is_ok());
        for (key, value) in [
            ("id", ""),
            ("id", "../x"),
            ("hostname", "a b"),
            ("machine_id", "0123456789ABCDEF0123456789ABCDEF"),
            ("machine_id", "00000000000000000000000000000000"),
            ("machine_id", "0123"),
            ("mac", "02:00:00:00:00"),
            ("mac", "03:00:00:00:00:07"),
            ("mac", "00:00:00:00:00:00"),
            ("address", "10.0.0.1"),
        ] {
            assert_eq!(parse(&[(key, value)]).unwrap_err(), "BAD_ARGUMENT", "{key}={value}");
        }
        for (key, value) in
            [("seed", "fifteen octets."), ("seed", &"x".repeat(513)), ("clock_ns", "9223372036854775808")]
        {
            assert_eq!(parse(&[(key, value)]).unwrap_err(), "OUT_OF_RANGE", "{key}={value}");
        }
        assert_eq!(parse(&[("uuid", "1")]).unwrap_err(), "UNKNOWN_ARGUMENT");
        assert_eq!(parse(&[("mac", "02:00:00:00:00:07")]).unwrap_err(), "MISSING_ARGUMENT");
        // Without an address there is nothing that these could be of.
        assert_eq!(parse(&[("gateway", "10.0.0.0")]).unwrap_err(), "UNKNOWN_ARGUMENT");
    }

    #[test]
    fn a_machine_id_is_replaced_and_its_file_stays_what_it_was() {
        let place = Place::new("machine-id");
        let (path, first, second) = (place.0.join("machine-id"), "a".repeat(32), "b".repeat(32));
        write_machine_id(&path, &first).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{first}\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        fs::write(&path, "uninitialized, and then some more text than an id has\n").unwrap();
        write_machine_id(&path, &second).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{second}\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        // A root disk without /etc.
        write_machine_id(&place.0.join("etc/machine-id"), &first).unwrap();
        assert!(!place.0.join("etc").exists());
        // Something else in its place is an error, and no wait.
        let pipe = place.0.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(write_machine_id(&pipe, &first).is_err());
    }

    #[test]
    fn the_notice_says_who_one_is_and_was() {
        let place = Place::new("notice");
        let notice = || {
            let text = fs::read_to_string(place.0.join("generation")).unwrap();
            text.lines().filter(|line| !line.starts_with("time_ns=")).collect::<Vec<_>>().join(" ")
        };
        let mut identity = Identity::default();
        identity.publish(&place.0).unwrap();
        assert_eq!(notice(), "generation=0 id= previous=");
        identity = identity.next(Some("one".into()), Some(5)).next(Some("two".into()), None);
        identity.publish(&place.0).unwrap();
        assert_eq!(notice(), "generation=6 id=two previous=one");
        // A rollback: the same sandbox.
        identity = identity.next(None, Some(9));
        identity.publish(&place.0).unwrap();
        assert_eq!(notice(), "generation=9 id=two previous=two");
        assert_eq!(fs::read_dir(&place.0).unwrap().count(), 1, "nothing is left beside it");
    }
}
