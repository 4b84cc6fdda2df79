//! Words of a recipe's line, and variables in them.

/// How much may come of expanding: what one instruction becomes is bounded, however often it names what variable.
#[derive(Debug)]
pub struct Total {
    octets: usize,
    most: usize,
}

impl Total {
    /// Nothing so far, of so many octets.
    pub fn new(most: usize) -> Self {
        Self { octets: 0, most }
    }
}

/// A word, or all that is there: a path with spaces needs no quotes where there can be one only.
pub fn unquoted(text: &str) -> Result<String, String> {
    let mut all = words(text)?;
    match (all.pop(), all.is_empty()) {
        (Some(word), true) => Ok(word),
        _ => Ok(text.to_string()),
    }
}

/// Words of a line, with quotes and escapes. A `$` that is quoted by `'` or escaped stays one: `expand` sees `\$`.
pub fn words(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut begun) = (Vec::new(), String::new(), false);
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', Some('"') | None) => match chars.next() {
                Some('$') => word.push_str("\\$"),
                Some(next) => word.push(next),
                None => return Err("a \\ ends it".to_string()),
            },
            ('$', Some('\'')) => word.push_str("\\$"),
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => (quote, begun) = (Some(c), true),
            (c, None) if c.is_whitespace() => {
                if begun || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            (c, _) => word.push(c),
        }
    }
    if let Some(open) = quote {
        return Err(format!("a quote {open} is not closed"));
    }
    if begun || !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// Whether variables in a text are written as they may be.
pub fn check(text: &str) -> Result<(), String> {
    expand(text, &|_| None, &mut Total::new(usize::MAX)).map(drop)
}

/// Puts values of variables in place of `$NAME` and `${NAME}`; one that is not set is nothing.
pub fn expand<'a>(text: &str, value: &dyn Fn(&str) -> Option<&'a str>, total: &mut Total) -> Result<String, String> {
    let mut out = String::new();
    let mut add = |part: &str| {
        total.octets = total.octets.saturating_add(part.len());
        // It is counted on, for the error.
        if total.octets <= total.most {
            out.push_str(part);
        }
    };
    let mut rest = text;
    while let Some(at) = rest.find(['$', '\\']) {
        add(&rest[..at]);
        rest = &rest[at..];
        if let Some(behind) = rest.strip_prefix("\\$") {
            add("$");
            rest = behind;
            continue;
        }
        if let Some(behind) = rest.strip_prefix('\\') {
            add("\\");
            rest = behind;
            continue;
        }
        let behind = &rest[1..];
        let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, after) = match behind.strip_prefix('{') {
            Some(inner) => {
                let end = inner.find('}').ok_or(format!("{rest} is not closed"))?;
                (&inner[..end], &inner[end + 1..])
            }
            None => behind.split_at(behind.find(|c| !is_inner(c)).unwrap_or(behind.len())),
        };
        if name.is_empty() && !behind.starts_with('{') {
            add("$");
            rest = behind;
            continue;
        }
        if name.is_empty() || !name.chars().all(is_inner) {
            return Err(format!("${{{name}}}: no more than a name is known in it"));
        }
        add(value(name).unwrap_or_default());
        rest = after;
    }
    add(rest);
    match total.octets > total.most {
        true => Err(format!("with its variables it has {} octets, the limit is {}", total.octets, total.most)),
        false => Ok(out),
    }
}
