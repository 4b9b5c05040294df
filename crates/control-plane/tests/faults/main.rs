//! Faults: two control-plane processes on a real PostgreSQL, real host agents on microVMs that are fakes, and something that breaks.
//!
//! What must hold is judged by what is not under test: rows of the database, processes and files of the hosts, the clients' own records.
//! Each random test prints its seed; `WRENN_TEST_SEED` plays it again. `docs/how-to/faults.md` says what is covered.

mod agent;
mod answers;
mod byoc;
mod certificates;
mod client;
mod cluster;
mod confusion;
mod copies;
mod crashes;
mod database;
mod fail_over;
mod herd;
mod history;
mod host;
mod hour;
mod linearizable;
mod partitions;
mod place;
mod seed;
#[path = "../../../host-agent/tests/stage/mod.rs"]
mod stage;
mod time_travel;
mod truth;

/// What guests of the stage are: copies of this program.
#[test]
fn fake_envd() {
    stage::fake_envd();
}

/// What agents of hosts that are processes of their own are: copies of this program.
#[test]
fn agent_process() {
    hour::machine::serve_if_asked();
}
