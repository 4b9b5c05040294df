//! Where the API is and what opens it: options, then the environment, then the session of `wrenn login`, then what `wrenn up` left in
//! `cli.json`, then the control plane that is installed on this machine.

use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use crate::client::Credential;
use crate::failure::{Doing as _, Failure};
use crate::platform::control_plane;
use crate::platform::service::Settings;
use crate::session::Session;

pub const DIR: &str = "/var/lib/wrenn";

/// Options that every command takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The API, for example http://127.0.0.1:8000.
    #[arg(long, global = true, env = "WRENN_API_URL", value_name = "URL", help_heading = "Connection")]
    pub api_url: Option<String>,
    /// Better given by the environment: options can be seen in process lists.
    #[arg(
        long,
        global = true,
        env = "WRENN_API_KEY",
        value_name = "KEY",
        hide_env_values = true,
        help_heading = "Connection"
    )]
    pub api_key: Option<String>,
    /// An administrator's JWT, for the commands of operators; without one `wrenn-cp` is asked for it.
    #[arg(
        long,
        global = true,
        env = "WRENN_ADMIN_TOKEN",
        value_name = "JWT",
        hide_env_values = true,
        help_heading = "Connection"
    )]
    pub admin_token: Option<String>,
    /// Directory of the platform on this machine [default: /var/lib/wrenn].
    #[arg(long, global = true, env = "WRENN_DIR", value_name = "DIR", help_heading = "Connection")]
    pub dir: Option<PathBuf>,
    /// One JSON document on standard output; errors as JSON on standard error.
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
}

/// Without links and `..`, as far as the path exists.
fn real(path: &Path) -> PathBuf {
    match (std::fs::canonicalize(path), path.parent(), path.file_name()) {
        (Ok(real), _, _) => real,
        (Err(_), Some(parent), Some(name)) => real(parent).join(name),
        (Err(_), _, _) => path.components().collect(),
    }
}

impl Options {
    /// Always absolute: children run in other working directories.
    pub fn dir(&self) -> Result<PathBuf, Failure> {
        let dir = self.dir.clone().unwrap_or_else(|| DIR.into());
        if dir.as_os_str().is_empty() {
            return Err(Failure::usage("WRENN_DIR is empty: name a directory, or leave it unset for /var/lib/wrenn"));
        }
        let dir = std::path::absolute(&dir).doing(|| format!("read the path {}", dir.display()))?;
        // The kernel names mounts and open files by their real paths, and what a platform holds is counted by them.
        Ok(real(&dir))
    }

    /// Whether the address is that of this machine's platform: of the directory, or installed.
    pub fn is_local(&self, url: &Url) -> Result<bool, Failure> {
        let own = match self.installed()? {
            Some(settings) => control_plane::url(&settings).ok(),
            None => Kept::read(&self.dir()?)?.and_then(|kept| parse_url(&kept.api_url).ok()),
        };
        Ok(own.is_some_and(|own| own.origin() == url.origin()))
    }

    /// The settings of the installed control plane, where no directory is named and none of `wrenn up` goes before it.
    pub fn installed(&self) -> Result<Option<Settings>, Failure> {
        if self.dir.is_some() || Kept::place(&self.dir()?).exists() {
            return Ok(None);
        }
        Ok(control_plane::installed())
    }

    pub fn api_url(&self) -> Result<Url, Failure> {
        if let (None | Some(""), Some(settings)) = (self.api_url.as_deref(), self.installed()?) {
            return control_plane::url(&settings);
        }
        let text = match self.api_url.clone().filter(|url| !url.is_empty()) {
            Some(url) => url,
            None => match (Session::kept()?, Kept::read(&self.dir()?)) {
                (Some(session), _) => session.api_url,
                (None, Ok(Some(kept))) => kept.api_url,
                (None, Err(error)) => return Err(error),
                (None, Ok(None)) => {
                    return Err(Failure::new(format!(
                        "no API to talk to: give --api-url or WRENN_API_URL, or start a platform on this machine with `wrenn up` \
                         (there is no {})",
                        Kept::place(&self.dir()?).display()
                    )));
                }
            },
        };
        parse_url(&text)
    }

    /// The token of a session with the API that is talked to.
    pub fn session_token(&self) -> Result<Option<String>, Failure> {
        let url = self.api_url()?;
        let session =
            Session::kept()?.filter(|kept| parse_url(&kept.api_url).is_ok_and(|kept| kept.origin() == url.origin()));
        session.map(|session| checked_header(session.token, "the session's token")).transpose()
    }

    /// What opens the team's things: a key, or a session.
    pub fn of_team(&self) -> Result<Credential, Failure> {
        if let Some(key) = self.api_key.clone().filter(|key| !key.is_empty()) {
            return checked_header(key, "WRENN_API_KEY").map(Credential::ApiKey);
        }
        if let Some(token) = self.session_token()? {
            return Ok(Credential::Bearer(token));
        }
        match Kept::read(&self.dir()?)? {
            Some(kept) => checked_header(kept.api_key, "the key in cli.json").map(Credential::ApiKey),
            None => Err(Failure::new("no API key: give WRENN_API_KEY (or --api-key), or `wrenn login`")),
        }
    }
}

fn parse_url(text: &str) -> Result<Url, Failure> {
    let url =
        Url::parse(text).map_err(|error| Failure::usage(format!("the API's URL {text:?} is not a URL: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(Failure::usage(format!(
            "the API's URL {text:?} must begin with http:// or https:// and name a host"
        )));
    }
    Ok(url)
}

/// What goes into a header must be plain text: said here, in words, rather than by the HTTP library.
pub fn checked_header(value: String, name: &str) -> Result<String, Failure> {
    let value = value.trim().to_owned();
    if value.is_empty() || value.len() > 8192 || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::usage(format!("{name} holds characters that no credential has")));
    }
    Ok(value)
}

/// `cli.json`: written by `wrenn up`, 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    pub api_url: String,
    pub api_key: String,
}

impl Kept {
    pub fn place(dir: &Path) -> PathBuf {
        dir.join("cli.json")
    }

    pub fn read(dir: &Path) -> Result<Option<Self>, Failure> {
        let place = Self::place(dir);
        match std::fs::read(&place) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .doing(|| format!("read {} (remove it: `wrenn up` writes it anew)", place.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Err(Failure::new(format!(
                "{} is not readable for this user: run as the user of the platform (root), or give WRENN_API_URL and WRENN_API_KEY",
                place.display()
            ))),
            Err(error) => Err(error).doing(|| format!("read {}", place.display())),
        }
    }

    pub fn write(&self, dir: &Path) -> Result<(), Failure> {
        write_private(&Self::place(dir), &serde_json::to_vec_pretty(self).expect("two strings are JSON"))
    }
}

/// Writes a small file as a whole, for its owner alone, so that it survives a crash in one piece.
pub fn write_private(place: &Path, content: &[u8]) -> Result<(), Failure> {
    use std::io::Write as _;
    let doing = || format!("write {}", place.display());
    let unfinished = place.with_extension("tmp");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)
        .doing(doing)?;
    // An older file of that name may be wider.
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).doing(doing)?;
    file.write_all(content).and_then(|()| file.sync_all()).doing(doing)?;
    std::fs::rename(&unfinished, place).doing(doing)?;
    let folder = place.parent().expect("a file lies in a folder");
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_private_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Kept::read(dir.path()).unwrap().is_none());
        Kept { api_url: "http://127.0.0.1:1".into(), api_key: "wrn_0".into() }.write(dir.path()).unwrap();
        assert_eq!(Kept::read(dir.path()).unwrap().unwrap().api_key, "wrn_0");
        assert_eq!(std::fs::metadata(Kept::place(dir.path())).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(Kept::place(dir.path()), "{").unwrap();
        assert!(Kept::read(dir.path()).unwrap_err().message().contains("cli.json"));
    }

    #[test]
    fn urls_and_keys_are_checked_before_anything_is_sent() {
        assert!(parse_url("localhost:8000").is_err());
        assert!(parse_url("ftp://x").is_err());
        assert!(parse_url("http://127.0.0.1:8000/api").is_ok());
        assert!(checked_header("wrn_1\nX-Evil: 1".into(), "key").is_err());
        assert_eq!(checked_header(" wrn_1\n".into(), "key").unwrap(), "wrn_1");
    }
}
