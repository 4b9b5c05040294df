//! Tags name one running process each. envd, whose protocol is that of published clients, takes any; and all that is started with a tag
//! comes by this host, so it is looked at here: in the guest's list, and among what is being started at this moment.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use connectrpc::ErrorCode;

use super::{Guest, GuestError};

/// Tags with which processes are being started.
#[derive(Default)]
pub struct Tags(Mutex<HashSet<String>>);

/// Nobody else starts a process of this tag as long as it lives.
pub struct Claim {
    tags: Arc<Tags>,
    tag: String,
}

impl Tags {
    fn claim(self: &Arc<Self>, tag: &str) -> Option<Claim> {
        let is_new = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(tag.to_owned());
        is_new.then(|| Claim { tags: self.clone(), tag: tag.to_owned() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.tags.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.tag);
    }
}

impl Guest {
    /// None without a tag. A start that is given up after its question was sent may still come about: whoever repeats it is told so.
    pub(super) async fn claim_tag(&self, tag: &str) -> Result<Option<Claim>, GuestError> {
        if tag.is_empty() {
            return Ok(None);
        }
        let in_use = || GuestError::Refused {
            code: ErrorCode::AlreadyExists,
            message: "a process with this tag runs already".to_owned(),
        };
        let claim = self.tags.claim(tag).ok_or_else(in_use)?;
        if self.processes().await?.iter().any(|process| process.tag == tag) {
            return Err(in_use());
        }
        Ok(Some(claim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_claimed_once_at_a_time() {
        let tags = Arc::new(Tags::default());
        let first = tags.claim("a");
        assert!(first.is_some() && tags.claim("a").is_none() && tags.claim("b").is_some());
        drop(first);
        assert!(tags.claim("a").is_some());
    }
}
