//! Influx line protocol: `measurement,tag=value field=1i,other="text" 1700000000000000000`.

use std::borrow::Cow;
use std::fmt;

/// Tags and fields of one line, at most.
const MOST: usize = 4096;

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Point<'a> {
    /// What was measured.
    pub measurement: Cow<'a, str>,
    /// In the order in which they stand.
    pub tags: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    /// Numbers and truth values (as 0 and 1); text is left out, for it is no sample.
    pub fields: Vec<(Cow<'a, str>, f64)>,
    /// Nanoseconds since 1970-01-01 UTC.
    pub timestamp_ns: Option<i64>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointError(&'static str);

impl fmt::Display for PointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Reads one line; `None` for an empty one or a comment.
pub fn point(line: &str) -> Option<Result<Point<'_>, PointError>> {
    let line = line.strip_suffix('\r').unwrap_or(line).trim_start_matches([' ', '\t']);
    if line.trim_end().is_empty() || line.starts_with('#') { None } else { Some(parse(line)) }
}

fn parse(line: &str) -> Result<Point<'_>, PointError> {
    let (measurement, mut rest) = token(line, b", ");
    if measurement.is_empty() {
        return Err(PointError("a line has no measurement"));
    }
    let mut tags = Vec::new();
    while let Some(more) = rest.strip_prefix(',') {
        let (key, after) = token(more, b"=, ");
        let Some(after) = after.strip_prefix('=') else { return Err(PointError("a tag has no value")) };
        let (value, after) = token(after, b", ");
        if key.is_empty() || tags.len() == MOST {
            return Err(PointError("a tag has no name, or there are too many"));
        }
        tags.push((key, value));
        rest = after;
    }
    let mut fields = Vec::new();
    rest = rest.trim_start_matches(' ');
    for _ in 0..MOST {
        let (key, after) = token(rest, b"=, ");
        let Some(after) = after.strip_prefix('=') else { return Err(PointError("a field has no value")) };
        if key.is_empty() {
            return Err(PointError("a field has no name"));
        }
        let (value, after) = field(after)?;
        fields.extend(value.map(|value| (key, value)));
        match after.strip_prefix(',') {
            Some(more) => rest = more,
            None => {
                let time = after.trim();
                let bad = PointError("a time that is no number");
                let timestamp_ns = if time.is_empty() { None } else { Some(time.parse().map_err(|_| bad)?) };
                return Ok(Point { measurement, tags, fields, timestamp_ns });
            }
        }
    }
    Err(PointError("a line has too many fields"))
}

/// Up to one of these octets that has no backslash in front.
fn token<'a>(text: &'a str, ends: &[u8]) -> (Cow<'a, str>, &'a str) {
    let octets = text.as_bytes();
    let mut at = 0;
    let mut escaped = false;
    while at < octets.len() && !ends.contains(&octets[at]) {
        if octets[at] == b'\\' && octets.get(at + 1).is_some_and(|next| b",= ".contains(next)) {
            escaped = true;
            at += 1;
        }
        at += 1;
    }
    let (token, rest) = text.split_at(at);
    if !escaped {
        return (Cow::Borrowed(token), rest);
    }
    let mut plain = String::with_capacity(token.len());
    let mut chars = token.chars().peekable();
    while let Some(c) = chars.next() {
        match chars.peek() {
            Some(',' | '=' | ' ') if c == '\\' => plain.extend(chars.next()),
            _ => plain.push(c),
        }
    }
    (Cow::Owned(plain), rest)
}

/// A field's value, `None` for text, and what follows it.
fn field(text: &str) -> Result<(Option<f64>, &str), PointError> {
    if let Some(quoted) = text.strip_prefix('"') {
        let mut escaped = false;
        let end = quoted.bytes().position(|octet| {
            let ends = octet == b'"' && !escaped;
            escaped = octet == b'\\' && !escaped;
            ends
        });
        let end = end.ok_or(PointError("a text has no end"))?;
        return Ok((None, &quoted[end + 1..]));
    }
    let end = text.find([',', ' ']).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    let whole = |digits: &str| digits.bytes().all(|c| c.is_ascii_digit() || c == b'-' || c == b'+');
    let value = match word {
        "t" | "T" | "true" | "True" | "TRUE" => 1.0,
        "f" | "F" | "false" | "False" | "FALSE" => 0.0,
        _ => {
            let digits = word.strip_suffix('i').or_else(|| word.strip_suffix('u')).filter(|digits| whole(digits));
            let bad = PointError("a value that is no number, truth value or text");
            digits.unwrap_or(word).parse::<f64>().map_err(|_| bad)?
        }
    };
    Ok((Some(value), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Point<'_> {
        point(line).unwrap().unwrap()
    }

    #[test]
    fn lines_are_taken_apart() {
        let line = of(
            "weather,location=us-midwest,season=summer temperature=82,count=3i,bits=7u,ok=t,note=\"a, b\" 1465839830100400200",
        );
        assert_eq!(line.measurement, "weather");
        assert_eq!(line.tags, [("location".into(), "us-midwest".into()), ("season".into(), "summer".into())]);
        let names: Vec<(&str, f64)> = line.fields.iter().map(|(name, value)| (&**name, *value)).collect();
        assert_eq!(names, [("temperature", 82.0), ("count", 3.0), ("bits", 7.0), ("ok", 1.0)]);
        assert_eq!(line.timestamp_ns, Some(1_465_839_830_100_400_200));
    }

    #[test]
    fn escapes_mean_what_the_protocol_says() {
        let line = of(r#"we\ ather\,x,lo\,c\=a=mid\ west te\=mp=-1.5e3,s="q\"u,o te" "#);
        assert_eq!(line.measurement, "we ather,x");
        assert_eq!(line.tags, [("lo,c=a".into(), "mid west".into())]);
        assert_eq!(line.fields, [("te=mp".into(), -1500.0)]);
        assert_eq!(line.timestamp_ns, None);
    }

    #[test]
    fn what_is_no_line_is_refused() {
        assert!(point("").is_none() && point("  ").is_none() && point("# a comment").is_none());
        for bad in
            ["a", "a b", "a,b c=1", "a,=x c=1", "a b=", "a b=x", "a b=1 x", "a b=\"c", ",a=b c=1", "a =1", "a b=1i2i"]
        {
            assert!(point(bad).unwrap().is_err(), "{bad}");
        }
    }
}
