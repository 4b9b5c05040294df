//! The same in a guest: what its kernel and its one CPU add is on both sides.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use whole_machine::figures::{Figure, Judged, Limit};
use whole_machine::platform::Platform;

use crate::envd::{Client, Codec};
use crate::{PROGRAM, floor, milliseconds};

/// By each way, in turns.
const ROUNDS: usize = 10;
const PROCESSES: usize = 20;
/// Where this very program lies in the guest, as the floor.
const FLOOR: &str = "/root/floor";

/// Start of a process to its end event, as the host hears it, beside the bare process in the same guest.
pub fn processes() -> Result<Vec<Judged>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("make a runtime")?;
    let platform = Platform::start();
    let id = runtime.block_on(platform.create());
    let guest = platform.guest(&id);
    let program = std::fs::read(std::env::current_exe()?).context("read this program")?;
    let upload = format!("/files?path={FLOOR}");
    let kind = ("content-type", "application/octet-stream");
    let (status, ..) = runtime.block_on(guest.client.exchange("POST", &upload, &[kind], program));
    ensure!(status == 200, "envd answers an upload with {status}");
    let mut client = Client::of(
        guest.way.connect().context("connect to the guest")?,
        &format!("x-access-token: {}\r\n", guest.access_token),
    )?;
    let (mut by_envd, mut bare) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let ran = runtime.block_on(guest.client.sh(&format!("chmod +x {FLOOR}; {FLOOR} floor {PROCESSES}")));
        ensure!(ran.exit_code() == 0, "the floor ended with {}", String::from_utf8_lossy(&ran.stderr));
        let times: Vec<f64> = serde_json::from_str(ran.text()).context("read the floor's times")?;
        for _ in 0..PROCESSES {
            let began = Instant::now();
            let mut took = 0.0;
            client.run(Codec::Json, &[PROGRAM], || took = milliseconds(began))?;
            if round > 0 {
                by_envd.push(took);
            }
        }
        if round > 0 {
            bare.extend(times);
        }
    }
    Ok(vec![Figure::of("process_in_guest", "ms", by_envd).beside(bare).judged(Limit::Ratio(1.3))])
}

/// `bench-envd floor RUNS`, in the guest: prints what each run took.
pub fn print_floor(runs: usize) -> Result<()> {
    let times = (0..runs).map(|_| {
        let began = Instant::now();
        floor::run(PROGRAM)?;
        Ok(milliseconds(began))
    });
    let times = times.collect::<Result<Vec<_>>>()?;
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}
