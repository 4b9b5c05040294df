//! Settings of accounts: who may sign up, where links lead, and what sends mail.

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use crate::config::Misconfigured;
use crate::mail::{Security, Smtp};
use crate::oauth_settings::{OauthConfig, OauthSettings};

#[derive(Debug, Clone, Default, clap::Args)]
pub struct AccountSettings {
    /// Whether anybody may sign up: open or closed [default: closed]. Closed, people come by invitation, or are made by an administrator
    #[arg(long, env = "WRENN_SIGNUP", global = true)]
    pub signup: Option<String>,
    /// Where people reach this platform, for links in mail: https://wrenn.example.org. With https, cookies are for https only
    #[arg(long, env = "WRENN_PUBLIC_URL", global = true)]
    pub public_url: Option<String>,
    /// Server that takes mail; without one, links go to the log
    #[arg(long, env = "WRENN_SMTP_HOST", global = true)]
    pub smtp_host: Option<String>,
    /// Default: 587 for starttls, 465 for tls, 25 for none
    #[arg(long, env = "WRENN_SMTP_PORT", global = true)]
    pub smtp_port: Option<u16>,
    /// starttls, tls or none [default: starttls]
    #[arg(long, env = "WRENN_SMTP_SECURITY", global = true)]
    pub smtp_security: Option<Security>,
    #[arg(long, env = "WRENN_SMTP_USER", global = true)]
    pub smtp_user: Option<String>,
    #[arg(long, env = "WRENN_SMTP_PASSWORD", hide_env_values = true, global = true)]
    pub smtp_password: Option<String>,
    /// Certificates that are trusted beside the system's when mail is sent, a PEM file: for a server with one of your own
    #[arg(long, env = "WRENN_SMTP_CA_FILE", global = true)]
    pub smtp_ca_file: Option<PathBuf>,
    /// For tests, which cannot wait for that: how often the rights of what is open are looked at again, in seconds
    #[arg(long, env = "WRENN_TEST_RIGHTS_EVERY_SEC", hide = true, global = true)]
    pub rights_every_sec: Option<u32>,
    #[command(flatten)]
    pub oauth: OauthSettings,
    /// From whom mail comes: Wrenn <wrenn@example.org>
    #[arg(long, env = "WRENN_SMTP_FROM", global = true)]
    pub smtp_from: Option<String>,
}

pub struct AccountConfig {
    pub is_signup_open: bool,
    pub public_url: Url,
    pub smtp: Option<Smtp>,
    pub oauth: OauthConfig,
    /// Between looks at the rights of what is open.
    pub rights_every: Duration,
}

/// A member who was removed is out of everything within a minute: this, and the time of one query, and of a frame that is being sent.
const RIGHTS_EVERY_SEC: u32 = 20;

const PUBLIC_URL_DEFAULT: &str = "http://localhost:8000";

impl AccountSettings {
    pub fn check(self) -> Result<AccountConfig, Misconfigured> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let is_signup_open = match given(self.signup).as_deref() {
            None | Some("closed") => false,
            Some("open") => true,
            Some(other) => {
                return Err(Misconfigured {
                    setting: "WRENN_SIGNUP",
                    problem: format!("{other:?} is neither open nor closed"),
                    cure: "give open, or leave it unset",
                });
            }
        };
        let has_public_url = self.public_url.as_ref().is_some_and(|url| !url.is_empty());
        let oauth = self.oauth.check(has_public_url)?;
        let url = given(self.public_url).unwrap_or_else(|| PUBLIC_URL_DEFAULT.to_owned());
        let public_url = Url::parse(&url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let public_url = public_url.ok_or_else(|| Misconfigured {
            setting: "WRENN_PUBLIC_URL",
            problem: format!("{url:?} is not the address of a site"),
            cure: "give it as https://wrenn.example.org",
        })?;
        let every_sec = self.rights_every_sec.unwrap_or(RIGHTS_EVERY_SEC).clamp(1, RIGHTS_EVERY_SEC);
        let rights_every = Duration::from_secs(every_sec.into());
        let Some(host) = given(self.smtp_host) else {
            return Ok(AccountConfig { is_signup_open, public_url, smtp: None, oauth, rights_every });
        };
        let from = given(self.smtp_from).and_then(|from| from.parse().ok()).ok_or_else(|| Misconfigured {
            setting: "WRENN_SMTP_FROM",
            problem: "is not set, or is no address".to_owned(),
            cure: "give it as wrenn@example.org or \"Wrenn <wrenn@example.org>\"",
        })?;
        let credentials = match (given(self.smtp_user), given(self.smtp_password)) {
            (Some(user), Some(password)) => Some((user, password)),
            (None, None) => None,
            _ => {
                return Err(Misconfigured {
                    setting: "WRENN_SMTP_USER",
                    problem: "is set without WRENN_SMTP_PASSWORD, or the other way round".to_owned(),
                    cure: "set both, or none",
                });
            }
        };
        let security = self.smtp_security.unwrap_or(Security::Starttls);
        let port = self.smtp_port.unwrap_or(security.port());
        let ca_file = self.smtp_ca_file.filter(|path| !path.as_os_str().is_empty());
        let smtp = Smtp { host, port, security, credentials, from, ca_file };
        Ok(AccountConfig { is_signup_open, public_url, smtp: Some(smtp), oauth, rights_every })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_setting_is_wrong() {
        let text = |text: &str| Some(text.to_owned());
        let none = AccountSettings::default();
        for (settings, setting) in [
            (AccountSettings { signup: text("yes"), ..none.clone() }, "WRENN_SIGNUP"),
            (AccountSettings { public_url: text("wrenn.example.org"), ..none.clone() }, "WRENN_PUBLIC_URL"),
            (AccountSettings { smtp_host: text("mail"), ..none.clone() }, "WRENN_SMTP_FROM"),
            (
                AccountSettings {
                    smtp_host: text("mail"),
                    smtp_from: text("a@b.org"),
                    smtp_user: text("u"),
                    ..none.clone()
                },
                "WRENN_SMTP_USER",
            ),
        ] {
            assert_eq!(settings.check().err().unwrap().setting, setting);
        }
        let checked = none.check().unwrap();
        assert!(!checked.is_signup_open && checked.smtp.is_none());
        let mail =
            AccountSettings { smtp_host: text("mail"), smtp_from: text("W <a@b.org>"), ..AccountSettings::default() };
        assert_eq!(mail.check().unwrap().smtp.unwrap().port, 587);
    }
}
