//! When a certificate ends: the one field of X.509 (RFC 5280 §4.1) that is wanted here.

use crate::sentinel::collectors::snmp::ber::{BerError, Reader};

const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The explicit tag of the version.
const VERSION: u8 = 0xa0;

/// Seconds since 1970-01-01 UTC at which a certificate (DER) ends; `None` where it cannot be read.
pub fn not_after(der: &[u8]) -> Option<i64> {
    let read = || -> Result<(u8, &[u8]), BerError> {
        let mut certificate = Reader(der).sequence()?.sequence()?;
        // Version is left out in v1; then comes the serial number.
        if certificate.next()?.0 == VERSION {
            certificate.next()?;
        }
        // Signature algorithm, issuer.
        certificate.next()?;
        certificate.next()?;
        let mut validity = certificate.sequence()?;
        validity.next()?;
        validity.next()
    };
    let (tag, text) = read().ok()?;
    let digits = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !digits.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match tag {
        UTC_TIME if digits.len() == 12 => {
            let year: i64 = digits[..2].parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, &digits[2..])
        }
        GENERALIZED_TIME if digits.len() == 14 => (digits[..4].parse().ok()?, &digits[4..]),
        _ => return None,
    };
    let number = |at: usize| rest[at..at + 2].parse::<i64>().ok();
    let (month, day) = (number(0)?, number(2)?);
    let (hour, minute, second) = (number(4)?, number(6)?, number(8)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

/// Days from 1970-01-01 (Gregorian, counted in eras of 400 years from 1 March).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(version: bool, time: &[u8]) -> Vec<u8> {
        fn element(tag: u8, content: &[u8]) -> Vec<u8> {
            [&[tag, content.len() as u8][..], content].concat()
        }
        let mut fields = if version { element(VERSION, &[2, 1, 2]) } else { Vec::new() };
        fields.extend(element(2, &[5]));
        fields.extend(element(0x30, &[]));
        fields.extend(element(0x30, &[]));
        fields.extend(element(0x30, &[element(UTC_TIME, b"200101000000Z"), time.to_vec()].concat()));
        element(0x30, &element(0x30, &fields))
    }

    #[test]
    fn the_end_is_read_in_both_forms_and_versions() {
        let utc = [&[UTC_TIME, 13][..], b"491231235959Z"].concat();
        let general = [&[GENERALIZED_TIME, 15][..], b"20500301000000Z"].concat();
        assert_eq!(not_after(&certificate(true, &utc)), Some(2_524_607_999));
        assert_eq!(not_after(&certificate(false, &general)), Some(2_529_705_600));
        assert_eq!(days(1970, 1, 1), 0);
        assert_eq!(days(2000, 2, 29), 11_016);
    }

    #[test]
    fn what_is_no_certificate_has_no_end() {
        let utc = [&[UTC_TIME, 13][..], b"491331235959Z"].concat();
        assert_eq!(not_after(&certificate(true, &utc)), None);
        let good = certificate(true, &[&[UTC_TIME, 13][..], b"491231235959Z"].concat());
        for cut in 0..good.len() {
            assert_eq!(not_after(&good[..cut]), None);
        }
    }
}
