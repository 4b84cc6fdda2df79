//! What a template is built from, found out: a base, what the base says of programs, and steps on it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::context::Context;
use crate::cli::client::{LOCAL_IO, local};
use crate::recipe::RecipeError;
use crate::recipe::dockerfile::{self, Instruction, MAX_RECIPE, Recipe, Step};
use crate::recipe::ignore::{Ignore, MAX_IGNORE};
use crate::recipe::image::{self, Image, Settings};
use crate::recipe::key::{Key, hex};
use crate::recipe::store::{Store, is_archive};
use crate::storage::languages;
use crate::wire::{Code, Error};

/// PATH of programs where neither image nor template says one: the agent's.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the first steps are done on.
#[derive(Debug)]
pub(super) enum Base {
    /// A template of the node.
    Template(String),
    /// A container image.
    Image(Box<Image>),
    /// A root file system as one archive, and its digest.
    Archive(PathBuf, String),
}

/// All that is built from.
#[derive(Debug)]
pub(super) struct Source {
    pub base: Base,
    pub steps: Vec<Step>,
    /// Where COPY looks.
    pub root: PathBuf,
    /// File of the steps, for errors.
    pub name: String,
    /// Line of FROM in it; 0 where there is none.
    pub from_line: usize,
    /// What COPY leaves out.
    pub ignore: Ignore,
    /// How code is run, where that is said.
    pub languages: Option<String>,
}

/// The error that a client is told.
pub(super) fn to_error(error: RecipeError) -> Error {
    let code = if error.damaged { Code::Corrupt } else { Code::BadArgument };
    Error::new(code, error.to_string())
}

/// The way out where FROM names what is not there.
pub(super) const NOTHING_IS_PULLED: &str = "nothing is pulled: build it first, or put an image beside the recipe";

fn io_error(path: &Path, e: &io::Error) -> Error {
    local(LOCAL_IO, format!("{}: {e}", path.display()))
}

impl Source {
    /// Finds out what is at `path`. `recipe` is the file of steps where that is said.
    pub fn of(path: &Path, recipe: Option<&Path>, reference: Option<&str>) -> Result<Self, Error> {
        let meta = fs::metadata(path).map_err(|e| io_error(path, &e))?;
        if let Some(recipe) = recipe {
            return Self::of_recipe(recipe, path, reference);
        }
        let inner = path.join("Dockerfile");
        if meta.is_dir() && inner.is_file() {
            return Self::of_recipe(&inner, path, reference);
        }
        if meta.is_dir() || is_archive(path) || is_compressed(path) {
            let base = base_of(path, reference)?;
            let (root, name) = (path.to_path_buf(), path.display().to_string());
            return Ok(Self {
                base,
                steps: Vec::new(),
                root,
                name,
                from_line: 0,
                ignore: Ignore::default(),
                languages: None,
            });
        }
        let root = path.parent().filter(|root| !root.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Self::of_recipe(path, root, reference)
    }

    fn of_recipe(file: &Path, root: &Path, reference: Option<&str>) -> Result<Self, Error> {
        let name = file.display().to_string();
        let mut octets = Vec::new();
        let opened = File::open(file).map_err(|e| io_error(file, &e))?;
        opened.take(MAX_RECIPE as u64 + 1).read_to_end(&mut octets).map_err(|e| io_error(file, &e))?;
        let text = String::from_utf8(octets).map_err(|_| to_error(RecipeError::new(&name, "is not UTF-8")))?;
        let Recipe { from, from_line, steps } = dockerfile::parse(&text, &name).map_err(to_error)?;
        let path = root.join(&from);
        let base = match from.contains('/') || path.exists() {
            true if path.exists() => base_of(&path, reference)?,
            true => {
                let message = format!(
                    "FROM {from}: there is no such image here, and templates have no / in their names; {NOTHING_IS_PULLED}"
                );
                return Err(to_error(RecipeError::new(format_args!("{name}:{from_line}"), message)));
            }
            false => Base::Template(from),
        };
        let ignore = ignored(file, root)?;
        Ok(Self { base, steps, root: root.to_path_buf(), name, from_line, ignore, languages: None })
    }

    /// What the base says of programs.
    pub fn settings(&self) -> Settings {
        match &self.base {
            Base::Image(image) => image.settings.clone(),
            _ => Settings::default(),
        }
    }
}

/// Languages, checked before any work is done for them.
pub(super) fn languages_of(path: &Path) -> Result<String, Error> {
    let mut octets = Vec::new();
    let opened = File::open(path).map_err(|e| io_error(path, &e))?;
    opened.take(languages::MAX_TEXT as u64 + 1).read_to_end(&mut octets).map_err(|e| io_error(path, &e))?;
    let refused = |line: Option<usize>, message: &str| {
        let place = line.map_or(path.display().to_string(), |line| format!("{}:{line}", path.display()));
        to_error(RecipeError::new(place, message))
    };
    let text = String::from_utf8(octets).map_err(|_| refused(None, "is not UTF-8"))?;
    languages::parse(&text).map_err(|error| refused(error.line, &error.message))?;
    Ok(text)
}

/// What is not to be copied: the recipe's own list, or the directory's, as Docker has them.
fn ignored(recipe: &Path, root: &Path) -> Result<Ignore, Error> {
    let mut own = recipe.as_os_str().to_os_string();
    own.push(".dockerignore");
    for path in [PathBuf::from(own), root.join(".dockerignore")] {
        match fs::metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error(&path, &e)),
            Ok(meta) if !meta.is_file() => {
                return Err(to_error(RecipeError::new(path.display(), "is no regular file")));
            }
            Ok(_) => {
                let mut octets = Vec::new();
                let opened = File::open(&path).map_err(|e| io_error(&path, &e))?;
                let read = opened.take(MAX_IGNORE as u64 + 1).read_to_end(&mut octets);
                read.map_err(|e| io_error(&path, &e))?;
                return Ignore::parse(&octets, &path.display().to_string()).map_err(to_error);
            }
        }
    }
    Ok(Ignore::default())
}

fn is_compressed(path: &Path) -> bool {
    let mut begin = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut begin));
    read.is_ok()
        && (begin[..2] == [0x1f, 0x8b]
            || begin == [0x28, 0xb5, 0x2f, 0xfd]
            || begin == *b"\xfd7zX"
            || begin[..3] == *b"BZh")
}

fn base_of(path: &Path, reference: Option<&str>) -> Result<Base, Error> {
    let store = match path.is_dir() {
        true => Store::Directory(path.to_path_buf()),
        false if is_archive(path) => Store::of_archive(path).map_err(|e| io_error(path, &e))?,
        false => return archive(path),
    };
    if path.is_dir() || image::is_image(&store) {
        return Ok(Base::Image(Box::new(image::of_store(store, reference).map_err(to_error)?)));
    }
    archive(path)
}

fn archive(path: &Path) -> Result<Base, Error> {
    Ok(Base::Archive(path.to_path_buf(), digest_of(path).map_err(|e| io_error(path, &e))?))
}

fn digest_of(path: &Path) -> io::Result<String> {
    digest(&mut File::open(path)?)
}

/// The digest of all that can be read.
pub(super) fn digest(from: &mut dyn Read) -> io::Result<String> {
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// What programs of a step have: it grows from step to step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Surroundings {
    pub env: Vec<(String, String)>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub cmd: Vec<String>,
    /// `cmd` is the recipe's, and not the base's.
    pub has_cmd: bool,
    pub entrypoint: Vec<String>,
    pub ready: String,
    /// `ready` is the recipe's, and not the base's.
    pub has_ready: bool,
}

impl Surroundings {
    pub fn set(&mut self, name: &str, value: &str) {
        match self.env.iter_mut().find(|(other, _)| other == name) {
            Some((_, old)) => *old = value.to_string(),
            None => self.env.push((name.to_string(), value.to_string())),
        }
    }

    /// What stands for a variable.
    fn value(&self, name: &str) -> Option<&str> {
        let said = self.env.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
        said.or((name == "PATH").then_some(PATH))
    }

    /// A path from the working directory.
    pub fn path(&self, path: &str) -> String {
        match path.starts_with('/') {
            true => path.to_string(),
            false => format!("{}/{path}", self.workdir.as_deref().unwrap_or("").trim_end_matches('/')),
        }
    }

    /// The start command.
    pub fn start(&self) -> Vec<String> {
        [self.entrypoint.as_slice(), &self.cmd].concat()
    }

    /// Takes a step that changes no file, or what such a step leaves beside its files.
    pub fn take(&mut self, what: &Instruction) {
        match what {
            Instruction::Env(pairs) => pairs.iter().for_each(|(name, value)| self.set(name, value)),
            Instruction::WorkDir(path) => self.workdir = Some(self.path(path)),
            Instruction::User(user) => self.user = Some(user.clone()),
            Instruction::Cmd(words) => {
                (self.cmd, self.has_cmd) = (words.clone(), true);
                self.start_is_another();
            }
            Instruction::Entrypoint(words) => {
                self.entrypoint.clone_from(words);
                // The base's is of the base's entry point.
                if !self.has_cmd {
                    self.cmd.clear();
                }
                self.start_is_another();
            }
            Instruction::Ready(command) => (self.ready, self.has_ready) = (command.clone(), true),
            Instruction::Run(_) | Instruction::Copy { .. } => {}
        }
    }

    /// The base's ready command is of the base's start command.
    fn start_is_another(&mut self) {
        if !self.has_ready {
            self.ready.clear();
        }
    }

    /// All of it that programs see, for a key.
    fn digest_into(&self, key: &Key) -> Key {
        let env: Vec<String> = self.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let parts = [self.workdir.as_deref().unwrap_or("\0"), self.user.as_deref().unwrap_or("\0")];
        key.then(&env.iter().map(String::as_bytes).chain(parts.map(str::as_bytes)).collect::<Vec<_>>())
    }
}

/// What is to be done in the builder, and the key of what is there afterwards.
#[derive(Debug)]
pub(super) struct Task {
    pub kind: TaskKind,
    /// As it is shown.
    pub title: String,
    pub place: String,
    /// What programs of it have.
    pub around: Surroundings,
    pub key: Key,
}

/// What a task does.
#[derive(Debug)]
pub(super) enum TaskKind {
    /// The base is put on the disk.
    Unpack,
    /// A program runs.
    Run(Vec<String>),
    /// Files are sent.
    Copy { context: Context, digest: String, target: String, owner: Option<String> },
    /// A directory is made.
    Directory(String),
}

/// The tasks of a source, and what programs have in the end. `key` is that of what the builder begins with.
pub(super) fn plan(source: &Source, key: Key, around: Surroundings) -> Result<(Vec<Task>, Surroundings, Key), Error> {
    let (mut tasks, mut around, mut key) = (Vec::new(), around, key);
    let mut add = |kind, title: String, place: &str, around: &Surroundings, key: &Key| {
        let (place, around, key) = (place.to_string(), around.clone(), key.clone());
        tasks.push(Task { kind, title, place, around, key });
    };
    match &source.base {
        Base::Template(_) => {}
        Base::Image(image) => {
            let layers: Vec<&[u8]> = image.layers.iter().map(|layer| layer.diff_id.as_bytes()).collect();
            key = key.then(&[b"image"]).then(&layers);
            add(TaskKind::Unpack, format!("unpack {} layers", layers.len()), &source.name, &around, &key);
        }
        Base::Archive(path, digest) => {
            key = key.then(&[b"archive", digest.as_bytes()]);
            add(TaskKind::Unpack, format!("unpack {}", path.display()), &source.name, &around, &key);
        }
    }
    for Step { line, text, what } in &source.steps {
        let place = format!("{}:{line}", source.name);
        let what = what.expanded(&|name| around.value(name));
        let what = what.map_err(|message| to_error(RecipeError::new(&place, message)))?;
        let kind = match &what {
            Instruction::Run(argv) => {
                let argv_octets: Vec<&[u8]> = argv.iter().map(String::as_bytes).collect();
                key = around.digest_into(&key.then(&[b"run"]).then(&argv_octets));
                TaskKind::Run(argv.clone())
            }
            Instruction::Copy { sources, target, owner } => {
                let context = Context::new(&source.root, sources, &source.ignore).map_err(|error| {
                    to_error(RecipeError { place: place.clone(), message: error.to_string(), ..error })
                })?;
                let digest = digest(&mut context.open()).map_err(|e| local(LOCAL_IO, format!("{place}: {e}")))?;
                let target = around.path(target);
                let parts = [
                    target.as_str(),
                    owner.as_deref().unwrap_or(""),
                    &digest,
                    if context.directory { "d" } else { "" },
                ];
                key = key.then(&[b"copy"]).then(&parts.map(str::as_bytes));
                TaskKind::Copy { context, digest, target, owner: owner.clone() }
            }
            Instruction::WorkDir(path) => {
                let path = around.path(path);
                key = around.digest_into(&key.then(&[b"directory", path.as_bytes()]));
                TaskKind::Directory(path)
            }
            other => {
                around.take(other);
                continue;
            }
        };
        add(kind, text.clone(), &place, &around, &key);
        around.take(&what);
    }
    Ok((tasks, around, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(recipe: &str, root: &Path) -> Source {
        let Recipe { steps, from_line, .. } = dockerfile::parse(recipe, "D").unwrap();
        let (base, ignore) = (Base::Template("base".to_string()), Ignore::default());
        Source { base, steps, root: root.to_path_buf(), name: "D".to_string(), from_line, ignore, languages: None }
    }

    fn around(env: &[(&str, &str)]) -> Surroundings {
        let mut around = Surroundings::default();
        env.iter().for_each(|(name, value)| around.set(name, value));
        around
    }

    /// Environment in the end, and keys of the steps.
    fn planned(recipe: &str, base: &[(&str, &str)]) -> Result<(Surroundings, Vec<Key>), Error> {
        let (tasks, around, _) = plan(&source(recipe, &std::env::temp_dir()), Key::new(), around(base))?;
        Ok((around, tasks.into_iter().map(|task| task.key).collect()))
    }

    #[test]
    fn a_variable_of_the_base_is_a_variable_of_the_recipe() {
        let recipe = "FROM base\nENV PATH=/opt/bin:$PATH A=$WHERE\nENV B=$A:$PATH\nRUN x\n";
        let (around, keys) = planned(recipe, &[("PATH", "/bin"), ("WHERE", "here")]).unwrap();
        assert_eq!((around.value("PATH"), around.value("A")), (Some("/opt/bin:/bin"), Some("here")));
        assert_eq!(around.value("B"), Some("here:/opt/bin:/bin"));
        // Nobody says one: it is what programs get.
        let (other, others) = planned(recipe, &[("WHERE", "here")]).unwrap();
        assert_eq!(other.value("PATH"), Some(format!("/opt/bin:{PATH}").as_str()));
        assert_ne!(keys, others);
    }

    #[test]
    fn a_variable_of_the_base_that_changes_is_another_key() {
        let root = std::env::temp_dir().join(format!("warren-source-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("one"), b"one").unwrap();
        for step in ["COPY one /$A/", "WORKDIR /$A", "COPY --chown=$A one /", "ENV B=$A\nRUN x"] {
            let source = source(&format!("FROM base\n{step}\n"), &root);
            let key = |value: &str| plan(&source, Key::new(), around(&[("A", value)])).unwrap().2;
            assert_eq!(key("1"), key("1"), "{step}");
            assert_ne!(key("1"), key("2"), "{step}");
        }
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn what_variables_make_of_each_other_is_bounded_and_errors_name_the_line() {
        let recipe = "FROM base\nENV A=0123456789\n".to_string() + &"ENV A=$A$A$A$A\n".repeat(40);
        let error = planned(&recipe, &[]).unwrap_err();
        assert!(error.message.starts_with("D:8: with its variables it has 40960 octets"), "{error}");
        let error = planned("FROM base\n\nWORKDIR $NONE\n", &[]).unwrap_err();
        assert!(error.is(Code::BadArgument) && error.message.contains("D:3: WORKDIR $NONE is nothing"), "{error}");
    }

    #[test]
    fn the_start_command_is_what_entrypoint_and_cmd_leave_of_it() {
        let start = |recipe: &str| {
            let mut base = around(&[]);
            (base.entrypoint, base.cmd) = (vec!["base".to_string()], vec!["of-base".to_string()]);
            let (_, around, _) =
                plan(&source(&format!("FROM base\n{recipe}"), Path::new("/")), Key::new(), base).unwrap();
            around.start().join(" ")
        };
        assert_eq!(start(""), "base of-base");
        assert_eq!(start("CMD [\"mine\"]\n"), "base mine");
        assert_eq!(start("ENTRYPOINT [\"run\"]\n"), "run");
        assert_eq!(start("CMD [\"mine\"]\nENTRYPOINT [\"run\"]\n"), "run mine");
        assert_eq!(start("ENTRYPOINT [\"run\"]\nCMD [\"mine\"]\n"), "run mine");
        assert_eq!(start("CMD []\n"), "base");
        assert_eq!(start("ENTRYPOINT []\n"), "");
        assert_eq!(start("CMD [\"mine\"]\nENTRYPOINT []\n"), "mine");
        assert_eq!(start("ENTRYPOINT []\nCMD []\n"), "");
    }

    #[test]
    fn the_base_s_ready_command_goes_with_its_start_command() {
        let of = |recipe: &str| {
            let base =
                Surroundings { cmd: vec!["base".to_string()], ready: "base-up".to_string(), ..Surroundings::default() };
            let source = source(&format!("FROM base\n{recipe}"), Path::new("/"));
            let (_, around, _) = plan(&source, Key::new(), base).unwrap();
            (around.start().join(" "), around.ready)
        };
        for (recipe, start, ready) in [
            ("ENV A=1\n", "base", "base-up"),
            ("CMD [\"mine\"]\n", "mine", ""),
            ("ENTRYPOINT [\"mine\"]\n", "mine", ""),
            ("CMD []\n", "", ""),
            ("READY mine-up\n", "base", "mine-up"),
            ("READY mine-up\nCMD [\"mine\"]\n", "mine", "mine-up"),
            ("CMD [\"mine\"]\nREADY mine-up\n", "mine", "mine-up"),
        ] {
            assert_eq!(of(recipe), (start.to_string(), ready.to_string()), "{recipe}");
        }
    }
}
