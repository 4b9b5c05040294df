//! Whether this start has to register the host, where, and under which address.

use crate::config::{BadSetting, Config, bad};
use crate::credentials::{Credentials, fingerprint};

pub struct Admittance {
    /// A registration token that was not spent yet.
    pub token: Option<String>,
    pub cp_url: url::Url,
    pub address: String,
}

impl Admittance {
    pub fn new(config: &Config, known: Option<&Credentials>) -> Result<Self, BadSetting> {
        let address = config.address.clone().or_else(|| known.map(|known| known.host.address.clone())).ok_or_else(|| {
            bad("--address", "is missing", "give HOST:PORT by which the control plane reaches this agent, for example --address 10.0.0.5:50051")
        })?;
        // The same command line at each start must not spend the same token again.
        let token = config
            .register
            .clone()
            .filter(|token| known.is_none_or(|known| known.host.registered_with != fingerprint(token)));
        if token.is_none() && known.is_none() {
            return Err(bad(
                "--register",
                "is missing, and this host is not registered yet",
                "make a token with POST /v1/hosts",
            ));
        }
        // One that is given counts: the control plane may have moved since it was kept.
        let cp_url =
            config.cp_url.clone().or_else(|| known.map(|known| known.host.cp_url.clone())).ok_or_else(|| {
                bad("WRENN_CP_URL", "is missing", "give the control plane's URL, for example http://10.0.0.1:8000")
            })?;
        Ok(Self { token, cp_url, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(register: Option<&str>, address: Option<&str>, cp_url: Option<&str>) -> Config {
        use clap::Parser as _;
        let mut config = Config::try_from(crate::config::Args::try_parse_from(["wrenn-agent"]).unwrap()).unwrap();
        config.register = register.map(ToOwned::to_owned);
        config.address = address.map(ToOwned::to_owned);
        config.cp_url = cp_url.map(|url| url.parse().unwrap());
        config
    }

    #[test]
    fn a_first_start_needs_token_address_and_url() {
        let setting = |config: &Config| Admittance::new(config, None).err().map(|error| error.setting);
        assert_eq!(setting(&config(None, Some("a:1"), Some("http://x"))), Some("--register"));
        assert_eq!(setting(&config(Some("t"), None, Some("http://x"))), Some("--address"));
        assert_eq!(setting(&config(Some("t"), Some("a:1"), None)), Some("WRENN_CP_URL"));
        assert_eq!(setting(&config(Some("t"), Some("a:1"), Some("http://x"))), None);
    }
}
