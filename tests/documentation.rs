//! What the pages say against what the code does.

use warren::control::command::VERBS;
use warren::wire::Code;

const PROTOCOL: &str = include_str!("../docs/protocol.md");

#[test]
fn every_error_code_stands_in_the_protocol_page_and_no_other() {
    let written: Vec<&str> = PROTOCOL
        .lines()
        .skip_while(|line| *line != "## Errors")
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let known: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(written, known);
}

#[test]
fn every_verb_stands_in_the_protocol_page_and_no_other() {
    let section = PROTOCOL.split("## Verbs of the control socket").nth(1).and_then(|rest| rest.split("\n## ").next());
    // The section's other table has the reasons why a sandbox ended.
    let verbs = section.and_then(|section| section.split("\n**States** of a sandbox").next());
    let written: Vec<&str> = verbs
        .expect("the section on verbs")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let known: Vec<&str> = VERBS.iter().map(|verb| verb.name).collect();
    assert_eq!(written, known);
}

/// `key=` in a verb's arguments as a page or the verb's help writes them.
fn keys(arguments: &str) -> std::collections::BTreeSet<&str> {
    let is_key = |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let ends = arguments.match_indices('=').map(|(at, _)| &arguments[..at]);
    ends.filter_map(|head| head.rsplit(|c: char| !c.is_ascii_lowercase() && c != '_').next()).filter(is_key).collect()
}

#[test]
fn every_verb_has_the_arguments_that_its_page_says() {
    let pages = [PROTOCOL, include_str!("../docs/code.md")];
    for verb in VERBS {
        let start = format!("| `{}` | ", verb.name);
        let rows = pages.iter().flat_map(|page| page.lines()).filter_map(|line| line.strip_prefix(&start));
        // A verb without arguments has an empty column.
        let written = rows.map(|row| if row.starts_with('|') { "" } else { row.split(" | ").next().unwrap_or(row) });
        let mut written = written.filter(|arguments| *arguments != "docs/code.md");
        let written = written.next().unwrap_or_else(|| panic!("{} has no row with arguments", verb.name));
        assert_eq!(keys(written), keys(verb.arguments), "{}: {written}", verb.name);
    }
}

#[test]
fn every_direct_dependency_stands_in_its_page_and_no_other() {
    let manifest: toml::Table = include_str!("../Cargo.toml").parse().expect("Cargo.toml");
    let known: Vec<&str> = manifest["dependencies"].as_table().expect("a table").keys().map(String::as_str).collect();
    let written: Vec<&str> = include_str!("../docs/dependencies.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    assert_eq!(written, known);
}

#[test]
fn the_lock_file_has_as_many_packages_as_its_page_says_and_at_most_ninety() {
    let lock: toml::Table = include_str!("../Cargo.lock").parse().expect("Cargo.lock");
    let packages = lock["package"].as_array().expect("a list").len();
    assert!(packages <= 90, "{packages} packages");
    let written = format!("The lock file has {packages} packages");
    assert!(include_str!("../docs/dependencies.md").contains(&written), "{written}");
}
