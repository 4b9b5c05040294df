//! `wrenn admin build`: templates of the platform, made by recipes.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use api::v1::builds::{Build, BuildStep, CreateBuild};
use reqwest::{Body, Method, multipart};
use serde_json::json;
use tokio_util::io::ReaderStream;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::{Doing as _, EXIT_USAGE, Failure};
use crate::output::{Format, age, facts, print_line, show, table};
use crate::printable::{escaped, lines};

/// Instructions of one recipe.
const RECIPE_MAX: usize = 256;
const RECIPE_BYTES_MAX: u64 = 1024 * 1024;
/// The server's limit: one that refuses in the middle of a body can often not be heard.
const ARCHIVE_BYTES_MAX: u64 = 100 << 20;
/// 100 MiB at 30 kB a second.
const SEND_MAX: Duration = Duration::from_secs(3600);
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(clap::Subcommand)]
pub enum Command {
    /// Build a template by a recipe, and tell how it goes. One that has the name gives way when the new one is there.
    Create(Box<Create>),
    /// The newest builds.
    #[command(visible_alias = "ls")]
    List,
    /// One build, with what its steps wrote.
    Get { id: String },
    /// Let nothing come of a build.
    Cancel { id: String },
}

#[derive(clap::Args)]
pub struct Create {
    /// Of the template.
    name: String,
    /// A file with an instruction a line: RUN, START, ENV, WORKDIR, USER, COPY. `-` is standard input. Empty lines, and lines that begin with #, are
    /// left out.
    #[arg(long, value_name = "FILE")]
    recipe: PathBuf,
    /// What it begins with [default: minimal].
    #[arg(long, value_name = "TEMPLATE")]
    base: Option<String>,
    /// [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    vcpus: Option<i64>,
    /// [default: 512]
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    memory: Option<i64>,
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    disk: Option<i64>,
    /// A command that ends with 0 once what was started is ready; before it, --interval=3s --timeout=10s --start-period=0s --retries=0.
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true)]
    healthcheck: Option<String>,
    /// Files for COPY: tar, tar.gz or zip, of at most 100 MiB.
    #[arg(long, value_name = "FILE")]
    archive: Option<PathBuf>,
    /// Neither fetch lists of packages and become wrenn-user before the recipe, nor clean up after it.
    #[arg(long)]
    bare: bool,
    /// Do not wait for its end.
    #[arg(long)]
    detach: bool,
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::Create(create) => return made(*create, options, format).await,
        Command::List => {
            let client = Client::of_person(options).await?;
            let builds: Vec<Build> = client.get(client.url(&["v1", "admin", "builds"])).await?;
            show(format, &builds, |builds| {
                let head = ["ID", "NAME", "STATUS", "STEP", "AGE", "ERROR"];
                table(&head, builds.iter().map(row).collect())
            })?;
        }
        Command::Get { id } => {
            let client = Client::of_person(options).await?;
            let build = get(&client, &id).await?;
            show(format, &build, |build| {
                let steps = build.logs.iter().map(|step| format!("\n{}", told(step, build.total_steps, true)));
                format!("{}{}", described(build), steps.collect::<String>())
            })?;
        }
        Command::Cancel { id } => {
            let client = Client::of_person(options).await?;
            client.post_only(client.url(&["v1", "admin", "builds", &id, "cancel"])).await?;
            show(format, &json!({ "id": id, "cancelled": true }), |_| format!("cancelled {id}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn made(create: Create, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let recipe = read_recipe(&create.recipe)?;
    let config = CreateBuild {
        name: create.name,
        base_template: create.base,
        recipe,
        healthcheck: create.healthcheck,
        vcpus: create.vcpus,
        memory_mb: create.memory,
        disk_size_mb: create.disk,
        skip_pre_post: create.bare,
    };
    let client = Client::of_person(options).await?;
    let url = client.url(&["v1", "admin", "builds"]);
    let build: Build = match &create.archive {
        None => client.post(url, &config).await?,
        Some(path) => {
            let request = client.upload(Method::POST, url)?.timeout(SEND_MAX);
            let sent = request.multipart(form(&config, path).await?).send().await;
            let answer = client.checked(sent.map_err(|error| client.broken(&error))?).await?;
            answer.json().await.map_err(|error| client.broken(&error))?
        }
    };
    if create.detach {
        show(format, &build, |build| build.id.clone())?;
        return Ok(ExitCode::SUCCESS);
    }
    tokio::select! {
        followed = follow(&client, &build.id, format) => followed,
        _ = tokio::signal::ctrl_c() => {
            let id = build.id;
            let goes_on = format!("interrupted; the build goes on (`wrenn admin build cancel {id}` ends it)");
            Err(Failure::new(goes_on).exiting(130))
        }
    }
}

async fn form(config: &CreateBuild, path: &Path) -> Result<multipart::Form, Failure> {
    let opening = || format!("open {}", path.display());
    let file = tokio::fs::File::open(path).await.doing(opening)?;
    let metadata = file.metadata().await.doing(opening)?;
    if !metadata.is_file() {
        // A pipe has no length, and a directory no bytes.
        return Err(Failure::usage(format!("{} is no file: --archive takes tar, tar.gz or zip", path.display())));
    }
    let length = metadata.len();
    if length > ARCHIVE_BYTES_MAX {
        let most = ARCHIVE_BYTES_MAX >> 20;
        return Err(Failure::usage(format!("{} has {length} bytes, and {most} MiB are the most", path.display())));
    }
    let part = multipart::Part::stream_with_length(Body::wrap_stream(ReaderStream::new(file)), length);
    let config = serde_json::to_string(config).expect("it is JSON");
    Ok(multipart::Form::new().text("config", config).part("archive", part.file_name("archive")))
}

/// Tells of each step when it has ended, until the build has.
async fn follow(client: &Client, id: &str, format: Format) -> Result<ExitCode, Failure> {
    let mut told_of = 0;
    loop {
        let build = get(client, id).await?;
        if format == Format::Human {
            // Begun anew, it has fewer.
            told_of = told_of.min(build.logs.len());
            for step in &build.logs[told_of..] {
                print_line(&told(step, build.total_steps, !step.ok))?;
            }
            told_of = build.logs.len();
        }
        match build.status.as_str() {
            "pending" | "running" => tokio::time::sleep(LOOK_EVERY).await,
            "success" => {
                show(format, &build, |build| format!("template {} is there", build.name))?;
                return Ok(ExitCode::SUCCESS);
            }
            status => {
                if format != Format::Human {
                    show(format, &build, |_| String::new())?;
                    return Ok(ExitCode::FAILURE);
                }
                let why = build.error.as_deref().map(escaped).unwrap_or_default();
                return Err(Failure::new(format!("the build is {status}: {why}")));
            }
        }
    }
}

async fn get(client: &Client, id: &str) -> Result<Build, Failure> {
    client.get(client.url(&["v1", "admin", "builds", id])).await
}

/// `[3/7] recipe  RUN make  12.3 s`, and what it wrote.
fn told(step: &BuildStep, total: i64, with_output: bool) -> String {
    let seconds = Duration::from_millis(u64::try_from(step.elapsed_ms).unwrap_or_default()).as_secs_f64();
    let mark = if step.ok { "" } else { "  failed" };
    let mut text = format!("[{}/{total}] {}  {}  {seconds:.1} s{mark}", step.step, step.phase, escaped(&step.cmd));
    for output in [&step.stdout, &step.stderr] {
        if with_output && !output.is_empty() {
            text.push('\n');
            text.push_str(lines(output).trim_end());
        }
    }
    text
}

fn row(build: &Build) -> Vec<String> {
    vec![
        build.id.clone(),
        build.name.clone(),
        build.status.clone(),
        format!("{}/{}", build.current_step, build.total_steps),
        age(build.created_at),
        build.error.as_deref().map(escaped).unwrap_or_default(),
    ]
}

fn described(build: &Build) -> String {
    facts(&[
        ("id", build.id.clone()),
        ("name", build.name.clone()),
        ("status", build.status.clone()),
        ("base", build.base_template.clone()),
        ("shape", format!("{} vCPUs, {} MiB, disk {} MiB", build.vcpus, build.memory_mb, build.disk_size_mb)),
        ("steps", format!("{} of {}", build.current_step, build.total_steps)),
        ("user", build.default_user.clone()),
        ("created", build.created_at.to_rfc3339()),
        ("completed", build.completed_at.map(|at| at.to_rfc3339()).unwrap_or_default()),
        ("error", build.error.as_deref().map(escaped).unwrap_or_default()),
    ])
}

fn read_recipe(path: &Path) -> Result<Vec<String>, Failure> {
    let doing = || format!("read the recipe {}", path.display());
    let read = if path == Path::new("-") { text_of(io::stdin()) } else { File::open(path).and_then(text_of) };
    let text = read.doing(doing).map_err(|failure| failure.exiting(EXIT_USAGE))?;
    instructions(&text).map_err(|why| Failure::usage(format!("{}: {why}", path.display())))
}

fn text_of(source: impl Read) -> io::Result<String> {
    let mut text = String::new();
    source.take(RECIPE_BYTES_MAX + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// One a line, without what is none.
fn instructions(text: &str) -> Result<Vec<String>, String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let found: Vec<String> = lines.map(str::to_owned).collect();
    match found.len() {
        0 => Err("there is no instruction in it".to_owned()),
        1..=RECIPE_MAX if text.len() as u64 <= RECIPE_BYTES_MAX => Ok(found),
        1..=RECIPE_MAX => Err(format!("it has more than {RECIPE_BYTES_MAX} bytes")),
        count => Err(format!("it has {count} instructions, and {RECIPE_MAX} are the most")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_its_instructions() {
        let text = "# what it is\r\n\r\nRUN true\r\n  ENV A=b # kept\n#RUN no\n\n";
        assert_eq!(instructions(text).unwrap(), ["RUN true", "ENV A=b # kept"]);
        assert_eq!(instructions(&"RUN true\n".repeat(RECIPE_MAX)).unwrap().len(), RECIPE_MAX);
        for wrong in
            ["", "\n# nothing\n", &"RUN true\n".repeat(RECIPE_MAX + 1), &format!("RUN {}", "x".repeat(2 << 20))]
        {
            assert!(instructions(wrong).is_err());
        }
    }

    #[test]
    fn a_recipe_that_cannot_be_read_is_wrong_usage() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            read_recipe(&path)
        };
        assert_eq!(read("good", b"RUN true\r\n").unwrap(), ["RUN true"]);
        let wrong = [
            ("missing", read_recipe(&dir.path().join("missing"))),
            ("empty", read("empty", b"# nothing\n")),
            ("binary", read("binary", b"RUN \xff")),
        ];
        for (name, read) in wrong {
            let failure = read.unwrap_err();
            assert_eq!(failure.exit_code(), ExitCode::from(EXIT_USAGE), "{name}");
            assert!(failure.message().contains(name), "{}", failure.message());
        }
    }

    #[tokio::test]
    async fn an_archive_is_a_file_of_bearable_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive.tar");
        std::fs::write(&path, b"").unwrap();
        assert!(form(&CreateBuild::default(), &path).await.is_ok());
        // Without a byte of it on the disk.
        File::options().write(true).open(&path).unwrap().set_len(ARCHIVE_BYTES_MAX + 1).unwrap();
        for wrong in [path.as_path(), dir.path()] {
            let failure = form(&CreateBuild::default(), wrong).await.unwrap_err();
            assert_eq!(failure.exit_code(), ExitCode::from(EXIT_USAGE), "{}", failure.message());
        }
    }

    #[test]
    fn what_a_guest_wrote_is_shown_without_what_steers() {
        let step = BuildStep {
            step: 2,
            phase: "recipe".to_owned(),
            cmd: "RUN x\x1b[2J".to_owned(),
            stdout: "out\x1b[2J\nmore\n".to_owned(),
            stderr: String::new(),
            exit: 1,
            ok: false,
            elapsed_ms: 1234,
        };
        assert_eq!(told(&step, 7, true), "[2/7] recipe  RUN x\\u{1b}[2J  1.2 s  failed\nout[2J\nmore");
        assert_eq!(told(&step, 7, false), "[2/7] recipe  RUN x\\u{1b}[2J  1.2 s  failed");
    }
}
