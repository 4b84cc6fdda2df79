//! Replays the golden transcripts of docs/protocol.md.
//!
//! A transcript is a fenced block marked `transcript`. Lines that begin with `> ` are sent as they stand, lines
//! that begin with `< ` are what has to come back, in that order:
//!
//! * `< t ok id=* name=web` — the fields named have to be there with these values, in this order and no others;
//!   `*` stands for any value, and inside a value for any part of it.
//! * `<...` — any number of lines, up to one that matches the line after it.
//! * `$NAME` in a sent or expected line is a value remembered earlier: `< t ok id=*ID` remembers it as `$ID`.
//! * A `data` line is followed by its payload: what stands on the next `> ` or `< ` line is payload and LF.
//!
//! Any other line is a remark.

use std::collections::HashMap;

/// One transcript.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    /// The heading it stands under, and its number there: for messages.
    pub name: String,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// One line of a transcript.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Send this line.
    Send(String),
    /// This line has to come.
    Expect(String),
    /// Any lines may come.
    Skip,
}

/// Takes every transcript out of a Markdown text.
pub fn parse(markdown: &str) -> Vec<Transcript> {
    let mut found: Vec<Transcript> = Vec::new();
    let mut heading = String::new();
    let mut inside: Option<Vec<Step>> = None;
    for line in markdown.lines() {
        match &mut inside {
            None if line.starts_with('#') => heading = line.trim_start_matches('#').trim().to_string(),
            None if line.trim_end() == "```transcript" => inside = Some(Vec::new()),
            None => {}
            Some(steps) => {
                if line.starts_with("```") {
                    let number = 1 + found.iter().filter(|t| t.name.starts_with(&format!("{heading} #"))).count();
                    found.push(Transcript { name: format!("{heading} #{number}"), steps: std::mem::take(steps) });
                    inside = None;
                } else if let Some(text) = line.strip_prefix("> ") {
                    steps.push(Step::Send(text.to_string()));
                } else if matches!(line.trim_end(), "<..." | "< ...") {
                    steps.push(Step::Skip);
                } else if let Some(text) = line.strip_prefix("< ") {
                    steps.push(Step::Expect(text.to_string()));
                }
            }
        }
    }
    found
}

/// The values a replay remembers.
#[derive(Debug, Default)]
pub struct Memory(HashMap<String, String>);

impl Memory {
    /// Puts remembered values in place of their `$NAME`s.
    pub fn fill(&self, line: &str) -> String {
        // The longest names first, so that $ID does not eat the beginning of $IDENTITY.
        let mut names: Vec<&String> = self.0.keys().collect();
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        names.iter().fold(line.to_string(), |line, name| line.replace(&format!("${name}"), &self.0[*name]))
    }

    /// Whether a line that came is the one expected; remembers what `*NAME` stood for.
    pub fn matches(&mut self, expected: &str, line: &str) -> bool {
        let expected = self.fill(expected);
        let (wanted, came) = (words(&expected), words(line));
        if wanted.len() != came.len() {
            return false;
        }
        let mut remembered = Vec::new();
        for (wanted, came) in wanted.iter().zip(&came) {
            if let (Some((key, pattern)), Some((came_key, value))) = (wanted.split_once('='), came.split_once('=')) {
                let named = pattern.strip_prefix('*').filter(|name| is_name(name));
                if key == came_key && named.is_some_and(|_| !value.is_empty()) {
                    remembered.extend(named.map(|name| (name.to_string(), value.to_string())));
                    continue;
                }
            }
            if !glob(wanted.as_bytes(), came.as_bytes()) {
                return false;
            }
        }
        self.0.extend(remembered);
        true
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
}

/// Cuts a line at its spaces, but not inside quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut quoted, mut escaped) = (false, false);
    for c in line.chars() {
        match c {
            ' ' if !quoted => words.push(String::new()),
            _ => {
                if c == '"' && !escaped {
                    quoted = !quoted;
                }
                if let Some(word) = words.last_mut() {
                    word.push(c);
                }
            }
        }
        escaped = c == '\\' && !escaped;
    }
    words
}

/// Whether `text` is of the pattern, in which `*` stands for any octets.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| glob(rest, &text[skip..])),
        Some((first, rest)) => text.split_first().is_some_and(|(head, tail)| head == first && glob(rest, tail)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transcripts_are_found_by_their_fence() {
        let text =
            "# A\n```transcript\n> 1 hello\n< 1 ok protocol=1 *\n```\n```\n> no\n```\n## B\n```transcript\n<...\n```\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].name, "A #1");
        assert_eq!(found[0].steps[0], Step::Send("1 hello".to_string()));
        assert_eq!(found[1].steps, [Step::Skip]);
    }

    #[test]
    fn a_star_stands_for_any_value_but_not_for_more_words() {
        let mut memory = Memory::default();
        assert!(memory.matches("1 ok id=* name=web", "1 ok id=abc name=web"));
        assert!(memory.matches("1 err BAD_LINE *", "1 err BAD_LINE \"quote is not closed\""));
        assert!(!memory.matches("1 ok id=*", "1 ok id=abc name=web"));
        assert!(!memory.matches("1 ok id=*", "2 ok id=abc"));
    }

    #[test]
    fn a_named_star_is_remembered() {
        let mut memory = Memory::default();
        assert!(memory.matches("1 ok id=*ID", "1 ok id=abc"));
        assert_eq!(memory.fill("2 exec.start $ID true"), "2 exec.start abc true");
        assert!(memory.matches("2 item id=$ID", "2 item id=abc"));
        assert!(!memory.matches("2 item id=$ID", "2 item id=abd"));
    }
}
