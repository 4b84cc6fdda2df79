//! The languages of a template: how its manifest says that code is run. docs/code.md.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// Applies the rules that types do not say.
///
/// # Errors
/// Which rule is broken, with value and limit.
pub(super) fn check(languages: &Languages) -> Result<(), String> {
    if languages.len() > MAX_LANGUAGES {
        return Err(format!("languages has {} entries, the limit is {MAX_LANGUAGES}", languages.len()));
    }
    for (name, Language { start, once, packages }) in languages {
        if !is_language_name(name) {
            return Err(format!("language {name:?} is not of the form [a-z][a-z0-9_+#.-]{{0,31}}"));
        }
        if start.is_empty() && once.is_empty() {
            return Err(format!("languages.{name} has neither start nor once"));
        }
        let none = Vec::new();
        let installer = packages.as_ref().map_or(&none, |packages| &packages.installer);
        for (key, words) in [("start", start), ("once", once), ("packages.installer", installer)] {
            let octets: usize = words.iter().map(String::len).sum();
            if words.len() > MAX_WORDS || octets > MAX_OCTETS {
                return Err(format!("languages.{name}.{key} is over {MAX_WORDS} words or {MAX_OCTETS} octets"));
            }
            if words.first().is_some_and(String::is_empty) || words.iter().any(|word| word.contains('\0')) {
                return Err(format!("languages.{name}.{key} has no program, or a NUL"));
            }
        }
        if !once.is_empty() && !once.iter().any(|word| word == "{source}") {
            return Err(format!("languages.{name}.once has no word {{source}}"));
        }
        let Some(Installing { installer, path, .. }) = packages else { continue };
        if installer.is_empty() {
            return Err(format!("languages.{name}.packages.installer has no program"));
        }
        let is_variable = |path: &str| {
            path.len() <= MAX_NAME && path.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') && !path.is_empty()
        };
        if !is_variable(path) {
            return Err(format!("languages.{name}.packages.path {path:?} is no variable of A-Z and _"));
        }
    }
    Ok(())
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
}
