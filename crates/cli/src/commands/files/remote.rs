//! The calls about files of one sandbox.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::Url;

use crate::client::Client;
use crate::failure::Failure;
use crate::place::InSandbox;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub name: String,
    pub path: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub size: i64,
    #[serde(default)]
    pub mode: u32,
    #[serde(default)]
    pub permissions: String,
    #[serde(default)]
    pub owner: String,
    #[serde(default)]
    pub group: String,
    #[serde(default)]
    pub modified_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

impl Entry {
    pub fn is_directory(&self) -> bool {
        self.kind == "directory"
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listing {
    pub entries: Vec<Entry>,
    /// There are more than were told.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
}

#[derive(Deserialize)]
struct One {
    entry: Entry,
}

/// The files of a sandbox, as one of its users sees them.
pub struct Remote<'a> {
    pub client: &'a Client,
    pub user: Option<&'a str>,
}

impl Remote<'_> {
    pub async fn list(&self, place: &InSandbox, depth: u32) -> Result<Listing, Failure> {
        let body = self.body(json!({ "path": place.path, "depth": depth }));
        self.client.post(self.url(place, "list"), &body).await
    }

    pub async fn stat(&self, place: &InSandbox) -> Result<Entry, Failure> {
        let body = self.body(json!({ "path": place.path }));
        let one: One = self.client.post(self.url(place, "stat"), &body).await?;
        Ok(one.entry)
    }

    /// As `stat`; none where there is nothing of that name.
    pub async fn find(&self, place: &InSandbox) -> Result<Option<Entry>, Failure> {
        match self.stat(place).await {
            Ok(entry) => Ok(Some(entry)),
            Err(failure) if self.is_missing(&failure, place).await? => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    pub async fn mkdir(&self, place: &InSandbox) -> Result<Entry, Failure> {
        let body = self.body(json!({ "path": place.path }));
        let one: One = self.client.post_once(self.url(place, "mkdir"), &body).await?;
        Ok(one.entry)
    }

    /// Not repeated: the second time there is nothing to remove.
    pub async fn remove(&self, place: &InSandbox) -> Result<(), Failure> {
        let body = self.body(json!({ "path": place.path }));
        self.client.post_once_for_nothing(self.url(place, "remove"), &body).await
    }

    pub async fn rename(&self, from: &InSandbox, to: &str) -> Result<Entry, Failure> {
        let body = self.body(json!({ "from": from.path, "to": to }));
        let one: One = self.client.post_once(self.url(from, "move"), &body).await?;
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

    fn body(&self, mut body: Value) -> Value {
        if let Some(user) = self.user {
            body["user"] = json!(user);
        }
        body
    }
}
