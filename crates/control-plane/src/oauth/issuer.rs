//! An issuer of OpenID Connect: found by its address, believed by its signature.

use std::time::Duration;

use openidconnect::core::{
    CoreAuthenticationFlow, CoreClient, CoreErrorResponseType, CoreIdTokenClaims, CoreJwsSigningAlgorithm,
    CoreProviderMetadata, CoreTokenResponse, CoreUserInfoClaims,
};
use openidconnect::{
    AccessToken, AuthorizationCode, ClaimsVerificationError, ClientId, ClientSecret, CsrfToken, DiscoveryError,
    EndpointMaybeSet, EndpointNotSet, EndpointSet, IssuerUrl, Nonce, OAuth2TokenResponse as _, PkceCodeChallenge,
    PkceCodeVerifier, RedirectUrl, RequestTokenError, Scope, SignatureVerificationError, SubjectIdentifier,
    TokenResponse as _, UserInfoError,
};
use store::identities::Claimed;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::Url;

use super::outward::{Outward, OutwardError};
use super::ticket::Ticket;
use super::{ISSUER, OauthError};
use crate::oauth_settings::IssuerSite;

/// Endpoints and keys change seldom.
const KNOWN_FOR: Duration = Duration::from_secs(3600);
/// Keys that are not known are asked for, but not at every token that names one.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Those that only the issuer's private key makes. None of our secret's, and never `none`.
const ALGORITHMS: [CoreJwsSigningAlgorithm; 9] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha384,
    CoreJwsSigningAlgorithm::RsaSsaPssSha512,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
    CoreJwsSigningAlgorithm::EcdsaP384Sha384,
    CoreJwsSigningAlgorithm::EdDsa,
];

type Client =
    CoreClient<EndpointSet, EndpointNotSet, EndpointNotSet, EndpointNotSet, EndpointMaybeSet, EndpointMaybeSet>;

pub struct Issuer {
    site: IssuerSite,
    back: Url,
    http: Outward,
    known: Mutex<Option<Known>>,
}

struct Known {
    metadata: CoreProviderMetadata,
    at: Instant,
}

impl Issuer {
    pub fn new(site: IssuerSite, back: Url, http: Outward) -> Self {
        Self { site, back, http, known: Mutex::new(None) }
    }

    pub async fn begin(&self, ticket: &Ticket) -> Result<Url, OauthError> {
        let client = self.client(KNOWN_FOR).await?;
        let (state, nonce) = (ticket.state.clone(), ticket.nonce.clone());
        let challenge = PkceCodeChallenge::from_code_verifier_sha256(&PkceCodeVerifier::new(ticket.verifier.clone()));
        let (url, _, _) = client
            .authorize_url(
                CoreAuthenticationFlow::AuthorizationCode,
                move || CsrfToken::new(state),
                move || Nonce::new(nonce),
            )
            .add_scope(Scope::new("email".to_owned()))
            .add_scope(Scope::new("profile".to_owned()))
            .set_pkce_challenge(challenge)
            .url();
        Ok(url)
    }

    pub async fn end(&self, ticket: &Ticket, code: &str) -> Result<Claimed, OauthError> {
        let client = self.client(KNOWN_FOR).await?;
        let exchange = client
            .exchange_code(AuthorizationCode::new(code.to_owned()))
            .map_err(|error| wrong(&error))?
            .set_pkce_verifier(PkceCodeVerifier::new(ticket.verifier.clone()));
        let tokens: CoreTokenResponse = exchange.request_async(&self.http).await.map_err(exchange_failed)?;
        let claims = match verified(&client, &tokens, &ticket.nonce) {
            // A key that is newer than what is known here.
            Err(ClaimsVerificationError::SignatureVerification(SignatureVerificationError::NoMatchingKey)) => {
                verified(&self.client(AGAIN_AFTER).await?, &tokens, &ticket.nonce)
            }
            other => other,
        };
        let claims = claims.map_err(|error| wrong(&error))?;
        let mut email = claims.email().filter(|_| claims.email_verified() == Some(true)).map(|email| email.to_string());
        let mut name = claims.name().and_then(|name| name.get(None)).map(|name| name.to_string());
        if claims.email().is_none()
            && let Some(more) = self.more(&client, tokens.access_token(), claims.subject()).await?
        {
            email = more.email().filter(|_| more.email_verified() == Some(true)).map(|email| email.to_string());
            name = name.or_else(|| more.name().and_then(|name| name.get(None)).map(|name| name.to_string()));
        }
        Ok(Claimed { provider: ISSUER, subject: claims.subject().to_string(), email, name: name.unwrap_or_default() })
    }

    /// What the issuer tells when it is asked, of who is named in the token.
    async fn more(
        &self,
        client: &Client,
        token: &AccessToken,
        of: &SubjectIdentifier,
    ) -> Result<Option<CoreUserInfoClaims>, OauthError> {
        let Ok(asked) = client.user_info(token.clone(), Some(of.clone())) else { return Ok(None) };
        let told = asked.request_async(&self.http).await.map_err(|error| match error {
            UserInfoError::Request(error) => not_asked(error),
            other => wrong(&other),
        });
        told.map(Some)
    }

    /// With what is known of the issuer, which is not older than that.
    async fn client(&self, age_max: Duration) -> Result<Client, OauthError> {
        let mut known = self.known.lock().await;
        let metadata = match known.as_ref().filter(|known| known.at.elapsed() < age_max) {
            Some(known) => known.metadata.clone(),
            None => {
                let issuer = IssuerUrl::new(self.site.issuer.clone()).map_err(|error| wrong(&error))?;
                let found = CoreProviderMetadata::discover_async(issuer, &self.http).await;
                let metadata = found.map_err(|error| match error {
                    DiscoveryError::Request(error) => not_asked(error),
                    other => wrong(&other),
                })?;
                *known = Some(Known { metadata: metadata.clone(), at: Instant::now() });
                metadata
            }
        };
        let secret = ClientSecret::new(self.site.client_secret.clone());
        let back = RedirectUrl::from_url(self.back.clone());
        Ok(CoreClient::from_provider_metadata(metadata, ClientId::new(self.site.client_id.clone()), Some(secret))
            .set_redirect_uri(back))
    }
}

fn verified(
    client: &Client,
    tokens: &CoreTokenResponse,
    nonce: &str,
) -> Result<CoreIdTokenClaims, ClaimsVerificationError> {
    let verifier = client.id_token_verifier().set_allowed_algs(ALGORITHMS);
    let token = tokens.id_token().ok_or_else(|| ClaimsVerificationError::Other("there is no ID token".to_owned()))?;
    token.claims(&verifier, &Nonce::new(nonce.to_owned())).cloned()
}

fn exchange_failed(
    error: RequestTokenError<OutwardError, openidconnect::StandardErrorResponse<CoreErrorResponseType>>,
) -> OauthError {
    match error {
        RequestTokenError::ServerResponse(said) if *said.error() == CoreErrorResponseType::InvalidGrant => {
            OauthError::Code
        }
        RequestTokenError::Request(error) => not_asked(error),
        other => wrong(&other),
    }
}

fn not_asked(error: OutwardError) -> OauthError {
    match error {
        OutwardError::Late => OauthError::Late,
        OutwardError::Failed(said) => OauthError::Away(said),
        other => OauthError::Wrong(other.to_string()),
    }
}

/// With its causes. What the site has sent is not in them.
fn wrong(error: &dyn std::error::Error) -> OauthError {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        said = format!("{said}: {inner}");
        cause = inner.source();
    }
    OauthError::Wrong(said)
}
