//! The processor stage, between collection and the log: labels of the whole sentinel, and rules as Prometheus'
//! relabelling has them, plus `rename`.
//!
//! What becomes of a series depends only on its name and labels, so it is worked out once per series and remembered
//! for as long as somebody refers to the series.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use regex_lite::Regex;
use serde::Deserialize;

use super::log::BySeries;
use super::model::{Batch, Identity, ModelError, Sample, Series, SeriesTable, is_label_name, is_series_name};

const NAME: &str = "__name__";
/// Longest pattern, in octets.
const MAX_PATTERN: usize = 4096;

/// What a rule does. The names are Prometheus' (`relabel_config`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Sets `target_label` to `replacement` where the pattern matches.
    #[default]
    Replace,
    /// Drops what does not match.
    Keep,
    /// Drops what matches.
    Drop,
    /// Drops what does not have the value of `target_label` in the source labels.
    KeepEqual,
    /// Drops what has it.
    DropEqual,
    /// Sets `target_label` to the hash of the source labels, modulo `modulus`.
    HashMod,
    /// Copies labels whose names match to the names that `replacement` gives.
    LabelMap,
    /// Removes labels whose names match.
    LabelDrop,
    /// Removes labels whose names do not.
    LabelKeep,
    /// Sets `target_label` to the source labels in lower case.
    Lowercase,
    /// The same in upper case.
    Uppercase,
    /// Gives a series whose name matches the name `replacement`.
    Rename,
}

/// One rule of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// What it does.
    pub action: Action,
    /// The labels whose values are looked at, joined; `__name__` is the name.
    pub source_labels: Vec<String>,
    /// Joins them.
    pub separator: String,
    /// Matches the whole text.
    pub regex: String,
    /// What is set.
    pub target_label: String,
    /// With `$1`, `${1}`, `$name` for what the pattern's groups matched.
    pub replacement: String,
    /// At least 1 for `hashmod`.
    pub modulus: u64,
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            action: Action::Replace,
            source_labels: Vec::new(),
            separator: ";".into(),
            regex: "(.*)".into(),
            target_label: String::new(),
            replacement: "$1".into(),
            modulus: 0,
        }
    }
}

impl Rule {
    /// Why it cannot be used, if so.
    pub fn check(&self) -> Result<(), String> {
        self.pattern()?;
        let is_label = |name: &str| name == NAME || is_label_name(name);
        if let Some(name) = self.source_labels.iter().find(|name| !is_label(name)) {
            return Err(format!("{name:?} is no label"));
        }
        let sets = matches!(
            self.action,
            Action::Replace
                | Action::HashMod
                | Action::Lowercase
                | Action::Uppercase
                | Action::KeepEqual
                | Action::DropEqual
        );
        if sets && !is_label(&self.target_label) {
            return Err(format!("{:?} is no label for target_label", self.target_label));
        }
        if self.action == Action::HashMod && self.modulus == 0 {
            return Err("hashmod needs a modulus of at least 1".into());
        }
        Ok(())
    }

    fn pattern(&self) -> Result<Regex, String> {
        if self.regex.len() > MAX_PATTERN {
            return Err(format!("a pattern of {} octets, the limit is {MAX_PATTERN}", self.regex.len()));
        }
        Regex::new(&format!("^(?s:{})$", self.regex)).map_err(|e| format!("the pattern {:?}: {e}", self.regex))
    }

    fn compile(&self) -> Result<Compiled, String> {
        self.check()?;
        Ok(Compiled { rule: self.clone(), pattern: self.pattern()? })
    }
}

struct Compiled {
    rule: Rule,
    pattern: Regex,
}

type Labels = BTreeMap<String, String>;

impl Compiled {
    /// Changes the labels, the name among them; false: the series is dropped.
    fn apply(&self, labels: &mut Labels) -> bool {
        let rule = &self.rule;
        let value = |labels: &Labels, name: &str| labels.get(name).cloned().unwrap_or_default();
        let source =
            rule.source_labels.iter().map(|name| value(labels, name)).collect::<Vec<_>>().join(&rule.separator);
        let set = |labels: &mut Labels, name: &str, value: String| {
            if value.is_empty() {
                labels.remove(name);
            } else {
                labels.insert(name.to_string(), value);
            }
        };
        match rule.action {
            Action::Keep => return self.pattern.is_match(&source),
            Action::Drop => return !self.pattern.is_match(&source),
            Action::KeepEqual => return source == value(labels, &rule.target_label),
            Action::DropEqual => return source != value(labels, &rule.target_label),
            Action::Replace => {
                if let Some(captures) = self.pattern.captures(&source) {
                    let mut replaced = String::new();
                    captures.expand(&rule.replacement, &mut replaced);
                    set(labels, &rule.target_label, replaced);
                }
            }
            Action::HashMod => set(labels, &rule.target_label, (hash(&source) % rule.modulus).to_string()),
            Action::Lowercase => set(labels, &rule.target_label, source.to_lowercase()),
            Action::Uppercase => set(labels, &rule.target_label, source.to_uppercase()),
            Action::LabelMap => {
                let matching = |(name, value): (&String, &String)| {
                    let captures = self.pattern.captures(name)?;
                    let mut renamed = String::new();
                    captures.expand(&rule.replacement, &mut renamed);
                    Some((renamed, value.clone()))
                };
                let mapped: Vec<_> = labels.iter().filter_map(matching).collect();
                labels.extend(mapped);
            }
            Action::LabelDrop => labels.retain(|name, _| name == NAME || !self.pattern.is_match(name)),
            Action::LabelKeep => labels.retain(|name, _| name == NAME || self.pattern.is_match(name)),
            Action::Rename => {
                if let Some(captures) = self.pattern.captures(&value(labels, NAME)) {
                    let mut renamed = String::new();
                    captures.expand(&rule.replacement, &mut renamed);
                    set(labels, NAME, renamed);
                }
            }
        }
        true
    }
}

/// FNV-1a: spreads series the same way at every start and on every machine.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, octet| (hash ^ u64::from(octet)).wrapping_mul(0x0100_0000_01b3))
}

/// What becomes of a series: the one that its samples are of now, or nothing when they are dropped.
type Fate = Option<Arc<Series>>;

/// Applies labels and rules to batches.
pub struct Processor {
    labels: BTreeMap<String, String>,
    rules: Vec<Compiled>,
    table: Arc<SeriesTable>,
    known: Mutex<BySeries<(Weak<Series>, Fate)>>,
}

impl Processor {
    /// `labels` are given to every series that has none of the same name, before the rules.
    pub fn new(labels: BTreeMap<String, String>, rules: &[Rule], table: Arc<SeriesTable>) -> Result<Self, String> {
        let rules = rules.iter().map(Rule::compile).collect::<Result<_, _>>()?;
        Ok(Self { labels, rules, table, known: Mutex::default() })
    }

    /// The batch as it goes into the log, and how many samples could not become what the rules say.
    pub fn apply<'a>(&self, batch: &'a Batch) -> (Cow<'a, Batch>, u64) {
        if self.labels.is_empty() && self.rules.is_empty() {
            return (Cow::Borrowed(batch), 0);
        }
        let mut out = Batch { samples: Vec::with_capacity(batch.samples.len()) };
        let mut failed = 0;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for sample in &batch.samples {
            let fate = match known.get(&sample.series.id()) {
                Some((_, fate)) => fate.clone(),
                None => match self.fate(&sample.series) {
                    Ok(fate) => {
                        known.insert(sample.series.id(), (Arc::downgrade(&sample.series), fate.clone()));
                        fate
                    }
                    Err(_) => {
                        failed += 1;
                        None
                    }
                },
            };
            if let Some(series) = fate {
                out.samples.push(Sample { series, ..*sample });
            }
        }
        (Cow::Owned(out), failed)
    }

    fn fate(&self, series: &Arc<Series>) -> Result<Fate, ModelError> {
        let mut labels: Labels = self.labels.clone();
        labels.extend(series.labels().map(|(name, value)| (name.to_string(), value.to_string())));
        labels.insert(NAME.into(), series.name().into());
        if !self.rules.iter().all(|rule| rule.apply(&mut labels)) {
            return Ok(None);
        }
        let name = labels.remove(NAME).unwrap_or_default();
        if !is_series_name(&name) {
            return Err(ModelError::BadName(name));
        }
        // What begins with __ is for the rules only.
        labels.retain(|name, _| !name.starts_with("__"));
        let identity = Identity::new(&name, series.kind(), labels)?;
        Ok(Some(self.table.intern(identity)?))
    }

    /// Forgets what it knows of series that are gone.
    pub fn sweep(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (series, _)| series.strong_count() > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::Kind;

    /// What becomes of `cpu{job="a",host="web-1"}`.
    fn fate(rules: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            rule: Vec<Rule>,
        }
        let rules = toml::from_str::<File>(rules).unwrap().rule;
        let table = Arc::new(SeriesTable::new(100));
        let labels = BTreeMap::from([("region".to_string(), "r".to_string()), ("job".to_string(), "x".to_string())]);
        let processor = Processor::new(labels, &rules, Arc::clone(&table)).unwrap();
        let series =
            table.intern(Identity::new("cpu", Kind::Gauge, [("job", "a"), ("host", "web-1")]).unwrap()).unwrap();
        let batch = Batch { samples: vec![Sample { series, timestamp_ms: 1, value: 2.0 }] };
        let first = processor.apply(&batch).0;
        assert_eq!(processor.apply(&batch).0.samples.len(), first.samples.len());
        first.samples.first().map(|sample| sample.series.to_string())
    }

    #[test]
    fn labels_of_the_sentinel_do_not_replace_those_of_a_series() {
        assert_eq!(fate("").unwrap(), r#"cpu{host="web-1",job="a",region="r"}"#);
    }

    #[test]
    fn every_action_does_what_prometheus_says() {
        for (rule, result) in [
            (
                "source_labels = ['host']\nregex = 'web-(.*)'\ntarget_label = 'number'",
                Some(r#"cpu{host="web-1",job="a",number="1",region="r"}"#),
            ),
            (
                "source_labels = ['host']\nregex = 'web'\ntarget_label = 'host'\nreplacement = 'x'",
                Some(r#"cpu{host="web-1",job="a",region="r"}"#),
            ),
            (
                "source_labels = ['host', 'job']\ntarget_label = 'both'",
                Some(r#"cpu{both="web-1;a",host="web-1",job="a",region="r"}"#),
            ),
            ("target_label = 'job'\nreplacement = ''", Some(r#"cpu{host="web-1",region="r"}"#)),
            (
                "action = 'keep'\nsource_labels = ['__name__']\nregex = 'cpu|mem'",
                Some(r#"cpu{host="web-1",job="a",region="r"}"#),
            ),
            ("action = 'keep'\nsource_labels = ['__name__']\nregex = 'cp'", None),
            ("action = 'drop'\nsource_labels = ['job']\nregex = 'a'", None),
            ("action = 'keepequal'\nsource_labels = ['job']\ntarget_label = 'host'", None),
            ("action = 'dropequal'\nsource_labels = ['job']\ntarget_label = 'job'", None),
            ("action = 'labeldrop'\nregex = 'h.*|region'", Some(r#"cpu{job="a"}"#)),
            ("action = 'labelkeep'\nregex = 'job'", Some(r#"cpu{job="a"}"#)),
            (
                "action = 'labelmap'\nregex = '(h)ost'\nreplacement = '${1}x'",
                Some(r#"cpu{host="web-1",hx="web-1",job="a",region="r"}"#),
            ),
            (
                "action = 'uppercase'\nsource_labels = ['host']\ntarget_label = 'host'",
                Some(r#"cpu{host="WEB-1",job="a",region="r"}"#),
            ),
            (
                "action = 'lowercase'\nsource_labels = ['host']\ntarget_label = 'job'",
                Some(r#"cpu{host="web-1",job="web-1",region="r"}"#),
            ),
            (
                "action = 'hashmod'\nsource_labels = ['host']\ntarget_label = 'job'\nmodulus = 1",
                Some(r#"cpu{host="web-1",job="0",region="r"}"#),
            ),
            (
                "action = 'rename'\nregex = 'c(.*)'\nreplacement = 'node_c$1'",
                Some(r#"node_cpu{host="web-1",job="a",region="r"}"#),
            ),
            ("target_label = '__tmp'\nreplacement = 'x'", Some(r#"cpu{host="web-1",job="a",region="r"}"#)),
        ] {
            assert_eq!(fate(&format!("[[rule]]\n{rule}")).as_deref(), result, "{rule}");
        }
    }

    #[test]
    fn rules_follow_each_other() {
        let two = "[[rule]]\naction = 'rename'\nregex = 'cpu'\nreplacement = 'x'\n[[rule]]\naction = 'drop'\nsource_labels = ['__name__']\nregex = 'x'";
        assert_eq!(fate(two), None);
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        let rule = |change: fn(&mut Rule)| {
            let mut rule = Rule { target_label: "a".into(), ..Rule::default() };
            change(&mut rule);
            rule.check()
        };
        assert_eq!(rule(|_| {}), Ok(()));
        assert!(rule(|rule| rule.regex = "(".into()).is_err());
        assert!(rule(|rule| rule.regex = "a".repeat(5000)).is_err());
        assert!(rule(|rule| rule.target_label = "a b".into()).is_err());
        assert!(rule(|rule| rule.source_labels = vec!["1".into()]).is_err());
        assert!(rule(|rule| rule.action = Action::HashMod).is_err());
    }
}
