//! What a receiver's answer means, per protocol.
//!
//! | status | remote write 1.0, 2.0, zstd | ClickHouse | core |
//! |---|---|---|---|
//! | 2xx | delivered (2.0: only with a `-Written` header, else fall back) | delivered | delivered |
//! | 408, 429, 5xx | again later, `Retry-After` honoured | the same | the same |
//! | 401, 403, 407 | pause, keep the data | the same | the same |
//! | 400, 495–497 of a front that misses our certificate | pause, keep the data | the same | the same |
//! | 3xx | pause, keep the data | the same | the same |
//! | 404 | refused | pause, keep the data: no such table | refused |
//! | 413 | split | split | split |
//! | 400, 415 | 2.0, zstd: fall back to 1.0 with snappy; 1.0: refused | refused | refused |
//! | other 4xx | refused | refused | refused |

use std::time::{Duration, SystemTime};

use super::encode::Protocol;
use crate::sentinel::http::{Response, parse_date};

/// Longest `Retry-After` that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The receiver has it.
    Delivered,
    /// Try again: at the earliest after what the receiver asked for.
    Retry(Option<Duration>),
    /// Nothing gets through until somebody has changed something: keep the data and ask seldom.
    Pause,
    /// Send it in smaller parts.
    Split,
    /// Send it in the older form, from now on.
    Fallback,
    /// The receiver will never take it.
    Refused,
}

/// Judges an answer. `proven`: a request in this form was accepted before.
pub fn judge(protocol: &Protocol, proven: bool, response: &Response) -> Verdict {
    let newer = matches!(protocol, Protocol::RemoteWrite2 | Protocol::VictoriaMetrics) && !proven;
    match response.status {
        200..300 if newer && *protocol == Protocol::RemoteWrite2 && !says_written(response) => Verdict::Fallback,
        200..300 => Verdict::Delivered,
        408 | 429 | 500..600 => Verdict::Retry(retry_after(response)),
        401 | 403 | 407 | 300..400 | 495..=497 => Verdict::Pause,
        400 if misses_certificate(response) => Verdict::Pause,
        404 if matches!(protocol, Protocol::ClickHouse { .. }) => Verdict::Pause,
        413 => Verdict::Split,
        400 | 415 if newer => Verdict::Fallback,
        _ => Verdict::Refused,
    }
}

/// A receiver that knows only 1.0 takes a 2.0 message for an empty one and answers 2xx; one that knows 2.0 says how
/// much it wrote.
fn says_written(response: &Response) -> bool {
    response.headers.iter().any(|(name, _)| name.starts_with("x-prometheus-remote-write-"))
}

/// nginx says 400 where others say 401 or 403: to a client that shows no certificate or a bad one, or speaks no TLS
/// (`ngx_http_special_response.c`: its own 495 to 497, which it shows as 400). A batch is not to be lost for that.
fn misses_certificate(response: &Response) -> bool {
    let body = String::from_utf8_lossy(&response.body);
    ["SSL certificate", "plain HTTP request was sent to HTTPS port"].iter().any(|sign| body.contains(sign))
}

/// Seconds, or a date: by the receiver's own clock where it tells it.
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.header("retry-after")?;
    let wait = text.parse().ok().map(Duration::from_secs).or_else(|| {
        let now = response.header("date").and_then(parse_date).unwrap_or_else(SystemTime::now);
        Some(parse_date(text)?.duration_since(now).unwrap_or_default())
    })?;
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&str, &str)]) -> Response {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Response { status, headers, body: Vec::new(), keep_alive: true }
    }

    #[test]
    fn every_status_has_its_meaning() {
        let clickhouse = Protocol::ClickHouse { table: "samples".into() };
        for protocol in
            [Protocol::RemoteWrite1, Protocol::RemoteWrite2, Protocol::VictoriaMetrics, clickhouse, Protocol::Core]
        {
            let judge = |status| judge(&protocol, true, &answer(status, &[]));
            for status in [200, 201, 202, 204] {
                assert_eq!(judge(status), Verdict::Delivered);
            }
            for status in [408, 429, 500, 502, 503, 504, 599] {
                assert_eq!(judge(status), Verdict::Retry(None));
            }
            for status in [301, 401, 403] {
                assert_eq!(judge(status), Verdict::Pause);
            }
            for status in [400, 409, 415, 422] {
                assert_eq!(judge(status), Verdict::Refused);
            }
            assert_eq!(judge(413), Verdict::Split);
            let no_table = matches!(protocol, Protocol::ClickHouse { .. });
            assert_eq!(judge(404), if no_table { Verdict::Pause } else { Verdict::Refused });
        }
    }

    #[test]
    fn a_front_that_misses_our_certificate_refuses_us_and_not_the_batch() {
        for (status, body, verdict) in [
            (400, "<center>No required SSL certificate was sent</center>", Verdict::Pause),
            (400, "<center>The SSL certificate error</center>", Verdict::Pause),
            (400, "<center>The plain HTTP request was sent to HTTPS port</center>", Verdict::Pause),
            (496, "", Verdict::Pause),
            (400, "out of order sample", Verdict::Refused),
        ] {
            for protocol in [Protocol::RemoteWrite2, Protocol::RemoteWrite1, Protocol::Core] {
                let answer = Response { body: body.into(), ..answer(status, &[]) };
                assert_eq!(judge(&protocol, true, &answer), verdict, "{status} {body}");
            }
        }
    }

    #[test]
    fn the_second_form_falls_back_until_a_receiver_has_shown_that_it_knows_it() {
        let judge =
            |proven, status, headers: &[(&str, &str)]| judge(&Protocol::RemoteWrite2, proven, &answer(status, headers));
        let written = [("x-prometheus-remote-write-samples-written", "5")];
        assert_eq!(judge(false, 415, &[]), Verdict::Fallback);
        assert_eq!(judge(false, 400, &[]), Verdict::Fallback);
        assert_eq!(judge(false, 204, &[]), Verdict::Fallback);
        assert_eq!(judge(false, 204, &written), Verdict::Delivered);
        assert_eq!(judge(true, 400, &written), Verdict::Refused);
        assert_eq!(judge(false, 500, &[]), Verdict::Retry(None));
        let zstd = |proven, status| super::judge(&Protocol::VictoriaMetrics, proven, &answer(status, &[]));
        assert_eq!((zstd(false, 400), zstd(false, 415)), (Verdict::Fallback, Verdict::Fallback));
        assert_eq!((zstd(false, 204), zstd(true, 400)), (Verdict::Delivered, Verdict::Refused));
    }

    #[test]
    fn retry_after_is_believed_up_to_an_hour() {
        for (text, seconds) in [("7", Some(7)), ("0", Some(0)), ("999999", Some(3600)), ("soon", None), ("-1", None)] {
            let verdict = judge(&Protocol::Core, true, &answer(429, &[("retry-after", text)]));
            assert_eq!(verdict, Verdict::Retry(seconds.map(Duration::from_secs)), "{text}");
        }
        let now = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        for (text, seconds) in [
            ("Sun, 06 Nov 1994 08:50:00 GMT", 23),
            ("Sun, 06 Nov 1994 08:00:00 GMT", 0),
            ("Mon, 07 Nov 1994 08:00:00 GMT", 3600),
        ] {
            let verdict = judge(&Protocol::Core, true, &answer(503, &[now, ("retry-after", text)]));
            assert_eq!(verdict, Verdict::Retry(Some(Duration::from_secs(seconds))), "{text}");
        }
    }
}
