//! Init's loop: signals, the supervisor's link, kernel events, the power button, restarts that are due.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::cgroups;
use super::client::{ChildExit, LINK_FD, LINK_VARIABLE, StopMode};
use super::link::SupervisorLink;
use super::ports::Ports;
use super::power_button::PowerButtons;
use super::reaper::{Kept, Reaped, reap};
use super::service::Service;
use super::spawn::Program;
use crate::node::config::DEFAULT_PATH;
use crate::node::faults::VARIABLE as FAULTS_VARIABLE;

/// How long the supervisor may take to stop the node's sandboxes after a signal.
const ORDERLY_STOP: Duration = Duration::from_secs(15);
const ENVIRONMENT: [&str; 3] = ["PATH=/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/", "TERM=linux"];

struct Init {
    supervisor: Service,
    services: Vec<Service>,
    link: Option<SupervisorLink>,
    kept: Kept,
    ports: Ports,
    buttons: PowerButtons,
    /// A signal or the power button asked for this; the supervisor has until then.
    stopping: Option<(StopMode, Instant)>,
}

/// What has something to do.
#[derive(Debug, Default)]
struct Ready {
    signal: bool,
    kernel: bool,
    button: bool,
    link: bool,
}

/// Runs until the node must stop; gives how.
pub fn run(services: Vec<Vec<String>>, sentinel: bool) -> StopMode {
    let signals = signals();
    let mut init = Init {
        supervisor: supervisor(),
        services: sentinel
            .then(sentinel_service)
            .into_iter()
            .chain(services.iter().filter_map(|argv| service(argv)))
            .collect(),
        link: None,
        kept: Kept::default(),
        ports: Ports::new(),
        buttons: PowerButtons::open(),
        stopping: None,
    };
    loop {
        if let Some(mode) = init.turn(&signals) {
            return mode;
        }
    }
}

/// Blocks the signals that come through the descriptor instead.
fn signals() -> SignalFd {
    let set: SigSet = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR].into_iter().collect();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    // Without it init could not live: it would neither reap nor stop.
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, flags))
        .unwrap_or_else(|error| panic!("no descriptor for signals: {error}"))
}

fn supervisor() -> Service {
    // What a test put on the kernel's command line.
    let faults = std::env::var(FAULTS_VARIABLE).ok().map(|file| format!("{FAULTS_VARIABLE}={file}"));
    let more: Vec<String> = [format!("{LINK_VARIABLE}={LINK_FD}")].into_iter().chain(faults).collect();
    own_service("supervisor", &["supervise"], &more, cgroups::SUPERVISE)
}

/// It reads the node's configuration and then gives up being root.
fn sentinel_service() -> Service {
    own_service("sentinel", &["sentinel", "start", "--node", "--config", DEFAULT_PATH], &[], cgroups::SENTINEL)
}

/// This very program in another role.
fn own_service(name: &str, role: &[&str], more: &[String], group: &str) -> Service {
    let own = std::env::current_exe().ok().and_then(|path| path.into_os_string().into_string().ok());
    let path = own.unwrap_or_else(|| "/usr/bin/warren".to_string());
    let environment: Vec<String> = ENVIRONMENT.map(str::to_string).iter().chain(more).cloned().collect();
    let argv: Vec<String> = ["warren"].iter().chain(role).map(|word| word.to_string()).collect();
    let program = Program::new(&path, &argv, &environment).unwrap_or_else(|_| panic!("{path:?} holds a NUL"));
    Service::new(name.to_string(), program, cgroups::open(group))
}

fn service(argv: &[String]) -> Option<Service> {
    let path = argv.first()?;
    let program = Program::new(path, argv, &ENVIRONMENT.map(str::to_string)).ok()?;
    Some(Service::new(format!("service {path}"), program, cgroups::open(cgroups::SERVICES)))
}

impl Init {
    fn turn(&mut self, signals: &SignalFd) -> Option<StopMode> {
        self.start_what_is_due();
        let ready = self.wait(signals);
        if ready.kernel {
            self.ports.handle();
        }
        if ready.button && self.buttons.pressed() {
            self.begin_stop(StopMode::PowerOff, "the power button was pressed");
        }
        if ready.link
            && let Some(mode) = self.handle_link()
        {
            return Some(mode);
        }
        if ready.signal {
            while let Ok(Some(signal)) = signals.read_signal() {
                self.handle_signal(i32::try_from(signal.ssi_signo).unwrap_or(0));
            }
            // Signals of one kind merge: take all that have ended.
            while let Reaped::Exit(exit) = reap() {
                if let Some(mode) = self.handle_exit(&exit) {
                    return Some(mode);
                }
            }
        }
        // The supervisor is gone or over its time, so nobody else will stop the node.
        let (mode, deadline) = self.stopping?;
        (self.supervisor.pid().is_none() || Instant::now() >= deadline).then_some(mode)
    }

    /// Waits for the next thing to do.
    fn wait(&mut self, signals: &SignalFd) -> Ready {
        let due = self.services.iter().chain([&self.supervisor]).filter_map(Service::due);
        let next = due.chain(self.stopping.map(|(_, deadline)| deadline)).min();
        let mut descriptors = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let kernel = self.ports.events().map(|events| add(&mut descriptors, events, PollFlags::POLLIN));
        let first_button = descriptors.len();
        for button in self.buttons.descriptors() {
            add(&mut descriptors, button, PollFlags::POLLIN);
        }
        let buttons = first_button..descriptors.len();
        let link = self.link.as_mut().map(|link| {
            let write = if link.wants_to_write() { PollFlags::POLLOUT } else { PollFlags::empty() };
            add(&mut descriptors, link.descriptor(), PollFlags::POLLIN | write)
        });
        if poll(&mut descriptors, timeout(next)).is_err() {
            return Ready::default(); // interrupted: go round
        }
        let ready = |at: usize| descriptors[at].any().unwrap_or(true);
        Ready {
            signal: ready(0),
            kernel: kernel.is_some_and(ready),
            button: buttons.into_iter().any(ready),
            link: link.is_some_and(ready),
        }
    }

    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        let due = |service: &Service| service.due().is_some_and(|due| due <= now);
        if due(&self.supervisor) && self.stopping.is_none() {
            match SupervisorLink::new() {
                Ok((link, theirs)) => self.link = self.supervisor.start(Some(&theirs)).then_some(link),
                Err(error) => {
                    log::error!("no link for the supervisor: {error}");
                    self.link = None;
                    self.supervisor.start(None);
                }
            }
        }
        for service in self.services.iter_mut().filter(|service| due(service)) {
            service.start(None);
        }
    }

    fn handle_link(&mut self) -> Option<StopMode> {
        let link = self.link.as_mut()?;
        let stop = link.handle(&mut self.kept);
        let flushed = link.flush();
        match stop.and_then(|stop| if stop.is_some() { Ok(stop) } else { flushed.map(|()| None) }) {
            // What was asked for from outside goes before what the supervisor understood.
            Ok(Some(mode)) => Some(self.stopping.map_or(mode, |(asked, _)| asked)),
            Ok(None) => None,
            Err(error) => {
                log::debug!("link to the supervisor ended: {error}"); // its end is told by its exit
                self.link = None;
                None
            }
        }
    }

    fn handle_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGINT => self.begin_stop(StopMode::Reboot, "Ctrl-Alt-Del was pressed or SIGINT came"),
            libc::SIGTERM | libc::SIGPWR => self.begin_stop(StopMode::PowerOff, "SIGTERM or SIGPWR came"),
            _ => {}
        }
    }

    /// Asks the supervisor to stop the sandboxes and then the node; it has `ORDERLY_STOP` for that.
    fn begin_stop(&mut self, mode: StopMode, why: &str) {
        if self.stopping.is_some() {
            return;
        }
        log::info!("{why}: the node stops ({})", mode.as_str());
        self.stopping = Some((mode, Instant::now() + ORDERLY_STOP));
        if let Some(pid) = self.supervisor.pid()
            && let Err(error) = kill(pid, Signal::SIGPWR)
        {
            log::error!("cannot ask the supervisor to stop: {error}");
        }
    }

    fn handle_exit(&mut self, exit: &ChildExit) -> Option<StopMode> {
        let of = |service: &Service| service.pid().is_some_and(|pid| i64::from(pid.as_raw()) == i64::from(exit.pid));
        if of(&self.supervisor) {
            let last_wish = self.handle_link(); // what it wrote before it ended
            self.link = None;
            self.supervisor.ended(exit.status, self.stopping.is_some() || last_wish.is_some());
            return last_wish;
        }
        if let Some(service) = self.services.iter_mut().find(|service| of(service)) {
            service.ended(exit.status, self.stopping.is_some());
        } else if exit.sandbox().is_some() {
            self.kept.push(exit.clone());
            if let Some(link) = &mut self.link {
                link.announce(exit);
                // A failure shows again when the link is polled.
                let _ = link.flush();
            }
        }
        None
    }
}

fn add<'a>(descriptors: &mut Vec<PollFd<'a>>, descriptor: BorrowedFd<'a>, events: PollFlags) -> usize {
    descriptors.push(PollFd::new(descriptor, events));
    descriptors.len() - 1
}

fn timeout(next: Option<Instant>) -> PollTimeout {
    let Some(next) = next else { return PollTimeout::NONE };
    // Rounded up, or the last part of a millisecond would be spent spinning.
    let left = next.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    u16::try_from(left).map_or(PollTimeout::MAX, PollTimeout::from)
}
