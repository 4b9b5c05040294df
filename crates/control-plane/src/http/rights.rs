//! Rights that are lost while a request goes on: an open stream, a long command, a transfer. What was right when it began is looked at
//! again, and what no longer is ends.

use std::io;

use axum::body::Body;
use axum::response::Response;
use futures::{StreamExt as _, stream};
use http::header;
use model::ids::{ApiKeyId, SessionId, TeamId};
use store::StoreError;
use store::api_keys::KeyBy;
use store::sessions::SessionBy;

use super::access::Policy;
use crate::app::App;
use crate::measures::Counted;

/// By what a request was let in.
#[derive(Debug, Clone)]
pub struct Grant {
    policy: Policy,
    by: By,
}

#[derive(Debug, Clone, Copy)]
enum By {
    Session { id: SessionId, team: Option<TeamId> },
    Key(ApiKeyId),
}

impl Grant {
    pub fn session(policy: Policy, id: SessionId, team: Option<TeamId>) -> Self {
        Self { policy, by: By::Session { id, team } }
    }

    pub fn key(policy: Policy, id: ApiKeyId) -> Self {
        Self { policy, by: By::Key(id) }
    }
}

/// Resolves when the grant no longer holds. A database that is away is no news about rights.
pub async fn lost(app: &App, grant: &Grant) {
    loop {
        tokio::time::sleep(app.accounts.rights_every).await;
        if let Ok(false) = holds(app, grant).await {
            return;
        }
    }
}

/// A response whose body breaks off when the rights are lost. It does not just end: then it would look whole.
pub fn bounded(response: Response, app: &App, grant: &Grant) -> Response {
    let kind = response.headers().get(header::CONTENT_TYPE).map(|kind| kind.as_bytes());
    // Other answers are in memory already.
    if kind != Some(b"application/octet-stream") {
        return response;
    }
    let (app, grant) = (app.clone(), grant.clone());
    let (parts, body) = response.into_parts();
    let lost = Box::pin(async move { lost(&app, &grant).await });
    let open = (body.into_data_stream(), lost, Counted::file_stream());
    let pieces = stream::unfold(Some(open), |open| async move {
        let (mut body, mut lost, counted) = open?;
        tokio::select! {
            piece = body.next() => {
                let piece = piece?.map_err(io::Error::other);
                let open = piece.is_ok().then_some((body, lost, counted));
                Some((piece, open))
            }
            () = lost.as_mut() => Some((Err(io::Error::other("the rights were lost")), None)),
        }
    });
    Response::from_parts(parts, Body::from_stream(pieces))
}

async fn holds(app: &App, grant: &Grant) -> Result<bool, StoreError> {
    match grant.by {
        By::Key(id) => {
            let key = app.store.use_api_key(KeyBy::Id(id)).await?;
            Ok(key.is_some_and(|key| match grant.policy {
                Policy::Team(scope) => key.scopes.contains(&scope),
                _ => false,
            }))
        }
        By::Session { id, team } => {
            let standing = app.store.standing(SessionBy::Id(id), team).await?;
            Ok(standing.is_some_and(|standing| match grant.policy {
                Policy::Team(_) => standing.role.is_some(),
                Policy::Member(least) => standing.role.is_some_and(|role| role >= least),
                Policy::Administrator | Policy::Platform => standing.is_admin,
                Policy::Hosts(least) => standing.is_admin || standing.role.is_some_and(|role| role >= least),
                _ => true,
            }))
        }
    }
}
