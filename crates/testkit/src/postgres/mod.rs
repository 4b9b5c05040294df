//! Real PostgreSQL for tests: an empty database for each test, on a private cluster of the system's binaries.
//!
//! ```no_run
//! # async fn test() {
//! let database = testkit::postgres::Database::new().await;
//! // connect to database.url
//! # }
//! ```
//!
//! There is one cluster for each test process, made when the first database is asked for. It is reached by a unix socket only, keeps
//! nothing for a crash of the machine, and ends with the process, however that ends. What a test needs of a server that goes away and
//! comes back is on a cluster of its own: [`Database::on_own_server`]. These functions panic when there is no PostgreSQL, with what to
//! install; a test without its database must not pass.

mod place;
mod server;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

pub use server::{Server, Stop};

/// Of this process. It ends by the clean-up at exit, because statics are never dropped.
static SHARED: OnceLock<Server> = OnceLock::new();
const NEEDED: &str = "tests need PostgreSQL (scripts/setup installs it)";
static DATABASES: AtomicU64 = AtomicU64::new(0);

/// An empty database with an owner who is no superuser, as in the product.
pub struct Database {
    /// `postgres://wrenn@localhost:5432/<name>?host=<directory of the socket>`; the same after the server came back.
    pub url: String,
    name: String,
    server: Server,
    reach: Reach,
}

#[derive(PartialEq)]
enum Reach {
    /// The server is all tests' of this process: none may stop it.
    Shared,
    Own,
}

impl Database {
    /// On the cluster of this process. The database stays until the process ends.
    pub async fn new() -> Self {
        let start = || SHARED.get_or_init(|| Server::start().expect(NEEDED)).clone();
        blocking(move || Self::on(start(), Reach::Shared)).await
    }

    /// On a cluster of its own, for tests that stop the server. It takes a second longer.
    pub async fn on_own_server() -> Self {
        blocking(|| Self::on(Server::start().expect(NEEDED), Reach::Own)).await
    }

    fn on(server: Server, reach: Reach) -> Self {
        let name = format!("t{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let url = server.create_database(&name).expect("make a database for a test");
        Self { url, name, server, reach }
    }

    /// What statements answer, as the owner: a row is a line, columns are parted by `|`. For what a test sets or sees past the product.
    pub async fn sql(&self, statements: &str) -> String {
        let (server, name, statements) = (self.server.clone(), self.name.clone(), statements.to_owned());
        blocking(move || server.query(&name, &statements).unwrap_or_else(|error| panic!("{statements}: {error:#}")))
            .await
    }

    pub async fn dump(&self, file: &std::path::Path) {
        let (server, name, file) = (self.server.clone(), self.name.clone(), file.to_owned());
        blocking(move || server.dump(&name, &file).expect("dump a database")).await;
    }

    /// In the place of what is there.
    pub async fn restore(&self, file: &std::path::Path) {
        let (server, name, file) = (self.server.clone(), self.name.clone(), file.to_owned());
        blocking(move || server.restore(&name, &file).expect("restore a database")).await;
    }

    /// Its server, for what is done to a server as a whole. To be stopped by those who have it for themselves alone.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// From now on it is the one of another server, which has a copy of it. The server before is given up.
    pub fn move_to(&mut self, server: Server) {
        self.own_server();
        self.server = server;
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is reached through something that listens on these ports of the loopback and leads to sockets of servers.
    pub fn url_by(&self, ports: &[u16]) -> String {
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("postgres://wrenn@{}/{}?sslmode=disable", hosts.join(","), self.name)
    }

    /// PostgreSQL goes away: connections end with `admin_shutdown`, new ones are refused. Twice is fine.
    pub async fn stop_server(&self) {
        let server = self.own_server();
        blocking(move || server.stop().expect("stop PostgreSQL")).await;
    }

    /// It comes back, at the same url, with the same data. Resolves when it answers.
    pub async fn start_server(&self) {
        let server = self.own_server();
        blocking(move || server.resume().expect("start PostgreSQL again")).await;
    }

    pub async fn stop_server_by(&self, stop: Stop) {
        let server = self.own_server();
        blocking(move || server.stop_by(stop).expect("stop PostgreSQL")).await;
    }

    fn own_server(&self) -> Server {
        assert!(
            self.reach == Reach::Own,
            "only a server of the test's own may be stopped: use Database::on_own_server"
        );
        self.server.clone()
    }
}

/// The servers are ended and asked by programs that are waited for, which must not hold up the tests of other threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
