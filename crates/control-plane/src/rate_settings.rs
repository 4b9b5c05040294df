//! Settings of how many requests are taken from one sender and for one team.

use crate::http::limits::Rate;

/// One key that creates as fast as a large platform can and lists beside it stays below. On each replica.
const PER_KEY: u32 = 2000;
/// Several such keys.
const PER_TEAM: u32 = 5000;

#[derive(Debug, Clone, Default, clap::Args)]
pub struct RateSettings {
    /// Requests a second of one API key or person, on each replica; twice as many at once; 0 is no limit [default: 2000]
    #[arg(long, env = "WRENN_RATE_PER_KEY", value_parser = clap::value_parser!(u32).range(0..=1_000_000), global = true)]
    pub rate_per_key: Option<u32>,
    /// Requests a second of one team, on each replica; twice as many at once; 0 is no limit [default: 5000]
    #[arg(long, env = "WRENN_RATE_PER_TEAM", value_parser = clap::value_parser!(u32).range(0..=1_000_000), global = true)]
    pub rate_per_team: Option<u32>,
}

/// None: no limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    pub per_key: Option<Rate>,
    pub per_team: Option<Rate>,
}

impl RateSettings {
    pub fn rates(&self) -> Rates {
        Rates {
            per_key: Rate::per_sec(self.rate_per_key.unwrap_or(PER_KEY)),
            per_team: Rate::per_sec(self.rate_per_team.unwrap_or(PER_TEAM)),
        }
    }
}
