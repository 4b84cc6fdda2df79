//! What is measured: series, samples, batches.
//!
//! A series is interned once in the [`SeriesTable`] and from then on travels as an `Arc`: equal series are the same
//! allocation with the same [`SeriesId`]. Ids are never used twice in a process, so whoever remembers one (a scrape's
//! cache, the set of series for staleness markers) can never mistake one series for another.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::send::protobuf::{header, octets, octets_len};

/// Longest name of a series or a label, in octets.
pub const MAX_NAME: usize = 1024;
/// Longest label value, in octets.
pub const MAX_VALUE: usize = 64 * 1024;
/// Most labels of one series, its name not counted.
pub const MAX_LABELS: usize = 128;
/// Most octets of one series, all names and values together.
pub const MAX_SERIES_SIZE: usize = 256 * 1024;

/// The NaN that says "this series ended here" (Prometheus, model/value/value.go: `StaleNaN`).
pub const STALE_NAN_BITS: u64 = 0x7ff0_0000_0000_0002;

/// The value of a staleness marker.
pub fn stale_marker() -> f64 {
    f64::from_bits(STALE_NAN_BITS)
}

/// Whether a value is the staleness marker: told from other NaNs by its bits.
pub fn is_stale_marker(value: f64) -> bool {
    value.to_bits() == STALE_NAN_BITS
}

/// What a series' values mean. The numbers are those kept in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Kind {
    /// Nothing is known.
    #[default]
    Unknown = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Only grows, but for restarts.
    Counter = 2,
    /// One of a classic histogram's `_bucket`, `_sum` and `_count` series.
    Histogram = 3,
    /// One of a summary's quantiles, `_sum` and `_count`.
    Summary = 4,
}

impl Kind {
    /// The kind of a number kept in the log.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Unknown,
            1 => Self::Gauge,
            2 => Self::Counter,
            3 => Self::Histogram,
            4 => Self::Summary,
            _ => return None,
        })
    }

    /// Its name, as in OpenMetrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Gauge => "gauge",
            Self::Counter => "counter",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }
}

/// Why a series or a sample cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelError {
    /// The series has no name.
    NoName,
    /// A name is longer than [`MAX_NAME`] or not `[a-zA-Z_:][a-zA-Z0-9_:]*` (labels: without the colon).
    BadName(String),
    /// The label's value is longer than [`MAX_VALUE`].
    LongValue(String),
    /// The label occurs twice.
    DoubleLabel(String),
    /// More than [`MAX_LABELS`] labels.
    ManyLabels(usize),
    /// More than [`MAX_SERIES_SIZE`] octets altogether.
    Large(usize),
    /// The table holds as many series as it may.
    SeriesLimit(usize),
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoName => write!(f, "a series has no name"),
            Self::BadName(name) => write!(f, "{name:?} is not a name of a series or label (1–{MAX_NAME} octets)"),
            Self::LongValue(name) => write!(f, "the value of label {name:?} is longer than {MAX_VALUE} octets"),
            Self::DoubleLabel(name) => write!(f, "label {name:?} occurs twice"),
            Self::ManyLabels(count) => write!(f, "{count} labels, the limit is {MAX_LABELS}"),
            Self::Large(size) => write!(f, "a series of {size} octets, the limit is {MAX_SERIES_SIZE}"),
            Self::SeriesLimit(limit) => write!(f, "there are {limit} series, which is the limit"),
        }
    }
}

impl std::error::Error for ModelError {}

/// Whether `name` may name a series.
pub fn is_series_name(name: &str) -> bool {
    name.len() <= MAX_NAME && is_name(name, true)
}

/// Whether `name` may name a label.
pub fn is_label_name(name: &str) -> bool {
    name.len() <= MAX_NAME && is_name(name, false)
}

fn is_name(name: &str, colon: bool) -> bool {
    let fits = |c: u8| c.is_ascii_alphabetic() || c == b'_' || (colon && c == b':');
    let mut octets = name.bytes();
    octets.next().is_some_and(fits) && octets.all(|c| fits(c) || c.is_ascii_digit())
}

/// Turns anything into a name: what may not stand in one becomes `_`, and a leading digit gets one in front.
pub fn sanitized_name(raw: &str) -> String {
    let mut name = String::with_capacity(raw.len() + 1);
    for c in raw.chars().take(MAX_NAME - 1) {
        if name.is_empty() && c.is_ascii_digit() {
            name.push('_');
        }
        name.push(if c.is_ascii_alphanumeric() { c } else { '_' });
    }
    if name.is_empty() { "_".to_string() } else { name }
}

/// The label that remote write has the name of a series in.
const NAME: &str = "__name__";

/// What identifies a series before it is interned: name, kind, and labels sorted by name without repeats. A label
/// with an empty value is no label (as in Prometheus).
///
/// There may be very many of them, so that all stands in one piece; and that piece is what remote write sends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The kind; how many labels without the name; then each label, the name among them, in order: `1: Label { 1: name,
    /// 2: value }` of Protocol Buffers.
    text: Box<[u8]>,
}

/// Octets before the labels.
const BEFORE: usize = 2;

impl Identity {
    /// Checks and sorts.
    pub fn new<N, V>(name: &str, kind: Kind, labels: impl IntoIterator<Item = (N, V)>) -> Result<Self, ModelError>
    where
        N: AsRef<str>,
        V: AsRef<str>,
    {
        if name.is_empty() {
            return Err(ModelError::NoName);
        }
        if !is_series_name(name) {
            return Err(ModelError::BadName(shown(name)));
        }
        let given: Vec<(N, V)> = labels.into_iter().collect();
        let mut sorted: Vec<(&str, &str)> = vec![(NAME, name)];
        for (label, value) in &given {
            let (label, value) = (label.as_ref(), value.as_ref());
            if !is_label_name(label) {
                return Err(ModelError::BadName(shown(label)));
            }
            if value.len() > MAX_VALUE {
                return Err(ModelError::LongValue(label.into()));
            }
            if !value.is_empty() {
                sorted.push((label, value));
            }
        }
        let count = sorted.len() - 1;
        if count > MAX_LABELS {
            return Err(ModelError::ManyLabels(count));
        }
        sorted.sort_unstable_by_key(|(label, _)| *label);
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ModelError::DoubleLabel(pair[0].0.to_string()));
        }
        let size = sorted.iter().map(|(label, value)| label_len(label, value)).sum();
        if size > MAX_SERIES_SIZE {
            return Err(ModelError::Large(size));
        }
        let mut text = Vec::with_capacity(BEFORE + size);
        text.extend([kind as u8, count as u8]);
        for (label, value) in sorted {
            header(&mut text, 1, octets_len(label.len()) + octets_len(value.len()));
            octets(&mut text, 1, label.as_bytes());
            octets(&mut text, 2, value.as_bytes());
        }
        Ok(Self { text: text.into() })
    }

    /// The series' name.
    pub fn name(&self) -> &str {
        // Hardly any label comes before it.
        let mut rest = self.encoded();
        std::iter::from_fn(|| Labels::pair(&mut rest)).find(|(label, _)| *label == NAME).map_or("", |(_, name)| name)
    }

    /// What its values mean.
    pub fn kind(&self) -> Kind {
        Kind::from_number(self.text[0]).unwrap_or_default()
    }

    /// Labels, sorted by name, none empty.
    pub fn labels(&self) -> Labels<'_> {
        Labels { rest: self.encoded(), left: usize::from(self.text[1]) }
    }

    /// The value of one label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels().find(|(label, _)| *label == name).map(|(_, value)| value)
    }

    /// All labels and the name, in order, as fields of a remote write `TimeSeries`.
    pub fn encoded(&self) -> &[u8] {
        &self.text[BEFORE..]
    }

    /// About how many octets of memory it takes.
    pub fn size(&self) -> usize {
        self.text.len() + size_of::<Self>()
    }
}

/// Octets of a label as it is kept.
fn label_len(label: &str, value: &str) -> usize {
    octets_len(octets_len(label.len()) + octets_len(value.len()))
}

/// Labels of a series, in order.
#[derive(Clone)]
pub struct Labels<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Labels<'a> {
    /// The octets of the next field, which was written by [`Identity::new`].
    fn field(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (mut len, mut shift, mut at) = (0usize, 0, 1);
        loop {
            let octet = *rest.get(at)?;
            len |= usize::from(octet & 0x7f) << shift;
            (at, shift) = (at + 1, shift + 7);
            if octet < 0x80 {
                break;
            }
        }
        let (field, after) = rest[at..].split_at_checked(len)?;
        *rest = after;
        Some(field)
    }

    /// The next label, or the name.
    fn pair(rest: &mut &'a [u8]) -> Option<(&'a str, &'a str)> {
        let mut label = Self::field(rest)?;
        let name = std::str::from_utf8(Self::field(&mut label)?).ok()?;
        Some((name, std::str::from_utf8(Self::field(&mut label)?).ok()?))
    }
}

impl<'a> Iterator for Labels<'a> {
    type Item = (&'a str, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        let pair = std::iter::from_fn(|| Self::pair(&mut self.rest)).find(|(name, _)| *name != NAME)?;
        self.left -= 1;
        Some(pair)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Labels<'_> {}

impl fmt::Display for Identity {
    /// As in Prometheus text: `name{label="value",…}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        for (n, (label, value)) in self.labels().enumerate() {
            write!(f, "{}{label}={value:?}", if n == 0 { '{' } else { ',' })?;
        }
        if self.text[1] == 0 { Ok(()) } else { f.write_str("}") }
    }
}

/// An over-long name is not repeated whole.
fn shown(name: &str) -> String {
    name.chars().take(80).collect()
}

/// Names one interned series for the life of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesId(pub u64);

/// An interned series. Dereferences to its [`Identity`].
#[derive(Debug)]
pub struct Series {
    id: SeriesId,
    identity: Identity,
}

impl Series {
    /// Equal for two series exactly when they are the same series.
    pub fn id(&self) -> SeriesId {
        self.id
    }
}

impl std::ops::Deref for Series {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.identity
    }
}

/// One value of one series at one time.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Which series.
    pub series: Arc<Series>,
    /// Milliseconds since 1970-01-01 UTC.
    pub timestamp_ms: i64,
    /// Any float, NaN and infinities included.
    pub value: f64,
}

/// What one run of a task gave: the unit in which samples are accepted or refused, whole.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// In the order in which they were taken; of one series, in time order.
    pub samples: Vec<Sample>,
}

/// A series in the table, found by its identity.
#[derive(Debug)]
struct Known(Arc<Series>);

impl Borrow<Identity> for Known {
    fn borrow(&self) -> &Identity {
        &self.0.identity
    }
}

impl Hash for Known {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.identity.hash(state);
    }
}

impl PartialEq for Known {
    fn eq(&self, other: &Self) -> bool {
        self.0.identity == other.0.identity
    }
}

impl Eq for Known {}

/// Every series that somebody still refers to, each once.
#[derive(Debug)]
pub struct SeriesTable {
    limit: usize,
    next: AtomicU64,
    known: Mutex<HashSet<Known>>,
}

impl SeriesTable {
    /// A table that holds at most `limit` series at once.
    pub fn new(limit: usize) -> Self {
        Self { limit, next: AtomicU64::new(1), known: Mutex::default() }
    }

    /// The one series of this identity. A full table forgets the series that nobody refers to and, when that makes no
    /// room, refuses new ones: a label that never repeats must not eat the memory.
    pub fn intern(&self, identity: Identity) -> Result<Arc<Series>, ModelError> {
        let mut known = self.lock();
        if let Some(series) = known.get(&identity) {
            return Ok(Arc::clone(&series.0));
        }
        if known.len() >= self.limit {
            known.retain(|series| Arc::strong_count(&series.0) > 1);
            // A table that stays nearly full would be searched for every new series.
            if known.len() >= self.limit - self.limit / 64 {
                return Err(ModelError::SeriesLimit(self.limit));
            }
        }
        let id = SeriesId(self.next.fetch_add(1, Ordering::Relaxed));
        let series = Arc::new(Series { id, identity });
        known.insert(Known(Arc::clone(&series)));
        Ok(series)
    }

    /// As [`SeriesTable::intern`], but a series that finds no room becomes one of its own that the table does not know.
    /// For what is read back from the log, which must get out whatever is collected meanwhile.
    pub fn adopt(&self, identity: Identity) -> Arc<Series> {
        self.intern(identity.clone()).unwrap_or_else(|_| {
            let id = SeriesId(self.next.fetch_add(1, Ordering::Relaxed));
            Arc::new(Series { id, identity })
        })
    }

    /// Forgets the series that nobody refers to; gives how many there were. The controller calls it now and then.
    pub fn sweep(&self) -> usize {
        let mut known = self.lock();
        let before = known.len();
        known.retain(|series| Arc::strong_count(&series.0) > 1);
        before - known.len()
    }

    /// What is known of each name: its kind.
    pub fn kinds(&self) -> BTreeMap<String, Kind> {
        self.lock().iter().map(|known| (known.0.name().to_string(), known.0.kind())).collect()
    }

    /// Series held.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Known>> {
        // No code that holds the lock can leave the map half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str, labels: &[(&str, &str)]) -> Identity {
        Identity::new(name, Kind::Gauge, labels.iter().copied()).unwrap()
    }

    #[test]
    fn labels_are_sorted_and_empty_ones_left_out() {
        let series = identity("up", &[("job", "a"), ("empty", ""), ("host", "b\"c")]);
        assert_eq!(series.labels().collect::<Vec<_>>(), [("host", "b\"c"), ("job", "a")]);
        assert_eq!(series.label("job"), Some("a"));
        assert_eq!(series.label("empty"), None);
        assert_eq!(series.to_string(), r#"up{host="b\"c",job="a"}"#);
    }

    #[test]
    fn labels_of_any_length_and_place_are_read_back() {
        let long = ["x".repeat(100), "y".repeat(200), "z".repeat(60_000)];
        let labels = [("Zone", &*long[0]), ("__a", "b"), ("__z", &*long[2]), ("a", "ä"), ("b", &*long[1])];
        let series = identity(&"n".repeat(1000), &labels);
        assert!(series.labels().eq(labels));
        assert_eq!((series.labels().len(), series.name().len(), series.label("b")), (5, 1000, Some(&*long[1])));
        assert_eq!(series.label("__name__"), None);
    }

    #[test]
    fn what_is_no_series_is_refused_with_its_name() {
        let of = |name: &str, labels: &[(&str, &str)]| Identity::new(name, Kind::Gauge, labels.iter().copied());
        assert_eq!(of("", &[]), Err(ModelError::NoName));
        assert_eq!(of("1a", &[]), Err(ModelError::BadName("1a".into())));
        assert_eq!(of("a", &[("b:c", "d")]), Err(ModelError::BadName("b:c".into())));
        assert_eq!(of("a", &[("b", "c"), ("b", "d")]), Err(ModelError::DoubleLabel("b".into())));
        assert_eq!(of("a", &[("__name__", "c")]), Err(ModelError::DoubleLabel("__name__".into())));
        assert_eq!(of("a", &[("b", &"x".repeat(MAX_VALUE + 1))]), Err(ModelError::LongValue("b".into())));
    }

    #[test]
    fn any_text_becomes_a_name() {
        for (raw, name) in [("cpu.load-1", "cpu_load_1"), ("1m", "_1m"), ("", "_"), ("ä", "_")] {
            assert_eq!(sanitized_name(raw), name);
            assert!(is_label_name(&sanitized_name(raw)));
        }
    }

    #[test]
    fn equal_series_are_one_and_ids_are_never_used_twice() {
        let table = SeriesTable::new(10);
        let first = table.intern(identity("a", &[("b", "c")])).unwrap();
        let again = table.intern(identity("a", &[("b", "c")])).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        let id = first.id();
        drop((first, again));
        assert_eq!(table.sweep(), 1);
        assert_ne!(table.intern(identity("a", &[("b", "c")])).unwrap().id(), id);
    }

    #[test]
    fn a_full_table_forgets_what_nobody_uses_and_then_refuses() {
        let table = SeriesTable::new(4);
        let kept: Vec<_> = (0..3).map(|n| table.intern(identity(&format!("kept{n}"), &[])).unwrap()).collect();
        table.intern(identity("loose", &[])).unwrap();
        let last = table.intern(identity("last", &[])).unwrap();
        assert_eq!(table.intern(identity("more", &[])).unwrap_err(), ModelError::SeriesLimit(4));
        assert!(Arc::ptr_eq(&table.intern(identity("last", &[])).unwrap(), &last));
        drop(kept);
        table.intern(identity("more", &[])).unwrap();
    }

    #[test]
    fn the_staleness_marker_is_told_from_other_nans() {
        assert!(is_stale_marker(stale_marker()));
        assert!(!is_stale_marker(f64::NAN));
    }
}
