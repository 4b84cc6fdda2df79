//! From a file, and what a core sets, to a checked configuration.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use zeroize::Zeroizing;

use super::{Buffer, Config, Overlay, Sender};
use crate::node::config::{ConfigError, Place, secret_needs_mode};
use crate::sentinel::secret::Secret;

/// More than this is no configuration file.
const MAX_FILE: u64 = 4 * 1024 * 1024;

impl Overlay {
    /// Reads what a core gave.
    pub fn parse(text: &str) -> Result<Self, String> {
        let place = Place { text, path: Path::new("the core's configuration") };
        toml::from_str(text).map_err(|e| place.of_error(&e).to_string())
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |message: String| ConfigError { file: path.to_path_buf(), line: None, key: None, message };
        let meta = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?;
        if meta.len() > MAX_FILE {
            return Err(unreadable(format!("{} octets are over the limit of {MAX_FILE}", meta.len())));
        }
        // It may hold secrets.
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?);
        let config = Self::parse(&text, path)?;
        config.check_mode(path, "")?;
        Ok(config)
    }

    /// A file with a secret in it is for its owner only. `prefix` goes before the key that an error names.
    pub(super) fn check_mode(&self, path: &Path, prefix: &str) -> Result<(), ConfigError> {
        let Some(key) = self.plain_secret() else { return Ok(()) };
        secret_needs_mode(path, &format!("{prefix}{key}"))
    }

    /// Checks a text; `path` is only named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let place = Place { text, path };
        let config: Self = toml::from_str(text).map_err(|e| place.of_error(&e))?;
        config.validate().map_err(|(key, message)| place.of_key(&key, message))?;
        Ok(config)
    }

    /// With what the core sets in the place of what the file says. All rules hold for the result.
    pub fn overlaid(mut self, overlay: &Overlay) -> Result<Self, String> {
        if let Some(buffer) = &overlay.buffer {
            self.buffer = Buffer { mode: self.buffer.mode, ..buffer.clone() };
        }
        if let Some(sender) = &overlay.sender {
            self.sender = Sender { mode: self.sender.mode, ..sender.clone() };
        }
        if let Some(log) = &overlay.log {
            // Where lines go is for the file alone to say.
            self.log.level = log.level;
            self.log.format = log.format;
        }
        if let Some(rules) = &overlay.rule {
            self.rule = rules.clone();
        }
        self.validate().map_err(|(key, message)| format!("the core's configuration: {key}: {message}"))?;
        Ok(self)
    }

    /// The key of a secret that stands in the file itself.
    fn plain_secret(&self) -> Option<String> {
        let mut secrets = vec![("core.token".to_string(), &self.core.token)];
        for target in &self.target {
            secrets.push(("target.password".to_string(), &target.password));
            secrets.push(("target.token".to_string(), &target.token));
        }
        let plain = |text: &str| !text.is_empty() && !text.starts_with("${") && !text.starts_with("file:");
        secrets.into_iter().find(|(_, given)| plain(given.reveal())).map(|(key, _)| key)
    }
}

/// Gets a secret from where the text says: itself, `${NAME}`, `file:/path`. The error holds no part of it.
pub fn secret(key: &str, given: &Secret) -> Result<Secret, String> {
    let text = given.reveal();
    let secret = if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')) {
        Secret::new(std::env::var(name).map_err(|_| format!("{key}: the environment has no {name}"))?)
    } else if let Some(path) = text.strip_prefix("file:") {
        let meta = std::fs::metadata(path).map_err(|e| format!("{key}: {path}: {e}"))?;
        if !meta.is_file() || meta.mode() & 0o077 != 0 || meta.len() > 64 * 1024 {
            return Err(format!("{key}: {path} must be a file with mode 0600 and at most 65536 octets"));
        }
        let mut text = std::fs::read_to_string(path).map_err(|e| format!("{key}: {path}: {e}"))?;
        let end = text.trim_end().len();
        text.truncate(end);
        Secret::new(text)
    } else {
        Secret::new(text.to_string())
    };
    if secret.reveal().chars().any(|c| c.is_control()) {
        return Err(format!("{key}: a secret may not hold control characters"));
    }
    Ok(secret)
}
