//! `wrenn files cat SANDBOX:PATH...`.

use std::process::ExitCode;

use super::As;
use super::content::{Content, Stopped};
use super::remote::Remote;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, bytes_bar};
use crate::place::InSandbox;

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH.
    #[arg(required = true)]
    places: Vec<String>,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, _: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let mut stdout = tokio::io::stdout();
    // Beside a content on the same terminal a bar would be in the way.
    let bar = bytes_bar(Format::Json, None);
    for place in &arguments.places {
        let place = InSandbox::parse(place)?;
        let content = Content { remote: &remote, place: &place };
        tokio::select! {
            read = content.read(None, 0, &mut stdout, &bar) => match read {
                Ok(_) => {}
                Err(Stopped::Failed(failure)) => return Err(failure),
                Err(Stopped::Changed) => {
                    return Err(Failure::new(format!("{:?} was changed while it was read: what was written is a part of it", place.path)));
                }
            },
            _ = tokio::signal::ctrl_c() => return Err(Failure::new("interrupted").exiting(130)),
        }
    }
    Ok(ExitCode::SUCCESS)
}
