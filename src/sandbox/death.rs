//! Why a sandbox ended out of order, as `reason` says it: a word, which is stable, and a sentence for people.
//!
//! | word | what happened | how it is known |
//! |---|---|---|
//! | `guest-panic` | the guest's kernel panicked | its panic device; the console has the cause |
//! | `guest-oom` | the guest had no memory left and could kill nothing for it | the same, and its console says so |
//! | `guest-reset` | the guest reset itself | the reset register, or a triple fault |
//! | `guest-hung` | the guest's agent does not answer | the node asks it (`node/health.rs`) |
//! | `agent-lost` | the agent broke its link, again and again | the link |
//! | `worker-lost` | the worker broke its link's protocol | the link |
//! | `pause-timeout`, `snapshot-timeout` | the worker did not write in time what a pause or a snapshot needs | the node's clock (`node/capture.rs`) |
//! | `kvm-error` | the processor or KVM gave up on the guest | the worker's last words |
//! | `device-error` | a device or its medium gave up | the same |
//! | `internal` | the worker's own fault: a panic or a fatal signal | the same |
//! | `worker-jail` | the worker made a system call that its jail forbids | SIGSYS |
//! | `worker-oom` | the worker was at its own limit of memory | its control group's count |
//! | `host-oom` | the node was out of memory, and the kernel chose this worker | the same |
//! | `worker-killed` | somebody on the node killed the worker | its exit status |
//! | `worker-ended` | it ended without saying why | nothing else |

use crate::init::ChildStatus;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::LastWords;

/// Octets of the console's end that are searched for the cause of a panic.
pub const CONSOLE_TAIL: usize = 8192;
/// Longest cause of a panic that is passed on, in characters: it is the guest's own word.
const MAX_CAUSE: usize = 160;
/// What kernels begin their last message with (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";

/// The reason. `words` are the worker's last, `status` is how its process ended, `console` the end of the guest's log.
pub fn reason(words: Option<&LastWords>, status: Option<ChildStatus>, oom: Oom, console: &[u8]) -> String {
    match (words, status, oom) {
        (Some(words), _, _) if words.reason == "guest-panic" => panic_reason(words, console),
        (Some(words), _, _) => words.sentence(),
        // The status is of no use then: whoever sends signal 9, it looks the same.
        (None, _, Oom::OwnLimit) => {
            "worker-oom: worker was killed by the kernel: its sandbox's memory limit was reached".to_string()
        }
        (None, _, Oom::Node) => "host-oom: worker was killed by the kernel: the node was out of memory".to_string(),
        (None, Some(ChildStatus::Signal(libc::SIGSYS)), _) => {
            "worker-jail: worker was killed by its jail: it made a system call that none of its threads makes"
                .to_string()
        }
        (None, Some(ChildStatus::Signal(signal)), _) => {
            let name = nix::sys::signal::Signal::try_from(signal).map_or("unknown", nix::sys::signal::Signal::as_str);
            format!("worker-killed: worker was killed by signal {signal} ({name})")
        }
        (None, Some(ChildStatus::Code(code)), _) => format!("worker-ended: worker exited with code {code}"),
        (None, None, _) => "worker-ended: worker ended without a word".to_string(),
    }
}

fn panic_reason(words: &LastWords, console: &[u8]) -> String {
    let console = String::from_utf8_lossy(&console[console.len().saturating_sub(CONSOLE_TAIL)..]).into_owned();
    let cause = console.rsplit_once(PANIC).map(|(_, rest)| rest.lines().next().unwrap_or_default());
    let Some(cause) = cause else { return words.sentence() };
    let cause: String = cause.chars().filter(|c| !c.is_control()).take(MAX_CAUSE).collect();
    // mm/oom_kill.c: nothing was left to kill, or the guest was told to panic rather than to kill.
    let out_of_memory = cause.contains("deadlocked on memory") || cause.to_lowercase().starts_with("out of memory");
    let word = if out_of_memory { "guest-oom" } else { "guest-panic" };
    format!("{word}: the guest's kernel panicked: {}", cause.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(reason: &str) -> LastWords {
        LastWords { reason: reason.to_string(), detail: "it said so".to_string() }
    }

    #[test]
    fn what_ended_a_worker_is_told_apart() {
        let killed = Some(ChildStatus::Signal(libc::SIGKILL));
        let of = |status, oom| reason(None, status, oom, b"");
        let said = reason(Some(&words("kvm-error")), killed, Oom::OwnLimit, b"");
        assert_eq!(said, "kvm-error: it said so", "it had still the time to say so");
        assert!(of(killed, Oom::OwnLimit).starts_with("worker-oom: ") && of(None, Oom::OwnLimit).contains("limit"));
        assert!(of(killed, Oom::Node).starts_with("host-oom: "));
        assert!(of(killed, Oom::None).starts_with("worker-killed: ") && of(killed, Oom::None).contains("SIGKILL"));
        assert!(of(Some(ChildStatus::Signal(libc::SIGSYS)), Oom::None).starts_with("worker-jail: "));
        assert_eq!(of(Some(ChildStatus::Code(3)), Oom::None), "worker-ended: worker exited with code 3");
        assert!(of(None, Oom::None).starts_with("worker-ended: "));
    }

    #[test]
    fn a_panic_has_the_cause_from_the_console_and_is_out_of_memory_where_that_says_so() {
        let of = |console: &[u8]| reason(Some(&words("guest-panic")), None, Oom::None, console);
        let said = of(b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\n[    1.1] CPU: 0\r\n");
        assert_eq!(said, "guest-panic: the guest's kernel panicked: sysrq triggered crash");
        let said =
            of(b"Kernel panic - not syncing: first\nKernel panic - not syncing: System is deadlocked on memory\n");
        assert_eq!(said, "guest-oom: the guest's kernel panicked: System is deadlocked on memory");
        assert_eq!(of(b"nothing of the kind"), "guest-panic: it said so");
        assert_eq!(of(b""), "guest-panic: it said so");
    }

    #[test]
    fn what_a_guest_writes_to_its_console_is_cut_and_has_no_control_characters() {
        let mut console = b"Kernel panic - not syncing: ".to_vec();
        console.extend([0x1b, 0xff, b'[', b'2']);
        console.extend(vec![b'x'; 100_000]);
        let said = reason(Some(&words("guest-panic")), None, Oom::None, &console);
        assert!(said.chars().count() < 250 && !said.chars().any(char::is_control), "{said}");
        let at = console.len() - 50;
        console[at..at + 28].copy_from_slice(b"Kernel panic - not syncing: ");
        console[at + 28] = 0x1b;
        let said = reason(Some(&words("guest-panic")), None, Oom::None, &console);
        assert_eq!(said, format!("guest-panic: the guest's kernel panicked: {}", "x".repeat(21)));
    }
}
