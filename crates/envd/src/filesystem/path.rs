//! From the path of a call to the one that it means.
//!
//! Absolute, below the user's home (`~`), or relative to the default directory; then cleaned by its letters: `a/./b` and `a/x/../b` are
//! `a/b`, as published clients know it from their own libraries. So `link/..` is the directory of the link, not of its target.

use std::path::{Component, Path, PathBuf};

use crate::process::spawn;
use crate::users::Account;

pub fn resolve(path: &str, account: &Account, default_workdir: &str) -> PathBuf {
    clean(&spawn::resolve(path, account, default_workdir))
}

/// Always absolute.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_mean_one_place() {
        let account = Account {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/user".into(),
            shell: "/bin/sh".into(),
        };
        for (path, workdir, meant) in [
            (".", "", "/home/user"),
            ("./x", "", "/home/user/x"),
            ("x/", "", "/home/user/x"),
            ("~", "/srv", "/home/user"),
            ("~/./a//b", "/srv", "/home/user/a/b"),
            ("~other", "", "/home/user/~other"),
            (".", "/srv/", "/srv"),
            ("a/../../b", "/srv/app", "/srv/b"),
            ("/a/./b/../c/", "", "/a/c"),
            ("/../..", "", "/"),
            ("//etc//x", "", "/etc/x"),
            ("x", "relative", "/relative/x"),
        ] {
            assert_eq!(resolve(path, &account, workdir), Path::new(meant), "{path} in {workdir:?}");
        }
    }
}
