//! Another site by which people log in: an issuer of OpenID Connect, and something like GitHub, that says what a test wants it to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Form, State};
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use control_plane::secrets::sha256;
use http::{HeaderMap, StatusCode};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::{Value, json};
use url::Url;

pub const CLIENT: &str = "wrenn";
pub const SECRET: &str = "a secret/of+the client";

/// What is wrong with the site, or with what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    None,
    Nonce,
    Audience,
    Issuer,
    Expired,
    /// Signed by a key that has the right name and is another one.
    Key,
    /// Not signed at all.
    AlgorithmNone,
    /// Signed by what everybody can know: HMAC with the client's secret.
    Hmac,
    NoIdToken,
    /// The token endpoint fails, sends elsewhere, says nothing, never ends, or answers something else.
    Fails,
    Redirects,
    Hangs,
    Floods,
    Nonsense,
}

#[derive(Debug, Clone)]
pub struct Person {
    pub subject: String,
    pub email: String,
    pub is_verified: bool,
}

pub fn person(subject: &str, email: &str) -> Person {
    Person { subject: subject.to_owned(), email: email.to_owned(), is_verified: true }
}

pub struct Site {
    pub url: String,
    shared: Arc<Shared>,
    serving: tokio::task::JoinHandle<()>,
}

struct Shared {
    url: String,
    key: Mutex<(String, KeyPair)>,
    other: KeyPair,
    grants: Mutex<HashMap<String, Grant>>,
    tokens: Mutex<HashMap<String, Person>>,
    /// Told by the userinfo endpoint and not in the ID token.
    is_thin: Mutex<bool>,
}

#[derive(Clone)]
struct Grant {
    person: Person,
    nonce: String,
    challenge: String,
    lie: Lie,
}

impl Site {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            url: url.clone(),
            key: Mutex::new(("one".to_owned(), KeyPair::generate().unwrap())),
            other: KeyPair::generate().unwrap(),
            grants: Mutex::default(),
            tokens: Mutex::default(),
            is_thin: Mutex::new(false),
        });
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(configuration))
            .route("/jwks", get(jwks))
            .route("/token", post(token))
            .route("/userinfo", get(userinfo))
            .route("/login/oauth/access_token", post(github_token))
            .route("/api/user", get(github_user))
            .route("/api/user/emails", get(github_emails))
            .with_state(shared.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, shared, serving }
    }

    /// Somebody logs in where the browser was sent, and is sent back with this code.
    pub fn grant(&self, asked: &Url, person: &Person, lie: Lie) -> String {
        let query: HashMap<String, String> = asked.query_pairs().into_owned().collect();
        assert_eq!(query["client_id"], CLIENT);
        assert_eq!(query["code_challenge_method"], "S256");
        let grant = Grant {
            person: person.clone(),
            nonce: query.get("nonce").cloned().unwrap_or_default(),
            challenge: query["code_challenge"].clone(),
            lie,
        };
        let code = hex::encode(rand::random::<[u8; 8]>());
        self.shared.grants.lock().unwrap().insert(code.clone(), grant);
        code
    }

    /// From now on it signs by another key, of another name.
    pub fn change_key(&self) {
        *self.shared.key.lock().unwrap() = ("two".to_owned(), KeyPair::generate().unwrap());
    }

    pub fn be_thin(&self) {
        *self.shared.is_thin.lock().unwrap() = true;
    }

    pub fn stop(&self) {
        self.serving.abort();
    }
}

async fn configuration(State(site): State<Arc<Shared>>) -> Json<Value> {
    let at = |path: &str| format!("{}{path}", site.url);
    Json(json!({
        "issuer": site.url, "authorization_endpoint": at("/authorize"), "token_endpoint": at("/token"), "jwks_uri": at("/jwks"),
        "userinfo_endpoint": at("/userinfo"), "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    }))
}

async fn jwks(State(site): State<Arc<Shared>>) -> Json<Value> {
    let key = site.key.lock().unwrap();
    let point = key.1.public_key_raw();
    let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..65]));
    Json(json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": key.0, "x": x, "y": y}]}))
}

async fn token(
    State(site): State<Arc<Shared>>,
    headers: HeaderMap,
    Form(form): Form<HashMap<String, String>>,
) -> Response {
    let refused = |error: &str| (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response();
    let given = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let encoded: String = url::form_urlencoded::byte_serialize(SECRET.as_bytes()).collect();
    if given != format!("Basic {}", STANDARD.encode(format!("{CLIENT}:{encoded}"))) {
        return refused("invalid_client");
    }
    let Some(grant) = taken(&site, &form) else { return refused("invalid_grant") };
    match grant.lie {
        Lie::Fails => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Lie::Redirects => return Redirect::temporary(&format!("{}/elsewhere", site.url)).into_response(),
        Lie::Hangs => std::future::pending::<()>().await,
        Lie::Floods => return vec![b' '; 4 << 20].into_response(),
        Lie::Nonsense => return "<html>".into_response(),
        _ => {}
    }
    let access = hex::encode(rand::random::<[u8; 8]>());
    site.tokens.lock().unwrap().insert(access.clone(), grant.person.clone());
    let mut answer = json!({"access_token": access, "token_type": "Bearer", "expires_in": 60});
    if grant.lie != Lie::NoIdToken {
        answer["id_token"] = json!(id_token(&site, &grant));
    }
    Json(answer).into_response()
}

/// A code is good once, for who shows its verifier.
fn taken(site: &Shared, form: &HashMap<String, String>) -> Option<Grant> {
    let grant = site.grants.lock().unwrap().remove(form.get("code")?)?;
    let challenge = URL_SAFE_NO_PAD.encode(sha256(form.get("code_verifier")?.as_bytes()));
    (challenge == grant.challenge).then_some(grant)
}

fn id_token(site: &Shared, grant: &Grant) -> String {
    let now = chrono::Utc::now().timestamp();
    let (issued, expires) = if grant.lie == Lie::Expired { (now - 7200, now - 3600) } else { (now, now + 300) };
    let mut claims = json!({
        "iss": if grant.lie == Lie::Issuer { "https://evil.example" } else { site.url.as_str() },
        "aud": if grant.lie == Lie::Audience { "somebody else" } else { CLIENT },
        "sub": grant.person.subject, "iat": issued, "exp": expires, "name": "Ada",
        "nonce": if grant.lie == Lie::Nonce { "another login" } else { grant.nonce.as_str() },
    });
    if !*site.is_thin.lock().unwrap() {
        claims["email"] = json!(grant.person.email);
        claims["email_verified"] = json!(grant.person.is_verified);
    }
    let key = site.key.lock().unwrap();
    let mut header = Header::new(Algorithm::ES256);
    header.kid = Some(key.0.clone());
    match grant.lie {
        Lie::AlgorithmNone => {
            let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            format!("{}.{}.", part(&json!({"alg": "none"})), part(&claims))
        }
        Lie::Hmac => {
            jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(SECRET.as_bytes()))
                .unwrap()
        }
        lie => {
            let signer = if lie == Lie::Key { &site.other } else { &key.1 };
            jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ec_der(&signer.serialize_der())).unwrap()
        }
    }
}

fn bearer(site: &Shared, headers: &HeaderMap) -> Option<Person> {
    let token = headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")?;
    site.tokens.lock().unwrap().get(token).cloned()
}

async fn userinfo(State(site): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match bearer(&site, &headers) {
        None => StatusCode::UNAUTHORIZED.into_response(),
        Some(person) => {
            let email = json!({"sub": person.subject, "email": person.email, "email_verified": person.is_verified});
            Json(email).into_response()
        }
    }
}

async fn github_token(State(site): State<Arc<Shared>>, Form(form): Form<HashMap<String, String>>) -> Response {
    if form.get("client_id").map(String::as_str) != Some(CLIENT)
        || form.get("client_secret").map(String::as_str) != Some(SECRET)
    {
        return Json(json!({"error": "incorrect_client_credentials"})).into_response();
    }
    let Some(grant) = taken(&site, &form) else {
        return Json(json!({"error": "bad_verification_code"})).into_response();
    };
    match grant.lie {
        Lie::Fails => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Lie::Hangs => tokio::time::sleep(Duration::from_secs(600)).await,
        _ => {}
    }
    let access = hex::encode(rand::random::<[u8; 8]>());
    site.tokens.lock().unwrap().insert(access.clone(), grant.person);
    Json(json!({"access_token": access, "scope": "read:user,user:email", "token_type": "bearer"})).into_response()
}

async fn github_user(State(site): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match bearer(&site, &headers) {
        None => StatusCode::UNAUTHORIZED.into_response(),
        // An address that it shows there is not verified, and counts for nothing.
        Some(person) => {
            let id: u64 = person.subject.parse().unwrap();
            Json(json!({"id": id, "login": "ada", "name": null, "email": "victim@example.org"})).into_response()
        }
    }
}

async fn github_emails(State(site): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match bearer(&site, &headers) {
        None => StatusCode::UNAUTHORIZED.into_response(),
        Some(person) => Json(json!([
            {"email": "second@example.org", "primary": false, "verified": true, "visibility": null},
            {"email": person.email, "primary": true, "verified": person.is_verified, "visibility": "private"},
        ]))
        .into_response(),
    }
}
