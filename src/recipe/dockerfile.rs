//! A recipe: the instructions of a Dockerfile that templates have a use for. What is not among them is an error that names its
//! line; nothing is passed over.
//!
//! Variables stay as they are written: what stands for them is known once the base is (`Instruction::expanded`).

use super::RecipeError;
use super::words::{self, Total, unquoted, words};

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
    /// What is to be done; with variables as they are written, and `\$` for a `$` that is none's.
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
    let all = instructions(text, name)?;
    // FROM is none that does something.
    let count = all.len().saturating_sub(1);
    if let Some((line, _)) = all.get(MAX_STEPS + 1) {
        let message = format!("{count} instructions are over the limit of {MAX_STEPS}");
        return Err(RecipeError::new(format_args!("{name}:{line}"), message));
    }
    for (line, instruction) in all {
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
                let message =
                    format!("FROM {rest}: one template, or the path of an image, is all it takes: leave the rest out");
                return Err(error(message));
            }
            (recipe.from, recipe.from_line) = (rest.to_string(), line);
            continue;
        }
        if recipe.from_line == 0 {
            return Err(error(format!("{word} stands before FROM")));
        }
        let what = instruction_of(&word, rest).map_err(error)?;
        recipe.steps.push(Step { line, text: instruction.clone(), what });
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
        let (_, whole) = open.get_or_insert((at, String::new()));
        whole.push_str(part);
        if !continued {
            found.extend(open.take());
        }
    }
    found.extend(open);
    match found.iter().find(|(_, whole)| whole.len() > MAX_INSTRUCTION) {
        Some((begin, whole)) => {
            let message = format!("an instruction of {} octets is over the limit of {MAX_INSTRUCTION}", whole.len());
            Err(RecipeError::new(format_args!("{name}:{begin}"), message))
        }
        None => Ok(found),
    }
}

impl Instruction {
    /// With values in place of variables.
    ///
    /// # Errors
    /// What it becomes is nothing that can be done, or too much.
    pub fn expanded<'a>(&self, value: &dyn Fn(&str) -> Option<&'a str>) -> Result<Self, String> {
        let mut total = Total::new(MAX_INSTRUCTION);
        let mut of = |text: &String| words::expand(text, value, &mut total);
        let named = |what: &str, text: &str, expanded: String| match expanded.is_empty() {
            true => Err(format!("{what} {text} is nothing: its variables have no value")),
            false => Ok(expanded),
        };
        let what = match self {
            Self::Env(pairs) => {
                let pairs = pairs.iter().map(|(name, text)| Ok((name.clone(), of(text)?)));
                Self::Env(pairs.collect::<Result<_, String>>()?)
            }
            Self::WorkDir(path) => Self::WorkDir(named("WORKDIR", path, of(path)?)?),
            Self::User(user) => Self::User(named("USER", user, of(user)?)?),
            Self::Copy { sources, target, owner } => {
                let mut path = |text: &String| named("COPY:", text, of(text)?);
                Self::Copy {
                    sources: sources.iter().map(&mut path).collect::<Result<_, String>>()?,
                    target: path(target)?,
                    owner: owner.as_ref().map(path).transpose()?,
                }
            }
            Self::Run(_) | Self::Cmd(_) | Self::Entrypoint(_) | Self::Ready(_) => self.clone(),
        };
        what.check()?;
        Ok(what)
    }

    /// Rules that hold with variables and without.
    fn check(&self) -> Result<(), String> {
        match self {
            Self::User(user) if user.contains(char::is_whitespace) => Err(format!("USER {user} is no USER[:GROUP]")),
            Self::Copy { sources, target, .. } => check_copy(sources, target),
            _ => Ok(()),
        }
    }
}

fn instruction_of(word: &str, rest: &str) -> Result<Instruction, String> {
    let what = match word {
        "RUN" => {
            if rest.starts_with("--") {
                let option = rest.split(' ').next().unwrap_or(rest);
                return Err(format!("RUN takes no option: leave {option} out"));
            }
            Instruction::Run(command(word, rest)?)
        }
        "CMD" => Instruction::Cmd(command(word, rest)?),
        "ENTRYPOINT" => Instruction::Entrypoint(command(word, rest)?),
        "READY" => Instruction::Ready(rest.to_string()),
        "ENV" => Instruction::Env(env(rest)?),
        "WORKDIR" => Instruction::WorkDir(unquoted(rest)?),
        "USER" => Instruction::User(rest.to_string()),
        "COPY" => copy(rest)?,
        _ => return Err(refusal(word)),
    };
    what.check()?;
    match &what {
        Instruction::Env(pairs) => pairs.iter().try_for_each(|(_, text)| words::check(text))?,
        Instruction::WorkDir(text) | Instruction::User(text) => words::check(text)?,
        Instruction::Copy { sources, target, owner } => {
            sources.iter().chain([target]).chain(owner).try_for_each(|text| words::check(text))?;
        }
        _ => {}
    }
    Ok(what)
}

/// What is wrong with a word that is none of the instructions, and the way out.
fn refusal(word: &str) -> String {
    let instead = match word {
        "ADD" => "use COPY, and RUN to unpack or fetch",
        "ARG" => "use ENV",
        "EXPOSE" => "leave it out: ports need no word of the template's",
        "HEALTHCHECK" => "leave it out, or say by READY when the start command is ready",
        "LABEL" | "MAINTAINER" => "leave it out, or use --description",
        "ONBUILD" => "leave it out, and write what it has into the recipes that stand on this one",
        "SHELL" => "leave it out, and name the shell: RUN [\"/bin/bash\", \"-c\", \"…\"]",
        "STOPSIGNAL" | "VOLUME" => "leave it out",
        _ => return format!("{word} is no instruction: known are FROM RUN COPY ENV WORKDIR USER CMD ENTRYPOINT READY"),
    };
    format!("{word} is an instruction that templates are not built by: {instead}")
}

/// `["a", "b"]`, or a line for the shell. Of what is no step, `[]` takes back what there was.
fn command(word: &str, rest: &str) -> Result<Vec<String>, String> {
    if rest.contains("<<") && word == "RUN" && heredoc(rest) {
        return Err("RUN with a here-document: write it to a file and COPY that".to_string());
    }
    let none = word != "RUN" && serde_json::from_str::<[String; 0]>(rest).is_ok();
    if none {
        return Ok(Vec::new());
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

fn env(rest: &str) -> Result<Vec<(String, String)>, String> {
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
        pairs.push((name.to_string(), value.trim().to_string()));
    } else {
        for word in words(rest)? {
            let (name, value) = word.split_once('=').ok_or(format!("ENV: {word} is not NAME=value"))?;
            pairs.push((name.to_string(), value.to_string()));
        }
    }
    match pairs.iter().find(|(name, value)| !is_name(name) || value.contains('\0')) {
        Some((name, _)) => Err(format!("ENV: {name:?} is no name of a variable, or its value has an octet that is 0")),
        None => Ok(pairs),
    }
}

fn copy(rest: &str) -> Result<Instruction, String> {
    let (mut owner, mut rest) = (None, rest);
    while rest.starts_with("--") {
        let (option, behind) = rest.split_once(char::is_whitespace).ok_or(format!("COPY {rest} names nothing"))?;
        match option.split_once('=') {
            Some(("--chown", value)) if !value.is_empty() => owner = Some(value.to_string()),
            _ => return Err(format!("COPY takes no option but --chown=USER[:GROUP]: leave {option} out")),
        }
        rest = behind.trim_start();
    }
    let given = if rest.starts_with('[') { list(rest)? } else { None };
    let mut paths = match given {
        Some(paths) => paths,
        None => words(rest)?,
    };
    let target =
        paths.pop().filter(|_| !paths.is_empty()).ok_or(format!("COPY {rest}: it takes sources and a target"))?;
    Ok(Instruction::Copy { sources: paths, target, owner })
}

fn check_copy(sources: &[String], target: &str) -> Result<(), String> {
    for source in sources {
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
    Ok(())
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
                Instruction::Env(vec![
                    pair("A", "1"),
                    pair("B", "two words"),
                    pair("C", "$A.${A}"),
                    pair("D", "\\$A"),
                    pair("E", "\\$A")
                ]),
                Instruction::Env(vec![pair("OLD", "a b")]),
                Instruction::WorkDir("/srv/$A".to_string()),
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
            (
                "FROM a AS b",
                1,
                "FROM a AS b: one template, or the path of an image, is all it takes: leave the rest out",
            ),
            ("FROM a\n\nADD x /", 3, "ADD is an instruction that templates are not built by: use COPY"),
            ("FROM a\nARG x", 2, "ARG is an instruction that templates are not built by: use ENV"),
            ("FROM a\nLABEL x=y", 2, "LABEL is an instruction that templates are not built by: leave it out"),
            ("FROM a\nexpose 80", 2, "EXPOSE is an instruction that templates are not built by: leave it out"),
            ("FROM a\nHALLO x", 2, "HALLO is no instruction"),
            ("FROM a\nRUN", 2, "RUN says nothing"),
            ("FROM a\nRUN --mount=type=cache x", 2, "RUN takes no option: leave --mount=type=cache out"),
            ("FROM a\nRUN <<EOF\nx\nEOF", 2, "here-document"),
            ("FROM a\nCOPY x", 2, "sources and a target"),
            ("FROM a\nCOPY --from=b x /", 2, "leave --from=b out"),
            ("FROM a\nCOPY ../x /", 2, "../x leaves the directory"),
            ("FROM a\nCOPY *.py /", 2, "*.py: patterns"),
            ("FROM a\nCOPY \"x /", 2, "is not closed"),
            ("FROM a\nENV 1A=2", 2, "\"1A\" is no name"),
            ("FROM a\nENV A", 2, "ENV A has no value"),
            ("FROM a\nWORKDIR ${A:-b}", 2, "${A:-b}"),
            ("FROM a\nUSER a b", 2, "USER a b"),
            ("FROM a\nRUN []", 2, "[] names no program"),
            ("FROM a\nCMD [\"\"]", 2, "names no program"),
            ("FROM a\nCOPY a$ $A ${A /x", 2, "${A is not closed"),
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
        let error = parse(&many, "D").unwrap_err();
        assert_eq!(error.to_string(), "D:202: 201 instructions are over the limit of 200");
        let long = format!("FROM a\nRUN {}", "x".repeat(MAX_INSTRUCTION));
        let error = parse(&long, "D").unwrap_err();
        assert_eq!(error.to_string(), "D:2: an instruction of 32772 octets is over the limit of 32768");
        assert!(parse(&"#".repeat(MAX_RECIPE + 1), "D").unwrap_err().message.contains("1048576"));
    }

    #[test]
    fn values_stand_for_variables_and_what_they_make_is_checked_again() {
        let value = |name: &str| match name {
            "A" => Some("1"),
            "UP" => Some("../x"),
            "TWO" => Some("a b"),
            "ALL" => Some("*"),
            _ => None,
        };
        let expanded = |line: &str| steps(&format!("FROM a\n{line}")).remove(0).expanded(&value);
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(
            expanded("ENV A=2 C=$A.${A} D='$A' E=\\$A F=\"$A$\" G=$NONE"),
            Ok(Instruction::Env(vec![
                pair("A", "2"),
                // The variables of one ENV are those before it.
                pair("C", "1.1"),
                pair("D", "$A"),
                pair("E", "$A"),
                pair("F", "1$"),
                pair("G", "")
            ]))
        );
        assert_eq!(expanded("WORKDIR \"/srv/$A\""), Ok(Instruction::WorkDir("/srv/1".to_string())));
        assert_eq!(
            expanded("COPY --chown=$A s$A /$A/"),
            Ok(Instruction::Copy {
                sources: strings(&["s1"]),
                target: "/1/".to_string(),
                owner: Some("1".to_string())
            })
        );
        // A command's are its shell's.
        assert_eq!(expanded("RUN echo $A"), Ok(Instruction::Run(strings(&["/bin/sh", "-c", "echo $A"]))));
        for (line, part) in [
            ("COPY $UP /", "leaves the directory"),
            ("COPY x /$UP", "has .. in it"),
            ("COPY $ALL /", "patterns"),
            ("COPY $NONE /", "COPY: $NONE is nothing: its variables have no value"),
            ("USER $TWO", "USER a b"),
            ("USER $NONE", "USER $NONE is nothing"),
            ("WORKDIR $NONE", "WORKDIR $NONE is nothing"),
        ] {
            let error = expanded(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
        let long = "x".repeat(MAX_INSTRUCTION / 2);
        let many = steps("FROM a\nENV A=$L B=$L C=1").remove(0);
        let error = many.expanded(&|_| Some(long.as_str())).unwrap_err();
        assert_eq!(error, "with its variables it has 32769 octets, the limit is 32768");
    }

    #[test]
    fn an_empty_list_takes_a_start_command_back() {
        let none = steps("FROM a\nCMD []\nENTRYPOINT [ ]");
        assert_eq!(none, [Instruction::Cmd(Vec::new()), Instruction::Entrypoint(Vec::new())]);
    }
}
