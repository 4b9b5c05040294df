//! `/init`: gives this guest its identity, before user processes run (on): clock, entropy, host name, machine id, tokens, environment.
//!
//! Idempotent per incarnation; an incarnation that is over never comes back. In a sandbox the clock, the random numbers and the machine
//! id are required: without them the guest keeps the identity that it has and users' processes stay frozen, until the host asks again.

use std::io;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use api::guest::Init;
use base64::Engine as _;
use chrono::{DateTime, Utc};

use crate::console::say;
use crate::ports;
use crate::session::{Identity, Session};

/// Of the JSON body: environment (32 KiB at most by the public API) and everything else, with room.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// A clock that is off by less is left alone: stepping it would only add jitter.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(50);
const ENTROPY_BYTES_MAX: usize = 512;
/// A hosts file beyond this is not one that we keep.
const HOSTS_BYTES_MAX: u64 = 256 * 1024;

/// Incarnations that are remembered as over.
const EARLIER_MAX: usize = 64;
/// For all steps: they are a few system calls and two small files.
const STEPS_TIME_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum NotApplied {
    #[error("{0}: {1}")]
    Step(&'static str, #[source] io::Error),
    #[error("the steps of /init hang")]
    Hangs,
}

#[derive(Debug, thiserror::Error)]
pub enum BadInit {
    #[error("the body is not a valid /init: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("{0} is missing or malformed")]
    Field(&'static str),
}

/// What a valid body says, ready to be applied.
pub struct Hello {
    init: Init,
    time: Option<DateTime<Utc>>,
    entropy: Vec<u8>,
}

impl Hello {
    pub fn parse(body: &[u8]) -> Result<Self, BadInit> {
        // Serde would also take the fields by position, from an array.
        if !body.trim_ascii_start().starts_with(b"{") {
            return Err(BadInit::Syntax(serde::de::Error::custom("an object is expected")));
        }
        let init: Init = serde_json::from_slice(body)?;
        let time = match init.timestamp.as_str() {
            "" => None,
            text => Some(DateTime::parse_from_rfc3339(text).map_err(|_| BadInit::Field("timestamp"))?.to_utc()),
        };
        let entropy =
            base64::engine::general_purpose::STANDARD.decode(&init.entropy).map_err(|_| BadInit::Field("entropy"))?;
        if entropy.len() > ENTROPY_BYTES_MAX {
            return Err(BadInit::Field("entropy"));
        }
        if init.incarnation.is_empty() || init.incarnation.len() > 128 {
            return Err(BadInit::Field("incarnation"));
        }
        let printable = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
        if !printable(&init.access_token) || !printable(&init.control_token) {
            return Err(BadInit::Field("token"));
        }
        let name_ok = |name: &str| name.len() <= 63 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !name_ok(&init.hostname) {
            return Err(BadInit::Field("hostname"));
        }
        let bad_env =
            |(name, value): (&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
        if init.env_vars.iter().any(bad_env) {
            return Err(BadInit::Field("envVars"));
        }
        Ok(Self { init, time, entropy })
    }

    /// Whether a guest that has no control token yet gets one: without it nobody could ever call a control route again.
    pub fn has_control_token(&self) -> bool {
        !self.init.control_token.is_empty()
    }

    pub fn incarnation(&self) -> &str {
        &self.init.incarnation
    }

    /// Whether it is of an incarnation that is over: one that was here before, or one that this guest never was and that was told of
    /// earlier than the present one. The second holds only for a guest that runs: one that was saved may be restored by a host whose
    /// clock is behind.
    pub fn is_outdated(&self, session: &Session, is_quiet: bool) -> bool {
        let Some(present) = session.identity() else { return false };
        let is_older = self.time.zip(present.told_at).is_some_and(|(time, present)| time < present);
        self.is_new(session) && (present.earlier.contains(&self.init.incarnation) || (is_older && !is_quiet))
    }

    fn is_new(&self, session: &Session) -> bool {
        session.identity().is_none_or(|identity| identity.incarnation != self.init.incarnation)
    }

    /// Clock, random numbers, names, and the end of connections to peers that are gone: on a thread of its own, because a path of the guest
    /// may hang, and on one for all of it, because a guest that was just restored is slow at everything that it does for the first time.
    pub async fn apply(self, session: &Session) -> Result<Self, NotApplied> {
        if session.standalone {
            return Ok(self);
        }
        let is_new = self.is_new(session);
        let is_restored = is_new && session.identity().is_some();
        let (answer, applied) = tokio::sync::oneshot::channel();
        let work = move || {
            let taken = self.take_steps(is_new, &|| answer.is_closed());
            // One that was given up must not end what has begun since.
            if is_restored && taken.is_ok() && !answer.is_closed() {
                ports::end_lost_connections();
            }
            let _ = answer.send(taken.map(|()| self));
        };
        let thread = std::thread::Builder::new().name("identity".to_owned()).stack_size(256 * 1024).spawn(work);
        thread.map_err(|e| NotApplied::Step("start a thread", e))?;
        match tokio::time::timeout(STEPS_TIME_MAX, applied).await {
            Ok(Ok(applied)) => applied,
            Ok(Err(_)) | Err(_) => Err(NotApplied::Hangs),
        }
    }

    /// A thread that was given up does nothing more: another one may have done it since.
    fn take_steps(&self, is_new: bool, is_given_up: &dyn Fn() -> bool) -> Result<(), NotApplied> {
        let go_on = || if is_given_up() { Err(NotApplied::Hangs) } else { Ok(()) };
        if is_new {
            add_entropy(&self.entropy).map_err(|e| NotApplied::Step("reseed the random numbers", e))?;
        }
        go_on()?;
        if let Some(time) = self.time {
            set_clock(time, is_new).map_err(|e| NotApplied::Step("set the clock", e))?;
        }
        go_on()?;
        if is_new {
            set_machine_id(&self.init.incarnation).map_err(|e| NotApplied::Step("write the machine id", e))?;
        }
        go_on()?;
        // Nobody runs wrong with the name of before.
        if let Err(e) = set_host_name(&self.init.hostname) {
            say(format_args!("host name: {e}"));
        }
        Ok(())
    }
}

/// Takes the identity on and says whether this incarnation is a new one.
pub fn assume(session: &Session, hello: &Hello) -> bool {
    let Hello { init, time, .. } = hello;
    let before = session.identity();
    let is_new = hello.is_new(session);
    let mut earlier = before.as_ref().map(|identity| identity.earlier.clone()).unwrap_or_default();
    if let Some(before) = before.as_ref().filter(|_| is_new) {
        earlier.insert(0, before.incarnation.clone());
        earlier.truncate(EARLIER_MAX);
    }
    let mut envs = init.env_vars.clone();
    for (name, value) in [
        ("WRENN_SANDBOX", "true"),
        ("WRENN_SANDBOX_ID", &init.sandbox_id),
        ("WRENN_TEMPLATE_ID", &init.template_id),
        ("E2B_SANDBOX", "true"),
        ("E2B_SANDBOX_ID", &init.sandbox_id),
        ("E2B_TEMPLATE_ID", &init.template_id),
    ] {
        if !value.is_empty() {
            envs.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    // A later /init without a control token keeps the one that let it in.
    let control_token = match init.control_token.as_str() {
        "" => before.map(|identity| identity.control_token.clone()).unwrap_or_default(),
        token => token.to_owned(),
    };
    session.assume(Identity {
        incarnation: init.incarnation.clone(),
        earlier,
        told_at: *time,
        access_token: init.access_token.clone(),
        control_token,
        envs,
        default_user: init.default_user.clone(),
        default_workdir: init.default_workdir.clone(),
    });
    is_new
}

/// Within one incarnation the clock only goes forward: an `/init` that is asked again may carry an old time.
fn set_clock(host: DateTime<Utc>, may_go_back: bool) -> io::Result<()> {
    let now = Utc::now();
    if (now - host).abs().to_std().unwrap_or(Duration::MAX) <= CLOCK_TOLERANCE || (host < now && !may_go_back) {
        return Ok(());
    }
    let time = nix::sys::time::TimeSpec::new(host.timestamp(), i64::from(host.timestamp_subsec_nanos()));
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time).map_err(io::Error::from)
}

/// Mixes the host's bytes in, credits them, and makes the kernel's generator start from them at once: two guests of one snapshot must
/// not draw the same numbers.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    // linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7).
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; ENTROPY_BYTES_MAX],
    }
    if bytes.is_empty() {
        return Ok(());
    }
    let size = libc::c_int::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut info = PoolInfo { bits: size * 8, size, bytes: [0; ENTROPY_BYTES_MAX] };
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    let pool = std::fs::File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the argument is a rand_pool_info whose size says how many of its bytes are meant.
    if unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY, &info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call takes no argument.
    if unsafe { libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_host_name(name: &str) -> io::Result<()> {
    if name.is_empty() {
        return Ok(());
    }
    if nix::unistd::gethostname().is_ok_and(|present| present == name) {
        // As it was left: a sandbox keeps its name, and its hosts file is the user's own business.
        return Ok(());
    }
    nix::unistd::sethostname(name)?;
    let hosts = read_bounded("/etc/hosts").unwrap_or_default();
    let mut lines: Vec<&str> = hosts.lines().filter(|line| !line.starts_with("127.0.1.1")).collect();
    let own = format!("127.0.1.1 {name}");
    lines.push(&own);
    replace("/etc/hosts", &format!("{}\n", lines.join("\n")))
}

/// 32 hex digits, as the incarnation is; another text is hashed into that form by its own bytes.
fn set_machine_id(incarnation: &str) -> io::Result<()> {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(incarnation.as_bytes());
    let id: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let content = format!("{id}\n");
    // Nobody reads it meanwhile, so it need not be exchanged: that costs a directory two changes.
    match is_as_long("/etc/machine-id", content.len()) {
        true => overwrite("/etc/machine-id", &content),
        false => replace("/etc/machine-id", &content),
    }
}

/// Whether it is a regular file of one name and of this length.
fn is_as_long(path: &str, length: usize) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.nlink() == 1 && meta.len() == length as u64)
}

/// The guest's root may have put anything there: what is no regular file or too large is not read, and nothing is waited for.
fn read_bounded(path: &str) -> io::Result<String> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > HOSTS_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    let mut content = String::new();
    file.take(HOSTS_BYTES_MAX).read_to_string(&mut content)?;
    Ok(content)
}

fn replace(path: &str, content: &str) -> io::Result<()> {
    let unfinished = format!("{path}.envd");
    // Whatever has that name is not ours: a link there must not be written through.
    let _ = std::fs::remove_file(&unfinished);
    let written = std::fs::File::create_new(&unfinished)
        .and_then(|mut file| io::Write::write_all(&mut file, content.as_bytes()))
        .and_then(|()| std::fs::rename(&unfinished, path));
    match written {
        // On a full disk what is there can still be written over: it has its block.
        Err(e) if e.kind() == io::ErrorKind::StorageFull => {
            let _ = std::fs::remove_file(&unfinished);
            overwrite(path, content)
        }
        written => written,
    }
}

fn overwrite(path: &str, content: &str) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file = std::fs::File::options().write(true).custom_flags(flags).open(path)?;
    io::Write::write_all(&mut file, content.as_bytes())?;
    file.set_len(content.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_bodies_are_refused_and_name_the_field() {
        for (body, says) in [
            ("", "not a valid"),
            ("[]", "not a valid"),
            (r#"{"incarnation": 1}"#, "not a valid"),
            ("{}", "incarnation"),
            (r#"{"incarnation":"a","timestamp":"yesterday"}"#, "timestamp"),
            (r#"{"incarnation":"a","entropy":"***"}"#, "entropy"),
            (r#"{"incarnation":"a","hostname":"a b"}"#, "hostname"),
            (r#"{"incarnation":"a","accessToken":"a b"}"#, "token"),
            (r#"{"incarnation":"a","envVars":{"A=B":"x"}}"#, "envVars"),
        ] {
            let error = Hello::parse(body.as_bytes()).err().unwrap().to_string();
            assert!(error.contains(says), "{body}: {error}");
        }
    }

    #[test]
    fn a_second_incarnation_is_new_and_the_first_again_is_not() {
        let session = Session::new(true);
        let hello = |body: &str| Hello::parse(body.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
        assert!(assume(
            &session,
            &hello(r#"{"incarnation":"a","controlToken":"c","accessToken":"t","sandboxId":"sb1"}"#)
        ));
        assert!(!assume(&session, &hello(r#"{"incarnation":"a","accessToken":"t","sandboxId":"sb1"}"#)));
        assert_eq!(session.identity().unwrap().control_token, "c");
        assert_eq!(session.envs()["E2B_SANDBOX_ID"], "sb1");
        assert!(assume(&session, &hello(r#"{"incarnation":"b","accessToken":"u"}"#)));
        assert_eq!(session.identity().unwrap().access_token, "u");
    }

    #[test]
    fn an_incarnation_that_is_over_never_comes_back() {
        let session = Session::new(true);
        let hello = |incarnation: &str, minute: u32| {
            let body = format!(r#"{{"incarnation":"{incarnation}","timestamp":"2030-01-01T00:{minute:02}:00Z"}}"#);
            Hello::parse(body.as_bytes()).unwrap_or_else(|e| panic!("{e}"))
        };
        assert!(!hello("a", 1).is_outdated(&session, false));
        assume(&session, &hello("a", 1));
        assume(&session, &hello("c", 3));
        for is_quiet in [false, true] {
            assert!(hello("a", 4).is_outdated(&session, is_quiet));
            assert!(!hello("c", 1).is_outdated(&session, is_quiet), "asked again is fine");
            assert!(!hello("d", 4).is_outdated(&session, is_quiet));
        }
        // Never seen, but of before; a guest that was saved cannot tell that from a host whose clock is behind.
        assert!(hello("b", 2).is_outdated(&session, false));
        assert!(!hello("b", 2).is_outdated(&session, true));
    }
}
