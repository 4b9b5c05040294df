//! The calls about files of one sandbox.

use api::v1::files::{FileEntries, FileEntry, FilePath, ListFiles, MoveFile, OneFileEntry};
use serde_json::Value;
use url::Url;

use crate::client::Client;
use crate::failure::Failure;
use crate::place::InSandbox;

/// The files of a sandbox, as one of its users sees them.
pub struct Remote<'a> {
    pub client: &'a Client,
    pub user: Option<&'a str>,
}

impl Remote<'_> {
    pub async fn list(&self, place: &InSandbox, depth: u32) -> Result<FileEntries, Failure> {
        let body = ListFiles { path: place.path.clone(), depth, user: self.user() };
        self.client.post(self.url(place, "list"), &body).await
    }

    pub async fn stat(&self, place: &InSandbox) -> Result<FileEntry, Failure> {
        let body = FilePath { path: place.path.clone(), user: self.user() };
        let one: OneFileEntry = self.client.post(self.url(place, "stat"), &body).await?;
        Ok(one.entry)
    }

    /// As `stat`; none where there is nothing of that name.
    pub async fn find(&self, place: &InSandbox) -> Result<Option<FileEntry>, Failure> {
        match self.stat(place).await {
            Ok(entry) => Ok(Some(entry)),
            Err(failure) if self.is_missing(&failure, place).await? => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    pub async fn mkdir(&self, place: &InSandbox) -> Result<FileEntry, Failure> {
        let body = FilePath { path: place.path.clone(), user: self.user() };
        let one: OneFileEntry = self.client.post_once(self.url(place, "mkdir"), &body).await?;
        Ok(one.entry)
    }

    /// Not repeated: the second time there is nothing to remove.
    pub async fn remove(&self, place: &InSandbox) -> Result<(), Failure> {
        let body = FilePath { path: place.path.clone(), user: self.user() };
        self.client.post_once_for_nothing(self.url(place, "remove"), &body).await
    }

    pub async fn rename(&self, from: &InSandbox, to: &str) -> Result<FileEntry, Failure> {
        let body = MoveFile { from: from.path.clone(), to: to.to_owned(), user: self.user() };
        let one: OneFileEntry = self.client.post_once(self.url(from, "move"), &body).await?;
        Ok(one.entry)
    }

    /// Where a file's content is read and written.
    pub fn content(&self, place: &InSandbox) -> Url {
        let mut url = self.url(place, "content");
        url.query_pairs_mut().append_pair("path", &place.path);
        if let Some(user) = self.user {
            url.query_pairs_mut().append_pair("user", user);
        }
        url
    }

    /// Whether it is the file that is missing, and not the sandbox.
    async fn is_missing(&self, failure: &Failure, place: &InSandbox) -> Result<bool, Failure> {
        if failure.code() != Some("not_found") {
            return Ok(false);
        }
        let _: Value = self.client.get(self.client.url(&["v1", "sandboxes", &place.id])).await?;
        Ok(true)
    }

    fn url(&self, place: &InSandbox, verb: &str) -> Url {
        self.client.url(&["v1", "sandboxes", &place.id, "files", verb])
    }

    fn user(&self) -> Option<String> {
        self.user.map(str::to_owned)
    }
}

pub fn is_directory(entry: &FileEntry) -> bool {
    entry.kind == "directory"
}
