//! Counts what the agent has in the kernel's network, for whoever looks for leaks. Slots that are kept ready are not counted: how many
//! there are at an instant says nothing.

use std::collections::BTreeSet;

use super::{Network, NetworkError, SlotId, namespace, outer};
use crate::tool;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    pub namespaces: u64,
    pub links: u64,
    pub taps: u64,
    pub nft_tables: u64,
}

/// What bears the agent's tag.
struct Seen {
    outer: bool,
    uplink: bool,
    /// By slot; None for a name that is no slot's.
    namespaces: Vec<Option<SlotId>>,
    links: Vec<Option<SlotId>>,
    taps: Vec<Option<SlotId>>,
    nft_tables: u64,
}

impl Network {
    /// `apart`: other slots that are not counted. Asked after the look.
    pub async fn census(&self, apart: impl FnOnce() -> BTreeSet<SlotId>) -> Result<Census, NetworkError> {
        let tag = self.tag().to_owned();
        let seen = super::pool::blocking(move || look(&tag)).await?;
        // Asked after the look: a slot that was being made ahead then is ready or still in the making now.
        let ahead: BTreeSet<SlotId> = self.ahead().into_iter().chain(apart()).collect();
        let count = |slots: &[Option<SlotId>]| {
            let used = |slot: &&Option<SlotId>| slot.is_none_or(|slot| !ahead.contains(&slot));
            u64::try_from(slots.iter().filter(used).count()).unwrap_or(u64::MAX)
        };
        Ok(Census {
            namespaces: u64::from(seen.outer) + count(&seen.namespaces),
            links: u64::from(seen.uplink) + count(&seen.links),
            taps: count(&seen.taps),
            nft_tables: seen.nft_tables,
        })
    }
}

fn look(tag: &str) -> Result<Seen, NetworkError> {
    let outer = outer::name(tag);
    let prefix = format!("{outer}-");
    let number = |text: &str| text.parse().ok().and_then(SlotId::new);
    let names = namespace::names(&prefix);
    let slot = |name: &str| name.strip_prefix(&prefix).and_then(number);
    let links = links_inside(&outer).into_iter().filter_map(|link| {
        let digits = link.strip_prefix('s')?.to_owned();
        digits.starts_with(|first: char| first.is_ascii_digit()).then(|| number(&digits))
    });
    let has_tap = |name: &&String| links_inside(name).contains("tap0");
    let taps = names.iter().filter(has_tap).map(|name| slot(name)).collect();
    let tables = tool::run("nft", &["list", "tables"], "")
        .map_err(|cause| NetworkError::Tool { what: "list the host's tables", cause })?;
    let own_table = format!("wrenn_{tag}");
    Ok(Seen {
        outer: namespace::path(&outer).exists(),
        uplink: links_here().contains(&outer::host_link(tag)),
        links: links.collect(),
        taps,
        namespaces: names.iter().map(|name| slot(name)).collect(),
        nft_tables: tables.lines().filter(|line| line.split_whitespace().last() == Some(&own_table)).count() as u64,
    })
}

/// None in a namespace that is gone.
fn links_inside(name: &str) -> BTreeSet<String> {
    namespace::inside(name, links_here).unwrap_or_default()
}

/// Of the calling thread's namespace, which is what the kernel shows there.
fn links_here() -> BTreeSet<String> {
    let entries = std::fs::read_dir("/proc/sys/net/ipv4/conf").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
