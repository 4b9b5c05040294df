//! `wrenn files get SANDBOX:PATH [LOCAL]`: what comes is written beside its place, under a name that says which version of which file it is, and
//! renamed when it is whole. So the same command goes on where the one before it stopped, and a file that was changed meanwhile begins anew.

use std::fs::{File as StdFile, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::ProgressBar;
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;

use super::As;
use super::content::{Content, Stopped, Version};
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, bytes_bar, show};
use crate::place::InSandbox;
use crate::printable::escaped;
use api::v1::files::FileEntry;

/// How often a file may change under the reader's hands.
const CHANGES_MAX: u32 = 3;
/// Of directories in each other: a guest could have no end of them.
const DEPTH_MAX: usize = 64;
/// Of files and directories of one call; more of them are for `tar`.
const ENTRIES_MAX: usize = 100_000;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    from: String,
    /// A file, or a directory to put it into [default: here, under its own name].
    #[arg(default_value = ".")]
    to: PathBuf,
    /// A directory with all that is in it; symbolic links and devices are left out.
    #[arg(long, short)]
    recursive: bool,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    tokio::select! {
        done = got(arguments, options, format) => done,
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::new("interrupted; what has come is kept, and the same command goes on with it").exiting(130))
        }
    }
}

async fn got(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let from = InSandbox::parse(&arguments.from)?;
    let entry = remote.stat(&from).await?;
    if is_directory(&entry) && !arguments.recursive {
        return Err(Failure::usage(format!("{:?} is a directory: fetch it with -r", from.path)));
    }
    let to = match arguments.to.is_dir() {
        true => arguments.to.join(checked_name(from.file_name()?)?),
        false => arguments.to.clone(),
    };
    let mut fetch = Fetch { remote: &remote, bar: bytes_bar(format, None), bytes: 0, files: 0, skipped: 0 };
    match is_directory(&entry) {
        true => fetch.directory(from, &to).await?,
        false => fetch.file(&from, &to, &entry).await?,
    }
    fetch.bar.finish_and_clear();
    let Fetch { bytes, files, skipped, .. } = fetch;
    let told = json!({ "from": arguments.from, "to": to, "bytes": bytes, "files": files, "skipped": skipped });
    show(format, &told, |_| String::new())?;
    Ok(ExitCode::SUCCESS)
}

struct Fetch<'a> {
    remote: &'a Remote<'a>,
    bar: ProgressBar,
    bytes: u64,
    files: u64,
    skipped: u64,
}

impl Fetch<'_> {
    async fn directory(&mut self, from: InSandbox, to: &Path) -> Result<(), Failure> {
        let mut waiting = vec![(from, to.to_owned(), 0)];
        let mut seen = 0;
        while let Some((from, to, depth)) = waiting.pop() {
            if depth > DEPTH_MAX {
                return Err(Failure::new(format!("more than {DEPTH_MAX} directories in each other: use tar")));
            }
            std::fs::create_dir_all(&to).doing(|| format!("make {}", to.display()))?;
            let listing = self.remote.list(&from, 1).await?;
            seen += listing.entries.len();
            if seen > ENTRIES_MAX {
                return Err(Failure::new(format!(
                    "{} holds more than can be fetched one by one: pack it by `wrenn sandbox exec {} -- tar c -f /tmp/all.tar DIR`",
                    escaped(&from.path),
                    from.id
                )));
            }
            for entry in listing.entries {
                let (place, local) = (from.join(&entry.name), to.join(checked_name(&entry.name)?));
                match entry.kind.as_str() {
                    "directory" => waiting.push((place, local, depth + 1)),
                    "file" => match self.file(&place, &local, &entry).await {
                        // A device, a socket or a pipe is a file, too, and has no content.
                        Err(failure) if failure.code() == Some("invalid_request") => {
                            self.leave_out(&place, &failure.message())
                        }
                        done => done?,
                    },
                    // A link could lead what comes after it to anywhere on this machine.
                    kind => self.leave_out(&place, kind),
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, place: &InSandbox, why: &str) {
        self.skipped += 1;
        self.bar.suspend(|| eprintln!("wrenn: left out: {} ({})", escaped(&place.path), escaped(why)));
    }

    async fn file(&mut self, from: &InSandbox, to: &Path, entry: &FileEntry) -> Result<(), Failure> {
        let content = Content { remote: self.remote, place: from };
        self.bytes += match std::fs::metadata(to) {
            Ok(found) if found.is_dir() => {
                return Err(Failure::new(format!("{} is a directory", to.display())));
            }
            // What is no plain file (a device, a pipe) is written straight into: it cannot be replaced.
            Ok(found) if !found.is_file() => {
                let mut file = File::options().write(true).open(to).await.doing(|| format!("open {}", to.display()))?;
                match content.read(None, 0, &mut file, &self.bar).await {
                    Ok(bytes) => bytes,
                    Err(Stopped::Failed(failure)) => return Err(failure),
                    Err(Stopped::Changed) => return Err(changed(from)),
                }
            }
            _ => whole(&content, to, is_program(entry), &self.bar).await?,
        };
        self.files += 1;
        Ok(())
    }
}

/// Under its name when it is whole.
async fn whole(content: &Content<'_>, to: &Path, is_program: bool, bar: &ProgressBar) -> Result<u64, Failure> {
    for _ in 0..CHANGES_MAX {
        let version = content.version().await?;
        let part = Part::open(part_of(to, content, &version)?)?;
        let had = part.length(&version)?;
        let mut file = File::from_std(part.file()?);
        match content.read(Some(version), had, &mut file, bar).await {
            Ok(bytes) => {
                file.sync_all().await.doing(|| format!("write {}", to.display()))?;
                part.finish(to, is_program)?;
                return Ok(bytes);
            }
            Err(Stopped::Changed) => part.remove(),
            Err(Stopped::Failed(failure)) => return Err(part.keep(failure)),
        }
    }
    Err(changed(content.place))
}

fn changed(place: &InSandbox) -> Failure {
    Failure::new(format!("{:?} is changed again and again while it is read", place.path))
}

/// Beside the target, so that a rename is enough; the name says which version of which file it is.
fn part_of(to: &Path, content: &Content<'_>, version: &Version) -> Result<PathBuf, Failure> {
    let name = to.file_name().ok_or_else(|| Failure::usage(format!("{} names no file", to.display())))?;
    let mut hash = Sha256::new();
    let size = version.size.map(|size| size.to_string());
    let base = content.remote.client.base().as_str();
    for part in [
        base.as_bytes(),
        content.place.id.as_bytes(),
        content.place.path.as_bytes(),
        content.remote.user.unwrap_or_default().as_bytes(),
        name.as_encoded_bytes(),
        version.etag.as_deref().unwrap_or_default().as_bytes(),
        size.as_deref().unwrap_or_default().as_bytes(),
    ] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    Ok(to.with_file_name(format!(".wrenn-part-{}", hex::encode(&hash.finalize()[..8]))))
}

/// What has come so far. Nobody else writes into it meanwhile.
struct Part {
    place: PathBuf,
    lock: Flock<StdFile>,
}

impl Part {
    fn open(place: PathBuf) -> Result<Self, Failure> {
        let doing = || format!("make {}", place.display());
        let file = StdFile::options().append(true).create(true).open(&place).doing(doing)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { place, lock }),
            Err(_) => Err(Failure::new("the same file is being fetched to the same place by another command")),
        }
    }

    /// How much of this version is there.
    fn length(&self, version: &Version) -> Result<u64, Failure> {
        let doing = || format!("read {}", self.place.display());
        let length = self.lock.metadata().doing(doing)?.len();
        let is_usable = version.etag.is_some() && version.size.is_none_or(|size| length <= size);
        if length > 0 && !is_usable {
            self.lock.set_len(0).doing(doing)?;
            return Ok(0);
        }
        Ok(length)
    }

    fn file(&self) -> Result<StdFile, Failure> {
        self.lock.try_clone().doing(|| format!("open {}", self.place.display()))
    }

    fn finish(self, to: &Path, is_program: bool) -> Result<(), Failure> {
        let doing = || format!("write {}", to.display());
        if is_program {
            let mode = self.lock.metadata().doing(doing)?.permissions().mode();
            // Whoever may read it may run it, as `chmod +x` does; nothing else of the guest's rights is taken over.
            self.lock.set_permissions(Permissions::from_mode(mode | (mode & 0o444) >> 2)).doing(doing)?;
        }
        std::fs::rename(&self.place, to).doing(doing)
    }

    fn remove(self) {
        let _ = std::fs::remove_file(&self.place);
    }

    /// The next try goes on with what there is.
    fn keep(self, failure: Failure) -> Failure {
        match self.lock.metadata().map(|metadata| metadata.len()) {
            Ok(length) if length > 0 => Failure::new(format!(
                "{}; {length} bytes are kept in {}, and the same command goes on with them",
                failure.message(),
                self.place.display()
            )),
            _ => {
                self.remove();
                failure
            }
        }
    }
}

fn is_program(entry: &FileEntry) -> bool {
    entry.mode & 0o100 != 0
}

/// A name that the guest gave must not lead to anywhere else.
fn checked_name(name: &str) -> Result<&str, Failure> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Failure::new(format!("the sandbox names a file {}: that is no name of a file", escaped(name))));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for wrong in ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b"] {
            assert!(checked_name(wrong).is_err(), "{wrong:?}");
        }
        for fine in ["a", "..a", "a b", "-rf", "ü"] {
            assert_eq!(checked_name(fine).unwrap(), fine);
        }
    }
}
