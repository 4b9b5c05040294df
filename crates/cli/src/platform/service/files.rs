//! Files of the system that an installation puts into place, below a directory that is `/` or stands for it.

use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::failure::{Doing as _, Failure};

pub struct Files {
    root: PathBuf,
    /// What was put into place, as it is called below the root.
    pub written: Vec<String>,
}

impl Files {
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), written: Vec::new() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Whole or not at all.
    pub fn write(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<(), Failure> {
        let target = self.at(path);
        let doing = || format!("write {}", target.display());
        let folder = target.parent().expect("it has a folder");
        std::fs::create_dir_all(folder).doing(doing)?;
        let temporary =
            folder.join(format!(".{}.{}", target.file_name().unwrap_or_default().display(), std::process::id()));
        remove(&temporary)?;
        let written = || -> std::io::Result<()> {
            let mut file = std::fs::File::options().write(true).create_new(true).mode(mode).open(&temporary)?;
            file.set_permissions(std::fs::Permissions::from_mode(mode))?;
            file.write_all(bytes)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &target)
        };
        let outcome = written();
        if outcome.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        outcome.doing(doing)?;
        self.written.push(format!("/{path}"));
        Ok(())
    }

    pub fn remove(&self, path: &str) -> Result<(), Failure> {
        remove(&self.at(path))
    }
}

fn remove(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .doing(|| format!("remove {}", path.display()))
}
