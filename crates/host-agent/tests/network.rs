//! The sandboxes' networks on the real kernel, in a world of their own: the tests below run again as a child in private network and mount
//! namespaces, which is the "host" there. Nothing of it is seen outside, and all of it goes with the child, however that ends.
//!
//! A guest is this program at the other end of the tap, writing frames as a hostile guest would; what it reached is counted at the targets.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use host_agent::network::{Census, GATEWAY_IP, GUEST_IP, GUEST_MAC, Network, NetworkConfig, SlotId, TAP_MAC};

const INSIDE: &str = "NETWORK_TEST_INSIDE";
const A: &str = "7e57aaaa";
const B: &str = "7e57bbbb";
const PORT: u16 = 9999;
const WAIT: Duration = Duration::from_secs(10);

/// Runs the test of this name in a world of its own. True inside of it.
fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return false;
    }
    let world =
        "mkdir -p /run/netns && mount -t tmpfs none /run/netns && mount --make-shared /run/netns && exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "sh", "-ec", world, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    false
}

/// The "internet" and a private network behind the "host".
fn surroundings() {
    let lines = "netns add world
link set lo up
link add h0 type veth peer name w0 netns world
addr add 11.0.0.1/24 dev h0
addr add 10.55.0.1/24 dev h0
link set h0 up
route add default via 11.0.0.2
";
    batch(&[], lines);
    let lines = "link set lo up
addr add 11.0.0.2/24 dev w0
addr add 11.0.0.77/24 dev w0
addr add 10.55.0.2/24 dev w0
addr add 169.254.169.254/32 dev w0
link set w0 up
";
    batch(&["-n", "world"], lines);
}

fn batch(arguments: &[&str], lines: &str) {
    let mut child = Command::new("ip").args(arguments).args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{lines}");
}

/// A socket that lives in a namespace; None: the "host".
fn listener(namespace: Option<&str>) -> UdpSocket {
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    let socket = match namespace {
        None => bind(),
        Some(name) => std::thread::scope(|scope| {
            let enter = || {
                let file = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
                nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                bind()
            };
            scope.spawn(enter).join().unwrap()
        }),
    };
    socket.set_nonblocking(true).unwrap();
    socket
}

/// What has come so far.
fn received(socket: &UdpSocket) -> Vec<String> {
    let mut all = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok(length) = socket.recv(&mut buffer) {
        all.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    all
}

fn mac(text: &str) -> Vec<u8> {
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// A frame with a UDP datagram, from whomever it says.
fn frame(from_mac: &str, from: Ipv4Addr, to: Ipv4Addr, said: &str) -> Vec<u8> {
    let length = |header: usize| u16::try_from(header + said.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend(length(28));
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = mac(TAP_MAC);
    frame.extend(mac(from_mac));
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(PORT.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend(length(8));
    frame.extend([0, 0]);
    frame.extend(said.as_bytes());
    frame
}

struct Guest(std::fs::File);

impl Guest {
    async fn of(network: &Arc<Network>, slot: SlotId) -> Self {
        Self(network.ensure(slot).await.unwrap().tap().open().unwrap().into())
    }

    fn send(&mut self, to: Ipv4Addr, said: &str) {
        self.0.write_all(&frame(GUEST_MAC, GUEST_IP, to, said)).unwrap();
    }

    /// The next frame that fits; None when none comes in time.
    fn hear(&mut self, within: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + within;
        let mut buffer = [0; 2048];
        while Instant::now() < end {
            match self.0.read(&mut buffer) {
                Ok(length) if fits(&buffer[..length]) => return Some(buffer[..length].to_vec()),
                Ok(_) => {}
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        None
    }
}

/// Sends what is allowed until it arrives: what was sent before has come through or not by then.
fn settle(guest: &mut Guest, world: &UdpSocket) -> Vec<String> {
    let end = Instant::now() + WAIT;
    let mut all = Vec::new();
    while !all.iter().any(|said| said == "allowed") {
        assert!(Instant::now() < end, "the internet is not reached");
        guest.send(Ipv4Addr::new(11, 0, 0, 2), "allowed");
        std::thread::sleep(Duration::from_millis(5));
        all.extend(received(world));
    }
    all.retain(|said| said != "allowed");
    all
}

async fn open(tag: &str, premade: usize, in_use: BTreeSet<SlotId>) -> Arc<Network> {
    let deny = vec!["11.0.0.77".to_owned()];
    Network::open(NetworkConfig { tag: tag.to_owned(), premade, in_use, deny }).await.unwrap()
}

fn names(tag: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/run/netns").unwrap().flatten();
    let mut all: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    all.retain(|name| name.contains(tag));
    all.sort();
    all
}

/// The address of the host's end of an agent's uplink.
fn uplink(tag: &str) -> Ipv4Addr {
    let all = nix::ifaddrs::getifaddrs().unwrap();
    let mut own = all.filter(|one| one.interface_name == format!("wu{tag}"));
    own.find_map(|one| Some(one.address?.as_sockaddr_in()?.ip())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_the_internet_and_nothing_else() {
    if !inside("a_guest_reaches_the_internet_and_nothing_else") {
        return;
    }
    surroundings();
    let (a, b) = (open(A, 0, BTreeSet::new()).await, open(B, 0, BTreeSet::new()).await);
    let (first, second, foreign) = (a.reserve().unwrap(), a.reserve().unwrap(), b.reserve().unwrap());
    let mut guest = Guest::of(&a, first).await;
    let (mut sibling, mut stranger) = (Guest::of(&a, second).await, Guest::of(&b, foreign).await);
    let (host, world) = (listener(None), listener(Some("world")));
    let (outer, own_slot) = (listener(Some(&format!("wrn-{A}"))), listener(Some(&format!("wrn-{A}-{first}"))));
    settle(&mut guest, &world);

    let forbidden = [
        ("host, public", Ipv4Addr::new(11, 0, 0, 1)),
        ("host, private", Ipv4Addr::new(10, 55, 0, 1)),
        ("host, uplink", uplink(A)),
        ("host, other agent's uplink", uplink(B)),
        ("host, loopback", Ipv4Addr::LOCALHOST),
        ("private network", Ipv4Addr::new(10, 55, 0, 2)),
        ("metadata", Ipv4Addr::new(169, 254, 169, 254)),
        ("denied by the agent", Ipv4Addr::new(11, 0, 0, 77)),
        ("sibling", second.host_ip()),
        ("itself from outside", first.host_ip()),
        ("gateway", GATEWAY_IP),
        ("broadcast", Ipv4Addr::BROADCAST),
        ("multicast", Ipv4Addr::new(224, 0, 0, 1)),
    ];
    for (what, address) in forbidden {
        guest.send(address, what);
    }
    // As somebody else.
    let internet = Ipv4Addr::new(11, 0, 0, 2);
    guest.0.write_all(&frame("02:fc:00:00:00:99", GUEST_IP, internet, "another MAC")).unwrap();
    guest.0.write_all(&frame(GUEST_MAC, Ipv4Addr::new(10, 55, 0, 9), internet, "another address")).unwrap();
    guest.0.write_all(&frame(GUEST_MAC, GATEWAY_IP, internet, "the gateway's address")).unwrap();
    let mut six = frame(GUEST_MAC, GUEST_IP, internet, "version 6");
    six[12..14].copy_from_slice(&[0x86, 0xdd]);
    guest.0.write_all(&six).unwrap();

    let nothing: Vec<String> = Vec::new();
    assert_eq!(settle(&mut guest, &world), nothing);
    for (what, socket) in [("host", &host), ("outer namespace", &outer), ("slot", &own_slot)] {
        assert_eq!(received(socket), nothing, "{what}");
    }
    // The counter counts.
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"counted", ("127.0.0.1", PORT)).unwrap();
    assert_eq!(received(&host), ["counted"]);
    let ours = |frame: &[u8]| frame.windows(7).any(|part| part == b"sibling");
    assert_eq!(sibling.hear(Duration::from_millis(50), ours), None);
    assert_eq!(stranger.hear(Duration::from_millis(50), ours), None);

    // A VMM that opens its tap by itself stands in the slot's namespace. Taken over by its guest, it reaches from there what root does not
    // hinder it from: nothing.
    let speak = |uid: u32, to: Ipv4Addr| {
        let script = format!("echo from-{uid} >/dev/udp/{to}/{PORT}");
        let uid = uid.to_string();
        let namespace = format!("wrn-{A}-{first}");
        let line = ["netns", "exec", &namespace, "setpriv", "--reuid", &uid, "--clear-groups", "bash", "-c", &script];
        Command::new("ip").args(line).stderr(Stdio::null()).status().unwrap().success()
    };
    for to in [internet, Ipv4Addr::new(10, 55, 0, 1), uplink(A), second.host_ip(), GUEST_IP] {
        assert!(!speak(4242, to), "{to}");
    }
    assert!(speak(0, internet), "the means works");
    assert!(!received(&world).iter().any(|said| said.contains("4242")));

    // The agent reaches its guest, as the gateway; no ARP is needed.
    let dialled = tokio::spawn({
        let a = a.clone();
        async move { a.connect(first, 49_983).await }
    });
    let syn = guest.hear(WAIT, |frame| frame.len() > 36 && frame[23] == 6 && frame[36..38] == 49_983_u16.to_be_bytes());
    let syn = syn.expect("the agent's call does not arrive");
    assert_eq!((&syn[26..30], &syn[30..34]), (&GATEWAY_IP.octets()[..], &GUEST_IP.octets()[..]));
    dialled.abort();
    a.close_all().await.unwrap();
    b.close_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_do_not_meet_and_a_restart_disturbs_nobody() {
    if !inside("two_agents_do_not_meet_and_a_restart_disturbs_nobody") {
        return;
    }
    surroundings();
    let world = listener(Some("world"));
    let (a, b) = (open(A, 1, BTreeSet::new()).await, open(B, 2, BTreeSet::new()).await);
    let idle = Census { namespaces: 1, links: 1, taps: 0, nft_tables: 1 };
    assert_eq!((a.census(BTreeSet::new).await.unwrap(), b.census(BTreeSet::new).await.unwrap()), (idle, idle));
    assert_eq!((names(A).len(), names(B).len()), (2, 3), "the slots made ahead are there");
    assert_ne!(uplink(A), uplink(B));
    let (slot_a, slot_b, gone) = (a.reserve().unwrap(), b.reserve().unwrap(), b.reserve().unwrap());
    let (mut guest_a, mut guest_b) = (Guest::of(&a, slot_a).await, Guest::of(&b, slot_b).await);
    b.ensure(gone).await.unwrap();
    let one = Census { namespaces: 2, links: 2, taps: 1, nft_tables: 1 };
    assert_eq!(a.census(BTreeSet::new).await.unwrap(), one);
    assert_eq!(b.census(BTreeSet::new).await.unwrap(), Census { namespaces: 3, links: 3, taps: 2, ..one });
    settle(&mut guest_a, &world);
    settle(&mut guest_b, &world);

    // The agent dies and comes again; its journals name one slot.
    let identity =
        |name: &str| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(format!("/run/netns/{name}")).unwrap());
    let names_before = [format!("wrn-{B}"), format!("wrn-{B}-{slot_b}")];
    let before = names_before.clone().map(|name| identity(&name));
    drop(b);
    let b = open(B, 0, [slot_b].into()).await;
    assert_eq!(names(B), names_before);
    assert_eq!(names_before.clone().map(|name| identity(&name)), before);
    assert!(!b.claim(slot_b));
    assert_eq!(b.census(BTreeSet::new).await.unwrap(), one);
    settle(&mut guest_b, &world);

    // One ends for good; the other does not notice.
    a.close_all().await.unwrap();
    a.close_all().await.unwrap();
    assert!(names(A).is_empty());
    assert_eq!(a.census(BTreeSet::new).await.unwrap(), Census::default());
    assert_eq!(b.census(BTreeSet::new).await.unwrap(), one);
    settle(&mut guest_b, &world);

    // A slot that is released is gone before its number is free.
    drop(guest_b);
    b.release(slot_b).await.unwrap();
    b.release(slot_b).await.unwrap();
    b.free(slot_b);
    assert_eq!(b.census(BTreeSet::new).await.unwrap(), idle);
    b.close_all().await.unwrap();
    let left = Command::new("sh").args(["-c", "nft list tables; ip -o link; ls /run/netns"]).output().unwrap();
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(!left.contains(A) && !left.contains(B), "{left}");
}

/// The kernel's table of flows, of a namespace or of the "host".
fn flows(namespace: Option<&str>) -> String {
    let mut command = Command::new(if namespace.is_some() { "ip" } else { "cat" });
    if let Some(name) = namespace {
        command.args(["netns", "exec", name, "cat"]);
    }
    let output = command.arg("/proc/net/nf_conntrack").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slots_flows_are_bounded_and_go_with_it() {
    if !inside("a_slots_flows_are_bounded_and_go_with_it") {
        return;
    }
    surroundings();
    let a = open(A, 0, BTreeSet::new()).await;
    let (first, second) = (a.reserve().unwrap(), a.reserve().unwrap());
    let (mut guest, mut sibling) = (Guest::of(&a, first).await, Guest::of(&a, second).await);
    let world = listener(Some("world"));
    settle(&mut guest, &world);
    settle(&mut sibling, &world);
    let (outer, internet) = (format!("wrn-{A}"), Ipv4Addr::new(11, 0, 0, 2));
    let count = |namespace: Option<&str>| flows(namespace).lines().filter(|line| line.contains("11.0.0.2")).count();
    assert_eq!((count(Some(&outer)), count(None)), (2, 2));

    // Another port is another flow.
    let mut bytes = frame(GUEST_MAC, GUEST_IP, internet, "flood");
    for port in 20_000_u16..24_000 {
        bytes[34..36].copy_from_slice(&port.to_be_bytes());
        while guest.0.write_all(&bytes).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // Its neighbour has room.
    settle(&mut sibling, &world);
    let flood = count(None);
    assert!((1000..=2050).contains(&flood), "{flood} flows on the host");

    drop(guest);
    a.release(first).await.unwrap();
    a.free(first);
    assert_eq!((count(Some(&outer)), count(None)), (1, 1), "{}", flows(None));
    settle(&mut sibling, &world);
    drop(sibling);
    a.close_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_another_program_flushed_come_back() {
    if !inside("rules_that_another_program_flushed_come_back") {
        return;
    }
    surroundings();
    let deny = vec!["11.0.0.77".to_owned()];
    let a = open(A, 0, BTreeSet::new()).await;
    let slot = a.reserve().unwrap();
    let mut guest = Guest::of(&a, slot).await;
    let world = listener(Some("world"));
    settle(&mut guest, &world);
    let table = format!("wrenn_{A}");
    let list = || Command::new("nft").args(["-s", "list", "table", "inet", &table]).output().unwrap().stdout;
    let whole = list();
    for damage in [vec!["flush", "ruleset"], vec!["flush", "chain", "inet", &table, "input"]] {
        assert!(Command::new("nft").args(&damage).status().unwrap().success());
        assert_ne!(list(), whole, "{damage:?}");
        a.guard(deny.clone()).await.unwrap();
        assert_eq!(list(), whole, "{damage:?}");
        settle(&mut guest, &world);
    }
    // The control plane has another address now.
    a.guard(vec!["11.0.0.77".to_owned(), "11.0.0.78".to_owned()]).await.unwrap();
    assert!(String::from_utf8_lossy(&list()).contains("11.0.0.77-11.0.0.78"));
    a.close_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_cannot_be_removed_stops_nobody() {
    if !inside("a_slot_that_cannot_be_removed_stops_nobody") {
        return;
    }
    surroundings();
    // The number that would be next.
    let stuck = SlotId::new(u16::try_from(std::process::id() % u32::from(SlotId::MAX)).unwrap() + 1).unwrap();
    let path = format!("/run/netns/wrn-{A}-{stuck}");
    std::fs::create_dir(&path).unwrap();
    let a = open(A, 1, BTreeSet::new()).await;
    let slot = a.reserve().unwrap();
    assert_ne!(slot, stuck);
    a.ensure(slot).await.unwrap();
    std::fs::remove_dir(&path).unwrap();
    a.close_all().await.unwrap();
}
