//! Settings of the sites by which people log in. Each is there when its id and secret are.

use url::Url;

use crate::config::Misconfigured;

#[derive(Debug, Clone, Default, clap::Args)]
pub struct OauthSettings {
    /// Log in by an issuer of OpenID Connect, such as https://login.example.org/realms/us; needs WRENN_PUBLIC_URL
    #[arg(long, env = "OAUTH_OIDC_ISSUER", global = true)]
    pub oidc_issuer: Option<String>,
    #[arg(long, env = "OAUTH_OIDC_CLIENT_ID", global = true)]
    pub oidc_client_id: Option<String>,
    #[arg(long, env = "OAUTH_OIDC_CLIENT_SECRET", hide_env_values = true, global = true)]
    pub oidc_client_secret: Option<String>,
    /// Log in by GitHub; needs WRENN_PUBLIC_URL
    #[arg(long, env = "OAUTH_GITHUB_CLIENT_ID", global = true)]
    pub github_client_id: Option<String>,
    #[arg(long, env = "OAUTH_GITHUB_CLIENT_SECRET", hide_env_values = true, global = true)]
    pub github_client_secret: Option<String>,
    /// Another GitHub than the public one: where people log in [default: https://github.com]
    #[arg(long, env = "OAUTH_GITHUB_URL", global = true)]
    pub github_url: Option<String>,
    /// And where its API is [default: https://api.github.com]
    #[arg(long, env = "OAUTH_GITHUB_API_URL", global = true)]
    pub github_api_url: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct OauthConfig {
    pub issuer: Option<IssuerSite>,
    pub github: Option<GitHubSite>,
}

#[derive(Clone)]
pub struct IssuerSite {
    /// Exactly as the issuer calls itself: with a slash at the end or without.
    pub issuer: String,
    pub client_id: String,
    pub client_secret: String,
}

#[derive(Clone)]
pub struct GitHubSite {
    pub url: Url,
    pub api_url: Url,
    pub client_id: String,
    pub client_secret: String,
}

impl std::fmt::Debug for IssuerSite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuerSite").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for GitHubSite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GitHubSite").field("url", &self.url.as_str()).finish_non_exhaustive()
    }
}

impl OauthSettings {
    /// `has_public_url`: the sites are told where to send people back to.
    pub fn check(self, has_public_url: bool) -> Result<OauthConfig, Misconfigured> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let issuer = match (given(self.oidc_issuer), given(self.oidc_client_id), given(self.oidc_client_secret)) {
            (None, None, None) => None,
            (Some(issuer), Some(client_id), Some(client_secret)) => {
                address("OAUTH_OIDC_ISSUER", &issuer)?;
                Some(IssuerSite { issuer, client_id, client_secret })
            }
            _ => {
                return Err(half("OAUTH_OIDC_ISSUER", "set OAUTH_OIDC_ISSUER, _CLIENT_ID and _CLIENT_SECRET, or none"));
            }
        };
        let github = match (given(self.github_client_id), given(self.github_client_secret)) {
            (None, None) => None,
            (Some(client_id), Some(client_secret)) => {
                let url = given(self.github_url).unwrap_or_else(|| "https://github.com".to_owned());
                let api_url = given(self.github_api_url).unwrap_or_else(|| "https://api.github.com".to_owned());
                Some(GitHubSite {
                    url: address("OAUTH_GITHUB_URL", &url)?,
                    api_url: address("OAUTH_GITHUB_API_URL", &api_url)?,
                    client_id,
                    client_secret,
                })
            }
            _ => return Err(half("OAUTH_GITHUB_CLIENT_ID", "set OAUTH_GITHUB_CLIENT_ID and _CLIENT_SECRET, or none")),
        };
        if (issuer.is_some() || github.is_some()) && !has_public_url {
            return Err(Misconfigured {
                setting: "WRENN_PUBLIC_URL",
                problem: "is not set, and the sites of OAUTH_* must know where to send people back to".to_owned(),
                cure: "give it as https://wrenn.example.org",
            });
        }
        Ok(OauthConfig { issuer, github })
    }
}

fn half(setting: &'static str, cure: &'static str) -> Misconfigured {
    Misconfigured { setting, problem: "is set in part".to_owned(), cure }
}

fn address(setting: &'static str, text: &str) -> Result<Url, Misconfigured> {
    let url = Url::parse(text).ok().filter(crate::oauth::may_be_asked);
    url.ok_or_else(|| Misconfigured {
        setting,
        problem: format!("{text:?} is not the address of a site over https"),
        cure: "give it as https://login.example.org; http is for a site on this machine only",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_setting_is_wrong() {
        let text = |text: &str| Some(text.to_owned());
        let none = OauthSettings::default();
        let github = OauthSettings { github_client_id: text("a"), github_client_secret: text("b"), ..none.clone() };
        let oidc = OauthSettings {
            oidc_issuer: text("https://login.example.org"),
            oidc_client_id: text("a"),
            oidc_client_secret: text("b"),
            ..none.clone()
        };
        for (settings, has_public_url, setting) in [
            (OauthSettings { github_client_secret: None, ..github.clone() }, true, "OAUTH_GITHUB_CLIENT_ID"),
            (OauthSettings { oidc_client_id: text(""), ..oidc.clone() }, true, "OAUTH_OIDC_ISSUER"),
            (
                OauthSettings { oidc_issuer: text("http://login.example.org"), ..oidc.clone() },
                true,
                "OAUTH_OIDC_ISSUER",
            ),
            (OauthSettings { github_url: text("nowhere"), ..github.clone() }, true, "OAUTH_GITHUB_URL"),
            (oidc.clone(), false, "WRENN_PUBLIC_URL"),
        ] {
            assert_eq!(settings.check(has_public_url).unwrap_err().setting, setting);
        }
        let both = OauthSettings { oidc_issuer: oidc.oidc_issuer, ..github };
        assert_eq!(both.check(true).unwrap_err().setting, "OAUTH_OIDC_ISSUER");
        assert!(none.check(false).unwrap().issuer.is_none());
        let here = OauthSettings {
            oidc_issuer: text("http://127.0.0.1:1"),
            oidc_client_id: text("a"),
            oidc_client_secret: text("hidden"),
            ..OauthSettings::default()
        };
        let checked = here.check(true).unwrap();
        assert!(checked.issuer.is_some() && !format!("{checked:?}").contains("hidden"));
    }
}
