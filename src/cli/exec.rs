//! A remote command's streams on this process's descriptors: one poll loop that never holds more of a stream than
//! its credit, passes signals and window sizes on, and ends with the command's exit code.

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, raise};
use nix::unistd::{read, write};

use super::Failure;
use super::client::{Call, Client, Event, LOCAL_IO, local};
use super::code::Shown;
use super::code::result::Lines;
use super::signals::{ENDING, Signals, exit_code};
use super::terminal::{self, RawTerminal};
use crate::wire::{Error, FRAME, Fields, Request};

/// How long a cancelled command may take to say so.
const CANCEL_TIME: Duration = Duration::from_secs(2);
/// What a shell gives to a program whose reader has gone: 128 + SIGPIPE.
pub const BROKEN_PIPE: u8 = 141;
/// Warren's own failure, as docker has it: the command's exit codes stay apart from it.
pub const OWN_FAILURE: u8 = 125;
/// The channel of what comes of a code run.
const RESULT: &str = "result";
/// Ctrl-], which leaves a program's terminal, as telnet has it.
const LEAVE_KEY: u8 = 0x1d;
/// So many interrupts in a row end a command that does not care for them.
const PATIENCE: u32 = 3;

/// What this side does for a command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mode {
    /// Pass standard input on.
    pub stdin: bool,
    /// The command has a terminal: put ours into raw mode, if it is one, and pass its size on.
    pub tty: bool,
    /// The command runs by itself (`exec.attach`): what interrupts us ends our watching, and not it.
    pub watches: bool,
}

impl Mode {
    /// Adds to a request what this mode needs of the node.
    pub fn apply(self, mut request: Request) -> Request {
        if self.tty && !self.watches {
            let (cols, rows) = terminal::size().unwrap_or((80, 24));
            request = request.set("tty", true).set("cols", cols).set("rows", rows);
        }
        if self.stdin {
            request = request.set("stdin", true);
        }
        request
    }

    /// It, where it can be done.
    pub fn checked(self) -> Result<Self, Failure> {
        if self.tty && self.stdin && !io::stdin().is_terminal() {
            return Err(Failure::Misuse("-t with -i needs a terminal on standard input; leave -t out".to_string()));
        }
        Ok(self)
    }

    /// Standard streams that are a terminal make a shell interactive.
    pub fn of_shell() -> Self {
        Self { stdin: true, tty: io::stdin().is_terminal() && io::stdout().is_terminal(), watches: false }
    }
}

/// The signals that `run` needs from before its sandbox exists.
pub fn take_signals() -> Result<Signals, Error> {
    let others = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH, Signal::SIGTSTP, Signal::SIGCONT];
    Signals::take(&[&ENDING[..], &others[..]].concat()).map_err(|e| local(LOCAL_IO, format!("signalfd: {e}")))
}

/// One of our output descriptors and what waits for it.
struct Output<'a> {
    channel: &'static str,
    fd: BorrowedFd<'a>,
    waiting: VecDeque<(Vec<u8>, usize)>,
    /// Octets that one write may have without blocking once the descriptor polls as writable.
    step: usize,
    broken: bool,
}

impl<'a> Output<'a> {
    fn new(channel: &'static str, fd: BorrowedFd<'a>) -> Self {
        let is_file = nix::sys::stat::fstat(fd).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFREG);
        // A pipe that polls as writable has room for PIPE_BUF octets (pipe(7)).
        Self { channel, fd, waiting: VecDeque::new(), step: if is_file { FRAME } else { 4096 }, broken: false }
    }

    /// Writes one step; gives the octets that are dealt with.
    fn write(&mut self) -> usize {
        let Some((payload, at)) = self.waiting.front_mut() else { return 0 };
        let end = payload.len().min(*at + self.step);
        let n = match write(self.fd, &payload[*at..end]) {
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(_) => {
                self.broken = true;
                return self.drop_all();
            }
        };
        *at += n;
        if *at == payload.len() {
            self.waiting.pop_front();
        }
        n
    }

    fn drop_all(&mut self) -> usize {
        self.waiting.drain(..).map(|(payload, at)| payload.len() - at).sum()
    }
}

/// A command under way.
pub struct Session<'a> {
    client: &'a mut Client,
    signals: &'a Signals,
    sandbox: String,
    mode: Mode,
    call: Call,
    /// The command's number, once the node has said it.
    number: Option<u64>,
    /// Signals that came before the number.
    early: Vec<Signal>,
    interrupts: u32,
    raw: Option<RawTerminal>,
    /// What came of it if it is a code run, and was not shown yet.
    results: Vec<u8>,
    lines: Lines,
    shown: Shown,
    /// Set when we ended the command ourselves: the exit code, and until when to wait for the node's last word.
    leaving: Option<(u8, Instant)>,
}

impl<'a> Session<'a> {
    /// Starts a command and serves it until it ends. Gives its exit code.
    pub fn run(
        client: &'a mut Client,
        signals: &'a Signals,
        sandbox: &str,
        request: Request,
        mode: Mode,
    ) -> Result<u8, Error> {
        client.interrupt_on(None);
        let raw = (mode.tty && mode.stdin && io::stdin().is_terminal())
            .then(RawTerminal::enter)
            .transpose()
            .map_err(|e| local(LOCAL_IO, format!("the terminal cannot be set to raw mode: {e}")))?;
        let call = client.start(mode.apply(request))?;
        let sandbox = sandbox.to_string();
        let session = Session {
            client,
            signals,
            sandbox,
            mode,
            call,
            number: None,
            early: Vec::new(),
            interrupts: 0,
            raw,
            results: Vec::new(),
            lines: Lines::default(),
            shown: Shown::default(),
            leaving: None,
        };
        session.serve()
    }

    fn serve(mut self) -> Result<u8, Error> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let mut outputs = [Output::new("stdout", stdout.as_fd()), Output::new("stderr", stderr.as_fd())];
        let mut stdin_open = self.mode.stdin;
        // What was read and not yet sent. Standard input is read also when there is no credit: its end needs none.
        let mut held = Vec::new();
        let mut done = None;
        loop {
            self.client.pump();
            while done.is_none() {
                match self.client.try_next(&self.call) {
                    Ok(Some(event)) => done = self.handle(event, &mut outputs),
                    Ok(None) => break,
                    Err(error) => done = Some(Err(error)),
                }
            }
            // After the output that came before it.
            if outputs[0].waiting.is_empty() {
                self.show_results();
            }
            if let Some((code, until)) = self.leaving {
                if done.is_some() || Instant::now() >= until {
                    return Ok(code);
                }
            } else if outputs.iter().all(|o| o.waiting.is_empty())
                && let Some(result) = done
            {
                drop(self.raw.take());
                return exit_of(result);
            }

            let sent = self.client.write(&self.call, "stdin", &held);
            held.drain(..sent);
            let ready = self.poll(&stdin, stdin_open && held.is_empty() && done.is_none(), &outputs)?;
            if ready.signal {
                while let Some(signal) = self.signals.next() {
                    self.on_signal(signal);
                }
            }
            if ready.stdin {
                stdin_open = self.read_stdin(&stdin, &mut held);
            }
            for (output, ready) in outputs.iter_mut().zip(ready.outputs) {
                if ready {
                    let dealt = output.write();
                    self.client.consumed(&self.call, output.channel, dealt);
                }
            }
            if outputs[0].broken && self.leaving.is_none() {
                self.leave(BROKEN_PIPE);
            }
        }
    }

    fn show_results(&mut self) {
        let results = std::mem::take(&mut self.results);
        if results.is_empty() {
            return;
        }
        if self.leaving.is_none() {
            let shown = &mut self.shown;
            // What cannot be shown is missed by nobody: its output's reader is gone.
            self.lines.take(&results, |said| drop(shown.show(&said)));
        }
        self.client.consumed(&self.call, RESULT, results.len());
    }

    /// Takes one event in; gives the result when it was the last.
    fn handle(&mut self, event: Event, outputs: &mut [Output<'_>; 2]) -> Option<Result<Fields, Error>> {
        match event {
            Event::Item(fields) => {
                if let Some(lost) = fields.number("lost").filter(|&lost| lost > 0) {
                    let of = fields.get("channel").unwrap_or("earlier output");
                    super::output::complain(&format!("warning: {lost} octets of {of} are lost here"));
                }
                let number = self.number.or(fields.number("exec"));
                if std::mem::replace(&mut self.number, number).is_none() && self.mode.watches {
                    // Its terminal had another size until now.
                    self.send_size();
                }
                for signal in std::mem::take(&mut self.early) {
                    self.send_signal(signal);
                }
            }
            Event::Data { channel, payload } if channel == RESULT => self.results.extend(payload),
            Event::Data { channel, payload } => {
                match outputs.iter_mut().find(|o| o.channel == channel && !o.broken && self.leaving.is_none()) {
                    Some(output) if !payload.is_empty() => output.waiting.push_back((payload, 0)),
                    _ => self.client.consumed(&self.call, &channel, payload.len()),
                }
            }
            Event::End { .. } => {}
            Event::Done(result) => return Some(result),
        }
        None
    }

    fn poll(&mut self, stdin: &io::Stdin, want_stdin: bool, outputs: &[Output<'_>; 2]) -> Result<Ready, Error> {
        let timeout = match self.leaving {
            Some((_, until)) => {
                PollTimeout::try_from(until.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let socket = if self.client.wants_write() { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let signals = self.signals.as_fd();
        self.client.with_fd(|link| {
            let mut fds = vec![PollFd::new(link, socket), PollFd::new(signals, PollFlags::POLLIN)];
            // Only what is wanted is polled: a descriptor in error would otherwise wake us for ever.
            let mut wanted = Vec::new();
            if want_stdin {
                wanted.push(0);
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            for (index, output) in outputs.iter().enumerate().filter(|(_, o)| !o.waiting.is_empty()) {
                wanted.push(index + 1);
                fds.push(PollFd::new(output.fd, PollFlags::POLLOUT));
            }
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(local(LOCAL_IO, format!("poll: {e}"))),
            }
            let hit = |fd: &PollFd<'_>| fd.any() == Some(true);
            let mut ready = Ready { signal: hit(&fds[1]), ..Ready::default() };
            for (what, fd) in wanted.into_iter().zip(&fds[2..]) {
                match what {
                    0 => ready.stdin = hit(fd),
                    output => ready.outputs[output - 1] = hit(fd),
                }
            }
            Ok(ready)
        })
    }

    /// Reads what standard input has now; `false` at its end, and when we leave.
    fn read_stdin(&mut self, stdin: &io::Stdin, held: &mut Vec<u8>) -> bool {
        held.resize(FRAME, 0);
        let got = read(stdin.as_fd(), held);
        held.truncate(got.unwrap_or(0));
        match got {
            Ok(n) if n > 0 => {
                let leaves = (self.raw.is_some() && self.mode.watches).then_some(LEAVE_KEY);
                let Some(at) = held.iter().position(|octet| Some(*octet) == leaves) else { return true };
                self.client.write(&self.call, "stdin", &held[..at]);
                held.clear();
                self.leave(0);
                false
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            _ => {
                self.client.end(&self.call, "stdin");
                false
            }
        }
    }

    fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::SIGWINCH => self.send_size(),
            Signal::SIGTSTP => {
                if let Some(raw) = &self.raw {
                    raw.set_cooked();
                }
                let _ = raise(Signal::SIGSTOP);
            }
            Signal::SIGCONT => {
                if let Some(raw) = &self.raw {
                    let _ = raw.set_raw();
                }
                self.send_size();
            }
            // In raw mode the keys' signals are octets for the command; what comes here is meant for us.
            _ if self.raw.is_some() || self.mode.watches => self.leave(exit_code(signal)),
            Signal::SIGINT if self.interrupts + 1 >= PATIENCE => self.leave(exit_code(signal)),
            _ => {
                self.interrupts += u32::from(signal == Signal::SIGINT);
                match self.number {
                    Some(_) => self.send_signal(signal),
                    None => self.early.push(signal),
                }
            }
        }
    }

    fn send_signal(&mut self, signal: Signal) {
        let Some(number) = self.number else { return };
        let name = signal.as_str().trim_start_matches("SIG");
        self.send_aside(Request::new("", "exec.signal").arg(&self.sandbox).set("exec", number).set("signal", name));
    }

    fn send_size(&mut self) {
        let (Some(number), true, Some((cols, rows))) = (self.number, self.mode.tty, terminal::size()) else { return };
        self.send_aside(
            Request::new("", "exec.resize").arg(&self.sandbox).set("exec", number).set("cols", cols).set("rows", rows),
        );
    }

    /// A request whose answer changes nothing: the command may have ended meanwhile.
    fn send_aside(&mut self, request: Request) {
        if let Ok(call) = self.client.start(request) {
            self.client.forget(&call);
        }
    }

    /// Ends the command and this session.
    fn leave(&mut self, code: u8) {
        self.raw = None;
        self.client.cancel(&self.call);
        self.leaving = Some((code, Instant::now() + CANCEL_TIME));
    }
}

#[derive(Debug, Default)]
struct Ready {
    signal: bool,
    stdin: bool,
    outputs: [bool; 2],
}

/// The exit code of a command that ended, or why it could not run.
fn exit_of(result: Result<Fields, Error>) -> Result<u8, Error> {
    let fields = result?;
    if fields.get("timeout") == Some("true") {
        super::output::complain("warren: the command was ended at its time limit");
    }
    let code = fields.number("exit").or_else(|| fields.number("signal").map(|signal| 128 + signal)).unwrap_or(0);
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

/// The exit code for a command that could not run: 126 and 127 where the node says so, else Warren's own.
pub fn failure_code(error: &Error) -> u8 {
    match error.fields.number("exit") {
        Some(code @ (126 | 127)) => code as u8,
        _ => OWN_FAILURE,
    }
}
