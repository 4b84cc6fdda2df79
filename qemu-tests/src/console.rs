//! The node's console: what the kernel and Warren's own processes wrote, and whether a fault hides in it.

use std::path::{Path, PathBuf};

/// What the console never shows on a healthy node. Plain text, no patterns: a line that contains one is a splat.
const SPLATS: &[&str] = &[
    "Kernel panic",
    "Oops",
    "BUG:",
    "kernel BUG at",
    "WARNING: CPU:",
    "Call Trace:",
    "general protection",
    "Unable to handle kernel",
    "unable to handle page fault",
    "double fault",
    "stack-protector",
    "UBSAN:",
    "KASAN:",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "Bad page state",
    "scheduling while atomic",
    "possible recursive locking",
    "hung_task",
    "blocked for more than",
    "rcu_sched self-detected",
    "rcu_preempt self-detected",
    "detected stalls on CPUs",
    "soft lockup",
    "hard LOCKUP",
    "workqueue lockup",
    "segfault at",
    "traps: ",
    "invalid opcode",
    "Out of memory",
    "oom-kill",
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2: Error",
    "I/O error",
    "Buffer I/O error",
    "kvm: vcpu",
    "kvm_spurious_fault",
    "Attempted to kill init",
    "panicked at",
];

/// What the supervisor says of a guest that ended, in the guest's own words: no fault of the node.
const OF_A_GUEST: &str = "is gone: guest-";

/// Every line of the console that shows a fault and is not expected: one that contains an entry of `allowed`
/// is passed over.
pub fn splats(console: &str, allowed: &[String]) -> Vec<String> {
    console
        .lines()
        .filter(|line| SPLATS.iter().any(|splat| line.contains(splat)) && !line.contains(OF_A_GUEST))
        .filter(|line| !allowed.iter().any(|allowed| line.contains(allowed.as_str())))
        .map(str::to_string)
        .collect()
}

/// Flags that a processor can have: all but bits 3, 5, 15 and 22 to 31, which are 0, and bit 1, which is 1 (Intel SDM volume 1, 3.4.3).
const FLAGS: u32 = 0x003f_7fd7;

/// Whether the kernel died with flags that no processor can have: those of an emulation that went wrong.
pub fn has_impossible_flags(console: &str) -> bool {
    let said = console.split("EFLAGS: ").skip(1).filter_map(|rest| rest.get(..8));
    let mut flags = said.filter_map(|hex| u32::from_str_radix(hex, 16).ok());
    flags.any(|flags| flags & !FLAGS != 0 || flags & 2 == 0)
}

/// The file that QEMU writes the console to, and how far it has been judged.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    judged: usize,
}

impl Console {
    /// The console in the file at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), judged: 0 }
    }

    /// All of it so far.
    pub fn text(&self) -> String {
        let octets = std::fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(&octets).replace('\r', "")
    }

    /// The last lines, for a failure's report.
    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The faults that came up since the last call.
    pub fn new_splats(&mut self, allowed: &[String]) -> Vec<String> {
        let text = self.text();
        // Whole lines only: the rest of the last one is judged next time.
        let end = text.rfind('\n').map_or(0, |at| at + 1);
        let found = splats(text.get(self.judged..end).unwrap_or_default(), allowed);
        self.judged = end;
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_boot_shows_no_splat() {
        let boot =
            "[    0.000000] Linux version 6.12\n[    1.2] EXT4-fs (vda): mounted filesystem\nwarren: node ready\n";
        assert_eq!(splats(boot, &[]), Vec::<String>::new());
    }

    #[test]
    fn flags_of_a_processor_are_told_from_others() {
        assert!(has_impossible_flags("RSP: 0018:ffffab128001bb90 EFLAGS: 8086a3c2\nRAX: 0"));
        assert!(has_impossible_flags("EFLAGS: 00000246\nEFLAGS: 00000240"));
        for possible in ["", "EFLAGS: 00010246", "EFLAGS: 00000002", "EFLAGS: x", "EFLAGS: "] {
            assert!(!has_impossible_flags(possible), "{possible}");
        }
    }

    #[test]
    fn the_end_of_a_guest_is_no_splat() {
        let line = "warren[supervise]: WARN sandbox a: worker 2 is gone: guest-oom: the guest's kernel panicked: Out of memory";
        assert_eq!(splats(line, &[]), Vec::<String>::new());
        assert_eq!(splats("Out of memory: Killed process 2", &[]).len(), 1);
    }

    #[test]
    fn a_panic_an_oops_and_a_stall_are_splats() {
        let bad = "fine\n[ 1.0] BUG: kernel NULL pointer dereference\n[ 2.0] rcu: INFO: rcu_preempt self-detected stall\n[ 3.0] Kernel panic - not syncing\n";
        assert_eq!(splats(bad, &[]).len(), 3);
    }

    #[test]
    fn an_allowed_line_is_passed_over() {
        let allowed = ["EXT4-fs warning (device vda): ext4_clear_journal_err".to_string()];
        let text = "EXT4-fs warning (device vda): ext4_clear_journal_err: marked\n";
        assert_eq!(splats(text, &allowed), Vec::<String>::new());
    }
}
