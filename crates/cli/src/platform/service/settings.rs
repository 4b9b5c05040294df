//! The settings of a service: names and values in a file that systemd and the shell read alike.

use std::collections::BTreeMap;
use std::path::Path;

use supervision::settings as names;

use crate::failure::{Doing as _, Failure};

/// What stands for something else in quotation marks, to systemd and to a shell.
const MARKS: [char; 4] = ['\\', '"', '$', '`'];

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, String>);

impl Settings {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    pub fn put(&mut self, name: &str, value: impl Into<String>) -> Result<(), Failure> {
        let value = value.into();
        // A line break would be another setting.
        if value.chars().any(char::is_control) {
            return Err(Failure::usage(format!("{name} has control characters")));
        }
        self.0.insert(name.to_owned(), value);
        Ok(())
    }

    /// As `--set NAME=VALUE` gives them. One that no program reads would be a setting that somebody believes in.
    pub fn put_given(&mut self, given: &[String]) -> Result<(), Failure> {
        let is_name =
            |name: &str| name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        for setting in given {
            let (name, value) = setting.split_once('=').unwrap_or_default();
            if !name.starts_with("WRENN_") || !is_name(name) {
                return Err(Failure::usage(format!(
                    "--set {setting:?}: give NAME=VALUE with a name that begins with WRENN_"
                )));
            }
            if !names::is_known(name) {
                let meant = names::meant(name);
                return Err(Failure::usage(format!("--set {setting:?}: there is no setting {name}{meant}")));
            }
            self.put(name, value)?;
        }
        Ok(())
    }

    /// Of a file that may not be there.
    pub fn read(place: &Path) -> Result<Self, Failure> {
        let text = match std::fs::read_to_string(place) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.doing(|| format!("read {}", place.display()))?,
        };
        let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        let settings = lines.filter_map(|line| line.split_once('='));
        Ok(Self(settings.map(|(name, value)| (name.trim().to_owned(), unquoted(value.trim()))).collect()))
    }

    /// These, and what was there and is not among them.
    pub fn over(mut self, mut present: Self) -> Self {
        present.0.append(&mut self.0);
        present
    }

    /// Quoted, because a value may hold spaces.
    pub fn text(&self, head: &str) -> String {
        self.iter().fold(format!("# {head}\n"), |text, (name, value)| {
            let value: String = value.chars().fold(String::new(), |mut value, character| {
                value.extend(Some('\\').filter(|_| MARKS.contains(&character)));
                value.push(character);
                value
            });
            format!("{text}{name}=\"{value}\"\n")
        })
    }
}

fn unquoted(value: &str) -> String {
    let Some(inner) = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')) else {
        return value.to_owned();
    };
    let mut text = String::new();
    let mut characters = inner.chars().peekable();
    while let Some(character) = characters.next() {
        match characters.next_if(|next| character == '\\' && MARKS.contains(next)) {
            Some(mark) => text.push(mark),
            None => text.push(character),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell stands for systemd, which has its quotation marks from there.
    #[test]
    fn a_shell_and_this_program_read_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("settings");
        let mut settings = Settings::default();
        for (name, value) in [
            ("WRENN_A", "two words"),
            ("WRENN_B", r#"\"quoted\" and $HOME and `id` and \n"#),
            ("WRENN_C", ""),
            ("WRENN_D", "a=b # no comment"),
        ] {
            settings.put(name, value).unwrap();
        }
        std::fs::write(&place, settings.text("A comment.")).unwrap();
        assert_eq!(Settings::read(&place).unwrap(), settings);
        for (name, value) in settings.iter() {
            let script = format!(". {}; printf %s \"${name}\"", place.display());
            let output = std::process::Command::new("sh").args(["-ec", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), value, "{name}");
        }
    }

    #[test]
    fn what_is_given_goes_before_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("settings");
        assert_eq!(Settings::read(&place).unwrap(), Settings::default());
        std::fs::write(&place, "# by hand\nWRENN_A = 1\n\nWRENN_B=2\nnothing\n").unwrap();
        let mut given = Settings::default();
        given.put("WRENN_B", "3").unwrap();
        given.put_given(&["WRENN_LOG=a=b".to_owned()]).unwrap();
        let all = given.over(Settings::read(&place).unwrap());
        assert_eq!(all.iter().collect::<Vec<_>>(), [("WRENN_A", "1"), ("WRENN_B", "3"), ("WRENN_LOG", "a=b")]);
    }

    #[test]
    fn what_no_program_reads_is_refused() {
        let refused = |setting: &str| {
            let mut settings = Settings::default();
            let failure = settings.put_given(&[setting.to_owned()]).expect_err(setting);
            assert_eq!(settings, Settings::default());
            failure.message().to_owned()
        };
        assert!(refused("WRENN_LOGG=debug").ends_with("there is no setting WRENN_LOGG; is WRENN_LOG meant?"));
        assert!(refused("WRENN_ZZZZZ=1").ends_with("there is no setting WRENN_ZZZZZ"));
        assert!(refused("LOG=debug").contains("WRENN_"));
        assert!(refused("WRENN_LOG").contains("NAME=VALUE"));
    }
}
