//! Times in headers (RFC 9110 section 5.6.7): the form of today and the two that must still be understood.
//!
//! `Sun, 06 Nov 1994 08:49:37 GMT`, `Sunday, 06-Nov-94 08:49:37 GMT`, `Sun Nov  6 08:49:37 1994`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// The time that a header says.
pub fn parse(text: &str) -> Option<SystemTime> {
    if text.len() > 64 {
        return None;
    }
    // The day of the week says nothing that the date does not.
    let words: Vec<&str> = text.split([' ', '-', ',']).filter(|word| !word.is_empty()).skip(1).collect();
    let (day, month, year, clock) = match words[..] {
        [day, month, year, clock, "GMT"] => (day, month, year, clock),
        [month, day, clock, year] => (day, month, year, clock),
        _ => return None,
    };
    let number = |text: &str, most: u64| text.parse::<u64>().ok().filter(|number| *number <= most);
    let month = MONTHS.iter().position(|known| *known == month)? as u64 + 1;
    let day = number(day, 31).filter(|day| *day > 0)?;
    let year = match year.len() {
        // More than 50 years in the future is in the past.
        2 => number(year, 99).map(|year| if year < 70 { 2000 + year } else { 1900 + year })?,
        _ => number(year, 9999).filter(|year| *year >= 1970)?,
    };
    let mut parts = clock.split(':');
    let (hour, minute, second) = (number(parts.next()?, 23)?, number(parts.next()?, 59)?, number(parts.next()?, 60)?);
    if parts.next().is_some() {
        return None;
    }
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Days since 1970-01-01, by the proleptic Gregorian calendar: years begin in March, so that leap days come last.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let since_march = (month + 9) % 12;
    let day_of_year = (153 * since_march + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(text: &str) -> Option<u64> {
        parse(text).map(|time| time.duration_since(UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn all_three_forms_of_rfc_9110_are_understood() {
        for text in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(seconds(text), Some(784_111_777), "{text}");
        }
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(seconds("Thu, 29 Feb 2024 23:59:60 GMT"), Some(1_709_251_200));
        assert_eq!(seconds("Mon, 01 Mar 2100 00:00:00 GMT"), Some(4_107_542_400));
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "soon",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 32 Nov 1994 08:49:37 GMT",
            "Sun, 00 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Sun, 06 Nov 1994 08:49:37:1 GMT",
            "Sun, 06 November 1994 08:49:37 GMT",
            "Sun, 06 Nov 1900 08:49:37 GMT",
            "Sun, 06 Nov 99999999999999999999 08:49:37 GMT",
            "Sun, -6 Nov 1994 08:49 GMT",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
