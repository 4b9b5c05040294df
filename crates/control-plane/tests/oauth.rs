//! Logging in by other sites, against one that the test runs: who comes in, who does not, and what a site cannot make us believe.

mod replica;
mod site;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use control_plane::account_settings::AccountSettings;
use control_plane::oauth_settings::OauthSettings;
use replica::{Answer, Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};
use site::{CLIENT, Lie, Person, SECRET, Site, person};
use url::Url;

fn settings(site: &Site, signup: &str) -> AccountSettings {
    let text = |text: &str| Some(text.to_owned());
    AccountSettings {
        signup: text(signup),
        public_url: text("http://wrenn.test/"),
        oauth: OauthSettings {
            oidc_issuer: text(&site.url),
            oidc_client_id: text(CLIENT),
            oidc_client_secret: text(SECRET),
            github_client_id: text(CLIENT),
            github_client_secret: text(SECRET),
            github_url: text(&site.url),
            github_api_url: Some(format!("{}/api", site.url)),
        },
        ..AccountSettings::default()
    }
}

/// Keeps cookies, and goes where a test sends it.
struct Browser<'a> {
    replica: &'a Replica,
    http: reqwest::Client,
    cookies: HashMap<String, String>,
}

impl<'a> Browser<'a> {
    fn new(replica: &'a Replica) -> Self {
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
        Self { replica, http, cookies: HashMap::new() }
    }

    async fn get(&mut self, path: &str) -> Answer {
        let cookies: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let request = self.http.get(format!("{}{path}", self.replica.url)).header("cookie", cookies.join("; "));
        let answer = self.replica.send(Who::Nobody, request).await;
        for set in answer.headers.get_all("set-cookie") {
            let set = set.to_str().unwrap();
            assert!(set.contains("HttpOnly") && set.contains("SameSite=Lax"), "{set}");
            let (name, value) = set.split(';').next().unwrap().split_once('=').unwrap();
            if value.is_empty() {
                self.cookies.remove(name)
            } else {
                self.cookies.insert(name.to_owned(), value.to_owned())
            };
        }
        answer
    }

    /// Where the site is asked.
    async fn begin(&mut self, provider: &str, intent: &str) -> Url {
        let answer = self.get(&format!("/auth/oauth/{provider}?intent={intent}")).await;
        assert_eq!(answer.status, 303, "{}", answer.body);
        answer.headers["location"].to_str().unwrap().parse().unwrap()
    }

    async fn back(&mut self, provider: &str, asked: &Url, code: &str) -> Answer {
        let query: HashMap<String, String> = asked.query_pairs().into_owned().collect();
        assert_eq!(query["redirect_uri"], format!("http://wrenn.test/auth/oauth/{provider}/callback"));
        self.get(&format!("/auth/oauth/{provider}/callback?code={code}&state={}", query["state"])).await
    }

    async fn log_in(&mut self, site: &Site, provider: &str, intent: &str, who: &Person, lie: Lie) -> Answer {
        let asked = self.begin(provider, intent).await;
        let code = site.grant(&asked, who, lie);
        self.back(provider, &asked, &code).await
    }

    async fn me(&mut self) -> Value {
        let me = self.get("/v1/me").await;
        assert_eq!(me.status, 200, "{}", me.body);
        me.body
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_logs_in_there_is_in_here() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    for (provider, subject, email) in [("oidc", "s1", "ada@example.org"), ("github", "77", "grace@example.org")] {
        let who = person(subject, email);
        let mut browser = Browser::new(&replica);
        let unknown = browser.log_in(&site, provider, "login", &who, Lie::None).await;
        assert_eq!(unknown.error(), (403, "no_account"));
        let made = browser.log_in(&site, provider, "signup", &who, Lie::None).await;
        assert_eq!(
            (made.status.as_u16(), made.headers["location"].to_str().unwrap()),
            (303, "http://wrenn.test/"),
            "{}",
            made.body
        );
        assert!(!browser.cookies.contains_key("wrenn_oauth"), "the ticket is used up");
        let me = browser.me().await;
        assert_eq!(
            (&me["email"], &me["has_password"], &me["providers"]),
            (&json!(email), &json!(false), &json!([provider]))
        );
        // By what the site calls the person, whatever the address is now.
        let moved = Person { is_verified: false, ..person(subject, "elsewhere@example.org") };
        let mut other = Browser::new(&replica);
        assert_eq!(other.log_in(&site, provider, "login", &moved, Lie::None).await.status, 303);
        assert_eq!(other.me().await["user_id"], me["user_id"]);
        // What a program does with a cookie needs its token, as after any other login.
        let csrf = me["csrf_token"].as_str().unwrap();
        assert_eq!(csrf.len(), 64);
        // One who is put out is out.
        let id: model::ids::UserId = me["user_id"].as_str().unwrap().parse().unwrap();
        replica.database.sql(&format!("update users set status = 'disabled' where id = '{}'", id.0)).await;
        assert_eq!(other.log_in(&site, provider, "login", &who, Lie::None).await.error(), (403, "account_disabled"));
    }
    assert_eq!(replica.audited("user.create").await, 3, "with the first administrator");
    let mut browser = Browser::new(&replica);
    for path in ["/auth/oauth/gitlab", "/auth/oauth/gitlab/callback?code=x&state=y", "/auth/oauth/gitlab?intent=signup"]
    {
        assert_eq!(browser.get(path).await.error(), (404, "provider_not_found"), "{path}");
    }
    assert_eq!(browser.get("/auth/oauth/oidc?intent=x").await.error(), (400, "invalid_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_opens_an_account_when_both_sides_have_verified_it() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    let ada = replica.person("ada@example.org").await;
    let enter = async |who: &Person, intent: &str| {
        let mut browser = Browser::new(&replica);
        let answer = browser.log_in(&site, "oidc", intent, who, Lie::None).await;
        (answer, browser)
    };
    let unverified = Person { is_verified: false, ..person("s1", "ada@example.org") };
    assert_eq!(enter(&unverified, "login").await.0.error(), (403, "email_not_verified"));
    replica.database.sql(&format!("update users set status = 'pending' where id = '{}'", ada.id.0)).await;
    assert_eq!(enter(&person("s1", "ADA@example.org"), "signup").await.0.error(), (403, "account_not_activated"));
    replica.database.sql(&format!("update users set status = 'disabled' where id = '{}'", ada.id.0)).await;
    assert_eq!(enter(&person("s1", "ada@example.org"), "login").await.0.error(), (403, "account_disabled"));
    replica.database.sql(&format!("update users set status = 'active' where id = '{}'", ada.id.0)).await;
    assert_eq!(replica.database.sql("select count(*) from identities").await.trim(), "0");
    let (answer, mut browser) = enter(&person("s1", "ada@example.org"), "login").await;
    assert_eq!(answer.status, 303, "{}", answer.body);
    assert_eq!(browser.me().await["user_id"], json!(ada.id.to_string()));
    assert_eq!(replica.audited("user.connect").await, 1);
    // Somebody else who has the address there now does not get in.
    assert_eq!(enter(&person("s2", "ada@example.org"), "login").await.0.error(), (409, "conflict"));
    // Addresses of GitHub count when they are primary and verified; the one of the profile never does.
    let mut browser = Browser::new(&replica);
    replica.person("victim@example.org").await;
    replica.person("second@example.org").await;
    let unverified = Person { is_verified: false, ..person("5", "x@example.org") };
    let refused = browser.log_in(&site, "github", "signup", &unverified, Lie::None).await;
    assert_eq!(refused.error(), (403, "email_not_verified"));
    // What is not in the token is asked for.
    site.be_thin();
    let (answer, mut browser) = enter(&person("s9", "Thin@Example.org"), "signup").await;
    assert_eq!(answer.status, 303, "{}", answer.body);
    assert_eq!(browser.me().await["email"], "thin@example.org");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_sign_up_is_closed_nobody_new_comes_in() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "closed")).await;
    let mut browser = Browser::new(&replica);
    assert_eq!(browser.get("/auth/oauth/oidc?intent=signup").await.error(), (403, "forbidden"));
    let unknown = browser.log_in(&site, "oidc", "login", &person("s1", "ada@example.org"), Lie::None).await;
    assert_eq!(unknown.error(), (403, "no_account"));
    assert_eq!(replica.database.sql("select count(*) from users").await.trim(), "1");
    replica.person("ada@example.org").await;
    let known = browser.log_in(&site, "oidc", "login", &person("s1", "ada@example.org"), Lie::None).await;
    assert_eq!(known.status, 303, "{}", known.body);
}

/// Nothing but a token that the issuer has signed for us, for this login, lets anybody in.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_site_says_is_believed_only_as_it_must_be() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    let ada = person("s1", "ada@example.org");
    for lie in [
        Lie::Nonce,
        Lie::Audience,
        Lie::Issuer,
        Lie::Expired,
        Lie::Key,
        Lie::AlgorithmNone,
        Lie::Hmac,
        Lie::NoIdToken,
        Lie::Fails,
        Lie::Redirects,
        Lie::Floods,
        Lie::Nonsense,
    ] {
        let mut browser = Browser::new(&replica);
        let answer = browser.log_in(&site, "oidc", "signup", &ada, lie).await;
        assert_eq!(answer.error(), (502, "provider_error"), "{lie:?}");
        assert!(!browser.cookies.contains_key("wrenn_session"), "{lie:?}");
    }
    let mut browser = Browser::new(&replica);
    assert_eq!(
        browser.log_in(&site, "github", "signup", &person("7", "g@example.org"), Lie::Fails).await.error(),
        (502, "provider_error")
    );
    assert_eq!(replica.database.sql("select count(*) from users").await.trim(), "1");
    // The same, honest. And by a key that came after the keys were looked at.
    assert_eq!(browser.log_in(&site, "oidc", "signup", &ada, Lie::None).await.status, 303);
    site.change_key();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(Browser::new(&replica).log_in(&site, "oidc", "login", &ada, Lie::None).await.status, 303);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_for_the_browser_that_asked_and_once() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    let ada = person("s1", "ada@example.org");
    let mut browser = Browser::new(&replica);
    let asked = browser.begin("oidc", "signup").await;
    let code = site.grant(&asked, &ada, Lie::None);
    let refused = (400, "invalid_login");
    // Another browser, which a link was sent to; a wrong state; another site's way back; a cookie that is none.
    assert_eq!(Browser::new(&replica).back("oidc", &asked, &code).await.error(), refused);
    let mut other = Browser::new(&replica);
    other.begin("oidc", "signup").await;
    assert_eq!(other.back("oidc", &asked, &code).await.error(), refused, "login CSRF");
    for state in ["", "x", &"x".repeat(5000)] {
        let path = format!("/auth/oauth/oidc/callback?code={code}&state={state}");
        assert_eq!(browser.get(&path).await.error(), refused, "{state}");
    }
    let state = asked.query_pairs().find(|(name, _)| name == "state").unwrap().1.into_owned();
    assert_eq!(browser.get(&format!("/auth/oauth/github/callback?code={code}&state={state}")).await.error(), refused);
    let ticket = browser.cookies.insert("wrenn_oauth".to_owned(), "AAAA".to_owned()).unwrap();
    assert_eq!(browser.back("oidc", &asked, &code).await.error(), refused);
    browser.cookies.insert("wrenn_oauth".to_owned(), ticket.clone());
    assert_eq!(browser.back("oidc", &asked, &code).await.status, 303, "none of that used it up");
    // Replayed, with the ticket that was good.
    browser.cookies.insert("wrenn_oauth".to_owned(), ticket);
    assert_eq!(browser.back("oidc", &asked, &code).await.error(), refused);
    // A code that was used, or never was, in a login that is new.
    let asked = browser.begin("oidc", "login").await;
    assert_eq!(browser.back("oidc", &asked, &code).await.error(), refused, "the issuer knows it no more");
    let asked = browser.begin("github", "login").await;
    assert_eq!(browser.back("github", &asked, "nonsense").await.error(), refused);
    // A code that was stolen from another login is of no use without that one's verifier.
    let (asked, theirs) = (browser.begin("oidc", "login").await, other.begin("oidc", "login").await);
    let stolen = site.grant(&theirs, &ada, Lie::None);
    assert_eq!(browser.back("oidc", &asked, &stolen).await.error(), refused, "PKCE");
    // Somebody said no there.
    let asked = browser.begin("oidc", "login").await;
    let state = asked.query_pairs().find(|(name, _)| name == "state").unwrap().1.into_owned();
    let path = format!("/auth/oauth/oidc/callback?error=access_denied&state={state}");
    assert_eq!(browser.get(&path).await.error(), (403, "forbidden"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_is_away_is_said_to_be() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    let ada = person("s1", "ada@example.org");
    let mut browser = Browser::new(&replica);
    let began = Instant::now();
    assert_eq!(browser.log_in(&site, "oidc", "login", &ada, Lie::Hangs).await.error(), (504, "deadline_exceeded"));
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let asked = browser.begin("oidc", "login").await;
    let code = site.grant(&asked, &ada, Lie::None);
    site.stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(browser.back("oidc", &asked, &code).await.error(), (502, "provider_error"));
    // One that was never there: nothing else of the platform needs it.
    let mut never = settings(&site, "open");
    never.oauth.oidc_issuer = Some("http://127.0.0.1:1".to_owned());
    let replica = Replica::with_accounts(never).await;
    assert_eq!(Browser::new(&replica).get("/auth/oauth/oidc").await.error(), (502, "provider_error"));
    assert_eq!(Browser::new(&replica).get("/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_in_binds_and_unbinds_another_site() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "closed")).await;
    let ada = replica.person("ada@example.org").await;
    let connect = async |provider: &str| {
        let path = format!("/v1/me/providers/{provider}/connect");
        let answer = replica.as_person(&ada, Method::GET, &path, None).await;
        let mut browser = Browser::new(&replica);
        if let Some(set) = answer.headers.get("set-cookie") {
            let (name, value) = set.to_str().unwrap().split(';').next().unwrap().split_once('=').unwrap();
            browser.cookies.insert(name.to_owned(), value.to_owned());
        }
        (answer, browser)
    };
    let bind = async |who: &Person| {
        let (answer, mut browser) = connect("oidc").await;
        let asked: Url = answer.body["auth_url"].as_str().unwrap().parse().unwrap();
        let code = site.grant(&asked, who, Lie::None);
        let done = browser.back("oidc", &asked, &code).await;
        assert!(!browser.cookies.contains_key("wrenn_session"), "it is no login");
        done
    };
    assert_eq!(connect("gitlab").await.0.error(), (404, "provider_not_found"));
    // Of any address, also one that nobody has verified: it is the person who is here that says so.
    let elsewhere = Person { is_verified: false, ..person("s1", "other@example.org") };
    assert_eq!(bind(&elsewhere).await.status, 303);
    assert_eq!(bind(&person("s2", "other@example.org")).await.error(), (409, "conflict"), "one of a site");
    let mut browser = Browser::new(&replica);
    assert_eq!(browser.log_in(&site, "oidc", "login", &elsewhere, Lie::None).await.status, 303);
    assert_eq!(browser.me().await["user_id"], json!(ada.id.to_string()));
    // A session that has ended meanwhile binds nothing.
    let grace = replica.person("grace@example.org").await;
    let answer = replica.as_person(&grace, Method::GET, "/v1/me/providers/oidc/connect", None).await;
    let asked: Url = answer.body["auth_url"].as_str().unwrap().parse().unwrap();
    let mut browser = Browser::new(&replica);
    let set = answer.headers["set-cookie"].to_str().unwrap().to_owned();
    let (name, value) = set.split(';').next().unwrap().split_once('=').unwrap();
    browser.cookies.insert(name.to_owned(), value.to_owned());
    assert_eq!(replica.as_person(&grace, Method::POST, "/v1/auth/logout", None).await.status, 204);
    let code = site.grant(&asked, &person("s3", "g@example.org"), Lie::None);
    assert_eq!(browser.back("oidc", &asked, &code).await.error(), (401, "unauthorized"));
    // Something is left by which to log in.
    let remove = async || replica.as_person(&ada, Method::DELETE, "/v1/me/providers/oidc", None).await;
    assert_eq!(remove().await.error(), (400, "last_login_method"));
    let password = json!({"new_password": "correct horse", "confirm_password": "correct horse"});
    assert_eq!(replica.as_person(&ada, Method::POST, "/v1/me/password", Some(password)).await.status, 204);
    assert_eq!(remove().await.status, 204);
    assert_eq!(remove().await.error(), (404, "provider_not_found"));
    assert_eq!((replica.audited("user.connect").await, replica.audited("user.disconnect").await), (1, 1));
}

/// As often as passwords may be tried, and not more.
#[tokio::test(flavor = "multi_thread")]
async fn logins_are_counted() {
    let site = Site::start().await;
    let replica = Replica::with_accounts(settings(&site, "open")).await;
    let ada = person("s1", "ada@example.org");
    let mut codes = Vec::new();
    for _ in 0..21 {
        let mut browser = Browser::new(&replica);
        codes.push(browser.log_in(&site, "oidc", "signup", &ada, Lie::None).await.status.as_u16());
    }
    assert_eq!((codes[0], codes[19], codes[20]), (303, 303, 429));
}
