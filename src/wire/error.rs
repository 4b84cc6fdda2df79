//! Typed errors as they travel: a stable code, a sentence, and fields for programs.

use std::fmt;

use super::MAX_LINE;
use super::message::Fields;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Every error code of the protocol. Codes are stable; sentences are not.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// All codes, in the order of docs/protocol.md.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The code as written on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }

            /// The code that is written so, where there is one.
            pub fn parse(text: &str) -> Option<Code> {
                match text { $($text => Some(Code::$name),)* _ => None }
            }
        }
    };
}

codes! {
    /// A line that is not of the grammar; the tag is `-` unless it could be read.
    BadLine = "BAD_LINE",
    /// A line of more than 64 KiB; it is skipped to its LF.
    LineTooLong = "LINE_TOO_LONG",
    /// A data frame of more than 1 MiB; its payload is skipped.
    DataTooLong = "DATA_TOO_LONG",
    /// No such verb.
    UnknownVerb = "UNKNOWN_VERB",
    /// A key that the verb does not know, or one positional value too many.
    UnknownArgument = "UNKNOWN_ARGUMENT",
    /// An argument that the verb needs is not there.
    MissingArgument = "MISSING_ARGUMENT",
    /// An argument is ill-typed or given twice.
    BadArgument = "BAD_ARGUMENT",
    /// A number is outside of its limits; `min` and `max` are in the fields.
    OutOfRange = "OUT_OF_RANGE",
    /// The tag is in use by a running request.
    TagInUse = "TAG_IN_USE",
    /// More was sent on a channel than its credit allows.
    CreditExceeded = "CREDIT_EXCEEDED",
    /// The client has too many requests under way.
    TooManyRequests = "TOO_MANY_REQUESTS",
    /// The request was cancelled by its client.
    Cancelled = "CANCELLED",
    /// The client's role does not allow it, or it is nobody here.
    Forbidden = "FORBIDDEN",
    /// No object of that name.
    NotFound = "NOT_FOUND",
    /// An object of that name is there already.
    AlreadyExists = "ALREADY_EXISTS",
    /// Another has what is asked for, and it can have one user only.
    InUse = "IN_USE",
    /// The object's state does not allow this.
    BadState = "BAD_STATE",
    /// A template's image or the guest kernel is damaged or not of the expected form.
    Corrupt = "CORRUPT",
    /// A snapshot of a processor that this node's cannot stand in for; `missing` has the features that it lacks.
    CpuMismatch = "CPU_MISMATCH",
    /// The virtual machine could not be started or ended; the sentence says why.
    VmFailed = "VM_FAILED",
    /// The guest did not answer in time.
    GuestTimeout = "GUEST_TIMEOUT",
    /// The link to the sandbox's agent or worker broke.
    LinkLost = "LINK_LOST",
    /// The program could not be started in the sandbox.
    ExecFailed = "EXEC_FAILED",
    /// The code of a run has more octets than `max`.
    SourceTooLarge = "SOURCE_TOO_LARGE",
    /// A code run, or the installation of its packages, took longer than `timeout_ms` and was ended.
    Timeout = "TIMEOUT",
    /// A code run used more memory than `memory_mib` and was ended.
    OutOfMemory = "OUT_OF_MEMORY",
    /// A code run that has no network needed one, or asked for one that its sandbox does not have.
    NetworkOff = "NETWORK_OFF",
    /// A code run failed when it started more processes and threads than `max`.
    TooManyProcesses = "TOO_MANY_PROCESSES",
    /// Dependencies were asked for and the node's configuration names no index to take them from.
    NoIndex = "NO_INDEX",
    /// Packages were asked for, and the sandbox's template does not say how its language installs any.
    NoInstaller = "NO_INSTALLER",
    /// Packages could not be installed; `output` is the end of what the installer said.
    InstallFailed = "INSTALL_FAILED",
    /// A file operation failed in the sandbox; `errno` is in the fields.
    FileFailed = "FILE_FAILED",
    /// The node has no memory, disk or descriptors left for this.
    NoCapacity = "NO_CAPACITY",
    /// The node is stopping and takes nothing new.
    Stopping = "STOPPING",
    /// The node is being drained and takes nothing new.
    Draining = "DRAINING",
    /// A worker of another version of Warren, with which this one cannot speak.
    VersionMismatch = "VERSION_MISMATCH",
    /// The supervisor was restarted while the request ran.
    NodeRestarted = "NODE_RESTARTED",
    /// Warren's own fault; the log has more.
    Internal = "INTERNAL",
}

/// A typed error: what `err` carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Stable, upper case. A `String` so that a client can pass on codes newer than itself.
    pub code: String,
    /// A sentence that names what was wrong, the value and the limit.
    pub message: String,
    /// Machine-readable details.
    pub fields: Fields,
}

impl Error {
    /// An error of a known code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code: code.as_str().to_string(), message: message.into(), fields: Fields::new() }
    }

    /// The error of what found no room on the node's disk.
    pub fn disk_full(message: impl Into<String>) -> Self {
        Self::new(Code::NoCapacity, message).with("resource", "disk")
    }

    /// The error of what could not be read or written on the node: for want of room, or with a code of its own.
    pub fn of_io(code: Code, message: impl Into<String>, cause: &std::io::Error) -> Self {
        match cause.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::disk_full(message),
            _ => Self::new(code, message),
        }
    }

    /// The error of what makes no line, because that would be too long.
    pub fn line_too_long(what: &str, length: usize) -> Self {
        let message = format!("{what} makes a line of {length} octets, over the limit of {MAX_LINE}");
        Self::new(Code::LineTooLong, message).with("max", MAX_LINE)
    }

    /// Adds a machine-readable detail.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.fields = self.fields.with(key, value);
        self
    }

    /// Whether this is an error of that code.
    pub fn is(&self, code: Code) -> bool {
        self.code == code.as_str()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl std::error::Error for Error {}
