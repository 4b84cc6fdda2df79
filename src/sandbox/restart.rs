//! Whether a sandbox that failed is started again: `never`, or `on-failure` up to a number of times in a row.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How often in a row where `on-failure` does not say, and at most.
const DEFAULT_MAX: u32 = 10;
const LIMIT: u32 = 1000;
/// The wait before the first restart; it doubles up to the longest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// Having run this long, a sandbox counts as good again.
pub const GOOD_MS: u64 = 10 * 60 * 1000;

/// What is asked for by `restart=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Restart {
    /// It stays in error.
    #[default]
    Never,
    /// It is started again by a fresh boot on its disk.
    OnFailure {
        /// How often in a row, 1–1,000.
        max: u32,
    },
}

impl Restart {
    /// How long to wait before a sandbox is started again that was so already `in_a_row` times; `None`: it is not.
    pub fn wait(self, in_a_row: u32) -> Option<Duration> {
        match self {
            Self::OnFailure { max } if in_a_row < max => Some(FIRST.saturating_mul(1 << in_a_row.min(16)).min(LONGEST)),
            _ => None,
        }
    }
}

impl fmt::Display for Restart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::OnFailure { max } => write!(f, "on-failure:{max}"),
        }
    }
}

impl FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let max = match text {
            "never" => return Ok(Self::Never),
            "on-failure" => Some(DEFAULT_MAX),
            _ => text.strip_prefix("on-failure:").and_then(|max| max.parse().ok()),
        };
        match max.filter(|max| (1..=LIMIT).contains(max)) {
            Some(max) => Ok(Self::OnFailure { max }),
            None => Err(format!("restart={text} is neither never nor on-failure[:1..{LIMIT}]")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_written_as_they_are_read() {
        for text in ["never", "on-failure:1", "on-failure:1000"] {
            assert_eq!(text.parse::<Restart>().map(|policy| policy.to_string()), Ok(text.to_string()));
        }
        assert_eq!("on-failure".parse(), Ok(Restart::OnFailure { max: DEFAULT_MAX }));
        for text in ["", "always", "on-failure:", "on-failure:0", "on-failure:1001", "on-failure:-1", "never:1"] {
            assert!(text.parse::<Restart>().is_err(), "{text}");
        }
    }

    #[test]
    fn waits_double_to_a_minute_and_end_with_the_count() {
        let waits: Vec<u64> =
            (0..12).filter_map(|n| Restart::OnFailure { max: 9 }.wait(n)).map(|wait| wait.as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(Restart::Never.wait(0), None);
        assert_eq!(Restart::OnFailure { max: 1000 }.wait(999), Some(LONGEST));
    }
}
