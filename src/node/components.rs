//! Start and stop in order. A component says as data what it needs; what needs it starts after it and stops before it.
//!
//! Starting happens in one go and the first failure ends it: what had started is stopped again. Stopping goes on beside
//! the node's other work: [`Running::step`] asks the component whose turn it is, again and again, until it is done or its
//! time is over. One that fails is named, and the next has its turn all the same.

use std::fmt;
use std::time::{Duration, Instant};

/// One component of `N`.
pub struct Component<N: 'static> {
    /// How it is named in `needs`, errors and the log.
    pub name: &'static str,
    /// The components that must have started before it.
    pub needs: &'static [&'static str],
    /// Starts it.
    pub start: fn(&mut N) -> Result<(), String>,
    /// Asks it to stop and whether it has: called again until it is done.
    pub stop: fn(&mut N) -> Result<Progress, String>,
    /// How long stopping may take.
    pub deadline: fn(&N) -> Duration,
}

/// How far a component has come with stopping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It has stopped.
    Done,
    /// It waits for this.
    Waits(String),
}

/// Why a table has no order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderError {
    /// Two components have this name.
    Twice(&'static str),
    /// A component needs what is not there.
    Unknown {
        /// Who.
        component: &'static str,
        /// What.
        need: &'static str,
    },
    /// These need each other, each the next and the last the first.
    Cycle(Vec<&'static str>),
}

impl fmt::Display for OrderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Twice(name) => write!(f, "two components are named {name}"),
            Self::Unknown { component, need } => write!(f, "component {component} needs {need}, which does not exist"),
            Self::Cycle(names) => {
                write!(f, "components need each other: ")?;
                names.iter().try_for_each(|name| write!(f, "{name} needs "))?;
                f.write_str(names.first().copied().unwrap_or_default())
            }
        }
    }
}

impl std::error::Error for OrderError {}

/// The components so that each comes after what it needs; otherwise in the table's order.
pub fn order<N>(table: &'static [Component<N>]) -> Result<Vec<&'static Component<N>>, OrderError> {
    for (at, component) in table.iter().enumerate() {
        if table[..at].iter().any(|other| other.name == component.name) {
            return Err(OrderError::Twice(component.name));
        }
    }
    let mut sorted = Vec::with_capacity(table.len());
    for component in table {
        visit(table, component, &mut Vec::new(), &mut sorted)?;
    }
    Ok(sorted)
}

/// Puts what a component needs before it. `path` leads from the first asked for to this one.
fn visit<N>(
    table: &'static [Component<N>],
    component: &'static Component<N>,
    path: &mut Vec<&'static str>,
    sorted: &mut Vec<&'static Component<N>>,
) -> Result<(), OrderError> {
    if sorted.iter().any(|done| done.name == component.name) {
        return Ok(());
    }
    if let Some(at) = path.iter().position(|name| *name == component.name) {
        return Err(OrderError::Cycle(path[at..].to_vec()));
    }
    path.push(component.name);
    for need in component.needs {
        let needed = table.iter().find(|other| other.name == *need);
        let needed = needed.ok_or(OrderError::Unknown { component: component.name, need })?;
        visit(table, needed, path, sorted)?;
    }
    path.pop();
    sorted.push(component);
    Ok(())
}

/// The components that run.
pub struct Running<N: 'static> {
    /// In the order in which they started.
    up: Vec<&'static Component<N>>,
    /// By when the last of them must have stopped.
    until: Option<Instant>,
    failures: Vec<String>,
}

impl<N> Running<N> {
    /// Starts all components of a table. On failure those that had started are stopped again, each within its deadline.
    pub fn start(table: &'static [Component<N>], node: &mut N) -> Result<Self, String> {
        let sorted = order(table).map_err(|e| e.to_string())?;
        let mut running = Self { up: Vec::new(), until: None, failures: Vec::new() };
        for component in sorted {
            if let Err(why) = (component.start)(node) {
                while !running.step(node, Instant::now()) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                return Err(format!("{} cannot start: {why}", component.name));
            }
            log::debug!("{} has started", component.name);
            running.up.push(component);
        }
        Ok(running)
    }

    /// Goes on with stopping. `true` when all have stopped.
    pub fn step(&mut self, node: &mut N, now: Instant) -> bool {
        while let Some(component) = self.up.last() {
            let until = *self.until.get_or_insert_with(|| now + (component.deadline)(node));
            match (component.stop)(node) {
                Ok(Progress::Done) => log::debug!("{} has stopped", component.name),
                Ok(Progress::Waits(_)) if now < until => return false,
                Ok(Progress::Waits(what)) => self.fail(component, &format!("out of time: {what}")),
                Err(why) => self.fail(component, &why),
            }
            self.until = None;
            self.up.pop();
        }
        true
    }

    /// What failed to stop: a sentence for each component.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    fn fail(&mut self, component: &Component<N>, why: &str) {
        let sentence = format!("{} failed to stop: {why}", component.name);
        log::error!("{sentence}");
        self.failures.push(sentence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happened, in order.
    #[derive(Default)]
    struct Diary {
        lines: Vec<&'static str>,
        asked: usize,
    }

    const SECOND: Duration = Duration::from_secs(1);

    const fn component(name: &'static str, needs: &'static [&'static str]) -> Component<Diary> {
        Component { name, needs, start: |_| Ok(()), stop: |_| Ok(Progress::Done), deadline: |_| SECOND }
    }

    macro_rules! noted {
        ($name:literal, $needs:expr) => {
            Component {
                start: |diary| {
                    diary.lines.push(concat!("+", $name));
                    Ok(())
                },
                stop: |diary| {
                    diary.lines.push(concat!("-", $name));
                    Ok(Progress::Done)
                },
                ..component($name, $needs)
            }
        };
    }

    static HOUSE: [Component<Diary>; 4] = [
        noted!("roof", &["walls", "wiring"]),
        noted!("wiring", &["walls"]),
        noted!("walls", &["ground"]),
        noted!("ground", &[]),
    ];

    #[test]
    fn components_start_after_what_they_need_and_stop_before_it() {
        let mut diary = Diary::default();
        let mut running = Running::start(&HOUSE, &mut diary).expect("all start");
        assert_eq!(diary.lines, ["+ground", "+walls", "+wiring", "+roof"]);
        diary.lines.clear();
        assert!(running.step(&mut diary, Instant::now()));
        assert_eq!(diary.lines, ["-roof", "-wiring", "-walls", "-ground"]);
        assert!(running.failures().is_empty());
    }

    #[test]
    fn a_cycle_is_named_from_its_start_to_its_end() {
        static TABLE: [Component<Diary>; 4] = [
            component("out", &["hen"]),
            component("hen", &["egg"]),
            component("egg", &["farm"]),
            component("farm", &["hen"]),
        ];
        let error = order(&TABLE).err().expect("a cycle");
        assert_eq!(error, OrderError::Cycle(vec!["hen", "egg", "farm"]));
        assert_eq!(error.to_string(), "components need each other: hen needs egg needs farm needs hen");
        let refused = Running::start(&TABLE, &mut Diary::default()).err().expect("nothing starts");
        assert_eq!(refused, error.to_string());
        static ITSELF: [Component<Diary>; 1] = [component("self", &["self"])];
        assert_eq!(order(&ITSELF).err(), Some(OrderError::Cycle(vec!["self"])));
    }

    #[test]
    fn a_need_that_does_not_exist_and_a_name_given_twice_are_errors() {
        static UNKNOWN: [Component<Diary>; 1] = [component("a", &["b"])];
        assert_eq!(order(&UNKNOWN).err(), Some(OrderError::Unknown { component: "a", need: "b" }));
        static TWICE: [Component<Diary>; 2] = [component("a", &[]), component("a", &[])];
        assert_eq!(order(&TWICE).err(), Some(OrderError::Twice("a")));
    }

    #[test]
    fn a_start_that_fails_stops_what_had_started() {
        static TABLE: [Component<Diary>; 3] = [
            noted!("ground", &[]),
            Component { start: |_| Err("it rains".to_string()), ..component("walls", &["ground"]) },
            noted!("roof", &["walls"]),
        ];
        let mut diary = Diary::default();
        let error = Running::start(&TABLE, &mut diary).err().expect("the walls do not start");
        assert_eq!(error, "walls cannot start: it rains");
        assert_eq!(diary.lines, ["+ground", "-ground"]);
    }

    #[test]
    fn a_component_that_fails_to_stop_is_named_and_the_others_stop_all_the_same() {
        static TABLE: [Component<Diary>; 4] = [
            noted!("ground", &[]),
            Component { stop: |_| Err("they stand".to_string()), ..component("walls", &["ground"]) },
            Component { stop: |_| Ok(Progress::Waits("the tenant".to_string())), ..component("roof", &["walls"]) },
            noted!("flag", &["roof"]),
        ];
        let mut diary = Diary::default();
        let mut running = Running::start(&TABLE, &mut diary).expect("all start");
        let now = Instant::now();
        assert!(!running.step(&mut diary, now), "the roof waits");
        assert!(!running.step(&mut diary, now + SECOND / 2));
        assert!(running.step(&mut diary, now + SECOND));
        assert_eq!(
            running.failures(),
            ["roof failed to stop: out of time: the tenant", "walls failed to stop: they stand"]
        );
        assert_eq!(diary.lines, ["+ground", "+flag", "-flag", "-ground"]);
    }

    #[test]
    fn one_that_takes_its_time_is_asked_until_it_is_done() {
        static TABLE: [Component<Diary>; 1] = [Component {
            stop: |diary| {
                diary.asked += 1;
                Ok(if diary.asked < 3 { Progress::Waits(String::new()) } else { Progress::Done })
            },
            ..component("slow", &[])
        }];
        let mut diary = Diary::default();
        let mut running = Running::start(&TABLE, &mut diary).expect("it starts");
        let now = Instant::now();
        assert_eq!([0; 3].map(|_| running.step(&mut diary, now)), [false, false, true]);
        assert!(running.failures().is_empty());
    }
}
