//! The language of recipes: one instruction each, understood before anything is made.
//!
//! ```text
//!   RUN [--timeout=30s] COMMAND      START COMMAND      ENV NAME=VALUE      WORKDIR PATH      USER NAME      COPY SOURCE... TARGET
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

/// Of a RUN that says nothing else.
pub const RUN_TIME: Duration = Duration::from_secs(30);
pub const STEP_TIME_MAX: Duration = Duration::from_secs(3600);
const LINE_BYTES_MAX: usize = 16 * 1024;
const USER_BYTES_MAX: usize = 32;
/// As of a create: what both give together is within what a host takes.
const ENVS_MAX: usize = 128;
const ENV_BYTES_MAX: usize = 32 * 1024;
/// Of the environment in which the recipe ran, these say something of that place alone.
const ENVS_LEFT_OUT: [&str; 12] = [
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PWD",
    "OLDPWD",
    "HOSTNAME",
    "TERM",
    "SHLVL",
    "_",
    "WRENN_SANDBOX_ID",
    "WRENN_TEMPLATE_ID",
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instruction {
    Run { timeout: Option<Duration>, command: String },
    Start { command: String },
    Env { name: String, value: String },
    Workdir { path: String },
    User { name: String },
    Copy { sources: Vec<String>, target: String },
}

/// Why a line is none, for whoever wrote it.
pub fn parse(line: &str) -> Result<Instruction, String> {
    if line.len() > LINE_BYTES_MAX || line.contains(['\0', '\n', '\r']) {
        return Err(format!("must be one line of at most {LINE_BYTES_MAX} bytes, without NUL"));
    }
    let line = line.trim();
    let (keyword, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    if rest.is_empty() {
        return Err(format!("{keyword:?} has nothing after it"));
    }
    match keyword.to_ascii_uppercase().as_str() {
        "RUN" => run(rest),
        "START" => Ok(Instruction::Start { command: rest.to_owned() }),
        "ENV" => env(rest),
        "WORKDIR" => Ok(Instruction::Workdir { path: rest.to_owned() }),
        "USER" => user(rest),
        "COPY" => copy(rest),
        _ => Err(format!("{keyword:?} is none of RUN, START, ENV, WORKDIR, USER, COPY")),
    }
}

fn run(rest: &str) -> Result<Instruction, String> {
    let Some(option) = rest.strip_prefix("--timeout=") else {
        return Ok(Instruction::Run { timeout: None, command: rest.to_owned() });
    };
    let (text, command) = option.split_once(char::is_whitespace).unwrap_or((option, ""));
    let timeout = duration(text).filter(|time| !time.is_zero() && *time <= STEP_TIME_MAX);
    let timeout = timeout.ok_or_else(|| format!("--timeout={text} is no time such as 90s, 5m or 1h, of at most 1h"))?;
    let command = command.trim();
    if command.is_empty() {
        return Err("RUN has no command".to_owned());
    }
    Ok(Instruction::Run { timeout: Some(timeout), command: command.to_owned() })
}

fn env(rest: &str) -> Result<Instruction, String> {
    let wrong =
        || "ENV wants NAME=VALUE, with a name of letters, digits and _ that does not begin with a digit".to_owned();
    let (name, value) = rest.split_once('=').ok_or_else(wrong)?;
    let is_name = !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if !is_name {
        return Err(wrong());
    }
    Ok(Instruction::Env { name: name.to_owned(), value: value.to_owned() })
}

fn user(name: &str) -> Result<Instruction, String> {
    let is_name = name.len() <= USER_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if !is_name {
        return Err(format!("{name:?} is no name of a user: letters, digits, _ and -, a letter or _ first"));
    }
    Ok(Instruction::User { name: name.to_owned() })
}

fn copy(rest: &str) -> Result<Instruction, String> {
    let mut words: Vec<String> = rest.split_whitespace().map(str::to_owned).collect();
    let target = words.pop().unwrap_or_default();
    if words.is_empty() {
        return Err("COPY wants at least one source, and a target".to_owned());
    }
    let leads_out = |source: &String| source.starts_with('/') || source.split('/').any(|part| part == "..");
    if let Some(source) = words.iter().find(|source| leads_out(source)) {
        return Err(format!("{source:?} is not within the archive"));
    }
    Ok(Instruction::Copy { sources: words, target })
}

/// As Go writes them: `1m30s`, `500ms`.
pub fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    if rest == "0" {
        return Some(sum);
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let units = [
            ("ms", Duration::from_millis(1)),
            ("s", Duration::from_secs(1)),
            ("m", Duration::from_secs(60)),
            ("h", Duration::from_secs(3600)),
        ];
        let (unit, of) = units.into_iter().find(|(unit, _)| rest.starts_with(unit))?;
        sum = sum.checked_add(of.checked_mul(u32::try_from(number).ok()?)?)?;
        rest = &rest[unit.len()..];
    }
    (!text.is_empty()).then_some(sum)
}

/// In what the next instruction is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    pub user: String,
    pub workdir: String,
    pub envs: BTreeMap<String, String>,
}

impl Context {
    pub fn new() -> Self {
        Self { user: "root".to_owned(), workdir: "/".to_owned(), envs: BTreeMap::new() }
    }

    /// Sets a name to a value in which names stand for what was set before.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let too_large = || format!("the environment has more than {ENVS_MAX} names or {ENV_BYTES_MAX} bytes");
        let value = expanded(value, &self.envs).ok_or_else(too_large)?;
        self.envs.insert(name.to_owned(), value);
        let bytes: usize = self.envs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if self.envs.len() > ENVS_MAX || bytes > ENV_BYTES_MAX { Err(too_large()) } else { Ok(()) }
    }

    /// A path below the present directory, unless it is a whole one.
    pub fn path(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.workdir.trim_end_matches('/')) }
    }

    /// What begins with the template has them.
    pub fn envs_of_template(&self) -> BTreeMap<String, String> {
        let kept = self.envs.iter().filter(|(name, _)| !ENVS_LEFT_OUT.contains(&name.as_str()));
        kept.map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

/// `$NAME` and `${NAME}` by their values, of which unknown ones are empty; `$$` is a dollar. None: it is longer than any value may be, and
/// is not made to its end.
fn expanded(text: &str, envs: &BTreeMap<String, String>) -> Option<String> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut done = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        if done.len() > ENV_BYTES_MAX {
            return None;
        }
        done.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            done.push('$');
            rest = after;
        } else if let Some((name, after)) = after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            done.push_str(envs.get(name).map_or("", String::as_str));
            rest = after;
        } else {
            let end = after.find(|c| !is_of_name(c)).unwrap_or(after.len());
            let name = &after[..end];
            // A dollar before anything else is itself.
            done.push_str(if name.is_empty() { "$" } else { envs.get(name).map_or("", String::as_str) });
            rest = &after[end..];
        }
    }
    done.push_str(rest);
    Some(done)
}

/// How it is found out whether what was started is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Healthcheck {
    pub interval: Duration,
    pub timeout: Duration,
    pub start_period: Duration,
    /// None: until the build's time is over.
    pub retries: Option<u32>,
    pub command: String,
}

/// `[--interval=3s] [--timeout=10s] [--start-period=0] [--retries=0] COMMAND`
pub fn healthcheck(text: &str) -> Result<Healthcheck, String> {
    if text.len() > LINE_BYTES_MAX || text.contains('\0') {
        return Err(format!("must have at most {LINE_BYTES_MAX} bytes, and no NUL"));
    }
    let mut check = Healthcheck {
        interval: Duration::from_secs(3),
        timeout: Duration::from_secs(10),
        start_period: Duration::ZERO,
        retries: None,
        command: String::new(),
    };
    let mut rest = text.trim();
    while rest.starts_with("--") {
        let (option, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let time = || {
            let time = duration(value).filter(|time| *time <= STEP_TIME_MAX);
            time.ok_or_else(|| format!("{option} is no time such as 3s or 1m, of at most 1h"))
        };
        match name {
            "--interval" => check.interval = time()?.max(Duration::from_millis(100)),
            "--timeout" => check.timeout = time()?.max(Duration::from_millis(100)),
            "--start-period" => check.start_period = time()?,
            "--retries" => {
                let count: u32 = value.parse().map_err(|_| format!("{option} is no number of retries"))?;
                check.retries = (count > 0).then_some(count);
            }
            _ => return Err(format!("{name} is none of --interval, --timeout, --start-period, --retries")),
        }
        rest = after.trim_start();
    }
    if rest.is_empty() {
        return Err("has no command".to_owned());
    }
    check.command = rest.to_owned();
    Ok(check)
}

impl Healthcheck {
    /// For all tries together; none: as long as the build may take.
    pub fn time_max(&self) -> Option<Duration> {
        self.retries.map(|retries| self.start_period + self.interval.saturating_mul(retries.saturating_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Instruction {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn instructions_are_understood() {
        let command = "echo a  b".to_owned();
        assert_eq!(parsed("run echo a  b"), Instruction::Run { timeout: None, command: command.clone() });
        let timeout = Some(Duration::from_secs(90));
        assert_eq!(parsed(" RUN  --timeout=1m30s echo a  b "), Instruction::Run { timeout, command });
        assert_eq!(parsed("Env A=b=c"), Instruction::Env { name: "A".to_owned(), value: "b=c".to_owned() });
        let copy = Instruction::Copy { sources: vec!["a".to_owned(), "b/c".to_owned()], target: "/d/".to_owned() };
        assert_eq!(parsed("COPY a b/c /d/"), copy);
        assert_eq!(parsed("USER web-1"), Instruction::User { name: "web-1".to_owned() });
    }

    #[test]
    fn what_is_none_is_told_so() {
        for line in [
            "",
            "RUN",
            "RUN --timeout=1m",
            "RUN --timeout=x true",
            "RUN --timeout=0s true",
            "RUN --timeout=2h true",
            "FROM debian",
            "# a comment",
            "ENV A",
            "ENV =b",
            "ENV 1A=b",
            "ENV A B=c",
            "USER 1a",
            "USER a b",
            "USER a;b",
            "COPY a",
            "COPY ../a /b",
            "COPY /etc/passwd /b",
            "COPY a/../../b /c",
            "RUN a\nRUN b",
            "RUN a\0b",
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
        assert!(parse(&format!("RUN {}", "x".repeat(LINE_BYTES_MAX))).is_err());
    }

    #[test]
    fn times_are_as_go_writes_them() {
        for (text, millis) in [("0", 0), ("500ms", 500), ("3s", 3000), ("1m30s", 90_000), ("2h", 7_200_000)] {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "3", "s", "-1s", "1.5s", "3x", "99999999999999999999s", "3s ", "ä"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn names_stand_for_what_was_set_before() {
        let mut context = Context::new();
        context.set("A", "x").unwrap();
        for (text, value) in [
            ("$A", "x"),
            ("${A}y", "xy"),
            ("$Ay", ""),
            ("$$A", "$A"),
            ("${B}z", "z"),
            ("a$", "a$"),
            ("a$-", "a$-"),
            ("${A", "${A"),
            ("$A$A", "xx"),
        ] {
            context.set("V", text).unwrap();
            assert_eq!(context.envs["V"], value, "{text}");
        }
        assert!(context.set("L", &"x".repeat(ENV_BYTES_MAX)).is_err());
        let mut context = Context::new();
        context.set("A", &"x".repeat(ENV_BYTES_MAX / 2)).unwrap();
        assert!(context.set("B", &"$A".repeat(1 << 20)).is_err() && !context.envs.contains_key("B"));
        let mut context = Context::new();
        assert!((0..ENVS_MAX).all(|n| context.set(&format!("N{n}"), "").is_ok()));
        assert!(context.set("N0", "x").is_ok() && context.set("more", "").is_err());
    }

    #[test]
    fn a_template_has_the_environment_without_what_is_of_the_place() {
        let mut context = Context::new();
        for name in ["APP", "HOME", "_", "WRENN_SANDBOX_ID"] {
            context.set(name, "1").unwrap();
        }
        assert_eq!(context.envs_of_template().into_keys().collect::<Vec<_>>(), ["APP"]);
    }

    #[test]
    fn paths_lie_below_the_directory() {
        let mut context = Context::new();
        assert_eq!(context.path("a"), "/a");
        context.workdir = "/b/".to_owned();
        assert_eq!((context.path("a").as_str(), context.path("/a").as_str()), ("/b/a", "/a"));
    }

    #[test]
    fn healthchecks_have_options_before_their_command() {
        let check =
            healthcheck("--interval=1s --retries=4 --start-period=2s curl -f --retry 2 http://127.0.0.1").unwrap();
        assert_eq!((check.retries, check.command.as_str()), (Some(4), "curl -f --retry 2 http://127.0.0.1"));
        assert_eq!(check.time_max(), Some(Duration::from_secs(7)));
        assert_eq!(healthcheck("true").unwrap().time_max(), None);
        for wrong in ["", "--interval=1s", "--retries=x true", "--interval=2h true", "--what=1 true"] {
            assert!(healthcheck(wrong).is_err(), "{wrong}");
        }
    }
}
