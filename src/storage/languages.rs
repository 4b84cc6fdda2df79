//! The languages of a template: how its manifest says that code is run. docs/code.md.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use toml::Spanned;

/// Longest text that says a template's languages where it is built, in octets.
pub const MAX_TEXT: usize = 16 * 1024;

const MAX_LANGUAGES: usize = 32;
const MAX_NAME: usize = 32;
const MAX_WORDS: usize = 32;
const MAX_OCTETS: usize = 4096;

/// The languages by their names.
pub type Languages = BTreeMap<String, Language>;

/// How code of one language is run: at least one of the two is not empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Language {
    /// The command of a runner. `{python}`, `{javascript}` and `{bash}` stand for Warren's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<String>,
    /// The command that runs one source, for which `{source}` stands, and ends.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub once: Vec<String>,
    /// How packages that code asks for are installed; `None` where they cannot be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packages: Option<Installing>,
}

/// Which index the packages of a language come from: the configuration names one of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexKind {
    /// Python's: PEP 503.
    Pip,
    /// Node.js'.
    Npm,
}

impl IndexKind {
    /// As requests and manifests name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pip => "pip",
            Self::Npm => "npm",
        }
    }

    /// What the directory of installed packages is called, which for Node.js means something.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Pip => "site-packages",
            Self::Npm => "node_modules",
        }
    }
}

/// How packages of a language are installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installing {
    /// Where they come from.
    pub index: IndexKind,
    /// The command of an installer. `{pip}` and `{npm}` stand for Warren's own.
    pub installer: Vec<String>,
    /// The environment variable that has the directories where the language looks for packages.
    pub path: String,
}

/// Whether a name may name a language: `[a-z][a-z0-9_+#.-]{0,31}`.
pub fn is_language_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_+#.-".contains(&b);
    name.len() <= MAX_NAME
        && name.bytes().all(inner)
        && name.bytes().next().is_some_and(|first| first.is_ascii_lowercase())
}

/// Why a text does not say languages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Where, counted from 1; `None` where it is all of it.
    pub line: Option<usize>,
    /// Which rule is broken, with value and limit.
    pub message: String,
    /// The limit that it is over.
    pub max: Option<usize>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Refused {}

/// The same tables as a manifest has, and nothing else.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    #[serde(default)]
    languages: BTreeMap<Spanned<String>, Language>,
}

/// Reads what is said of a template's languages where it is built: the tables `[languages.NAME]` of a manifest.
///
/// # Errors
/// What is wrong with it, and where.
pub fn parse(text: &str) -> Result<Languages, Refused> {
    if text.len() > MAX_TEXT {
        let message = format!("{} octets are over the limit of {MAX_TEXT}", text.len());
        return Err(Refused { line: None, message, max: Some(MAX_TEXT) });
    }
    let line_of = |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|&&octet| octet == b'\n').count() + 1;
    let read: Text = toml::from_str(text).map_err(|e: toml::de::Error| Refused {
        line: e.span().map(|span| line_of(span.start)),
        message: e.message().to_string(),
        max: None,
    })?;
    let mut languages = Languages::new();
    for (name, language) in read.languages {
        let line = line_of(name.span().start);
        let name = name.into_inner();
        check_language(&name, &language).map_err(|message| Refused { line: Some(line), message, max: None })?;
        languages.insert(name, language);
    }
    check(&languages).map_err(|message| Refused { line: None, message, max: Some(MAX_LANGUAGES) })?;
    Ok(languages)
}

/// Applies the rules that types do not say.
///
/// # Errors
/// Which rule is broken, with value and limit.
pub(super) fn check(languages: &Languages) -> Result<(), String> {
    if languages.len() > MAX_LANGUAGES {
        return Err(format!("languages has {} entries, the limit is {MAX_LANGUAGES}", languages.len()));
    }
    languages.iter().try_for_each(|(name, language)| check_language(name, language))
}

fn check_language(name: &str, language: &Language) -> Result<(), String> {
    let Language { start, once, packages } = language;
    if !is_language_name(name) {
        return Err(format!("language {name:?} is not of the form [a-z][a-z0-9_+#.-]{{0,31}}"));
    }
    if start.is_empty() && once.is_empty() {
        return Err(format!("languages.{name} has neither start nor once"));
    }
    let none = Vec::new();
    let installer = packages.as_ref().map_or(&none, |packages| &packages.installer);
    for (key, words) in [("start", start), ("once", once), ("packages.installer", installer)] {
        let (count, octets) = (words.len(), words.iter().map(String::len).sum::<usize>());
        if count > MAX_WORDS || octets > MAX_OCTETS {
            return Err(format!(
                "languages.{name}.{key} has {count} words of {octets} octets, the limits are {MAX_WORDS} words and \
                 {MAX_OCTETS} octets"
            ));
        }
        if words.first().is_some_and(String::is_empty) || words.iter().any(|word| word.contains('\0')) {
            return Err(format!("languages.{name}.{key} has no program, or a NUL"));
        }
    }
    if !once.is_empty() && !once.iter().any(|word| word == "{source}") {
        return Err(format!("languages.{name}.once has no word {{source}}"));
    }
    let Some(Installing { installer, path, .. }) = packages else { return Ok(()) };
    if installer.is_empty() {
        return Err(format!("languages.{name}.packages.installer has no program"));
    }
    let is_variable = |path: &str| {
        path.len() <= MAX_NAME && path.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') && !path.is_empty()
    };
    match is_variable(path) {
        true => Ok(()),
        false => Err(format!("languages.{name}.packages.path {path:?} is no variable of A-Z and _")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<(), String> {
        check(&toml::from_str(text).map_err(|e| e.to_string())?)
    }

    #[test]
    fn a_language_says_how_it_is_started_or_run_once() {
        assert_eq!(checked("[python]\nstart = [\"/usr/bin/python3\", \"{python}\"]"), Ok(()));
        let packages =
            "[a.packages]\nindex = \"npm\"\ninstaller = [\"/usr/bin/node\", \"{npm}\"]\npath = \"NODE_PATH\"";
        assert_eq!(checked(&format!("[a]\nstart = [\"/usr/bin/node\"]\n{packages}")), Ok(()));
        assert_eq!(checked("[\"c++\"]\nonce = [\"/usr/bin/run\", \"{source}\"]"), Ok(()));
    }

    #[test]
    fn what_could_not_be_run_is_refused_and_named() {
        let long = format!("[a]\nstart = [\"{}\"]", "x".repeat(MAX_OCTETS + 1));
        for (text, named) in [
            ("[Python]\nstart = [\"x\"]", "Python"),
            ("[\"\"]\nstart = [\"x\"]", "\"\""),
            ("[a]", "neither"),
            ("[a]\nonce = [\"x\"]", "{source}"),
            ("[a]\nstart = [\"\"]", "no program"),
            ("[a]\nstart = [\"x\\u0000\"]", "NUL"),
            ("[a]\nstop = [\"x\"]", "stop"),
            ("[a]\nstart = [\"x\"]\n[a.packages]\nindex = \"gem\"", "gem"),
            ("[a]\nstart = [\"x\"]\n[a.packages]\nindex = \"pip\"\ninstaller = []\npath = \"A\"", "no program"),
            ("[a]\nstart = [\"x\"]\n[a.packages]\nindex = \"pip\"\ninstaller = [\"x\"]\npath = \"a=\"", "no variable"),
            (&long, "4096 octets"),
        ] {
            let error = checked(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn a_text_says_languages_or_where_it_does_not() {
        let text = "# how\n[languages.python]\nstart = [\"/usr/bin/python3\", \"{python}\"]\n\n\
                    [languages.sh]\nonce = [\"/bin/sh\", \"{source}\"]\n";
        let languages = parse(text).unwrap();
        assert_eq!(languages.keys().collect::<Vec<_>>(), ["python", "sh"]);
        assert_eq!(languages["python"].start, ["/usr/bin/python3", "{python}"]);
        assert_eq!(parse("").unwrap(), Languages::new());
        for (text, line, named) in [
            ("[languages.python]\n\nstart = 1\n", Some(3), "invalid type"),
            ("[python]\nstart = [\"x\"]\n", Some(1), "unknown field"),
            ("\n[languages.a]\nstart = [\"x\"]\n[languages.b]\nonce = [\"x\"]\n", Some(4), "languages.b.once"),
            ("\n\n[languages.A]\nstart = [\"x\"]\n", Some(3), "\"A\" is not of the form"),
            ("[languages\n", Some(1), ""),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.line == line && error.message.contains(named), "{text}: {error:?}");
        }
        let error = parse(&"#".repeat(MAX_TEXT + 1)).unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.max),
            ("16385 octets are over the limit of 16384", Some(MAX_TEXT))
        );
        let many: String = (0..33).map(|n| format!("[languages.a{n}]\nstart = [\"x\"]\n")).collect();
        let error = parse(&many).unwrap_err();
        assert_eq!((error.message.as_str(), error.max), ("languages has 33 entries, the limit is 32", Some(32)));
    }
}
