//! A recipe: the instructions of a Dockerfile that templates have a use for. What is not among them is an error that names its
//! line; nothing is passed over.

use std::collections::BTreeMap;

use super::RecipeError;

/// Longest recipe, in octets.
pub const MAX_RECIPE: usize = 1024 * 1024;
/// Most instructions.
pub const MAX_STEPS: usize = 200;
/// Longest instruction, continued lines together, in octets.
pub const MAX_INSTRUCTION: usize = 32 * 1024;

/// A whole recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// A template, or the path of an image.
    pub from: String,
    /// Line of FROM, counted from 1.
    pub from_line: usize,
    /// In order.
    pub steps: Vec<Step>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where it begins, counted from 1.
    pub line: usize,
    /// As it is written, on one line.
    pub text: String,
    /// What is to be done.
    pub what: Instruction,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    /// A program runs.
    Run(Vec<String>),
    /// Files of the recipe's directory.
    Copy {
        /// Paths in that directory.
        sources: Vec<String>,
        /// Where they go, absolute or from the working directory.
        target: String,
        /// `USER[:GROUP]`; root when not said.
        owner: Option<String>,
    },
    /// Variables of the environment.
    Env(Vec<(String, String)>),
    /// The working directory, which is made.
    WorkDir(String),
    /// Of programs that follow.
    User(String),
    /// The start command.
    Cmd(Vec<String>),
    /// What stands before the start command's words.
    Entrypoint(Vec<String>),
    /// The ready command, for a shell.
    Ready(String),
}

/// Reads a recipe; `name` is its file, for errors.
pub fn parse(text: &str, name: &str) -> Result<Recipe, RecipeError> {
    if text.len() > MAX_RECIPE {
        let message = format!("{} octets are over the limit of {MAX_RECIPE}", text.len());
        return Err(RecipeError::new(name, message));
    }
    let mut recipe = Recipe { from: String::new(), from_line: 0, steps: Vec::new() };
    let mut variables = BTreeMap::new();
    for (line, instruction) in instructions(text, name)? {
        let error = |message: String| RecipeError::new(format_args!("{name}:{line}"), message);
        let (word, rest) = instruction.split_once(char::is_whitespace).unwrap_or((&instruction, ""));
        let (word, rest) = (word.to_ascii_uppercase(), rest.trim());
        if rest.is_empty() {
            return Err(error(format!("{word} says nothing")));
        }
        if word == "FROM" {
            if recipe.from_line > 0 {
                return Err(error("a second FROM: one stage is all there is".to_string()));
            }
            if rest.contains(char::is_whitespace) || rest.starts_with("--") {
                return Err(error(format!("FROM {rest}: one template, or the path of an image, is all it takes")));
            }
            (recipe.from, recipe.from_line) = (rest.to_string(), line);
            continue;
        }
        if recipe.from_line == 0 {
            return Err(error(format!("{word} stands before FROM")));
        }
        let what = instruction_of(&word, rest, &variables).map_err(error)?;
        if let Instruction::Env(pairs) = &what {
            variables.extend(pairs.iter().cloned());
        }
        recipe.steps.push(Step { line, text: instruction.clone(), what });
        if recipe.steps.len() > MAX_STEPS {
            return Err(error(format!("there are more than {MAX_STEPS} instructions")));
        }
    }
    if recipe.from_line == 0 {
        return Err(RecipeError::new(name, "there is no FROM"));
    }
    Ok(recipe)
}

/// Instructions with the lines on which they begin; continued lines are joined, comments left out.
fn instructions(text: &str, name: &str) -> Result<Vec<(usize, String)>, RecipeError> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (at, line) in text.lines().enumerate() {
        let (at, trimmed) = (at + 1, line.trim());
        if let Some(rest) = trimmed.strip_prefix('#') {
            let directive = rest.trim().to_ascii_lowercase();
            if at == 1 && directive.starts_with("escape=") && directive != "escape=\\" {
                let message = format!("# {directive}: the escape is \\ and no other");
                return Err(RecipeError::new(format_args!("{name}:{at}"), message));
            }
            continue;
        }
        if trimmed.is_empty() {
            continue;
        }
        let (part, continued) = match trimmed.strip_suffix('\\') {
            Some(part) => (part, true),
            None => (trimmed, false),
        };
        let (begin, whole) = open.get_or_insert((at, String::new()));
        whole.push_str(part);
        if whole.len() > MAX_INSTRUCTION {
            let message = format!("an instruction of more than {MAX_INSTRUCTION} octets");
            return Err(RecipeError::new(format_args!("{name}:{begin}"), message));
        }
        if !continued {
            found.extend(open.take());
        }
    }
    found.extend(open);
    Ok(found)
}

fn instruction_of(word: &str, rest: &str, variables: &BTreeMap<String, String>) -> Result<Instruction, String> {
    let expanded = |text: &str| expand(text, variables);
    Ok(match word {
        "RUN" => {
            if rest.starts_with("--") {
                return Err(format!("RUN takes no option: {}", rest.split(' ').next().unwrap_or(rest)));
            }
            Instruction::Run(command(word, rest)?)
        }
        "CMD" => Instruction::Cmd(command(word, rest)?),
        "ENTRYPOINT" => Instruction::Entrypoint(command(word, rest)?),
        "READY" => Instruction::Ready(rest.to_string()),
        "ENV" => Instruction::Env(env(rest, variables)?),
        "WORKDIR" => Instruction::WorkDir(expanded(&unquoted(rest)?)?),
        "USER" => {
            let user = expanded(rest)?;
            if user.contains(char::is_whitespace) {
                return Err(format!("USER {user} is no USER[:GROUP]"));
            }
            Instruction::User(user)
        }
        "COPY" => copy(rest, variables)?,
        "ADD" | "ARG" | "EXPOSE" | "HEALTHCHECK" | "LABEL" | "MAINTAINER" | "ONBUILD" | "SHELL" | "STOPSIGNAL"
        | "VOLUME" => return Err(format!("{word} is an instruction that templates are not built by")),
        _ => {
            return Err(format!(
                "{word} is no instruction: known are FROM RUN COPY ENV WORKDIR USER CMD ENTRYPOINT READY"
            ));
        }
    })
}

/// `["a", "b"]`, or a line for the shell.
fn command(word: &str, rest: &str) -> Result<Vec<String>, String> {
    if rest.contains("<<") && word == "RUN" && heredoc(rest) {
        return Err("RUN with a here-document: write it to a file and COPY that".to_string());
    }
    if rest.starts_with('[')
        && let Some(words) = list(rest)?
    {
        return Ok(words);
    }
    Ok(vec!["/bin/sh".to_string(), "-c".to_string(), rest.to_string()])
}

/// `<<WORD` as Dockerfiles have it, at the begin of a command.
fn heredoc(rest: &str) -> bool {
    rest.strip_prefix("<<")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '-' | '"' | '\'' | '_')))
}

/// A list of strings as JSON has it; `None` where it is none, and a shell may know what to do with it.
fn list(text: &str) -> Result<Option<Vec<String>>, String> {
    match serde_json::from_str::<Vec<String>>(text) {
        Ok(words) if words.first().is_none_or(String::is_empty) => Err(format!("{text} names no program")),
        Ok(words) if words.iter().any(|word| word.contains('\0')) => Err(format!("{text} has an octet that is 0")),
        Ok(words) => Ok(Some(words)),
        Err(_) => Ok(None),
    }
}

fn env(rest: &str, variables: &BTreeMap<String, String>) -> Result<Vec<(String, String)>, String> {
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !name.as_bytes()[0].is_ascii_digit()
    };
    let mut pairs = Vec::new();
    let first = rest.split(char::is_whitespace).next().unwrap_or_default();
    if !first.contains('=') {
        // The old form: one name and all that follows.
        let (name, value) = rest.split_once(char::is_whitespace).ok_or(format!("ENV {rest} has no value"))?;
        pairs.push((name.to_string(), expand(value.trim(), variables)?));
    } else {
        for word in words(rest)? {
            let (name, value) = word.split_once('=').ok_or(format!("ENV: {word} is not NAME=value"))?;
            pairs.push((name.to_string(), expand(value, variables)?));
        }
    }
    match pairs.iter().find(|(name, value)| !is_name(name) || value.contains('\0')) {
        Some((name, _)) => Err(format!("ENV: {name:?} is no name of a variable, or its value has an octet that is 0")),
        None => Ok(pairs),
    }
}

fn copy(rest: &str, variables: &BTreeMap<String, String>) -> Result<Instruction, String> {
    let (mut owner, mut rest) = (None, rest);
    while rest.starts_with("--") {
        let (option, behind) = rest.split_once(char::is_whitespace).ok_or(format!("COPY {rest} names nothing"))?;
        match option.split_once('=') {
            Some(("--chown", value)) if !value.is_empty() => owner = Some(expand(value, variables)?),
            _ => return Err(format!("COPY takes no option but --chown=USER[:GROUP]: {option}")),
        }
        rest = behind.trim_start();
    }
    let given = if rest.starts_with('[') { list(rest)? } else { None };
    let mut paths = match given {
        Some(paths) => paths,
        None => words(rest)?,
    };
    for path in &mut paths {
        *path = expand(path, variables)?;
    }
    let target =
        paths.pop().filter(|_| !paths.is_empty()).ok_or(format!("COPY {rest}: it takes sources and a target"))?;
    for source in &paths {
        if source.contains(['*', '?', '[']) {
            return Err(format!("COPY {source}: patterns are not known, name files or a directory"));
        }
        if source.starts_with("<<") {
            return Err(format!("COPY {source}: here-documents are not known"));
        }
        if source.split('/').any(|part| part == "..") {
            return Err(format!("COPY {source} leaves the directory that is built from"));
        }
    }
    if target.split('/').any(|part| part == "..") {
        return Err(format!("COPY: the target {target} has .. in it"));
    }
    Ok(Instruction::Copy { sources: paths, target, owner })
}

fn unquoted(text: &str) -> Result<String, String> {
    let mut all = words(text)?;
    match (all.pop(), all.is_empty()) {
        (Some(word), true) => Ok(word),
        // As Docker does: a path with spaces needs no quotes here.
        _ => Ok(text.to_string()),
    }
}

/// Words of a line, with quotes and escapes. A `$` that is quoted by `'` or escaped stays one: `expand` sees `\$`.
fn words(text: &str) -> Result<Vec<String>, String> {
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

/// Puts values of variables in place of `$NAME` and `${NAME}`; one that is not set is nothing.
fn expand(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['$', '\\']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(behind) = rest.strip_prefix("\\$") {
            out.push('$');
            rest = behind;
            continue;
        }
        if let Some(behind) = rest.strip_prefix('\\') {
            out.push('\\');
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
            out.push('$');
            rest = behind;
            continue;
        }
        if name.is_empty() || !name.chars().all(is_inner) {
            return Err(format!("${{{name}}}: no more than a name is known in it"));
        }
        out.push_str(variables.get(name).map_or("", String::as_str));
        if out.len() > MAX_INSTRUCTION {
            return Err(format!("with its variables it has more than {MAX_INSTRUCTION} octets"));
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<Instruction> {
        parse(text, "D").unwrap().steps.into_iter().map(|step| step.what).collect()
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_recipe_is_read() {
        let text = "# syntax=docker/dockerfile:1\nfrom base\n\nRUN a \\\n  # between\n  && b\nRUN [\"x\", \"y z\"]\n\
                    ENV A=1 B=\"two words\" C=$A.${A} D='$A' E=\\$A\nENV OLD a b\nWORKDIR /srv/$A\nUSER me:us\n\
                    COPY --chown=1:2 a b/ /to/\nCOPY [\"with space\", \"/x\"]\nCMD [\"serve\"]\nENTRYPOINT e\nREADY test -e /x\n";
        let recipe = parse(text, "D").unwrap();
        assert_eq!((recipe.from.as_str(), recipe.from_line), ("base", 2));
        assert_eq!((recipe.steps[0].line, recipe.steps[0].text.as_str()), (4, "RUN a && b"));
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(
            steps(text),
            [
                Instruction::Run(strings(&["/bin/sh", "-c", "a && b"])),
                Instruction::Run(strings(&["x", "y z"])),
                // The variables of one ENV are those before it.
                Instruction::Env(vec![
                    pair("A", "1"),
                    pair("B", "two words"),
                    pair("C", "."),
                    pair("D", "$A"),
                    pair("E", "$A")
                ]),
                Instruction::Env(vec![pair("OLD", "a b")]),
                Instruction::WorkDir("/srv/1".to_string()),
                Instruction::User("me:us".to_string()),
                Instruction::Copy {
                    sources: strings(&["a", "b/"]),
                    target: "/to/".to_string(),
                    owner: Some("1:2".to_string())
                },
                Instruction::Copy { sources: strings(&["with space"]), target: "/x".to_string(), owner: None },
                Instruction::Cmd(strings(&["serve"])),
                Instruction::Entrypoint(strings(&["/bin/sh", "-c", "e"])),
                Instruction::Ready("test -e /x".to_string()),
            ]
        );
    }

    #[test]
    fn what_is_not_known_is_an_error_that_names_its_line() {
        for (text, line, part) in [
            ("", 0, "no FROM"),
            ("RUN x", 1, "RUN stands before FROM"),
            ("FROM a\nFROM b", 2, "a second FROM"),
            ("FROM a AS b", 1, "FROM a AS b"),
            ("FROM a\n\nADD x /", 3, "ADD is an instruction that"),
            ("FROM a\nHALLO x", 2, "HALLO is no instruction"),
            ("FROM a\nRUN", 2, "RUN says nothing"),
            ("FROM a\nRUN --mount=type=cache x", 2, "RUN takes no option: --mount=type=cache"),
            ("FROM a\nRUN <<EOF\nx\nEOF", 2, "here-document"),
            ("FROM a\nCOPY x", 2, "sources and a target"),
            ("FROM a\nCOPY --from=b x /", 2, "--from=b"),
            ("FROM a\nCOPY ../x /", 2, "../x leaves the directory"),
            ("FROM a\nCOPY *.py /", 2, "*.py: patterns"),
            ("FROM a\nCOPY \"x /", 2, "is not closed"),
            ("FROM a\nENV 1A=2", 2, "\"1A\" is no name"),
            ("FROM a\nENV A", 2, "ENV A has no value"),
            ("FROM a\nWORKDIR ${A:-b}", 2, "${A:-b}"),
            ("FROM a\nUSER a b", 2, "USER a b"),
            ("FROM a\nCMD []", 2, "[] names no program"),
            ("# escape=`\nFROM a", 1, "the escape is"),
        ] {
            let error = parse(text, "D").unwrap_err();
            let place = if line == 0 { "D".to_string() } else { format!("D:{line}") };
            assert_eq!(error.place, place, "{text}: {error}");
            assert!(error.message.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_too_much_is_named_with_its_limit() {
        let many = format!("FROM a\n{}", "RUN x\n".repeat(MAX_STEPS + 1));
        assert!(parse(&many, "D").unwrap_err().message.contains("more than 200"));
        let long = format!("FROM a\nRUN {}", "x".repeat(MAX_INSTRUCTION));
        assert!(parse(&long, "D").unwrap_err().message.contains("32768"));
        assert!(parse(&"#".repeat(MAX_RECIPE + 1), "D").unwrap_err().message.contains("1048576"));
        // Variables that are made of each other do not grow without end.
        let text = (0..40).fold("FROM a\nENV A=0123456789\n".to_string(), |text, _| text + "ENV A=$A$A$A$A\n");
        assert!(parse(&text, "D").unwrap_err().message.contains("32768"));
    }
}
