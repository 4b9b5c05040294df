//! `/v1/events`: what happens to a team's things, as it happens and in pages.

mod listener;
mod page;
mod stream;
mod stream_all;

use api::v1::events::{MORE, PUBLISHED};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(page::page))
        .routes(routes!(stream::stream))
        .routes(routes!(stream_all::stream_all))
}

/// A place in the order of events, as a client names it.
fn place(field: &str, text: &str) -> Result<i64, ApiError> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = is_number.then(|| text.parse().ok()).flatten();
    number.ok_or_else(|| ApiError::invalid(field, "is not the id of an event"))
}

/// Kinds with commas between; none of them: all.
fn kinds(text: Option<&str>) -> Result<Vec<String>, ApiError> {
    let words = text.unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty());
    let known =
        |word: &str| PUBLISHED.iter().chain(&MORE).find(|known| **known == word).map(|known| (*known).to_owned());
    let mut kinds: Vec<String> = words
        .map(|word| known(word).ok_or_else(|| ApiError::invalid("kinds", "names a kind of event that there is not")))
        .collect::<Result<_, _>>()?;
    kinds.sort_unstable();
    kinds.dedup();
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_numbers_and_kinds_are_known() {
        assert_eq!(place("after", "0").unwrap(), 0);
        for wrong in ["", "-1", "+1", "x", "9223372036854775808", "1 ", "\u{661}"] {
            assert!(place("after", wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(kinds(Some("host.up, capsule.create,host.up,")).unwrap(), ["capsule.create", "host.up"]);
        assert!(kinds(None).unwrap().is_empty());
        assert!(kinds(Some("capsule.create,connected")).is_err());
    }
}
