//! `.dockerignore`: what of a recipe's directory COPY leaves out, by Docker's rules (docs.docker.com/build/concepts/context,
//! moby's `patternmatcher`). A pattern holds for a path where it matches it or a directory above it; of all that hold, the last
//! says whether the path is left out.
//!
//! A pattern is matched by keeping the set of places in it that have been come to, octet by octet: its length times that of
//! the path, whatever is in either.

use super::RecipeError;

/// Longest file, in octets.
pub const MAX_IGNORE: usize = 64 * 1024;
/// Most patterns.
pub const MAX_PATTERNS: usize = 1000;

/// What is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ignore {
    /// The file, for errors.
    name: String,
    patterns: Vec<Pattern>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    /// Counted from 1.
    line: usize,
    /// `!`: what it matches comes along after all.
    comes: bool,
    tokens: Vec<Token>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    One(char),
    /// `?`
    Any,
    /// `[…]`: ranges, and whether it is what is not among them.
    Class(Vec<(char, char)>, bool),
    /// `*`
    Star,
    /// `**` with more behind it: nothing, or any directories.
    Directories,
    /// `**` in the end.
    Rest,
}

/// Which patterns hold for a path, by which they hold for what is below it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held(Vec<bool>);

impl Ignore {
    /// Reads a list; `name` is its file, for errors.
    pub fn parse(octets: &[u8], name: &str) -> Result<Self, RecipeError> {
        if octets.len() > MAX_IGNORE {
            let message = format!("more than {} octets, the limit is {MAX_IGNORE}", octets.len() - 1);
            return Err(RecipeError::new(name, message));
        }
        let text = std::str::from_utf8(octets).map_err(|_| RecipeError::new(name, "is not UTF-8"))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut patterns = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_number = at + 1;
            let trimmed = line.trim();
            if line.starts_with('#') || trimmed.is_empty() {
                continue;
            }
            let error = |message: String| RecipeError::new(format_args!("{name}:{line_number}"), message);
            let (comes, pattern) = match trimmed.strip_prefix('!') {
                Some(behind) => (true, behind.trim()),
                None => (false, trimmed),
            };
            if pattern.is_empty() {
                return Err(error("! excepts nothing".to_string()));
            }
            let cleaned = clean(pattern);
            // `.` and `/` are the directory itself, which is never left out.
            if cleaned.is_empty() {
                continue;
            }
            let tokens = tokens(&cleaned).map_err(|message| error(format!("{pattern}: {message}")))?;
            patterns.push(Pattern { line: line_number, comes, tokens });
        }
        if patterns.len() > MAX_PATTERNS {
            let message = format!("{} patterns are over the limit of {MAX_PATTERNS}", patterns.len());
            return Err(RecipeError::new(name, message));
        }
        Ok(Self { name: name.to_string(), patterns })
    }

    /// Which patterns hold for a path from the top, of which `above` hold for the directory that it is in.
    pub fn held(&self, path: &[u8], above: &Held) -> Held {
        if self.patterns.is_empty() {
            return Held::default();
        }
        let path: Vec<char> = String::from_utf8_lossy(path).chars().collect();
        let holds = |(at, pattern): (usize, &Pattern)| {
            above.0.get(at).copied().unwrap_or(false) || is_match(&pattern.tokens, &path)
        };
        Held(self.patterns.iter().enumerate().map(holds).collect())
    }

    /// The place of the pattern by which a path is left out.
    pub fn left_out(&self, held: &Held) -> Option<String> {
        let last = self.patterns.iter().zip(&held.0).rev().find(|(_, holds)| **holds)?.0;
        (!last.comes).then(|| format!("{}:{}", self.name, last.line))
    }

    /// Whether something in a directory that is left out may come along after all.
    pub fn has_exceptions(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern.comes)
    }
}

/// A pattern from the top: without a `/` before or behind it, `.` and `..` taken out.
fn clean(pattern: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in pattern.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn tokens(pattern: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        tokens.push(match c {
            '*' if chars.next_if_eq(&'*').is_some() => {
                // Further ones say no more.
                while chars.next_if_eq(&'*').is_some() {}
                chars.next_if_eq(&'/');
                if chars.peek().is_some() { Token::Directories } else { Token::Rest }
            }
            '*' => Token::Star,
            '?' => Token::Any,
            '[' => class(&mut chars)?,
            '\\' => Token::One(chars.next().ok_or("a \\ ends it")?),
            c => Token::One(c),
        });
    }
    Ok(tokens)
}

/// What stands behind `[`.
fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Token, String> {
    let not = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    let one = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>| match chars.next() {
        Some('\\') => chars.next(),
        Some('-') => None,
        c => c,
    };
    loop {
        if !ranges.is_empty() && chars.next_if_eq(&']').is_some() {
            return Ok(Token::Class(ranges, not));
        }
        if chars.peek() == Some(&']') {
            return Err("[] has nothing in it".to_string());
        }
        let open = || "a [ is not closed, or a - in it has no ends".to_string();
        let low = one(chars).ok_or_else(open)?;
        let high = match chars.next_if_eq(&'-') {
            Some(_) => one(chars).filter(|&high| high != ']').ok_or_else(open)?,
            None => low,
        };
        if low > high {
            return Err(format!("{low}-{high} is no range"));
        }
        ranges.push((low, high));
    }
}

fn is_match(tokens: &[Token], path: &[char]) -> bool {
    let (mut now, mut next) = (vec![false; tokens.len() + 1], vec![false; tokens.len() + 1]);
    // What may be nothing is passed when it is come to.
    let enter = |places: &mut [bool], mut at: usize| loop {
        places[at] = true;
        match tokens.get(at) {
            Some(Token::Star | Token::Directories | Token::Rest) => at += 1,
            _ => return,
        }
    };
    enter(&mut now, 0);
    for &c in path {
        next.fill(false);
        for (at, token) in tokens.iter().enumerate().filter(|(at, _)| now[*at]) {
            match token {
                Token::One(one) if c == *one => enter(&mut next, at + 1),
                Token::Any if c != '/' => enter(&mut next, at + 1),
                Token::Class(ranges, not)
                    if c != '/' && ranges.iter().any(|(low, high)| (low..=high).contains(&&c)) != *not =>
                {
                    enter(&mut next, at + 1);
                }
                Token::Star if c != '/' => enter(&mut next, at),
                Token::Rest => enter(&mut next, at),
                Token::Directories => {
                    // Within a directory's name there is no way on.
                    next[at] = true;
                    if c == '/' {
                        enter(&mut next, at + 1);
                    }
                }
                _ => {}
            }
        }
        std::mem::swap(&mut now, &mut next);
        if !now.contains(&true) {
            return false;
        }
    }
    now[tokens.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ignore(text: &str) -> Ignore {
        Ignore::parse(text.as_bytes(), "I").unwrap()
    }

    /// Whether a path is left out, asked as COPY asks: from the top down.
    fn is_left_out(ignore: &Ignore, path: &str) -> bool {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        let held = ends.fold(Held::default(), |held, end| ignore.held(&path.as_bytes()[..end], &held));
        ignore.left_out(&held).is_some()
    }

    #[test]
    fn paths_are_left_out_as_docker_says() {
        for (text, out, comes) in [
            ("", "", "a .env"),
            ("# a\n\n  b  \n", "b b/c", "a '#' a/b"),
            (" # a", "", "a"),
            ("/a/\n./b/../c//d", "a a/x c/d c/d/x", "b c c/e x/a"),
            ("*/temp*", "somedir/temporary.txt somedir/temp a/temp/b", "temp a/b/temp"),
            ("*/*/temp*", "a/b/temporary.txt", "a/temp temp"),
            ("temp?", "tempa tempb tempé", "temp tempab temp/ x/tempa"),
            ("**/*.go", "a.go a/b.go a/b/c.go .go", "a.gox go a/go"),
            ("**/.env", ".env a/.env a/b/.env .env/x", "x.env a/x.env .envx"),
            ("a/**", "a/b a/b/c", "a ab b/a/c"),
            ("a/**/b", "a/b a/x/b a/x/y/b a/b/c", "a/xb ab a/x"),
            ("**", "a a/b", ""),
            ("*", "a a/b .a", ""),
            ("*.md\n!README.md", "a.md", "README.md x/a.md x/README.md"),
            ("*.md\n!README*.md\nREADME-secret.md", "a.md README-secret.md", "README.md README-x.md"),
            ("*.md\nREADME-secret.md\n!README*.md", "a.md", "README-secret.md README.md"),
            ("*\n!src\nsrc/*.o\n!src/keep.o", "a src/x.o", "src src/x src/a/b src/keep.o src/a/x.o"),
            ("d\n! d/e/f", "d d/x d/e d/e/x", "d/e/f d/e/f/g"),
            ("[a-c]x\n[^.]y\n[\\]]z", "ax cx dy ]z", "dx .y az"),
            ("a\\*b\n\\#c\n\\!d", "a*b #c !d", "axb c d"),
            ("é*", "é éx", "e"),
            (".", "", "a"),
            ("a.c", "a.c", "abc"),
        ] {
            let ignore = ignore(text);
            out.split_whitespace().for_each(|path| assert!(is_left_out(&ignore, path), "{text:?} has {path} out"));
            comes.split_whitespace().for_each(|path| assert!(!is_left_out(&ignore, path), "{text:?} has {path} come"));
        }
    }

    #[test]
    fn the_pattern_is_named_by_which_something_is_left_out() {
        let ignore = ignore("\u{feff}a\r\n!b\n*\n");
        assert_eq!(ignore.left_out(&ignore.held(b"a", &Held::default())), Some("I:3".to_string()));
        assert!(ignore.has_exceptions());
    }

    #[test]
    fn what_is_no_list_is_an_error_that_names_its_line_and_what_is_too_much_its_limit() {
        for (text, place, part) in [
            ("a\n!", "I:2", "excepts nothing"),
            ("[a", "I:1", "[a: a [ is not closed"),
            ("[]", "I:1", "has nothing in it"),
            ("[b-a]", "I:1", "b-a is no range"),
            ("[a-]", "I:1", "no ends"),
            ("[-a]", "I:1", "no ends"),
            ("\n\na\\", "I:3", "ends it"),
        ] {
            let error = Ignore::parse(text.as_bytes(), "I").unwrap_err();
            assert!(error.place == place && error.message.contains(part), "{text}: {error}");
        }
        let error = Ignore::parse("a\n".repeat(MAX_PATTERNS + 1).as_bytes(), "I").unwrap_err();
        assert_eq!(error.to_string(), "I: 1001 patterns are over the limit of 1000");
        let error = Ignore::parse(&vec![b'#'; MAX_IGNORE + 1], "I").unwrap_err();
        assert_eq!(error.to_string(), "I: more than 65536 octets, the limit is 65536");
        assert!(Ignore::parse(b"\xff", "I").unwrap_err().message.contains("UTF-8"));
    }

    /// What the rules say, as they are written: it may take for ever where there is much to try.
    fn by_the_rules(tokens: &[Token], path: &[char]) -> bool {
        let Some((token, behind)) = tokens.split_first() else { return path.is_empty() };
        let first = |fits: &dyn Fn(char) -> bool| {
            path.split_first().is_some_and(|(&c, rest)| fits(c) && by_the_rules(behind, rest))
        };
        match token {
            Token::One(one) => first(&|c| c == *one),
            Token::Any => first(&|c| c != '/'),
            Token::Class(ranges, not) => {
                first(&|c| c != '/' && ranges.iter().any(|(low, high)| *low <= c && c <= *high) != *not)
            }
            Token::Star => {
                (0..=path.len()).take_while(|&n| !path[..n].contains(&'/')).any(|n| by_the_rules(behind, &path[n..]))
            }
            Token::Directories => {
                (0..=path.len()).filter(|&n| n == 0 || path[n - 1] == '/').any(|n| by_the_rules(behind, &path[n..]))
            }
            Token::Rest => true,
        }
    }

    #[test]
    fn any_pattern_is_read_or_refused_and_matches_what_the_rules_say() {
        // Small enough that nothing is left to chance in what they have to do with each other.
        let mut random = 1_u64;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        let mut compared = 0;
        for _ in 0..200_000 {
            let pattern: String = (0..=next(7)).map(|_| b"aab**//?[]^-\\"[next(13)] as char).collect();
            let path: Vec<char> = (0..=next(7)).map(|_| b"aab//"[next(5)] as char).collect();
            let Ok(tokens) = tokens(&clean(&pattern)) else { continue };
            compared += 1;
            assert_eq!(is_match(&tokens, &path), by_the_rules(&tokens, &path), "{pattern} {path:?}");
        }
        assert!(compared > 50_000, "{compared}");
    }

    #[test]
    fn no_pattern_takes_for_ever() {
        let path = "a".repeat(400) + &"/a".repeat(10);
        for part in ["*a", "**/", "**a", "a*", "?*", "*/**/", "[a]*", "**/a*"] {
            let text = part.repeat(2000 / part.len()) + "b";
            assert!(!is_left_out(&ignore(&text), &path), "{part}");
        }
    }
}
