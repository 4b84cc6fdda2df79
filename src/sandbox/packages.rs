//! Names of packages that code runs ask for. They end up as arguments of an installer: nothing but names and versions passes,
//! neither options nor addresses nor paths.

use crate::storage::languages::IndexKind;
use crate::wire::{Code, Error};

/// Packages of one request at most.
pub const MAX_PACKAGES: usize = 64;
/// Longest name, in octets; longer names are on no index.
const MAX_NAME: usize = 128;
const MAX_VERSION: usize = 64;

fn bad(given: &str, why: &str) -> Error {
    let shown: String = given.chars().take(MAX_NAME).collect();
    Error::new(Code::BadArgument, format!("dependency={shown:?} {why}")).with("argument", "dependency")
}

/// The packages in the one form that is asked of an index: sorted, each once, names of Python's normalised (PEP 503).
///
/// # Errors
/// `OUT_OF_RANGE` where there are too many, `BAD_ARGUMENT` for what is not of the form `NAME[==VERSION]` (pip) or
/// `NAME[@VERSION]` (npm), or asks for two versions of a package.
pub fn check(kind: IndexKind, given: &[String]) -> Result<Vec<String>, Error> {
    if given.len() > MAX_PACKAGES {
        let message = format!("{} packages are over the limit of {MAX_PACKAGES}", given.len());
        let error = Error::new(Code::OutOfRange, message).with("argument", "dependency");
        return Err(error.with("min", 0).with("max", MAX_PACKAGES));
    }
    let mut found: Vec<(String, Option<&str>)> = Vec::new();
    for package in given {
        let (name, version) = match kind {
            IndexKind::Pip => pip(package)?,
            IndexKind::Npm => npm(package)?,
        };
        match found.iter().find(|(other, _)| *other == name) {
            Some((_, other)) if *other != version => return Err(bad(package, "is asked for in two versions")),
            Some(_) => {}
            None => found.push((name, version)),
        }
    }
    found.sort();
    let mark = if kind == IndexKind::Pip { "==" } else { "@" };
    let whole = |(name, version): (String, Option<&str>)| match version {
        Some(version) => format!("{name}{mark}{version}"),
        None => name,
    };
    Ok(found.into_iter().map(whole).collect())
}

/// One part of a name: it begins with a letter or digit, so that it is never an option.
fn is_part(part: &str, more: &[u8]) -> bool {
    part.len() <= MAX_NAME
        && part.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
}

fn is_version(version: &str, more: &[u8]) -> bool {
    version.len() <= MAX_VERSION && is_part(version, more)
}

/// PEP 508 has the form of names, PEP 440 that of versions.
fn pip(given: &str) -> Result<(String, Option<&str>), Error> {
    let (name, version) = match given.split_once("==") {
        Some((name, version)) => (name, Some(version)),
        None => (given, None),
    };
    let ends = name.bytes().last().is_some_and(|b| b.is_ascii_alphanumeric());
    if !is_part(name, b"._-") || !ends || !version.is_none_or(|version| is_version(version, b".!+_-")) {
        return Err(bad(given, "is not of the form NAME[==VERSION]"));
    }
    let mut normal = String::new();
    for c in name.chars().map(|c| if matches!(c, '.' | '_') { '-' } else { c.to_ascii_lowercase() }) {
        if c != '-' || !normal.ends_with('-') {
            normal.push(c);
        }
    }
    Ok((normal, version))
}

fn npm(given: &str) -> Result<(String, Option<&str>), Error> {
    let scoped = given.strip_prefix('@');
    let (name, version) = match scoped.unwrap_or(given).split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (scoped.unwrap_or(given), None),
    };
    let parts: Vec<&str> = if scoped.is_some() { name.splitn(2, '/').collect() } else { vec![name] };
    let expected = if scoped.is_some() { 2 } else { 1 };
    let named = parts.len() == expected && parts.iter().all(|part| is_part(part, b"._~-"));
    if !named || !version.is_none_or(|version| is_version(version, b".+-")) {
        return Err(bad(given, "is not of the form [@SCOPE/]NAME[@VERSION]"));
    }
    Ok((if scoped.is_some() { format!("@{name}") } else { name.to_string() }, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(kind: IndexKind, given: &[&str]) -> Result<Vec<String>, Error> {
        check(kind, &given.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn the_same_packages_are_the_same_list() {
        let pip = checked(IndexKind::Pip, &["Zope.Interface", "a__b==1.0+x", "zope-interface"]);
        assert_eq!(pip.unwrap(), ["a-b==1.0+x", "zope-interface"]);
        let npm = checked(IndexKind::Npm, &["left-pad@1.3.0", "@a/b@latest", "left-pad@1.3.0", "JSONStream"]);
        assert_eq!(npm.unwrap(), ["@a/b@latest", "JSONStream", "left-pad@1.3.0"]);
    }

    #[test]
    fn what_is_more_than_a_name_and_a_version_is_refused() {
        let long = "a".repeat(MAX_NAME + 1);
        for name in [
            "",
            "-r",
            "--index-url=http://x",
            "a b",
            "a;b",
            "a>=1",
            "a==",
            "a==1 --x",
            "a==-1",
            "a==1.*",
            "a[extra]",
            "./a",
            "../a",
            "/etc/passwd",
            "a/b",
            "http://x/a.whl",
            "a @ http://x",
            "git+ssh://x",
            "a\n",
            "a\0",
            "é",
            "a-",
            &long,
        ] {
            let error = checked(IndexKind::Pip, &[name]).unwrap_err();
            assert!(error.is(Code::BadArgument), "{name:?}: {error}");
            assert!(error.message.len() < 300, "{error}");
        }
        for name in [
            "",
            "-g",
            "--registry=x",
            "a b",
            "a@",
            "a@^1.0.0",
            "a@1 || 2",
            "a@http://x",
            "@a",
            "@a/",
            "@/b",
            "@a/b/c",
            "../a",
            "a/b",
            "a@file:x",
            "a@npm:b",
            "a\n",
            ".bin",
            "_a",
            "é",
            &long,
        ] {
            let error = checked(IndexKind::Npm, &[name]).unwrap_err();
            assert!(error.is(Code::BadArgument), "{name:?}: {error}");
        }
    }

    #[test]
    fn too_many_and_two_versions_are_refused() {
        let many: Vec<String> = (0..=MAX_PACKAGES).map(|n| format!("p{n}")).collect();
        let error = check(IndexKind::Pip, &many).unwrap_err();
        assert_eq!((error.is(Code::OutOfRange), error.fields.get("max")), (true, Some("64")));
        let error = checked(IndexKind::Pip, &["a==1", "A==2"]).unwrap_err();
        assert!(error.is(Code::BadArgument) && error.message.contains("two versions"), "{error}");
        assert!(checked(IndexKind::Npm, &["a", "a@1"]).is_err());
    }
}
