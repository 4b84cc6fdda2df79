//! The node's one configuration file. Every key has a default; the shipped example (rootfs/host/etc/warren/warren.toml)
//! shows them all. A mistake is an error that names file, line and key: nothing is ignored or guessed.

mod tables;

use std::fmt;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
pub use tables::{
    Control, Disks, Health, History, Jail, Level, Log, MAX_DNS, Network, Node, Packages, Paths, Pool, Sandbox,
    Snapshots, Templates, Warm,
};
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use crate::sentinel;

/// Where the node keeps the file.
pub const DEFAULT_PATH: &str = "/etc/warren/warren.toml";
/// More than this is no configuration file.
const MAX_FILE: u64 = 1024 * 1024;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[node]`
    pub node: Node,
    /// `[control]`
    pub control: Control,
    /// `[paths]`
    pub paths: Paths,
    /// `[sandbox]`
    pub sandbox: Sandbox,
    /// `[health]`
    pub health: Health,
    /// `[worker_pool]`
    pub worker_pool: Pool,
    /// `[overlay_pool]`
    pub overlay_pool: Pool,
    /// `[[warm]]`, one for each pool.
    pub warm: Vec<Warm>,
    /// `[snapshots]`
    pub snapshots: Snapshots,
    /// `[history]`
    pub history: History,
    /// `[templates]`
    pub templates: Templates,
    /// `[packages]`
    pub packages: Packages,
    /// `[jail]`
    pub jail: Jail,
    /// `[disks]`
    pub disks: Disks,
    /// `[network]`
    pub network: Network,
    /// `[log]`
    pub log: Log,
    /// `[sentinel]`, with the tables of the sentinel's own file in it; without it no sentinel runs.
    pub sentinel: Option<sentinel::config::Config>,
}

/// Why a file was not taken, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1; `None` where the file could not be read at all.
    pub line: Option<usize>,
    /// Dotted, such as `sandbox.default_vcpus`; `None` where no key is at fault.
    pub key: Option<String>,
    /// What is wrong, with the value and the limit.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ": {key}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |message: String| ConfigError { file: path.to_path_buf(), line: None, key: None, message };
        let length = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?.len();
        if length > MAX_FILE {
            return Err(unreadable(format!("{length} octets are over the limit of {MAX_FILE}")));
        }
        // It may hold secrets.
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?);
        let config = Self::parse(&text, path)?;
        if let Some(key) = config.packages.plain_secret() {
            secret_needs_mode(path, key)?;
        }
        Ok(config)
    }

    /// Checks a text; `path` is only named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let place = Place { text, path };
        let mut config: Self = toml::from_str(text).map_err(|e| place.of_error(&e))?;
        config.validate().map_err(|(key, message)| place.of_key(key, message))?;
        if let Some(sentinel) = &mut config.sentinel {
            sentinel.settle_on_node(&config.node.name, &config.paths.data, &config.control.socket);
            sentinel.validate().map_err(|(key, message)| place.of_key(&format!("sentinel.{key}"), message))?;
        }
        Ok(config)
    }

    /// The rules that types do not say. Gives the first key that breaks one.
    fn validate(&self) -> Result<(), (&'static str, String)> {
        host_name("node.name", &self.node.name)?;
        self.control.validate()?;
        self.paths.validate()?;
        self.sandbox.validate()?;
        self.health.validate()?;
        self.worker_pool.validate([
            "worker_pool.min_ready",
            "worker_pool.max",
            "worker_pool.idle_timeout_s",
            "worker_pool.max_age_s",
            "worker_pool.wait_ms",
        ])?;
        self.overlay_pool.validate([
            "overlay_pool.min_ready",
            "overlay_pool.max",
            "overlay_pool.idle_timeout_s",
            "overlay_pool.max_age_s",
            "overlay_pool.wait_ms",
        ])?;
        self.warm.iter().try_for_each(Warm::validate)?;
        self.snapshots.validate()?;
        self.history.validate()?;
        self.templates.validate()?;
        self.packages.validate()?;
        self.jail.validate()?;
        self.disks.validate()?;
        self.network.settings(&self.paths.run)?;
        Ok(())
    }
}

/// A file with a secret in it, that of a key, is for its owner only.
pub(crate) fn secret_needs_mode(path: &Path, key: &str) -> Result<(), ConfigError> {
    let mode = std::fs::metadata(path).map_or(0o7777, |meta| meta.mode() & 0o7777);
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let message = format!("holds a secret, so the file must have mode 0600 and has {mode:04o}");
    let text = Zeroizing::new(std::fs::read_to_string(path).unwrap_or_default());
    Err(Place { text: &text, path }.of_key(key, message))
}

/// A number that is out of range names its key, itself and the range.
pub(crate) fn within(key: &'static str, value: u64, limits: RangeInclusive<u64>) -> Result<(), (&'static str, String)> {
    if limits.contains(&value) {
        return Ok(());
    }
    Err((key, format!("{value} is out of range: {} to {}", limits.start(), limits.end())))
}

fn absolute(key: &'static str, path: &Path) -> Result<(), (&'static str, String)> {
    if path.is_absolute() {
        return Ok(());
    }
    Err((key, format!("{:?} is not an absolute path", path.display().to_string())))
}

fn host_name(key: &'static str, name: &str) -> Result<(), (&'static str, String)> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 64 && name.split('.').all(label) {
        return Ok(());
    }
    Err((key, format!("{name:?} is not a host name: labels of a-z, 0-9 and - joined by dots, at most 64 octets")))
}

/// Finds lines and keys in the text of a file.
pub(crate) struct Place<'a> {
    /// What is in it.
    pub(crate) text: &'a str,
    /// Its name, for errors.
    pub(crate) path: &'a Path,
}

impl Place<'_> {
    fn error(&self, at: Option<usize>, key: Option<String>, message: String) -> ConfigError {
        let line = at.map(|at| self.text.as_bytes().iter().take(at).filter(|&&b| b == b'\n').count() + 1);
        ConfigError { file: self.path.to_path_buf(), line, key, message }
    }

    /// Of what the TOML parser or serde found: the key is the deepest one whose name or value it points at.
    pub(crate) fn of_error(&self, error: &toml::de::Error) -> ConfigError {
        let at = error.span().map(|span| span.start);
        let mut key = None;
        if let Some(at) = at {
            let (table, _) = DeTable::parse_recoverable(self.text);
            walk(table.get_ref(), "", &mut |path, name, value| {
                if name.contains(&at) || value.contains(&at) {
                    key = Some(path.to_string());
                }
            });
        }
        self.error(at, key, error.message().replace('\n', "; "))
    }

    pub(crate) fn of_key(&self, wanted: &str, message: String) -> ConfigError {
        let mut at = None;
        if let Ok(table) = DeTable::parse(self.text) {
            walk(table.get_ref(), "", &mut |path, name, _| {
                if path == wanted {
                    at = Some(name.start);
                }
            });
        }
        self.error(at, Some(wanted.to_string()), message)
    }
}

type Span = std::ops::Range<usize>;

/// Calls `visit` with the dotted path and the spans of name and value of every key, outer ones first.
fn walk(table: &DeTable<'_>, prefix: &str, visit: &mut impl FnMut(&str, Span, Span)) {
    for (name, value) in table {
        let path = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        visit(&path, name.span(), value.span());
        if let DeValue::Table(inner) = value.get_ref() {
            walk(inner, &path, visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../rootfs/host/etc/warren/warren.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("w.toml"))
    }

    fn fails(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_and_the_shipped_example_are_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(parse(EXAMPLE).unwrap(), Config::default());
    }

    #[test]
    fn the_example_shows_every_key_with_a_comment() {
        let mut keys = Vec::new();
        walk(DeTable::parse(EXAMPLE).unwrap().get_ref(), "", &mut |path, _, _| keys.push(path.to_string()));
        // Serde names the keys that it knows when it meets one that it does not.
        let mut known = Vec::new();
        // The sentinel's keys stand in a file of their own, whose test is its own; of pools of sandboxes there are none.
        let tables = expected(&fails("unknown = 1")).into_iter();
        for table in tables.filter(|table| !["sentinel", "warm"].contains(&table.as_str())) {
            for key in expected(&fails(&format!("[{table}]\nunknown = 1"))) {
                known.push(format!("{table}.{key}"));
            }
            known.push(table);
        }
        keys.sort();
        known.sort();
        assert_eq!(keys, known);

        let mut before = "";
        for line in EXAMPLE.lines() {
            if line.contains(" = ") && !line.starts_with('#') {
                assert!(before.starts_with('#'), "no comment before {line}");
            }
            before = line;
        }
    }

    /// The names in "expected one of `a`, `b`" or "expected `a`".
    fn expected(message: &str) -> Vec<String> {
        let names = message.split("expected").nth(1).unwrap_or_else(|| panic!("{message}"));
        names.split('`').skip(1).step_by(2).map(str::to_string).collect()
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file_and_line() {
        let error = parse("[node]\nname = \"a\"\n\n[sandbox]\n# comment\ndefault_cpus = 1\n").unwrap_err();
        assert_eq!((error.line, error.key.as_deref()), (Some(6), Some("sandbox.default_cpus")));
        assert!(error.to_string().starts_with("w.toml:6: sandbox.default_cpus: unknown field"), "{error}");
        let error = parse("\n[sandboxes]\nx = 1\n").unwrap_err();
        assert_eq!((error.line, error.key.as_deref()), (Some(2), Some("sandboxes")));
    }

    #[test]
    fn an_ill_typed_value_is_named_with_its_file_and_line() {
        for (text, line, key) in [
            ("[sandbox]\ndefault_vcpus = \"two\"\n", 2, "sandbox.default_vcpus"),
            ("[sandbox]\nmax_sandboxes = -1\n", 2, "sandbox.max_sandboxes"),
            ("\n\n[log]\nlevel = \"loud\"\n", 4, "log.level"),
            ("sandbox.default_memory_mib = 1.5\n", 1, "sandbox.default_memory_mib"),
            ("[node]\nname = [\n 1,\n]\n", 2, "node.name"),
            ("control = { max_clients = true }\n", 1, "control.max_clients"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!((error.line, error.key.as_deref()), (Some(line), Some(key)), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_value_beyond_its_limits_names_key_line_value_and_limits() {
        assert_eq!(
            fails("[sandbox]\ndefault_vcpus = 17\n"),
            "w.toml:2: sandbox.default_vcpus: 17 is out of range: 1 to 16"
        );
        assert_eq!(
            fails("\nsandbox.default_memory_mib = 63"),
            "w.toml:2: sandbox.default_memory_mib: 63 is out of range: 64 to 32768"
        );
        assert_eq!(fails("[paths]\ndata = \"data\""), "w.toml:2: paths.data: \"data\" is not an absolute path");
        assert_eq!(
            fails("[disks]\ndevices = { a = \"/dev/vdc\", b = \"vdd\" }"),
            "w.toml:2: disks.devices: \"vdd\" is not an absolute path"
        );
        assert_eq!(
            fails("[network]\nrange = \"10.0.0.0/24\""),
            "w.toml: network.max: 1024 slots are more than 10.0.0.0/24 has: 128"
        );
        assert!(fails("[network]\nrange = \"10.0.0.0/14\"").starts_with("w.toml:2: network.range: 10.0.0.0/14 is out"));
        assert!(fails("[network]\ndns = [\"10.0.0.1\"]").ends_with("reached by no sandbox: private use, RFC 1918"));
        assert!(fails("[network]\nnever = [\"1.2.3.4/8\"]").contains("bits behind its prefix"));
        assert!(fails("[disks]\ndevices = { \"a/b\" = \"/dev/vdc\" }").contains("is not a name"));
        for name in ["", "Node", "-a", "a-", "a..b", "a_b", "a b", &"a".repeat(64), &["a"; 33].join(".")] {
            let error = parse(&format!("[node]\nname = {name:?}")).unwrap_err();
            assert_eq!((error.line, error.key.as_deref()), (Some(2), Some("node.name")), "{name}");
        }
        assert_eq!(parse("[node]\nname = \"n-1.rack2\"").unwrap().node.name, "n-1.rack2");
    }

    #[test]
    fn peers_are_users_or_groups_with_a_role() {
        let control = parse(
            "[control]\nsocket_mode = \"0660\"\npeers = [{ uid = 7, role = \"viewer\" }, { gid = 8, role = \"admin\", owner = \"ann\" }]",
        );
        let control = control.unwrap().control;
        assert_eq!((control.socket_mode(), control.peers.len()), (Some(0o660), 2));
        for (text, part) in [
            ("socket_mode = \"0777\"", "control.socket_mode: \"0777\" is no mode"),
            ("socket_mode = \"0060\"", "control.socket_mode: \"0060\" is no mode"),
            ("peers = [{ role = \"admin\" }]", "control.peers: a rule names neither uid nor gid"),
            ("peers = [{ uid = 1, role = \"king\" }]", "unknown variant `king`"),
            ("peers = [{ uid = 1, role = \"admin\", owner = \"a b\" }]", "control.peers: "),
            ("peers = [{ uid = 1, role = \"admin\", ovner = \"a\" }]", "unknown field `ovner`"),
        ] {
            let error = fails(&format!("[control]\n{text}"));
            assert!(error.starts_with("w.toml:2: control.") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_sentinels_tables_are_part_of_the_file_with_what_the_node_knows() {
        assert_eq!(parse("").unwrap().sentinel, None);
        let target = "[[sentinel.target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n";
        let sentinel = parse(&format!("node.name = \"n1\"\npaths.data = \"/d\"\n{target}")).unwrap().sentinel.unwrap();
        assert_eq!((&*sentinel.name, sentinel.paths.data.to_str()), ("n1", Some("/d/sentinel")));
        let plugins: Vec<&str> = sentinel.task.iter().map(|task| &*task.plugin).collect();
        assert_eq!(plugins, ["node", "sandbox"]);
        assert_eq!(sentinel.task[1].device["socket"], "/run/warren/control.sock");
        let task = "[[sentinel.task]]\nid = \"x\"\nplugin = \"ping\"\ninterval_ms = 1000\n";
        assert_eq!(parse(&format!("{target}{task}")).unwrap().sentinel.unwrap().task.len(), 1);
        let error = parse(&format!("{target}[sentinel.sender]\nbatch = 0\n")).unwrap_err();
        assert_eq!((error.line, error.key.as_deref()), (Some(6), Some("sentinel.sender.batch")));
        assert!(fails("[sentinel]\ncolour = 1").contains("w.toml:2: sentinel.colour"));
        assert!(fails("[sentinel]\n").contains("samples would go nowhere"));
    }

    #[test]
    fn broken_syntax_names_its_line() {
        for (text, line) in [("[node\n", 1), ("[node]\nname = \"a\n", 2), ("a = 1\na = 2\n", 2), ("\u{0}", 1)] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, Some(line), "{text:?}: {error}");
            assert!(!error.to_string().contains('\n'));
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Config::load(Path::new("/does/not/exist.toml")).unwrap_err();
        assert_eq!((error.line, error.key.as_ref()), (None, None));
        assert!(error.to_string().starts_with("/does/not/exist.toml: No such file"), "{error}");
        let path = std::env::temp_dir().join(format!("warren-config-{}", std::process::id()));
        std::fs::write(&path, vec![b'#'; 2 * 1024 * 1024]).unwrap();
        let error = Config::load(&path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(error.message.contains("over the limit of 1048576"), "{error}");
    }
}
