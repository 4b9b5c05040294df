//! `/v1/channels`: where the team is told of what happens.

mod config;
mod create;
mod delete;
mod get;
mod list;
mod test;
mod update;

use std::collections::BTreeMap;

use api::v1::channels::{Channel, EVENTS};
use model::ids::ChannelId;
use model::shape::TemplateName;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::channels::deliver::sealed_name;
use crate::channels::provider::{Config, Provider, Wrong};
use crate::http::errors::ApiError;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list::list, create::create))
        .routes(routes!(test::test))
        .routes(routes!(get::get, update::update, delete::delete))
        .routes(routes!(config::set))
}

fn shown(channel: store::channels::Channel, secret: Option<String>) -> Channel {
    Channel {
        id: channel.id.to_string(),
        team_id: channel.team.to_string(),
        name: channel.name,
        provider: channel.provider,
        events: channel.events,
        created_at: channel.created_at,
        updated_at: channel.updated_at,
        delivered_at: channel.delivered_at,
        problem: channel.problem,
        problem_at: channel.problem_at,
        secret,
    }
}

/// In lower case, with dashes for blanks.
fn name(text: &str) -> Result<String, ApiError> {
    let name = text.trim().to_lowercase().replace(' ', "-");
    // The form that names of snapshots have.
    name.parse::<TemplateName>().map_err(|error| ApiError::invalid("name", format!("is wrong: {error}")))?;
    Ok(name)
}

/// Each once, in the order of the list of all.
fn events(wanted: &[String]) -> Result<Vec<String>, ApiError> {
    if wanted.is_empty() || wanted.iter().any(|event| !EVENTS.contains(&event.as_str())) {
        return Err(ApiError::invalid("events", format!("must be one or more of: {}", EVENTS.join(", "))));
    }
    Ok(EVENTS
        .iter()
        .filter(|known| wanted.iter().any(|event| event == *known))
        .map(|known| (*known).to_owned())
        .collect())
}

fn provider(text: &str) -> Result<Provider, ApiError> {
    text.parse().map_err(|reason: String| ApiError::invalid("provider", reason))
}

/// The configuration with the secret that a webhook needs, and that secret, when this made it.
fn whole(
    provider: Provider,
    given: BTreeMap<String, String>,
    made: [u8; 32],
) -> Result<(Config, Option<String>), ApiError> {
    let mut config = given;
    config.retain(|field, value| !(field == "secret" && value.is_empty()));
    provider.check(&config).map_err(|Wrong { field, reason }| ApiError::invalid(&field, reason))?;
    if provider != Provider::Webhook || config.contains_key("secret") {
        return Ok((config, None));
    }
    let secret = hex::encode(made);
    config.insert("secret".to_owned(), secret.clone());
    Ok((config, Some(secret)))
}

fn sealed(app: &App, id: ChannelId, config: &Config) -> Vec<u8> {
    let plain = serde_json::to_vec(config).expect("texts are JSON");
    app.secret.seal(&plain, &sealed_name(&id.to_string()))
}
