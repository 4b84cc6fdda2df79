//! What agents and workers say, cut to what is believed and kept: either may be a hostile guest's.

use crate::wire::{Error, Fields, Message};

/// Longest sentence of theirs, in octets. It gets into reasons, rows of lists and the log.
const SENTENCE: usize = 1024;
/// Details of an error that are kept, and octets of their values in all.
const DETAILS: usize = 16;
const DETAILS_OCTETS: usize = 8 * 1024;
/// What a program's end may say, each in at most `VALUE` octets.
const OUTCOME: &[&str] = &[
    "exit",
    "signal",
    "timeout",
    "oom",
    "cpu_ms",
    "wall_ms",
    "peak_kib",
    "network_refused",
    "processes_refused",
    "context_ended",
    "artifacts",
];
const VALUE: usize = 32;
/// What is kept of the arguments of a program that an agent names, in octets.
const ARGUMENTS: usize = 1024;
/// Programs that an agent may list: it runs 1,024 at most, and is told to forget those whose end was seen.
pub const LISTED_MAX: usize = 4096;
/// Programs of which it alone knows: those that the supervisor before had no time to write down.
pub const UNKNOWN_MAX: usize = 1024;
/// Octets that may wait for an agent or a worker that reads nothing.
pub const UNREAD_MAX: usize = 4 * 1024 * 1024;
/// Requests that an agent may leave without an answer.
pub const UNANSWERED_MAX: usize = 16 * 1024;

/// A sentence, no longer than one may be and without control characters.
pub fn sentence(said: &str) -> String {
    let mut text = String::with_capacity(said.len().min(SENTENCE + 3));
    for character in said.chars() {
        if text.len() + character.len_utf8() > SENTENCE {
            text.push_str("...");
            break;
        }
        text.push(if character.is_control() && character != '\n' { ' ' } else { character });
    }
    text
}

/// An error, with a sentence and details that fit a line together.
pub fn error(said: Error) -> Error {
    let mut left = DETAILS_OCTETS;
    let fits = |(_, value): &(String, Vec<u8>)| match left.checked_sub(value.len()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    let fields = said.fields.0.into_iter().filter(fits).take(DETAILS).collect();
    Error { code: said.code, message: sentence(&said.message), fields: Fields(fields) }
}

/// A message whose error, where it is one, is cut.
pub fn message(said: Message) -> Message {
    match said {
        Message::Err { tag, error: said } => Message::Err { tag, error: error(said) },
        other => other,
    }
}

/// How a program ended: what is known of ends, and nothing else.
pub fn outcome(said: &Fields) -> Fields {
    let known = |key: &&str| said.get(key).is_some_and(|v| v.len() <= VALUE && v.bytes().all(|b| b.is_ascii_graphic()));
    let kept = OUTCOME.iter().filter(|key| known(key));
    kept.fold(Fields::new(), |kept, key| kept.with(key, said.get(key).unwrap_or_default()))
}

/// The arguments of a program that an agent names.
pub fn arguments(said: &Fields) -> Vec<Vec<u8>> {
    let mut octets = said.bytes("argv").unwrap_or_default().to_vec();
    octets.truncate(ARGUMENTS);
    vec![octets]
}

/// What an agent has listed.
#[derive(Debug, Default)]
pub struct Listing {
    items: usize,
    unknown: usize,
}

impl Listing {
    /// It is asked anew.
    pub fn begin(&mut self) {
        self.items = 0;
    }

    /// It lists a program. Fails when these are more than there can be.
    pub fn item(&mut self) -> Result<(), String> {
        self.items += 1;
        over("programs", self.items, LISTED_MAX)
    }

    /// It runs one that nobody else knows. On later links of the same supervisor all are known.
    pub fn unknown(&mut self) -> Result<(), String> {
        self.unknown += 1;
        over("running programs that nobody started", self.unknown, UNKNOWN_MAX)
    }
}

fn over(what: &str, count: usize, max: usize) -> Result<(), String> {
    if count <= max { Ok(()) } else { Err(format!("it lists {count} {what}, over the limit of {max}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Code, MAX_LINE};

    #[test]
    fn a_sentence_is_cut_and_has_no_control_characters() {
        assert_eq!(sentence("as it is\nand on"), "as it is\nand on");
        assert_eq!(sentence("a\x1b[2Jb\0"), "a [2Jb ");
        let cut = sentence(&"ä".repeat(30_000));
        assert!(cut.len() <= SENTENCE + 3 && cut.ends_with("ä..."), "{}", cut.len());
    }

    #[test]
    fn an_error_fits_a_line_whatever_it_says() {
        let said = (0..200).fold(Error::new(Code::Internal, "\u{1}".repeat(60_000)), |said, number| {
            said.with(&format!("key{number}"), "\0".repeat(if number % 3 == 0 { 3000 } else { 40 }))
        });
        let line = Message::err("t", error(said.with("errno", "EIO"))).to_bytes();
        assert!(line.len() < MAX_LINE, "{}", line.len());
        let small = Error::new(Code::FileFailed, "no such file").with("errno", "ENOENT").with("path", "a b");
        assert_eq!(error(small.clone()), small);
        let said = Message::ok("t", Fields::new().with("a", "b"));
        assert_eq!(message(said.clone()), said);
    }

    #[test]
    fn of_an_end_only_what_is_known_is_kept() {
        let end = Fields::new().with("exit", 7).with("cpu_ms", 3).with("artifacts", "incomplete");
        assert_eq!(outcome(&end), end);
        let said = end.clone().with("id", "anothersandb").with("oom", "x".repeat(65_000)).with("signal", "\x1b[2J");
        assert_eq!(outcome(&said), end);
        assert_eq!(outcome(&Fields::new().with_bytes("exit", b"\xff")), Fields::new());
    }

    #[test]
    fn arguments_and_lists_have_an_end() {
        assert_eq!(arguments(&Fields::new().with("argv", "a".repeat(60_000)))[0].len(), ARGUMENTS);
        let mut listing = Listing::default();
        assert!((0..LISTED_MAX).all(|_| listing.item().is_ok()));
        assert_eq!(listing.item(), Err("it lists 4097 programs, over the limit of 4096".to_string()));
        assert!((0..UNKNOWN_MAX).all(|_| listing.unknown().is_ok()));
        listing.begin();
        assert!(listing.item().is_ok() && listing.unknown().is_err());
    }
}
