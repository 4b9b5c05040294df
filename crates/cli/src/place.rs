//! Where a file is: on this machine, in a sandbox (`SANDBOX:PATH`), or standard input and output (`-`).

use std::path::PathBuf;

use crate::failure::Failure;

#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    Local(PathBuf),
    Standard,
    Sandbox(InSandbox),
}

#[derive(Debug, Clone, PartialEq)]
pub struct InSandbox {
    pub id: String,
    /// Absolute, or relative to the home of the user.
    pub path: String,
}

impl Place {
    /// `ID:PATH` is known by the id's form, so that local files may have colons in their names.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        if text == "-" {
            return Ok(Self::Standard);
        }
        if let Some((id, path)) = text.split_once(':')
            && is_sandbox(id)
        {
            if path.is_empty() {
                return Err(Failure::usage(format!("{text:?} names no file: give {id}:/path/in/the/sandbox")));
            }
            return Ok(Self::Sandbox(InSandbox { id: id.to_owned(), path: path.to_owned() }));
        }
        if text.is_empty() {
            return Err(Failure::usage("an empty path names no file"));
        }
        Ok(Self::Local(text.into()))
    }
}

impl InSandbox {
    pub fn parse(text: &str) -> Result<Self, Failure> {
        match Place::parse(text)? {
            Place::Sandbox(place) => Ok(place),
            _ => Err(Failure::usage(format!("{text:?} is no place in a sandbox: give SANDBOX:PATH"))),
        }
    }

    /// As `parse`; without a path it is the home of the user.
    pub fn or_home(text: &str) -> Result<Self, Failure> {
        match text.strip_suffix(':').unwrap_or(text) {
            id if is_sandbox(id) => Ok(Self { id: id.to_owned(), path: "~".to_owned() }),
            _ => Self::parse(text),
        }
    }

    /// The last part of the path.
    pub fn file_name(&self) -> Result<&str, Failure> {
        let name = std::path::Path::new(&self.path).file_name().and_then(|name| name.to_str());
        name.ok_or_else(|| Failure::usage(format!("{:?} names no file", self.path)))
    }

    pub fn join(&self, name: &str) -> Self {
        Self { id: self.id.clone(), path: format!("{}/{name}", self.path.trim_end_matches('/')) }
    }
}

fn is_sandbox(id: &str) -> bool {
    id.len() == 24 && id.starts_with("sb") && id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "sb0123456789abcdefghij12";

    #[test]
    fn a_sandbox_is_told_from_a_local_file_with_a_colon() {
        let place = InSandbox { id: ID.into(), path: "/a:b".into() };
        assert_eq!(Place::parse(&format!("{ID}:/a:b")).unwrap(), Place::Sandbox(place));
        assert_eq!(Place::parse("a:b").unwrap(), Place::Local("a:b".into()));
        assert_eq!(Place::parse("-").unwrap(), Place::Standard);
        assert!(Place::parse(&format!("{ID}:")).is_err());
        assert!(Place::parse("").is_err());
    }

    #[test]
    fn a_sandbox_alone_is_the_home_in_it_where_that_makes_sense() {
        for text in [ID.to_owned(), format!("{ID}:")] {
            assert_eq!(InSandbox::or_home(&text).unwrap().path, "~");
        }
        assert!(InSandbox::or_home("a:b").is_err());
        assert!(InSandbox::parse(ID).is_err());
        assert_eq!(InSandbox::parse(&format!("{ID}:/")).unwrap().join("a").path, "/a");
        assert_eq!(InSandbox::parse(&format!("{ID}:b/")).unwrap().join("a").path, "b/a");
    }
}
