//! The system's own PostgreSQL, as Debian sets it up: role and database of an installed control plane, which is known there by its user
//! and needs no password.

use std::path::Path;

use nix::unistd::User;
use tokio::process::Command;

use super::{TOOL_MAX, finish, run};
use crate::failure::{Doing as _, Failure};

/// Where Debian's servers have their sockets, each named by its port.
const SOCKETS: &str = "/var/run/postgresql";
const SOCKET: &str = ".s.PGSQL.";
const SUPERUSER: &str = "postgres";

/// Makes what is missing of the role and the database that bear the user's name, and gives the address.
pub async fn database(user: &str) -> Result<String, Failure> {
    if User::from_name(SUPERUSER).doing(|| format!("look for the user {SUPERUSER}"))?.is_none() {
        return Err(Failure::new("PostgreSQL is not installed here: apt-get install postgresql"));
    }
    let port = port(Path::new(SOCKETS)).ok_or_else(|| {
        Failure::new(format!(
            "PostgreSQL does not run here (no socket in {SOCKETS}): systemctl start postgresql, or service postgresql start"
        ))
    })?;
    let tool = |of: &str, name: &str| {
        let mut command = Command::new("runuser");
        command.args(["-u", of, "--", name, "--host", SOCKETS, "--port", &port.to_string(), "--no-password"]);
        // Neither may look into root's directory.
        command.current_dir("/");
        command
    };
    let mut check = tool(user, "psql");
    check.args(["--no-psqlrc", "--quiet", &format!("--dbname={user}"), "--command="]);
    if !run(check, TOOL_MAX).await?.status.success() {
        let mut role = tool(SUPERUSER, "createuser");
        role.arg(user);
        // It may be there already, from a call that was ended here.
        run(role, TOOL_MAX).await?;
        let mut database = tool(SUPERUSER, "createdb");
        database.args([&format!("--owner={user}"), user]);
        finish(database, &format!("make the database {user}"), TOOL_MAX).await?;
    }
    Ok(address(user, port))
}

/// As a server has it that Debian has just set up.
pub fn url(user: &str) -> String {
    address(user, super::PORT)
}

fn address(user: &str, port: u16) -> String {
    format!("postgres://{user}@localhost:{port}/{user}?host={SOCKETS}")
}

/// Of the usual port, when a server is there, else of the lowest.
fn port(sockets: &Path) -> Option<u16> {
    let entries = std::fs::read_dir(sockets).into_iter().flatten().flatten();
    let ports = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(SOCKET)?.parse::<u16>().ok());
    ports.min_by_key(|port| (*port != super::PORT, *port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_port_goes_before_others() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(port(&dir.path().join("none")), None);
        for (name, found) in [
            ("15-main.pid", None),
            (".s.PGSQL.5433", Some(5433)),
            (".s.PGSQL.5433.lock", Some(5433)),
            (".s.PGSQL.5400", Some(5400)),
            (".s.PGSQL.5432", Some(5432)),
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
            assert_eq!(port(dir.path()), found, "{name}");
        }
    }
}
